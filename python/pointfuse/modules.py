"""The unit as a module, and ``run_unit``, by which every converted model runs."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from pointfuse import training as with_gradients
from pointfuse.backends import announce_refusal, aten, aten_training, select
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.problem import IDENTITY, Activation, BatchNorm, Geometry, check_activation, check_residual_order

_RECOMPUTE = "_pointfuse_recompute"
# Both have one number a channel of an image; the second's statistics may be those of several processes.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope, m.inplace),
    nn.ReLU: lambda m: Activation("relu", inplace=m.inplace),
    nn.ReLU6: lambda m: Activation("relu6", inplace=m.inplace),
    nn.SiLU: lambda m: Activation("silu", inplace=m.inplace),
    nn.Identity: lambda m: IDENTITY,
}


class UnitForm(NamedTuple):
    """How a model's forward puts a unit together, as far as its modules do not say.

    Attributes:
        residual_order: where the residual goes: ``"add_act"`` or ``"act_add"``.
        residual_inplace: the model adds the residual in place, whose result has the dtype and shape of the unit's.
        norm_acts: of a batch norm with a forward of its own, proven to be its class's batch norm and at most an
            activation: whether calling it applies ``act``. ``None`` for any other.
        scale: the model multiplies the convolution's result by it, before batch norm and residual.
    """

    residual_order: str = "add_act"
    residual_inplace: bool = False
    norm_acts: bool | None = None
    scale: float = 1.0


PLAIN = UnitForm()


class ConvBNAct2d(nn.Module):
    """Convolution, batch norm and activation as one unit; behaves as a ``Sequential`` of the three would.

    Children: ``conv`` (``nn.Conv2d``), ``bn`` (``nn.BatchNorm2d``) and ``act``; ``bn`` and ``act`` may be ``None``.
    Statistics, parameters and modes are read from the children on every call, so an optimiser step, ``load_state_dict``
    or ``.to()`` is never stale. Hooks on the children run.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for ``nn.Conv2d``, but
            without a bias by default.
        eps, momentum, affine, track_running_stats: as for ``nn.BatchNorm2d``.
        activation: ``"leaky_relu"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``leaky_relu``.
        residual_order: where a residual given to ``forward`` goes: ``"add_act"`` or ``"act_add"``.
        recompute: keep for the backward the input alone, not the convolution's output, which is then convolved again,
            bit for bit: half the memory, for a third more arithmetic.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        residual_order: str = "add_act",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_residual_order(residual_order)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.act: nn.Module | None = activation_module(activation, negative_slope)
        self.residual_order = residual_order
        self.recompute = recompute

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        act: nn.Module | None = None,
        residual_order: str = "add_act",
        recompute: bool = False,
    ) -> ConvBNAct2d:
        """A unit of existing modules, which become its children: parameters and buffers are shared, not copied.

        Raises ``TypeError`` for a module of another kind, ``ValueError`` where the channels do not fit.
        """
        check_residual_order(residual_order)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv is a {type(conv).__name__}; it must be an nn.Conv2d")
        if bn is not None and not isinstance(bn, BATCH_NORMS):
            raise TypeError(f"bn is a {type(bn).__name__}; it must be an nn.BatchNorm2d, an nn.SyncBatchNorm or None")
        if act is not None and type(act) not in _ACTIVATION_MODULES:
            accepted = ", ".join(f"nn.{kind.__name__}" for kind in _ACTIVATION_MODULES)
            raise TypeError(f"act is a {type(act).__name__}; it must be one of {accepted}, or None")
        if bn is not None and bn.num_features != conv.out_channels:
            raise ValueError(f"bn normalises {bn.num_features} channels, but conv puts out {conv.out_channels}")
        unit = cls.__new__(cls)
        nn.Module.__init__(unit)
        unit.conv, unit.bn, unit.act = conv, bn, act
        unit.residual_order, unit.recompute = residual_order, recompute
        unit.training = conv.training
        return unit

    def to_modules(self) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.Module | None]:
        """The children: ``(conv, bn, act)``, shared, not copied."""
        return self.conv, self.bn, self.act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The unit's output ``[batch, c_out, h_out, w_out]`` for ``x`` of ``[batch, c_in, height, width]``."""
        if in_graph():
            leave_to_compiler(self, self.recompute)
        # By attribute each would cost 0.7 us, more than the checks of a call together.
        children = self._modules
        conv = children["conv"]
        assert conv is not None
        form = PLAIN if residual is None else (self.residual_order, False, None, 1.0)
        return run_unit(x, conv, children.get("bn"), children.get("act"), residual, form, self.recompute)

    def _pointfuse_tail(
        self, x: Tensor, residual: Tensor, act: Any, residual_order: str, inplace: bool
    ) -> Tensor | None:
        """``forward`` with a residual and an activation behind it that the caller's forward adds, if it takes them."""
        children = self._modules
        conv, bn, own = children["conv"], children.get("bn"), children.get("act")
        assert conv is not None
        activation = activation_of(own)
        if activation is None or (activation != IDENTITY) != (residual_order == "act_add"):
            return None
        act = own if residual_order == "act_add" else act
        return run_unit(x, conv, bn, act, residual, (residual_order, inplace, None, 1.0), self.recompute)

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(self)

    def extra_repr(self) -> str:
        said = [] if self.residual_order == "add_act" else [f"residual_order={self.residual_order!r}"]
        return ", ".join([*said, *(["recompute=True"] if self.recompute else [])])


