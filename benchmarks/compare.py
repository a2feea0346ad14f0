"""What became faster or slower from one file of results to another: `benchmarks/run.py --compare BEFORE AFTER`.

Runs of one machine differ by a few percent as a whole. So a contender is measured against a baseline of its own run
wherever both runs timed that baseline in that case, and the baseline itself by the clock. What counts is a difference
of more than `LEAST` that is also beyond the noise: three standard errors of the medians, by quantiles and rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.cases import TRAINING
from benchmarks.peers import BASELINES, TRAINING_BASELINES
from benchmarks.record import CaseResult, Result, read_cases
from benchmarks.tables import add_notes, plain_table

# Two runs of the same code differed by up to 1.4% against their baseline.
LEAST = 0.02
STANDARD_ERRORS = 3.0
# Of a normal distribution, from its 20% to its 80% quantile in standard deviations, and the median's standard error in
# standard deviations over the root of the number of timings.
_BETWEEN_QUANTILES = 1.683
_MEDIAN = 1.2533
OURS = ("pointfuse", "converted")


@dataclass(frozen=True)
class Change:
    """One contender in one case, before and after.

    Attributes:
        speed: how many times as fast it is after as before; None where one of the two has no timing.
        noise: the relative difference that counts as none.
        baseline: the contender of the same runs that `speed` is relative to; None where it is by the clock.
    """

    case: str
    contender: str
    before: Result
    after: Result
    speed: float | None
    noise: float
    baseline: str | None

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "same"; "broken" or "mended" where only one of the two gave a right answer."""
        if self.speed is None:
            return "broken" if self.before.ms else "mended"
        if abs(math.log(self.speed)) <= math.log1p(self.noise):
            return "same"
        return "faster" if self.speed > 1 else "slower"

    @property
    def is_regression(self) -> bool:
        """Whether something of pointfuse's became slower or broke."""
        return self.verdict in ("slower", "broken") and any(word in self.contender for word in OURS)


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
    cases = [read_cases(path) for path in (before, after)]
    machines = [_machine(path) for path in (before, after)]
    if machines[0] != machines[1] and not any_machine:
        raise ValueError(
            f"{before} is of {machines[0]} and {after} of {machines[1]}: figures of different machines say nothing of "
            "the code; --any-machine compares them all the same"
        )
    changes = compare(*cases)
    if not changes:
        raise ValueError(f"{before} and {after} have no case with a contender in common")
    table = plain_table(
        f"{before.name} to {after.name}", "case", "before ms", "after ms", "times as fast", "noise", "", "by"
    )
    told = [change for change in changes if change.verdict != "same"]
    for change in sorted(told, key=lambda c: c.speed or 0.0):
        table.add_row(*map(escape, _cells(change)))
    same = len(changes) - len(told)
    add_notes(table, [f"{same} of {len(changes)} are as before, within the noise.", *_left_out(*cases)])
    console.print(table)
    return int(any(change.is_regression for change in changes))


def _change(old_case: CaseResult, new_case: CaseResult, old: Result, new: Result) -> Change:
    if old.ms is None or new.ms is None:
        return Change(new_case.title, new.contender, old, new, None, 0.0, None)
    timings = [old, new]
    speed = old.ms.p50 / new.ms.p50
    baseline = None
    for name in TRAINING_BASELINES if new_case.suite == TRAINING else BASELINES:
        old_base, new_base = old_case.result(name), new_case.result(name)
        if name != new.contender and old_base and new_base and old_base.ms and new_base.ms:
            baseline = name
            speed *= new_base.ms.p50 / old_base.ms.p50
            timings += [old_base, new_base]
            break
        if name == new.contender:
            break
    noise = STANDARD_ERRORS * math.sqrt(sum(_relative_error(result) ** 2 for result in timings))
    return Change(new_case.title, new.contender, old, new, speed, max(LEAST, noise), baseline)


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

    speed = "-" if change.speed is None else f"{change.speed:.3f}"
    noise = "-" if change.speed is None else f"{change.noise:.1%}"
    figures = [ms(change.before), ms(change.after), speed, noise, change.verdict, change.baseline or "the clock"]
    return [f"{change.case}: {change.contender}", *figures]


def _left_out(before: Sequence[CaseResult], after: Sequence[CaseResult]) -> list[str]:
    titles = [{case.title for case in cases} for cases in (before, after)]
    lonely = [len(titles[0] - titles[1]), len(titles[1] - titles[0])]
    return (
        [f"Not compared: {lonely[0]} cases of the first file alone, {lonely[1]} of the second."] if any(lonely) else []
    )


def _machine(path: Path) -> str:
    """The device and, of a CPU, its threads, as a file has them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    device = content.get("device", "an unnamed device")
    threads = content.get("machine", {}).get("threads")
    return f"{device}, {threads} threads" if device == content.get("machine", {}).get("cpu") else str(device)
