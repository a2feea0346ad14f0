"""Finds the units of a model from its data flow, one host at a time.

A *host* is a module whose own forward calls convolutions. In an ``nn.Sequential`` the order of the children is the data
flow. Any other host is traced by ``torch.fx`` with every child a leaf, so a child that cannot be traced costs nothing
but itself. What tracing would leave out in silence makes the host untraceable here: assignments to attributes, tensors
made in forward, and Python branches on values. Branches on the shapes and dtypes of the host's own inputs are followed
where example inputs are given, and checked again on every call.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pointfuse.modules import Folded, FrozenUnit, activation_of, bn_refusal, conv_refusal, has_hooks, run_unit
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
_IN_PLACE_ACTIVATIONS = (F.leaky_relu_, F.relu_, torch.relu_, "relu_")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
# What a branch may look at to be a guard: metadata of the host's inputs and arithmetic on it.
_METADATA_METHODS = ("size", "dim", "ndimension", "numel", "is_floating_point", "is_contiguous", "stride")
_METADATA_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


@dataclass(frozen=True)
class Site:
    """One place in a host's forward where a unit is called. Names are relative to the host.

    ``act`` is the module's name, or ``None`` with the activation functional or absent; ``replaces`` counts the
    modules or calls that the unit stands for.
    """

    conv: str
    bn: str | None
    act: str | None
    activation: Activation
    residual_order: str | None
    replaces: int


@dataclass(frozen=True)
class Trace:
    """A host's forward with its units fused, for one training mode.

    ``parameters`` are the tensors it takes; ``guards`` maps them to the branch decisions, which must come out as
    ``expected`` for the trace to hold.
    """

    forward: Callable[..., Any]
    code: str
    parameters: tuple[str, ...]
    guards: Callable[..., Any] | None
    expected: tuple[bool, ...]
    sites: tuple[Site, ...]
    refusals: dict[str, str]


class Untraceable(Exception):
    """Why a host's data flow could not be proven."""


def is_sequential(module: nn.Module) -> bool:
    """Whether the order of the children is the module's whole forward."""
    forward = type(module).forward
    return isinstance(module, nn.Sequential) and "forward" not in module.__dict__ and (
        forward is nn.Sequential.forward or getattr(type(module), "_pointfuse_kind", None) == "sequential"
    )  # fmt: skip


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Every module whose forward may call convolutions: its name, itself, and its convolutions' relative names."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        seen.add(id(module))
        convs = [relative for relative, child in _own_children(module) if isinstance(child, nn.Conv2d | FrozenUnit)]
        if convs:
            yield name, module, convs


def _own_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children a module's own forward calls: direct ones, and those in lists and dicts, which have no forward."""
    for name, child in module.named_children():
        yield prefix + name, child
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own_children(child, f"{prefix}{name}.")


@dataclass(frozen=True)
class Run:
    """A unit in a sequence of modules: the three operands of ``run_unit`` and how many modules they are."""

    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | None
    length: int


def run_at(modules: Sequence[nn.Module], start: int) -> Run | None:
    """The unit that starts at one place of a sequence of modules, or ``None``."""
    conv, following = modules[start], modules[start + 1 : start + 3]
    if isinstance(conv, FrozenUnit):
        folded = len(conv.absorbed)
        if not all(isinstance(m, Folded) for m in following[:folded]) or len(following) < folded:
            raise RuntimeError(
                f"this slice ends inside a frozen unit: its convolution is folded together with the "
                f"{' and '.join(conv.absorbed)} behind it"
            )
        return Run(conv, None, None, 1 + folded)
    if conv_refusal(conv) is not None:
        return None
    bn = following[0] if following and bn_refusal(following[0]) is None else None
    act = following[bn is not None] if len(following) > (bn is not None) else None
    if act is not None and (isinstance(act, nn.Identity) or activation_of(act) is None):
        act = None
    length = 1 + (bn is not None) + (act is not None)
    return None if length == 1 else Run(conv, bn, act, length)


