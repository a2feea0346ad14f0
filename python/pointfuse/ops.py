"""The unit as a dispatcher operator, ``torch.ops.pointfuse.conv_bn_act``: schema, fake, autograd.

It is the inference form, batch norm with running statistics, for graphs that must keep the unit whole (torch.export,
C++): eager code calls :func:`pointfuse.conv_bn_act`, which spares the dispatcher's 7 us. Batch norm is left out where
``running_mean`` is absent.

The operators ``_*_cuda`` are private to the cuda backend, whose library implements them; their schemas and what tracing
sees of them stand here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointfuse import reference
from pointfuse.backends import calls, cuda, cuda_training, select
from pointfuse.problem import Activation, BatchNorm, Geometry, as_pair, check_activation, check_residual_order

_SCHEMA = (
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, float eps, str activation, float negative_slope, str residual_order) -> Tensor"
)

# The library object must live as long as the process: its destruction would take the registration back.
_library = torch.library.Library("pointfuse", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    residual_order: str,
) -> Tensor:
    check_activation(activation)
    check_residual_order(residual_order)
    bn = None
    if running_mean is not None:
        bn = BatchNorm(running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    geometry = Geometry(as_pair(stride, "stride"), as_pair(padding, "padding"), as_pair(dilation, "dilation"), groups)
    # Below autograd the grad mode is still the caller's; nothing recorded here is kept.
    with torch.no_grad():
        return select().conv_bn_act(
            x, weight, bias, bn, Activation(activation, negative_slope), geometry, residual, residual_order
        )


_library.impl("conv_bn_act", _conv_bn_act, "CompositeExplicitAutograd")


@torch.library.register_fake("pointfuse::conv_bn_act", lib=_library)
def _conv_bn_act_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    bias, residual, stride, padding, dilation, groups = args[0], *args[5:10]
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y if residual is None else y + residual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, (ctx.stride, ctx.padding, ctx.dilation, ctx.groups, *ctx.epilogue) = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The eval-mode formulae of ``reference.backward`` around ATen's convolution gradients.

    Recomputes the convolution instead of keeping it. Built from differentiable operators, so it differentiates again.
    """
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual = ctx.saved_tensors
    eps, activation, negative_slope, residual_order = ctx.epilogue
    wanted = ctx.needs_input_grad
    y = torch.nn.functional.conv2d(x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    z, x_hat, scale = y, None, None
    if running_mean is not None:
        rstd = torch.rsqrt(running_var.to(_wide(y)) + eps)
        x_hat = (y - _per_channel(running_mean)) * _per_channel(rstd)
        scale = rstd if bn_weight is None else rstd * bn_weight
        z = x_hat if bn_weight is None else x_hat * _per_channel(bn_weight)
        z = z if bn_bias is None else z + _per_channel(bn_bias)
    if residual is not None and residual_order == "add_act":
        z = z + residual
    dz = grad_out * reference.activation_derivative(z, activation, negative_slope)
    dy = dz if scale is None else dz * _per_channel(scale)

    d_residual = d_gamma = d_beta = None
    if residual is not None and wanted[7]:
        d_residual = (dz if residual_order == "add_act" else grad_out).sum_to_size(residual.shape).to(residual.dtype)
    if bn_weight is not None and x_hat is not None and wanted[5]:
        d_gamma = (dz * x_hat).sum(dim=(0, 2, 3)).to(bn_weight.dtype)
    if bn_bias is not None and wanted[6]:
        d_beta = dz.sum(dim=(0, 2, 3)).to(bn_bias.dtype)
    d_x, d_weight, d_bias = torch.ops.aten.convolution_backward(
        dy.to(x.dtype),
        x,
        weight,
        None if bias is None else list(bias.shape),
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0, 0],
        ctx.groups,
        [wanted[0], wanted[1], bias is not None and wanted[2]],
    )
    return (d_x, d_weight, d_bias, None, None, d_gamma, d_beta, d_residual, *(None,) * 8)


torch.library.register_autograd("pointfuse::conv_bn_act", _backward, setup_context=_setup_context, lib=_library)


_library.define(
    "_conv_bn_act_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, "
    "Tensor? residual, int config, float eps, float negative_slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("pointfuse::_conv_bn_act_cuda", lib=_library)
def _conv_bn_act_cuda_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return calls.empty_output(x, weight, config=args[6])


cuda.operator = torch.ops.pointfuse._conv_bn_act_cuda.default


# What these return in the place of a tensor that there is none of is empty. How many parts there are is the library's
# affair: unknown to tracing.
_library.define(
    "_conv_statistics_cuda(Tensor x, Tensor weight, Tensor? bias, int config) -> (Tensor y, Tensor parts)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "_forward_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int config, float negative_slope) "
    "-> (Tensor out, Tensor y, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "_normalise_cuda(Tensor y, Tensor? parts, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, "
    "Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int config, "
    "float negative_slope) -> (Tensor out, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "_sums_cuda(Tensor grad_out, Tensor y, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, Tensor? residual, "
    "int config, float negative_slope) -> Tensor parts",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "_gradients_cuda(Tensor grad_out, Tensor y, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, "
    "Tensor? residual, Tensor? parts, SymInt count, bool want_residual, int config, float negative_slope) "
    "-> (Tensor dy, Tensor d_residual, Tensor d_gamma, Tensor d_beta)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("pointfuse::_conv_statistics_cuda", lib=_library)
def _conv_statistics_cuda_fake(x: Tensor, weight: Tensor, bias: Tensor | None, config: int) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return calls.empty_output(x, weight, config), _floats(x, count, 3, weight.shape[0])


@torch.library.register_fake("pointfuse::_forward_cuda", lib=_library)
def _forward_cuda_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, y = (calls.empty_output(x, weight, config=args[8]) for _ in range(2))
    channels = weight.shape[0]
    return out, y, _floats(x, channels), _floats(x, channels)


@torch.library.register_fake("pointfuse::_normalise_cuda", lib=_library)
def _normalise_cuda_fake(y: Tensor, parts: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = 0 if parts is None else y.shape[1]
    return _empty_like(y), _floats(y, channels), _floats(y, channels)


@torch.library.register_fake("pointfuse::_sums_cuda", lib=_library)
def _sums_cuda_fake(grad_out: Tensor, y: Tensor, *args: Any) -> Tensor:
    return _floats(y, torch.library.get_ctx().new_dynamic_size(min=1), 2, y.shape[1])


@torch.library.register_fake("pointfuse::_gradients_cuda", lib=_library)
def _gradients_cuda_fake(grad_out: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts, want_residual = args[5], args[7]
    channels = 0 if parts is None else y.shape[1]
    d_residual = _empty_like(y) if want_residual else _floats(y, 0)
    return _empty_like(y), d_residual, _floats(y, channels), _floats(y, channels)


cuda_training.conv_operator = torch.ops.pointfuse._conv_statistics_cuda.default
cuda_training.forward_operator = torch.ops.pointfuse._forward_cuda.default
cuda_training.normalise_operator = torch.ops.pointfuse._normalise_cuda.default
cuda_training.sums_operator = torch.ops.pointfuse._sums_cuda.default
cuda_training.gradients_operator = torch.ops.pointfuse._gradients_cuda.default


def _empty_like(y: Tensor) -> Tensor:
    """Of y's very strides, which ``torch.empty_like`` does not keep where a dimension has one element."""
    return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)


def _floats(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _per_channel(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)
