"""What the kernels are held to on an H100, in bf16 as CUDA graphs, what training is, and whether results meet it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.cases import OVERHEAD, TRAINING
from benchmarks.peers import (
    COMPILED,
    COMPILED_AUTOTUNED,
    CONVERTED,
    CUDA_FROZEN,
    CUDA_LIVE,
    EAGER_CHANNELS_LAST,
    EAGER_NCHW,
    FROZEN,
    RECOMPUTING,
    TRITON_FROZEN,
    is_other,
)
from benchmarks.record import CaseResult, Result
from benchmarks.timing import DTYPES


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        what: what is measured.
        limit: what it must be, in words.
        measured: what it was, in words; None where the results do not say.
        met: whether that meets it; None where the results do not say.
    """

    what: str
    limit: str
    measured: str | None = None
    met: bool | None = None


def targets(cases: Iterable[CaseResult]) -> list[Target]:
    """Every target, of the CUDA C++ kernels and then of the Triton kernels, with what the complete cases say of it.

    Of cases measured twice the last counts.
    """
    bf16 = {(c.suite, c.name, c.batch, c.l2, c.graphs): c for c in cases if c.dtype == "bf16" and c.complete}
    cold = [case for case in bf16.values() if case.graphs and case.l2 == "cold"]
    warm = [case for case in bf16.values() if case.graphs and case.l2 == "warm"]
    calls = [case for case in bf16.values() if case.suite == OVERHEAD and case.graphs is False]
    layers = [case for case in cold if case.suite == "layers"]
    return [
        _at_most("1x1 layers, batch 64, cold: time over floor", 1.5, "", _pointwise(cold, 64), times_floor),
        _at_most("1x1 layers, batch 1, warm: time", 4, " us", _pointwise(warm, 1), microseconds),
        _at_least("layers, cold: best contender's time over ours", 1.0, layers, speedup),
        _geometric_mean("the same, geometric mean", 1.3, layers, speedup),
        _at_least(
            'frozen under "auto", layers, cold: best contender\'s time over ours', 0.98,
            _took_part(layers, FROZEN), partial(speedup, contender=FROZEN),
        ),
        *(
            _at_most(f"13x13 stack, batch {batch}, cold: time", limit, " us", _stack(cold, batch), microseconds)
            for batch, limit in ((1, 45), (8, 90), (64, 600))
        ),
        _at_most("a call, until it has launched", 10, " us", calls, microseconds),
        _at_most(
            "Triton, 1x1 layers, batch 64, cold: time over floor", 1.8, "",
            _took_part(_pointwise(cold, 64), TRITON_FROZEN),
            partial(times_floor, contender=TRITON_FROZEN),
        ),
        _at_least(
            "Triton, stacks, batch 64, cold: max-autotune's time over ours", 1.0,
            _took_part((c for c in cold if c.suite == "stack" and c.batch == 64), TRITON_FROZEN, COMPILED_AUTOTUNED),
            partial(_over, other=COMPILED_AUTOTUNED, contender=TRITON_FROZEN),
        ),
    ]  # fmt: skip


def training_targets(cases: Iterable[CaseResult]) -> list[Target]:
    """Every target of training steps, with what the complete cases say of it; of cases measured twice the last counts.

    On a GPU they are the CUDA C++ kernels', in bf16 under autocast, as graphs or not; on a CPU the converted model's,
    in every dtype. What is saved is told by fp32 alone: autocast's copies of the weights are saved by all alike.
    """
    steps = {(c.name, c.batch, c.dtype, c.l2): c for c in cases if c.suite == TRAINING and c.complete}
    on_cpu = [case for case in steps.values() if case.l2 is None]
    large = [c for c in steps.values() if c.l2 == "cold" and c.dtype == "bf16" and c.autocast and c.batch == 64]
    units = _took_part((case for case in large if " 1x1 " in case.name), CUDA_LIVE)
    stack = _took_part((case for case in large if case.name == "13x13 stack"), CUDA_LIVE)
    kept = [c for c in steps.values() if c.dtype == "fp32" and c.batch >= 8 and c.name.endswith(" stack")]
    over_eager = partial(_over, other=EAGER_CHANNELS_LAST, contender=CUDA_LIVE)
    over_compiled = partial(_over, other=COMPILED, contender=CUDA_LIVE)
    return [
        _at_least("training, 1x1 units, batch 64, cold: eager's time over ours", 1.6, units, over_eager),
        _at_least("training, 1x1 units, batch 64, cold: torch.compile's time over ours", 1.15, units, over_compiled),
        _at_least("training, 13x13 stack, batch 64, cold: eager's time over ours", 1.25, stack, over_eager),
        _at_most("training, fp32 stacks from batch 8: saved over eager's", 0.67, "", kept, _saved_over_eager),
        _at_most(
            "training, fp32 stacks from batch 8, recomputing: saved over eager's", 0.34, "",
            _took_part(kept, RECOMPUTING),
            partial(_saved_over_eager, contender=RECOMPUTING),
        ),
        _at_least(
            "training on a CPU: the faster eager's time over ours", 0.97, _took_part(on_cpu, CONVERTED), _over_any_eager
        ),
    ]  # fmt: skip


def microseconds(case: CaseResult, contender: str = CUDA_FROZEN) -> float | None:
    """A contender's median; None where it did not run."""
    return _median_us(case.result(contender))


