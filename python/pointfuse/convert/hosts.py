"""Puts fused forwards into a model's modules and takes them out again.

A host keeps its identity, its attributes, its children and their names; only its class changes, to a subclass of its
own class made here. So ``isinstance`` holds, ``state_dict`` is untouched, and reverting is setting the class back.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pointfuse.convert.matching import Trace, Untraceable, is_sequential, run_sequence, trace_host

_TRACES = "_pointfuse_traces"
_EXAMPLE = "_pointfuse_example"


class _Host:
    """What every converted module has. ``_pointfuse_forward`` is the forward of the module's own class."""

    _pointfuse_class: type[nn.Module]
    _pointfuse_forward: Callable[..., Any]
    _pointfuse_frozen: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        if isinstance(state, dict):
            # Generated code does not travel; whether there was any does.
            state = {k: bool(v) if k == _TRACES else v for k, v in state.items()}
        return _restore, (self._pointfuse_class, self._pointfuse_frozen), state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__.get(_TRACES):
            _refresh(self)  # type: ignore[arg-type]
        elif _TRACES in self.__dict__:
            self.__dict__[_TRACES] = {}


class _FrozenRoot:
    """Refuses training before any module of the model has changed its mode."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "a frozen model cannot be trained: its batch norms are folded into its weights; train the model that "
                "was given to freeze, or one made by pointfuse.convert"
            )
        return super().train(mode)  # type: ignore[misc]


def _sequential_forward(self: nn.Module, input: Any) -> Any:
    return run_sequence(list(self._modules.values()), input)  # type: ignore[arg-type]


def _traced_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    trace = self.__dict__[_TRACES].get(self.training)
    if trace is not None:
        inputs = _inputs(trace, args, kwargs)
        if inputs is not None:
            return trace.forward(self, *inputs)
        _warn_once(
            f"{self._pointfuse_class.__name__}.forward was called in a way its conversion does not cover (arguments "
            "other than the tensors it needs, or a branch other than with the example inputs): it runs unfused"
        )
    return self._pointfuse_forward(*args, **kwargs)


def _inputs(trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments the trace takes, or ``None`` where the call is not one that it covers."""
    names = tuple(trace.parameters)
    if kwargs:
        missing = names[len(args) :]
        if set(missing) != set(kwargs):
            return None
        args = (*args, *(kwargs[name] for name in missing))
    if len(args) != len(names) or not all(map(isinstance, args, trace.parameters.values())):
        return None
    if trace.guards is not None and trace.guards(*args) != trace.expected:
        return None
    return args


def _traced_setattr(self: Any, name: str, value: Any) -> None:
    self._pointfuse_class.__setattr__(self, name, value)
    # A trace holds the plain attributes that forward read; modes, tensors and modules it reads on every call.
    if name != "training" and not isinstance(value, Tensor | nn.Module) and self.__dict__.get(_TRACES):
        _refresh(self)


_CLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def host_class(cls: type[nn.Module], frozen: bool) -> type[nn.Module]:
    """The subclass of ``cls`` that runs fused; with ``frozen`` it also refuses to train. ``cls`` is unconverted."""
    made = _CLASSES.get((cls, frozen))
    if made is not None:
        return made
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_pointfuse_class": cls,
        "_pointfuse_forward": cls.forward,
        "_pointfuse_frozen": frozen,
    }
    if cls.forward is nn.Sequential.forward:
        body["forward"] = functools.wraps(cls.forward)(_sequential_forward)
    elif cls.forward is not nn.Module.forward:
        body["forward"] = functools.wraps(cls.forward)(_traced_forward)
        body["__setattr__"] = _traced_setattr
    bases = (_FrozenRoot, _Host, cls) if frozen else (_Host, cls)
    return _CLASSES.setdefault((cls, frozen), type(cls.__name__, bases, body))


def is_host(module: nn.Module) -> bool:
    """Whether the module has been converted."""
    return isinstance(module, _Host)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before conversion."""
    return module._pointfuse_class if isinstance(module, _Host) else type(module)


def install(
    module: nn.Module,
    traces: dict[bool, Trace | None] | None = None,
    example: dict[str, Any] | None = None,
    frozen: bool = False,
) -> None:
    """Convert one module in place. Without ``traces`` a module that needs them runs its own forward."""
    was_frozen = isinstance(module, _FrozenRoot)
    if not is_sequential(module):
        module.__dict__[_TRACES] = traces or module.__dict__.get(_TRACES, {})
        if example is not None:
            module.__dict__[_EXAMPLE] = example
    module.__class__ = host_class(own_class(module), frozen or was_frozen)


def uninstall(module: nn.Module) -> None:
    """Give one converted module its own class back."""
    module.__dict__.pop(_TRACES, None)
    module.__dict__.pop(_EXAMPLE, None)
    module.__class__ = own_class(module)


def trace_both(
    module: nn.Module, convs: Sequence[str] = (), example: dict[str, Any] | None = None
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
    """A copy of the model's structure that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _restore(cls: type[nn.Module], frozen: bool) -> nn.Module:
    kind = host_class(cls, frozen)
    return kind.__new__(kind)


def _refresh(module: nn.Module) -> None:
    """Trace a converted host again, after its state was set or a plain attribute of it changed."""
    traces, failure = trace_both(module, example=module.__dict__.get(_EXAMPLE))
    module.__dict__[_TRACES] = traces
    if traces[False] is None and failure is not None:
        _warn_once(f"{own_class(module).__name__} can no longer be converted and runs unfused: {failure}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"pointfuse: {message}", UserWarning, stacklevel=3)
