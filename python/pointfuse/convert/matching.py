"""Finds the units of a model from its data flow, one host at a time.

A *host* is a module whose own forward calls convolutions. In an ``nn.Sequential`` the order of the children is the data
flow. Any other host is traced by ``torch.fx`` with every child a leaf, so a child that cannot be traced costs nothing
but itself. What tracing would leave out in silence makes the host untraceable here: assignments to attributes, tensors
made in forward, and Python branches on values. Branches on the shapes and dtypes of the host's own inputs are followed
where example inputs are given, and checked again on every call.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pointfuse.backends import select
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import activation_of, bn_refusal, conv_refusal, has_hooks, run_unit
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
_MODES = (
    (torch._C, "_set_grad_enabled"),
    (torch._C, "_InferenceMode"),
    (torch, "set_autocast_enabled"),
    (torch, "is_grad_enabled"),
    (torch, "is_inference_mode_enabled"),
    (torch, "is_autocast_enabled"),
)
# What a branch may look at to be a guard: metadata of the host's inputs and arithmetic on it.
_METADATA_METHODS = ("size", "dim", "ndimension", "numel", "is_floating_point")
_METADATA_ATTRIBUTES = ("shape", "ndim", "dtype")


@dataclass(frozen=True)
class Site:
    """One place in a host's forward where a unit is called. Names are relative to the host.

    ``act`` is the module's name, or ``None`` with the activation functional or absent.
    """

    conv: str
    bn: str | None
    act: str | None
    activation: Activation
    residual_order: str | None


@dataclass(frozen=True)
class Trace:
    """A host's forward with its units fused, for one training mode.

    ``parameters`` are the arguments it takes with their types. The trace holds while every guard, a function of the
    arguments, gives its decision, and while ``reads`` are unchanged. ``refusals`` gives the reason for each call of a
    convolution that is no unit; ``uncalled`` names the host's convolutions that its forward does not call, and
    ``other_uses`` the modules that it uses outside units.
    """

    forward: Callable[..., Any]
    code: str
    parameters: dict[str, type]
    guards: tuple[tuple[Callable[..., Any], bool], ...]
    reads: Reads
    sites: tuple[Site, ...]
    refusals: dict[str, str]
    uncalled: tuple[str, ...]
    other_uses: tuple[str, ...]


class Untraceable(Exception):
    """Why a host's data flow could not be proven."""


def original_forward(module: nn.Module) -> Any:
    """The forward of the module's own class, also where conversion put another in its place."""
    return getattr(type(module), "_pointfuse_forward", type(module).forward)


def is_sequential(module: nn.Module) -> bool:
    """Whether the order of the children is the module's whole forward."""
    return original_forward(module) is nn.Sequential.forward and "forward" not in module.__dict__


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Every module whose forward may call convolutions: its name, itself, and its convolutions' relative names."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or _has_no_forward(module):
            continue
        seen.add(id(module))
        convs = [relative for relative, child in _own_children(module) if isinstance(child, nn.Conv2d | FoldedConv2d)]
        if convs:
            yield name, module, convs


def _has_no_forward(module: nn.Module) -> bool:
    """Lists, dicts, and modules that only hold others."""
    return original_forward(module) is nn.Module.forward


def _own_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children a module's own forward calls: direct ones, and those of children that have no forward themselves."""
    for name, child in module.named_children():
        yield prefix + name, child
        if _has_no_forward(child):
            yield from _own_children(child, f"{prefix}{name}.")


@dataclass(frozen=True)
class Run:
    """A unit in a sequence of modules: its modules in order, and the operands of ``run_unit``.

    ``min_input`` is the number of input elements from which fusing may pay.
    """

    modules: tuple[nn.Module, ...]
    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | None
    min_input: int


