"""Finds the units of a model from its data flow, one host at a time.

A *host* is a module whose own forward calls convolutions. In an ``nn.Sequential`` the order of the children is the data
flow. Any other host is traced by itself, so one that cannot be traced costs nothing but its own units.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pointfuse.convert.structure import Site, is_sequential, set_mode
from pointfuse.convert.tracing import Reads, Tracer, Untraceable, compile_graph, names_read
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import BATCH_NORMS, activation_of, bn_refusal, conv_refusal, run_unit
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


@dataclass(frozen=True)
class Trace:
    """A host's forward with its units fused, for one training mode.

    ``parameters`` are the arguments it takes with their types. The trace holds while every guard, a function of the
    arguments, gives its decision, and while ``reads`` are unchanged. ``refusals`` gives the reason for each call of a
    convolution that is no unit; ``uncalled`` names the host's convolutions that its forward does not call, and
    ``other_uses`` the modules that it uses outside units.
    """

    forward: Callable[..., Any]
    parameters: dict[str, type]
    guards: tuple[tuple[Callable[..., Any], bool], ...]
    reads: Reads
    sites: tuple[Site, ...]
    refusals: dict[str, str]
    uncalled: tuple[str, ...]
    other_uses: tuple[str, ...]


def trace_host(host: nn.Module, convs: Sequence[str], training: bool, example: dict[str, Any] | None = None) -> Trace:
    """A host's forward in one training mode, with its units fused. Raises :class:`Untraceable` with the reason.

    ``convs`` names the convolutions that are the host's to account for.
    """
    if "forward" in host.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    if "type" in names_read(host):
        raise Untraceable("its forward calls type(), which a trace cannot answer")
    modes = [(m, m.training) for m in host.modules()]
    try:
        for m, _ in modes if host.training != training else ():
            set_mode(m, training)
        reads = Reads(host)
        tracer = Tracer(host, example)
        graph = tracer.graph_or_refuse()
    finally:
        for m, mode in modes:
            set_mode(m, mode)
    sites, refusals, uncalled, other_uses = _Fuser(graph, dict(host.named_modules(remove_duplicate=False)), convs).run()
    forward = compile_graph(graph, type(host).__name__)
    guards = tuple(tracer.guards)
    return Trace(forward, tracer.kinds, guards, reads, tuple(sites), refusals, uncalled, other_uses)


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
        if following is not None and self._module_at(following, FoldedBatchNorm2d if frozen else BATCH_NORMS):
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

    def _module_at(self, node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
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
        return isinstance(
            first, nn.Conv2d | nn.BatchNorm2d | nn.SyncBatchNorm | nn.MaxPool2d | nn.AvgPool2d | FoldedConv2d
        )

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
            fresh = (
                isinstance(called, nn.Conv2d | nn.BatchNorm2d | nn.SyncBatchNorm | FoldedConv2d)
                or current.target is run_unit
            )
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
