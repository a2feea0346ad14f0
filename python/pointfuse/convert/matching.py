"""Finds the units of a model from its data flow, one host at a time.

A *host* is a module whose own forward calls convolutions. In an ``nn.Sequential`` the order of the children is the data
flow. Any other host is traced by itself, so one that cannot be traced costs nothing but its own units.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pointfuse.convert.normalisation import NormAct, activation_at, norm_act, sole_input
from pointfuse.convert.sequences import inner_activation, norm_refusal, passes_on
from pointfuse.convert.structure import Site, is_sequential
from pointfuse.convert.tails import call_and_add
from pointfuse.convert.tracing import Reads, compile_graph, trace_in_mode
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.modules import BATCH_NORMS, activation_of, bn_refusal, conv_refusal, has_hooks, run_unit
from pointfuse.problem import IDENTITY, Activation

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
_MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


@dataclass(frozen=True)
class Trace:
    """A host's forward with its units fused, for one training mode.

    ``parameters`` are the arguments it takes with their types. The trace holds while every guard, a function of the
    arguments, gives its decision, and while it is :meth:`current`. ``refusals`` gives the reason for each call of a
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
    proofs: tuple[NormAct, ...]
    elided: tuple[nn.Module, ...]
    tail: Tail | None
    sums: tuple[Sum, ...]

    def current(self) -> bool:
        """Whether what was read of the host and its children still holds."""
        proven = self.reads.unchanged() and all(map(NormAct.unchanged, self.proofs))
        return proven and not any(map(has_hooks, self.elided))


@dataclass(frozen=True)
class Tail:
    """The unit whose result a host puts out, and the forward that takes what the host's caller adds to it.

    ``forward`` takes, behind the host's own arguments, a residual, the activation behind the sum, and the residual's
    order and whether it is added in place.
    """

    site: Site
    forward: Callable[..., Any]


@dataclass(frozen=True)
class Sum:
    """A residual that a host leaves to a child's last unit to add; names are relative to the host."""

    child: str
    residual_order: str
    act: str | None
    activation: Activation


def trace_host(
    host: nn.Module,
    convs: Sequence[str],
    training: bool,
    example: dict[str, Any] | None = None,
    tail_of: Callable[[nn.Module, bool], Site | None] = lambda module, training: None,
) -> Trace:
    """A host's forward in one training mode, with its units fused. Raises :class:`Untraceable` with the reason.

    ``convs`` names the convolutions that are the host's to account for; ``tail_of`` gives the unit whose result a child
    puts out in a training mode.
    """
    graph, tracer, reads = trace_in_mode(host, training, example)
    fuser = _Fuser(graph, dict(host.named_modules(remove_duplicate=False)), convs)
    fuser.run(lambda child: tail_of(child, training))
    forward = compile_graph(graph, type(host).__name__)
    tail = fuser.take_sum()
    return Trace(
        forward,
        tracer.kinds,
        tuple(tracer.guards),
        reads,
        tuple(fuser.sites),
        fuser.refusals,
        fuser.uncalled(),
        fuser.other_uses(),
        tuple(fuser.proofs.values()),
        tuple(fuser.elided),
        None if tail is None else Tail(tail, compile_graph(graph, type(host).__name__)),
        tuple(fuser.sums),
    )