def run_at(modules: Sequence[nn.Module], start: int) -> Run | None:
    """The unit that starts at one place of a sequence of modules, or ``None``."""
    conv = modules[start]
    if not isinstance(conv, nn.Conv2d | FoldedConv2d):
        return None
    following = modules[start + 1 : start + 3]
    if isinstance(conv, FoldedConv2d):
        has_bn = conv.has_bn
        if has_bn and not (following and isinstance(following[0], FoldedBatchNorm2d)):
            raise RuntimeError("this slice ends inside a frozen unit, whose convolution is folded with its batch norm")
    elif conv_refusal(conv) is not None:
        return None
    else:
        has_bn = bool(following) and bn_refusal(following[0]) is None
    bn = following[0] if has_bn else None
    act = following[has_bn] if len(following) > has_bn else None
    if act is not None and (isinstance(act, nn.Identity) or activation_of(act) is None):
        act = None
    parts = tuple(m for m in (conv, bn, act) if m is not None)
    if len(parts) == 1:
        return None
    return Run(parts, conv, bn, act, select().min_input(conv, bn) if isinstance(conv, nn.Conv2d) else 0)


def runs_of(modules: Sequence[nn.Module]) -> list[Run | nn.Module]:
    """A sequence of modules with the units grouped."""
    grouped: list[Run | nn.Module] = []
    i = 0
    while i < len(modules):
        run = run_at(modules, i)
        grouped.append(modules[i] if run is None else run)
        i += 1 if run is None else len(run.modules)
    return grouped


def run_sequence(grouped: Sequence[Run | nn.Module], x: Any) -> Any:
    """What ``nn.Sequential`` computes, with the units fused."""
    for step in grouped:
        if isinstance(step, nn.Module):
            x = step(x)
        elif isinstance(x, Tensor) and x.numel() >= step.min_input:
            x = run_unit(x, step.conv, step.bn, step.act)
        else:
            for module in step.modules:
                x = module(x)
    return x


def match_sequential(host: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """The units of a sequential host and, for its other convolutions, the reason."""
    children = {name: child for name, child in host._modules.items() if child is not None}
    names, modules = list(children), list(children.values())
    sites, refusals, i = [], {}, 0
    for step in runs_of(modules):
        if isinstance(step, nn.Conv2d):
            refusals[names[i]] = conv_refusal(step) or _what_follows(modules[i + 1 : i + 2])
        if isinstance(step, Run) and isinstance(step.conv, nn.Conv2d):
            bn = names[i + 1] if step.bn is not None else None
            act = names[i + len(step.modules) - 1] if step.act is not None else None
            sites.append(Site(names[i], bn, act, activation_of(step.act) or IDENTITY, None))
        i += len(step.modules) if isinstance(step, Run) else 1
    return sites, refusals


def _what_follows(following: Sequence[nn.Module]) -> str:
    if not following:
        return "nothing follows that could be fused"
    if isinstance(following[0], nn.BatchNorm2d):
        return f"batch norm follows, but {bn_refusal(following[0])}"
    return f"{type(following[0]).__name__} follows, which is neither batch norm nor a known activation"


def trace_host(host: nn.Module, convs: Sequence[str], training: bool, example: dict[str, Any] | None = None) -> Trace:
    """A host's forward in one training mode, with its units fused. Raises :class:`Untraceable` with the reason.

    ``convs`` names the convolutions that are the host's to account for.
    """
    if "forward" in host.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    if "type" in _names_read(host):
        raise Untraceable("its forward calls type(), which a trace cannot answer")
    modes = [(m, m.training) for m in host.modules()]
    try:
        for m, _ in modes if host.training != training else ():
            m.__dict__["training"] = training
        reads = Reads(host)
        tracer = _Tracer(host, example)
        graph = tracer.trace_or_refuse()
    finally:
        for m, mode in modes:
            m.__dict__["training"] = mode
    sites, refusals, uncalled, other_uses = _Fuser(graph, dict(host.named_modules(remove_duplicate=False)), convs).run()
    source, forward = _compile(graph, type(host).__name__)
    guards = tuple(tracer.guards)
    return Trace(forward, source, tracer.kinds, guards, reads, tuple(sites), refusals, uncalled, other_uses)


class Reads:
    """What a forward may read of its module other than tensors: whether it is as it was when this was made.

    The children of the module and of those that only hold others; which parameters and buffers are absent; and the
    values of plain attributes, of the module and its children, whose names occur in the code of the module's class.
    """

    def __init__(self, host: nn.Module) -> None:
        holders = [host, *(m for _, m in _own_children(host) if _has_no_forward(m))]
        self.children = [(m._modules, _ids(m._modules)) for m in holders]
        self.absent = [(d, _absent(d)) for d in (host._parameters, host._buffers)]
        self.values: list[tuple[dict[str, Any], str, Any]] = []
        self.containers: list[tuple[Any, Any]] = []
        names = _names_read(host)
        for module in (host, *(m for _, m in _own_children(host))):
            for name in names - ({"training"} if module is host else set()):
                # An attribute that is not there may come, and be found by hasattr.
                value = module.__dict__.get(name, _MISSING)
                if value is None or value is _MISSING or isinstance(value, bool | int | float | str | tuple):
                    if module is host or value is not _MISSING:
                        self.values.append((module.__dict__, name, value))
                elif type(value) in (list, dict, set):
                    self.values.append((module.__dict__, name, value))
                    self.containers.append((value, copy.copy(value)))

    def unchanged(self) -> bool:
        """Whether a trace made together with this still stands for the forward."""
        return (
            all(_ids(d) == ids for d, ids in self.children)
            and all(_absent(d) == absent for d, absent in self.absent)
            and all((now := d.get(n, _MISSING)) is then or now == then for d, n, then in self.values)
            and all(_same(now, then) for now, then in self.containers)
        )


_MISSING = object()


def _ids(modules: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, modules.values()))


