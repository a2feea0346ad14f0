"""Runs a list of cases, each with its contenders and limits, under one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from benchmarks.cases import PendingCase
from benchmarks.harness import Case, CheckedCase, Contender, Limits, check_case, time_case
from benchmarks.record import CaseResult
from benchmarks.roofline import Ceilings, convolution_work, floor_seconds
from benchmarks.tables import progress_bar
from benchmarks.timing import Method


@dataclass(frozen=True)
class Job:
    """A case, the contenders that run it, how they are timed, and for how long."""

    pending: PendingCase
    contenders: tuple[Contender, ...]
    method: Method
    limits: Limits


def run_jobs(
    jobs: Sequence[Job],
    baselines: Sequence[str],
    console: Console,
    on_result: Callable[[CaseResult], None],
    on_checked: Callable[[CheckedCase], None] = lambda checked: None,
    ceilings: Ceilings | None = None,
) -> bool:
    """Build, check and time case after case.

    Args:
        baselines: names of contenders that ratios are computed against.
        on_result: called with the result of each case and timer, the last one perhaps of a timing that Ctrl-C cut
            short.
        on_checked: called between a case's check and its timing.
        ceilings: those of the device; with them results have a floor, but for those of the host's time and of training
            steps.

    Returns:
        Whether all of it was run; False after Ctrl-C.
    """
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(jobs))

        def part(start: float, size: float) -> Callable[[float], None]:
            return lambda done: progress.update(task, completed=start + done * size)

        try:
            for index, job in enumerate(jobs):
                progress.update(task, description=job.pending.title)
                checked = check_case(job.pending.build(), job.contenders, job.method, part(index, 0.5))
                on_checked(checked)
                share = 0.5 / len(job.method.timers)
                for turn, timer in enumerate(job.method.timers):
                    done = part(index + 0.5 + turn * share, share)
                    result = time_case(checked, baselines, job.limits, timer, done)
                    if ceilings is not None and timer.l2 is not None and checked.case.step is None:
                        result = _with_floor(result, checked.case, ceilings)
                    on_result(result)
                    if not result.complete:
                        return False
                # Its weights, activations and graphs are gone before the next case makes its own.
                del checked
        except KeyboardInterrupt:
            return False
    return True


def _with_floor(result: CaseResult, case: Case, ceilings: Ceilings) -> CaseResult:
    work = convolution_work(case.model, case.x)
    return replace(
        result,
        flops=sum(layer.flops for layer in work),
        bytes=sum(layer.bytes for layer in work),
        floor_us=floor_seconds(work, ceilings, case.dtype) * 1e6,
    )
