"""What conversion would do to a model, as data: the units found, and what is left alone with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pointfuse.backends import backend_for
from pointfuse.convert.hosts import install, tail_of, trace_both
from pointfuse.convert.matching import Sum, Trace
from pointfuse.convert.sequences import match_sequential, unit_site
from pointfuse.convert.structure import (
    Site,
    has_no_forward,
    hosts,
    is_sequential,
    original_forward,
    own_children,
    set_mode,
)
from pointfuse.folded import FoldedConv2d
from pointfuse.modules import ConvBNAct2d, bn_refusal, conv_refusal
from pointfuse.problem import IDENTITY

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any] | None


@dataclass(frozen=True)
class Unit:
    """One unit. Names are module paths in the model, the convolution's also the unit's; a function has none.

    ``scale`` is a number by which the model multiplies the convolution's result, which only ``freeze`` folds in.
    Shapes are ``[batch, channels, height, width]``, known where example inputs were given.
    """

    conv: str
    bn: str | None
    act: str | None
    activation: str
    residual: str | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    dtype: str
    backend: str
    scale: float = 1.0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Skipped:
    """A convolution that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The units of a model and what is skipped; prints as a table."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return {"units": [asdict(u) for u in self.units], "skipped": [asdict(s) for s in self.skipped]}

    def __str__(self) -> str:
        rows = [("unit", "convolution", "normalisation", "activation", "residual", "input", "backend")]
        for u in self.units:
            kernel = "x".join(map(str, u.kernel_size))
            stride = "" if set(u.stride) == {1} else f" /{u.stride[0]}"
            shape = "" if u.input_shape is None else "x".join(map(str, u.input_shape))
            rows.append(
                (u.conv, f"{kernel} {u.in_channels}->{u.out_channels}{stride}", u.bn or "-",
                 u.activation if u.act is None else f"{u.activation} ({u.act})", u.residual or "-", shape, u.backend)
            )  # fmt: skip
        lines = _align(rows) if self.units else []
        if self.skipped:
            lines += ["", *_align([("skipped", "reason"), *((s.name, s.reason) for s in self.skipped)])]
        lines += ["", f"{len(self.units)} units, {len(self.skipped)} convolutions skipped"]
        return "\n".join(lines).strip()


@dataclass(frozen=True)
class HostPlan:
    """One host with its sites and what converting it needs.

    ``refusals`` are calls seen to be no unit; ``unproven`` are convolutions whose calls, if any, were not seen.
    """

    name: str
    module: nn.Module
    sites: tuple[Site, ...]
    refusals: dict[str, str]
    unproven: dict[str, str]
    traces: dict[bool, Trace | None] | None
    example: dict[str, Any] | None = None

    @property
    def sums(self) -> tuple[Sum, ...]:
        """What the host leaves to its children to add, by its forward in evaluation mode."""
        trace = self.traces and self.traces[False]
        return trace.sums if trace else ()


def analyse(model: nn.Module, example_inputs: ExampleInputs = None) -> list[HostPlan]:
    """The hosts of a model. Changes nothing that outlives the call."""
    check_kind(example_inputs)
    if isinstance(model, nn.Conv2d):
        return [HostPlan("", model, (), {"": "it is the whole model, and nothing follows it"}, {}, None)]
    owners = {id(module): convs for _, module, convs in hosts(model)}
    named = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    modules = {id(m): (name, m) for name, m in named if not has_no_forward(m)}
    traced = [m for _, m in modules.values() if next(m.children(), None) and not is_sequential(m)]
    examples = {} if example_inputs is None or not owners else _host_inputs(model, traced, example_inputs)
    found: dict[int, HostPlan] = {}

    def traces_of(module: nn.Module) -> dict[bool, Trace | None] | None:
        host = found.get(id(module))
        return None if host is None else host.traces

    # Those inside first: what a host adds to a child's result may be the child's to add.
    for key, (name, module) in reversed(modules.items()):
        if key in owners:
            found[key] = _analyse_host(name, module, owners[key], examples.get(key), traces_of)
        elif any(tail_of(child, False, traces_of) for _, child in own_children(module)) and not is_sequential(module):
            traces, _ = trace_both(module, (), examples.get(key), traces_of)
            if any(trace is not None and trace.sums for trace in traces.values()):
                found[key] = HostPlan(name, module, (), {}, {}, traces, examples.get(key))
    others = {name: reason for name, m in model.named_modules() if (reason := _other_kind(m))}
    in_order = [found[key] for key in modules if key in found]
    return [*in_order, HostPlan("", model, (), others, {}, None)] if others else in_order