def _absent(tensors: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if tensor is None)


def _names_read(host: nn.Module) -> frozenset[str]:
    """The global and attribute names in the code of a module's forward and of the Python functions it may call.

    Those are the methods, properties and function attributes that it names, and functions of its own modules.
    """
    waiting: list[Any] = [original_forward(host)]
    seen: set[types.CodeType] = set()
    names: set[str] = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if not isinstance(code, types.CodeType) or code in seen:
            continue
        seen.add(code)
        used, inner = set(code.co_names), list(code.co_consts)
        while inner:
            if isinstance(constant := inner.pop(), types.CodeType):
                used |= set(constant.co_names)
                inner += constant.co_consts
        names |= used
        cells = [c.cell_contents for c in function.__closure__ or () if c != types.CellType()]
        for value in (*cells, *(_function_named(name, host, function.__globals__) for name in used)):
            if isinstance(value, types.FunctionType) and not value.__module__.startswith("torch."):
                waiting.append(value)
    return frozenset(names)


def _function_named(name: str, host: nn.Module, globals_: dict[str, Any]) -> Any:
    """What a name in a module's code may call: a method, a property, an attribute or a global."""
    found = vars(host).get(name) or inspect.getattr_static(type(host), name, None) or globals_.get(name)
    return getattr(found, "fget", None) or getattr(found, "__func__", found)


