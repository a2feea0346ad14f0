"""From a call's shapes and strides to what is launched. Reads no tensor's data and needs no GPU.

The sizes may be symbolic, where a graph is traced for any batch. A choice of speed then goes by the example at hand and
holds for every size; only what makes an answer right or wrong is asked of the symbols themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pointfuse.backends import calls
from pointfuse.backends.triton.configs import Chip, Config, ShapeClass, Table, choose

# A tensor descriptor loads a box of pixels. Where boxes cover this much more than the output, consecutive pixels, which
# are gathered, waste less.
_MOST_BOX_WASTE = 1.15
# Channels that a program of `finish_split` finishes.
_FINISHED_CHANNELS = 16
_FINISH_CONSTANTS = (
    "ACTIVATION", "ACT_ADD", "BLOCK_CHANNELS", "BLOCK_PIXELS", "BOX_N", "BOX_H", "BOX_W", "SPLIT_K", "INTERPRETED",
)  # fmt: skip
# Of a multiprocessor, and what a thread needs for addresses and such.
_REGISTERS = 1 << 16
_REGISTERS_BESIDE_SUMS = 100
_INT32 = 1 << 31

Box = tuple[int, int, int]


@dataclass(frozen=True)
class Plane:
    """Images, rows and columns of a convolution's input and output, as the kernel walks over them.

    ``x``, ``y`` and ``residual`` are the strides in elements of images, channels, rows and columns.
    """

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    x: tuple[int, ...]
    y: tuple[int, ...]
    residual: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        shape: the class it belongs to.
        config: the configuration chosen, ``split_k`` being the parts it is really split into.
        plane: what the kernel walks over.
        box: images, rows and columns of a tile's pixels; zeros for consecutive pixels.
        grid: programs of ``conv_bn_act``.
        pixel_tiles: tiles that the output's pixels take, each with its part of the statistics.
        finish_grid: programs of ``finish_split``; 0 where the sum is not split.
        partials: fp32 numbers that the parts take in memory; 0 where the sum is not split.
        integers: the kernel's arguments that are numbers of the problem, by name, in its order.
        constants: its arguments that are compiled in, by name, in its order.
        finish_constants: those of ``finish_split``; empty where the sum is not split.
    """

    shape: ShapeClass
    config: Config
    plane: Plane
    box: Box
    grid: int
    pixel_tiles: int
    finish_grid: int
    partials: int
    integers: dict[str, int]
    constants: dict[str, Any]
    finish_constants: dict[str, Any]

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options for ``conv_bn_act``."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def __str__(self) -> str:
        c = self.config
        box = "boxes of {}x{}x{} pixels".format(*self.box) if any(self.box) else "consecutive pixels"
        loads = [n for n in ("x", "weight") if self.constants[f"DESCRIBE_{n.upper()}"]]
        return (
            f"{self.shape}: tile {c.block_channels}x{c.block_pixels}x{c.block_k}, {c.stages} stages, {c.warps} warps, "
            f"{box}{f', K split by {c.split_k}' if c.split_k > 1 else ''}, grid {self.grid}"
            f"{', ' + ' and '.join(loads) + ' by descriptor' if loads else ''}"
        )


def shape_class(x: Tensor, weight: Tensor, config: int, y: Tensor) -> ShapeClass:
    """The class of a call, from its tensors' shapes and the example of symbolic ones."""
    kernel = "x".join(str(int(n)) for n in weight.shape[2:])
    layout = "channels_last" if x.stride(1) == 1 or x.shape[1] == 1 else "NCHW"
    pixels = _example(y.shape[0]) * _example(y.shape[2]) * _example(y.shape[3])
    return ShapeClass.of(kernel, layout, _products(x, config), max(1, pixels), weight.shape[0], weight.shape[1])


