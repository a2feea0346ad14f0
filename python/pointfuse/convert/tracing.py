"""Traces one module's forward with ``torch.fx``, every child a leaf; refuses what a trace would leave out in silence.

That is: assignments to attributes, tensors made in forward, draws of random numbers, and Python branches on values.
Branches on the shapes and dtypes of the module's own inputs are followed where an example is given, as guards.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
import random
import threading
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pointfuse.convert.structure import has_no_forward, is_sequential, original_forward, own_children, set_mode
from pointfuse.modules import has_hooks

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


_MATH = frozenset({"math", *dir(math)})
# While one traces, torch.fx replaces methods of nn.Module, and ``_only_data_flow`` functions of PyTorch; each puts back
# what it found, which must not be another trace's.
ONE_AT_A_TIME = threading.RLock()


class Untraceable(Exception):
    """Why a host's data flow could not be proven."""


class Reads:
    """What a forward may read of its module other than tensors: whether it is as it was when this was made.

    The children of the module and of those that only hold others; which parameters and buffers are absent; the
    objects that it holds, such as functions, and their plain attributes; and the
    values of plain attributes, of the module and its children, whose ``names`` occur in the code of the module's class.
    """

    def __init__(self, host: nn.Module, names: frozenset[str]) -> None:
        holders = [host, *(m for _, m in own_children(host) if has_no_forward(m))]
        self.children = [(m._modules, _ids(m._modules)) for m in holders]
        self.absent = [(d, _absent(d)) for d in (host._parameters, host._buffers)]
        self.values: list[tuple[dict[str, Any], tuple[str, ...], list[Any]]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        for module in (host, *(m for _, m in own_children(host))):
            watched: dict[str, Any] = {}
            for name in names - ({"training"} if module is host else set()):
                # An attribute that is not there may come, and be found by hasattr.
                value = module.__dict__.get(name, _MISSING)
                if value is None or value is _MISSING or isinstance(value, bool | int | float | str | tuple):
                    if module is host or value is not _MISSING:
                        watched[name] = value
                elif type(value) in (list, dict, set):
                    watched[name] = value
                    self.containers.append((value, copy.copy(value)))
                elif name not in ("_parameters", "_buffers", "_modules"):
                    self.objects.append((module.__dict__, name, value))
                    self._watch_object(value, names)
            if watched:
                self.values.append((module.__dict__, _shared(tuple(watched)), list(watched.values())))

    def _watch_object(self, value: Any, names: frozenset[str]) -> None:
        """Watch the plain attributes of an object, such as a configuration, that a module holds."""
        held = getattr(value, "__dict__", None)
        if type(held) is dict and not isinstance(value, type | Tensor | types.ModuleType):
            plain = {
                n: v for n, v in held.items() if n in names and isinstance(v, bool | int | float | str | tuple | None)
            }
            if plain:
                self.values.append((held, tuple(plain), list(plain.values())))

    def unchanged(self) -> bool:
        """Whether a trace made together with this still stands for the forward."""
        return (
            all(_ids(d) == ids for d, ids in self.children)
            and all(_absent(d) == absent for d, absent in self.absent)
            and all([d.get(n, _MISSING) for n in names] == then for d, names, then in self.values)
            and all(_same(now, then) for now, then in self.containers)
            and all(d.get(name) is then for d, name, then in self.objects)
        )

    def signature(self) -> Hashable:
        """What two modules of a class have in common if one trace stands for both; no two are equal with containers."""
        if self.containers:
            return object()
        values = [tuple(zip(names, map(type, then), then, strict=True)) for _, names, then in self.values]
        objects = tuple((name, value) for _, name, value in self.objects)
        return tuple(values), tuple(absent for _, absent in self.absent), objects


_MISSING = object()


@functools.lru_cache(maxsize=1024)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names as one object for all modules."""
    return names


def _ids(modules: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, modules.values()))


def _absent(tensors: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if tensor is None)


def names_read(host: nn.Module) -> frozenset[str]:
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
            if isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] != "torch":
                waiting.append(value)
    return frozenset(names)


def _function_named(name: str, host: nn.Module, globals_: dict[str, Any]) -> Any:
    """What a name in a module's code may call: a method, a property, an attribute or a global."""
    found = vars(host).get(name) or inspect.getattr_static(type(host), name, None) or globals_.get(name)
    return getattr(found, "fget", None) or getattr(found, "__func__", found)


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """A graph as a function, whose first argument is the module."""
    code = graph.python_code("self")
    try:
        return _compiled(code.src, f"<pointfuse trace of {name}>", tuple(code.globals.items()))
    except TypeError:  # a global without a hash
        return _compiled.__wrapped__(code.src, f"<pointfuse trace of {name}>", tuple(code.globals.items()))
    except SyntaxError as error:
        raise Untraceable(f"torch.fx cannot write its forward down: {error}") from error


@functools.lru_cache(maxsize=256)
def _compiled(source: str, name: str, globals_: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The function that a source defines, of which the modules of a class mostly share one."""
    namespace = dict(globals_)
    exec(compile(source, name, "exec"), namespace)
    return namespace["forward"]


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


class Tracer(fx.Tracer):
    """Traces one host. ``example`` maps the names of its parameters to inputs without data; by default it has no
    example, and every parameter without a default value is taken for a tensor."""

    def __init__(self, host: nn.Module, example: dict[str, Any] | None, names: frozenset[str]) -> None:
        # Wrapping the functions of math takes longer than the rest of most traces.
        super().__init__(autowrap_modules=(math,) if names & _MATH else ())  # type: ignore[arg-type]
        self.proxy_buffer_attributes = True
        self.thread = threading.get_ident()
        self.host = host
        self.example = example
        self.guards: list[tuple[Callable[..., Any], bool]] = []
        # A converted host is traced again by its original forward.
        self.traced_func_name = "_pointfuse_forward" if hasattr(host, "_pointfuse_forward") else "forward"
        signature = inspect.signature(getattr(host, self.traced_func_name)).parameters
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in signature.values()):
            raise Untraceable("its forward takes *args, **kwargs or keyword-only arguments")
        needed = [n for n, p in signature.items() if p.default is p.empty] if example is None else list(example)
        self.kinds = {n: Tensor if example is None else type(example[n]) for n in needed}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # Arguments that the trace does not take keep their default values, whatever these are.
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.kinds]

        def call(host: nn.Module, *tensors: fx.Proxy) -> Any:
            return root_fn(host, **dict(zip(self.kinds, tensors, strict=True)))

        return call, [self.root, *proxies]

    def graph_or_refuse(self) -> fx.Graph:
        try:
            with ONE_AT_A_TIME, _only_data_flow(self.host):
                return self.trace(self.host)
        except Untraceable:
            raise
        except Exception as error:  # whatever a model's own Python raises at a proxy
            first_line = (str(error).splitlines() or [""])[0]
            raise Untraceable(f"torch.fx cannot trace its forward: {type(error).__name__}: {first_line}") from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    # torch.fx patches nn.Module for the whole process while it traces; other threads' modules are not its business.

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        # A slice of a Sequential is a new Sequential that the model does not hold; its children are the model's.
        if is_sequential(m) and not has_hooks(m) and m not in self.submodule_paths:  # type: ignore[operator]
            for child in m._modules.values():  # children() would leave out the second of two that are one module
                args, kwargs = (child(*args, **kwargs),), {}  # type: ignore[misc]
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
        return compile_graph(graph, type(self.host).__name__)


def trace_in_mode(host: nn.Module, training: bool, example: dict[str, Any] | None) -> tuple[fx.Graph, Tracer, Reads]:
    """A host's graph in one training mode, with its tracer and what it read. Raises :class:`Untraceable`."""
    if "forward" in host.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    names = names_read(host)
    if "type" in names:
        raise Untraceable("its forward calls type(), which a trace cannot answer")
    with in_mode(host, training):
        reads = Reads(host, names)
        tracer = Tracer(host, example, names)
        return tracer.graph_or_refuse(), tracer, reads


@contextmanager
def in_mode(host: nn.Module, training: bool) -> Iterator[None]:
    """Inside, a host is in one training mode, and so are the modules in it if it was in the other."""
    modes = [(m, m.training) for m in host.modules()]
    try:
        for m, _ in modes if host.training != training else ():
            set_mode(m, training)
        yield
    finally:
        for m, mode in modes:
            set_mode(m, mode)


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
        if id(module) in modules and threading.get_ident() == tracing_thread:
            raise Untraceable(f"its forward assigns {'self' if module is host else 'a child'}.{name}")
        set_attribute(module, name, value)

    tracing_thread = threading.get_ident()

    def refused(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != tracing_thread:
                return original(*args, **kwargs)
            raise Untraceable("its forward asks for or switches gradients, inference mode or autocast")

        return call

    containers = [
        v for m in host.modules() for k, v in vars(m).items() if k[:1] != "_" and type(v) in (list, dict, set)
    ]
    before, random_state = [copy.copy(c) for c in containers], random.getstate()
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", watched))
            stack.enter_context(_NoTensorWork())
            for owner, name in _MODES:
                stack.enter_context(mock.patch.object(owner, name, refused(getattr(owner, name))))
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