def _compile(graph: fx.Graph, name: str) -> tuple[str, Callable[..., Any]]:
    """The source of a graph and its function, whose first argument is the module."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    try:
        exec(compile(code.src, f"<pointfuse trace of {name}>", "exec"), namespace)
    except SyntaxError as error:
        raise Untraceable(f"torch.fx cannot write its forward down: {error}") from error
    return code.src, namespace["forward"]


class _Proxy(fx.Proxy):
    """A proxy that answers ``isinstance`` with the type it stands for, and refuses where that is not known."""

    _is_param = False
    _is_buffer = False

    def __init__(self, node: fx.Node, tracer: Any, kind: type | None) -> None:
        super().__init__(node, tracer)
        self.kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.kind is None:
            raise Untraceable(f"its forward asks for the type of {self.node.name}, which a trace does not know")
        return self.kind


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


# torch.fx records `y += x` as `y = y + x`, which writes to another tensor.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
              "ilshift", "irshift"):  # fmt: skip
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces one host. ``example`` maps the names of its parameters to inputs without data; by default it has no
    example, and every parameter without a default value is taken for a tensor."""

    def __init__(self, host: nn.Module, example: dict[str, Any] | None) -> None:
        super().__init__(autowrap_modules=(math,))
        self.proxy_buffer_attributes = True
        self.host = host
        self.example = example
        self.guards: list[tuple[Callable[..., Any], bool]] = []
        # A converted host is traced again by its original forward.
        self.traced_func_name = "_pointfuse_forward" if hasattr(host, "_pointfuse_forward") else "forward"
        signature = inspect.signature(getattr(host, self.traced_func_name)).parameters
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in signature.values()):
            raise Untraceable("its forward takes *args, **kwargs or keyword-only arguments")
        names = [n for n, p in signature.items() if p.default is p.empty] if example is None else list(example)
        self.kinds = {n: Tensor if example is None else type(example[n]) for n in names}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # Arguments that the trace does not take keep their default values, whatever these are.
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.kinds]

        def call(host: nn.Module, *tensors: fx.Proxy) -> Any:
            return root_fn(host, **dict(zip(self.kinds, tensors, strict=True)))

        return call, [self.root, *proxies]

    def trace_or_refuse(self) -> fx.Graph:
        try:
            with _only_data_flow(self.host):
                return self.trace(self.host)
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
            for child in m.children():
                args, kwargs = (child(*args, **kwargs),), {}
            return args[0]
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "placeholder":
            return _Proxy(node, self, self.kinds.get(str(node.target)))
        if node.op == "call_module":
            # Modules of torch.nn give tensors, but for recurrent and attention layers; a user's may give anything.
            module = self.host.get_submodule(str(node.target))
            known = type(module).__module__.startswith("torch.nn.modules.")
            known = known and not isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)
            return _Proxy(node, self, Tensor if known else None)
        return _Proxy(node, self, None)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("its forward uses a tensor that is neither a parameter nor a buffer")
        if isinstance(a, dict) and type(a) is not dict:
            raise Untraceable(f"its forward makes a {type(a).__name__}, which a trace would turn into a dict")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_metadata(obj.node):
            raise Untraceable("its forward branches on a value computed from the input")
        if self.example is None:
            raise Untraceable("its forward branches on its input's shape or dtype: pass example_inputs")
        guard = self._guard(obj.node)
        decision = bool(guard(None, *self.example.values()))
        self.guards.append((guard, decision))
        return decision

    def _guard(self, node: fx.Node) -> Callable[..., Any]:
        """A function of the host and its inputs that gives a node's value."""
        graph = fx.Graph()
        copies = {name: graph.placeholder(name) for name in self.kinds}

        def copied(original: fx.Node) -> fx.Node:
            if original.name not in copies:
                copies[original.name] = graph.node_copy(original, copied)
            return copies[original.name]

        graph.output(copied(node))
        return _compile(graph, type(self.host).__name__)[1]


class _NoTensorWork(TorchDispatchMode):
    """While tracing, only proxies are computed with; a real tensor operation would be baked in as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes {func} from constants, which a trace would freeze")


@contextmanager
def _only_data_flow(host: nn.Module) -> Iterator[None]:
    """Refuse, while a forward is traced, whatever it does that its graph would not repeat; leave nothing of it behind.

    That is: tensor operations on real tensors, assignments to attributes, changes of plain containers that a module
    holds, draws from Python's random numbers, and switching gradients, inference mode or autocast.
    """
    modules = {id(m) for m in host.modules()}
    set_attribute = nn.Module.__setattr__

    def watched(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in modules:
            raise Untraceable(f"its forward assigns {'self' if module is host else 'a child'}.{name}")
        set_attribute(module, name, value)

    def switched(*args: Any, **kwargs: Any) -> None:
        raise Untraceable("its forward asks for or switches gradients, inference mode or autocast")

    containers = [
        v for m in host.modules() for k, v in vars(m).items() if k[:1] != "_" and type(v) in (list, dict, set)
    ]
    before, random_state = [copy.copy(c) for c in containers], random.getstate()
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", watched))
            stack.enter_context(_NoTensorWork())
            for owner, name in _MODES:
                stack.enter_context(mock.patch.object(owner, name, switched))
            yield
        if random.getstate() != random_state:
            raise Untraceable("its forward draws random numbers")
        if any(not _same(now, then) for now, then in zip(containers, before, strict=True)):
            raise Untraceable("its forward changes a list, dict or set that a module holds")
    finally:
        random.setstate(random_state)
        for container, then in zip(containers, before, strict=True):
            if not _same(container, then):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(then)


def _same(a: Any, b: Any) -> bool:
    """Whether two plain containers hold the same objects; proxies have no usable equality."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(operator.is_, a, b))
    return {id(e) for e in a} == {id(e) for e in b}


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


