"""Checks that contenders give the right answer, then times them interleaved, and writes what was found as JSON.

A case is one model on one input. Its contenders are ways to run it. Each is compared with a float64 run of the plain
model before its first timing; the rounds then time each contender once in a rotated order, so that a machine that
changes speed changes it for all of them alike.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

SCHEMA = 1
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Output: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One model and one input to run it on.

    Attributes:
        suite: "layers", "stack" or "network".
        name: what is run, in words, unique within a suite, batch and dtype.
        model: in eval mode, on the device and in the dtype to be timed.
        x: the input, contiguous, on the model's device and in its dtype.
    """

    suite: str
    name: str
    model: nn.Module
    x: Tensor

    @property
    def dtype(self) -> str:
        return next((name for name, dtype in DTYPES.items() if dtype == self.x.dtype), str(self.x.dtype))

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.name}, batch {self.x.shape[0]}, {self.dtype}"


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run: `run(x)` is what is timed, `x` the input in the layout it takes."""

    run: Callable[[Tensor], Output]
    x: Tensor


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: as shown in tables and taken by `--contenders`.
        build: from (model, input) to something that runs; leaves both as they are. Called under `no_grad`.
        devices: the device types it can run on.
        reset: called once before a case's first contender is built, to drop what earlier cases left behind.
    """

    name: str
    build: Callable[[nn.Module, Tensor], Prepared]
    devices: tuple[str, ...] = ("cpu", "cuda")
    reset: Callable[[], None] | None = None


@dataclass(frozen=True)
class Limits:
    """When a case's timing ends: after `rounds`, or after `seconds` once `min_rounds` are done."""

    rounds: int = 50
    seconds: float = 20.0
    min_rounds: int = 3
    warmup: int = 2


@dataclass(frozen=True)
class Quantiles:
    """20, 50 and 80% quantiles, in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Result:
    """What one contender did in one case.

    Attributes:
        contender: its name.
        status: "ok"; "wrong" if its answer failed the check; "failed" if it could not run; "interrupted" before a
            first timing.
        reason: why it is not "ok", in one line.
        errors: for each of the model's outputs max|a - b| / max|b| against float64; empty where it could not run.
        tolerance: the largest error allowed.
        ms: latency quantiles, only where it is "ok".
        rounds: how many timings those are from.
        speedup: for each baseline that was timed, the baseline's median over this contender's.
    """

    contender: str
    status: str
    reason: str | None = None
    errors: tuple[float, ...] = ()
    tolerance: float | None = None
    ms: Quantiles | None = None
    rounds: int = 0
    speedup: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        return max(self.errors) if self.errors else None


@dataclass(frozen=True)
class CaseResult:
    """The results of one case.

    Attributes:
        results: in the contenders' order.
        complete: false where Ctrl-C cut the timing short.
        disturbance: CPU time that other processes took during the timing, as a share of all cores' time; None where
            the system does not tell. More than a few percent and the figures are of a shared machine: OpenMP's
            threads wait for the one that lost its core.
    """

    suite: str
    name: str
    batch: int
    dtype: str
    input_shape: tuple[int, ...]
    results: tuple[Result, ...]
    complete: bool
    disturbance: float | None = None


class Timer(Protocol):
    """Tells how long one call takes; `now` is a clock for time budgets. Both in seconds."""

    def now(self) -> float: ...

    def time(self, call: Callable[[], Any]) -> float: ...


@dataclass(frozen=True)
class WallTimer:
    """For a device that has finished when the call returns: the CPU."""

    clock: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        return self.clock()

    def time(self, call: Callable[[], Any]) -> float:
        start = self.clock()
        call()
        return self.clock() - start


@dataclass(frozen=True)
class CudaTimer:
    """Times on the GPU, between two events on the current stream."""

    def now(self) -> float:
        return time.perf_counter()

    def time(self, call: Callable[[], Any]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timer_for(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else WallTimer()


@dataclass(frozen=True)
class CheckedCase:
    """A case whose contenders have been built and checked.

    Attributes:
        case: the case.
        verdicts: one for each contender, in order, without timings.
        prepared: what to time, by name, for those contenders whose verdict is "ok".
    """

    case: Case
    verdicts: tuple[Result, ...]
    prepared: Mapping[str, Prepared]


@torch.no_grad()
def check_case(
    case: Case, contenders: Sequence[Contender], on_progress: Callable[[float], None] = lambda done: None
) -> CheckedCase:
    """Build each contender, run it once and compare it with the plain model in float64.

    The float64 run has the same weights and input, already rounded to the case's dtype, so the error is that of the
    computation alone. Allowed is twice that of the plain model in the case's dtype on the contender's own input, plus
    1e-6: the memory format decides which of PyTorch's kernels runs, and with it how accurate PyTorch is.

    Args:
        on_progress: called with the fraction done after each contender.
    """
    for reset in dict.fromkeys(contender.reset for contender in contenders if contender.reset is not None):
        reset()
    truth = _outputs(copy.deepcopy(case.model).double()(case.x.double()))
    verdicts: list[Result] = []
    prepared: dict[str, Prepared] = {}
    for index, contender in enumerate(contenders):
        verdict, ready = _check(contender, case, truth)
        verdicts.append(verdict)
        if ready is not None:
            prepared[contender.name] = ready
        on_progress((index + 1) / len(contenders))
    return CheckedCase(case, tuple(verdicts), prepared)


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
        on_progress: called with the fraction done after each round.
    """
    before = _cpu_times()
    samples, complete = _time_rounds(checked.prepared, limits, timer, on_progress)
    disturbance = _disturbance(before, _cpu_times())
    case, shape = checked.case, tuple(checked.case.x.shape)
    results = _with_speedups([_timed(verdict, samples) for verdict in checked.verdicts], baselines)
    return CaseResult(case.suite, case.name, shape[0], case.dtype, shape, results, complete, disturbance)


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


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Quantiles in milliseconds of timings in seconds, linear between the samples."""
    if len(seconds) == 1:
        return Quantiles(*[seconds[0] * 1e3] * 3)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Quantiles(*(deciles[index] * 1e3 for index in (1, 4, 7)))


def report(
    cases: Iterable[CaseResult], device: torch.device, settings: Mapping[str, Any], complete: bool
) -> dict[str, Any]:
    """Everything needed to read the figures later: commit, date, machine, versions, settings and the results.

    Args:
        complete: false where the run ended before its last case.
    """
    return {
        "schema": SCHEMA,
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "device": device_name(device),
        "versions": versions(),
        "settings": dict(settings),
        "complete": complete,
        "cases": [asdict(case) for case in cases],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `path` holds either all of it or what it held before.

    A figure that is not finite is written as a string, since JSON has no number for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def result_path(root: Path, device: torch.device, now: datetime | None = None) -> Path:
    """`root`/<device>/<date and time>-<commit>.json"""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    commit = _commit()["commit"]
    return root / slug(device_name(device)) / f"{moment}-{commit[:9] if commit else 'nocommit'}.json"


def slug(name: str) -> str:
    """`name` in lower case with each run of other characters than letters and digits turned into one hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model, as the system tells it."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; None for what is not there or does not say."""
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pointfuse": _pointfuse_version(),
        "onednn": onednn[1] if onednn else None,
        "cuda": torch.version.cuda,
    }


