"""The planner: every plan covers the output exactly once, fits the device, and indexes as convolution is defined."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_module import load_planner
from pointfuse import plans
from pointfuse.plans import Convolution
from pointfuse.problem import Geometry

HEADS = {13: (1024, 512, 1024), 26: (768, 256, 512), 52: (384, 128, 256)}
# Kernel, stride, padding, c_in, c_out, plane.
RESNET50 = [
    (7, 2, 3, 3, 64, 224),
    (1, 1, 0, 64, 64, 56),
    (3, 1, 1, 64, 64, 56),
    (1, 1, 0, 64, 256, 56),
    (1, 2, 0, 256, 512, 56),
    (3, 2, 1, 128, 128, 56),
    (1, 1, 0, 512, 2048, 7),
    (3, 1, 1, 512, 512, 7),
]
INCEPTION = [
    (1, 1, 0, 64, 80, 73),
    (1, 1, 0, 75, 255, 7),
    (1, 1, 0, 1088, 2080, 17),
    (1, 1, 0, 2080, 192, 8),
    (3, 1, 1, 24, 80, 35),
    (3, 2, 0, 320, 384, 35),
    (3, 1, 1, 255, 75, 13),
    (1, 1, 0, 1088, 24, 17),
    (3, 2, 0, 8, 8, 224),
]


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    return load_planner()


@pytest.fixture(scope="module")
def seen() -> set[tuple[int, ...]]:
    """Schedules that were checked; they depend on a few numbers of a plan alone."""
    return set()


def conv(
    kernel: int,
    stride: int,
    padding: int,
    c_in: int,
    c_out: int,
    plane: int,
    batch: int = 1,
    residual: str | None = None,
) -> Convolution:
    geometry = Geometry((stride, stride), (padding, padding))
    return Convolution(
        (batch, c_in, plane, plane), c_out, (kernel, kernel), geometry, False, True, "leaky_relu", residual
    )


def head_layers(plane: int, batch: int, c_head: int = 75) -> list[Convolution]:
    """The seven last layers of a YOLOv3 head."""
    c_in, f0, f1 = HEADS[plane]
    layers = []
    for start in (c_in, f1, f1):
        layers += [conv(1, 1, 0, start, f0, plane, batch), conv(3, 1, 1, f0, f1, plane, batch)]
    return [*layers, conv(1, 1, 0, f1, c_head, plane, batch)]


def known_layers() -> list[Convolution]:
    layers = [c for plane, batch in itertools.product(HEADS, (1, 8, 64)) for c in head_layers(plane, batch)]
    layers += [conv(1, 1, 0, f1, 255, plane) for plane, (_, _, f1) in HEADS.items()]
    layers += [conv(*numbers, batch=batch) for numbers in RESNET50 + INCEPTION for batch in (1, 8)]
    layers += [
        conv(3, 1, 1, 32, 64, 208, batch=8, residual="act_add"),
        conv(1, 1, 0, 1, 1, 1),
        conv(3, 1, 1, 3, 32, 416),
    ]
    return list(dict.fromkeys(layers))


def problems() -> Iterator[Any]:
    for layer in known_layers():
        for dtype, channels_last in itertools.product(plans.DTYPES, (True, False)):
            yield plans.problem(layer, dtype, channels_last)


def candidates(planner: ModuleType, problem: Any, device: Any) -> Iterator[Any]:
    """The plans of every kernel, tile and split that take the problem."""
    for kernel, tiles in ((planner.Kernel.sm_90, planner.SM90_TILES), (planner.Kernel.sm_80, planner.SM80_TILES)):
        for tile, split_k in itertools.product(range(tiles), planner.SPLITS):
            plan = planner.make_plan(problem, device, kernel, tile, split_k)
            if plan.refusal is None:
                yield plan


def devices(planner: ModuleType) -> dict[str, Any]:
    return {name: planner.device_by_name(name) for name in planner.device_names()}


# What a plan must be, as assertions.


def assert_fits(planner: ModuleType, problem: Any, device: Any, plan: Any) -> None:
    blocks = planner.occupancy(plan, device)
    registers = planner.registers_per_thread(plan)
    assert blocks >= 1
    assert plan.threads % 32 == 0
    assert 32 <= plan.threads <= 1024
    assert plan.shared_bytes <= device.shared_bytes_per_block
    assert blocks * (plan.shared_bytes + 1024) <= device.shared_bytes_per_multiprocessor
    assert blocks * plan.threads <= (1536 if device.architecture in (86, 89, 120) else 2048)
    assert blocks * plan.threads * registers <= 65536
    assert 16 <= registers <= 255
    assert plan.shared_bytes >= plan.stages * (plan.block_channels + plan.block_pixels) * 128
    assert plan.block_k * (4 if problem.dtype == planner.DType.float32 else 2) == 128
    assert 1 <= plan.grid <= 2**31 - 1
    steps = math.ceil(problem.c_in / plan.block_k) * problem.kernel_h * problem.kernel_w
    assert planner.k_steps(problem, plan.block_k) == steps
    assert 1 <= plan.split_k <= steps
    assert plan.predicted_us >= plan.floor_us > 0
    tiles = plan.channel_tiles * plan.pixel_tiles
    if plan.kernel == planner.Kernel.sm_90:
        assert device.architecture == 90
        assert plan.cluster == plan.split_k in (1, 2, 4, 8)
        assert plan.grid % plan.cluster == 0
        assert plan.grid <= device.multiprocessors * blocks
        assert plan.workspace_bytes == 0
    else:
        assert plan.cluster == 1
        assert plan.grid == tiles * plan.split_k
        area = plan.block_channels * plan.block_pixels
        assert plan.workspace_bytes == (0 if plan.split_k == 1 else 4 * area * tiles * plan.split_k)


def assert_covers_once(planner: ModuleType, problem: Any, plan: Any, seen: set[tuple[int, ...]]) -> None:
    """Each tile and split falls to one block, and the tiles' rectangles partition [c_out] x [plane, pixels]."""
    per_plane, rest = divmod(problem.pixels, plan.planes)
    assert rest == 0
    assert plan.planes in (1, problem.batch)
    shape = (problem.c_out, per_plane, plan.planes, plan.block_channels, plan.block_pixels)
    if shape not in seen:
        seen.add(shape)
        assert_partition(planner, plan, problem.c_out, per_plane)
    assert_every_tile_once(planner, plan, seen)