def run_unit(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Activation | tuple[Any, ...] | None,
    residual: Tensor | None = None,
    form: UnitForm | tuple[Any, ...] = PLAIN,
    recompute: bool = False,
) -> Tensor:
    """The unit made of live modules, fused where that is the same as calling them one by one; else it calls them.

    ``act`` is a module, or for a functional activation its description. ``recompute`` is as for :class:`ConvBNAct2d`;
    :func:`set_recompute` says it of a convolution for good.
    """
    order, inplace, norm_acts, scale = form
    if (
        isinstance(x, Tensor)
        and x.dim() == 4
        and (residual is None or isinstance(residual, Tensor))
        and not in_graph()
        and not torch_module._has_any_global_hook()
    ):
        activation, rest = activation_of(act), None
        if activation is None and norm_acts and residual is None:
            # Batch norm and an activation that is not fused are one module: it is called on the unit's result.
            activation, rest = IDENTITY, act
        y = None
        small = _count.small
        if activation is None:
            pass
        elif isinstance(conv, FoldedConv2d):
            whole = bn is None or (type(bn) is FoldedBatchNorm2d and not has_hooks(bn))
            if whole and conv.scale == scale and not has_hooks(conv):
                y = conv.run(x, activation, residual, order, inplace)
        elif isinstance(conv, nn.Conv2d) and scale == 1:
            recompute = recompute or _RECOMPUTE in conv.__dict__
            y = _run_live(x, conv, bn, activation, residual, order, inplace, recompute, norm_acts is not None)
        if y is not None:
            _count.fused += 1
            return rest(y) if isinstance(rest, nn.Module) else y
        _count.refused += _count.small == small
    if residual is None:
        return _compose(x, conv, bn, act, norm_acts, scale)
    # What does not serve the residual may serve the rest of the unit.
    acts_first = order == "act_add"
    z = run_unit(x, conv, bn, act if acts_first else None, None, ("add_act", False, norm_acts, scale), recompute)
    return add_and_act(z, residual, None if acts_first else act, inplace)


def add_and_act(
    z: Tensor, residual: Tensor, act: nn.Module | Activation | tuple[Any, ...] | None, inplace: bool
) -> Tensor:
    """``act(z + residual)`` by PyTorch's operators; the sum in ``z``'s memory where the model has it there."""
    return _activate(z.add_(residual) if inplace else z + residual, act)


class _Count(threading.local):
    """Of the units that :func:`run_unit` was asked for in this thread."""

    fused = small = refused = 0


_count = _Count()


def units_not_small() -> int:
    """How many units this thread has run fused, or refused for a reason other than their size."""
    return _count.fused + _count.refused


