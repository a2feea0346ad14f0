"""What ``pointfuse tune`` does: measures the configurations for shape classes on a GPU, and keeps the fastest.

Measured is a convolution with bias and activation, without batch norm: what a frozen model consists of. PyTorch's
operators have the least to do there, so that a kernel which is faster there is faster with batch norm too.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pointfuse.backends import calls
from pointfuse.backends import triton as backend
from pointfuse.backends.triton import tables
from pointfuse.backends.triton.configs import Config, Entry, ShapeClass, candidates
from pointfuse.backends.triton.planning import Plan, aligned, plan, shape_class
from pointfuse.problem import Activation, Geometry, Pair, Refused

# By the name that a user gives: the tensors' type, and torch's setting for the products of fp32.
DTYPES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}

# Every configuration is timed so often; then the faster half of them twice as often, and so on.
_FIRST_ROUNDS = 5
# At last the fastest and PyTorch's operators are, in turns: the times that are kept, which chose nothing.
_LAST_ROUNDS = 100
_MOST_THREADS = 16
# Twice an H100's L2 takes it 35 us to write, in which no host launches a unit.
_MIN_FLUSH_BYTES = 256 << 20
_MOST_FLUSHES = 16


@dataclass(frozen=True)
class Problem:
    """A convolution with bias and activation.

    Attributes:
        input_shape: ``(batch, c_in, height, width)``.
        c_out: output channels.
        kernel: its height and width.
        stride, padding: as for ``torch.nn.functional.conv2d``.
        dtype: one of ``DTYPES``.
        layout: one of ``FORMATS``, of input and weight.
        activation: one of ``problem.ACTIVATIONS``.
    """

    input_shape: tuple[int, int, int, int]
    c_out: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dtype: str = "bf16"
    layout: str = "channels_last"
    activation: str = "leaky_relu"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding)

    @property
    def shape_class(self) -> ShapeClass:
        x, weight, _ = self.tensors(torch.device("meta"))
        plane = self.geometry.output_plane(x.shape, weight.shape)
        y = torch.empty((x.shape[0], self.c_out, *plane), device="meta")
        return shape_class(x, weight, calls.TF32 if self.dtype == "tf32" else 0, y)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias: random numbers, such that the output's are of the input's size."""
        dtype, memory_format = DTYPES[self.dtype][0], FORMATS[self.layout]
        shapes = self.input_shape, (self.c_out, self.input_shape[1], *self.kernel), (self.c_out,)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        x, weight, bias = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
        weight = weight / math.sqrt(math.prod(shapes[1][1:]))
        return x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format), bias


@dataclass(frozen=True, eq=False)
class Contender:
    """Something to be timed. ``config`` is ``None`` for PyTorch's own operators."""

    config: Config | None
    run: Callable[[], Tensor]
    compile: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """What is known of a shape class.

    Attributes:
        shape: the class.
        entry: the fastest configuration with its time and that of PyTorch's operators; ``None`` where none ran.
        measured: whether it was measured now, rather than earlier.
        tried: configurations that were timed.
        skipped: why others were not, with how many of them.
    """

    shape: ShapeClass
    entry: Entry | None
    measured: bool
    tried: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


class GpuLost(RuntimeError):
    """A kernel did what ends all use of the GPU by this process."""


Timer = Callable[[Contender], float]
# Is told how much of something is done, from 0 to 1.
Report = Callable[[float], object]


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    *,
    aten: Callable[..., Tensor],
    again: bool = False,
    timer: Timer | None = None,
    progress: Callable[[float, int, str], object] = lambda done, total, what: None,
) -> list[Outcome]:
    """Measure what is not in the device's table yet, and put the fastest there, class after class.

    Args:
        problems: convolutions that the kernels serve; the first of each shape class stands for it.
        device: the GPU.
        aten: the ATen backend's ``conv_bn_act``.
        again: measure also what the table has.
        timer: tells how many microseconds a contender takes; by default on the GPU, with a cold L2 cache.
        progress: is told how many classes are done, of how many, and which is being measured.

    Returns:
        An outcome for each shape class, in the order of the problems.

    Raises:
        RuntimeError: inside the capture of a CUDA graph, and for the reasons of :func:`refusal`.
        Unwritable: the table cannot be written.
        GpuLost: a kernel broke the CUDA context; earlier outcomes are in the table.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning runs and times kernels, which the capture of a CUDA graph forbids: tune before it")
    reason = refusal(device)
    if reason is not None:
        raise RuntimeError(f"the triton backend cannot run here: {reason}")
    device = _with_index(device)
    tables.forget()
    classes = distinct(problems)
    known = {} if again else tables.measured(device)
    todo = [shape for shape in classes if shape not in known]
    outcomes: list[Outcome] = []
    if todo:
        tables.add(device, {})  # what cannot be written had better be known before the work
    try:
        with _on(device):
            timer = timer or GpuTimer(device)
            for shape, problem in classes.items():
                if shape in known:
                    outcome = Outcome(shape, known[shape], measured=False)
                else:
                    report = _part(progress, todo.index(shape), len(todo), str(shape))
                    outcome = _measure(problem, device, aten, timer, report)
                    report(1.0)
                    if outcome.entry is not None:
                        tables.add(device, {shape: outcome.entry})
                outcomes.append(outcome)
    finally:
        backend.loaded().forget_plans()
    return outcomes


def refusal(device: torch.device) -> str | None:
    """Why nothing can be tuned on a device, or ``None``."""
    reason = backend.unusable_reason()
    if reason is not None:
        return reason
    try:
        backend.loaded().chip_of(_with_index(device))
    except Refused as refused:
        return str(refused)
    return None


def distinct(problems: Iterable[Problem]) -> dict[ShapeClass, Problem]:
    """The problems' shape classes, each with the first problem of it."""
    found: dict[ShapeClass, Problem] = {}
    for problem in problems:
        found.setdefault(problem.shape_class, problem)
    return found


