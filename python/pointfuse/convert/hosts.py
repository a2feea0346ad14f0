"""Puts fused forwards into a model's modules and takes them out again.

A host keeps its identity, its attributes, its children and their names; only its class changes, to a subclass of its
own class made here. So ``isinstance`` holds, ``state_dict`` is untouched, and reverting is setting the class back.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from pointfuse.backends import aten, select
from pointfuse.convert.graphs import Capture, ShapeGraphs
from pointfuse.convert.matching import Trace, trace_host
from pointfuse.convert.sequences import Run, last_of_sequence, run_sequence, runs_of, unit_site
from pointfuse.convert.structure import Site, is_sequential, set_mode
from pointfuse.convert.tails import call_and_add
from pointfuse.convert.tracing import Untraceable
from pointfuse.folded import NO_LOADING, NO_TRAINING
from pointfuse.modules import (
    ConvBNAct2d,
    activation_of,
    in_graph,
    leave_to_compiler,
    refuse_scripting,
    run_unit,
    units_not_small,
    warn_once,
)

_TRACES = "_pointfuse_traces"
_EXAMPLE = "_pointfuse_example"
_STALE = "_pointfuse_stale"
_RUNS = "_pointfuse_runs"
_GRAPHS = "_pointfuse_graphs"
_TOO_SMALL = "_pointfuse_too_small"
_OURS = (_TRACES, _EXAMPLE, _STALE, _RUNS, _GRAPHS, _TOO_SMALL)
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
            state = {k: v for k, v in state.items() if k not in (_TRACES, _STALE, _RUNS, _GRAPHS, _TOO_SMALL)}
        return _restore, (self._pointfuse_class, *self._pointfuse_kind), state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if _EXAMPLE in self.__dict__:
            _trace_again(self)  # type: ignore[arg-type]


def _in_own_way(self: Any, *args: Any) -> tuple[Any, ...]:
    """For ``__reduce_ex__`` of a class that has a way of its own to be copied, as ``torch.fx.GraphModule`` has.

    That way may look at the class, so it is asked of a twin that was never converted.
    """
    return _convert_again, (_twin(self), self._pointfuse_kind, self.__dict__.get(_EXAMPLE))


def _deepcopy_in_own_way(self: Any, memo: dict[int, Any]) -> Any:
    plain, example = copy.deepcopy(_twin(self), memo), copy.deepcopy(self.__dict__.get(_EXAMPLE), memo)
    return _convert_again(plain, self._pointfuse_kind, example)


def _twin(host: Any) -> Any:
    """The module before conversion: another object with the same attributes, children and tensors."""
    twin = object.__new__(host._pointfuse_class)
    twin.__dict__ = {k: v for k, v in host.__dict__.items() if k not in _OURS}
    return twin


def _convert_again(module: nn.Module, kind: tuple[bool, bool, bool], example: dict[str, Any] | None) -> nn.Module:
    _set_class(module, *kind)
    if module._pointfuse_forward is not nn.Sequential.forward and kind[0]:
        module.__dict__[_EXAMPLE] = example
        _trace_again(module)
    return module


class _Recompiled:
    """Is converted again when new code is made for it, as ``torch.fx.GraphModule`` does when its graph has changed."""

    def recompile(self) -> Any:
        kind, example = self._pointfuse_kind, self.__dict__.get(_EXAMPLE)  # type: ignore[attr-defined]
        uninstall(self)  # type: ignore[arg-type]  # the code becomes the forward of the class
        code = self.recompile()
        _convert_again(self, kind, example)  # type: ignore[arg-type]
        return code


class _Frozen:
    """Refuses training before any module inside has changed its mode."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(NO_TRAINING)
        return super().train(mode)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if not any(key.endswith("folded_weight") for key in state_dict):
                error.add_note(NO_LOADING)
            raise


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
    kind = _kind_of_call(self, input)
    if kind is not None and kind == self.__dict__.get(_TOO_SMALL):
        return self._pointfuse_forward(input)
    # A global hook may look at modules that a unit passes by.
    if issubclass(type(input), fx.Proxy) or torch_module._has_any_global_hook():
        return self._pointfuse_forward(input)
    return _run_fused(self, kind, run_sequence, _current_runs(self), input)


