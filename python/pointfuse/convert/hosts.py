"""Puts fused forwards into a model's modules and takes them out again.

A host keeps its identity, its attributes, its children and their names; only its class changes, to a subclass of its
own class made here. So ``isinstance`` holds, ``state_dict`` is untouched, and reverting is setting the class back.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pointfuse.convert.graphs import Capture, ShapeGraphs
from pointfuse.convert.matching import Trace, trace_host
from pointfuse.convert.structure import run_sequence, runs_of
from pointfuse.convert.tracing import Untraceable
from pointfuse.folded import NO_TRAINING
from pointfuse.modules import in_graph, leave_to_compiler, refuse_scripting, warn_once

_TRACES = "_pointfuse_traces"
_EXAMPLE = "_pointfuse_example"
_STALE = "_pointfuse_stale"
_RUNS = "_pointfuse_runs"
_GRAPHS = "_pointfuse_graphs"
# A forward that reads an attribute which changes on every call is not worth tracing again and again.
_MAX_STALE = 8


class _Host:
    """What every converted module has. ``_pointfuse_forward`` is the forward of the module's own class."""

    _pointfuse_class: type[nn.Module]
    _pointfuse_forward: Callable[..., Any]
    _pointfuse_kind: tuple[bool, bool, bool]

    __prepare_scriptable__ = refuse_scripting

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the own class's: a registry of its subclasses is not to hold ours."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        if isinstance(state, dict):
            # Generated code does not travel.
            state = {k: v for k, v in state.items() if k not in (_TRACES, _STALE, _RUNS, _GRAPHS)}
        return _restore, (self._pointfuse_class, *self._pointfuse_kind), state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if _EXAMPLE in self.__dict__:
            _trace_again(self)  # type: ignore[arg-type]


class _Frozen:
    """Refuses training before any module inside has changed its mode."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(NO_TRAINING)
        return super().train(mode)  # type: ignore[misc]


class _Graphed:
    """Replays CUDA graphs, and forgets them when the tensors they read are replaced."""

    _pointfuse_ungraphed: Callable[..., Any]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        graphs_of(self).clear()  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        graphs_of(self).clear()  # type: ignore[arg-type]
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]


def _graphed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return graphs_of(self).call(self._pointfuse_ungraphed, args, kwargs)


def _sequential_forward(self: Any, input: Any) -> Any:
    if in_graph():
        if not is_frozen(self):
            leave_to_compiler(self)
        return self._pointfuse_forward(input)
    children = tuple(self._modules.values())
    cached = self.__dict__.get(_RUNS)
    if cached is None or cached[0] != children:
        cached = self.__dict__[_RUNS] = (children, runs_of(children))
    return run_sequence(cached[1], input)


def _traced_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Compilers and tracers are given the module's own forward: they fuse by themselves, and their guards are their own.
    if in_graph():
        if not is_frozen(self):
            leave_to_compiler(self)
        return self._pointfuse_forward(*args, **kwargs)
    trace = self.__dict__[_TRACES].get(self.training)
    if trace is not None:
        if trace.reads.unchanged():
            self.__dict__[_STALE] = 0
        else:
            trace = _trace_again(self)
    if trace is not None:
        inputs = _inputs(trace, args, kwargs)
        if inputs is not None:
            return trace.forward(self, *inputs)
        warn_once(
            f"{self._pointfuse_class.__name__}.forward was called in a way its conversion does not cover (arguments "
            "other than the tensors it needs, or a branch other than with the example inputs): it runs unfused"
        )
    return self._pointfuse_forward(*args, **kwargs)


def _inputs(trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments the trace takes, or ``None`` where the call is not one that it covers."""
    if kwargs:
        missing = tuple(trace.parameters)[len(args) :]
        if set(missing) != set(kwargs):
            return None
        args = (*args, *(kwargs[name] for name in missing))
    if len(args) != len(trace.parameters) or not all(map(isinstance, args, trace.parameters.values())):
        return None
    covered = all(bool(guard(None, *args)) == decision for guard, decision in trace.guards)
    return args if covered else None


def _trace_again(module: nn.Module) -> Trace | None:
    """Trace a converted host anew, after its state was set or something its forward reads has changed."""
    stale = module.__dict__[_STALE] = module.__dict__.get(_STALE, 0) + 1
    traces: dict[bool, Trace | None] = {}
    failure: object = "what its forward reads changes on every call"
    if stale <= _MAX_STALE:
        traces, failure = trace_both(module, (), module.__dict__[_EXAMPLE])
    module.__dict__[_TRACES] = traces
    trace = traces.get(module.training)
    if trace is None and not module.training:
        warn_once(f"{own_class(module).__name__} can no longer be converted and runs unfused: {failure}")
    return trace