def _check(contender: Contender, case: Case, truth: Sequence[Tensor]) -> tuple[Result, Prepared | None]:
    if case.x.device.type not in contender.devices:
        return Result(contender.name, "failed", f"does not run on {case.x.device.type}"), None
    try:
        prepared = contender.build(case.model, case.x)
        outputs = _outputs(prepared.run(prepared.x))
    except Exception as error:
        # A contender is other people's code as well as ours: whatever stops it is a result, not the run's end.
        return Result(contender.name, "failed", _first_line(error)), None
    verdict = _compare(contender.name, outputs, _outputs(case.model(prepared.x)), truth)
    return verdict, prepared if verdict.status == "ok" else None


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
    prepared: Mapping[str, Prepared], limits: Limits, timer: Timer, on_progress: Callable[[float], None]
) -> tuple[dict[str, list[float]], bool]:
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    names = list(prepared)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name in names:
            for _ in range(limits.warmup):
                prepared[name].run(prepared[name].x)
        start = timer.now()
        for index in range(limits.rounds if names else 0):
            if index >= limits.min_rounds and timer.now() - start >= limits.seconds:
                break
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(_time_once(prepared[name], timer))
            on_progress(min(1.0, max((index + 1) / limits.rounds, (timer.now() - start) / limits.seconds)))
    except KeyboardInterrupt:
        return samples, False
    finally:
        if gc_was_on:
            gc.enable()
    on_progress(1.0)
    return samples, True


def _time_once(prepared: Prepared, timer: Timer) -> float:
    # The untimed call brings the contender's own weights back into the cache. Without it the time would depend on
    # whose turn came before, and on which contenders share their weights.
    prepared.run(prepared.x)
    return timer.time(lambda: prepared.run(prepared.x))


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _commit() -> dict[str, Any]:
    commit = _git("rev-parse", "--verify", "HEAD")
    status = _git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    """What git prints, or None outside a checkout, before the first commit and without git."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _pointfuse_version() -> str | None:
    try:
        import pointfuse
    except ImportError:
        return None
    return getattr(pointfuse, "__version__", None)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