def plan(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    y: Tensor,
    config: int,
    chip: Chip,
    measured: Table,
    *,
    aligned: tuple[bool, ...],
    interpreted: bool = False,
    tile: Config | None = None,
    whole: bool = False,
) -> Plan:
    """The plan of a call.

    Args:
        x: ``[batch, c_in, height, width]``.
        weight: ``[c_out, c_in, kernel_h, kernel_w]`` in channels_last.
        residual: of the output's shape, or ``None``.
        y: ``[batch, c_out, h_out, w_out]``, the output, none of whose sizes is 0.
        config: the call's stride, padding, epilogue and flags, as ``backends.calls`` packs them.
        chip: the GPU.
        measured: this machine's table of configurations.
        aligned: whether ``x`` and the weight begin at multiples of 16 bytes.
        interpreted: whether Triton's interpreter runs it.
        tile: a configuration to use instead of the tables'.
        whole: whether the sum over K may not be split, as where statistics are taken of it.
    """
    stride, padding = calls.stride_and_padding(config)
    shape = shape_class(x, weight, config, y)
    found = tile or choose(shape, chip, measured)
    kernel_h, kernel_w = weight.shape[2:]
    c_out, c_in = weight.shape[:2]
    plane = _plane(x, y, residual, pointwise=shape.taps == 1 and stride == (1, 1) and padding == (0, 0))
    even_k = bool(c_in % found.block_k == 0)

    box: Box = (1, 1, found.block_pixels) if _is_row(plane) else (0, 0, 0)
    describe_x = chip.descriptors and aligned[0] and stride == (1, 1) and _describable(x, plane)
    if describe_x and not any(box):
        box = _best_box(plane, found.block_pixels)
        describe_x = any(box)
    if not any(box) and _example(plane.out_width) >= _INT32 - found.block_pixels:
        # Consecutive pixels are counted from the beginning of a row in 32 bits.
        box = (1, 1, found.block_pixels)
    pitch = c_in * x.element_size()
    # Past its last channel a row of the weight goes on with the next tap.
    describe_weight = bool(chip.descriptors and aligned[1] and pitch % 16 == 0 and (even_k or shape.taps == 1))

    pixel_tiles = _pixel_tiles(plane, box, found.block_pixels)
    tiles = _ceil(c_out, found.block_channels) * pixel_tiles
    parts = 1 if whole else min(found.split_k, _ceil(c_in, found.block_k) * shape.taps)
    found = replace(found, split_k=parts)
    jobs = tiles * parts
    grid = torch.sym_min(jobs, _resident(found, shape, chip)) if describe_x or describe_weight else jobs

    act_add = residual is not None and calls.residual_order_of(config) == "act_add"
    constants = {
        "TAPS_H": kernel_h,
        "TAPS_W": kernel_w,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "ACTIVATION": calls.activation_of(config),
        "ACT_ADD": act_add,
        "PRECISION": "tf32x3" if shape.products == "fp32" else "tf32",
        "BLOCK_CHANNELS": found.block_channels,
        "BLOCK_PIXELS": found.block_pixels,
        "BLOCK_K": found.block_k,
        "BOX_N": box[0],
        "BOX_H": box[1],
        "BOX_W": box[2],
        "SPLIT_K": parts,
        "EVEN_K": even_k,
        "DESCRIBE_X": describe_x,
        "DESCRIBE_WEIGHT": describe_weight,
        "FLATTEN": found.flatten,
        "INTERPRETED": interpreted,
    }
    finish_constants = {name: constants[name] for name in _FINISH_CONSTANTS} | {"ROWS": _FINISHED_CHANNELS}
    return Plan(
        shape=shape,
        config=found,
        plane=plane,
        box=box,
        grid=grid,
        pixel_tiles=pixel_tiles,
        finish_grid=tiles * (found.block_channels // _FINISHED_CHANNELS) if parts > 1 else 0,
        partials=jobs * found.block_channels * found.block_pixels if parts > 1 else 0,
        integers=_integers(plane, c_in, c_out),
        constants=constants,
        finish_constants=finish_constants if parts > 1 else {},
    )


def _plane(x: Tensor, y: Tensor, residual: Tensor | None, pointwise: bool) -> Plane:
    """The images and planes, as one row of pixels as far as a pointwise convolution's strides allow."""
    batch, _, height, width = x.shape
    out_height, out_width = y.shape[2:]
    tensors = [x, y] if residual is None else [x, y, residual]
    strides = [list(t.stride()) for t in tensors]
    if pointwise and (height == 1 or all(s[2] == width * s[3] for s in strides)):
        height, width = 1, height * width
        if all(s[0] == width * s[3] for s in strides) or batch == 1:
            batch, width = 1, batch * width
            for s in strides:
                s[0] = s[3]
        elif type(width) is int and width == 1:
            # Images of one pixel each: walk over the images.
            batch, width = 1, batch
            for s in strides:
                s[3] = s[0]
        for s in strides:
            s[2] = s[3]
        out_height, out_width = 1, width
    x_strides, y_strides, *rest = (tuple(s) for s in strides)
    return Plane(batch, height, width, out_height, out_width, x_strides, y_strides, rest[0] if rest else y_strides)


def _is_row(plane: Plane) -> bool:
    return type(plane.height) is int and plane.height == 1 and type(plane.out_height) is int and plane.out_height == 1


def _describable(x: Tensor, plane: Plane) -> bool:
    """Whether a tensor descriptor can name ``x``: channels side by side, other strides of 16 bytes, 32-bit sizes."""
    step = 16 // x.element_size()
    pitches = (plane.x[0], plane.x[2], plane.x[3])
    sizes = (plane.batch, plane.height, plane.width)
    return bool(
        plane.x[1] == 1
        and all(p % step == 0 and p > 0 for p in pitches)
        and all(_example(n) < _INT32 for n in sizes)
        and all(_example(p) * x.element_size() < 1 << 40 for p in pitches)
    )


def _best_box(plane: Plane, pixels: int) -> Box:
    """The box of so many pixels that covers the output with the fewest, or zeros where even that wastes too many."""
    n, h, w = (_example(size) for size in (plane.batch, plane.out_height, plane.out_width))
    boxes = [
        (pixels >> i >> j, 1 << i, 1 << j) for i in range(pixels.bit_length()) for j in range(pixels.bit_length() - i)
    ]
    covered = {box: math.prod(_ceil(size, b) * b for size, b in zip((n, h, w), box, strict=True)) for box in boxes}
    # Of equals the one with the longest rows.
    best = min(boxes, key=lambda box: (covered[box], -box[2], -box[1]))
    return best if covered[best] <= _MOST_BOX_WASTE * n * h * w else (0, 0, 0)


def _pixel_tiles(plane: Plane, box: Box, block_pixels: int) -> int:
    if not any(box):
        return _ceil(plane.batch * plane.out_height * plane.out_width, block_pixels)
    sizes = (plane.batch, plane.out_height, plane.out_width)
    tiles = 1
    for size, extent in zip(sizes, box, strict=True):
        tiles = tiles * _ceil(size, extent)
    return tiles


def _resident(config: Config, shape: ShapeClass, chip: Chip) -> int:
    """Blocks that the chip runs at once, as shared memory and registers allow; their number need not be exact."""
    by_memory = chip.shared_bytes // config.shared_bytes(shape)
    registers = min(255, _REGISTERS_BESIDE_SUMS + config.accumulators)
    by_registers = _REGISTERS // (32 * config.warps * registers)
    return chip.processors * max(1, min(by_memory, by_registers))


def _integers(plane: Plane, c_in: int, c_out: int) -> dict[str, int]:
    strides = {
        f"{name}_{axis}": stride
        for name, whole in (("x", plane.x), ("y", plane.y), ("residual", plane.residual))
        for axis, stride in zip("nchw", whole, strict=True)
    }
    return {
        "batch": plane.batch,
        "c_in": c_in,
        "height": plane.height,
        "width": plane.width,
        "c_out": c_out,
        "out_height": plane.out_height,
        "out_width": plane.out_width,
        **strides,
    }


def _products(x: Tensor, config: int) -> str:
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if calls.allows_tf32(config) else "fp32"


def _example(size: Any) -> int:
    """A size, or the example that a symbolic one was traced with, so that choosing by it restricts nothing."""
    if type(size) is int:
        return size
    hint = size.node.hint
    return 1 << 16 if hint is None else int(hint)


def _ceil(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether tensors begin at multiples of 16 bytes; of traced ones, whether their storage would have to."""
    return tuple(
        (t.data_ptr() if type(t) in calls.PLAIN else t.storage_offset() * t.element_size()) % 16 == 0 for t in tensors
    )