def run_sequence(modules: Sequence[nn.Module], x: Any) -> Any:
    """What ``nn.Sequential`` computes, with the units fused."""
    i = 0
    while i < len(modules):
        run = run_at(modules, i)
        if run is None:
            x = modules[i](x)
            i += 1
        else:
            x = run_unit(x, run.conv, run.bn, run.act)
            i += run.length
    return x


def match_sequential(host: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """The units of a sequential host and, for its other convolutions, the reason."""
    names, modules = list(host._modules), [m for m in host._modules.values() if m is not None]
    sites, refusals, i = [], {}, 0
    while i < len(modules):
        run = run_at(modules, i)
        if run is None:
            if isinstance(modules[i], nn.Conv2d):
                refusals[names[i]] = conv_refusal(modules[i]) or _what_follows(modules[i + 1 : i + 2])
            i += 1
            continue
        bn = names[i + 1] if run.bn is not None else None
        act = names[i + run.length - 1] if run.act is not None else None
        if not isinstance(run.conv, FrozenUnit):
            sites.append(Site(names[i], bn, act, activation_of(run.act) or IDENTITY, None, run.length))
        i += run.length
    return sites, refusals


def _what_follows(following: Sequence[nn.Module]) -> str:
    if not following:
        return "nothing follows that could be fused"
    if isinstance(following[0], nn.BatchNorm2d):
        return f"batch norm follows, but {bn_refusal(following[0])}"
    return f"{type(following[0]).__name__} follows, which is neither batch norm nor a known activation"


def trace_host(host: nn.Module, training: bool, example: tuple[Any, ...] | None = None) -> Trace:
    """A host's forward in one training mode, with its units fused. Raises :class:`Untraceable` with the reason."""
    if "forward" in host.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    modes = {m: m.training for m in host.modules()}
    try:
        for m in modes:
            object.__setattr__(m, "training", training) if not isinstance(m, FrozenUnit | Folded) else None
        tracer = _Tracer(host, example)
        graph = tracer.trace_or_refuse()
    finally:
        for m, mode in modes.items():
            object.__setattr__(m, "training", mode)
    sites, refusals = _fuse(graph, dict(host.named_modules(remove_duplicate=False)))
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<pointfuse trace of {type(host).__name__}>", "exec"), namespace)
    guards = _compile_guards(tracer)
    return Trace(
        namespace["forward"], code.src, tracer.parameters, guards, tuple(e for _, e in tracer.branches), tuple(sites),
        refusals,
    )  # fmt: skip


class _TensorProxy(fx.Proxy):
    """A proxy that Python's ``isinstance`` takes for the tensor it stands for."""

    _is_param = False
    _is_buffer = False

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return Tensor


class _Tracer(fx.Tracer):
    def __init__(self, host: nn.Module, example: tuple[Any, ...] | None) -> None:
        super().__init__(autowrap_modules=(math,), param_shapes_constant=True)
        self.proxy_buffer_attributes = True
        self.host = host
        self.example = example
        self.branches: list[tuple[fx.Node, bool]] = []
        # A converted host is traced again by its original forward.
        self.traced_func_name = "_pointfuse_forward" if hasattr(host, "_pointfuse_forward") else "forward"
        signature = inspect.signature(getattr(host, self.traced_func_name))
        kinds = [p.kind for p in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
            raise Untraceable("its forward takes *args or **kwargs")
        required = [n for n, p in signature.parameters.items() if p.default is inspect.Parameter.empty]
        self.parameters = tuple(required)
        self.defaults = {n: p.default for n, p in signature.parameters.items() if n not in required}

    def trace_or_refuse(self) -> fx.Graph:
        set_attribute = nn.Module.__setattr__

        def watched(module: nn.Module, name: str, value: Any) -> None:
            if module is self.host:
                raise Untraceable(f"its forward assigns self.{name}")
            set_attribute(module, name, value)

        try:
            with mock.patch.object(nn.Module, "__setattr__", watched), _NoTensorWork():
                return self.trace(self.host, concrete_args=self.defaults or None)
        except Untraceable:
            raise
        except Exception as error:  # whatever a model's own Python raises at a proxy
            first_line = (str(error).splitlines() or [""])[0]
            raise Untraceable(f"torch.fx cannot trace its forward: {type(error).__name__}: {first_line}") from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A slice of a Sequential is a new Sequential that the model does not hold; its children are the model's.
        if is_sequential(m) and not has_hooks(m) and m not in self.submodule_paths:  # type: ignore[operator]
            for child in m:
                (args, kwargs) = ((child(*args, **kwargs),), {})
            return args[0]
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self) if node.op in ("placeholder", "call_module") else fx.Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, fx.Proxy | nn.Parameter):
            raise Untraceable("its forward uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_metadata(obj.node):
            raise Untraceable("its forward branches on a value computed from the input")
        if self.example is None:
            raise Untraceable("its forward branches on its input's shape or dtype: pass example_inputs")
        value = bool(_evaluate(obj.node, dict(zip(self.parameters, self.example, strict=False))))
        self.branches.append((obj.node, value))
        return value


class _NoTensorWork(TorchDispatchMode):
    """While tracing, only proxies are computed with; a real tensor operation would be baked in as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes {func} from constants, which a trace would freeze")


def _is_metadata(node: fx.Node) -> bool:
    """Whether a node's value follows from the shapes and dtypes of the host's inputs alone."""
    if node.op == "placeholder":
        return False
    if node.op == "call_method" and node.target in _METADATA_METHODS:
        return _is_input(node.args[0])
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA_ATTRIBUTES and _is_input(node.args[0])
    pure = getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
    return node.op == "call_function" and pure and all(map(_is_metadata, node.all_input_nodes))


def _is_input(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "placeholder"


def _evaluate(node: fx.Node, inputs: dict[str, Any]) -> Any:
    if node.op == "placeholder":
        return inputs[str(node.target)]
    args = fx.map_arg(node.args, lambda n: _evaluate(n, inputs))
    kwargs = fx.map_arg(node.kwargs, lambda n: _evaluate(n, inputs))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _compile_guards(tracer: _Tracer) -> Callable[..., Any] | None:
    if not tracer.branches:
        return None
    nodes, parameters = [n for n, _ in tracer.branches], tracer.parameters

    def guards(*inputs: Any) -> tuple[bool, ...]:
        by_name = dict(zip(parameters, inputs, strict=True))
        return tuple(bool(_evaluate(n, by_name)) for n in nodes)

    return guards


def _fuse(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[list[Site], dict[str, str]]:
    """Put ``run_unit`` in the place of each unit's calls. Returns the sites, and for other convolutions the reason."""
    sites: list[Site] = []
    refusals: dict[str, str] = {}
    called: set[str] = set()
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d | FrozenUnit):
            continue
        called.add(str(node.target))
        site = _match(node, modules)
        if isinstance(site, str):
            refusals[str(node.target)] = site
        elif isinstance(module, nn.Conv2d):
            sites.append(site)
    for name, module in modules.items():
        if "." not in name and isinstance(module, nn.Conv2d) and name not in called:
            refusals[name] = "the forward of its host does not call it"
    graph.lint()
    return sites, refusals


