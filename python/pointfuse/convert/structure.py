"""How a model's modules hold each other, and which forwards call convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pointfuse.folded import FoldedConv2d
from pointfuse.problem import IDENTITY, Activation


@dataclass(frozen=True)
class Site:
    """One place in a host's forward where a unit is called. Names are relative to the host.

    ``act`` is the module's name, or ``None`` with the activation functional or absent. ``scale`` is the number by which
    the model multiplies the convolution's result.
    """

    conv: str
    bn: str | None
    act: str | None
    activation: Activation
    residual_order: str | None
    scale: float = 1.0

    @property
    def acts(self) -> bool:
        """Whether the unit has an activation."""
        return self.act is not None or self.activation != IDENTITY

    def inside(self, name: str) -> Site:
        """The same with the names as seen from a module that holds the host under a name."""
        conv, bn, act = (None if n is None else f"{name}.{n}" for n in (self.conv, self.bn, self.act))
        return replace(self, conv=conv, bn=bn, act=act)  # type: ignore[arg-type]


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
