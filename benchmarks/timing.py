"""How a contender is run and timed: on a CPU by the wall clock; on a GPU between events, with the L2 cache cold or
warm, as CUDA graphs or not; and by the host's time alone where the overhead of a call is asked for.

CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

# "tf32" is fp32 whose convolutions and products may round their operands to TF32, PyTorch's default on a GPU.
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LAYOUTS: dict[str, torch.memory_format] = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
L2_STATES = ("cold", "warm")

# What is rotated: with the cache flushed, one would do; several also keep out what depends on one address or value.
COLD_INPUTS = 3
# A warm timing is of so many calls that it takes this long: events tell half a microsecond apart.
WARM_SECONDS = 200e-6
MAX_WARM_CALLS = 100
# Twice an H100's L2 takes it 35 us to write. The queue must not run dry before the host has launched what is timed.
MIN_FLUSH_BYTES = 256 << 20
# Before a capture: lazy loading, workspaces of the capturing stream and algorithm searches have no place in it.
CAPTURE_WARMUP = 3

Output: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run: `run(x)` is what is timed, `x` the input in the layout it takes.

    `context` gives a context manager in which `run` is to be called, and whose cost is not the contender's.
    """

    run: Callable[[Tensor], Output]
    x: Tensor
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Staged:
    """A contender in the form in which it is timed, inside its `context`.

    Attributes:
        once: one call; the first on the prepared input, later ones perhaps on other inputs like it.
        often: `calls` calls on the prepared input, for a time per call.
    """

    once: Callable[[], Output]
    often: Callable[[], Any]
    calls: int = 1
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Timer(Protocol):
    """Tells how long one call takes; `now` is a clock for time budgets. Both in seconds."""

    @property
    def l2(self) -> str | None:
        """One of `L2_STATES`, or None where it is not controlled."""

    def now(self) -> float: ...

    def time(self, staged: Staged) -> float: ...


@dataclass(frozen=True)
class Method:
    """How the contenders of a case are staged, and the timers that then each give a result.

    `graphs` says whether they run as CUDA graphs; it is None on a device that has none.
    """

    stage: Callable[[Prepared], Staged]
    timers: tuple[Timer, ...]
    graphs: bool | None = None


def method_for(device: torch.device, l2: Sequence[str] = ("warm",), graphs: bool = True) -> Method:
    """The way to time contenders on a device; `l2` (of `L2_STATES`) and `graphs` are for CUDA alone."""
    if device.type != "cuda":
        return Method(direct, (WallTimer(),))
    timers: dict[str, Timer] = {"cold": ColdTimer(Flush(device)), "warm": WarmTimer()}
    stage = CudaStage(inputs=COLD_INPUTS if "cold" in l2 else 1, warm="warm" in l2, graphs=graphs)
    return Method(stage, tuple(timers[state] for state in l2), graphs)