def _match(conv: fx.Node, modules: dict[str, nn.Module]) -> Site | str:
    """Match a unit that starts at a convolution's node and fuse it, or say why there is none."""
    graph, module = conv.graph, modules[str(conv.target)]
    frozen = isinstance(module, FrozenUnit)
    if not frozen and (reason := conv_refusal(module)):
        return reason
    x = _sole_input(conv)
    if x is None:
        return "it is not called with one tensor"
    last, bn, act, residual, order = conv, None, None, None, None
    activation = IDENTITY
    residual_inplace = False
    why = "its result does not go to batch norm or a known activation"

    following = _only_user(last)
    if following is None:
        why = "its result goes to more than one place" if len(conv.users) > 1 else why
    elif _calls(following, modules, nn.BatchNorm2d, Folded):
        reason = None if frozen else bn_refusal(modules[str(following.target)])
        if reason:
            return f"batch norm {following.target} follows, but {reason}"
        last, bn = following, following
    elif following.op == "call_function" and following.target is F.batch_norm:
        why = "functional batch_norm follows; only nn.BatchNorm2d is fused"
    elif following.op == "call_module":
        why = f"its result goes to {following.target} ({type(modules[str(following.target)]).__name__})"

    following = _only_user(last)
    if following is not None and (described := _activation_at(following, modules)):
        last, act, activation = following, following, described
    following = _only_user(last)
    if following is not None and (other := _addend(following, last)) is not None and (bn is not None or act is not None):
        order = "add_act" if act is None else "act_add"
        if _may_move(conv, following, x):
            residual, residual_inplace = other, following.target in _IN_PLACE_ADDITIONS
            last = following
            following = _only_user(last)
            if act is None and following is not None and (described := _activation_at(following, modules)):
                last, act, activation = following, following, described
        else:
            order = None
    if last is conv and not frozen:
        return why
    if not _may_move(conv, last, x):
        return "other calls between it and its batch norm may change its input"

    with graph.inserting_before(last):
        modules_args = [
            graph.get_attr(str(conv.target)),
            None if bn is None else graph.get_attr(str(bn.target)),
            graph.get_attr(str(act.target)) if act is not None and act.op == "call_module" else tuple(activation),
        ]
        arguments = (x, *modules_args, residual, order or "add_act", residual_inplace)
        fused = graph.call_function(run_unit, arguments)
    last.replace_all_uses_with(fused)
    chain = [n for n in (conv, bn, *_between(bn or conv, last)) if n is not None]
    for node in reversed(list(dict.fromkeys(chain))):
        graph.erase_node(node)
    return Site(
        str(conv.target),
        None if bn is None else str(bn.target),
        str(act.target) if act is not None and act.op == "call_module" else None,
        activation,
        order,
        len(chain),
    )


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The chain of sole users that leads from one node to another, both included."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    return chain


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return None if user is None or user.op == "output" else user


