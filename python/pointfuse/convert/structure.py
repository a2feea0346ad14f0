"""How a model's modules call each other: which forwards call convolutions, and what a sequence of modules computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends import aten, select
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import BATCH_NORMS, activation_of, bn_refusal, conv_refusal, min_input, run_unit
from pointfuse.problem import IDENTITY, Activation


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


def original_forward(module: nn.Module) -> Any:
    """The forward of the module's own class, also where conversion put another in its place; TorchScript's is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return getattr(type(module), "_pointfuse_forward", type(module).forward)


def is_sequential(module: nn.Module) -> bool:
    """Whether the order of the children is the module's whole forward."""
    return original_forward(module) is nn.Sequential.forward and "forward" not in module.__dict__


def set_mode(module: nn.Module, training: bool) -> None:
    """Set one module's mode and no child's, whatever its class does when a mode is set."""
    if isinstance(module, torch.jit.ScriptModule):
        module.training = training  # which its code reads elsewhere
    else:
        module.__dict__["training"] = training


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Every module whose forward may call convolutions: its name, itself, and its convolutions' relative names."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or has_no_forward(module):
            continue
        seen.add(id(module))
        convs = [relative for relative, child in own_children(module) if isinstance(child, nn.Conv2d | FoldedConv2d)]
        if convs:
            yield name, module, convs


def has_no_forward(module: nn.Module) -> bool:
    """Lists, dicts, and modules that only hold others."""
    return original_forward(module) is nn.Module.forward


def own_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children a module's own forward calls: direct ones, and those of children that have no forward themselves."""
    for name, child in module.named_children():
        yield prefix + name, child
        if has_no_forward(child):
            yield from own_children(child, f"{prefix}{name}.")


@dataclass(frozen=True)
class Run:
    """A unit in a sequence of modules: its modules in order, and the operands of ``run_unit``.

    ``min_input`` is the number of input elements from which ATen may gain by fusing; other backends are always asked.
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
    return Run(parts, conv, bn, act, min_input(conv, bn) if isinstance(conv, nn.Conv2d) else 0)


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
        elif isinstance(x, Tensor) and (x.numel() >= step.min_input or select() is not aten):
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
    if isinstance(following[0], BATCH_NORMS):
        return f"batch norm follows, but {bn_refusal(following[0])}"
    return f"{type(following[0]).__name__} follows, which is neither batch norm nor a known activation"
