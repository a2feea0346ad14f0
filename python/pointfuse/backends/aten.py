"""The ATen backend: PyTorch's own operators, arranged to touch memory as seldom as they allow.

It serves the CPU, where oneDNN applies bias and activation while the convolution's output is still in cache, and it is
the last resort on every other device. Whatever it cannot improve it leaves to the plain composition of
``conv2d -> batch_norm -> activation``, so its answers and its errors are PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pointfuse.problem import IDENTITY, Activation, BatchNorm, Geometry, Pair

# PyTorch hands smaller inputs to its native convolution, whose call is 30 us cheaper than oneDNN's.
_ONEDNN_MIN_INPUT = 20480
# Folding scales every weight on every call, at a fixed cost of some 60 us besides. It pays where the output, over which
# it saves a pass, is large and much larger than the weight: 1x1 units at batch 8 became 3 to 13% faster. With as many
# weights as outputs, units became up to 70% slower, and with a quarter million outputs 6 to 11%.
_FOLD_MIN_OUTPUTS = 1 << 20
_FOLD_MIN_OUTPUTS_PER_WEIGHT = 4
# Below half a million multiply-adds a packed call's fixed 35 us exceed what packing saves in fp32.
_PACK_MIN_MACS = 1 << 19

_ACTIVATIONS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "identity": lambda z, inplace: z,
}


def unusable_reason() -> str | None:
    """Why the backend cannot run here. ATen is part of PyTorch and always can."""
    return None


def min_input(conv: nn.Conv2d, bn: nn.Module | None) -> int:
    """From how many input elements :func:`conv_bn_act` may be faster than the modules called one by one.

    Below there is nothing to gain but allocations, and 10 us of Python to lose, which is 2% of a 1x1 unit.
    """
    if bn is None:
        return _ONEDNN_MIN_INPUT + 1
    (kh, kw), (sh, sw), c_in = conv.kernel_size, conv.stride, conv.in_channels
    weights_per_output = _FOLD_MIN_OUTPUTS_PER_WEIGHT * (c_in // conv.groups) * kh * kw
    return c_in * sh * sw * max(_FOLD_MIN_OUTPUTS // conv.out_channels, weights_per_output)


def activate(z: Tensor, activation: Activation, *, inplace: bool = False) -> Tensor:
    """The activation of ``z``; in place only where the caller owns ``z`` and autograd does not need it."""
    if activation.name == "leaky_relu":
        return F.leaky_relu(z, activation.negative_slope, inplace)
    return _ACTIVATIONS[activation.name](z, inplace)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    activation: Activation,
    geometry: Geometry,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    residual_inplace: bool = False,
) -> Tensor:
    """The unit in PyTorch's operators; ``bn=None`` leaves batch norm out.

    Intermediate results are overwritten only where autograd does not record, since it may keep them.
    """
    owned = not torch.is_grad_enabled()
    act_first = residual is None or residual_order == "act_add"
    # The cheap test first: beside a small convolution in bf16, all of them together cost 30 us with cold caches.
    if (
        owned
        and (bn is None or _worth_folding(x, weight, geometry.stride))
        and _onednn_takes(x, weight, bias, geometry)
    ):
        z = _onednn_fused(x, weight, bias, bn, activation if act_first else IDENTITY, geometry)
        if z is not None:
            rest = IDENTITY if act_first else activation
            return finish(z, rest, residual, residual_order, residual_inplace, owned)
    z = conv(x, weight, bias, geometry)
    if bn is not None:
        z = F.batch_norm(
            z, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.batch_statistics, bn.momentum, bn.eps
        )
    return finish(z, activation, residual, residual_order, residual_inplace, owned)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution alone."""
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def finish(
    z: Tensor, activation: Activation, residual: Tensor | None, residual_order: str, residual_inplace: bool, owned: bool
) -> Tensor:
    """Activation and residual in the order asked for, in ``z``'s own memory where it is ``owned``."""

    def add(z: Tensor, residual: Tensor) -> Tensor:
        same = residual.shape == z.shape and residual.dtype == z.dtype and residual.device == z.device
        return z.add_(residual) if residual_inplace or (owned and same) else z + residual

    if residual is not None and residual_order == "add_act":
        z = add(z, residual)
    z = activate(z, activation, inplace=owned)
    if residual is not None and residual_order == "act_add":
        z = add(z, residual)
    return z