def _run_fused(self: Any, kind: tuple[Any, ...] | None, run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)``, and remember its kind of call where no unit was large enough to gain."""
    before = units_not_small()
    y = run(*args)
    if units_not_small() == before:
        self.__dict__[_TOO_SMALL] = kind
    return y


def _kind_of_call(self: Any, x: Any) -> tuple[Any, ...] | None:
    """What decides, with the modules as they are, whether any unit is large enough to gain; ``None`` where all are.

    Kept of a call in which none was, so that the next one spares itself the asking. The module's own forward gives the
    same in any case.
    """
    if select() is not aten or type(x) is not Tensor:
        return None
    return x.shape, x.dtype, self.training, torch.is_grad_enabled()


def _sequential_tail(self: Any, x: Any, residual: Any, act: Any, residual_order: str, residual_inplace: bool) -> Any:
    """What :func:`call_and_add` is to give, or ``None`` where the last module takes no such sum."""
    runs = _current_runs(self)
    if not runs:
        return None
    *first, last = runs
    if isinstance(last, Run):
        acts = last.act is not None
        if acts != (residual_order == "act_add") or activation_of(last.act) is None:
            return None
        form = (residual_order, residual_inplace, last.form.norm_acts, last.form.scale)
        x = run_sequence(first, x)
        return run_unit(x, last.conv, last.bn, last.act if acts else act, residual, form)
    if not hasattr(last, "_pointfuse_tail"):
        return None
    return call_and_add(last, run_sequence(first, x), residual, act, residual_order, residual_inplace)


def _current_runs(self: Any) -> list[Run | nn.Module]:
    children = tuple(self._modules.values())
    cached = self.__dict__.get(_RUNS)
    if cached is None or cached[0] != children or not all(map(Run.current, cached[2])):
        runs = runs_of(children)
        watched = [run for run in runs if isinstance(run, Run) and (run.proof or run.elided)]
        cached = self.__dict__[_RUNS] = (children, runs, watched)
    return cached[1]


def _traced_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Compilers and tracers are given the module's own forward: they fuse by themselves, and their guards are their own.
    if in_graph():
        if not is_frozen(self):
            leave_to_compiler(self)
        return self._pointfuse_forward(*args, **kwargs)
    kind = _kind_of_call(self, args[0]) if args else None
    if kind is not None and kind == self.__dict__.get(_TOO_SMALL):
        return self._pointfuse_forward(*args, **kwargs)
    if torch_module._has_any_global_hook() or any(issubclass(type(a), fx.Proxy) for a in args):
        return self._pointfuse_forward(*args, **kwargs)
    trace = _current_trace(self)
    if trace is not None:
        inputs = _inputs(trace, args, kwargs)
        if inputs is not None:
            return _run_fused(self, kind, trace.forward, self, *inputs)
        warn_once(
            f"{self._pointfuse_class.__name__}.forward was called in a way its conversion does not cover (arguments "
            "other than the tensors it needs, or a branch other than with the example inputs): it runs unfused"
        )
    return self._pointfuse_forward(*args, **kwargs)


def _traced_tail(self: Any, x: Any, residual: Any, act: Any, residual_order: str, residual_inplace: bool) -> Any:
    """What :func:`call_and_add` is to give, or ``None`` where the last unit takes no such sum."""
    trace = _current_trace(self)
    if trace is None or trace.tail is None or trace.tail.site.acts != (residual_order == "act_add"):
        return None
    inputs = _inputs(trace, (x,), {})
    if inputs is None:
        return None
    return trace.tail.forward(self, *inputs, residual, act, residual_order, residual_inplace)


def _current_trace(self: Any) -> Trace | None:
    trace: Trace | None = self.__dict__[_TRACES].get(self.training)
    if trace is None:
        return None
    if trace.current():
        self.__dict__[_STALE] = 0
        return trace
    return _trace_again(self)


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


_REDUCTIONS = ("__reduce__", "__reduce_ex__")
# A class made here lives as long as its instances: classes that a program makes up are given up with their models.
_CLASSES: WeakValueDictionary[tuple[type[nn.Module], bool, bool, bool], type[nn.Module]] = WeakValueDictionary()


def host_class(cls: type[nn.Module], fused: bool, frozen: bool, graphed: bool) -> type[nn.Module]:
    """The subclass of an unconverted class whose forward runs ``fused``, that refuses to train, or replays graphs."""
    made = _CLASSES.get((cls, fused, frozen, graphed))
    # A class whose forward has been replaced since is as good as another.
    if made is not None and made._pointfuse_forward is cls.forward:  # type: ignore[attr-defined]
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
        body["_pointfuse_tail"] = _sequential_tail if own is _sequential_forward else _traced_tail
    if graphed:
        body["_pointfuse_ungraphed"] = body.get("forward", cls.forward)
        body["forward"] = _in_place_of(cls.forward, _graphed_forward)
    if hasattr(cls, "__deepcopy__") or any(getattr(cls, n) is not getattr(object, n) for n in _REDUCTIONS):
        body["__reduce_ex__"], body["__deepcopy__"] = _in_own_way, _deepcopy_in_own_way
    mixed_in = ((_Graphed, graphed), (_Frozen, frozen), (_Recompiled, hasattr(cls, "recompile")), (_Host, True))
    bases = (*(base for base, taken in mixed_in if taken), cls)
    made = _CLASSES[cls, fused, frozen, graphed] = type(cls.__name__, bases, body)
    return made


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
    module.__dict__.pop(_TOO_SMALL, None)
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
    for name in _OURS:
        module.__dict__.pop(name, None)
    module.__class__ = own_class(module)


def _set_class(module: nn.Module, fused: bool = False, frozen: bool = False, graphed: bool = False) -> None:
    was = module._pointfuse_kind if isinstance(module, _Host) else (False, False, False)
    kind = [now or before for now, before in zip((fused, frozen, graphed), was, strict=True)]
    module.__class__ = host_class(own_class(module), *kind)


def trace_both(
    module: nn.Module,
    convs: Sequence[str],
    example: dict[str, Any] | None,
    traces_of: Callable[[nn.Module], dict[bool, Trace | None] | None] = lambda module: module.__dict__.get(_TRACES),
) -> tuple[dict[bool, Trace | None], Untraceable | None]:
    """A host's traces by training mode, and the reason where a mode has none (evaluation's first).

    ``traces_of`` gives those of the hosts inside, by default of converted ones.
    """
    traces: dict[bool, Trace | None] = {False: None, True: None}
    failure: Untraceable | None = None
    for training in traces:
        try:
            tails = functools.partial(tail_of, traces_of=traces_of)
            traces[training] = trace_host(module, convs, training, example, tails)
        except Untraceable as error:
            failure = failure or error
    return traces, failure


def tail_of(
    module: nn.Module, training: bool, traces_of: Callable[[nn.Module], dict[bool, Trace | None] | None]
) -> Site | None:
    """The unit whose result a host puts out in a training mode, named relative to it, if it takes a sum."""
    if isinstance(module, ConvBNAct2d):
        return unit_site(module)
    if not is_sequential(module):
        trace = (traces_of(module) or {}).get(training)
        return None if trace is None or trace.tail is None else trace.tail.site
    site, last = last_of_sequence(module)
    if site is None and last is not None and (inner := tail_of(module._modules[last], training, traces_of)):  # type: ignore[arg-type]
        site = inner.inside(last)
    return site


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure that shares its parameters, buffers and other tensors."""
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    copied = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers(), *held)})
    copies = dict(copied.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if name not in copies:  # a class may copy itself in a way of its own
            continue
        set_mode(copies[name], module.training)  # which torchvision's feature extractors forget
        if isinstance(module, torch.jit.ScriptModule):  # which copies its tensors whatever it is told
            code: Any = copies[name]._c
            for tensor_name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    code.setattr(tensor_name, tensor)
    return copied


def _restore(cls: type[nn.Module], fused: bool, frozen: bool, graphed: bool = False) -> nn.Module:
    kind = host_class(cls, fused, frozen, graphed)
    return kind.__new__(kind)