def overhead_method(device: torch.device) -> Method:
    """The way to time what a call costs the host."""
    if device.type != "cuda":
        return Method(direct, (HostTimer(),))
    return Method(direct, (HostTimer(partial(torch.cuda.synchronize, device)),), graphs=False)


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """A block in which convolutions and matrix products on a GPU may use TF32, or may not."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def layout_of(x: Tensor) -> str:
    """Of `LAYOUTS` the one that an input is in; "NCHW" where it is in both."""
    return "NCHW" if x.is_contiguous() else "channels_last"


def direct(prepared: Prepared) -> Staged:
    """Each timing is of a plain call."""
    call = partial(prepared.run, prepared.x)
    return Staged(call, call, context=prepared.context)


def device_seconds(call: Callable[[], Any]) -> float:
    """Seconds that the current CUDA stream takes for what `call` puts on it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def first_line(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class _Clocked:
    """What the timers have in common: a clock, and no say about the L2 cache."""

    clock: Callable[[], float] = field(default=time.perf_counter, kw_only=True)

    @property
    def l2(self) -> str | None:
        return None

    def now(self) -> float:
        return self.clock()


@dataclass(frozen=True)
class WallTimer(_Clocked):
    """For a device that has finished when the call returns: the CPU."""

    def time(self, staged: Staged) -> float:
        # The untimed call brings the contender's own weights back into the cache. Without it the time would depend on
        # whose turn came before, and on which contenders share their weights.
        staged.once()
        start = self.clock()
        staged.once()
        return self.clock() - start


@dataclass(frozen=True)
class HostTimer(_Clocked):
    """The host's time from a call to its return: on a GPU to the launch, on a CPU the whole call.

    The device is waited for between groups of calls, outside the timing: a queue that is full, at about 1,000 launches,
    makes the host wait for the device. The time is the median of a group.
    """

    synchronize: Callable[[], Any] = lambda: None
    calls: int = 100

    def time(self, staged: Staged) -> float:
        self.synchronize()
        seconds = []
        for _ in range(self.calls):
            start = self.clock()
            staged.once()
            seconds.append(self.clock() - start)
        self.synchronize()
        return statistics.median(seconds)


@dataclass(frozen=True)
class ColdTimer(_Clocked):
    """One call between two events, after `flush` has been put on the stream: inputs and weights come from memory.

    While the flush runs the host launches what follows, so that no launch latency is timed unless it is longer.
    """

    flush: Callable[[], Any]

    @property
    def l2(self) -> str | None:
        return "cold"

    def time(self, staged: Staged) -> float:
        self.flush()
        return device_seconds(staged.once)


@dataclass(frozen=True)
class WarmTimer(_Clocked):
    """Calls on the same input one after another between two events, divided by their number.

    The same calls before them, untimed, warm the cache and hide the launch of those that are timed.
    """

    @property
    def l2(self) -> str | None:
        return "warm"

    def time(self, staged: Staged) -> float:
        staged.often()
        return device_seconds(staged.often) / staged.calls


@dataclass
class Flush:
    """Fills a device's L2 cache with something else, by writing a buffer of at least twice its size."""

    device: torch.device
    _buffer: Tensor | None = None

    def __call__(self) -> None:
        if self._buffer is None:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            size = max(2 * cache, MIN_FLUSH_BYTES)
            self._buffer = torch.empty(size // 4, dtype=torch.int32, device=self.device)
        self._buffer.zero_()


class NotCapturable(RuntimeError):
    """A contender did something that a CUDA graph cannot hold; the message is the first line of what it raised."""


@dataclass(frozen=True)
class CudaStage:
    """Stages a contender for a GPU: `once` goes through `inputs` inputs; `often` is there if `warm`.

    With `graphs`, each is one CUDA graph: `often` one graph of all its calls, so that what is timed is the kernels as
    they follow each other in a network, not the launches of graphs.

    Raises:
        NotCapturable: the contender cannot be captured.
    """

    inputs: int
    warm: bool
    graphs: bool

    def __call__(self, prepared: Prepared) -> Staged:
        run, x = prepared.run, prepared.x
        capture = GraphRecorder(x.device).capture if self.graphs else _as_it_is
        with prepared.context():
            turns = [capture(partial(run, turn)) for turn in _rotated(x, self.inputs)]
            calls = _warm_calls(turns[0]) if self.warm else 1
            often = capture(partial(_repeat, partial(run, x), calls)) if calls > 1 else turns[0]
        cycle = itertools.cycle(turns)
        return Staged(lambda: next(cycle)(), often, calls, prepared.context)


class GraphRecorder:
    """Captures calls in CUDA graphs on a stream of its own, with one memory pool.

    One pool will do, since the graphs never run at the same time, and each one's output is kept as its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], Output]) -> Callable[[], Output]:
        """A function that replays `call` and gives its output, the same tensors each time.

        Raises:
            NotCapturable: `call` did what cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        # torch.cuda.graph leaves its stream current when ending the capture raises; this puts back the one before.
        with torch.cuda.stream(self._stream):
            for _ in range(CAPTURE_WARMUP):
                call()
            output = self._capture(graph, call)
        before.wait_stream(self._stream)
        # So far nothing has run. A replay that does not write its output must not find the warm-up's there.
        for tensor in (output,) if isinstance(output, Tensor) else output:
            tensor.fill_(math.nan)

        def replay() -> Output:
            graph.replay()
            return output

        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Callable[[], Output]) -> Output:
        said = ""
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    return call()
                except Exception as error:
                    said = first_line(error)
                    raise
        except Exception as error:
            self._forget_capture()
            # Ending a capture that is broken raises too, and says less.
            raise NotCapturable(said or first_line(error)) from error

    def _forget_capture(self) -> None:
        """Tell the allocator that the capture is over, or it refuses every later one.

        PyTorch 2.11 forgets to when ending the capture raises (its pull request 180395); a version that does not
        forget raises here, as it has nothing to end.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)


def _as_it_is(call: Callable[[], Output]) -> Callable[[], Output]:
    return call


def _rotated(x: Tensor, count: int) -> list[Tensor]:
    """`x` and others like it, in memory of their own: its rows moved by one, by two and so on."""
    return [x, *(torch.empty_like(x).copy_(x.roll(shift, dims=2)) for shift in range(1, count))]


def _warm_calls(call: Callable[[], Any]) -> int:
    """How many calls take `WARM_SECONDS`."""
    call()
    seconds = min(device_seconds(call) for _ in range(3))
    return max(1, min(MAX_WARM_CALLS, math.ceil(WARM_SECONDS / seconds))) if seconds > 0 else MAX_WARM_CALLS


def _repeat(call: Callable[[], Output], times: int) -> Output:
    # Each output is released when the next is there, as in a network.
    output = call()
    for _ in range(times - 1):
        output = call()
    return output
