"""A stand-in for `torch.cuda` on machines without a GPU: its work runs on the CPU and takes known times.

Every call is held against the signature of what it stands in for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Contender
from benchmarks.timing import Prepared

POOL = (0, 7)
REAL = {name: getattr(torch.cuda, name) for name in ("Event", "Stream", "CUDAGraph", "graph", "stream")}


@dataclass
class FakeCuda:
    """What runs, on which stream, and when.

    Attributes:
        seconds: the device's clock: it moves when something runs.
        stream: the current one.
        capturing: the graph that takes what is launched, instead of its running.
        log: what happened, in order.
        ended: the pools whose allocations were ended by hand.
    """

    seconds: float = 0.0
    stream: str = "main"
    capturing: FakeGraph | None = None
    log: list[str] = field(default_factory=list)
    ended: list[tuple[int, tuple[int, int]]] = field(default_factory=list)

    def launch(self, seconds: float, work: Callable[[], Any], name: str = "kernel") -> None:
        def run() -> None:
            self.log.append(f"{name} on {self.stream}")
            self.seconds += seconds
            work()

        if self.capturing is None:
            run()
        else:
            self.capturing.work.append(run)

    def synchronize(self, device: object = None) -> None:
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        self.log.append("synchronize")

    def contender(self, name: str, seconds: float, **kwargs: Any) -> Contender:
        """A correct contender whose one kernel takes `seconds`."""

        def build(model: nn.Module, x: Tensor) -> Prepared:
            def run(x: Tensor) -> Tensor:
                y = torch.empty_like(model(x))
                self.launch(seconds, lambda: y.copy_(model(x)), name)
                return y

            return Prepared(run, x, **kwargs)

        return Contender(name, build)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def bound(name: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
            real = REAL[name]
            constructor = real.__new__ if "__new__" in vars(real) else real.__init__
            signature = inspect.signature(constructor if inspect.isclass(real) else real)

            def call(*args: Any, **kwargs: Any) -> Any:
                signature.bind(*(["self"] if inspect.isclass(real) else []), *args, **kwargs)
                return replacement(*args, **kwargs)

            return call

        replacements = {
            "Event": lambda **kwargs: FakeEvent(self),
            "Stream": lambda device=None: FakeStream(self, "side"),
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": lambda graph, pool, stream, capture_error_mode="global": FakeCapture(graph, pool, stream),
            "stream": lambda stream: self._on(stream),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, bound(name, replacement))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream(self, self.stream))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 10))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocate, raising=False)

    def _end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        self.ended.append((device, pool))
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    @contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


@dataclass
class FakeEvent:
    cuda: FakeCuda
    at: float = 0.0

    def record(self) -> None:
        self.at = self.cuda.seconds

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


@dataclass
class FakeGraph:
    cuda: FakeCuda
    work: list[Callable[[], None]] = field(default_factory=list)
    broken: bool = False

    def replay(self) -> None:
        for run in self.work:
            run()


@dataclass
class FakeCapture:
    """As `torch.cuda.graph`: where ending a capture raises, the stream before is not put back."""

    graph: FakeGraph
    pool: tuple[int, int]
    stream: FakeStream

    def __enter__(self) -> None:
        cuda = self.graph.cuda
        assert self.pool == POOL
        assert cuda.capturing is None, "a capture is under way"
        cuda.log.append(f"capture on {self.stream.name}")
        cuda.capturing, cuda.stream = self.graph, self.stream.name

    def __exit__(self, *error: object) -> None:
        self.graph.cuda.capturing = None
        if self.graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
