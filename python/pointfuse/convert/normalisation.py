"""Batch norms with a forward of their own, such as those that apply their activation: proves what calling one does."""

from __future__ import annotations

import enum
import inspect
import operator
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pointfuse.convert.tracing import ONE_AT_A_TIME, Reads, Untraceable, in_mode, names_read, trace_in_mode
from pointfuse.modules import BATCH_NORMS, activation_of, has_hooks
from pointfuse.problem import IDENTITY, Activation

_FUNCTIONAL_ACTIVATIONS: dict[Any, str] = {
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
}
_BASE_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_IN_PLACE_ACTIVATIONS = (F.leaky_relu_, F.relu_, torch.relu_, "relu_")


@dataclass(frozen=True)
class NormAct:
    """A module proven to be its class's batch norm and then an activation, while :meth:`unchanged`.

    ``act`` is the path of the activation's module, ``None`` where it is functional or absent. ``activation`` describes
    it; of a module that is none of the known ones it is the identity. Holds not the module, but ``state``, its
    attributes.
    """

    act: str | None
    activation: Activation
    state: dict[str, Any]
    reads: dict[bool, Reads]
    elided: tuple[nn.Module, ...]

    @property
    def acts(self) -> bool:
        """Whether calling the module applies more than batch norm."""
        return self.act is not None or self.activation != IDENTITY

    def unchanged(self) -> bool:
        """Whether the module still is what it was proven to be."""
        return self.reads[self.state["training"]].unchanged() and not any(map(has_hooks, self.elided))


class _Steps(NamedTuple):
    """What follows batch norm in a forward: an activation, by its module's path or itself, and modules to pass by."""

    act: str | None = None
    functional: Activation = IDENTITY
    elided: tuple[str, ...] = ()


# Objects that a forward may read without their changing.
_FIXED = (types.FunctionType, types.BuiltinFunctionType, type, enum.Enum, torch.dtype, torch.device)
_PROVEN: WeakKeyDictionary[nn.Module, NormAct] = WeakKeyDictionary()
# By class and all that its forward reads: a network has hundreds that differ in nothing but their channels.
_STEPS: dict[Hashable, _Steps | None] = {}
# A program that makes up classes must not fill the memory.
_MOST_STEPS = 1024
_UNKNOWN = object()


def norm_act(module: nn.Module) -> NormAct | None:
    """What a batch norm of a class with its own forward does; ``None`` where it is more, or cannot be told."""
    if not isinstance(module, BATCH_NORMS) or type(module).forward in _BASE_FORWARDS or has_hooks(module):
        return None
    base = nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else nn.BatchNorm2d
    if type(module)._check_input_dim is not base._check_input_dim:
        return None
    proof = _PROVEN.get(module)
    if proof is not None and proof.unchanged():
        return proof
    # Batch norm's own settings are compared with what the forward gives, whether or not its code names them.
    names, reads = names_read(module) | {"eps", "momentum", "track_running_stats"}, {}
    for training in (False, True):
        with in_mode(module, training):
            reads[training] = Reads(module, names)
    if not all(isinstance(o, _FIXED) for _, _, o in reads[True].objects):
        return None  # what it is made of may change unseen
    children = tuple((name, type(child)) for name, child in module.named_modules(remove_duplicate=False))
    key = (type(module).forward, children, *(r.signature() for r in reads.values()))
    steps = _steps_of(module, key)
    if steps is None:
        return None
    act = None if steps.act is None else module.get_submodule(steps.act)
    elided = tuple(module.get_submodule(name) for name in steps.elided)
    if any(map(has_hooks, elided)):
        return None
    activation = steps.functional if act is None else activation_of(act) or IDENTITY
    proof = _PROVEN[module] = NormAct(steps.act, activation, module.__dict__, reads, elided)
    return proof


def _steps_of(module: nn.Module, key: Hashable) -> _Steps | None:
    try:
        known = _STEPS.get(key, _UNKNOWN)
    except TypeError:  # an attribute that has no hash
        return _prove(module)
    if known is not _UNKNOWN:
        return known  # type: ignore[return-value]
    if len(_STEPS) >= _MOST_STEPS:
        _STEPS.clear()
    return _STEPS.setdefault(key, _prove(module))


def activation_at(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The known activation that a node applies to its input, or ``None``."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if isinstance(module, nn.Identity) or sole_input(node) is None else activation_of(module)
    name = _FUNCTIONAL_ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    names = ("input", "negative_slope", "inplace") if name == "leaky_relu" else ("input", "inplace")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    slope, inplace = arguments.get("negative_slope", 0.01), arguments.get("inplace", False)
    if not isinstance(slope, int | float) or not isinstance(inplace, bool):
        return None
    return Activation(name, float(slope), inplace or node.target in _IN_PLACE_ACTIVATIONS)


def sole_input(node: fx.Node) -> fx.Node | None:
    """The node that is a call's one argument, or ``None``."""
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], fx.Node) else None


