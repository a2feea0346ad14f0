"""The passes of training over a convolution's output, as Triton kernels: batch norm, activation and their gradients.

    z = (y - mean) * (rstd * gamma) + beta            out = act(z) | act(z + residual) | act(z) + residual
    x_hat = (y - mean) * rstd                         dz = grad_out * act'(z | z + residual)
    dy = gamma * rstd * (dz - sum(dz) / count - x_hat * sum(dz * x_hat) / count)

Sources: S. Ioffe, C. Szegedy, "Batch Normalization", 2015; T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the
sample variance", 1983, for how parts of the statistics merge.

``y`` and whatever has its shape are seen as ``[outer, channels, inner]``, the inner elements side by side, or, with
``CHANNELS_LAST``, as ``[inner, channels]``, the channels side by side. A program has a block of channels and a slice of
the tiles of pixels. It first works out its channels' numbers from the parts, of which there are few; the programs of
the first slice write them. Arithmetic is fp32, and every sum has an order of its own, so that no run differs from
another. ``VECTOR`` divides the size of the innermost dimension; ``INTERPRETED`` is for Triton's interpreter, as in
``kernels.py``.
"""

# What is written in Triton's language has no Python types.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from pointfuse.backends.triton.kernels import _activate, _round_to_bf16

# Numbers of parts and images must not make a kernel of their own.
_ANY_COUNT = ["part_count", "share", "outer"]


@triton.jit(do_not_specialize=_ANY_COUNT, repr=lambda specialization: "pointfuse_merge_statistics")
def merge_statistics(
    parts, merged, part_count, share, channels, BLOCK_CHANNELS: tl.constexpr, BLOCK_PARTS: tl.constexpr
):  # fmt: skip
    """Every ``share`` parts of ``[part_count, 3, channels]`` as one: count, mean and sum of squared deviations."""
    group, channel = _program(channels, BLOCK_CHANNELS)
    known = channel < channels
    first = group * share
    last = min(first + share, part_count)
    count, mean, m2 = _merged(parts, first, last, channel, channels, BLOCK_PARTS)
    row = merged + group.to(tl.int64) * 3 * channels + channel
    tl.store(row, tl.zeros_like(mean) + count, known)
    tl.store(row + channels, mean, known)
    tl.store(row + 2 * channels, m2, known)