def install_hosts(found: list[HostPlan]) -> None:
    """Make every analysed host run fused, in place."""
    for host in found:
        if (host.sites or host.sums) and not isinstance(host.module, ConvBNAct2d):
            install(host.module, host.traces, host.example)
        for added in host.sums:
            # On the way to the unit that takes a sum there may be sequences without a convolution of their own.
            child = host.module.get_submodule(added.child)
            while is_sequential(child):
                install(child)
                child = [m for m in child._modules.values() if m is not None][-1]


def summarise(model: nn.Module, found: list[HostPlan], example_inputs: ExampleInputs = None) -> Plan:
    """The plan of analysed hosts; with example inputs, the model is run once to see shapes."""
    shapes = {} if example_inputs is None else _conv_shapes(model, example_inputs)
    # A convolution that two forwards call alike is one unit; one that is a unit elsewhere is not unproven.
    units = list(dict.fromkeys(_unit(host, site, shapes) for host in found for site in host.sites))
    units = _with_sums(units, found)
    reasons = {_join(host.name, name): reason for host in found for name, reason in host.unproven.items()}
    for unit in units:
        reasons.pop(unit.conv, None)
    reasons |= {_join(host.name, name): reason for host in found for name, reason in host.refusals.items()}
    skipped = [Skipped(name, reason) for name, reason in reasons.items()]
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    units.sort(key=lambda u: order[u.conv])
    skipped.sort(key=lambda s: order[s.name])
    return Plan(tuple(units), tuple(skipped))


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model with example inputs: one tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    return model(example_inputs) if isinstance(example_inputs, Tensor) else model(*(example_inputs or ()))


def check_kind(example_inputs: Any) -> None:
    """Raise ``TypeError`` unless example inputs are something that a model can be called with."""
    if isinstance(example_inputs, torch.Size):
        raise TypeError("example_inputs is a shape (torch.Size); pass a tensor of it, such as torch.zeros(shape)")
    if not isinstance(example_inputs, Tensor | tuple | list | dict | None):
        raise TypeError(
            f"example_inputs is a {type(example_inputs).__name__}; it must be a tensor, a tuple or list of the model's "
            "arguments, or a dict of keyword arguments"
        )


