"""The unit as modules: ``ConvBNAct2d``, its frozen form, and ``run_unit``, by which every converted model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from pointfuse.backends import aten, select
from pointfuse.problem import IDENTITY, Activation, BatchNorm, Geometry, check_activation, check_residual_order

_ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope, m.inplace),
    nn.ReLU: lambda m: Activation("relu", inplace=m.inplace),
    nn.ReLU6: lambda m: Activation("relu6", inplace=m.inplace),
    nn.SiLU: lambda m: Activation("silu", inplace=m.inplace),
    nn.Identity: lambda m: IDENTITY,
}


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

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        act: nn.Module | None = None,
        residual_order: str = "add_act",
    ) -> ConvBNAct2d:
        """A unit of existing modules, which become its children: parameters and buffers are shared, not copied.

        Raises ``TypeError`` for a module of another kind, ``ValueError`` where the channels do not fit.
        """
        check_residual_order(residual_order)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv is a {type(conv).__name__}; it must be an nn.Conv2d")
        if bn is not None and not isinstance(bn, nn.BatchNorm2d):
            raise TypeError(f"bn is a {type(bn).__name__}; it must be an nn.BatchNorm2d or None")
        if act is not None and type(act) not in _ACTIVATION_MODULES:
            accepted = ", ".join(f"nn.{kind.__name__}" for kind in _ACTIVATION_MODULES)
            raise TypeError(f"act is a {type(act).__name__}; it must be one of {accepted}, or None")
        if bn is not None and bn.num_features != conv.out_channels:
            raise ValueError(f"bn normalises {bn.num_features} channels, but conv puts out {conv.out_channels}")
        unit = cls.__new__(cls)
        nn.Module.__init__(unit)
        unit.conv, unit.bn, unit.act = conv, bn, act
        unit.residual_order = residual_order
        unit.training = conv.training
        return unit

    def to_modules(self) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.Module | None]:
        """The children: ``(conv, bn, act)``, shared, not copied."""
        return self.conv, self.bn, self.act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The unit's output ``[batch, c_out, h_out, w_out]`` for ``x`` of ``[batch, c_in, height, width]``."""
        return run_unit(x, self.conv, self.bn, self.act, residual, self.residual_order)

    def extra_repr(self) -> str:
        return "" if self.residual_order == "add_act" else f"residual_order={self.residual_order!r}"


class FrozenUnit(nn.Module):
    """A convolution with batch norm folded in and its activation fused, for inference alone; made by ``freeze``.

    It stands at the convolution's path. On the CPU the weight is packed for oneDNN at the first call, for that call's
    input shape, and the plain weight is dropped; ``state_dict``, ``deepcopy``, pickling and ``.to()`` see it plain.

    ``absorbed`` names the modules that are folded in. A unit that absorbed any is called by its host's forward, through
    :meth:`run`; called as a module it raises, since the caller expects the convolution alone.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        geometry: Geometry,
        absorbed: tuple[str, ...],
        packable: bool = True,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=memory_format))
        self.register_buffer("bias", bias)
        self.activation = activation
        self.geometry = geometry
        self.absorbed = absorbed
        self.packable = packable
        self.memory_format = memory_format
        self._packed: Tensor | None = None
        self._epilogue = aten.onednn_epilogue(activation)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        if self.absorbed:
            raise RuntimeError(
                f"this convolution was frozen together with {' and '.join(self.absorbed)}, and only the forward it was "
                "found in may call it; leave it out of freeze, or freeze without calling its parts one by one"
            )
        return self.run(x)

    def run(self, x: Tensor, residual: Tensor | None = None, residual_order: str = "add_act") -> Tensor:
        """The unit's output, in the frozen memory format. Raises ``RuntimeError`` where a gradient is asked for."""
        if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
            raise RuntimeError(
                "a frozen unit has no gradient: call it under torch.no_grad(), or use pointfuse.convert to train"
            )
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(x, residual, residual_order)
        packed = self._packed_for(x)
        if packed is None:
            if x.dim() == 4:
                x = x.contiguous(memory_format=self.memory_format)
            bias = self.bias if self.bias is None else self.bias.to(x.dtype)
            z = aten.conv(x, self.dense_weight(), bias, self.geometry)
            return aten.finish(z, self.activation, residual, residual_order, owned=True)
        if residual is None and self._epilogue is not None:
            return aten.onednn_conv(x, packed, self.bias, self._epilogue, self.geometry)
        fused = self._epilogue if residual_order == "act_add" else None
        z = aten.onednn_conv(x, packed, self.bias, fused or ("none", ()), self.geometry)
        return aten.finish(z, IDENTITY if fused else self.activation, residual, residual_order, owned=True)

    def dense_weight(self) -> Tensor:
        """The folded weight ``[c_out, c_in / groups, kh, kw]`` in plain strides."""
        return self.weight if self._packed is None else self._packed.to_dense()

    def train(self, mode: bool = True) -> FrozenUnit:
        if mode:
            raise RuntimeError(
                "a frozen model cannot be trained: its batch norms are folded into its weights; train the model that "
                "was given to freeze, or one made by pointfuse.convert"
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        c_out, c_in, *kernel = self.dense_weight().shape
        stride, padding, dilation, groups = self.geometry
        return (
            f"{c_in * groups}, {c_out}, kernel_size={tuple(kernel)}, stride={stride}, padding={padding}, "
            f"dilation={dilation}, groups={groups}, activation={self.activation.name!r}, "
            f"packed={self._packed is not None}"
        )

    def _packed_for(self, x: Tensor) -> Tensor | None:
        if not self.packable or not aten.onednn_accepts(x):
            return None
        if self._packed is None:
            weight, geometry = self.weight, self.geometry
            fits = x.dtype == weight.dtype and x.shape[1] == weight.shape[1] * geometry.groups
            if not fits or not geometry.well_formed or not aten.onednn_takes_dtype(x.dtype):
                return None
            packed = aten.pack(weight, geometry, x.shape)
            if packed is None:
                return None
            del self._buffers["weight"]
            self._packed = packed
        return self._packed if self._packed.dtype == x.dtype else None

    def _unpack(self) -> None:
        if self._packed is not None:
            self._buffers["weight"] = self.dense_weight().contiguous(memory_format=self.memory_format)
            self._packed = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenUnit:
        self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dense_weight()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"weight": self.dense_weight(), "bias": self.bias}
        state["_packed"] = None
        return state