@triton.jit(do_not_specialize=_ANY_COUNT, repr=lambda specialization: "pointfuse_normalise")
def normalise(
    y, parts, mean, rstd, gamma, beta, residual, out, running_mean, running_var,
    part_count, outer, channels, inner, momentum, eps, negative_slope,
    ACTIVATION: tl.constexpr, ACT_ADD: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``out`` from ``y``; from ``parts``, where given, ``mean``, ``rstd`` and the running statistics besides."""
    first, channel = _program(channels, BLOCK_CHANNELS)
    known = channel < channels
    if parts is not None:
        count, centre, m2 = _merged(parts, 0, part_count, channel, channels, BLOCK_PARTS)
        rstd_here = tl.div_rn(1.0, tl.sqrt_rn(m2 / count + eps))
        writes = channel < tl.where(first == 0, channels, 0)
        tl.store(mean + channel, centre, writes)
        tl.store(rstd + channel, rstd_here, writes)
        if running_mean is not None:
            _move(running_mean + channel, centre, momentum, writes, INTERPRETED)
        if running_var is not None:
            _move(running_var + channel, m2 / (count - 1), momentum, writes, INTERPRETED)
    else:
        centre = tl.load(mean + channel, known, other=0.0)
        rstd_here = tl.load(rstd + channel, known, other=0.0)
    scale = rstd_here * _parameter(gamma, channel, known, 1.0)
    shift = _parameter(beta, channel, known, 0.0)

    for tile in tl.range(first, _tiles(outer, inner, BLOCK_PIXELS), _slices(channels, BLOCK_CHANNELS)):
        element, mask = _elements(tile, channel, channels, inner, CHANNELS_LAST, VECTOR, BLOCK_PIXELS)
        z = tl.fma(_fp32(y + element, mask) - centre[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            if ACT_ADD:
                z = _activate(z, negative_slope, ACTIVATION) + _fp32(residual + element, mask)
            else:
                z = _activate(z + _fp32(residual + element, mask), negative_slope, ACTIVATION)
        else:
            z = _activate(z, negative_slope, ACTIVATION)
        _store(out + element, z, mask, INTERPRETED)


@triton.jit(do_not_specialize=_ANY_COUNT, repr=lambda specialization: "pointfuse_sums")
def sums(
    grad_out, y, mean, rstd, gamma, beta, residual, parts,
    outer, channels, inner, negative_slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz * x_hat over each slice to ``parts``, ``[slices, 2, channels]``.

    ``residual`` is one that is added before the activation.
    """
    first, channel = _program(channels, BLOCK_CHANNELS)
    known = channel < channels
    centre = tl.load(mean + channel, known, other=0.0)
    rstd_here = tl.load(rstd + channel, known, other=0.0)
    scale = rstd_here * _parameter(gamma, channel, known, 1.0)
    shift = _parameter(beta, channel, known, 0.0)
    sum_dz = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    sum_dzx = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for tile in tl.range(first, _tiles(outer, inner, BLOCK_PIXELS), _slices(channels, BLOCK_CHANNELS)):
        element, mask = _elements(tile, channel, channels, inner, CHANNELS_LAST, VECTOR, BLOCK_PIXELS)
        dz, deviation = _dz(grad_out, y, residual, element, mask, centre, scale, shift, negative_slope, ACTIVATION)
        sum_dz += dz
        sum_dzx += dz * (deviation * rstd_here[None, :])
    row = parts + first.to(tl.int64) * 2 * channels + channel
    tl.store(row, tl.sum(sum_dz, 0), known)
    tl.store(row + channels, tl.sum(sum_dzx, 0), known)


@triton.jit(do_not_specialize=_ANY_COUNT, repr=lambda specialization: "pointfuse_add_parts")
def add_parts(parts, added, part_count, channels, BLOCK_CHANNELS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The parts of ``[part_count, channels]``, added up."""
    _, channel = _program(channels, BLOCK_CHANNELS)
    total = _added(parts + channel, part_count, channel < channels, channels, BLOCK_PARTS)
    tl.store(added + channel, total, channel < channels)


@triton.jit(do_not_specialize=_ANY_COUNT, repr=lambda specialization: "pointfuse_gradients")
def gradients(
    grad_out, y, mean, rstd, gamma, beta, residual, parts, dy, d_residual, d_gamma, d_beta,
    part_count, outer, channels, inner, count, negative_slope,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``dy``, and where asked for ``d_residual``; from ``parts``, where given, ``d_gamma`` and ``d_beta`` besides.

    ``parts`` are those of :func:`sums`; without them mean and deviation were not the batch's own. ``residual`` is one
    that is added before the activation.
    """
    first, channel = _program(channels, BLOCK_CHANNELS)
    known = channel < channels
    centre = tl.load(mean + channel, known, other=0.0)
    rstd_here = tl.load(rstd + channel, known, other=0.0)
    scale = rstd_here * _parameter(gamma, channel, known, 1.0)
    shift = _parameter(beta, channel, known, 0.0)
    if parts is not None:
        sum_dz = _added(parts + channel, part_count, known, 2 * channels, BLOCK_PARTS)
        sum_dzx = _added(parts + channels + channel, part_count, known, 2 * channels, BLOCK_PARTS)
        writes = channel < tl.where(first == 0, channels, 0)
        tl.store(d_beta + channel, sum_dz, writes)
        tl.store(d_gamma + channel, sum_dzx, writes)
        mean_dz = sum_dz / count
        slope_of_x = sum_dzx / count * rstd_here

    for tile in tl.range(first, _tiles(outer, inner, BLOCK_PIXELS), _slices(channels, BLOCK_CHANNELS)):
        element, mask = _elements(tile, channel, channels, inner, CHANNELS_LAST, VECTOR, BLOCK_PIXELS)
        dz, deviation = _dz(grad_out, y, residual, element, mask, centre, scale, shift, negative_slope, ACTIVATION)
        if d_residual is not None:
            _store(d_residual + element, dz, mask, INTERPRETED)
        if parts is not None:
            dz = dz - mean_dz[None, :] - deviation * slope_of_x[None, :]
        _store(dy + element, dz * scale[None, :], mask, INTERPRETED)


@triton.jit
def _program(channels, BLOCK_CHANNELS):
    """The program's slice, and its channels: programs side by side have channels side by side."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return tl.program_id(0) // blocks, channel


@triton.jit
def _slices(channels, BLOCK_CHANNELS):
    """How many programs share a block of channels."""
    return tl.num_programs(0) // tl.cdiv(channels, BLOCK_CHANNELS)


@triton.jit
def _tiles(outer, inner, BLOCK_PIXELS):
    return outer * ((inner - 1) // BLOCK_PIXELS + 1)


@triton.jit
def _elements(tile, channel, channels, inner, CHANNELS_LAST, VECTOR, BLOCK_PIXELS):
    """Offsets and mask of a tile, ``[BLOCK_PIXELS, BLOCK_CHANNELS]``."""
    # Triton sees of a number whether 16 divides it, and nothing less: 8 elements may be 16 bytes too.
    if CHANNELS_LAST:
        channels = channels // VECTOR * VECTOR
        pixel = tl.cast(tile, tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        element = pixel[:, None] * channels + channel[None, :]
    else:
        inner = inner // VECTOR * VECTOR
        tiles = (inner - 1) // BLOCK_PIXELS + 1
        pixel = tl.cast(tile % tiles, tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        row = tl.cast(tile // tiles, tl.int64) * channels + channel
        element = row[None, :] * inner + pixel[:, None]
    return element, (pixel < inner)[:, None] & (channel < channels)[None, :]


@triton.jit
def _merged(parts, first, last, channel, channels, BLOCK_PARTS):
    """Count, mean and sum of squared deviations of the parts from ``first`` to ``last``.

    Their mean comes first and then the deviations from it, both relative to a part's mean, so that one far above the
    deviation takes no digits with it.
    """
    known = channel < channels
    pivot = tl.load(parts + (tl.cast(first, tl.int64) * 3 + 1) * channels + channel, known, other=0.0)
    count = 0.0
    moved = tl.zeros_like(pivot)
    for start in tl.range(first, last, BLOCK_PARTS):
        counts, row, mask = _parts(parts, start, last, channel, channels, BLOCK_PARTS)
        count += tl.sum(counts, 0)
        gap = tl.where(mask, tl.load(row + channels, mask, other=0.0) - pivot[None, :], 0.0)
        moved += tl.sum(counts[:, None] * gap, 0)
    moved = moved / count
    m2 = tl.zeros_like(pivot)
    for start in tl.range(first, last, BLOCK_PARTS):
        counts, row, mask = _parts(parts, start, last, channel, channels, BLOCK_PARTS)
        gap = tl.where(mask, tl.load(row + channels, mask, other=0.0) - pivot[None, :] - moved[None, :], 0.0)
        m2 += tl.sum(counts[:, None] * gap * gap + tl.load(row + 2 * channels, mask, other=0.0), 0)
    return count, pivot + moved, m2


@triton.jit
def _parts(parts, start, last, channel, channels, BLOCK_PARTS):
    """The counts of some parts, which are every channel's, and where the parts begin, with a mask."""
    part = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_PARTS)
    row = parts + part * 3 * channels
    mask = (part < last)[:, None] & (channel < channels)[None, :]
    return tl.load(row, part < last, other=0.0), row[:, None] + channel[None, :], mask


@triton.jit
def _added(column, part_count, known, pitch, BLOCK_PARTS):
    """The sum down columns of ``part_count`` rows."""
    total = tl.zeros(known.shape, tl.float32)
    for start in tl.range(0, part_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < part_count)[:, None] & known[None, :]
        total += tl.sum(tl.load(column[None, :] + (part.to(tl.int64) * pitch)[:, None], mask, other=0.0), 0)
    return total


@triton.jit
def _dz(grad_out, y, residual, element, mask, centre, scale, shift, negative_slope, ACTIVATION: tl.constexpr):
    """The gradient of z, by comparisons that treat NaN as PyTorch's do, and y - mean.

    Outside the tensors ``grad_out`` counts as 0, and the gradient is 0 with it.
    """
    g = _fp32(grad_out + element, mask)
    deviation = _fp32(y + element, mask) - centre[None, :]
    z = tl.fma(deviation, scale[None, :], shift[None, :])
    if residual is not None:
        z += _fp32(residual + element, mask)
    if ACTIVATION == "leaky_relu":
        dz = tl.where(z > 0, g, g * negative_slope)
    elif ACTIVATION == "relu":
        dz = tl.where(z <= 0, 0.0, g)
    elif ACTIVATION == "relu6":
        dz = tl.where((z <= 0) | (z >= 6), 0.0, g)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        dz = g * s * (1 + z * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "identity")
        dz = g
    return dz, deviation


@triton.jit
def _parameter(pointer, channel, known, DEFAULT):
    """A number of each channel, or what stands for it where there is none."""
    if pointer is not None:
        number = tl.load(pointer + channel, known, other=0.0).to(tl.float32)
    else:
        number = tl.full(channel.shape, DEFAULT, tl.float32)
    return number


@triton.jit
def _fp32(pointer, mask):
    return tl.load(pointer, mask, other=0.0).to(tl.float32)


@triton.jit
def _move(pointer, statistic, momentum, mask, INTERPRETED):
    """A running statistic, moved towards the batch's."""
    _store(pointer, _fp32(pointer, mask) * (1 - momentum) + statistic * momentum, mask, INTERPRETED)


@triton.jit
def _store(pointer, value, mask, INTERPRETED):
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        value = _round_to_bf16(value)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask)