def _base_forward(x: Tensor) -> Tensor:
    """Stands in a trace for the forward of the batch norm's base class."""
    raise AssertionError("a proof is not run")


@contextmanager
def _recorded_base_forward(module: nn.Module) -> Iterator[None]:
    """Inside, ``super().forward(x)`` of this module is one call in its trace."""

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, input: Any) -> Any:
            if self is module and isinstance(input, fx.Proxy):
                return input.tracer.create_proxy("call_function", _base_forward, (input,), {})
            return original(self, input)

        return forward

    with (
        ONE_AT_A_TIME,
        mock.patch.object(_BatchNorm, "forward", recorded(_BatchNorm.forward)),
        mock.patch.object(nn.SyncBatchNorm, "forward", recorded(nn.SyncBatchNorm.forward)),
    ):
        yield


def _prove(module: nn.Module) -> _Steps | None:
    try:
        with _recorded_base_forward(module):
            found = [_follow(module, _trace(module, training), training) for training in (False, True)]
    except Untraceable:
        return None
    return found[0] if found[0] == found[1] else None


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    (name, *_) = inspect.signature(module.forward).parameters
    # A convolution's output has four dimensions, and nothing else about it may matter.
    graph, tracer, _ = trace_in_mode(module, training, {name: torch.empty(2, 2, 2, 2, device="meta")})
    if tracer.guards:
        raise Untraceable("its forward branches on its input's shape")
    return graph


def _follow(module: nn.Module, graph: fx.Graph, training: bool) -> _Steps | None:
    """What follows batch norm, or ``None`` where a node is neither it nor that."""
    modules = dict(module.named_modules(remove_duplicate=False))
    value: fx.Node | None = None
    normalised = counted = False
    steps = _Steps()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node
        elif node.op == "get_attr" or _asserts_rank(node):
            continue
        elif _counts_batch(node) and not counted:
            counted = True
        elif node.target is _base_forward or node.target is F.batch_norm:
            if normalised or node.all_input_nodes[:1] != [value] or not _is_own(module, node, training, counted):
                return None
            normalised, value = True, node
        elif node.op == "output":
            return steps if normalised and node.args == (value,) else None
        elif not normalised or (after := _step(node, modules, steps)) is None or node.all_input_nodes != [value]:
            return None
        else:
            steps, value = after, node
    return None


def _step(node: fx.Node, modules: dict[str, nn.Module], before: _Steps) -> _Steps | None:
    """What follows batch norm up to a node that comes next, or ``None`` where it is no step of a unit."""
    path = str(node.target) if node.op == "call_module" and sole_input(node) is not None else None
    if path is not None and type(modules[path]) is nn.Identity:
        return before._replace(elided=(*before.elided, path))
    if before.act is not None or before.functional != IDENTITY:
        return None
    if path is None:
        described = activation_at(node, modules)
        return None if described is None else before._replace(functional=described)
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in modules[path].modules())
    return None if convolves else before._replace(act=path)


def _asserts_rank(node: fx.Node) -> bool:
    """Whether a node is part of the assertion that the input has four dimensions, which a convolution's output has."""
    if node.target is getattr or (node.op == "call_method" and node.target in ("dim", "ndimension")):
        named = node.target is not getattr or node.args[1:] == ("ndim",)
        return named and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
    if node.target is operator.eq:
        return isinstance(node.args[0], fx.Node) and _asserts_rank(node.args[0]) and node.args[1:] == (4,)
    if node.target is torch._assert:
        return isinstance(node.args[0], fx.Node) and node.args[0].target is operator.eq and _asserts_rank(node.args[0])
    return False


def _counts_batch(node: fx.Node) -> bool:
    counter = node.args[0] if node.args else None
    if node.op != "call_method" or node.target != "add_" or not isinstance(counter, fx.Node):
        return False
    return counter.op == "get_attr" and counter.target == "num_batches_tracked" and node.args[1:] == (1,)


def _is_own(module: nn.Module, node: fx.Node, training: bool, counted: bool) -> bool:
    """Whether a call of ``F.batch_norm`` has the arguments that ``nn.BatchNorm2d`` would give it."""
    assert isinstance(module, _BatchNorm)
    if node.target is _base_forward:
        return not counted
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    updates = training and module.track_running_stats
    uses_running = not training or module.track_running_stats
    no_statistics = module.running_mean is None and module.running_var is None
    expected = {
        "running_mean": module.running_mean is not None and uses_running,
        "running_var": module.running_var is not None and uses_running,
        "weight": module.weight is not None,
        "bias": module.bias is not None,
    }
    return (
        not isinstance(module, nn.SyncBatchNorm)
        and all(_reads(given.get(name), name if there else None) for name, there in expected.items())
        and given.get("training", False) is (training or no_statistics)
        and (not updates or given.get("momentum", 0.1) == module.momentum)
        and given.get("eps", 1e-5) == module.eps
        and counted == (updates and module.num_batches_tracked is not None)
    )


def _reads(argument: Any, name: str | None) -> bool:
    if name is None:
        return argument is None
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target == name
