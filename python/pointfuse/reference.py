"""The definition of a convolution unit, forward and backward, written out in plain PyTorch.

Slow on purpose: the convolution is a matrix product over unfolded patches and every gradient is a formula, so that the
file can be read against the papers and run in float64 as the yardstick for every backend. Nothing here is
differentiated by autograd.

    y = conv(x, weight) + bias
    z = gamma * (y - mean) * rstd + beta              rstd = 1 / sqrt(var + eps)
    out = act(z)  |  act(z + residual)  |  act(z) + residual

Sources: S. Ioffe, C. Szegedy, "Batch Normalization", 2015 (statistics and their gradients); the documentation of
``torch.nn.BatchNorm2d`` (biased variance to normalise, unbiased variance in ``running_var``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pointfuse.problem import ACTIVATIONS


class Gradients(NamedTuple):
    """Gradients of the unit's inputs; ``None`` where the input was absent."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    residual: Tensor | None


class Saved(NamedTuple):
    """What ``backward`` needs of ``forward``: x and weight as given, y and z ``[batch, c_out, h_out, w_out]``."""

    x: Tensor
    weight: Tensor
    has_bias: bool
    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    pre_activation: Tensor
    residual_shape: torch.Size | None
    residual_order: str
    batch_statistics: bool
    activation: str
    negative_slope: float
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def activate(z: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """The activation by name. ``negative_slope`` is read by ``leaky_relu`` alone.

    The product stands outside the select, so that NaN and -inf * 0 propagate as in ``torch.nn.functional``.
    """
    if activation == "leaky_relu":
        return torch.where(z > 0, z, z * negative_slope)
    if activation == "relu":
        return torch.where(z <= 0, torch.zeros_like(z), z)
    if activation == "relu6":
        return torch.where(z <= 0, torch.zeros_like(z), torch.where(z >= 6, torch.full_like(z, 6.0), z))
    if activation == "silu":
        return z / (1 + torch.exp(-z))
    if activation == "identity":
        return z
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def activation_derivative(z: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """d act / d z at the pre-activation ``z``. At 0 a leaky ReLU has its negative slope, ReLU and ReLU6 have 0."""
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    if activation == "leaky_relu":
        return torch.where(z > 0, one, one * negative_slope)
    if activation == "relu":
        return torch.where(z > 0, one, zero)
    if activation == "relu6":
        return torch.where((z > 0) & (z < 6), one, zero)
    if activation == "silu":
        s = 1 / (1 + torch.exp(-z))
        return s * (1 + z * (1 - s))
    if activation == "identity":
        return one
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
) -> tuple[Tensor, Saved]:
    """The unit's output ``[batch, c_out, h_out, w_out]`` and what the backward needs.

    x: ``[batch, c_in, height, width]``; weight: ``[c_out, c_in / groups, kh, kw]``; bias, running statistics and BN
    parameters: ``[c_out]``. With ``training`` the batch's own statistics normalise and, where given, ``running_mean``
    and ``running_var`` are updated in place. Without, the running statistics normalise; if all four BN tensors are
    ``None`` there is no normalisation.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    patches, (h_out, w_out) = _unfold(x, weight, stride, padding, dilation, groups)
    y = (_grouped(weight, groups) @ patches).reshape(x.shape[0], weight.shape[0], h_out, w_out)
    if bias is not None:
        y = y + _per_channel(bias)

    mean = rstd = None
    if training:
        mean = y.mean(dim=(0, 2, 3))
        var = ((y - _per_channel(mean)) ** 2).mean(dim=(0, 2, 3))
        rstd = 1 / torch.sqrt(var + eps)
        count = y.numel() // y.shape[1]
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean * momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(var * (count / (count - 1)) * momentum)
    elif running_mean is not None and running_var is not None:
        mean, rstd = running_mean, 1 / torch.sqrt(running_var + eps)

    z = y
    if mean is not None and rstd is not None:
        z = (y - _per_channel(mean)) * _per_channel(rstd)
        if bn_weight is not None:
            z = z * _per_channel(bn_weight)
        if bn_bias is not None:
            z = z + _per_channel(bn_bias)

    pre_activation = z
    if residual is not None and residual_order == "add_act":
        pre_activation = z + residual
    out = activate(pre_activation, activation, negative_slope)
    if residual is not None and residual_order == "act_add":
        out = out + residual
    saved = Saved(
        x=x,
        weight=weight,
        has_bias=bias is not None,
        y=y,
        mean=mean,
        rstd=rstd,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
        pre_activation=pre_activation,
        residual_shape=None if residual is None else residual.shape,
        residual_order=residual_order,
        batch_statistics=training,
        activation=activation,
        negative_slope=negative_slope,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return out, saved


def backward(grad_out: Tensor, saved: Saved) -> Gradients:
    """Gradients of every input of ``forward`` for an upstream gradient of the output's shape.

    With batch statistics, N elements a channel and x_hat = (y - mean) * rstd:
        dbeta = sum dz    dgamma = sum dz * x_hat    dy = gamma * rstd * (dz - dbeta / N - x_hat * dgamma / N)
    With running statistics the last line is dy = gamma * rstd * dz.
    """
    dz = grad_out * activation_derivative(saved.pre_activation, saved.activation, saved.negative_slope)
    d_residual = None
    if saved.residual_shape is not None:
        d_residual = (grad_out if saved.residual_order == "act_add" else dz).sum_to_size(saved.residual_shape)

    dy, d_gamma, d_beta = dz, None, None
    if saved.mean is not None and saved.rstd is not None:
        x_hat = (saved.y - _per_channel(saved.mean)) * _per_channel(saved.rstd)
        sum_dz, sum_dz_x_hat = dz.sum(dim=(0, 2, 3)), (dz * x_hat).sum(dim=(0, 2, 3))
        d_gamma = None if saved.bn_weight is None else sum_dz_x_hat
        d_beta = None if saved.bn_bias is None else sum_dz
        if saved.batch_statistics:
            count = dz.numel() // dz.shape[1]
            dy = dz - _per_channel(sum_dz / count) - x_hat * _per_channel(sum_dz_x_hat / count)
        dy = dy * _per_channel(saved.rstd)
        if saved.bn_weight is not None:
            dy = dy * _per_channel(saved.bn_weight)

    x, weight, groups = saved.x, saved.weight, saved.groups
    patches, (h_out, w_out) = _unfold(x, weight, saved.stride, saved.padding, saved.dilation, groups)
    rows = dy.reshape(x.shape[0], groups, weight.shape[0] // groups, h_out * w_out)
    d_weight = (rows @ patches.transpose(-1, -2)).sum(dim=0).reshape(weight.shape)
    d_patches = _grouped(weight, groups).transpose(-1, -2) @ rows
    d_x = F.fold(
        d_patches.reshape(x.shape[0], -1, h_out * w_out),
        (x.shape[2], x.shape[3]),
        (weight.shape[2], weight.shape[3]),
        saved.dilation,
        saved.padding,
        saved.stride,
    )
    d_bias = dy.sum(dim=(0, 2, 3)) if saved.has_bias else None
    return Gradients(d_x, d_weight, d_bias, d_gamma, d_beta, d_residual)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _per_channel(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """``[groups, c_out / groups, c_in / groups * kh * kw]``: one matrix a group."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _unfold(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Tensor, tuple[int, int]]:
    """Patches ``[batch, groups, c_in / groups * kh * kw, h_out * w_out]`` and the output plane."""
    kernel = (weight.shape[2], weight.shape[3])
    h_out, w_out = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    patches = F.unfold(x, kernel, dilation, padding, stride)
    return patches.reshape(x.shape[0], groups, -1, h_out * w_out), (h_out, w_out)