def note_refusal() -> None:
    """Count a unit that did not run fused for another reason than its size."""
    _count.refused += 1


def set_recompute(module: nn.Module) -> None:
    """Have every unit of a convolution keep its input alone for the backward; of a host, remember that it was asked."""
    module.__dict__[_RECOMPUTE] = True


def forget_recompute(module: nn.Module) -> None:
    """Undo :func:`set_recompute`."""
    module.__dict__.pop(_RECOMPUTE, None)


def in_graph() -> bool:
    """Whether what runs becomes a graph: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def leave_to_compiler(module: nn.Module, recompute: bool = False) -> None:
    """Say what was asked for that a graph of live modules, which holds PyTorch's own operators, does without.

    Raises ``RuntimeError`` where a backend was asked for with ``strict``.
    """
    announce_refusal(
        "a graph of a converted model holds PyTorch's own operators; torch.compile and torch.export put the kernels "
        "into graphs of pointfuse.freeze(..., pack=False)"
    )
    if module.training and torch.is_grad_enabled() and (recompute or _RECOMPUTE in module.__dict__):
        _announce_recompute()


def _announce_recompute() -> None:
    warn_once(
        "a compiler decides by itself what the backward keeps, and recompute=True does nothing in its graphs; "
        "torch._functorch.config.activation_memory_budget below 1 has it recompute"
    )


# A compiler runs this while it traces, where a warning breaks no graph.
_announce_recompute._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_scripting(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` asks of a module first. Raises ``RuntimeError``: it has no word for fused units."""
    raise RuntimeError(
        "torch.jit.script takes no model that pointfuse converted or froze, and no ConvBNAct2d: script what "
        "pointfuse.revert gives of it, before any freeze, or use torch.jit.trace"
    )


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Warn, the first time in the process that this is to be said, or when a thousand others were said since."""
    warnings.warn(f"pointfuse: {message}", UserWarning, stacklevel=3)


def min_input(conv: nn.Conv2d, bn: nn.Module | None) -> int:
    """From how many input elements :func:`run_unit` may be faster than the modules one by one, where ATen serves it."""
    if isinstance(bn, nn.SyncBatchNorm) or _RECOMPUTE in conv.__dict__:
        return 0
    evaluating = aten.min_input(conv, bn)
    return evaluating if bn is None else min(evaluating, aten_training.min_input(conv))


def _run_live(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module | None,
    activation: Activation,
    residual: Tensor | None,
    residual_order: str,
    residual_inplace: bool,
    recompute: bool,
    proven: bool,
) -> Tensor | None:
    """The unit fused, or ``None`` where its modules are to be called."""
    size, training = x.numel(), bn is not None and bn.training
    may_record = training or torch.is_grad_enabled()
    # The cheap test first: there are units that take no longer than the rest of this function.
    if may_record and bn is None:
        return None
    if may_record and select() is aten and not recompute and (x.is_cuda or size < min_input(conv, bn)):
        _count.small += 1
        return None
    if not may_record and size < select().min_input(conv, bn):
        _count.small += 1
        return None
    if conv_refusal(conv) is not None:
        return None
    if bn is not None and (has_hooks(bn) if proven else bn_refusal(bn) is not None):
        return None
    weight, bias = _parameters(conv)
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    operands = None if bn is None else _operands(bn)
    unit = (x, weight, bias, operands, activation, geometry, residual, residual_order)
    if operands is None:
        return None if may_record else select().conv_bn_act(*unit, residual_inplace)
    if not training and not with_gradients.records(x, weight, bias, operands.weight, operands.bias, residual):
        return None if operands.running_mean is None else select().conv_bn_act(*unit, residual_inplace)
    group = process_group(bn)
    # PyTorch's own refuses the CPU where processes have joined, be it one.
    needed = recompute or (training and isinstance(bn, nn.SyncBatchNorm) and _joined())
    if not with_gradients.serves(x, weight, bias, operands, geometry, residual, recompute=needed, group=group):
        announce_refusal("gradients are recorded of a call that is no plain unit's")
        return None
    assert isinstance(bn, _BatchNorm)
    if training:
        operands = operands._replace(momentum=_count_batch(bn))
    return with_gradients.conv_bn_act(
        x, weight, bias, operands, activation, geometry, residual, residual_order, recompute=recompute, group=group
    )


def process_group(bn: nn.Module | None) -> Any:
    """The processes over which a batch norm takes its statistics now, or ``None`` for this process alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not _joined():
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _count_batch(bn: _BatchNorm) -> float:
    """Count a batch, as ``nn.BatchNorm2d`` does, and give the weight of its statistics in the running ones."""
    if bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            return 1.0 / float(bn.num_batches_tracked)
    return bn.momentum or 0.0


