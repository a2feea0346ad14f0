"""The Triton backend's planner: every plan covers its output once, keeps every address, and fits its chip; and the
tables of configurations from which it chooses. Tensors are meta: nothing is read, and no Triton is needed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pointfuse.backends import calls
from pointfuse.backends.triton import planning
from pointfuse.backends.triton.configs import (
    FAMILIES,
    KERNELS,
    LAYOUTS,
    PRODUCTS,
    REFERENCE_CHIPS,
    Chip,
    Config,
    Entry,
    ShapeClass,
    candidates,
    choose,
    shipped,
)
from pointfuse.backends.triton.planning import Plan, plan
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

DTYPES = {"half": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
CHIPS = {
    **REFERENCE_CHIPS,
    "sm_86": Chip.of((8, 6), 84, 99 << 10),
    "sm_89": Chip.of((8, 9), 142, 99 << 10),
    "sm_120": Chip.of((12, 0), 170, 99 << 10),
}
# c_in, f0 and f1 of YOLOv3's heads, by plane.
HEADS = {13: (1024, 512, 1024), 26: (768, 256, 512), 52: (384, 128, 256)}
SMALL = Config(16, 16, 16, 1, 4)


def meta(*shape: int, dtype: torch.dtype = torch.float16, channels_last: bool = True) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def weight_of(c_out: int, c_in: int, kernel: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return meta(c_out, c_in, kernel, kernel, dtype=dtype)


def geometry(stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0)) -> int:
    """Stride and padding as an operator's ``config`` has them."""
    return stride[0] | stride[1] << 8 | padding[0] << 16 | padding[1] << 24


SAME = geometry(padding=(1, 1))


def planned(
    x: Tensor, weight: Tensor, config: int = geometry(), chip: str | Chip = "sm_90", tile: Config | None = None,
    residual: Tensor | None = None, y: Tensor | None = None, aligned: tuple[bool, bool] = (True, True),
) -> Plan:  # fmt: skip
    y = calls.empty_output(x, weight, config) if y is None else y
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    return plan(x, weight, residual, y, config, chip, {}, aligned=aligned, tile=tile)


def lanes(plan: Plan) -> tuple[np.ndarray, ...]:
    """Image, row and column of every pixel of every tile, by the kernels' definition of a tile."""
    sizes, pixels = (plan.plane.batch, plan.plane.out_height, plan.plane.out_width), plan.config.block_pixels
    if not any(plan.box):
        flat = np.arange(-(-math.prod(sizes) // pixels) * pixels)
        return np.unravel_index(flat, (sizes[0] + pixels, *sizes[1:]))
    assert math.prod(plan.box) == pixels
    tiles = [range(0, size, extent) for size, extent in zip(sizes, plan.box, strict=True)]
    grid = np.meshgrid(*tiles, *map(np.arange, plan.box), indexing="ij")
    return tuple((first + i).reshape(-1) for first, i in zip(grid[:3], grid[3:], strict=True))


def pixel_tiles(plan: Plan) -> int:
    return len(lanes(plan)[0]) // plan.config.block_pixels


def offsets(strides: tuple[int, ...], n: np.ndarray, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    return n * strides[0] + h * strides[2] + w * strides[3]


@st.composite
def images(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, written: bool = False) -> Tensor:
    """A tensor whose dimensions lie in any order, with gaps, or, where it is only read, on top of each other."""
    strides, step = [0] * 4, 1
    for axis in draw(st.permutations(range(4))):
        strides[axis] = step
        step *= shape[axis] + draw(st.sampled_from([0, 0, 0, 1, 8]))
    if not written and draw(st.booleans()):
        strides[draw(st.integers(0, 3))] = 0
    return torch.empty(step, dtype=dtype, device="meta").as_strided(shape, strides)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, tuple[Tensor, ...], int, bool]:
    """A plan with its ``x, weight, residual, y``, its config, and whether x and the weight are aligned."""
    kernel, sizes = draw(st.sampled_from([1, 1, 3])), st.integers(1, 9)
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    padding = draw(st.sampled_from([(0, 0), (0, 0), (1, 1), (0, 2)]))
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8, 16, 24, 64])), draw(sizes), draw(sizes))
    products = draw(st.sampled_from(PRODUCTS))
    dtype = DTYPES[products]
    assume(all(size + 2 * pad >= kernel for size, pad in zip(shape[2:], padding, strict=True)))
    config = geometry(stride, padding) | (calls.TF32 if products == "tf32" else 0)
    x = draw(images(shape, dtype))
    weight = weight_of(draw(st.sampled_from([1, 16, 75])), shape[1], kernel, dtype)
    y_shape = tuple(calls.empty_output(x, weight, config).shape)
    y = draw(images(y_shape, dtype, written=True))
    residual = draw(st.none() | images(y_shape, dtype))
    tile = draw(st.none() | st.sampled_from([SMALL, replace(SMALL, block_pixels=64, split_k=8)]))
    aligned = draw(st.booleans()), draw(st.booleans())
    chip = draw(st.sampled_from(list(CHIPS)))
    made = planned(x, weight, config, chip, tile, residual, y, aligned)
    return made, (x, weight, residual, y), config, aligned