def yolov3(batches: Sequence[int], dtypes: Sequence[str], layout: str) -> Iterator[Problem]:
    """The convolutions of YOLOv3's three last-layer stacks, for images of 416x416 and 80 classes."""
    for batch in batches:
        for dtype in dtypes:
            make = partial(Problem, dtype=dtype, layout=layout)
            for plane, c_in, f0, f1 in ((13, 1024, 512, 1024), (26, 768, 256, 512), (52, 384, 128, 256)):
                yield make((batch, c_in, plane, plane), f0, (1, 1))
                yield make((batch, f0, plane, plane), f1, (3, 3), padding=(1, 1))
                yield make((batch, f1, plane, plane), f0, (1, 1))
                yield make((batch, f1, plane, plane), 255, (1, 1), activation="identity")


class GpuTimer:
    """Microseconds of a call on the GPU, which finds nothing of its own in the L2 cache.

    Before each call more is written than the cache holds, during which the host launches the call, so that only the
    GPU's time is taken. Where the host turns out to be slower than that, more is written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._flushes = 1

    def __call__(self, contender: Contender) -> float:
        if self._buffer is None:
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            size = max(2 * cache, _MIN_FLUSH_BYTES)
            self._buffer = torch.empty(size // 4, dtype=torch.int32, device=self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            for _ in range(self._flushes):
                self._buffer.zero_()
            start.record()
            contender.run()
            late = start.query()
            end.record()
            end.synchronize()
            if not late or self._flushes >= _MOST_FLUSHES:
                return start.elapsed_time(end) * 1e3
            self._flushes *= 2


class _Bench:
    """A problem's tensors on a device, what may run on them, and what must come of it."""

    def __init__(self, problem: Problem, device: torch.device, aten: Callable[..., Tensor]) -> None:
        x, weight, bias = problem.tensors(device)
        rest = None, Activation(problem.activation, 0.1), problem.geometry
        self.shape = problem.shape_class
        self.rival = Contender(None, partial(aten, x, weight, bias, *rest))
        self._device = device
        self._launching = backend.loaded()
        self._exact = aten(x.double(), weight.double(), bias.double(), *rest)
        with _best_of_cudnn():
            self._allowed = 2 * _error(self.rival.run(), self._exact) + 1e-6
        arguments = calls.arguments(x, weight, bias, *rest)
        self._tensors, self._config, self._numbers = arguments[:8], arguments[8], arguments[9:]
        self._y = calls.empty_output(x, weight, self._config)

    def contenders(self, skipped: Counter[str], report: Report) -> list[Contender]:
        """The configurations that compile and compute rightly; the others are counted by reason."""
        found = [self._contender(tile, made) for tile, made in self._plans()]
        if not self._launching.INTERPRETED:
            found = _compiled(found, skipped, lambda done: report(0.9 * done))
        right = []
        for i, contender in enumerate(found, 1):
            fault = self._fault(contender)
            if fault is None:
                right.append(contender)
            else:
                skipped[fault] += 1
            report(0.9 + 0.1 * i / len(found))
        return right

    def _plans(self) -> list[tuple[Config, Plan]]:
        """The candidates with their plans; of those whose plans are equal for this problem the first alone."""
        x, weight = self._tensors[0], self._tensors[1].contiguous(memory_format=torch.channels_last)
        chip = self._launching.chip_of(self._device)
        found: dict[tuple[Any, ...], tuple[Config, Plan]] = {}
        for tile in candidates(self.shape, chip):
            made = plan(
                x, weight, None, self._y, self._config, chip, {},
                aligned=aligned(x, weight), interpreted=self._launching.INTERPRETED, tile=tile,
            )  # fmt: skip
            found.setdefault((*made.constants.values(), *made.options.values(), made.grid), (tile, made))
        return list(found.values())

    def _contender(self, tile: Config, made: Plan) -> Contender:
        launch = self._launching.Launch(made, self._tensors[1], self._y)

        def run() -> Tensor:
            launch.write(self._y, self._tensors, *self._numbers)
            return self._y

        return Contender(tile, run, partial(self._compile, launch))

    def _compile(self, launch: Any) -> None:
        with _on(self._device):  # which each thread has to say for itself
            launch.compile(self._y, self._tensors, *self._numbers)

    def _fault(self, contender: Contender) -> str | None:
        """What keeps a configuration from being timed, or ``None``. Raises :class:`GpuLost`."""
        # Memory may hold the right answer of the one before.
        self._y.fill_(math.nan)
        try:
            contender.run()
            _wait(self._device)
        except Exception as error:  # whatever stops this one, others may do
            try:
                _wait(self._device)
            except RuntimeError as lost:
                raise GpuLost(
                    f"{contender.config} for {self.shape} ended all use of the GPU by this process "
                    f"({_first_line(lost)}): please report this"
                ) from error
            return _first_line(error)
        # Written so that a NaN is wrong too.
        right = _error(self._y, self._exact) <= self._allowed
        return None if right else f"its error against float64 is above {self._allowed:.1e}"


