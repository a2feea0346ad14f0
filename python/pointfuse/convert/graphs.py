"""A frozen model as CUDA graphs: one for each shape of its inputs, captured when the shape is first seen."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pointfuse.backends import chosen

# Every graph keeps its own copy of the inputs and, in a pool that all share, the memory of its largest layers.
MAX_GRAPHS = 16
_WARM_UPS = 3
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NewShapeWarning(UserWarning):
    """A model frozen with ``cuda_graph=True`` was called with inputs of a new shape, which takes a capture."""


class Capture(Protocol):
    """What makes graphs; tests put another in its place."""

    device_type: str

    def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        """Record what ``run`` does; return what does it again, and the outputs that doing it again overwrites."""

    def in_turn(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, no other replay runs, on the host or on the device: graphs share their memory."""

    def forget(self) -> None:
        """No graph is left of what was recorded."""


class GpuCapture:
    """Captures into CUDA graphs with one memory pool."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._lock = threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        # The current stream is entered too: a capture that fails does not put it back.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries choose algorithms and allocate on their first calls, which a capture forbids.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            pool = self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on allocating meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
            except Exception as error:
                self._forget_pool(device)
                error.add_note("raised while capturing the model as a CUDA graph, which cuda_graph=True asked for")
                raise
        return graph.replay, outputs

    def _forget_pool(self, device: torch.device) -> None:
        """Tell the allocator that the capture is over, which some versions of torch forget when it fails."""
        pool, self._pool = self._pool, None
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)

    def forget(self) -> None:
        # The allocator refuses another capture into a pool that no graph uses any more, while a tensor is left in it.
        self._pool = None

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        with self._lock:
            stream = torch.cuda.current_stream(device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield


class Graph(NamedTuple):
    """A captured call: its own input tensors, what replays it, and its own outputs, as leaves of a tree."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: list[Any]
    structure: pytree.TreeSpec


class ShapeGraphs:
    """The graphs of one model, by the shapes, strides and dtypes of its inputs and by everything else it was given.

    A call copies its inputs in, replays, and copies the outputs out, so that they are the caller's own.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture: Capture = capture or GpuCapture()
        self._graphs: dict[Hashable, Graph] = {}
        self._full = False
        self.announce = True

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget every graph: the model's tensors are about to be replaced."""
        self._graphs.clear()
        self._capture.forget()
        self._full = False

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward(*args, **kwargs)`` gives, by a graph where the call can have one."""
        plain = not kwargs and all(type(a) is Tensor for a in args)  # spares the common call 10 us
        leaves, structure = (list(args), None) if plain else pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, structure)
        if key is None:
            return forward(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError("a frozen model has no gradient: call it under torch.no_grad()")
        with torch.no_grad(), self._capture.in_turn(tensors[0].device):
            graph = self._graphs.get(key) or self._new_graph(key, forward, leaves, structure)
            if graph is None:
                return forward(*args, **kwargs)
            for own, given in zip(graph.inputs, tensors, strict=True):
                own.copy_(given)
            graph.replay()
            outputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in graph.outputs]
        return outputs[0] if graph.structure.is_leaf() else pytree.tree_unflatten(outputs, graph.structure)

    def _key(self, leaves: list[Any], structure: pytree.TreeSpec | None) -> Hashable | None:
        """What a graph depends on, or ``None`` for a call that is no graph's."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        parts: list[Hashable] = []
        devices = set()
        for leaf in leaves:
            if type(leaf) in (Tensor, nn.Parameter):
                devices.add(leaf.device)
                parts.append((leaf.shape, leaf.stride(), leaf.dtype))
            elif isinstance(leaf, _CONSTANTS):
                parts.append((type(leaf), leaf))
            else:
                return None
        if len(devices) != 1 or (device := devices.pop()).type != self._capture.device_type:
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        return (structure and str(structure), *parts, device, autocast, chosen())

    def _new_graph(
        self, key: Hashable, forward: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec | None
    ) -> Graph | None:
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = ", ".join("x".join(map(str, t.shape)) + f" {str(t.dtype).removeprefix('torch.')}" for t in given)
        if len(self._graphs) >= MAX_GRAPHS:
            if not self._full:
                self._full = True
                self._say(f"inputs {shapes} are new, and {MAX_GRAPHS} shapes have graphs: further ones run without")
            return None
        began = time.perf_counter()
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            own = [torch.empty_like(t, requires_grad=False).copy_(t) for t in given]
            fill = iter(own)
            filled = [next(fill) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = (filled, {}) if structure is None else pytree.tree_unflatten(filled, structure)
            replay, outputs = self._capture(lambda: forward(*args, **kwargs), given[0].device)
        graph = self._graphs[key] = Graph(own, replay, *pytree.tree_flatten(outputs))
        seconds = time.perf_counter() - began
        self._say(f"inputs {shapes} are new: graph {len(self)} of at most {MAX_GRAPHS} took {seconds:.1f} s to capture")
        return graph

    def _say(self, message: str) -> None:
        if self.announce:
            warnings.warn(f"pointfuse: {message}", NewShapeWarning, stacklevel=5)


def check_device(model: nn.Module) -> None:
    """Raise ``ValueError`` unless the model is on one CUDA device, where graphs can be captured."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if {d.type for d in devices} == {"cuda"} and len(devices) == 1:
        return
    found = ", ".join(sorted(map(str, devices))) or "nothing, for it has no parameters"
    raise ValueError(
        f"cuda_graph=True needs the whole model on one CUDA device, and it is on {found}: call model.to('cuda') first"
    )