def fold(weight: Tensor, bias: Tensor | None, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals convolution and batch norm with running statistics.

    Computed in fp32 (fp64 for fp64 weights). The weight is rounded once, to its own dtype; the bias stays in the
    arithmetic's dtype, since rounding a shift that is large beside the output would lose the output's digits.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    shift = -bn.running_mean.to(wide) if bias is None else bias.to(wide) - bn.running_mean.to(wide)
    shift = shift * scale if bn.bias is None else torch.addcmul(bn.bias.to(wide), shift, scale)
    folded = (weight.to(wide) * scale.reshape(-1, *(1,) * (weight.dim() - 1))).to(weight.dtype)
    return folded, shift


def onednn_takes_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN, as this PyTorch was built and on this CPU, convolves in ``dtype`` at full speed."""
    if not torch._C._get_mkldnn_enabled() or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _bf16_supported())


@functools.cache
def _bf16_supported() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_accepts(x: Tensor) -> bool:
    """Whether an input may go to oneDNN's own operators, which autograd, autocast and tracers do not know."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def onednn_epilogue(activation: Activation) -> tuple[str, Sequence[float]] | None:
    """oneDNN's name and scalars for an activation, or ``None`` where its answer is not PyTorch's.

    oneDNN's ReLU, ReLU6 and zero-slope leaky ReLU turn NaN into 0; PyTorch's propagate it.
    """
    if activation.name == "identity":
        return "none", ()
    if activation.name == "silu":
        return "swish", ()
    if activation.name == "leaky_relu" and activation.negative_slope != 0:
        return "leaky_relu", (activation.negative_slope,)
    return None


def pack(weight: Tensor, geometry: Geometry, input_shape: Sequence[int]) -> Tensor | None:
    """The weight in the blocked layout oneDNN wants for one input shape, or ``None`` where packing does not pay.

    The packed weight answers other input shapes too; where they want another layout, oneDNN reorders on every call.
    """
    h_out, w_out = geometry.output_plane(tuple(input_shape), weight.shape)
    if input_shape[0] * h_out * w_out * weight.numel() < _PACK_MIN_MACS:
        return None
    stride, padding, dilation, groups = geometry
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(input_shape))


def onednn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: tuple[str, Sequence[float]], geometry: Geometry
) -> Tensor:
    """Convolution, bias and activation as one oneDNN primitive. ``bias`` may be fp32 whatever the dtype of ``x``.

    With a packed weight the output is channels_last, with a plain one its memory format follows PyTorch's rule.
    """
    stride, padding, dilation, groups = geometry
    name, scalars = epilogue
    return torch.ops.mkldnn._convolution_pointwise.default(
        x, weight, bias, padding, stride, dilation, groups, name, scalars, ""
    )


def _onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether PyTorch itself would give the call to oneDNN, with nothing about it that could be an error."""
    return (
        x.numel() > _ONEDNN_MIN_INPUT
        and onednn_accepts(x)
        and onednn_takes_dtype(x.dtype)
        and geometry.well_formed
        and weight.dim() == 4
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and min(geometry.output_plane(x.shape, weight.shape)) > 0
    )


def _onednn_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm | None, activation: Activation, geometry: Geometry
) -> Tensor | None:
    """Convolution, folded batch norm and activation as one oneDNN call, or ``None`` where that would gain nothing."""
    epilogue = onednn_epilogue(activation)
    if epilogue is None:
        return None
    if bn is not None:
        if not _foldable(bn, weight):
            return None
        weight, bias = fold(weight, bias, bn)
    elif activation.name == "identity":
        return None
    return onednn_conv(x, weight, bias, epilogue, geometry)


def _worth_folding(x: Tensor, weight: Tensor, stride: Pair) -> bool:
    outputs = x.numel() // max(1, x.shape[1] * stride[0] * stride[1]) * weight.shape[0] if x.dim() == 4 else 0
    return outputs >= _FOLD_MIN_OUTPUTS and outputs >= _FOLD_MIN_OUTPUTS_PER_WEIGHT * weight.numel()


def _foldable(bn: BatchNorm, weight: Tensor) -> bool:
    """Whether batch norm uses running statistics that it would accept; anything else is PyTorch's to answer."""
    if bn.batch_statistics or bn.running_mean is None or bn.running_var is None or not bn.eps > 0:
        return False
    operands = [t for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias) if t is not None]
    dtype = operands[0].dtype
    return dtype in (weight.dtype, torch.float32) and all(
        t.shape == weight.shape[:1] and t.dtype == dtype and t.device == weight.device for t in operands
    )