@given(plans())
def test_every_pixel_is_computed_once_from_where_it_lies(case: Any) -> None:
    """However the planes are flattened: addresses in x, in the residual and in y go together as in the tensors."""
    made, (x, _, residual, y), config, _ = case
    (stride_h, stride_w), (padding_h, padding_w) = calls.stride_and_padding(config)

    def together(n: np.ndarray, h: np.ndarray, w: np.ndarray, *strides: Any) -> Counter[tuple[int, ...]]:
        x_strides, y_strides, residual_strides = strides
        read = offsets(x_strides, n, h * stride_h - padding_h, w * stride_w - padding_w)
        triples = (offsets(y_strides, n, h, w), read, offsets(residual_strides, n, h, w))
        return Counter(zip(*(t.tolist() for t in triples), strict=True))

    n, h, w = lanes(made)
    inside = (n < made.plane.batch) & (h < made.plane.out_height) & (w < made.plane.out_width)
    walked = together(n[inside], h[inside], w[inside], made.plane.x, made.plane.y, made.plane.residual)
    n, h, w = (axis.reshape(-1) for axis in np.indices((y.shape[0], *y.shape[2:])))
    added = y.stride() if residual is None else residual.stride()
    assert walked == together(n, h, w, x.stride(), y.stride(), added)
    assert max(walked.values()) == 1