def times_floor(case: CaseResult, contender: str = CUDA_FROZEN) -> float | None:
    """A contender's median over the floor; None where either is missing."""
    ours = microseconds(case, contender)
    return None if ours is None or not case.floor_us else ours / case.floor_us


def speedup(case: CaseResult, contender: str = CUDA_FROZEN) -> float | None:
    """The best other contender's median over one of ours; None where either is missing."""
    ours, best = microseconds(case, contender), _median_us(best_other(case))
    return None if ours is None or best is None else best / ours


def best_other(case: CaseResult) -> Result | None:
    """The fastest of the contenders that are not pointfuse's."""
    others = [(r.ms.p50, r) for r in case.results if r.ms is not None and is_other(r.contender)]
    return min(others, key=lambda pair: pair[0])[1] if others else None


def _median_us(result: Result | None) -> float | None:
    return None if result is None or result.ms is None else result.ms.p50 * 1e3


def _over(case: CaseResult, other: str, contender: str) -> float | None:
    """Another contender's median over ours; None where either is missing."""
    ours, others = microseconds(case, contender), microseconds(case, other)
    return None if ours is None or others is None else others / ours


def _over_any_eager(case: CaseResult) -> float | None:
    """The faster eager's median over the converted model's; None where one is missing."""
    ratios = [_over(case, eager, CONVERTED) for eager in (EAGER_NCHW, EAGER_CHANNELS_LAST)]
    found = [ratio for ratio in ratios if ratio is not None]
    return min(found) if len(found) == len(ratios) else None


def _saved_over_eager(case: CaseResult, contender: str | None = None) -> float | None:
    """What a step saves beyond its input, which belongs to the layer before, over what eager saves.

    Without a contender it is that of the CUDA kernels where they were asked for, else the converted model's.
    """
    ours = case.result(contender) if contender else case.result(CUDA_LIVE) or case.result(CONVERTED)
    eager = case.result(EAGER_CHANNELS_LAST)
    if ours is None or eager is None or ours.saved_bytes is None or eager.saved_bytes is None:
        return None
    given = math.prod(case.input_shape) * DTYPES[case.dtype].itemsize
    return (ours.saved_bytes - given) / (eager.saved_bytes - given)


def _pointwise(cases: Sequence[CaseResult], batch: int) -> list[CaseResult]:
    return [c for c in cases if c.suite == "layers" and c.batch == batch and " 1x1 " in c.name]


def _stack(cases: Sequence[CaseResult], batch: int) -> list[CaseResult]:
    return [c for c in cases if c.suite == "stack" and c.batch == batch and c.name == "13x13"]


def _took_part(cases: Iterable[CaseResult], *contenders: str) -> list[CaseResult]:
    """The cases that all of these contenders were asked to run, whether they could or not."""
    return [case for case in cases if all(case.result(name) is not None for name in contenders)]


def _at_most(
    what: str, limit: float, unit: str, cases: Sequence[CaseResult], figure: Callable[[CaseResult], float | None]
) -> Target:
    return _extreme(what, f"at most {limit}{unit}", unit, cases, figure, lambda worst: worst <= limit, max)


def _at_least(
    what: str, limit: float, cases: Sequence[CaseResult], figure: Callable[[CaseResult], float | None]
) -> Target:
    return _extreme(what, f"at least {limit}", "", cases, figure, lambda worst: worst >= limit, min)


def _extreme(
    what: str,
    limit: str,
    unit: str,
    cases: Sequence[CaseResult],
    figure: Callable[[CaseResult], float | None],
    meets: Callable[[float], bool],
    worst_of: Callable[..., tuple[float, str]],
) -> Target:
    """The worst of the cases against a limit; a case without a figure is worse than any."""
    figures, missing = _figures(cases, figure)
    if not cases:
        return Target(what, limit)
    if missing:
        return Target(what, limit, f"none for {', '.join(missing)}", met=False)
    worst, name = worst_of((value, name) for name, value in figures.items())
    where = f" ({name}, the worst of {len(figures)})" if len(figures) > 1 else ""
    return Target(what, limit, f"{worst:.2f}{unit}{where}", meets(worst))


def _geometric_mean(
    what: str, limit: float, cases: Sequence[CaseResult], figure: Callable[[CaseResult], float | None]
) -> Target:
    figures, missing = _figures(cases, figure)
    if not cases:
        return Target(what, f"at least {limit}")
    if missing:
        return Target(what, f"at least {limit}", f"none for {', '.join(missing)}", met=False)
    mean = statistics.geometric_mean(figures.values())
    return Target(what, f"at least {limit}", f"{mean:.2f} (of {len(figures)})", mean >= limit)


def _figures(
    cases: Sequence[CaseResult], figure: Callable[[CaseResult], float | None]
) -> tuple[dict[str, float], list[str]]:
    """The figure of each case that has one, by the case's name; and the names of the others."""
    named = {_title(case): figure(case) for case in cases}
    figures = {name: value for name, value in named.items() if value is not None}
    return figures, [name for name in named if name not in figures]


def _title(case: CaseResult) -> str:
    return f"{case.name}, batch {case.batch}{'' if case.dtype == 'bf16' else f', {case.dtype}'}"
