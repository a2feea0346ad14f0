"""What a run found, as plain data, and the JSON files it is kept in."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import Ceilings

SCHEMA = 1


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
        saved_bytes: of a training step, what its forward keeps for the backward: each memory once, the input with it,
            parameters and buffers not.
        peak_bytes: of a training step, the most memory it took beyond what was taken before it; None on a CPU.
    """

    contender: str
    status: str
    reason: str | None = None
    errors: tuple[float, ...] = ()
    tolerance: float | None = None
    ms: Quantiles | None = None
    rounds: int = 0
    speedup: Mapping[str, float] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def error(self) -> float | None:
        return max(self.errors) if self.errors else None


@dataclass(frozen=True)
class Conditions:
    """The state of a device at one moment; None for what it does not tell.

    Attributes:
        clock_mhz: of a GPU's multiprocessors, or the mean of a CPU's cores.
        temperature_c: of the GPU, or the warmest of a CPU's sensors.
        power_w: what the GPU draws.
    """

    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """The results of one case.

    Attributes:
        results: in the contenders' order.
        complete: false where Ctrl-C cut the timing short.
        disturbance: CPU time that other processes took during the timing, as a share of all cores' time; None where
            the system does not tell. More than a few percent and the figures are of a shared machine: OpenMP's
            threads wait for the one that lost its core.
        l2: "cold" or "warm", what the GPU's L2 cache held before each timing; None where it is not controlled.
        graphs: whether contenders ran as captured CUDA graphs; None on a device that has none.
        flops, bytes: of the convolutions, each tensor read or written once; None where no ceilings were measured.
        floor_us: the least time that these take at the ceilings measured in the same run, in microseconds; None for
            training steps too.
        autocast: whether a training step ran its forward under autocast, with parameters in fp32; None at inference.
        inplace: whether a training step's activations write over their input; None at inference.
        layout: of the input, "NCHW" or "channels_last", which all contenders run in but those that name another.
        axis, at: of a case that is a point of a curve, what grows along it ("batch", "plane" or "channels") and how
            large it is here; None for others.
        drift: how many times as long everything took in the last third of the timing as in the first; None where there
            were too few rounds to tell.
        before, after: the state of the device on either side of the timing.
    """

    suite: str
    name: str
    batch: int
    dtype: str
    input_shape: tuple[int, ...]
    results: tuple[Result, ...]
    complete: bool
    disturbance: float | None = None
    l2: str | None = None
    graphs: bool | None = None
    flops: int | None = None
    bytes: int | None = None
    floor_us: float | None = None
    autocast: bool | None = None
    inplace: bool | None = None
    layout: str = "channels_last"
    axis: str | None = None
    at: int | None = None
    drift: float | None = None
    before: Conditions | None = None
    after: Conditions | None = None

    @property
    def trains(self) -> bool:
        """Whether it is a training step."""
        return self.autocast is not None

    @property
    def title(self) -> str:
        title = f"{self.suite}: {self.name}, batch {self.batch}, {self.dtype}"
        ways = ["NCHW"] if self.layout == "NCHW" else []
        ways += ["autocast"] if self.autocast else []
        ways += [f"{self.l2} L2"] if self.l2 else []
        if self.graphs is not None:
            ways.append("CUDA graphs" if self.graphs else "no CUDA graphs")
        return ", ".join([title, *ways])

    def result(self, contender: str) -> Result | None:
        return next((result for result in self.results if result.contender == contender), None)


@dataclass(frozen=True)
class Skipped:
    """A case that could not be built, as where its model's package is not installed."""

    title: str
    reason: str


@dataclass(frozen=True)
class Run:
    """A file of results.

    Attributes:
        commit, dirty: of the checkout, and whether anything in it was changed; None outside one.
        date: when it was written last, ISO 8601, UTC.
        machine: "cpu", "cores", "threads" and "system".
        device: the name of what the figures are of: a GPU's, or the CPU's.
        versions: of what they depend on; None for what is not there.
        settings: the run's; "argv" is what it was started with.
        ceilings, ceilings_after: measured before the first case and after the last.
        complete: false where the run ended before its last case.
        left: how many cases it had not run by then.
    """

    commit: str | None
    dirty: bool | None
    date: str
    machine: Mapping[str, Any]
    device: str
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    ceilings: Ceilings | None
    complete: bool
    cases: tuple[CaseResult, ...]
    ceilings_after: Ceilings | None = None
    skipped: tuple[Skipped, ...] = ()
    left: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device != self.machine["cpu"]


def report(
    cases: Iterable[CaseResult],
    device: torch.device,
    settings: Mapping[str, Any],
    complete: bool,
    ceilings: Ceilings | None = None,
    ceilings_after: Ceilings | None = None,
    skipped: Iterable[Skipped] = (),
    left: int = 0,
) -> dict[str, Any]:
    """Everything needed to read the figures later, as :class:`Run` has it."""
    return {
        "schema": SCHEMA,
        **commit_of_checkout(),
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
        "ceilings": None if ceilings is None else asdict(ceilings),
        "ceilings_after": None if ceilings_after is None else asdict(ceilings_after),
        "complete": complete,
        "left": left,
        "skipped": [asdict(case) for case in skipped],
        "cases": [asdict(case) for case in cases],
    }


def read_run(path: Path) -> Run:
    """A file that a run wrote.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (schema := content.pop("schema")) != SCHEMA:
            raise ValueError(f"schema {schema}, read is {SCHEMA}")
        for name in ("ceilings", "ceilings_after"):
            content[name] = None if content.get(name) is None else Ceilings(**content[name])
        cases = tuple(_case(entry) for entry in content.pop("cases"))
        skipped = tuple(Skipped(**entry) for entry in content.pop("skipped", ()))
        return Run(**content, cases=cases, skipped=skipped)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of results: {type(error).__name__}: {error}") from error


def read_cases(path: Path) -> list[CaseResult]:
    """The cases of a file that a run wrote; raises as :func:`read_run` does."""
    return list(read_run(path).cases)


def newest_unfinished(root: Path) -> Path:
    """Of the files of results below `root` the newest of a run that was not finished.

    Raises:
        ValueError: there is none.
    """
    for path in sorted(root.glob("*/*.json"), key=lambda path: path.name, reverse=True):
        try:
            if read_run(path).left:
                return path
        except ValueError:
            continue
    raise ValueError(f"no file below {root} is of a run that was not finished")


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
    commit = commit_of_checkout()["commit"]
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
    cudnn = torch.backends.cudnn.version()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pointfuse": _pointfuse_version(),
        "onednn": onednn[1] if onednn else None,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "cudnn-frontend": _installed("nvidia-cudnn-frontend"),
        "triton": _installed("triton"),
    }


def _case(entry: Mapping[str, Any]) -> CaseResult:
    results = tuple(_result(result) for result in entry["results"])
    conditions = {name: None if entry.get(name) is None else Conditions(**entry[name]) for name in ("before", "after")}
    return CaseResult(**{**entry, **conditions, "input_shape": tuple(entry["input_shape"]), "results": results})


def _result(entry: Mapping[str, Any]) -> Result:
    ms = None if entry["ms"] is None else Quantiles(**entry["ms"])
    errors = tuple(float(error) for error in entry["errors"])
    return Result(**{**entry, "ms": ms, "errors": errors})


def commit_of_checkout() -> dict[str, Any]:
    """ "commit" and "dirty", as :class:`Run` has them."""
    commit = _git("rev-parse", "--verify", "HEAD")
    # What an earlier run left there changes no figure.
    status = _git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
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


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
