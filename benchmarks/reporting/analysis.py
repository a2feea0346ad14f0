"""What files of results say together: one set of cases, how pointfuse stands in each, and in which it is not faster."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import TRAINING
from benchmarks.compare import machine
from benchmarks.peers import EAGER_CHANNELS_LAST, is_other, is_ours
from benchmarks.record import CaseResult, Result, Run, read_run
from benchmarks.roofline import Ceilings

_NAMES = {
    "torch": "PyTorch",
    "onednn": "oneDNN",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "triton": "Triton",
    "python": "Python",
}
# Two runs of the same code differ by as much.
LEVEL = 0.02


@dataclass(frozen=True)
class Source:
    """A run, and the file it is kept in."""

    path: Path
    run: Run

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Merged:
    """Runs of one device as one.

    Attributes:
        sources: oldest first.
        cases: each once, in the order in which they were first run. Of several measurements of a case the one with the
            most contenders counts, of equals the newest.
        measured_again: how many measurements do not count for that.
    """

    sources: tuple[Source, ...]
    cases: tuple[CaseResult, ...]
    measured_again: int

    @property
    def newest(self) -> Run:
        return self.sources[-1].run

    @property
    def complete(self) -> bool:
        return all(source.run.complete for source in self.sources)

    @property
    def ceilings(self) -> Ceilings | None:
        """The newest, with rates of dtypes that only older runs measured."""
        found = [source.run.ceilings for source in self.sources if source.run.ceilings is not None]
        if not found:
            return None
        rates = {dtype: rate for ceilings in found for dtype, rate in ceilings.flops_per_second.items()}
        return Ceilings(found[-1].bytes_per_second, rates)


def read_sources(paths: Iterable[Path]) -> list[Source]:
    """The runs of files; raises as :func:`benchmarks.record.read_run` does."""
    return [Source(path, read_run(path)) for path in paths]


def merge(sources: Sequence[Source]) -> Merged:
    """Several runs as one.

    Raises:
        ValueError: they are of different devices, or of different numbers of threads of a CPU.
    """
    machines = {machine(source.run): source.name for source in sources}
    if len(machines) > 1:
        found = "; ".join(f"{name} is of {what}" for what, name in machines.items())
        raise ValueError(f"files of one device, with one number of threads, make one report: {found}")
    ordered = sorted(sources, key=lambda source: source.run.date)
    kept: dict[tuple[str, str | None], CaseResult] = {}
    measured = 0
    for case in (case for source in ordered for case in source.run.cases):
        measured += 1
        # A curve has its points to itself: where curves cross, the same call is a point of each.
        key = case.title, case.axis
        before = kept.get(key)
        if before is None or len(_timed(case)) >= len(_timed(before)):
            kept[key] = case
    return Merged(tuple(ordered), tuple(kept.values()), measured - len(kept))


@dataclass(frozen=True)
class Standing:
    """The fastest of pointfuse's contenders in a case, and the fastest other; None where none gave a right answer."""

    case: CaseResult
    ours: Result | None
    other: Result | None

    @property
    def over_other(self) -> float | None:
        """How many times as fast as the fastest other."""
        return times_as_fast(self.ours, self.other)

    @property
    def over_eager(self) -> float | None:
        """How many times as fast as eager in channels_last."""
        return times_as_fast(self.ours, self.case.result(EAGER_CHANNELS_LAST))

    @property
    def is_behind(self) -> bool:
        """Whether another is faster by more than `LEVEL`, or alone gave a right answer."""
        if self.other is None:
            return False
        return self.over_other is None or 1 / self.over_other > 1 + LEVEL