def assert_partition(planner: ModuleType, plan: Any, c_out: int, per_plane: int) -> None:
    count = plan.channel_tiles * plan.pixel_tiles
    plane_tiles = -(-per_plane // plan.block_pixels)
    tiles = interesting(count, plan.channel_tiles * plane_tiles)
    channel, plane, pixel = planner.decode_tiles(plan, tiles).T
    assert plan.channel_tiles == -(-c_out // plan.block_channels)
    assert plan.pixel_tiles == plan.planes * plane_tiles
    assert (channel % plan.block_channels == 0).all()
    assert (pixel % plan.block_pixels == 0).all()
    assert (channel >= 0).all()
    assert (channel < c_out).all()
    assert (pixel >= 0).all()
    assert (pixel < per_plane).all()
    # The numbering is a bijection: the tile comes back, channels fastest.
    pixel_tile = plane * plane_tiles + pixel // plan.block_pixels
    assert (pixel_tile * plan.channel_tiles + channel // plan.block_channels == tiles).all()


def assert_every_tile_once(planner: ModuleType, plan: Any, seen: set[tuple[int, ...]]) -> None:
    """As the kernels' loop does it: block, then every tile_stride-th tile."""
    count = plan.channel_tiles * plan.pixel_tiles
    key = (count, plan.split_k, plan.grid)
    if key in seen:
        return
    seen.add(key)
    stride = planner.tile_stride(plan)
    assert stride * plan.split_k == plan.grid
    assert stride <= count
    blocks = np.arange(plan.grid) if plan.grid <= 1 << 18 else interesting(plan.grid, plan.split_k)
    first, split = planner.blocks(plan, blocks).T
    # Blocks are a bijection to (split, first tile below stride), splits fastest, so that every tile has one.
    assert (first * plan.split_k + split == blocks).all()
    assert (split < plan.split_k).all()
    assert (first < stride).all()
    if count * plan.split_k <= 1 << 12:
        tile = first + stride * np.arange(-(-count // stride))[:, None]
        work = (tile * plan.split_k + split)[tile < count]
        assert (np.bincount(work, minlength=count * plan.split_k) == 1).all()


def interesting(count: int, period: int) -> Any:
    """All indices below ``count``, or, of many, those at both ends and about multiples of ``period``."""
    if count <= 1 << 14:
        return np.arange(count)
    around = np.arange(-3, 4)
    multiples = np.linspace(0, count // period, 50, dtype=np.int64)[:, None] * period + around
    found = np.concatenate([np.arange(2000), count - 1 - np.arange(2000), multiples.ravel()])
    return np.unique(found[(found >= 0) & (found < count)])


@functools.cache
def assert_ranges(steps: int, split_k: int) -> None:
    planner = load_planner()
    ranges = [planner.split_range(steps, split_k, split) for split in range(split_k)]
    assert [k for begin, end in ranges for k in range(begin, end)] == list(range(steps))
    lengths = [end - begin for begin, end in ranges]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


# The promises.


@pytest.mark.parametrize("name", load_planner().device_names())
def test_every_plan_of_known_layers_fits_and_covers_once(
    name: str, planner: ModuleType, seen: set[tuple[int, ...]]
) -> None:
    device = planner.device_by_name(name)
    made = 0
    for problem in problems():
        for plan in candidates(planner, problem, device):
            assert_fits(planner, problem, device, plan)
            assert_covers_once(planner, problem, plan, seen)
            assert_ranges(planner.k_steps(problem, plan.block_k), plan.split_k)
            made += 1
    assert made > 5000


@settings(max_examples=300)
@given(data=st.data())
def test_any_plan_fits_and_paints_every_output_once_per_split(data: st.DataObject, planner: ModuleType) -> None:
    """Literally: add 1 to every output of every block's tiles, and each output counts its splits."""
    problem = data.draw(small_problems())
    device = planner.device_by_name(data.draw(st.sampled_from(planner.device_names())))
    made = list(candidates(planner, problem, device))
    assert made
    plan = data.draw(st.sampled_from(made))
    assert_fits(planner, problem, device, plan)
    painted = np.zeros((problem.c_out, plan.planes, problem.pixels // plan.planes), int)
    blocks = planner.blocks(plan, np.arange(plan.grid))
    splits = {tile: set() for tile in range(plan.channel_tiles * plan.pixel_tiles)}
    for first, split in blocks:
        for tile in range(first, plan.channel_tiles * plan.pixel_tiles, planner.tile_stride(plan)):
            ((channel, plane, pixel),) = planner.decode_tiles(plan, [tile])
            painted[channel : channel + plan.block_channels, plane, pixel : pixel + plan.block_pixels] += 1
            splits[tile].add(split)
    assert (painted == plan.split_k).all()
    assert all(found == set(range(plan.split_k)) for found in splits.values())


@st.composite
def small_problems(draw: st.DrawFn) -> Any:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size, padding = draw(st.integers(kernel, 40)), draw(st.integers(0, 1))
    channels = st.sampled_from([1, 3, 8, 24, 75, 80, 255, 256])
    layer = conv(
        kernel, stride, padding, draw(channels), draw(channels), size, draw(st.integers(1, 5)),
        draw(st.sampled_from([None, "add_act", "act_add"])),
    )  # fmt: skip
    return plans.problem(layer, draw(st.sampled_from(list(plans.DTYPES))), draw(st.booleans()))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 72, 1000])
def test_split_ranges_partition_the_k_steps(steps: int) -> None:
    for split_k in range(1, min(steps, 40) + 1):
        assert_ranges(steps, split_k)


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("c_in", [1, 3, 32, 63, 64, 65, 255, 256])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (7, 1)])
def test_k_steps_name_every_tap_and_input_channel_once(
    kernel: tuple[int, int], c_in: int, dtype: str, planner: ModuleType
) -> None:
    layer = Convolution((1, c_in, 9, 9), 8, kernel, Geometry(), False, True, "relu", None)
    problem = plans.problem(layer, dtype)
    block_k = 128 // (2 if dtype in ("bf16", "fp16") else 4)
    steps = planner.decode_k_steps(problem, block_k, np.arange(planner.k_steps(problem, block_k)))
    taken = [(tap_h, tap_w, c) for tap_h, tap_w, start in steps for c in range(start, min(start + block_k, c_in))]
    assert taken == list(itertools.product(range(kernel[0]), range(kernel[1]), range(c_in)))


@pytest.mark.parametrize(("kernel_h", "kernel_w"), [(1, 1), (3, 3), (1, 7), (2, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 2)])
@pytest.mark.parametrize("plane", [(7, 7), (8, 13), (4, 40)])
def test_im2col_is_the_definition(
    kernel_h: int, kernel_w: int, stride: Any, padding: Any, plane: Any, planner: ModuleType
) -> None:
    """Against torch's unfold of an image whose pixels are numbered from 1, so that 0 is padding."""
    batch, (height, width) = 3, plane
    layer = Convolution(
        (batch, 5, height, width), 8, (kernel_h, kernel_w), Geometry(stride, padding), False, True, "relu", None
    )
    problem = plans.problem(layer)
    image = torch.arange(1, batch * height * width + 1, dtype=torch.float64).view(batch, 1, height, width)
    expected = F.unfold(image, (kernel_h, kernel_w), 1, padding, stride).transpose(0, 1).flatten(1).long().numpy()
    pixels = np.arange(problem.pixels)
    assert expected.shape == (kernel_h * kernel_w, problem.pixels)
    n, h, w = planner.decode_pixels(problem, pixels).T
    assert ((n * problem.out_height + h) * problem.out_width + w == pixels).all()
    for tap, (tap_h, tap_w) in enumerate(itertools.product(range(kernel_h), range(kernel_w))):
        x, y, inside = planner.input_pixels(problem, pixels, tap_h, tap_w).T
        found = np.where(inside, (n * height + x) * width + y + 1, 0)
        assert (found == expected[tap]).all()


@given(data=st.data())
def test_element_offsets_are_torchs(data: st.DataObject, planner: ModuleType) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 4))
    order = data.draw(st.permutations(range(4)))
    tensor = torch.empty(*(shape[i] for i in order)).permute(*np.argsort(order).tolist())
    assert tensor.shape == shape
    index = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    assert planner.element_offset(tensor.stride(), index) == tensor[index].storage_offset()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_problems_strides_are_torchs(channels_last: bool, planner: ModuleType) -> None:
    problem = plans.problem(conv(3, 2, 1, 6, 10, 9, batch=2, residual="add_act"), "fp16", channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(2, 6, 9, 9, memory_format=memory_format)
    module = torch.nn.Conv2d(6, 10, 3, stride=2, padding=1).to(memory_format=memory_format)
    y = module(x)
    assert problem.x == x.stride()
    assert problem.weight == module.weight.stride()
    assert problem.y == problem.residual_strides == y.stride()
    assert (problem.out_height, problem.out_width) == y.shape[2:]
    assert problem.pixels == 2 * 5 * 5


def test_the_swizzle_permutes_and_avoids_bank_conflicts(planner: ModuleType) -> None:
    offsets = np.array([[planner.swizzled_offset(row, byte) for byte in range(128)] for row in range(64)])
    assert sorted(offsets.ravel()) == list(range(64 * 128))
    assert (offsets // 128 == np.arange(64)[:, None]).all()
    assert (offsets % 16 == np.arange(128) % 16).all()
    # Eight rows' equal 16-byte chunks, as ldmatrix reads and wgmma expects them, lie in the 32 banks once each.
    for start, chunk in itertools.product(range(0, 64, 8), range(8)):
        banks = offsets[start : start + 8, chunk * 16 : chunk * 16 + 16 : 4] // 4 % 32
        assert sorted(banks.ravel()) == list(range(32))


# Vectors.


def address_steps(ranges: tuple[range, ...], strides: tuple[int, ...]) -> Any:
    """Offsets in elements of all positions of the given dimensions."""
    total = np.zeros(1, int)
    for positions, stride in zip(ranges, strides, strict=True):
        total = (total[:, None] + np.array(positions) * stride).ravel()
    return total


SIZE = st.sampled_from([1, 2, 3, 4, 8, 16])
PITCH = st.sampled_from([0, 1, 2, 4, 6, 8, 16, 24, 40, 64])
ALIGNMENT = st.sampled_from([2, 4, 8, 16])


@st.composite
def strided_problems(draw: st.DrawFn, planner: ModuleType) -> Any:
    """Small problems with any strides, which may overlap, and any alignment."""
    problem = plans.problem(conv(1, 1, 0, 8, 8, 4), draw(st.sampled_from(["bf16", "fp32"])))
    problem.batch, problem.c_in, problem.c_out = draw(SIZE), draw(SIZE), draw(SIZE)
    problem.height, problem.width = draw(SIZE), draw(SIZE)
    problem.padding_h, problem.padding_w = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    unit = 4 if problem.dtype == planner.DType.float32 else 2
    for name in ("x", "weight", "y", "residual_strides"):
        strides = [draw(PITCH) for _ in range(4)]
        if draw(st.booleans()):
            strides[draw(st.sampled_from([1, 3]))] = 1
        if draw(st.booleans()):
            strides[2] = strides[3] * (problem.width if name == "x" else problem.out_width)
        setattr(problem, name, tuple(strides))
        setattr(problem, f"{name.removesuffix('_strides')}_alignment", max(unit, draw(ALIGNMENT)))
    problem.residual = draw(st.sampled_from([planner.Residual.none, planner.Residual.add_act]))
    return problem


@settings(max_examples=600)
@given(data=st.data())
def test_copies_are_aligned_and_as_wide_as_they_may_be(data: st.DataObject, planner: ModuleType) -> None:
    problem = data.draw(strided_problems(planner))
    unit = 4 if problem.dtype == planner.DType.float32 else 2
    plan = planner.make_plan(problem, planner.device_by_name("a100"), planner.Kernel.sm_80, 0, 1)
    assert plan.refusal is None
    assert plan.vectorised == (plan.x_vector == 16 and plan.weight_vector == 16)
    # Rows of zeros have addresses too: those of the padding, and of channels beyond c_out.
    height, width = (
        range(-padding, size + padding)
        for size, padding in ((problem.height, problem.padding_h), (problem.width, problem.padding_w))
    )
    for vector, alignment, strides, rows in (
        (plan.x_vector, problem.x_alignment, problem.x, (range(problem.batch), height, width)),
        (plan.weight_vector, problem.weight_alignment, problem.weight, (range(64), range(1), range(1))),
    ):
        outer, channel, *plane = strides
        starts = alignment + unit * address_steps(rows, (outer, *plane))

        def allowed(wide: int, starts: Any = starts, channel: int = channel) -> bool:
            contiguous = problem.c_in == 1 or channel == 1
            return contiguous and wide in (4, 8, 16) and bool((starts % wide == 0).all())

        assert vector == max([wide for wide in (4, 8, 16) if allowed(wide)], default=unit)


@settings(max_examples=600)
@given(data=st.data())
def test_stores_are_aligned_whole_and_as_wide_as_they_may_be(data: st.DataObject, planner: ModuleType) -> None:
    problem = data.draw(strided_problems(planner))
    unit = 4 if problem.dtype == planner.DType.float32 else 2
    plan = planner.make_plan(problem, planner.device_by_name("a100"), planner.Kernel.sm_80, 0, 1)
    tensors = [(problem.y, problem.y_alignment)]
    if problem.residual != planner.Residual.none:
        tensors.append((problem.residual_strides, problem.residual_alignment))

    def allowed(wide: int) -> bool:
        return all(store_allowed(problem, unit, strides, at, plan.y_pixel_major, wide) for strides, at in tensors)

    assert plan.y_vector == max(wide for wide in (unit, 4, 8, 16) if wide == unit or allowed(wide))


def store_allowed(problem: Any, unit: int, strides: Any, alignment: int, along_pixels: bool, wide: int) -> bool:
    """Whether vectors of ``wide`` bytes tile every row of channels, or every run of pixels, at aligned addresses."""
    outer, channel, height, width = strides
    batch, channels = range(problem.batch), range(problem.c_out)
    if not along_pixels:
        length, step = problem.c_out, channel
        rows = address_steps((batch, range(problem.out_height), range(problem.out_width)), (outer, height, width))
    else:
        step = 1 if problem.out_width == 1 else width
        if problem.out_height == 1 or height == problem.out_width:
            length, rows = problem.out_height * problem.out_width, address_steps((batch, channels), (outer, channel))
        else:
            length = problem.out_width
            rows = address_steps((batch, channels, range(problem.out_height)), (outer, channel, height))
    aligned = ((alignment + unit * rows) % wide == 0).all()
    return step == 1 and length > 1 and length * unit % wide == 0 and aligned


def test_the_layout_decides_along_what_vectors_run(planner: ModuleType) -> None:
    device = planner.device_by_name("a100")

    def vectors(channels_last: bool, c_in: int = 64, c_out: int = 64, plane: int = 16) -> tuple[Any, ...]:
        problem = plans.problem(conv(1, 1, 0, c_in, c_out, plane), "bf16", channels_last)
        plan = planner.make_plan(problem, device, planner.Kernel.sm_80, 0, 1)
        return plan.x_pixel_major, plan.x_vector, plan.weight_vector, plan.y_pixel_major, plan.y_vector

    assert vectors(True) == (False, 16, 16, False, 16)
    assert vectors(False) == (True, 2, 16, True, 16)
    assert vectors(True, c_out=75) == (False, 16, 16, False, 2)
    assert vectors(True, c_out=1088) == (False, 16, 16, False, 16)
    assert vectors(True, c_in=75) == (False, 2, 2, False, 16)
    assert vectors(False, plane=13) == (True, 2, 16, True, 2)
    assert vectors(False, plane=26) == (True, 2, 16, True, 8)


# Sizes past 2^31.


def test_pixels_past_2_31_decode_exactly(planner: ModuleType) -> None:
    batch, height, width = 200, 8192, 8191
    layer = Convolution((batch, 8, height, width), 8, (3, 3), Geometry((1, 1), (1, 1)), False, True, "relu", None)
    problem = plans.problem(layer)
    plane = height * width
    total = batch * plane
    assert problem.pixels == total > 3 * 2**32
    near = [power + i for power in (0, 2**31, 2**32, 3 * 2**32, total) for i in (-2, -1, 0, 1)]
    pixels = [p for p in near if 0 <= p < total] + [n * plane + i for n in range(1, batch) for i in (-1, 0)]
    for p, (n, h, w) in zip(pixels, planner.decode_pixels(problem, pixels), strict=True):
        assert (n, h, w) == (p // plane, p // width % height, p % width)


def test_tensors_past_2_31_elements_are_planned_without_overflow(planner: ModuleType) -> None:
    for batch, plane, c_in, c_out in ((64, 4096, 64, 64), (64, 8192, 256, 2080), (2**33, 1, 8, 8), (1, 2**20, 8, 8)):
        layer = Convolution((batch, c_in, plane, plane), c_out, (1, 1), Geometry(), False, True, "relu", None)
        problem = plans.problem(layer)
        pixels = batch * plane * plane
        for device in (planner.device_by_name("h100"), planner.device_by_name("a100")):
            plan = planner.select_plan(problem, device)
            if math.ceil(c_out / 128) * math.ceil(pixels / 128) >= 2**31:
                assert plan.refusal == "the grid must have less than 2^31 blocks"
                continue
            assert_fits(planner, problem, device, plan)
            assert_partition(planner, plan, c_out, pixels)
            assert plan.channel_tiles * plan.pixel_tiles * plan.block_channels * plan.block_pixels >= pixels * c_out
            assert plan.floor_us == pytest.approx(floor(problem, device), rel=1e-5)
    last = (63, 63, 4095, 4095)
    strides = (64 * 4096 * 4096, 1, 64 * 4096, 64)
    assert planner.element_offset(strides, last) == 64 * 64 * 4096 * 4096 - 1


# Time.


def floor(problem: Any, device: Any) -> float:
    """Microseconds: FLOPs at the peak rate, or each tensor once at the bandwidth."""
    fp32 = problem.dtype.name == "float32"
    strict = max(device.fp32_tflops, device.tf32_tflops / 3)
    rate = (device.tf32_tflops if problem.tf32 else strict) if fp32 else device.half_tflops
    taps = problem.kernel_h * problem.kernel_w
    macs = problem.pixels * problem.c_out * problem.c_in * taps
    rows, columns = (
        min(size, out * kernel if stride >= kernel else (out - 1) * stride + kernel)
        for size, out, kernel, stride in (
            (problem.height, problem.out_height, problem.kernel_h, problem.stride_h),
            (problem.width, problem.out_width, problem.kernel_w, problem.stride_w),
        )
    )
    outputs = problem.pixels * problem.c_out * (1 if problem.residual.name == "none" else 2)
    elements = problem.batch * problem.c_in * rows * columns + problem.c_out * problem.c_in * taps + outputs
    return max(2e-6 * macs / rate, (4 if fp32 else 2) * elements / device.memory_gb_s * 1e-3)


def test_the_floor_is_the_roofline(planner: ModuleType) -> None:
    for device in devices(planner).values():
        for problem in problems():
            plan = planner.make_plan(problem, device, planner.Kernel.sm_80, planner.SM80_TILES - 1, 1)
            assert plan.floor_us == pytest.approx(floor(problem, device), rel=1e-5)


@pytest.mark.parametrize(
    ("plane", "floors"), [(13, (10.6, 44.6, 352.0)), (26, (6.5, 49.8, 396.0)), (52, (7.8, 61.9, 495.0))]
)
def test_the_floor_of_the_yolo_heads(plane: int, floors: tuple[float, ...]) -> None:
    """Worked out by hand for an H100, COCO's 255 output channels, batches of 1, 8 and 64."""
    load_planner()
    for batch, expected in zip((1, 8, 64), floors, strict=True):
        layers = [(str(i), c) for i, c in enumerate(head_layers(plane, batch, c_head=255))]
        assert plans.table(layers, "h100").floor_us == pytest.approx(expected, rel=0.02)


def test_the_selected_plan_is_the_cheapest_and_always_the_same(planner: ModuleType) -> None:
    for name in ("h100", "a100", "rtx-3090", "l4"):
        device = planner.device_by_name(name)
        for problem in problems():
            chosen = planner.select_plan(problem, device)
            made = list(candidates(planner, problem, device))
            cheapest = min(made, key=lambda plan: plan.predicted_us)  # the first of equals
            assert planner.describe(problem, chosen) == planner.describe(problem, cheapest)
            assert (chosen.kernel, chosen.tile, chosen.split_k) == (cheapest.kernel, cheapest.tile, cheapest.split_k)
            assert planner.describe(problem, planner.select_plan(problem, device)) == planner.describe(problem, chosen)


def test_another_process_makes_the_same_plans(planner: ModuleType) -> None:
    def describe() -> str:
        layers = [(str(i), c) for i, c in enumerate(known_layers())]
        return "\n".join(row.text for row in plans.table(layers, "h100").rows)

    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import test_planner as t\n"
        "t.load_planner()\n"
        "layers = [(str(i), c) for i, c in enumerate(t.known_layers())]\n"
        "print('\\n'.join(row.text for row in t.plans.table(layers, 'h100').rows))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(ROOT / "python")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == describe()


def test_only_hopper_runs_the_sm_90_kernel(planner: ModuleType) -> None:
    problem = plans.problem(conv(3, 1, 1, 256, 512, 26, batch=8))
    for name, device in devices(planner).items():
        chosen = planner.select_plan(problem, device)
        assert chosen.kernel.name == ("sm_90" if name in ("h100", "h100-pcie", "h200") else "sm_80"), name


def test_predictions_add_up_and_grow_with_the_work(planner: ModuleType) -> None:
    for device in devices(planner).values():
        for plane in HEADS:
            before = None
            for batch in (1, 8, 64):
                chosen = []
                for layer in head_layers(plane, batch):
                    problem = plans.problem(layer)
                    plan = planner.select_plan(problem, device)
                    cost = planner.predict(problem, device, plan)
                    busy = max(cost.arithmetic_us, cost.chip_us, cost.memory_us)
                    parts = cost.launch_us + cost.fill_us + busy + cost.epilogue_us + cost.reduction_us
                    assert plan.predicted_us == pytest.approx(parts, rel=1e-5)
                    assert cost.total_us == pytest.approx(parts)
                    assert (cost.reduction_us > 0) == (plan.split_k > 1)
                    chosen.append(plan.predicted_us)
                assert before is None or all(now >= then for now, then in zip(chosen, before, strict=True))
                before = chosen


def test_arithmetic_is_counted_by_the_busiest_multiprocessor(planner: ModuleType) -> None:
    """One tile more than there are multiprocessors doubles the time of a lone wave."""
    device = planner.device_by_name("a100")

    def arithmetic(tiles: int) -> float:
        layer = Convolution((1, 4096, 1, 128 * tiles), 128, (1, 1), Geometry(), False, True, "relu", None)
        problem = plans.problem(layer)
        plan = planner.make_plan(problem, device, planner.Kernel.sm_80, 0, 1)
        assert plan.channel_tiles * plan.pixel_tiles == tiles
        assert planner.occupancy(plan, device) == 1
        return planner.predict(problem, device, plan).arithmetic_us

    assert arithmetic(108) == arithmetic(1)
    assert arithmetic(109) == pytest.approx(2 * arithmetic(108))
    assert arithmetic(216) == arithmetic(109)


def test_batch_1_splits_k_and_batch_64_does_not(planner: ModuleType) -> None:
    device = planner.device_by_name("h100")
    few = planner.select_plan(plans.problem(conv(3, 1, 1, 512, 1024, 13)), device)
    many = planner.select_plan(plans.problem(conv(3, 1, 1, 512, 1024, 13, batch=64)), device)
    assert few.split_k > 1
    assert few.grid >= 96
    assert many.split_k == 1
    assert many.grid == 132


# What is refused, and names.


def setting(**values: Any) -> Any:
    def change(problem: Any) -> None:
        for name, value in values.items():
            setattr(problem, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason", "given"),
    [
        (setting(c_in=0), "every size must be at least 1", "1x1 0->512"),
        (setting(batch=0), "every size must be at least 1", "0x1024x13x13"),
        (setting(c_out=-1), "every size must be at least 1", "1024->-1"),
        (setting(kernel_h=0), "the kernel's sizes must be from 1 to 2^15", "0x1 1024"),
        (setting(kernel_w=2**15 + 1, width=2**16), "the kernel's sizes must be from 1 to 2^15", "1x32769"),
        (setting(stride_w=0), "strides must be at least 1", "stride 1x0"),
        (setting(padding_h=-1), "padding must be at least 0", "padding -1x0"),
        (setting(kernel_h=15), "the kernel must not be larger than the padded plane", "15x1 1024->512"),
        (setting(height=2**30 + 1), "must be at most 2^30, padding at most 2^28", "1073741825"),
        (setting(padding_w=2**29), "must be at most 2^30, padding at most 2^28", "padding 0x536870912"),
        (setting(batch=2**62), "the output must have less than 2^62 pixels", "4611686018427387904x1024"),
        (setting(x=(1, 2**62, 1, 1)), "every tensor must span less than 2^62 bytes", "x (1, 4611686018427387904, "),
        (setting(y=(0, 1, -512, 512)), "no tensor may have a negative stride", "y (0, 1, -512, 512)"),
        (setting(x_alignment=1), "every address must be a multiple of an element's size", "13312, 1024) at 1,"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_accepted_and_what_was_given(
    change: Any, reason: str, given: str, planner: ModuleType
) -> None:
    problem = plans.problem(conv(1, 1, 0, 1024, 512, 13))
    change(problem)
    for name in ("h100", "a100"):
        plan = planner.select_plan(problem, planner.device_by_name(name))
        assert plan.kernel == planner.Kernel.none
        assert reason in plan.refusal
        text = planner.describe(problem, plan)
        assert f"no plan: {plan.refusal}" in text
        assert given in text


@pytest.mark.parametrize(
    ("device", "kernel", "tile", "split_k", "reason"),
    [
        ("a100", "sm_90", 0, 1, "the sm_90 kernel needs compute capability 9.0"),
        ("b200", "sm_90", 0, 1, "the sm_90 kernel needs compute capability 9.0"),
        ("h100", "none", 0, 1, "the kernel must be sm_80 or sm_90"),
        ("h100", "sm_80", 99, 1, "the kernel has no such tile"),
        ("h100", "sm_80", -1, 1, "the kernel has no such tile"),
        ("h100", "sm_90", 99, 1, "the kernel has no such tile"),
        ("h100", "sm_80", 0, 0, "split_k must be from 1 to the k steps"),
        ("h100", "sm_80", 0, 17, "split_k must be from 1 to the k steps"),
        ("h100", "sm_90", 0, 3, "a cluster has 1, 2, 4 or 8 blocks"),
        ("h100", "sm_90", 0, 16, "a cluster has 1, 2, 4 or 8 blocks"),
    ],
)
def test_an_impossible_choice_is_refused(
    device: str, kernel: str, tile: int, split_k: int, reason: str, planner: ModuleType
) -> None:
    problem = plans.problem(conv(1, 1, 0, 1024, 512, 13))
    kernel = getattr(planner.Kernel, kernel)
    plan = planner.make_plan(problem, planner.device_by_name(device), kernel, tile, split_k)
    assert plan.kernel == planner.Kernel.none
    assert plan.refusal == reason


def test_a_device_too_small_or_too_old_is_refused(planner: ModuleType) -> None:
    problem = plans.problem(conv(1, 1, 0, 1024, 512, 13))
    old = planner.estimate_device(75, 40, 64 << 10, 64 << 10, 4 << 20, 1.59, 320.0)
    assert planner.select_plan(problem, old).refusal == "the kernels need compute capability 8.0 or more"
    small = planner.estimate_device(86, 40, 40 << 10, 48 << 10, 4 << 20, 1.59, 320.0)
    assert "more shared memory or threads" in planner.select_plan(problem, small).refusal
    # Where the large tiles do not fit, a smaller one is taken.
    middle = planner.estimate_device(86, 40, 64 << 10, 65 << 10, 4 << 20, 1.59, 320.0)
    chosen = planner.select_plan(plans.problem(conv(3, 1, 1, 1024, 1024, 56, batch=64)), middle)
    assert chosen.refusal is None
    assert chosen.shared_bytes <= 64 << 10


@pytest.mark.parametrize(
    ("name", "clock", "bandwidth"), [("a100-80gb", 1.41, 2039.0), ("h100", 1.83, 3350.0), ("rtx-3090", 1.695, 936.0)]
)
def test_an_estimated_device_is_near_its_datasheet(
    name: str, clock: float, bandwidth: float, planner: ModuleType
) -> None:
    known = planner.device_by_name(name)
    estimate = planner.estimate_device(
        known.architecture, known.multiprocessors, known.shared_bytes_per_block, known.shared_bytes_per_multiprocessor,
        known.l2_bytes, clock, bandwidth,
    )  # fmt: skip
    for rate in ("half_tflops", "tf32_tflops"):
        assert getattr(estimate, rate) == pytest.approx(getattr(known, rate), rel=0.01)
    assert estimate.fp32_tflops == pytest.approx(known.fp32_tflops, rel=0.1)
    assert estimate.l2_bytes == known.l2_bytes


def test_devices_have_names(planner: ModuleType) -> None:
    names = planner.device_names()
    assert len(set(names)) == len(names)
    assert {"h100", "h100-pcie", "h200", "a100-40gb", "a100-80gb", "a10", "l4", "rtx-3090", "rtx-4090"} <= set(names)
    assert planner.device_by_name("a100").memory_gb_s == planner.device_by_name("a100-80gb").memory_gb_s
    with pytest.raises(ValueError, match=f"there is no device 'h1000'; the names are {', '.join(names)}"):
        planner.device_by_name("h1000")
    for device in devices(planner).values():
        assert device.half_tflops > device.tf32_tflops >= device.fp32_tflops
        assert device.shared_bytes_per_block + 1024 == device.shared_bytes_per_multiprocessor


def test_a_plan_prints_what_it_is(planner: ModuleType) -> None:
    layer = conv(3, 2, 1, 24, 75, 35, batch=2, residual="act_add")
    problem = plans.problem(layer, "tf32", channels_last=False)
    text = planner.describe(
        problem, planner.make_plan(problem, planner.device_by_name("a100"), planner.Kernel.sm_80, 2, 3)
    )
    assert text.startswith(
        "3x3 24->75 stride 2x2 padding 1x1 of 2x24x35x35 float32 by TF32, batch norm leaky_relu (z) + residual: "
        "sm_80 tile 64x64x32, 4 stages, K split by 3, grid 66 of 128 threads, "
    )
    assert ", 1081344 B workspace, x along pixels by 4 B, weight by 4 B, y along pixels by 16 B; predicted " in text


# The face in Python.


def test_equal_convolutions_share_a_row_and_totals_count_them(planner: ModuleType) -> None:
    table = plans.table([(f"layer{i}", c) for i, c in enumerate(head_layers(13, 1))], "h100")
    assert [(row.name, row.count) for row in table.rows] == [("layer0", 3), ("layer1", 3), ("layer6", 1)]
    assert table.predicted_us == sum(row.count * row.predicted_us for row in table.rows)
    lines = str(table).splitlines()
    assert lines[0].split()[:3] == ["layer", "times", "convolution"]
    assert lines[1].split()[:4] == ["layer0", "3", "1x1", "1024->512"]
    assert lines[-1].startswith("7 convolutions on h100, bf16, channels_last, nothing cached: predicted ")
    data = table.to_dict()
    assert data["predicted_us"] == table.predicted_us
    assert data["rows"][1]["convolution"]["c_out"] == 1024


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (Geometry(groups=2), "groups=2: the kernels take 1"),
        (Geometry(dilation=(2, 2)), "dilation=(2, 2): the kernels take 1"),
        (Geometry(padding="same"), "padding='same': the kernels take numbers"),
    ],
)
def test_what_the_kernels_do_not_compute_has_a_reason(geometry: Geometry, reason: str, planner: ModuleType) -> None:
    layer = Convolution((1, 64, 14, 14), 64, (3, 3), geometry, True, False, "relu", None)
    table = plans.table([("a", layer), ("b", conv(1, 1, 0, 64, 64, 14))], "a100")
    assert table.rows[0].refusal == reason
    assert f"a: no plan: {reason}" in str(table)
    assert "1 convolutions on a100" in str(table)


def test_without_the_module_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pointfuse._plan", None)
    with pytest.raises(RuntimeError, match=r"has no planner .* install it where a C\+\+ compiler is found, with `pip"):
        plans.planner()
