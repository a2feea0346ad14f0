"""Folds and packs a model's convolutions for deployment."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends.aten import fold
from pointfuse.convert.hosts import install
from pointfuse.convert.matching import Site, hosts, is_sequential
from pointfuse.convert.planning import HostPlan
from pointfuse.modules import ConvBNAct2d, Folded, FrozenUnit, conv_refusal
from pointfuse.problem import IDENTITY, Activation, BatchNorm, Geometry


def freeze_hosts(model: nn.Module, found: list[HostPlan], pack: bool, memory_format: torch.memory_format) -> None:
    """Freeze every unit of the analysed hosts, and every other plain convolution by itself, in place.

    Weights are folded one at a time, and each original is released before the next is folded.
    """
    partners = _partners(found)
    for host in found:
        for site in host.sites:
            if _foldable(host.module, site, partners):
                _freeze_site(host.module, site, pack, memory_format)
        if host.sites and not isinstance(host.module, ConvBNAct2d):
            install(host.module, host.traces, host.example)
    for _, module, convs in list(hosts(model)):
        for name in convs:
            conv = module.get_submodule(name)
            if isinstance(conv, nn.Conv2d) and conv_refusal(conv) is None and id(conv) not in partners:
                _freeze_conv(module, name, None, IDENTITY, (), pack, memory_format)


def own_tensors(model: nn.Module, foreign: set[int]) -> None:
    """Replace every parameter and buffer whose id is in ``foreign`` by a copy; tied tensors stay tied."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in foreign:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = copy.deepcopy(tensor)
                    tensors[name] = copies[id(tensor)]  # type: ignore[assignment]


def _partners(found: list[HostPlan]) -> dict[int, set[tuple[Any, ...]]]:
    """By convolution and by batch norm of a unit, what each is called together with; ``()`` for calls by itself."""
    partners: dict[int, set[tuple[Any, ...]]] = defaultdict(set)
    for host in found:
        for site in host.sites:
            conv, bn = host.module.get_submodule(site.conv), site.bn and host.module.get_submodule(site.bn)
            unit = (id(conv), id(bn) if bn else None, site.activation.name, site.activation.negative_slope)
            partners[id(conv)].add(unit)
            if bn:
                partners[id(bn)].add(unit)
    for host in found:
        for name in (*host.refusals, *(host.unproven if host.traces and host.traces[False] is None else ())):
            if id(conv := host.module.get_submodule(name)) in partners:
                partners[id(conv)].add(())
    return dict(partners)


def _foldable(host: nn.Module, site: Site, partners: dict[int, set[tuple[Any, ...]]]) -> bool:
    """Whether batch norm has statistics to fold, and neither module is part of another unit too."""
    conv, bn = host.get_submodule(site.conv), host.get_submodule(site.bn) if site.bn else None
    if isinstance(conv, FrozenUnit):
        return False
    alone = all(len(partners[id(m)]) == 1 for m in (conv, bn) if m is not None)
    return alone and (not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is not None)


def _freeze_site(host: nn.Module, site: Site, pack: bool, memory_format: torch.memory_format) -> None:
    bn = host.get_submodule(site.bn) if site.bn else None
    absorbed = ["BatchNorm2d"] if bn is not None else []
    if site.activation.name != "identity":
        absorbed.append(site.activation.name)
    _freeze_conv(host, site.conv, bn, site.activation, tuple(absorbed), pack, memory_format)
    if site.bn:
        _set(host, site.bn, Folded("BatchNorm2d"))
    # A traced host may call one activation module at several places; a sequence calls each of its children once.
    if site.act and is_sequential(host):
        _set(host, site.act, Folded(site.activation.name))


def _freeze_conv(
    host: nn.Module,
    name: str,
    bn: nn.Module | None,
    activation: Activation,
    absorbed: tuple[str, ...],
    pack: bool,
    memory_format: torch.memory_format,
) -> None:
    conv = host.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if isinstance(bn, nn.BatchNorm2d):
            weight, bias = fold(
                weight, bias, BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
            )
        else:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    activation = activation._replace(inplace=False)
    _set(host, name, FrozenUnit(weight, bias, activation, geometry, absorbed, pack, memory_format))


def _set(host: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    host.get_submodule(parent)._modules[last] = module