@dataclass(frozen=True)
class Spread:
    """Of so many ratios the geometric mean and the range."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class GroupSummary:
    """How pointfuse stands in the cases of one suite that were run alike; None where nothing can be compared."""

    label: str
    standings: tuple[Standing, ...]
    over_eager: Spread | None
    over_other: Spread | None

    @property
    def behind(self) -> int:
        return sum(standing.is_behind for standing in self.standings)


def standings(cases: Iterable[CaseResult]) -> list[Standing]:
    """Of the complete cases that pointfuse took part in."""
    return [
        Standing(
            case,
            fastest(result for result in case.results if is_ours(result.contender)),
            fastest(result for result in case.results if is_other(result.contender)),
        )
        for case in cases
        if case.complete and any(is_ours(result.contender) for result in case.results)
    ]


def summarise(cases: Iterable[CaseResult]) -> list[GroupSummary]:
    """A summary for each suite, dtype and way of running, in the order of the cases."""
    groups: dict[str, list[Standing]] = {}
    for standing in standings(cases):
        groups.setdefault(group_label(standing.case), []).append(standing)
    return [
        GroupSummary(label, tuple(group), spread(s.over_eager for s in group), spread(s.over_other for s in group))
        for label, group in groups.items()
    ]


def behind(cases: Iterable[CaseResult]) -> list[Standing]:
    """Where pointfuse is not the fastest, the worst first; where it gave no right answer at all before these."""
    found = [standing for standing in standings(cases) if standing.is_behind]
    return sorted(found, key=lambda standing: standing.over_other or 0.0)


def spread(ratios: Iterable[float | None]) -> Spread | None:
    found = [ratio for ratio in ratios if ratio is not None]
    return Spread(statistics.geometric_mean(found), min(found), max(found), len(found)) if found else None


def fastest(results: Iterable[Result]) -> Result | None:
    """The one with the least median; None where none was timed."""
    timed = [(result.ms.p50, result) for result in results if result.ms is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def times_as_fast(result: Result | None, than: Result | None) -> float | None:
    """The other's median over this one's; None where either is missing."""
    if result is None or than is None or result.ms is None or than.ms is None:
        return None
    return than.ms.p50 / result.ms.p50


def of_floor(case: CaseResult, result: Result) -> float | None:
    """The floor over the median: 1 is as fast as the device can be."""
    return None if case.floor_us is None or result.ms is None else case.floor_us / (result.ms.p50 * 1e3)


def contenders(cases: Iterable[CaseResult]) -> list[str]:
    """The names of all contenders, in the order of the cases."""
    return list(dict.fromkeys(result.contender for case in cases for result in case.results))


def by_suite(cases: Iterable[CaseResult]) -> Mapping[str, list[CaseResult]]:
    suites: dict[str, list[CaseResult]] = {}
    for case in cases:
        suites.setdefault(case.suite, []).append(case)
    return suites


def ways(case: CaseResult) -> str:
    """How a case was run beyond batch and dtype, as in "cold L2, CUDA graphs"; empty on a CPU at inference."""
    plain = f"{case.suite}: {case.name}, batch {case.batch}, {case.dtype}"
    return case.title.removeprefix(plain).removeprefix(", ")


def group_label(case: CaseResult) -> str:
    return ", ".join(filter(None, (case.suite, case.dtype, ways(case))))


def case_label(case: CaseResult) -> str:
    return ", ".join(filter(None, (case.name, f"batch {case.batch}", case.dtype, ways(case))))


def counted(cases: Sequence[CaseResult]) -> str:
    return f"{len(cases)} case{'' if len(cases) == 1 else 's'}"


def command(run: Run) -> str:
    """What makes a file like this one."""
    return shlex.join(["python", "benchmarks/run.py", *map(str, run.settings.get("argv", ()))])


def commit_of(run: Run) -> str:
    if run.commit is None:
        return "unknown"
    return run.commit[:9] + (" with changes" if run.dirty else "")


def span(low: float, high: float, form: str) -> str:
    """Two figures as "1.02 to 1.35", and as one where they read alike."""
    ends = dict.fromkeys((format(low, form), format(high, form)))
    return " to ".join(ends)


def versions_text(versions: Mapping[str, str | None], names: Iterable[str]) -> str:
    return ", ".join(f"{_NAMES.get(name, name)} {versions[name]}" for name in names if versions.get(name))


def least_saved(case: CaseResult) -> Result | None:
    """The contender of a training step that keeps the least memory for the backward."""
    saved = [(r.saved_bytes, r) for r in case.results if r.saved_bytes is not None and r.status == "ok"]
    return min(saved, key=lambda pair: pair[0])[1] if saved and case.suite == TRAINING else None


def _timed(case: CaseResult) -> list[Result]:
    return [result for result in case.results if result.ms is not None]
