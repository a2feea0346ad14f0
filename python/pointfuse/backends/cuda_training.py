"""The CUDA C++ backend's steps of a unit with gradients. With N elements a channel, and all arithmetic in fp32:

    y = conv(x, weight) + bias                                                    ``conv``
    z = (y - mean) * rstd * gamma + beta
    out = act(z)  |  act(z + residual)  |  act(z) + residual                      ``normalise``
    dz = grad_out * act'(z)  |  grad_out * act'(z + residual)
    x_hat = (y - mean) * rstd
    sum_dz, sum_dzx = the sums of dz and of dz * x_hat                            ``sums``
    dy = gamma * rstd * (dz - sum_dz / N - x_hat * sum_dzx / N)                   ``gradients``

y is contiguous or channels_last; other tensors of its shape may have any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointfuse.backends import calls, cuda
from pointfuse.problem import IDENTITY, Activation, Geometry

# Set by ops.py, which defines them.
conv_operator: Any = None
forward_operator: Any = None
normalise_operator: Any = None
sums_operator: Any = None
gradients_operator: Any = None


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``y``, of the dtype of ``x``, and the parts of its channels' statistics, or ``None`` without ``statistics``.

    ``parts`` is fp32 ``[P, 3, c_out]``: of each part of the pixels how many they are, the mean of y, and the sum of
    its squared distances from that mean, both before y was rounded. y does not depend on ``statistics``.

    Records no gradients, and serves calls that others record; raises as
    :func:`pointfuse.backends.cuda.conv_bn_act` does.
    """
    with torch.no_grad():
        x, weight, bias, *_, config, _, _ = calls.arguments(x, weight, bias, None, IDENTITY, geometry)
        y, parts = cuda.call(conv_operator, x, weight, bias, config)
    return y, parts if statistics else None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation,
    residual_order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``y``, ``mean`` and ``rstd``: :func:`conv` and :func:`normalise` by the batch's statistics.

    It costs one call, and one launch where the chip holds all of y at once. y is :func:`conv`'s; the residual must lie
    as y will, or the kernels refuse the call.

    Raises as :func:`conv` and :func:`normalise` do.
    """
    with torch.no_grad():
        x, weight, bias, *_, config, _, _ = calls.arguments(x, weight, bias, None, IDENTITY, geometry)
        return cuda.call(
            forward_operator, x, weight, bias, gamma, beta, residual, running_mean, running_var, momentum, eps,
            config | calls.epilogue_config(activation, residual_order), activation.negative_slope,
        )  # fmt: skip


def normalise(
    y: Tensor,
    parts: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation,
    residual_order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, laid out as ``y``, and ``mean`` and ``rstd``, fp32 ``[c_out]``.

    The latter come from ``parts``, ``[P, 3, c_out]`` as :func:`conv` gives them, and move the running statistics, where
    given, in place: ``running_var`` towards the unbiased variance. With ``parts=None`` they are given, and returned.
    gamma, beta and the running statistics are of the dtype of y or fp32; ``residual`` has y's shape and dtype.

    Raises :class:`Refused` for what the kernels do not serve.
    """
    if residual is not None:
        residual = _laid_out_as(y, residual)
    config = calls.epilogue_config(activation, residual_order)
    out, new_mean, new_rstd = cuda.call(
        normalise_operator, y, parts, mean, rstd, gamma, beta, residual, running_mean, running_var, momentum, eps,
        config, activation.negative_slope,
    )  # fmt: skip
    if parts is not None:
        return out, new_mean, new_rstd
    assert mean is not None
    assert rstd is not None
    return out, mean, rstd


def sums(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    residual_order: str,
) -> Tensor:
    """Parts of each channel's sum_dz and sum_dzx, fp32 ``[P, 2, c_out]``, to be added up along P.

    ``mean`` and ``rstd`` are as :func:`normalise` returns them, the other operands as it took them; ``grad_out`` has
    y's shape and dtype.

    Raises :class:`Refused` for what the kernels do not serve.
    """
    grad_out, residual = _upstream(y, grad_out, residual, residual_order)
    config = calls.epilogue_config(activation, residual_order)
    return cuda.call(
        sums_operator, grad_out, y, mean, rstd, gamma, beta, residual, config, activation.negative_slope
    )  # fmt: skip


def gradients(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    residual_order: str,
    parts: Tensor | None,
    count: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``dy``, ``d_residual``, ``d_gamma`` and ``d_beta``.

    ``parts`` is what :func:`sums` gave, or its sum over processes, ``[1, 2, c_out]``; ``count`` is N over all of them.
    With ``parts=None`` the statistics were given: dy is ``gamma * rstd * dz``, and the last two are ``None``. Else
    those are sum_dzx and sum_dz, fp32 ``[c_out]``. dy and d_residual are laid out as y; d_residual, which is dz, is
    ``None`` unless ``want_residual`` and ``residual_order`` is ``"add_act"``.

    Raises :class:`Refused` for what the kernels do not serve.
    """
    grad_out, residual = _upstream(y, grad_out, residual, residual_order)
    want_residual = want_residual and residual_order == "add_act"
    config = calls.epilogue_config(activation, residual_order)
    dy, d_residual, d_gamma, d_beta = cuda.call(
        gradients_operator, grad_out, y, mean, rstd, gamma, beta, residual, parts, count, want_residual, config,
        activation.negative_slope,
    )  # fmt: skip
    if parts is None:
        d_gamma = d_beta = None
    return dy, d_residual if want_residual else None, d_gamma, d_beta


def _laid_out_as(y: Tensor, t: Tensor) -> Tensor:
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _upstream(
    y: Tensor, grad_out: Tensor, residual: Tensor | None, residual_order: str
) -> tuple[Tensor, Tensor | None]:
    """``grad_out`` and the residual as the backward reads them: laid out as y, the latter if dz depends on it."""
    if residual is not None:
        residual = _laid_out_as(y, residual) if residual_order == "add_act" else None
    return _laid_out_as(y, grad_out), residual