class _Fuser:
    """Puts ``run_unit`` in the place of each unit's calls in one host's graph."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], convs: Sequence[str]) -> None:
        self.graph = graph
        self.modules = modules
        self.convs = convs

    def run(self) -> tuple[list[Site], dict[str, str], tuple[str, ...], tuple[str, ...]]:
        """Sites, refusals, uncalled convolutions and other uses, as :class:`Trace` has them."""
        sites: list[Site] = []
        refusals: dict[str, str] = {}
        called: set[str] = set()
        for node in list(self.graph.nodes):
            conv = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(conv, nn.Conv2d | FoldedConv2d):
                continue
            called.add(str(node.target))
            found = self._match(node)
            if isinstance(found, str):
                refusals[str(node.target)] = found
            else:
                self._replace(*found)
                if isinstance(conv, nn.Conv2d):
                    sites.append(found[0])
        self.graph.lint()
        uncalled = [n for n in self.convs if isinstance(self.modules[n], nn.Conv2d) and n not in called]
        return sites, refusals, tuple(uncalled), self._other_uses()

    def _other_uses(self) -> tuple[str, ...]:
        operands = {a for n in self.graph.nodes if n.target is run_unit for a in n.all_input_nodes}
        names = [str(n.target) for n in self.graph.nodes if n.op == "call_module"]
        for node in self.graph.nodes:
            if node.op == "get_attr" and node not in operands:
                # Of a tensor the owner, by whatever part of the path is a module.
                parts = str(node.target).split(".")
                names += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return tuple(n for n in dict.fromkeys(names) if n in self.modules)

    def _match(self, conv: fx.Node) -> tuple[Site, _Chain] | str:
        """The unit that starts at a convolution's node, or why there is none."""
        module = self.modules[str(conv.target)]
        frozen = isinstance(module, FoldedConv2d)
        if not frozen and (reason := conv_refusal(module)):
            return reason
        x = _sole_input(conv)
        if x is None:
            return "it is not called with one tensor"

        chain = _Chain(conv, x)
        following = _only_user(conv)
        if following is not None and self._module_at(following, FoldedBatchNorm2d if frozen else nn.BatchNorm2d):
            if not frozen and (reason := bn_refusal(self.modules[str(following.target)])):
                return f"batch norm {following.target} follows, but {reason}"
            chain.bn = chain.last = following
        self._take_activation(chain)
        if chain.last is not conv:
            self._take_residual(chain)
        if chain.last is conv:
            return self._why_not(conv)
        if not self._may_move(chain, chain.last):
            return "a call between it and its batch norm may change its input"
        return chain.site(), chain

    def _take_activation(self, chain: _Chain) -> None:
        following = _only_user(chain.last)
        described = None if following is None else self._activation_at(following)
        if following is not None and described is not None and self._may_move(chain, following):
            chain.last = chain.act = following
            chain.activation = described

    def _take_residual(self, chain: _Chain) -> None:
        addition = _only_user(chain.last)
        other = None if addition is None else _addend(addition, chain.last)
        if addition is None or other is None or not self._may_move(chain, addition):
            return
        chain.order = "add_act" if chain.act is None else "act_add"
        chain.residual, chain.residual_inplace = other, addition.target in _IN_PLACE_ADDITIONS
        chain.last = addition
        if chain.act is None:
            self._take_activation(chain)

    def _replace(self, site: Site, chain: _Chain) -> None:
        with self.graph.inserting_before(chain.last):
            act: Any = tuple(chain.activation) if site.act is None else self.graph.get_attr(site.act)
            fused = self.graph.call_function(
                run_unit,
                (
                    chain.x,
                    self.graph.get_attr(site.conv),
                    None if site.bn is None else self.graph.get_attr(site.bn),
                    act,
                    chain.residual,
                    chain.order or "add_act",
                    chain.residual_inplace,
                ),
            )
        nodes = _between(chain.conv, chain.last)
        chain.last.replace_all_uses_with(fused)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def _module_at(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        called = node.op == "call_module" and _sole_input(node) is not None
        return called and isinstance(self.modules[str(node.target)], kind)

    def _activation_at(self, node: fx.Node) -> Activation | None:
        """The activation that a node applies to its input, or ``None``."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return None if isinstance(module, nn.Identity) or _sole_input(node) is None else activation_of(module)
        name = _FUNCTIONAL_ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        if name is None:
            return None
        names = ("input", "negative_slope", "inplace") if name == "leaky_relu" else ("input", "inplace")
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        slope, inplace = arguments.get("negative_slope", 0.01), arguments.get("inplace", False)
        if not isinstance(slope, int | float) or not isinstance(inplace, bool):
            return None
        return Activation(name, float(slope), inplace or node.target in _IN_PLACE_ACTIVATIONS)

    def _why_not(self, conv: fx.Node) -> str:
        if len(conv.users) > 1:
            return "its result goes to more than one place"
        following = next(iter(conv.users), None)
        if following is None or following.op == "output":
            return "nothing follows that could be fused"
        if following.op == "call_module":
            return f"its result goes to {following.target} ({type(self.modules[str(following.target)]).__name__})"
        if following.target is F.batch_norm:
            return "functional batch_norm follows; only nn.BatchNorm2d is fused"
        return f"its result goes to {getattr(following.target, '__name__', following.target)}"

    def _may_move(self, chain: _Chain, last: fx.Node) -> bool:
        """Whether the unit gives the same at ``last``'s place: nothing between may write to its input.

        Nor may its own modules be called between: batch norm's statistics depend on the order of its calls.
        """
        memory, own = self._memory_of(chain.x), set(_between(chain.conv, last))
        parts = {id(self.modules[str(n.target)]) for n in (chain.conv, chain.bn) if n is not None}
        node = chain.conv.next
        while node is not last:
            if node not in own:
                called = [n for n in (node, *node.all_input_nodes) if n.op in ("call_module", "get_attr")]
                if any(id(self.modules.get(str(n.target))) in parts for n in called if n not in own):
                    return False
                reads = self._only_reads(node)
                if not reads and any(self._memory_of(argument) & memory for argument in node.all_input_nodes):
                    return False
            node = node.next
        return True

    def _only_reads(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in (getattr, run_unit, operator.add, torch.add, torch.cat)
        if node.op != "call_module":
            return node.op != "call_method"
        module = self.modules[str(node.target)]
        first = next(module.children(), module) if is_sequential(module) else module
        return isinstance(first, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d | nn.AvgPool2d | FoldedConv2d)

    def _memory_of(self, node: fx.Node) -> set[fx.Node]:
        """The nodes whose memory a node's value may share; a convolution's or a unit's is its own."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current in found:
                continue
            found.add(current)
            called = self.modules.get(str(current.target)) if current.op == "call_module" else None
            fresh = isinstance(called, nn.Conv2d | nn.BatchNorm2d | FoldedConv2d) or current.target is run_unit
            if not fresh:
                waiting.extend(current.all_input_nodes)
        return found


@dataclass
class _Chain:
    """A unit's nodes as they are found: from the convolution, by sole users, to ``last``."""

    conv: fx.Node
    x: fx.Node
    bn: fx.Node | None = None
    act: fx.Node | None = None
    activation: Activation = IDENTITY
    residual: fx.Node | None = None
    residual_inplace: bool = False
    order: str | None = None

    def __post_init__(self) -> None:
        self.last = self.conv

    def site(self) -> Site:
        act = self.act if self.act is not None and self.act.op == "call_module" else None
        return Site(
            str(self.conv.target),
            None if self.bn is None else str(self.bn.target),
            None if act is None else str(act.target),
            self.activation,
            self.order,
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