def _sole_input(node: fx.Node) -> fx.Node | None:
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], fx.Node) else None


def _calls(node: fx.Node, modules: dict[str, nn.Module], *kinds: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kinds) and _sole_input(node) is not None


def _activation_at(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node applies to its input, or ``None``."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if isinstance(module, nn.Identity) or _sole_input(node) is None else activation_of(module)
    name = _FUNCTIONAL_ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    arguments = dict(zip(("input", "negative_slope", "inplace"), node.args, strict=False)) | node.kwargs
    if name != "leaky_relu" and "negative_slope" in arguments:
        arguments["inplace"] = arguments.pop("negative_slope")
    slope = arguments.get("negative_slope", 0.01)
    if not isinstance(slope, (int, float)) or isinstance(arguments.get("inplace"), fx.Node):
        return None
    inplace = bool(arguments.get("inplace", False)) or node.target in _IN_PLACE_ACTIVATIONS
    return Activation(name, float(slope), inplace)


def _addend(node: fx.Node, z: fx.Node) -> fx.Node | None:
    """The other operand where a node adds a tensor to ``z``, without a factor and without writing to that operand."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs or node.args[0] is node.args[1]:
        return None
    first, second = node.args
    if node.target in _IN_PLACE_ADDITIONS and first is not z:
        return None
    other = second if first is z else first
    return other if isinstance(other, fx.Node) else None


def _may_move(conv: fx.Node, last: fx.Node, x: fx.Node) -> bool:
    """Whether the convolution gives the same at ``last``'s place: nothing between them can write to its input."""
    source, node = _sources(x), conv.next
    chain = set(_between(conv, last))
    while node is not last:
        if node not in chain and any(_sources(argument) & source for argument in node.all_input_nodes):
            if not (node.op == "call_function" and node.target is getattr):
                return False
        node = node.next
    return True


def _sources(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory a node's value may share. Convolution and batch norm give memory of their own."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        module = None
        if current.op == "call_module":
            module = current.graph.owning_module and current.graph.owning_module.get_submodule(str(current.target))
        fresh = current.target in (run_unit, operator.add, torch.add, "add") or isinstance(
            module, nn.Conv2d | nn.BatchNorm2d
        )
        if not fresh:
            waiting.extend(current.all_input_nodes)
    return found
