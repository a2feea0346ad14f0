"""Checks that contenders give the right answer, and times them interleaved.

A case is one model on one input. Its contenders are ways to run it. Each is compared with a float64 run of the plain
model before its first timing; the rounds then time each contender once in a rotated order, so that a machine that
changes speed changes it for all of them alike.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.conditions import conditions
from benchmarks.record import CaseResult, Quantiles, Result
from benchmarks.timing import DTYPES, Method, Output, Prepared, Staged, Timer, first_line, layout_of
from benchmarks.training import Step, peak_bytes, saved_bytes


@dataclass(frozen=True)
class Case:
    """One model and one input to run it on.

    Attributes:
        suite: a name from `SUITES`.
        name: what is run, in words, unique within a suite, batch and dtype.
        model: in eval mode, on the device and in the dtype to be timed; or a training step.
        x: the input, on the model's device and in its dtype; of a training step under autocast in that of autocast, as
            the layer before gives it. Its layout is what contenders run in, but those that name another.
        tf32: whether fp32 may be rounded to TF32.
        axis, at: of a point of a curve, what grows along it and how large it is here.
    """

    suite: str
    name: str
    model: nn.Module
    x: Tensor
    tf32: bool = False
    axis: str | None = None
    at: int | None = None

    @property
    def dtype(self) -> str:
        """A name from `DTYPES`."""
        names = [name for name, dtype in DTYPES.items() if dtype == self.x.dtype and self.tf32 == (name == "tf32")]
        return names[0] if names else str(self.x.dtype)

    @property
    def step(self) -> Step | None:
        """The model where it is a training step."""
        return self.model if isinstance(self.model, Step) else None


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: as shown in tables and taken by `--contenders`.
        build: from (model, input) to something that runs; leaves both as they are. Called under `no_grad`.
        devices: the device types it can run on.
        reset: called once before a case's first contender is built, to drop what earlier cases left behind.
        infers, trains: whether it can run a model in eval mode, and a training step.
    """

    name: str
    build: Callable[[nn.Module, Tensor], Prepared]
    devices: tuple[str, ...] = ("cpu", "cuda")
    reset: Callable[[], None] | None = None
    infers: bool = True
    trains: bool = False


@dataclass(frozen=True)
class Limits:
    """When a case's timing ends: after `rounds`, or after `seconds` once `min_rounds` are done."""

    rounds: int = 50
    seconds: float = 20.0
    min_rounds: int = 3
    warmup: int = 2


@dataclass(frozen=True)
class CheckedCase:
    """A case whose contenders have been built and checked.

    Attributes:
        case: the case.
        method: how they are timed.
        verdicts: one for each contender, in order, without timings.
        staged: what to time, by name, for those contenders whose verdict is "ok".
    """

    case: Case
    method: Method
    verdicts: tuple[Result, ...]
    staged: Mapping[str, Staged]


@torch.no_grad()
def check_case(
    case: Case,
    contenders: Sequence[Contender],
    method: Method,
    on_progress: Callable[[float], None] = lambda done: None,
) -> CheckedCase:
    """Build each contender, run it once in the form to be timed, and compare it with the plain model in float64.

    The float64 run has the same weights and input, already rounded to the case's dtype, so the error is that of the
    computation alone. Allowed is twice that of the plain model in the case's dtype on the contender's own input, plus
    1e-6: the memory format decides which of PyTorch's kernels runs, and with it how accurate PyTorch is. Of a training
    step all gradients are compared as well as the output.

    Args:
        on_progress: called with the fraction done after each contender.
    """
    for reset in dict.fromkeys(contender.reset for contender in contenders if contender.reset is not None):
        reset()
    truth = _outputs(copy.deepcopy(case.model).double()(case.x.double()))
    verdicts: list[Result] = []
    staged: dict[str, Staged] = {}
    for index, contender in enumerate(contenders):
        verdict, ready = _check(contender, case, method, truth)
        verdicts.append(verdict)
        if ready is not None:
            staged[contender.name] = ready
        on_progress((index + 1) / len(contenders))
    return CheckedCase(case, method, tuple(verdicts), staged)


@torch.no_grad()
def time_case(
    checked: CheckedCase,
    baselines: Sequence[str],
    limits: Limits,
    timer: Timer,
    on_progress: Callable[[float], None] = lambda done: None,
) -> CaseResult:
    """Time those contenders of a case that passed the check.

    Ctrl-C ends the timing; the quantiles are then of the rounds there were.

    Args:
        baselines: names of contenders that ratios are computed against.
        timer: one of the method's.
        on_progress: called with the fraction done after each round.
    """
    case, shape = checked.case, tuple(checked.case.x.shape)
    busy, before = _cpu_times(), conditions(case.x.device)
    samples, complete = _time_rounds(checked.staged, limits, timer, on_progress)
    disturbance, after = _disturbance(busy, _cpu_times()), conditions(case.x.device)
    results = _with_speedups([_timed(verdict, samples) for verdict in checked.verdicts], baselines)
    return CaseResult(
        suite=case.suite,
        name=case.name,
        batch=shape[0],
        dtype=case.dtype,
        input_shape=shape,
        results=results,
        complete=complete,
        disturbance=disturbance,
        l2=timer.l2,
        graphs=checked.method.graphs,
        autocast=None if case.step is None else case.step.autocast is not None,
        inplace=None if case.step is None else case.step.inplace,
        layout=layout_of(case.x),
        axis=case.axis,
        at=case.at,
        drift=drift(samples),
        before=before,
        after=after,
    )


