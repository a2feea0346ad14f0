"""What became faster or slower from one file of results to another: `benchmarks/run.py --compare BEFORE AFTER`.

Runs of one machine differ as a whole, and one contender of a run may have had bad luck. So a contender is measured by
the clock and, wherever both runs timed a baseline in that case, against it; only what both show counts. It has to be
more than `LEAST`, and beyond the noise: three standard errors of the medians, by quantiles and rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.peers import BASELINES, TRAINING_BASELINES, is_other
from benchmarks.record import CaseResult, Result, Run, read_run
from benchmarks.tables import add_notes, plain_table

# Two runs of the same code on a CPU, 5 s a case, differed by up to 2.1% against their baseline and 3.5% by the clock,
# all within their noise, but for one case whose baseline took 25% longer in one of them.
LEAST = 0.02
STANDARD_ERRORS = 3.0
# Of a normal distribution, from its 20% to its 80% quantile in standard deviations, and the median's standard error in
# standard deviations over the root of the number of timings.
_BETWEEN_QUANTILES = 1.683
_MEDIAN = 1.2533


@dataclass(frozen=True)
class Measure:
    """How many times as fast something is after as before, and the relative difference that counts as none."""

    speed: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(math.log(self.speed)) <= math.log1p(self.noise):
            return "same"
        return "faster" if self.speed > 1 else "slower"


@dataclass(frozen=True)
class Change:
    """One contender in one case, before and after.

    Attributes:
        by_clock: None where one of the two has no timing.
        by_baseline: against a contender of the same runs; None also where there is none.
    """

    case: str
    contender: str
    before: Result
    after: Result
    by_clock: Measure | None
    by_baseline: Measure | None

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "same"; "broken" or "mended" where only one of the two gave a right answer."""
        if self.by_clock is None:
            return "broken" if self.before.ms else "mended"
        verdicts = {measure.verdict for measure in (self.by_clock, self.by_baseline) if measure is not None}
        return verdicts.pop() if len(verdicts) == 1 else "same"

    @property
    def is_regression(self) -> bool:
        """Whether something of pointfuse's became slower or broke."""
        return self.verdict in ("slower", "broken") and not is_other(self.contender)


def compare(before: Sequence[CaseResult], after: Sequence[CaseResult]) -> list[Change]:
    """Every contender that both runs timed, or that only one of them could, in every case that both have."""
    earlier = {case.title: case for case in before}
    pairs = [(earlier[case.title], case) for case in after if case.title in earlier]
    return [
        _change(old_case, new_case, old, new)
        for old_case, new_case in pairs
        for new in new_case.results
        if (old := old_case.result(new.contender)) is not None and (old.ms or new.ms) and _ran(old) and _ran(new)
    ]


def compare_files(before: Path, after: Path, console: Console, any_machine: bool = False) -> int:
    """Print what changed between two files; returns 1 if something of pointfuse's became slower or broke, else 0.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is none of results, they are of different machines (unless `any_machine`), or they have
            no case in common.
    """
    runs = [read_run(path) for path in (before, after)]
    cases = [list(run.cases) for run in runs]
    machines = [machine(run) for run in runs]
    if machines[0] != machines[1] and not any_machine:
        raise ValueError(
            f"{before} is of {machines[0]} and {after} of {machines[1]}: figures of different machines say nothing of "
            "the code; --any-machine compares them all the same"
        )
    changes = compare(*cases)
    if not changes:
        raise ValueError(f"{before} and {after} have no case with a contender in common")
    table = plain_table(
        f"{before.name} to {after.name}", "case", "before ms", "after ms", "times as fast", "against baseline", ""
    )
    told = [change for change in changes if change.verdict != "same"]
    for change in sorted(told, key=lambda c: c.by_clock.speed if c.by_clock else 0.0):
        table.add_row(*map(escape, _cells(change)))
    same = len(changes) - len(told)
    add_notes(table, [f"{same} of {len(changes)} are as before, within the noise.", *_left_out(*cases)])
    console.print(table)
    return int(any(change.is_regression for change in changes))


def _change(old_case: CaseResult, new_case: CaseResult, old: Result, new: Result) -> Change:
    by_clock = by_baseline = None
    if old.ms is not None and new.ms is not None:
        by_clock = _measure([old], [new])
        for name in TRAINING_BASELINES if new_case.trains else BASELINES:
            bases = old_case.result(name), new_case.result(name)
            if name == new.contender:
                break
            if bases[0] is not None and bases[1] is not None and bases[0].ms and bases[1].ms:
                by_baseline = _measure([old, bases[1]], [new, bases[0]])
                break
    return Change(new_case.title, new.contender, old, new, by_clock, by_baseline)


def _measure(over: Sequence[Result], under: Sequence[Result]) -> Measure:
    """The product of some medians over that of others."""
    noise = STANDARD_ERRORS * math.sqrt(sum(_relative_error(result) ** 2 for result in (*over, *under)))
    return Measure(math.prod(map(_median, over)) / math.prod(map(_median, under)), max(LEAST, noise))


def _median(result: Result) -> float:
    assert result.ms is not None
    return result.ms.p50


def _relative_error(result: Result) -> float:
    """The standard error of a median, over the median."""
    assert result.ms is not None
    deviation = (result.ms.p80 - result.ms.p20) / _BETWEEN_QUANTILES
    return _MEDIAN * deviation / math.sqrt(max(1, result.rounds)) / result.ms.p50


def _ran(result: Result) -> bool:
    return result.status in ("ok", "wrong", "failed")


def _cells(change: Change) -> list[str]:
    def ms(result: Result) -> str:
        return result.status if result.ms is None else f"{result.ms.p50:.3g}"

    def speed(measure: Measure | None) -> str:
        return "-" if measure is None else f"{measure.speed:.3f} ±{measure.noise:.1%}"

    figures = [ms(change.before), ms(change.after), speed(change.by_clock), speed(change.by_baseline), change.verdict]
    return [f"{change.case}: {change.contender}", *figures]


def _left_out(before: Sequence[CaseResult], after: Sequence[CaseResult]) -> list[str]:
    titles = [{case.title for case in cases} for cases in (before, after)]
    lonely = [len(titles[0] - titles[1]), len(titles[1] - titles[0])]
    return (
        [f"Not compared: {lonely[0]} cases of the first file alone, {lonely[1]} of the second."] if any(lonely) else []
    )


def machine(run: Run) -> str:
    """The device and, of a CPU, its threads."""
    return run.device if run.on_gpu else f"{run.device}, {run.machine['threads']} threads"
