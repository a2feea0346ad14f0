"""Runs a list of cases, each with its contenders and limits, under one progress bar, and within a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import NoReturn

from rich.console import Console

from benchmarks.cases import OVERHEAD, PendingCase
from benchmarks.harness import Case, CheckedCase, Contender, Limits, check_case, time_case
from benchmarks.record import CaseResult, Skipped
from benchmarks.roofline import Ceilings, convolution_work, floor_seconds
from benchmarks.tables import progress_bar
from benchmarks.timing import Method, first_line, tf32_allowed


@dataclass(frozen=True)
class Job:
    """A case, the contenders that run it, how they are timed, and for how long."""

    pending: PendingCase
    contenders: tuple[Contender, ...]
    method: Method
    limits: Limits


class OutOfTime(KeyboardInterrupt):
    """The time of a run is up. Like Ctrl-C it ends whatever is under way, a contender's compilation too."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds; where the system has no timers, nothing is raised."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _time_is_up(number: int, frame: FrameType | None) -> NoReturn:
    raise OutOfTime


@dataclass(frozen=True)
class Outcome:
    """How a list of jobs ended.

    Attributes:
        left: how many were not finished, the last of the list.
        interrupted: whether by Ctrl-C.
    """

    left: int = 0
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        return not self.left


def run_jobs(
    jobs: Sequence[Job],
    baselines: Sequence[str],
    console: Console,
    on_result: Callable[[CaseResult], None],
    on_checked: Callable[[CheckedCase], None] = lambda checked: None,
    ceilings: Ceilings | None = None,
    on_skipped: Callable[[Skipped], None] | None = None,
    on_done: Callable[[int], None] = lambda left: None,
    seconds: float | None = None,
) -> Outcome:
    """Build, check and time case after case.

    Args:
        baselines: names of contenders that ratios are computed against.
        on_result: called with the result of each case and timer, the last one perhaps of a timing that was cut short.
        on_checked: called between a case's check and its timing.
        ceilings: those of the device; with them results have a floor, but for those of the host's time and of training
            steps.
        on_skipped: called with a case that could not be built or checked; without, the error is raised.
        on_done: called after each job with the number of those left.
        seconds: for all of it; a case under way is given up then.
    """
    started = time.monotonic()

    def up(expected: float = 0.0) -> bool:
        return seconds is not None and time.monotonic() - started + expected >= seconds

    left, longest = len(jobs), 0.0
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(jobs))
        try:
            with time_limit(seconds):
                for index, job in enumerate(jobs):
                    # One that would not end in time is not begun.
                    if up(longest):
                        return Outcome(left)
                    progress.update(task, description=job.pending.title)

                    def advance(done: float, before: int = index) -> None:
                        progress.update(task, completed=before + done)

                    begun = time.monotonic()
                    if not _run_job(job, baselines, ceilings, advance, on_result, on_checked, on_skipped):
                        return Outcome(left, interrupted=not up())
                    longest = max(longest, time.monotonic() - begun)
                    left -= 1
                    on_done(left)
        except KeyboardInterrupt as reason:
            return Outcome(left, interrupted=not isinstance(reason, OutOfTime))
    return Outcome()


def _run_job(
    job: Job,
    baselines: Sequence[str],
    ceilings: Ceilings | None,
    on_progress: Callable[[float], None],
    on_result: Callable[[CaseResult], None],
    on_checked: Callable[[CheckedCase], None],
    on_skipped: Callable[[Skipped], None] | None,
) -> bool:
    """Returns whether it was run to its end. Its weights, activations and graphs are gone when it returns."""
    try:
        case = job.pending.build()
        with tf32_allowed(case.tf32):
            checked = check_case(case, job.contenders, job.method, lambda done: on_progress(0.5 * done))
    except Exception as error:
        # A package that is not there, memory that does not hold the float64 run: no reason to lose the cases behind.
        if on_skipped is None:
            raise
        on_skipped(Skipped(job.pending.title, first_line(error)))
        return True
    on_checked(checked)
    timers = job.method.timers
    for turn, timer in enumerate(timers):
        with tf32_allowed(case.tf32):
            result = time_case(
                checked,
                baselines,
                job.limits,
                timer,
                lambda done, turn=turn: on_progress(0.5 + 0.5 * (turn + done) / len(timers)),  # type: ignore[misc]
            )
        # A call of a host, and of a training step, have no floor.
        if ceilings is not None and case.suite != OVERHEAD and case.step is None:
            result = _with_floor(result, case, ceilings)
        on_result(result)
        if not result.complete:
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