def normalised_errors(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, ...]:
    """For each output max|a - b| / max|b|, in float64; NaN where either holds one.

    Raises:
        ValueError: the number of outputs, or a shape, is not that of the truth.
    """
    ours, theirs = [tuple(a.shape) for a in outputs], [tuple(b.shape) for b in truth]
    if ours != theirs:
        raise ValueError(f"output shapes {ours}, expected {theirs}")
    return tuple(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny))
        for a, b in zip(outputs, truth, strict=True)
    )


def drift(samples: Mapping[str, Sequence[float]]) -> float | None:
    """How many times as long the last third of the timings took as the first: of each contender the medians' ratio, of
    these the geometric mean. None with fewer than three timings to a third."""
    thirds = [(seconds, len(seconds) // 3) for seconds in samples.values()]
    if not thirds or min(third for _, third in thirds) < 3:
        return None
    return statistics.geometric_mean(
        statistics.median(seconds[-third:]) / statistics.median(seconds[:third]) for seconds, third in thirds
    )


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Quantiles in milliseconds of timings in seconds, linear between the samples."""
    if len(seconds) == 1:
        return Quantiles(*[seconds[0] * 1e3] * 3)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Quantiles(*(deciles[index] * 1e3 for index in (1, 4, 7)))


def _check(contender: Contender, case: Case, method: Method, truth: Sequence[Tensor]) -> tuple[Result, Staged | None]:
    if case.x.device.type not in contender.devices:
        return Result(contender.name, "failed", f"does not run on {case.x.device.type}"), None
    try:
        prepared = contender.build(case.model, case.x)
        staged = method.stage(prepared)
        with staged.context():
            outputs = _outputs(staged.once())
        if case.x.is_cuda:
            # An error of a kernel shows at the next wait: here it is known whose it is.
            torch.cuda.synchronize(case.x.device)
        saved, peak = _memory(prepared)
    except Exception as error:
        # A contender is other people's code as well as ours: whatever stops it is a result, not the run's end.
        return Result(contender.name, "failed", first_line(error)), None
    verdict = _compare(contender.name, outputs, _outputs(case.model(prepared.x)), truth)
    if verdict.status != "ok":
        return verdict, None
    return replace(verdict, saved_bytes=saved, peak_bytes=peak), staged


def _memory(prepared: Prepared) -> tuple[int | None, int | None]:
    """What a training step saves, and its peak; nothing for others."""
    if not isinstance(prepared.run, Step):
        return None, None
    with prepared.context():
        return saved_bytes(prepared.run, prepared.x), peak_bytes(prepared.run, prepared.x)


def _compare(name: str, outputs: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]) -> Result:
    tolerance = 2 * max(normalised_errors(eager, truth)) + 1e-6
    try:
        errors = normalised_errors(outputs, truth)
    except ValueError as error:
        return Result(name, "wrong", str(error))
    ours, theirs = [str(a.dtype) for a in outputs], [str(b.dtype) for b in eager]
    if ours != theirs:
        return Result(name, "wrong", f"output dtypes {ours}, expected {theirs}", errors, tolerance)
    # Written so that a NaN is wrong too.
    if not all(error <= tolerance for error in errors):
        figures = ", ".join(f"{error:.2e}" for error in errors)
        return Result(name, "wrong", f"error {figures} against float64, allowed {tolerance:.2e}", errors, tolerance)
    return Result(name, "ok", errors=errors, tolerance=tolerance)


def _time_rounds(
    staged: Mapping[str, Staged], limits: Limits, timer: Timer, on_progress: Callable[[float], None]
) -> tuple[dict[str, list[float]], bool]:
    samples: dict[str, list[float]] = {name: [] for name in staged}
    names = list(staged)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for contender in staged.values():
            with contender.context():
                for _ in range(limits.warmup):
                    contender.once()
        start = timer.now()
        for index in range(limits.rounds if names else 0):
            if index >= limits.min_rounds and timer.now() - start >= limits.seconds:
                break
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                with staged[name].context():
                    samples[name].append(timer.time(staged[name]))
            on_progress(min(1.0, max((index + 1) / limits.rounds, (timer.now() - start) / limits.seconds)))
    except KeyboardInterrupt:
        return samples, False
    finally:
        if gc_was_on:
            gc.enable()
    on_progress(1.0)
    return samples, True


def _timed(verdict: Result, samples: Mapping[str, Sequence[float]]) -> Result:
    if verdict.status != "ok":
        return verdict
    seconds = samples[verdict.contender]
    if not seconds:
        return replace(verdict, status="interrupted", reason="interrupted before its first timing")
    return replace(verdict, ms=quantiles(seconds), rounds=len(seconds))


def _with_speedups(results: Sequence[Result], baselines: Sequence[str]) -> tuple[Result, ...]:
    medians = {result.contender: result.ms.p50 for result in results if result.ms is not None}
    present = {name: medians[name] for name in baselines if name in medians}
    return tuple(
        replace(result, speedup={name: median / result.ms.p50 for name, median in present.items()})
        if result.ms is not None
        else result
        for result in results
    )


@dataclass(frozen=True)
class _CpuTimes:
    """Seconds since some start: of all cores together, of those the part they were busy, and of that our own."""

    total: float
    busy: float
    own: float


def _cpu_times() -> _CpuTimes | None:
    """From Linux's /proc/stat; None elsewhere."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time.
    ticks = [int(field) for field in first.split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    return _CpuTimes(sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second, time.process_time())


def _disturbance(before: _CpuTimes | None, after: _CpuTimes | None) -> float | None:
    if before is None or after is None or after.total <= before.total:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others) / (after.total - before.total)


def _outputs(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)