class _Fuser:
    """Puts ``run_unit`` in the place of each unit's calls in one host's graph."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], convs: Sequence[str]) -> None:
        self.graph = graph
        self.modules = modules
        self.convs = convs
        self.sites: list[Site] = []
        self.refusals: dict[str, str] = {}
        self.called: set[str] = set()
        self.tried: dict[str, NormAct | None] = {}
        self.proofs: dict[str, NormAct] = {}
        self.elided: list[nn.Module] = []
        self.units: dict[fx.Node, _Chain] = {}
        self.sums: list[Sum] = []

    def run(self, tail_of: Callable[[nn.Module], Site | None]) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.nodes):
            conv = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(conv, nn.Conv2d | FoldedConv2d):
                continue
            self.called.add(str(node.target))
            found = self._match(node)
            if isinstance(found, str):
                self.refusals[str(node.target)] = found
            else:
                self._replace(found)
                if isinstance(conv, nn.Conv2d):
                    self.sites.append(found.site())
        for node in list(self.graph.nodes):
            if node.op == "call_module" and (site := tail_of(self.modules[str(node.target)])) is not None:
                self._give_sum(node, site)
        self.graph.lint()

    def take_sum(self) -> Site | None:
        """Have the unit whose result is put out take a sum from four more arguments; ``None`` where there is none."""
        *_, output = self.graph.nodes
        unit = output.args[0]
        passed = []
        while isinstance(unit, fx.Node) and len(unit.users) == 1 and self._passes_on(unit):
            passed.append(self.modules[str(unit.target)])
            unit = unit.args[0]
        chain = self.units.get(unit) if isinstance(unit, fx.Node) and len(unit.users) == 1 else None
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        if chain is None or chain.residual is not None or not chain.fused_act or not placeholders:
            return None
        assert isinstance(unit, fx.Node)
        self.elided += passed
        last = placeholders[-1]
        more = []
        for name in ("pointfuse_residual", "pointfuse_act", "pointfuse_order", "pointfuse_inplace"):
            with self.graph.inserting_after(last):
                last = self.graph.placeholder(name)
            more.append(last)
        residual, act, order, inplace = more
        x, conv, bn, own_act = unit.args[:4]
        form = (order, inplace, chain.norm_acts, chain.scale)
        unit.args = (x, conv, bn, act if chain.act is None else own_act, residual, form)
        self.graph.lint()
        return chain.site()

    def _give_sum(self, call: fx.Node, site: Site) -> None:
        """Leave to a child what is added to its result, where nothing is computed in between."""
        addition, x = self._next(call), sole_input(call)
        if addition is None or x is None or has_hooks(self.modules[str(call.target)]):
            return
        residual = _addend(addition, _before(addition, call))
        if residual is None or not _adjacent(call, addition):
            return
        last, act, activation = addition, None, IDENTITY
        following = None if site.acts else self._next(addition)
        if following is not None and _adjacent(addition, following):
            described = activation_at(following, self.modules)
            if described is not None:
                last, activation = following, described
                act = str(following.target) if following.op == "call_module" else None
        order, inplace = "act_add" if site.acts else "add_act", addition.target in _IN_PLACE_ADDITIONS
        with self.graph.inserting_before(last):
            operand: Any = None if activation == IDENTITY else tuple(activation)
            operand = operand if act is None else self.graph.get_attr(act)
            child = self.graph.get_attr(str(call.target))
            summed = self.graph.call_function(call_and_add, (child, x, residual, operand, order, inplace))
        self._put(summed, _between(call, last))
        self.sums.append(Sum(str(call.target), order, act, activation))

    def uncalled(self) -> tuple[str, ...]:
        """The host's convolutions that its forward does not call."""
        return tuple(n for n in self.convs if isinstance(self.modules[n], nn.Conv2d) and n not in self.called)

    def other_uses(self) -> tuple[str, ...]:
        """The modules that the forward uses outside units."""
        operands = {a for n in self.graph.nodes if n.target is run_unit for a in n.all_input_nodes}
        names = [str(n.target) for n in self.graph.nodes if n.op == "call_module"]
        for node in self.graph.nodes:
            if node.op == "get_attr" and node not in operands:
                # Of a tensor the owner, by whatever part of the path is a module.
                parts = str(node.target).split(".")
                names += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return tuple(n for n in dict.fromkeys(names) if n in self.modules)

    def _match(self, conv: fx.Node) -> _Chain | str:
        """The unit that starts at a convolution's node, or why there is none."""
        module = self.modules[str(conv.target)]
        if not isinstance(module, FoldedConv2d) and (reason := conv_refusal(module)):
            return reason
        x = sole_input(conv)
        if x is None:
            return "it is not called with one tensor"
        chain = _Chain(conv, x)
        if reason := self._take_normalisation(chain, module):
            return reason
        if chain.bn is None:
            self._take_scale(chain)
        self._take_activation(chain)
        self._take_residual(chain)
        if chain.bn is None and chain.act is None and chain.residual is None:
            return self._why_not(conv)
        if not self._may_move(chain, chain.last):
            return "a call between it and its batch norm may change its input"
        return chain

    def _take_normalisation(self, chain: _Chain, conv: nn.Module) -> str | None:
        """Take the batch norm that follows a convolution, if one does; the reason where it cannot be taken."""
        frozen = isinstance(conv, FoldedConv2d)
        following = self._next(chain.last)
        if following is None or not self._module_at(following, FoldedBatchNorm2d if frozen else BATCH_NORMS):
            return None
        name, bn = str(following.target), self.modules[str(following.target)]
        proof = None
        if not frozen and bn_refusal(bn):
            proof = self._proof(name)
            if proof is None:
                return f"batch norm {name} follows, but {norm_refusal(bn)}"
            self.proofs[name] = proof
        chain.bn = chain.last = following
        inner, chain.norm_acts = inner_activation(bn, proof)
        if chain.norm_acts:
            known = activation_of(inner)
            chain.act, chain.activation, chain.fused_act = following, known or IDENTITY, known is not None
            path = bn.act_path if isinstance(bn, FoldedBatchNorm2d) else proof and proof.act
            chain.act_path = f"{name}.{path}" if path else None
        return None

    def _take_scale(self, chain: _Chain) -> None:
        """Take a multiplication by a number that follows."""
        product = self._next(chain.last)
        if product is None or product.target not in _MULTIPLICATIONS or len(product.args) != 2 or product.kwargs:
            return
        if product.op not in ("call_function", "call_method") or not self._may_move(chain, product):
            return
        numbers = [a for a in product.args if type(a) in (int, float)]
        if len(numbers) == 1 and math.isfinite(scale := float(numbers[0])) and scale != 0:  # type: ignore[arg-type]
            chain.scale, chain.last = scale, product

    def _take_activation(self, chain: _Chain) -> None:
        following = self._next(chain.last)
        if following is None or chain.act is not None or not self._may_move(chain, following):
            return
        described = activation_at(following, self.modules)
        if described is not None:
            chain.last = chain.act = following
            chain.activation = described
            chain.act_path = str(following.target) if following.op == "call_module" else None

    def _take_residual(self, chain: _Chain) -> None:
        addition = self._next(chain.last)
        other = None if addition is None else _addend(addition, _before(addition, chain.last))
        if addition is None or other is None or not chain.fused_act or not self._may_move(chain, addition):
            return
        chain.order = "add_act" if chain.act is None else "act_add"
        chain.residual, chain.residual_inplace = other, addition.target in _IN_PLACE_ADDITIONS
        chain.last = addition
        self._take_activation(chain)

    def _replace(self, chain: _Chain) -> None:
        nodes = _between(chain.conv, chain.last)
        with self.graph.inserting_before(chain.last):
            act: Any = tuple(chain.activation) if chain.act_path is None else self.graph.get_attr(chain.act_path)
            fused = self.graph.call_function(
                run_unit,
                (
                    chain.x,
                    self.graph.get_attr(str(chain.conv.target)),
                    None if chain.bn is None else self.graph.get_attr(str(chain.bn.target)),
                    act,
                    chain.residual,
                    (chain.order or "add_act", chain.residual_inplace, chain.norm_acts, chain.scale),
                ),
            )
        self.units[fused] = chain
        self._put(fused, nodes)

    def _put(self, fused: fx.Node, nodes: list[fx.Node]) -> None:
        """Have a node stand for a chain of nodes."""
        self.elided += [self.modules[str(node.target)] for node in nodes if self._passes_on(node)]
        nodes[-1].replace_all_uses_with(fused)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def _module_at(self, node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
        called = node.op == "call_module" and sole_input(node) is not None
        return called and isinstance(self.modules[str(node.target)], kind)

    def _proof(self, name: str) -> NormAct | None:
        if name not in self.tried:
            self.tried[name] = norm_act(self.modules[name])
        return self.tried[name]

    def _normalises(self, name: str) -> bool:
        """Whether a module reads its input and gives a tensor of its own, as batch norm does."""
        module = self.modules.get(name)
        return isinstance(module, BATCH_NORMS) and (bn_refusal(module) is None or self._proof(name) is not None)

    def _passes_on(self, node: fx.Node) -> bool:
        return node.op == "call_module" and sole_input(node) is not None and passes_on(self.modules[str(node.target)])

    def _next(self, node: fx.Node) -> fx.Node | None:
        """The only user of a node, behind the modules that pass it on."""
        following = _only_user(node)
        while following is not None and self._passes_on(following):
            following = _only_user(following)
        return following

    def _why_not(self, conv: fx.Node) -> str:
        if len(conv.users) > 1:
            return "its result goes to more than one place"
        following = self._next(conv)
        if following is None:
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
        name, module = str(node.target), self.modules[str(node.target)]
        if is_sequential(module) and module._modules:
            first = next(iter(module._modules))
            name, module = f"{name}.{first}", module._modules[first] or module
        return isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | FoldedConv2d) or self._normalises(name)

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
            fresh = isinstance(called, nn.Conv2d | FoldedConv2d) or current.target is run_unit
            if not (fresh or (called is not None and self._normalises(str(current.target)))):
                waiting.extend(current.all_input_nodes)
        return found


