"""Folds and packs a model's convolutions for deployment."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends.aten import fold
from pointfuse.convert.hosts import refuse_training
from pointfuse.convert.normalisation import norm_act
from pointfuse.convert.planning import HostPlan, install_hosts
from pointfuse.convert.structure import Site, hosts
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import bn_refusal, conv_refusal, running_statistics
from pointfuse.problem import IDENTITY, BatchNorm


def freeze_hosts(model: nn.Module, found: list[HostPlan], pack: bool, channels_last: bool) -> None:
    """Freeze every unit of the analysed hosts, and every other plain convolution by itself, in place.

    Weights are folded one at a time, and each original is released before the next is folded.
    """
    partners = _partners(found)
    for host in found:
        for site in host.sites:
            _freeze_site(host.module, site, partners, pack, channels_last)
    install_hosts(found)
    for _, module, convs in list(hosts(model)):
        for name in convs:
            conv = module.get_submodule(name)
            if isinstance(conv, nn.Conv2d) and conv_refusal(conv) is None and id(conv) not in partners:
                _freeze_conv(module, name, None, pack, channels_last)
    frozen = {id(m) for m in model.modules() if isinstance(m, FoldedConv2d)}
    for module in list(model.modules()):
        if any(id(m) in frozen for m in module.modules()) and id(module) not in frozen:
            refuse_training(module)


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


def _partners(found: list[HostPlan]) -> dict[int, set[Any]]:
    """By convolution and by batch norm of a unit, what each is called together with; ``None`` for any other use.

    Only one whose every use is the same pair can be folded.
    """
    partners: dict[int, set[Any]] = defaultdict(set)
    for host in found:
        for site in host.sites:
            pair = _pair(host.module, site)
            for module in pair:
                if module is not None:
                    partners[id(module)].add((*map(id, pair), site.scale))
    for host in found:
        for module in _other_uses(host):
            if id(module) in partners:
                partners[id(module)].add(None)
    return dict(partners)


def _other_uses(host: HostPlan) -> Iterable[nn.Module]:
    """Modules that a host uses, or may use, other than in its units."""
    trace = host.traces and host.traces[False]
    names = set(host.refusals) | set(trace.other_uses if trace else host.unproven)
    return [host.module.get_submodule(name) for name in names]


def _pair(host: nn.Module, site: Site) -> tuple[nn.Module, nn.Module | None]:
    return host.get_submodule(site.conv), host.get_submodule(site.bn) if site.bn else None


def _freeze_site(host: nn.Module, site: Site, partners: dict[int, set[Any]], pack: bool, channels_last: bool) -> None:
    conv, bn = _pair(host, site)
    if any(len(partners[id(m)]) != 1 for m in (conv, bn) if m is not None and id(m) in partners):
        return
    if not isinstance(conv, nn.Conv2d) or (bn is not None and (bn.training or bn.running_mean is None)):
        return
    if _freeze_conv(host, site.conv, bn, pack, channels_last, site.scale) and bn is not None:
        assert site.bn is not None
        _set(host, site.bn, _folded(bn))


def _folded(bn: nn.Module) -> FoldedBatchNorm2d:
    proof = norm_act(bn) if bn_refusal(bn) else None
    if proof is None:
        return FoldedBatchNorm2d()
    return FoldedBatchNorm2d(bn, proof.act, proof.activation if proof.act is None else IDENTITY)


def _freeze_conv(
    host: nn.Module, name: str, bn: nn.Module | None, pack: bool, channels_last: bool, scale: float = 1.0
) -> bool:
    """Freeze one convolution in its place, unless the folded weight leaves the range of its dtype, as fp16 may."""
    conv = host.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if bn is not None or scale != 1:
            weight, bias = fold(weight, bias, _times(scale, conv) if bn is None else running_statistics(bn))
            if not weight.isfinite().all() and conv.weight.isfinite().all():
                return False
        else:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
    _set(host, name, FoldedConv2d(conv, weight, bias, bn is not None, pack, channels_last, scale))
    return True


def _times(scale: float, conv: nn.Conv2d) -> BatchNorm:
    """The batch norm that multiplies by a number."""
    zero, one = conv.weight.new_zeros(conv.out_channels), conv.weight.new_ones(conv.out_channels)
    return BatchNorm(zero, one, one.float() * scale, None, False, 0.0, 0.0)


def _set(host: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    host.get_submodule(parent)._modules[last] = module
