"""The unit in training, in PyTorch's own operators.

Between the convolutions, whose forward and backward are PyTorch's, lie passes over memory. Here they go over the output
a piece at a time, so that what one operator writes the next finds in cache. The pre-activation is not kept: the
backward makes it again from the convolution's output.

The functions are those that every backend has for training:

    conv        y = conv(x, weight) + bias, and the statistics of its parts where they come for nothing
    normalise   out = act(gamma * (y - mean) * rstd + beta), with the residual
    sums        of dz and of dz * x_hat, which the gradients need
    gradients   of y, residual, gamma and beta

``parts`` are ``[P, 3, c_out]``: count, mean and sum of squared deviations of each part of y, or ``[P, 2, c_out]``: the
two sums. Statistics are fp32, or fp64 for fp64 tensors. ``y`` is dense, contiguous or channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pointfuse.backends import aten
from pointfuse.problem import Activation, Geometry

_ops = torch.ops.aten
# A unit's Python costs half a millisecond more than three modules', with cold caches: 2% of what so many multiply-adds
# a thread take, forward and backward.
MIN_MACS_PER_THREAD = 1 << 28
# Measured interleaved with PyTorch's modules, batch 8 of YOLOv3's heads on two threads: from so many multiply-adds an
# output on (3x3 kernels of 128 channels) units took 0.98 to 1.00 of their time, below, 1x1 units, 1.02 to 1.07.
MIN_MACS_PER_OUTPUT = 1152
# In half precision the pass that makes the pre-activation again must be hidden by more arithmetic.
MIN_MACS_PER_OUTPUT_IN_HALF = 4096
# Elements that the passes over a piece keep in cache, two megabytes in fp32.
_PIECE = 1 << 19
_PER_CHANNEL = (0, 2, 3)


def min_input(conv: nn.Conv2d) -> int:
    """From how many input elements :func:`pays` may say yes, as if the stride were one."""
    kernel_height, kernel_width = conv.kernel_size
    macs_per_input = conv.out_channels // conv.groups * kernel_height * kernel_width
    return MIN_MACS_PER_THREAD * torch.get_num_threads() // max(1, macs_per_input)


def pays(outputs: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a unit on the CPU is as fast here as its modules one by one."""
    macs_per_output = weight.numel() // weight.shape[0]
    if outputs * macs_per_output < MIN_MACS_PER_THREAD * torch.get_num_threads():
        return False
    return macs_per_output >= (MIN_MACS_PER_OUTPUT_IN_HALF if dtype.itemsize == 2 else MIN_MACS_PER_OUTPUT)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The convolution's output. Its statistics take a pass of their own: :func:`normalise` makes them."""
    return aten.conv(x, weight, bias, geometry), None