def _operands(bn: nn.Module) -> BatchNorm:
    """The operands of a batch norm in the mode that it is in; ``momentum`` is not yet known."""
    if not bn.training:
        return running_statistics(bn)
    mean, var = (bn.running_mean, bn.running_var) if bn.track_running_stats else (None, None)
    return BatchNorm(mean, var, *_parameters(bn), True, 0.0, bn.eps)  # type: ignore[arg-type]


def activation_of(act: nn.Module | Activation | tuple[Any, ...] | None) -> Activation | None:
    """The description of an activation, or ``None`` for a module that is no known activation or has hooks."""
    if act is None:
        return IDENTITY
    if isinstance(act, tuple):
        return Activation(*act)
    describe = _ACTIVATION_MODULES.get(type(act))
    return None if describe is None or has_hooks(act) else describe(act)


def activation_module(name: str, negative_slope: float) -> nn.Module:
    """A new activation module by name."""
    check_activation(name)
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope)
    return {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "identity": nn.Identity}[name]()


def conv_refusal(conv: nn.Module) -> str | None:
    """Why a module cannot be a unit's convolution, or ``None`` where it can."""
    if type(conv) is not nn.Conv2d:
        if not isinstance(conv, nn.Conv2d):
            return f"it is a {type(conv).__name__}, not an nn.Conv2d"
        if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
            return f"{type(conv).__name__} has a forward of its own"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}"
    return "it has hooks or a forward of its own" if has_hooks(conv) else None


def bn_refusal(bn: nn.Module) -> str | None:
    """Why a module cannot be a unit's batch norm, or ``None`` where it can."""
    base = nn.SyncBatchNorm if isinstance(bn, nn.SyncBatchNorm) else nn.BatchNorm2d
    if type(bn) is not base:
        if not isinstance(bn, base):
            return f"it is a {type(bn).__name__}, not an nn.BatchNorm2d"
        if type(bn)._check_input_dim is not base._check_input_dim or type(bn).forward is not base.forward:
            return f"{type(bn).__name__} has a forward of its own"
    return "it has hooks or a forward of its own" if has_hooks(bn) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more or other than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def running_statistics(bn: nn.Module) -> BatchNorm:
    """The operands of a batch norm in evaluation mode, as they are now."""
    assert isinstance(bn, _BatchNorm)
    try:
        mean, var = bn._buffers["running_mean"], bn._buffers["running_var"]
    except KeyError:
        mean, var = bn.running_mean, bn.running_var
    return BatchNorm(mean, var, *_parameters(bn), False, 0.0, bn.eps)


def _parameters(module: nn.Module) -> tuple[Any, Any]:
    """Weight and bias; those that are no parameters of their own, as a parametrisation's, by attribute."""
    try:
        return module._parameters["weight"], module._parameters["bias"]
    except KeyError:
        return module.weight, module.bias


def _compose(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Activation | tuple[Any, ...] | None,
    norm_acts: bool | None,
    scale: float,
) -> Tensor:
    """The same modules called one by one, as the model before conversion did."""
    z = conv(x)
    if scale != 1:
        z = z * scale
    if bn is not None:
        z = bn(z)
    return z if norm_acts else _activate(z, act)


def _activate(z: Tensor, act: nn.Module | Activation | tuple[Any, ...] | None) -> Tensor:
    if isinstance(act, nn.Module):
        return act(z)
    if act is None:
        return z
    activation = Activation(*act)
    return aten.activate(z, activation, inplace=activation.inplace)