def run_quietly(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model in evaluation mode without gradients, and give every module its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in modes:
            set_mode(m, False)
        with torch.no_grad(), fork_rng(model):
            return call(model, example_inputs)
    except Exception as error:
        error.add_note(
            f"raised while running the model on example_inputs, which are {_described(example_inputs)}; the model's "
            f"tensors are {_kinds(model)}: pass what the model itself can be called with"
        )
        raise
    finally:
        for m, mode in modes:
            set_mode(m, mode)


def _described(example_inputs: ExampleInputs) -> str:
    """Example inputs by shape, dtype and device, or by type, for an error message."""

    def one(value: Any) -> str:
        if not isinstance(value, Tensor):
            return f"a {type(value).__name__}"
        return f"{'x'.join(map(str, value.shape)) or 'a scalar'} {_dtype(value)} on {value.device}"

    if isinstance(example_inputs, dict):
        return "{" + ", ".join(f"{name}: {one(value)}" for name, value in example_inputs.items()) + "}"
    if isinstance(example_inputs, Tensor) or example_inputs is None:
        return one(example_inputs)
    return "(" + ", ".join(map(one, example_inputs)) + ")"


def _kinds(model: nn.Module) -> str:
    """The dtypes and devices of a model's floating-point tensors, for an error message."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return ", ".join(dict.fromkeys(f"{_dtype(t)} on {t.device}" for t in tensors)) or "none"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _other_kind(module: nn.Module) -> str | None:
    """Why a convolution that is no ``nn.Conv2d`` any more is left alone, or ``None`` for any other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript: convert the Python module that it was made from" if _is_conv(module) else None
    path = f"{type(module).__module__}.{type(module).__name__}"
    quantized = path.startswith("torch.ao.nn.") and ".quantized." in path and not isinstance(module, nn.Conv2d)
    return f"it is quantized ({path}), not an nn.Conv2d" if quantized and _is_conv(module) else None


def _is_conv(module: nn.Module) -> bool:
    name = getattr(module, "original_name", type(module).__name__)
    return name in ("Conv2d", "ConvReLU2d", "ConvAdd2d", "ConvAddReLU2d")


def fork_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, random numbers may be drawn on the model's devices; afterwards the generators are as before."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    return torch.random.fork_rng(devices=list(devices))


def _analyse_host(
    name: str,
    module: nn.Module,
    convs: list[str],
    example: dict[str, Any] | None,
    traces_of: Callable[[nn.Module], dict[bool, Trace | None] | None],
) -> HostPlan:
    if isinstance(module, ConvBNAct2d):
        return _analyse_unit(name, module)
    if is_sequential(module):
        sites, refusals = match_sequential(module)
        return HostPlan(name, module, tuple(sites), refusals, {}, None)
    traces, failure = trace_both(module, convs, example, traces_of)
    trace = traces[False]
    if trace is None:
        return HostPlan(name, module, (), {}, {c: str(failure) for c in convs}, traces, example)
    uncalled = dict.fromkeys(trace.uncalled, "the forward of the module that holds it does not call it")
    return HostPlan(name, module, trace.sites, trace.refusals, uncalled, traces, example)


def _with_sums(units: list[Unit], found: list[HostPlan]) -> list[Unit]:
    """The units with what the modules that hold their hosts add to them."""
    traces = {id(host.module): host.traces for host in found}
    sums: dict[str, tuple[str, Sum]] = {}
    for host in found:
        for added in host.sums:
            site = tail_of(host.module.get_submodule(added.child), False, lambda m: traces.get(id(m)))
            if site is not None:
                sums[_join(host.name, added.child, site.conv)] = host.name, added
    result = []
    for unit in units:
        if unit.conv in sums:
            name, added = sums[unit.conv]
            unit = replace(unit, residual=added.residual_order)
            if added.activation != IDENTITY:
                act = None if added.act is None else _join(name, added.act)
                unit = replace(unit, act=act, activation=added.activation.name)
        result.append(unit)
    return result


def _analyse_unit(name: str, unit: ConvBNAct2d) -> HostPlan:
    if isinstance(unit.conv, FoldedConv2d):
        return HostPlan(name, unit, (), {}, {}, None)
    site = unit_site(unit)
    if site is None:
        refusal = conv_refusal(unit.conv) or (bn_refusal(unit.bn) if unit.bn is not None else None)
        return HostPlan(name, unit, (), {"conv": refusal or "its activation has hooks"}, {}, None)
    return HostPlan(name, unit, (site,), {}, {}, None)


def _host_inputs(
    model: nn.Module, modules: list[nn.Module], example_inputs: ExampleInputs
) -> dict[int, dict[str, Any]]:
    """By module, the arguments of its first call that a trace has to take, without their data."""
    seen: dict[int, dict[str, Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(original_forward(module))
        given = list(signature.bind(module, *args, **kwargs).arguments.items())[1:]
        # Constants that equal the default are the default's business.
        taken = {n: v for n, v in given if v is not signature.parameters[n].default}
        seen.setdefault(id(module), pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), taken))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        run_quietly(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _conv_shapes(model: nn.Module, example_inputs: ExampleInputs) -> dict[int, tuple[torch.Size, torch.Size]]:
    shapes: dict[int, tuple[torch.Size, torch.Size]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        shapes.setdefault(id(module), (args[0].shape, output.shape))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        run_quietly(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _unit(host: HostPlan, site: Site, shapes: dict[int, tuple[torch.Size, torch.Size]]) -> Unit:
    conv = host.module.get_submodule(site.conv)
    assert isinstance(conv, nn.Conv2d)
    seen = shapes.get(id(conv))
    return Unit(
        conv=_join(host.name, site.conv),
        bn=None if site.bn is None else _join(host.name, site.bn),
        act=None if site.act is None else _join(host.name, site.act),
        activation=site.activation.name,
        residual=site.residual_order,
        scale=site.scale,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        dtype=str(next(conv.parameters()).dtype).removeprefix("torch."),
        backend=backend_for(conv),
        input_shape=None if seen is None else tuple(seen[0]),
        output_shape=None if seen is None else tuple(seen[1]),
    )


def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