_CLASSES: dict[tuple[type[nn.Module], bool, bool, bool], type[nn.Module]] = {}


def host_class(cls: type[nn.Module], fused: bool, frozen: bool, graphed: bool) -> type[nn.Module]:
    """The subclass of an unconverted class whose forward runs ``fused``, that refuses to train, or replays graphs."""
    made = _CLASSES.get((cls, fused, frozen, graphed))
    if made is not None:
        return made
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_pointfuse_class": cls,
        "_pointfuse_forward": cls.forward,
        "_pointfuse_kind": (fused, frozen, graphed),
    }
    if fused:
        own = _sequential_forward if cls.forward is nn.Sequential.forward else _traced_forward
        body["forward"] = _in_place_of(cls.forward, own)
    if graphed:
        body["_pointfuse_ungraphed"] = body.get("forward", cls.forward)
        body["forward"] = _in_place_of(cls.forward, _graphed_forward)
    bases = (*((_Graphed,) if graphed else ()), *((_Frozen,) if frozen else ()), _Host, cls)
    return _CLASSES.setdefault((cls, fused, frozen, graphed), type(cls.__name__, bases, body))


def _in_place_of(forward: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``ours`` that is known by the name and the signature of ``forward``.

    Its code is a copy too: torch.compile counts recompilations by code, and classes are not to share one limit.
    """
    copied = types.FunctionType(ours.__code__.replace(), ours.__globals__)
    return functools.wraps(forward)(copied)


def is_host(module: nn.Module) -> bool:
    """Whether the module has been converted."""
    return isinstance(module, _Host)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before conversion."""
    return module._pointfuse_class if isinstance(module, _Host) else type(module)


def install(
    module: nn.Module, traces: dict[bool, Trace | None] | None = None, example: dict[str, Any] | None = None
) -> None:
    """Make one module run fused, in place; ``traces`` are for one that is not sequential."""
    if traces is not None:
        module.__dict__[_TRACES] = traces
        module.__dict__[_EXAMPLE] = example
    module.__dict__.pop(_RUNS, None)
    _set_class(module, fused=True)


def refuse_training(module: nn.Module) -> None:
    """Make one module refuse ``train()``, in place."""
    _set_class(module, frozen=True)


def is_frozen(module: nn.Module) -> bool:
    """Whether the module refuses ``train()``."""
    return isinstance(module, _Frozen)


def replay_graphs(module: nn.Module, capture: Capture | None = None) -> ShapeGraphs:
    """Make one module run as a graph for each shape of its inputs, in place."""
    _set_class(module, graphed=True)
    graphs = module.__dict__[_GRAPHS] = ShapeGraphs(capture)
    return graphs


def graphs_of(module: nn.Module) -> ShapeGraphs:
    """The graphs of a module that runs by them; a copy of it, and one that was pickled, starts without any."""
    return module.__dict__.setdefault(_GRAPHS, ShapeGraphs())


def uninstall(module: nn.Module) -> None:
    """Give one converted module its own class back."""
    for name in (_TRACES, _EXAMPLE, _STALE, _RUNS, _GRAPHS):
        module.__dict__.pop(name, None)
    module.__class__ = own_class(module)


def _set_class(module: nn.Module, fused: bool = False, frozen: bool = False, graphed: bool = False) -> None:
    was = module._pointfuse_kind if isinstance(module, _Host) else (False, False, False)
    kind = [now or before for now, before in zip((fused, frozen, graphed), was, strict=True)]
    module.__class__ = host_class(own_class(module), *kind)


def trace_both(
    module: nn.Module, convs: Sequence[str], example: dict[str, Any] | None
) -> tuple[dict[bool, Trace | None], Untraceable | None]:
    """A host's traces by training mode, and the reason where a mode has none (evaluation's first)."""
    traces: dict[bool, Trace | None] = {False: None, True: None}
    failure: Untraceable | None = None
    for training in traces:
        try:
            traces[training] = trace_host(module, convs, training, example)
        except Untraceable as error:
            failure = failure or error
    return traces, failure


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure that shares its parameters, buffers and other tensors."""
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers(), *held)})


def _restore(cls: type[nn.Module], fused: bool, frozen: bool, graphed: bool = False) -> nn.Module:
    kind = host_class(cls, fused, frozen, graphed)
    return kind.__new__(kind)
