"""The unit as Triton kernels: one source for every GPU from Ampere on, 1x1 and 3x3, any layout.

    y[n, co, oh, ow] = act((sum_k weight[co, k] * x[k, n, oh, ow] + bias[co] - mean[co]) * scale[co] + beta[co])
    k = (c_in, tap)      scale = gamma / sqrt(var + eps)

The product is a matrix product ``[channels, K] @ [K, pixels]`` (implicit GEMM): nothing is unfolded in memory. Each
program walks over tiles of ``BLOCK_CHANNELS`` output channels by ``BLOCK_PIXELS`` output pixels, channels fastest, so
that the programs that run together share their pixels through the L2 cache. K runs over blocks of input channels and,
within them, over the taps of the kernel.

A tile's pixels are either consecutive in ``[n, oh, ow]``, or, with ``BOX_N`` > 0, a box of ``BOX_N`` images by
``BOX_H`` rows by ``BOX_W`` columns, which a tensor descriptor can load, and whose pixels lie side by side in memory. A
1x1 convolution over a dense plane comes as one row of pixels; see ``planning.py``.

Triton's interpreter, which runs the kernels on the CPU, multiplies the bit patterns of bf16 and cuts bits off where it
should round: with ``INTERPRETED`` the kernels spare it both.

``x`` and ``y`` have strides of their own; the weight is ``[c_out, taps, c_in]``, dense. Accumulation and epilogue
are fp32; the output is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change with the batch or the plane must not make a kernel of their own. Profilers and compute-sanitizer see
# the names that `repr` gives.
_ANY_SIZE = ["batch", "height", "width", "out_height", "out_width"]


@triton.jit(do_not_specialize=_ANY_SIZE, repr=lambda specialization: "pointfuse_conv_bn_act")
def conv_bn_act(
    x, weight, bias, mean, var, gamma, beta, residual, y, partials, parts,
    batch, c_in, height, width, c_out, out_height, out_width,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, residual_n, residual_c, residual_h, residual_w,
    eps, negative_slope,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    ACTIVATION: tl.constexpr, ACT_ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, DESCRIBE_X: tl.constexpr, DESCRIBE_WEIGHT: tl.constexpr,
    FLATTEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The unit; with ``SPLIT_K`` > 1 partial sums to ``partials``, which :func:`finish_split` adds up.

    For training ``parts``, ``[tiles of pixels, 3, c_out]``, takes the statistics of the convolution, a part from each
    tile: the number of its pixels, their mean and the sum of their squared deviations from it, before any rounding.
    """
    TAPS: tl.constexpr = TAPS_H * TAPS_W
    channel_tiles = tl.cdiv(c_out, BLOCK_CHANNELS)
    tiles = channel_tiles * _pixel_tiles(batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    k_blocks = tl.cdiv(c_in, BLOCK_K) * TAPS
    k_share = tl.cdiv(k_blocks, SPLIT_K)
    if DESCRIBE_X:
        x_tensor = tl.make_tensor_descriptor(
            x, [batch, height, width, c_in], [x_n, x_h, x_w, 1], [BOX_N, BOX_H, BOX_W, BLOCK_K]
        )
    if DESCRIBE_WEIGHT:
        weight_tensor = tl.make_tensor_descriptor(
            weight, [c_out, TAPS * c_in], [TAPS * c_in, 1], [BLOCK_CHANNELS, BLOCK_K]
        )

    for job in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=FLATTEN):
        tile = job // SPLIT_K
        part = job % SPLIT_K
        first_channel = (tile % channel_tiles) * BLOCK_CHANNELS
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        n0, h0, w0 = _first_pixel(tile // channel_tiles, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
        n, h, w = _tile_pixels(n0, h0, w0, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
        inside = (n < batch) & (h < out_height) & (w < out_width)
        h_in = h * STRIDE_H - PADDING_H
        w_in = w * STRIDE_W - PADDING_W
        x_pixel = n.to(tl.int64) * x_n + h_in.to(tl.int64) * x_h + w_in.to(tl.int64) * x_w
        weight_row = channel.to(tl.int64) * (TAPS * c_in)

        total = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], tl.float32)
        for k_block in tl.range(part * k_share, min((part + 1) * k_share, k_blocks)):
            first_k = (k_block // TAPS) * BLOCK_K
            tap_h = (k_block % TAPS) // TAPS_W
            tap_w = (k_block % TAPS) % TAPS_W
            k = first_k + tl.arange(0, BLOCK_K)
            if DESCRIBE_WEIGHT:
                a = weight_tensor.load([first_channel, (k_block % TAPS) * c_in + first_k])
            else:
                a_mask = (channel < c_out)[:, None]
                if not EVEN_K:
                    a_mask = a_mask & (k < c_in)[None, :]
                a = tl.load(weight + weight_row[:, None] + ((k_block % TAPS) * c_in + k)[None, :], a_mask, other=0.0)
            if DESCRIBE_X:
                b = x_tensor.load([n0, h0 - PADDING_H + tap_h, w0 - PADDING_W + tap_w, first_k])
                b = b.reshape(BLOCK_PIXELS, BLOCK_K).T
            else:
                b_mask = inside
                if PADDING_H > 0:
                    b_mask = b_mask & (h_in + tap_h >= 0) & (h_in + tap_h < height)
                if PADDING_W > 0:
                    b_mask = b_mask & (w_in + tap_w >= 0) & (w_in + tap_w < width)
                b_mask = b_mask[None, :]
                if not EVEN_K:
                    b_mask = b_mask & (k < c_in)[:, None]
                tap_offset = tap_h.to(tl.int64) * x_h + tap_w.to(tl.int64) * x_w
                b = tl.load(x + tap_offset + x_pixel[None, :] + (k.to(tl.int64) * x_c)[:, None], b_mask, other=0.0)
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)

        if SPLIT_K > 1:
            row = (part.to(tl.int64) * tiles + tile) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
            tl.store(partials + row[:, None] * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :], total)
        else:
            _finish(
                total, channel, n, h, w, inside, bias, mean, var, gamma, beta, residual, y, c_out,
                y_n, y_c, y_h, y_w, residual_n, residual_c, residual_h, residual_w, eps, negative_slope,
                ACTIVATION, ACT_ADD, INTERPRETED,
            )  # fmt: skip
            # After the store: before it, what that needs would be held in registers meanwhile, and spill.
            if parts is not None:
                counted = _counted(n0, h0, w0, batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
                _write_part(total, counted, bias, parts, tile // channel_tiles, channel, c_out)


@triton.jit(do_not_specialize=_ANY_SIZE, repr=lambda specialization: "pointfuse_finish_split")
def finish_split(
    bias, mean, var, gamma, beta, residual, y, partials,
    batch, c_out, out_height, out_width,
    y_n, y_c, y_h, y_w, residual_n, residual_c, residual_h, residual_w,
    eps, negative_slope,
    ACTIVATION: tl.constexpr, ACT_ADD: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, SPLIT_K: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of :func:`conv_bn_act`, part after part, and finish; ``ROWS`` channels a program."""
    BANDS: tl.constexpr = BLOCK_CHANNELS // ROWS
    channel_tiles = tl.cdiv(c_out, BLOCK_CHANNELS)
    tiles = channel_tiles * _pixel_tiles(batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    tile = tl.program_id(0) // BANDS
    band = tl.program_id(0) % BANDS
    row = tile.to(tl.int64) * BLOCK_CHANNELS + band * ROWS + tl.arange(0, ROWS)
    element = row[:, None] * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    total = tl.zeros([ROWS, BLOCK_PIXELS], tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(partials + tiles.to(tl.int64) * (part * BLOCK_CHANNELS * BLOCK_PIXELS) + element)
    n0, h0, w0 = _first_pixel(tile // channel_tiles, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    n, h, w = _tile_pixels(n0, h0, w0, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    inside = (n < batch) & (h < out_height) & (w < out_width)
    channel = (tile % channel_tiles) * BLOCK_CHANNELS + band * ROWS + tl.arange(0, ROWS)
    _finish(
        total, channel, n, h, w, inside, bias, mean, var, gamma, beta, residual, y, c_out,
        y_n, y_c, y_h, y_w, residual_n, residual_c, residual_h, residual_w, eps, negative_slope, ACTIVATION, ACT_ADD,
        INTERPRETED,
    )  # fmt: skip


@triton.jit
def _extents(size, EXTENT):
    """How many extents cover a size of at least 1: as ``tl.cdiv``, which overflows just below 2^31."""
    return (size - 1) // EXTENT + 1


@triton.jit
def _pixel_tiles(batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W):
    """How many tiles cover the output's pixels."""
    # Compiled graphs make a constant of every 1, which has no methods, and evaluate even what follows a return.
    if BOX_N == 0:
        tiles = _extents(tl.cast(batch, tl.int64) * out_height * out_width, BLOCK_PIXELS)
    else:
        tiles = _extents(batch, BOX_N) * _extents(out_height, BOX_H) * _extents(out_width, BOX_W)
    return tl.cast(tiles, tl.int32)


@triton.jit
def _first_pixel(tile, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W):
    """Image, row and column where a tile begins."""
    if BOX_N == 0:
        first = tile.to(tl.int64) * BLOCK_PIXELS
        row = first // out_width
        w0 = (first % out_width).to(tl.int32)
        h0 = (row % out_height).to(tl.int32)
        n0 = (row // out_height).to(tl.int32)
    else:
        columns = _extents(out_width, BOX_W)
        rows = _extents(out_height, BOX_H)
        w0 = (tile % columns) * BOX_W
        h0 = ((tile // columns) % rows) * BOX_H
        n0 = (tile // columns // rows) * BOX_N
    return n0, h0, w0


@triton.jit
def _tile_pixels(n0, h0, w0, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W):
    """Image, row and column of each pixel of a tile; some may lie outside the output."""
    i = tl.arange(0, BLOCK_PIXELS)
    if BOX_N == 0:
        column = w0 + i
        row = h0 + column // out_width
        n = n0 + row // out_height
        h = row % out_height
        w = column % out_width
    else:
        n = n0 + i // (BOX_H * BOX_W)
        h = h0 + (i // BOX_W) % BOX_H
        # A row may end less than a box before 2^31.
        w = tl.cast(w0, tl.int64) + i % BOX_W
    return n, h, w


@triton.jit
def _finish(
    total, channel, n, h, w, inside, bias, mean, var, gamma, beta, residual, y, c_out,
    y_n, y_c, y_h, y_w, residual_n, residual_c, residual_h, residual_w, eps, negative_slope, ACTIVATION, ACT_ADD,
    INTERPRETED,
):  # fmt: skip
    """Bias, batch norm, residual, activation, and the way to memory."""
    # Compiled graphs pass Python's floats as fp64.
    eps = tl.cast(eps, tl.float32)
    negative_slope = tl.cast(negative_slope, tl.float32)
    known = channel < c_out
    mask = known[:, None] & inside[None, :]
    z = total
    if mean is not None:
        # The mean is taken off before the scale, so that one far above the deviation takes no digits with it.
        centre = tl.load(mean + channel, known, other=0.0).to(tl.float32)
        if bias is not None:
            centre -= tl.load(bias + channel, known, other=0.0).to(tl.float32)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + channel, known, other=1.0).to(tl.float32) + eps))
        if gamma is not None:
            scale *= tl.load(gamma + channel, known, other=0.0).to(tl.float32)
        z -= centre[:, None]
        if beta is not None:
            z = tl.fma(z, scale[:, None], tl.load(beta + channel, known, other=0.0).to(tl.float32)[:, None])
        else:
            z *= scale[:, None]
    elif bias is not None:
        z += tl.load(bias + channel, known, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        pixel = n.to(tl.int64) * residual_n + h.to(tl.int64) * residual_h + w.to(tl.int64) * residual_w
        added = tl.load(residual + pixel[None, :] + (channel.to(tl.int64) * residual_c)[:, None], mask, other=0.0)
        if ACT_ADD:
            z = _activate(z, negative_slope, ACTIVATION) + added.to(tl.float32)
        else:
            z = _activate(z + added.to(tl.float32), negative_slope, ACTIVATION)
    else:
        z = _activate(z, negative_slope, ACTIVATION)
    if INTERPRETED and y.dtype.element_ty == tl.bfloat16:
        z = _round_to_bf16(z)
    pixel = n.to(tl.int64) * y_n + h.to(tl.int64) * y_h + w.to(tl.int64) * y_w
    tl.store(y + pixel[None, :] + (channel.to(tl.int64) * y_c)[:, None], z.to(y.dtype.element_ty), mask)


@triton.jit
def _counted(n0, h0, w0, batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W):
    """Which pixels of a tile lie inside the output: of their places in the tile, which take no registers."""
    i = tl.arange(0, BLOCK_PIXELS)
    if BOX_N == 0:
        before = (tl.cast(n0, tl.int64) * out_height + h0) * out_width + w0
        left = tl.cast(batch, tl.int64) * out_height * out_width - before
        counted = i < tl.minimum(left, BLOCK_PIXELS).to(tl.int32)
    else:
        counted = (i % BOX_W < out_width - w0) & ((i // BOX_W) % BOX_H < out_height - h0)
        counted = counted & (i // (BOX_H * BOX_W) < batch - n0)
    return counted


@triton.jit
def _write_part(total, inside, bias, parts, pixel_tile, channel, c_out):
    """A tile's part of the statistics: of the pixels inside the output alone."""
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside[None, :], total, 0.0), 1) / count
    # What rounding took from a mean far above the deviation.
    mean += tl.sum(tl.where(inside[None, :], total - mean[:, None], 0.0), 1) / count
    deviation = tl.where(inside[None, :], total - mean[:, None], 0.0)
    m2 = tl.sum(deviation * deviation, 1)
    known = channel < c_out
    if bias is not None:
        mean += tl.load(bias + channel, known, other=0.0).to(tl.float32)
    row = parts + pixel_tile.to(tl.int64) * 3 * c_out + channel
    tl.store(row, tl.zeros_like(mean) + count, known)
    tl.store(row + c_out, mean, known)
    tl.store(row + 2 * c_out, m2, known)


@triton.jit
def _round_to_bf16(z):
    """Round fp32 to what bf16 holds, to nearest even: the interpreter's conversion cuts off."""
    bits = z.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(z == z, rounded.to(tl.float32, bitcast=True), z)


@triton.jit
def _activate(z, negative_slope, ACTIVATION: tl.constexpr):
    """The activation by name, with NaN passing through as in PyTorch."""
    if ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * negative_slope)
    elif ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z