class Folded(nn.Module):
    """Holds the place of a module that ``freeze`` folded into the convolution before it; it is never to be called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            f"this {self.kind} was folded into the convolution before it by freeze, and cannot be called by itself"
        )

    def extra_repr(self) -> str:
        return self.kind


def run_unit(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Activation | tuple[Any, ...] | None,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    residual_inplace: bool = False,
) -> Tensor:
    """The unit made of live modules, fused where that is the same as calling them one by one; else it calls them.

    ``act`` is a module, or for a functional activation its description. ``residual_inplace`` says that the model adds
    the residual in place, whose result has the dtype of the unit's.
    """
    if isinstance(conv, FrozenUnit):
        return conv.run(x, residual, residual_order)
    if (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.dim() == 4
        and not torch_module._has_any_global_hook()
        and conv_refusal(conv) is None
        and (bn is None or (bn_refusal(bn) is None and not bn.training and bn.running_mean is not None))
        and (residual is None or (not residual_inplace and isinstance(residual, Tensor)) or residual.dtype == x.dtype)
        and (activation := activation_of(act)) is not None
    ):
        geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        return select().conv_bn_act(
            x, conv.weight, conv.bias, None if bn is None else _live(bn), activation, geometry, residual, residual_order
        )
    return _compose(x, conv, bn, act, residual, residual_order, residual_inplace)


def activation_of(act: nn.Module | Activation | tuple[Any, ...] | None) -> Activation | None:
    """The description of an activation, or ``None`` for a module that is no known activation or has hooks."""
    if act is None:
        return IDENTITY
    if isinstance(act, tuple):
        return Activation(*act)
    describe = _ACTIVATION_MODULES.get(type(act))
    return None if describe is None or _own_forward(act) or has_hooks(act) else describe(act)


def activation_module(name: str, negative_slope: float) -> nn.Module:
    """A new activation module by name."""
    check_activation(name)
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope)
    return {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "identity": nn.Identity}[name]()


def conv_refusal(conv: nn.Module) -> str | None:
    """Why a module cannot be a unit's convolution, or ``None`` where it can."""
    if not isinstance(conv, nn.Conv2d):
        return f"it is a {type(conv).__name__}, not an nn.Conv2d"
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward or _own_forward(conv):
        return f"{kind.__name__} has a forward of its own"
    if has_hooks(conv):
        return "it has hooks"
    return None if conv.padding_mode == "zeros" else f"its padding_mode is {conv.padding_mode!r}"


def bn_refusal(bn: nn.Module) -> str | None:
    """Why a module cannot be a unit's batch norm, or ``None`` where it can."""
    if not isinstance(bn, nn.BatchNorm2d):
        return f"it is a {type(bn).__name__}, not an nn.BatchNorm2d"
    kind = type(bn)
    if (
        kind.forward is not _BatchNorm.forward
        or kind._check_input_dim is not nn.BatchNorm2d._check_input_dim
        or _own_forward(bn)
    ):
        return f"{kind.__name__} has a forward of its own"
    return "it has hooks" if has_hooks(bn) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _own_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__


def _live(bn: nn.Module) -> BatchNorm:
    assert isinstance(bn, nn.BatchNorm2d)
    return BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def _compose(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Activation | tuple[Any, ...] | None,
    residual: Tensor | None,
    residual_order: str,
    residual_inplace: bool,
) -> Tensor:
    """The same modules called one by one, as the model before conversion did."""

    def add(z: Tensor) -> Tensor:
        assert residual is not None
        return z.add_(residual) if residual_inplace else z + residual

    z = conv(x)
    if bn is not None:
        z = bn(z)
    if residual is not None and residual_order == "add_act":
        z = add(z)
    if isinstance(act, nn.Module):
        z = act(z)
    elif act is not None:
        activation = Activation(*act)
        z = aten.activate(z, activation, inplace=activation.inplace)
    if residual is not None and residual_order == "act_add":
        z = add(z)
    return z