def _measure(
    problem: Problem, device: torch.device, aten: Callable[..., Tensor], timer: Timer, report: Report
) -> Outcome:
    shape = problem.shape_class
    skipped: Counter[str] = Counter()
    report(0.0)
    try:
        with torch.no_grad(), _products(problem):
            bench = _Bench(problem, device, aten)
            contenders = bench.contenders(skipped, lambda done: report(0.8 * done))
            if not contenders:
                return Outcome(shape, None, True, 0, skipped)
            with _best_of_cudnn():
                fastest = _fastest(contenders, timer, lambda done: report(0.8 + 0.2 * done))
                us, aten_us = (round(t, 3) for t in _medians([fastest, bench.rival], _LAST_ROUNDS, timer).values())
    except torch.OutOfMemoryError as error:
        return Outcome(shape, None, True, 0, Counter({_first_line(error): 1}))
    assert fastest.config is not None
    return Outcome(shape, Entry(fastest.config, us, aten_us), True, len(contenders), skipped)


def _part(progress: Callable[[float, int, str], object], before: int, total: int, what: str) -> Report:
    return lambda done: progress(before + done, total, what)


def _compiled(contenders: Sequence[Contender], skipped: Counter[str], report: Report) -> list[Contender]:
    """Those that compile, in threads: most of the compiler runs outside of Python's lock."""
    errors: dict[Contender, BaseException | None] = {}
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        futures = {pool.submit(contender.compile): contender for contender in contenders}
        for future in as_completed(futures):
            errors[futures[future]] = future.exception()
            report(len(errors) / len(contenders))
    finally:
        pool.shutdown(cancel_futures=True)
    skipped.update(_first_line(error) for error in errors.values() if error is not None)
    return [contender for contender in contenders if errors[contender] is None]


def _fastest(contenders: Sequence[Contender], timer: Timer, report: Report) -> Contender:
    """The fastest, by halving those that are left and timing these twice as often."""
    left, rounds = list(contenders), _FIRST_ROUNDS
    while len(left) > 1:
        medians = _medians(left, rounds, timer)
        left = sorted(left, key=medians.__getitem__)[: len(left) // 2]
        rounds *= 2
        report(0.5 / len(left))
    return left[0]


def _medians(contenders: Sequence[Contender], rounds: int, timer: Timer) -> dict[Contender, float]:
    """The median times, in microseconds, of contenders that take turns, each round beginning with another."""
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for i in range(rounds):
        first = i % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            times[contender].append(timer(contender))
    return {contender: statistics.median(t) for contender, t in times.items()}


def _error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude of the exact values, image after image to spare memory."""
    gaps = torch.stack([(a.double() - e).abs().max() for a, e in zip(actual, exact, strict=True)])
    return (gaps.max() / exact.abs().max()).item()


def _with_index(device: torch.device) -> torch.device:
    unsaid = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unsaid else device


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _best_of_cudnn() -> Iterator[None]:
    """Convolutions by the algorithm that cuDNN measures to be fastest: what is compared with is the best there is."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _products(problem: Problem) -> Iterator[None]:
    """With fp32's products as the problem has them."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, wanted = setting.fp32_precision, DTYPES[problem.dtype][1]
    if wanted is not None:
        setting.fp32_precision = wanted
    try:
        yield
    finally:
        if wanted is not None:
            setting.fp32_precision = before


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
