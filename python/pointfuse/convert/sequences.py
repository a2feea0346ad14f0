"""What a sequence of modules computes, with its units fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pointfuse.backends import aten, select
from pointfuse.convert.normalisation import NormAct, norm_act
from pointfuse.convert.structure import Site
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import (
    BATCH_NORMS,
    PLAIN,
    ConvBNAct2d,
    UnitForm,
    activation_of,
    bn_refusal,
    conv_refusal,
    has_hooks,
    min_input,
    run_unit,
)
from pointfuse.problem import IDENTITY, Activation


@dataclass(frozen=True)
class Run:
    """A unit in a sequence of modules: those that it replaces in order, and the operands of ``run_unit``.

    ``min_input`` is the number of input elements from which ATen may gain by fusing; other backends are always asked.
    """

    modules: tuple[nn.Module, ...]
    conv: nn.Module
    bn: nn.Module | None
    act: nn.Module | Activation | None
    form: UnitForm
    min_input: int
    proof: NormAct | None
    elided: tuple[nn.Module, ...]

    def current(self) -> bool:
        """Whether what was read of the modules still holds."""
        return (self.proof is None or self.proof.unchanged()) and not any(map(has_hooks, self.elided))


def run_at(modules: Sequence[nn.Module], start: int) -> Run | None:
    """The unit that starts at one place of a sequence of modules, or ``None``."""
    conv = modules[start]
    if not isinstance(conv, nn.Conv2d | FoldedConv2d) or (isinstance(conv, nn.Conv2d) and conv_refusal(conv)):
        return None
    following = _following(modules, start)
    frozen = isinstance(conv, FoldedConv2d)
    if frozen and conv.has_bn and not (following and isinstance(modules[following[0]], FoldedBatchNorm2d)):
        raise RuntimeError("this slice ends inside a frozen unit, whose convolution is folded with its batch norm")
    bn: nn.Module | None = None
    act: nn.Module | Activation | None = None
    proof, form, last = None, PLAIN, start
    if following:
        first = modules[following[0]]
        if frozen:
            bn = first if isinstance(first, FoldedBatchNorm2d) else None
        elif isinstance(first, BATCH_NORMS):
            proof = norm_act(first) if bn_refusal(first) is not None else None
            bn = first if proof is not None or bn_refusal(first) is None else None
        if bn is not None:
            last, *following = following
            act, norm_acts = inner_activation(bn, proof)
            form = PLAIN._replace(norm_acts=norm_acts)
    if act is None and following and activation_of(candidate := modules[following[0]]) is not None:
        act, last = candidate, following[0]
    if last == start:
        return None
    parts = tuple(modules[start : last + 1])
    elided = tuple(m for m in parts if m not in (conv, bn, act))
    smallest = min_input(conv, bn) if isinstance(conv, nn.Conv2d) else 0
    return Run(parts, conv, bn, act, form, smallest, proof, elided)


def _following(modules: Sequence[nn.Module], start: int) -> list[int]:
    """The places of the two modules behind a convolution that do something."""
    places = (i for i in range(start + 1, len(modules)) if not passes_on(modules[i]))
    return [i for _, i in zip(range(2), places, strict=False)]


def passes_on(module: nn.Module) -> bool:
    """Whether a module gives its input, and nothing notices that it is not called."""
    return type(module) is nn.Identity and not has_hooks(module)


def inner_activation(bn: nn.Module, proof: NormAct | None) -> tuple[nn.Module | Activation | None, bool | None]:
    """The activation that calling a batch norm applies, and :class:`UnitForm`'s ``norm_acts``."""
    if isinstance(bn, FoldedBatchNorm2d):
        return bn.inner(), None if bn.inner() is None else True
    if proof is None:
        return None, None
    if proof.act is not None:
        return bn.get_submodule(proof.act), True
    return (proof.activation, True) if proof.acts else (None, False)


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
            x = run_unit(x, step.conv, step.bn, step.act, None, step.form)
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
            refusals[names[i]] = conv_refusal(step) or _what_follows(modules, i)
        if isinstance(step, Run) and isinstance(step.conv, nn.Conv2d):
            sites.append(_site(step, dict(zip(names[i:], step.modules, strict=False))))
        i += len(step.modules) if isinstance(step, Run) else 1
    return sites, refusals


def last_of_sequence(host: nn.Module) -> tuple[Site | None, str | None]:
    """The unit at the end of a sequence, if it is one that takes a sum, or the name of the last module."""
    children = {name: child for name, child in host._modules.items() if child is not None}
    grouped = runs_of(list(children.values()))
    if not grouped or not isinstance(last := grouped[-1], Run):
        return None, next(reversed(children), None)
    parts = dict(list(children.items())[-len(last.modules) :])
    return (None if activation_of(last.act) is None else _site(last, parts)), None


def unit_site(unit: ConvBNAct2d) -> Site | None:
    """A unit's own site, or ``None`` where its modules cannot be one."""
    bn, activation = unit.bn, activation_of(unit.act)
    frozen = isinstance(unit.conv, FoldedConv2d)
    if activation is None or (not frozen and (conv_refusal(unit.conv) or (bn is not None and bn_refusal(bn)))):
        return None
    return Site("conv", None if bn is None else "bn", None if activation == IDENTITY else "act", activation, None)


def _site(run: Run, parts: dict[str, nn.Module]) -> Site:
    paths = {id(module): name for name, module in parts.items()}
    bn = None if run.bn is None else paths[id(run.bn)]
    act = paths.get(id(run.act))
    if run.proof is not None and run.proof.act is not None:
        act = f"{bn}.{run.proof.act}"
    conv = next(iter(parts))
    return Site(conv, bn, act, activation_of(run.act) or IDENTITY, None, run.form.scale)


def _what_follows(modules: Sequence[nn.Module], start: int) -> str:
    following = _following(modules, start)
    if not following:
        return "nothing follows that could be fused"
    first = modules[following[0]]
    if isinstance(first, BATCH_NORMS):
        return f"batch norm follows, but {norm_refusal(first)}"
    return f"{type(first).__name__} follows, which is neither batch norm nor a known activation"


def norm_refusal(bn: nn.Module) -> str:
    """Why a batch norm is no unit's."""
    if has_hooks(bn):
        return "it has hooks or a forward of its own"
    return f"{type(bn).__name__} has a forward of its own that does more than normalise and activate"