@dataclass
class _Chain:
    """A unit's nodes as they are found: from the convolution, by sole users, to ``last``."""

    conv: fx.Node
    x: fx.Node
    bn: fx.Node | None = None
    norm_acts: bool | None = None
    scale: float = 1.0
    act: fx.Node | None = None
    act_path: str | None = None
    activation: Activation = IDENTITY
    fused_act: bool = True
    residual: fx.Node | None = None
    residual_inplace: bool = False
    order: str | None = None

    def __post_init__(self) -> None:
        self.last = self.conv

    def site(self) -> Site:
        bn = None if self.bn is None else str(self.bn.target)
        act = self.act_path if self.fused_act else None
        return Site(str(self.conv.target), bn, act, self.activation, self.order, self.scale)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The chain of sole users that leads from one node to another, both included."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    return chain


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return None if user is None or user.op == "output" else user


def _adjacent(first: fx.Node, last: fx.Node) -> bool:
    """Whether nothing is computed between two nodes of a chain but what the chain holds."""
    own, node = set(_between(first, last)), first
    while node is not last:
        if node not in own and node.op not in ("get_attr", "placeholder"):
            return False
        node = node.next
    return True


def _before(node: fx.Node, first: fx.Node) -> fx.Node:
    """The input of a node by which it comes, by sole users, from ``first``."""
    return _between(first, node)[-2]


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