@given(plans())
def test_launches_and_memory_are_as_many_as_the_tiles_need(case: Any) -> None:
    made, (x, weight, _, _), _, _ = case
    c, names = made.config, made.constants
    tiles = math.ceil(weight.shape[0] / c.block_channels) * pixel_tiles(made)
    jobs = tiles * c.split_k
    described = names["DESCRIBE_X"] or names["DESCRIBE_WEIGHT"]
    assert 1 <= made.grid <= jobs
    assert described or made.grid == jobs
    steps = math.ceil(x.shape[1] / c.block_k) * made.shape.taps
    assert names["SPLIT_K"] == c.split_k
    assert 1 <= c.split_k <= steps
    assert made.finish_grid == (tiles * c.block_channels // 16 if c.split_k > 1 else 0)
    assert made.partials == (jobs * c.block_channels * c.block_pixels if c.split_k > 1 else 0)
    assert bool(made.finish_constants) == (c.split_k > 1)
    assert names["EVEN_K"] == (x.shape[1] % c.block_k == 0)


@given(plans())
def test_descriptors_are_made_only_as_hardware_allows(case: Any) -> None:
    """Bases and pitches of 16 bytes, channels side by side, boxes up to 256 along each axis."""
    made, (x, weight, _, _), config, (x_aligned, weight_aligned) = case
    names, size = made.constants, x.element_size()
    if names["DESCRIBE_X"]:
        assert x_aligned
        assert calls.stride_and_padding(config)[0] == (1, 1)
        assert made.plane.x[1] == 1
        assert all(pitch > 0 and pitch * size % 16 == 0 for i, pitch in enumerate(made.plane.x) if i != 1)
        assert all(1 <= extent <= 256 for extent in (*made.box, made.config.block_k))
    if names["DESCRIBE_WEIGHT"]:
        c_in = weight.shape[1]
        assert weight_aligned
        assert c_in * size % 16 == 0
        # A block that hung over the last channel would hold the next tap's first.
        assert made.shape.taps == 1 or c_in % made.config.block_k == 0
        assert made.config.block_channels <= 256


@pytest.mark.parametrize(
    ("changes", "x_is", "weight_is"),
    [
        pytest.param(dict(), True, True, id="Hopper"),
        pytest.param(dict(chip="sm_100"), True, True, id="Blackwell"),
        pytest.param(dict(chip="sm_80"), False, False, id="Ampere"),
        pytest.param(dict(chip="sm_120"), False, False, id="Blackwell without its tensor cores"),
        pytest.param(dict(aligned=(False, True)), False, True, id="x at an odd address"),
        pytest.param(dict(aligned=(True, False)), True, False, id="weight at an odd address"),
        pytest.param(dict(x=meta(1, 64, 16, 16, channels_last=False)), False, True, id="NCHW"),
        pytest.param(dict(x=meta(1, 72, 16, 16)[:, :64]), True, True, id="slice of channels"),
        pytest.param(dict(x=meta(1, 68, 16, 16)[:, :64]), False, True, id="slice of 8 bytes' pitch"),
        pytest.param(dict(x=meta(1, 64, 16, 16).expand(2, -1, -1, -1)), False, True, id="expanded batch"),
        pytest.param(dict(config=geometry((2, 2), (1, 1))), False, True, id="stride 2"),
        pytest.param(dict(x=meta(1, 64, 13, 13)), False, True, id="plane that boxes cover badly"),
        pytest.param(dict(x=meta(1, 36, 16, 16), weight=weight_of(64, 36, 3)), False, False, id="36 channels"),
        pytest.param(dict(x=meta(1, 24, 16, 16), weight=weight_of(64, 24, 3)), True, False, id="24 channels"),
    ],
)
def test_what_is_loaded_by_descriptor(changes: dict[str, Any], x_is: bool, weight_is: bool) -> None:
    call = dict(x=meta(1, 64, 16, 16), weight=weight_of(64, 64, 3), config=SAME, tile=Config(64, 64, 64, 3, 4))
    names = planned(**call | changes).constants
    assert (names["DESCRIBE_X"], names["DESCRIBE_WEIGHT"]) == (x_is, weight_is)


@pytest.mark.parametrize(
    ("sizes", "pixels", "box"),
    [
        ((1, 16, 16), 64, (1, 4, 16)),
        ((1, 16, 16), 16, (1, 1, 16)),
        ((8, 52, 52), 128, (8, 4, 4)),
        ((8, 26, 26), 64, (8, 2, 4)),
        ((64, 13, 13), 64, (64, 1, 1)),
        ((1, 13, 13), 64, (0, 0, 0)),
        ((1, 7, 7), 16, (0, 0, 0)),
        ((4, 2, 2), 256, (0, 0, 0)),
    ],
    ids=str,
)
def test_the_box_that_wastes_least(sizes: tuple[int, int, int], pixels: int, box: planning.Box) -> None:
    """Of equals the one of the longest rows; none where each would hang over by more than 15%."""
    n, h, w = sizes
    tile = Config(64, pixels, 64, 3, 4)
    found = planned(meta(n, 64, h, w), weight_of(64, 64, 3), SAME, tile=tile).box
    assert found == box


PLANES = {
    # layout of x, of y, of the residual; batch, height and width walked over.
    "all channels_last": ((True, True, True), (1, 1, 3 * 5 * 7)),
    "all NCHW": ((False, False, False), (3, 1, 5 * 7)),
    "residual in NCHW": ((True, True, False), (3, 1, 5 * 7)),
    "x in NCHW": ((False, True, True), (3, 1, 5 * 7)),
}


@pytest.mark.parametrize(("channels_last", "walked"), PLANES.values(), ids=PLANES)
def test_a_pointwise_convolution_walks_over_rows(channels_last: tuple[bool, ...], walked: tuple[int, int, int]) -> None:
    x, y, residual = (meta(3, 16, 5, 7, channels_last=format) for format in channels_last)
    made = planned(x, weight_of(16, 16, 1), residual=residual, y=y, tile=SMALL)
    assert (made.plane.batch, made.plane.height, made.plane.width) == walked
    assert made.box == (1, 1, 16)


OTHERS = {
    "columns left out": geometry((1, 2)),
    "rows left out": geometry((2, 1)),
    "columns padded": geometry(padding=(0, 1)),
    "rows padded": geometry(padding=(1, 0)),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_convolutions_keep_their_planes(config: int) -> None:
    made = planned(meta(3, 16, 5, 7), weight_of(16, 16, 1), config, tile=SMALL)
    assert (made.plane.batch, made.plane.height, made.plane.width) == (3, 5, 7)


def test_one_image_is_a_row_in_nchw_too() -> None:
    made = planned(meta(1, 16, 5, 7, channels_last=False), weight_of(16, 16, 1), tile=SMALL)
    assert (made.plane.batch, made.plane.width) == (1, 35)


def test_rows_with_gaps_are_not_joined() -> None:
    made = planned(meta(2, 16, 5, 8)[..., :7], weight_of(16, 16, 1), tile=SMALL)
    assert (made.plane.batch, made.plane.height, made.plane.width) == (2, 5, 7)


def test_sizes_past_two_to_the_31_are_counted_and_not_described() -> None:
    tile = Config(64, 256, 64, 1, 8)
    plane = 46341
    flat = planned(meta(1, 1, plane, plane, channels_last=False), weight_of(1, 1, 1), tile=tile)
    assert flat.plane.width == plane * plane
    assert flat.grid == -(-(plane**2) // 256)
    unflattened = planned(meta(2, 1, plane, plane, channels_last=False), weight_of(64, 1, 3), SAME, "sm_80", tile)
    assert unflattened.grid == -(-2 * plane**2 // 256)
    # 66280 * 180 * 180 is the last below 2^31.
    for batch, described in ((66280, True), (66281, False), (70000, False)):
        wide = planned(meta(batch, 8, 180, 180), weight_of(8, 8, 1), tile=replace(tile, block_k=16))
        assert wide.plane.width == batch * 180 * 180
        assert wide.constants["DESCRIBE_X"] == described
    # A descriptor holds strides below 2^40 bytes.
    for elements, described in ((1 << 38, True), (1 << 39, False)):
        x = torch.empty(0, dtype=torch.float16, device="meta").as_strided((2, 64, 16, 16), (elements, 1, 1024, 64))
        assert planned(x, weight_of(64, 64, 3), SAME).constants["DESCRIBE_X"] == described


def test_a_sum_has_no_more_parts_than_steps() -> None:
    x, tile = meta(1, 80, 13, 13), Config(64, 32, 64, 3, 4, split_k=16)
    assert planned(x, weight_of(64, 80, 1), tile=tile).config.split_k == 2
    assert planned(x, weight_of(64, 80, 3), SAME, tile=tile).config.split_k == 16
    assert planned(x, weight_of(64, 80, 3), SAME, tile=replace(tile, split_k=20)).config.split_k == 18


def test_a_plan_says_what_it_is() -> None:
    made = planned(meta(1, 1024, 16, 16), weight_of(64, 1024, 3), SAME, tile=Config(64, 32, 64, 4, 4, 8))
    assert str(made) == (
        "3x3 channels_last half 256x1024->64: tile 64x32x64, 4 stages, 4 warps, boxes of 1x2x16 pixels, K split by 8, "
        "grid 64, x and weight by descriptor"
    )
    plain = planned(meta(1, 24, 13, 13, channels_last=False), weight_of(8, 24, 3), SAME, "sm_80", SMALL)
    assert str(plain) == ("3x3 NCHW half 256x32->8: tile 16x16x16, 1 stages, 4 warps, consecutive pixels, grid 11")
    assert made.options == {"num_warps": 4, "num_stages": 4}


def test_the_epilogue_and_products_are_constants() -> None:
    config = geometry() | calls.TF32 | 2 << 32 | 2 << 35
    x, weight = meta(1, 8, 3, 3, dtype=torch.float32), weight_of(8, 8, 1, torch.float32)
    added = planned(x, weight, config, residual=x).constants
    assert (added["ACTIVATION"], added["ACT_ADD"], added["PRECISION"]) == ("relu", True, "tf32")
    strict = planned(x, weight, 1 << 32 | geometry()).constants
    assert (strict["ACTIVATION"], strict["ACT_ADD"], strict["PRECISION"]) == ("leaky_relu", False, "tf32x3")


TRACED = {
    "1x1": (1, geometry()),
    "1x1 padded": (1, geometry(padding=(1, 1))),
    "3x3": (3, SAME),
    "3x3 stride 2": (3, geometry((2, 2), (1, 1))),
}


def symbolic(x: Tensor) -> Tensor:
    """``x`` as a graph is traced with: batch, height and width are symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))


def value_of(number: Any, symbols: dict[Any, int]) -> int:
    """What a symbolic number, or an expression of symbols, comes to."""
    if type(number) is int:
        return number
    expression = number.node.expr if isinstance(number, torch.SymInt) else number
    return int(sympy_interp(PythonReferenceAnalysis, symbols, expression))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize(("kernel", "config"), TRACED.values(), ids=TRACED)
def test_a_traced_plan_holds_for_every_size(kernel: int, config: int, channels_last: bool, chip: str) -> None:
    """Its numbers are those that the sizes themselves give, and what it asked of the symbols is true of them."""
    weight, tile = weight_of(24, 64, kernel), Config(16, 32, 32, 1, 4)
    x = symbolic(meta(2, 64, 13, 14, channels_last=channels_last))
    batch, _, height, width = (getattr(size, "node", size) for size in x.shape)
    traced = planned(x, weight, config, chip, tile)
    for sizes in ((2, 13, 14), (3, 7, 9), (64, 20, 5), (5, 32, 32)):
        values = dict(zip((batch.expr, height.expr, width.expr), sizes, strict=True))

        assert all(value_of(guard.expr, values) for guard in batch.shape_env.guards)
        now = meta(sizes[0], 64, *sizes[1:], channels_last=channels_last)
        with mock.patch.object(planning, "_best_box", return_value=traced.box):
            own = planned(now, weight, config, chip, tile)
        assert {type(constant) for constant in traced.constants.values()} == {bool, int, str}
        assert own.constants == traced.constants
        assert value_of(traced.grid, values) == own.grid
        assert {name: value_of(number, values) for name, number in traced.integers.items()} == own.integers


def test_a_traced_plan_keeps_its_parts() -> None:
    """The example has one tile of pixels, split in four; partial sums of a larger batch need memory for all of it."""
    tile = Config(16, 256, 32, 1, 4, split_k=4)
    x, weight = symbolic(meta(2, 2048, 8, 9, channels_last=False)), weight_of(16, 2048, 1)
    traced = planned(x, weight, tile=tile)
    assert traced.config.split_k == 4
    values = {size.node.expr: n for size, n in zip((x.shape[0], *x.shape[2:]), (70, 16, 17), strict=True)}
    assert value_of(traced.partials, values) == 4 * 70 * 2 * 16 * 256
    assert value_of(traced.finish_grid, values) == 70 * 2


def test_alignment_is_of_addresses_and_of_traced_offsets() -> None:
    buffer = torch.empty(64, dtype=torch.float16)
    assert planning.aligned(buffer, buffer[1:], buffer[8:]) == (True, False, True)
    assert planning.aligned() == ()
    traced = FakeTensorMode().from_tensor(buffer)
    assert planning.aligned(traced, traced[1:], traced[8:]) == (True, False, True)


SIZES = st.integers(1, 1 << 40)
CLASSES = st.builds(
    ShapeClass.of, st.sampled_from(KERNELS), st.sampled_from(LAYOUTS), st.sampled_from(PRODUCTS), SIZES, SIZES, SIZES
)  # fmt: skip


@given(st.tuples(SIZES, SIZES, SIZES))
def test_a_class_rounds_its_sizes_up_to_powers_of_two(sizes: tuple[int, int, int]) -> None:
    shape = ShapeClass.of("1x1", "NCHW", "half", *sizes)
    for exact, rounded in zip(sizes, (shape.pixels, shape.c_out, shape.c_in), strict=True):
        assert rounded.bit_count() == 1
        assert rounded // 2 < exact <= rounded
    assert ShapeClass.of("1x1", "NCHW", "half", shape.pixels, shape.c_out, shape.c_in) == shape


@given(CLASSES)
def test_a_class_is_read_as_it_is_written(shape: ShapeClass) -> None:
    assert ShapeClass.parse(str(shape)) == shape


def test_a_class_is_written_as_the_table_has_it() -> None:
    shape = ShapeClass.of("3x3", "channels_last", "half", 169, 1024, 512)
    assert str(shape) == "3x3 channels_last half 256x512->1024"
    assert (shape.taps, shape.element_bytes) == (9, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1x1 NCHW half",
        "1x1 NCHW half 4x4",
        "1x1 NCHW half 4x4->",
        "1x1 NCHW half 4x4->4->4",
        "1x1 NCHW half 4x4x4->4",
        "1x1 NCHW half 4.0x4->4",
        "1x1 NCHW half 0x4->4",
        "1x1 NCHW half -4x4->4",
        "5x5 NCHW half 4x4->4",
        "1x1 NHWC half 4x4->4",
        "1x1 NCHW fp16 4x4->4",
        "1x1  NCHW half 4x4->4",
    ],
)
def test_what_is_no_class_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="is no shape class") as error:
        ShapeClass.parse(text)
    assert repr(text) in str(error.value)


ENTRY = {
    "block_channels": 64,
    "block_pixels": 32,
    "block_k": 64,
    "stages": 4,
    "warps": 4,
    "split_k": 8,
    "flatten": True,
}


@pytest.mark.parametrize("times", [{}, {"us": 12.5}, {"us": 12.5, "aten_us": 20.0}], ids=str)
def test_an_entry_is_read_as_it_is_written(times: dict[str, float]) -> None:
    entry = Entry.from_dict(ENTRY | times)
    assert entry.config == Config(64, 32, 64, 4, 4, 8, flatten=True)
    assert entry.to_dict() == ENTRY | times
    assert Entry.from_dict(entry.to_dict()) == entry


def test_an_entry_is_faster_only_where_both_were_measured() -> None:
    config = Config(64, 32, 64, 4, 4)
    times = [(None, None), (1.0, None), (None, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0)]
    assert [Entry(config, *t).faster_than_aten for t in times] == [False] * 5 + [True]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"block_channels": 64},
        ENTRY | {"cluster": 2},
        ENTRY | {"stages": "four"},
        ENTRY | {"stages": None},
        ENTRY | {"us": "fast"},
        ENTRY | {"us": [1.0]},
        None,
        7,
        "text",
    ],
    ids=str,
)
def test_what_is_no_entry_says_so(data: Any) -> None:
    with pytest.raises(ValueError, match="is no entry of a table of configurations"):
        Entry.from_dict(data)


def test_chips_by_compute_capability() -> None:
    families = {"sm_80": ((8, 0), (8, 9), (12, 0)), "sm_90": ((9, 0),), "sm_100": ((10, 0), (10, 3))}
    for family, capability in ((name, found) for name, all_found in families.items() for found in all_found):
        chip = Chip.of(capability, 100, 99 << 10)
        assert (chip.family, chip.descriptors) == (family, family != "sm_80")
        assert (chip.processors, chip.shared_bytes) == (100, 99 << 10)


REFUSALS = {
    "a block of 48": (dict(block_channels=48), "blocks and warps must be powers of two"),
    "no block": (dict(block_pixels=0), "blocks and warps must be powers of two"),
    "three warps": (dict(warps=3), "blocks and warps must be powers of two"),
    "8 channels": (dict(block_channels=8), "a tile has from 16 to 256 channels and pixels"),
    "512 pixels": (dict(block_pixels=512), "a tile has from 16 to 256 channels and pixels"),
    "steps of 8": (dict(block_k=8), "a step has from 16 to 256 input channels, and at least 32 bytes of them"),
    "steps of 512": (dict(block_k=512), "a step has from 16 to 256 input channels, and at least 32 bytes of them"),
    "16 warps": (dict(warps=16), "a block has 4 or 8 warps"),
    "no stage": (dict(stages=0), "there are from 1 to 8 stages and at least one part"),
    "nine stages": (dict(stages=9), "there are from 1 to 8 stages and at least one part"),
    "no part": (dict(split_k=0), "there are from 1 to 8 stages and at least one part"),
    "large tiles": (dict(block_channels=256, block_pixels=128), "256 sums a thread spill"),
    "much shared memory": (
        dict(block_k=256, stages=8), "it takes 525312 bytes of shared memory, a block may have 232448"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_configurations_that_are_none_are_refused(changes: dict[str, int], reason: str) -> None:
    shape, config = ShapeClass.of("3x3", "channels_last", "half", 4096, 512, 512), Config(64, 64, 64, 3, 4)
    assert config.refusal(shape, REFERENCE_CHIPS["sm_90"]) is None
    assert replace(config, **changes).refusal(shape, REFERENCE_CHIPS["sm_90"]) == reason


@pytest.mark.parametrize(
    ("chip", "layout", "products", "config", "reason"),
    [
        ("sm_80", "NCHW", "half", Config(64, 128, 16, 3, 4), "64 sums a thread spill"),
        ("sm_80", "channels_last", "half", Config(64, 128, 16, 3, 4), None),
        ("sm_80", "NCHW", "half", Config(64, 64, 64, 3, 4), "elements gathered one by one spill"),
        ("sm_90", "NCHW", "half", Config(64, 64, 64, 3, 4), None),
        ("sm_80", "channels_last", "fp32", Config(64, 64, 32, 3, 4), "both parts of a step's products spill"),
        ("sm_80", "channels_last", "tf32", Config(64, 64, 32, 3, 4), None),
        ("sm_80", "NCHW", "half", Config(128, 32, 64, 3, 4), "elements gathered one by one spill"),
        ("sm_80", "NCHW", "half", Config(128, 32, 32, 3, 4), None),
        ("sm_80", "NCHW", "tf32", Config(64, 64, 32, 3, 4), "elements gathered one by one spill"),
        ("sm_80", "NCHW", "tf32", Config(64, 64, 16, 3, 4), None),
        ("sm_80", "channels_last", "fp32", Config(64, 128, 16, 3, 4), "64 sums a thread spill"),
        ("sm_80", "channels_last", "fp32", Config(64, 64, 16, 3, 4), None),
        ("sm_90", "NCHW", "tf32", Config(64, 64, 32, 3, 4), "elements gathered one by one spill"),
        ("sm_90", "NCHW", "tf32", Config(64, 64, 16, 3, 4), None),
        ("sm_100", "NCHW", "fp32", Config(128, 64, 32, 3, 4), "64 sums a thread spill"),
        ("sm_100", "NCHW", "fp32", Config(128, 64, 32, 3, 8), None),
        ("sm_90", "channels_last", "fp32", Config(128, 128, 16, 3, 4), "128 sums a thread spill"),
        ("sm_90", "channels_last", "half", Config(128, 128, 16, 3, 4), None),
        ("sm_86", "channels_last", "half", Config(64, 64, 64, 8, 4),
         "it takes 132096 bytes of shared memory, a block may have 101376"),
        ("sm_90", "channels_last", "half", Config(128, 256, 64, 4, 8), None),
        ("sm_90", "channels_last", "half", Config(128, 256, 64, 4, 8, flatten=True),
         "it takes 263168 bytes of shared memory, a block may have 232448"),
    ],
)  # fmt: skip
def test_what_spills_is_refused(chip: str, layout: str, products: str, config: Config, reason: str | None) -> None:
    assert config.refusal(ShapeClass.of("3x3", layout, products, 4096, 512, 512), CHIPS[chip]) == reason


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_that_is_shipped_is_valid(family: str) -> None:
    rows = shipped(family)
    for shape, entry in rows.items():
        assert entry.config.refusal(shape, REFERENCE_CHIPS[family]) is None, (shape, entry)
        assert ShapeClass.of(*shape.__dict__.values()) == shape, "sizes are powers of two"
    kinds = {(shape.kernel, shape.layout, shape.products) for shape in rows}
    assert kinds == {(k, l, p) for k in KERNELS for l in LAYOUTS for p in PRODUCTS}  # noqa: E741


@given(CLASSES, st.sampled_from(list(CHIPS)))
def test_every_class_gets_a_valid_configuration_on_every_chip(shape: ShapeClass, chip: str) -> None:
    assert choose(shape, CHIPS[chip], {}).refusal(shape, CHIPS[chip]) is None


@pytest.mark.parametrize("chip", CHIPS)
def test_a_class_of_the_table_gets_its_own_row(chip: str) -> None:
    for shape, entry in shipped(CHIPS[chip].family).items():
        found = choose(shape, CHIPS[chip], {})
        assert found == replace(entry.config.fitted(shape, CHIPS[chip]), split_k=found.split_k)
        assert 1 <= found.split_k <= entry.config.split_k


@pytest.mark.parametrize(
    ("processors", "c_in", "parts"),
    [
        pytest.param(132, 512, 2, id="two blocks on each processor"),
        pytest.param(1000, 512, 6, id="at least 12 steps each"),
        pytest.param(1000, 4096, 8, id="as many as the row has"),
        pytest.param(60, 512, 1, id="more tiles than blocks that run at once"),
    ],
)
def test_a_sum_is_split_where_tiles_are_few(processors: int, c_in: int, parts: int) -> None:
    """128 tiles, of 9 steps for each 64 channels."""
    shape = ShapeClass.of("3x3", "channels_last", "half", 256, 1024, c_in)
    row = shipped("sm_90")[ShapeClass.of("3x3", "channels_last", "half", 256, 1024, 512)].config
    assert (row.block_channels, row.block_pixels, row.block_k, row.split_k) == (64, 32, 64, 8)
    assert choose(shape, replace(REFERENCE_CHIPS["sm_90"], processors=processors), {}).split_k == parts


def test_the_nearest_row_counts_doublings_of_pixels_first() -> None:
    def shape(pixels: int, c_out: int, c_in: int) -> ShapeClass:
        return ShapeClass.of("1x1", "NCHW", "half", pixels, c_out, c_in)

    origin = shape(256, 64, 64)
    assert origin.distance(shape(1024, 64, 64)) == 2
    assert origin.distance(shape(256, 16, 64)) == 1
    assert origin.distance(shape(256, 64, 1024)) == 1
    assert origin.distance(origin) == 0
    rows = shipped("sm_90")
    few, many = shape(256, 512, 1024), shape(32768, 256, 512)
    assert few in rows
    assert many in rows
    for found, row in ((shape(200, 512, 1024), few), (shape(1 << 20, 64, 64), many)):
        assert choose(found, REFERENCE_CHIPS["sm_90"], {}) == replace(rows[row].config, split_k=1)


def test_what_was_measured_goes_first_where_it_is_valid() -> None:
    shape, chip = ShapeClass.of("3x3", "channels_last", "half", 169, 1024, 512), REFERENCE_CHIPS["sm_90"]
    own = Config(128, 16, 128, 2, 4)
    assert choose(shape, chip, {shape: Entry(own)}) == own
    other = replace(shape, pixels=2 * shape.pixels)
    invalid = replace(own, block_k=512)
    for measured in ({}, {other: Entry(own)}, {shape: Entry(invalid)}):
        assert choose(shape, chip, measured) == replace(shipped("sm_90")[shape].config, split_k=2)


def test_chips_of_less_shared_memory_get_fewer_stages() -> None:
    shape = ShapeClass.of("3x3", "channels_last", "half", 4096, 512, 512)
    config = Config(64, 64, 64, 8, 4)  # 16 KiB a stage, and 1 KiB
    assert config.fitted(shape, CHIPS["sm_86"]) == replace(config, stages=6)
    for kilobytes, stages in ((129, 8), (128, 7), (17, 1), (3, 1)):
        chip = replace(CHIPS["sm_86"], shared_bytes=kilobytes << 10)
        assert config.fitted(shape, chip).stages == stages
    # Four stages of 12 KiB each, and 1 KiB.
    small = ShapeClass.of("1x1", "channels_last", "half", 256, 512, 1024)
    assert choose(small, replace(CHIPS["sm_86"], shared_bytes=49 << 10), {}).stages == 4
    assert choose(small, replace(CHIPS["sm_86"], shared_bytes=48 << 10), {}).stages == 3


def head_classes(plane: int, batch: int, layout: str, products: str) -> set[ShapeClass]:
    """Those of the seven last layers of a YOLOv3 head."""
    c_in, f0, f1 = HEADS[plane]
    layers = [("1x1", c_in, f0), ("3x3", f0, f1), ("1x1", f1, f0), ("1x1", f1, 75)]
    return {ShapeClass.of(k, layout, products, batch * plane**2, c_out, c_in) for k, c_in, c_out in layers}


@pytest.mark.parametrize("batch", [1, 8, 64], ids="batch {}".format)
@pytest.mark.parametrize("plane", HEADS)
@pytest.mark.parametrize("chip", CHIPS)
def test_candidates_are_valid_and_few_enough_to_time(chip: str, plane: int, batch: int) -> None:
    for layout in LAYOUTS:
        for products in PRODUCTS:
            for shape in head_classes(plane, batch, layout, products):
                found = list(candidates(shape, CHIPS[chip]))
                assert all(config.refusal(shape, CHIPS[chip]) is None for config in found)
                assert len(found) == len(set(found))
                assert 4 <= len(found) <= 128, shape
                assert found[0] == choose(shape, CHIPS[chip], {})
                assert all(config.block_channels <= max(64, shape.c_out) for config in found)
                if shape.pixels > 1 << 17:
                    assert {config.split_k for config in found} == {1}


@given(CLASSES, st.sampled_from(list(CHIPS)))
def test_every_class_has_candidates(shape: ShapeClass, chip: str) -> None:
    assert next(candidates(shape, CHIPS[chip]), None) is not None