def statistics(y: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of all of ``y``: ``[1, 3, c_out]``."""
    wide = _wide(y)
    count = y.numel() // y.shape[1]
    if count == 0:
        return torch.zeros(1, 3, y.shape[1], dtype=wide, device=y.device)
    mean = y.sum(_PER_CHANNEL, dtype=wide) / count
    squares, rest = torch.zeros_like(mean), torch.zeros_like(mean)
    for piece in _pieces(y):
        deviations = piece - _per_channel(mean)
        rest += deviations.sum(_PER_CHANNEL)
        squares += deviations.square_().sum(_PER_CHANNEL)
    # PyTorch sums in double precision. Where a channel is constant, what is left of rounding shows 300 times enlarged.
    rest /= count
    exact = rest.square().isfinite()
    squares = torch.where(exact, (squares - count * rest.square()).clamp_min_(0), squares)
    mean = torch.where(exact, mean + rest, mean)
    return torch.stack((torch.full_like(mean, count), mean, squares))[None]


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of all parts together, each ``[c_out]``; parts may be empty.

    Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979.
    """
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    # One part's mean times its count over its count need not be that mean. In memory of its own: the backward keeps it.
    mean = means[0].clone() if len(parts) == 1 else (counts * means).sum(0) / count.clamp(min=1)
    return count, mean, (squares + counts * (means - mean).square()).sum(0)


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
    """Batch norm, residual and activation, and the mean and reciprocal deviation that normalised.

    Without ``mean`` and ``rstd`` they are those of ``y`` (of its ``parts``, where given), and the running statistics,
    where given, are updated in place.
    """
    if mean is None or rstd is None:
        # Of half precision with no operand in fp32, PyTorch's statistics on a CPU are of half precision.
        wide = next((t.dtype for t in (running_mean, gamma, beta) if t is not None), y.dtype) == _wide(y)
        if parts is None and not _in_pieces(y) and wide:
            z, mean, rstd = torch.native_batch_norm(y, gamma, beta, running_mean, running_var, True, momentum, eps)
            return aten.finish(z, activation, residual, residual_order, False, True), mean, rstd
        if parts is None and _in_pieces(y) and y.is_contiguous(memory_format=torch.channels_last):
            mean, var = _ops.batch_norm_update_stats(y, running_mean, running_var, momentum)
            rstd = var.add_(eps).rsqrt_()
        else:
            mean, rstd = finalise(statistics(y) if parts is None else parts, running_mean, running_var, momentum, eps)
    out = torch.empty_like(y)
    residuals = itertools.repeat(None) if residual is None else _pieces(residual)
    for z, added in zip(_pre_activations(y, mean, rstd, gamma, beta, out), residuals, strict=False):
        finished = aten.finish(z, activation, added, residual_order, False, True)
        if finished.data_ptr() != z.data_ptr():
            z.copy_(finished)
    return out, mean, rstd


def finalise(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of all parts together; the running statistics are updated in place."""
    count, mean, squares = merge(parts)
    kept = tuple(t for t in (running_mean, running_var) if t is not None)
    # PyTorch's batch norm writes to them unseen by autograd; where it was called before, its backward has them saved.
    with torch.autograd._unsafe_preserve_version_counter(kept):
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((squares / (count - 1)).to(running_var.dtype), momentum)
    return mean, torch.rsqrt(squares / count + eps)


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
    """The sums of dz and of dz * x_hat: ``[1, 2, c_out]``."""
    dz = _activation_gradient(grad_out, y, mean, rstd, gamma, beta, residual, activation, residual_order)
    return torch.stack(_sums_of(dz, y, mean, rstd))[None]


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
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of y, of a residual that the activation sees, of gamma and of beta.

    ``parts`` are the sums over all ``count`` elements a channel that were normalised together, or ``None`` where the
    statistics do not depend on ``y``; then there is no gradient of gamma and beta.
    """
    dz = _activation_gradient(grad_out, y, mean, rstd, gamma, beta, residual, activation, residual_order)
    d_residual = dz if want_residual and residual_order == "add_act" else None
    scale = rstd if gamma is None else rstd * gamma
    if parts is None:
        return (dz * _per_channel(scale)).to(y.dtype), d_residual, None, None
    d_beta, d_gamma = parts.sum(0)
    slope = -(rstd * d_gamma / count)
    offset = -(d_beta / count) - mean * slope
    dy = torch.addcmul(_per_channel(offset), y.to(offset.dtype), _per_channel(slope)).add_(dz)
    return dy.mul_(_per_channel(scale)).to(y.dtype), d_residual, d_gamma, d_beta


def backward(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    residual_order: str,
    batch_statistics: bool,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`sums` and :func:`gradients` at once, of those gradients that are wanted."""
    want_y, want_residual, *want_norm = wanted
    dz = _activation_gradient(grad_out, y, mean, rstd, gamma, beta, residual, activation, residual_order)
    d_residual = dz if want_residual and residual_order == "add_act" else None
    if not want_y and not any(want_norm):
        return None, d_residual, None, None
    if want_y and batch_statistics and _in_pieces(y) and dz is not grad_out and d_residual is None:
        d_beta, d_gamma = _sums_of(dz, y, mean, rstd)
        return _gradient_of_y(dz, y, mean, rstd, gamma, d_beta, d_gamma), None, d_gamma, d_beta
    running = (None, None) if batch_statistics else (mean, rstd.pow(-2))
    dy, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(
        dz, y, gamma, *running, mean, rstd, batch_statistics, 0.0, [want_y, *want_norm]
    )
    return dy, d_residual, d_gamma, d_beta


def _gradient_of_y(
    dz: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, d_beta: Tensor, d_gamma: Tensor
) -> Tensor:
    """dy = gamma * rstd * (dz - d_beta / N - x_hat * d_gamma / N), in the memory of ``dz``.

    Fresh memory would cost as much as the arithmetic.
    """
    scale = rstd if gamma is None else rstd * gamma
    share = scale * (-y.shape[1] / y.numel())
    slope = share * rstd * d_gamma
    offset = torch.addcmul(share * d_beta, mean, slope, value=-1)
    column = _per_channel(scale)
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    for t, piece in zip(_affine(y, slope, offset, None), _pieces(dz), strict=True):
        if channels_last:
            torch.addcmul(t, piece, column, out=piece)
        else:
            piece.mul_(column).add_(t)
    return dz


def _activation_gradient(
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
    """dz: the gradient through the activation, of the layout of ``y``."""
    if activation.name == "identity":
        return grad_out
    dz = torch.empty_like(y)
    added = residual is not None and residual_order == "add_act"
    residuals = _pieces(residual) if residual is not None and added else itertools.repeat(None)
    pre_activations = _pre_activations(y, mean, rstd, gamma, beta, None)
    for z, upstream, piece, before in zip(pre_activations, _pieces(grad_out), _pieces(dz), residuals, strict=False):
        if before is not None:
            z.add_(before)
        _through_activation(upstream, z, activation, piece)
    return dz


def _through_activation(grad_out: Tensor, z: Tensor, activation: Activation, dz: Tensor) -> None:
    if activation.name == "leaky_relu":
        _ops.leaky_relu_backward.grad_input(grad_out, z, activation.negative_slope, False, grad_input=dz)
    elif activation.name == "relu":
        _ops.threshold_backward.grad_input(grad_out, z, 0, grad_input=dz)
    elif activation.name == "relu6":
        _ops.hardtanh_backward.grad_input(grad_out, z, 0, 6, grad_input=dz)
    else:
        _ops.silu_backward.grad_input(grad_out, z, grad_input=dz)


def _pre_activations(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None, into: Tensor | None
) -> Iterator[Tensor]:
    """gamma * (y - mean) * rstd + beta, piece after piece.

    They are written to the pieces of ``into``, or else to memory that the next piece is written to.
    """
    if _in_pieces(y):
        scale = rstd if gamma is None else rstd * gamma
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        yield from _affine(y, scale, shift, into)
        return
    # Of half precision, whose products are to be rounded once.
    nothing, var = torch.empty(0, device=y.device), rstd.pow(-2)
    for piece, z in _with_memory(y, into):
        _ops.native_batch_norm.out(
            piece, gamma, beta, mean, var, False, 0.0, 0.0, out=z, save_mean=nothing, save_invstd=nothing
        )
        yield z


def _affine(y: Tensor, scale: Tensor, shift: Tensor, into: Tensor | None) -> Iterator[Tensor]:
    """scale * y + shift, piece after piece, as :func:`_pre_activations`."""
    column, offset = _per_channel(scale), _per_channel(shift)
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    for piece, z in _with_memory(y, into):
        if channels_last:
            torch.addcmul(offset, piece, column, out=z)
        else:
            # With numbers that do not change along a row, addcmul is not vectorised.
            torch.mul(piece, column, out=z).add_(offset)
        yield z


def _with_memory(y: Tensor, into: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece of ``y`` with memory of its shape: that of ``into``, or the same for every piece."""
    pieces = _pieces(y)
    if into is not None:
        yield from zip(pieces, _pieces(into), strict=True)
    elif pieces:
        memory = torch.empty_like(pieces[0])
        for piece in pieces:
            yield piece, memory if len(piece) == len(memory) else memory[: len(piece)]


def _in_pieces(y: Tensor) -> bool:
    """Whether y's elements can be multiplied by fp32 statistics without a change of dtype, and gain by it."""
    return y.dtype in (torch.float32, torch.float64) and y.device.type == "cpu"


def _pieces(t: Tensor) -> Sequence[Tensor]:
    """A tensor of y's shape as images, as many together as stay in cache."""
    if t.numel() <= _PIECE or t.device.type != "cpu":
        return (t,)
    return t.split(max(1, _PIECE * len(t) // t.numel()))


def _sums_of(dz: Tensor, y: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dz and of dz * x_hat."""
    if y.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, of_products, of_dz = _ops.native_batch_norm_backward(
        dz, y, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return of_dz.to(mean.dtype), of_products.to(mean.dtype)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _per_channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)
