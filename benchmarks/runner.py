"""Runs a list of cases, each with its contenders and limits, under one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from benchmarks.cases import PendingCase
from benchmarks.harness import CaseResult, CheckedCase, Contender, Limits, check_case, time_case, timer_for
from benchmarks.tables import progress_bar


@dataclass(frozen=True)
class Job:
    """A case, the contenders that run it, and for how long."""

    pending: PendingCase
    contenders: tuple[Contender, ...]
    limits: Limits


def run_jobs(
    jobs: Sequence[Job],
    baselines: Sequence[str],
    device: torch.device,
    console: Console,
    on_result: Callable[[CaseResult], None],
    on_checked: Callable[[CheckedCase], None] = lambda checked: None,
) -> bool:
    """Build, check and time case after case.

    Args:
        baselines: names of contenders that ratios are computed against.
        on_result: called with each case's result, the last one perhaps of a timing that Ctrl-C cut short.
        on_checked: called between a case's check and its timing.

    Returns:
        Whether all of it was run; False after Ctrl-C.
    """
    timer = timer_for(device)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(jobs))

        def half_from(start: float) -> Callable[[float], None]:
            return lambda part: progress.update(task, completed=start + part / 2)

        try:
            for index, job in enumerate(jobs):
                progress.update(task, description=job.pending.title)
                checked = check_case(job.pending.build(), job.contenders, half_from(index))
                on_checked(checked)
                result = time_case(checked, baselines, job.limits, timer, half_from(index + 0.5))
                on_result(result)
                if not result.complete:
                    return False
        except KeyboardInterrupt:
            return False
    return True
