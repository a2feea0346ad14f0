"""The sm_90 kernel gives PyTorch's answers, whatever the tile, layout and schedule: in the emulator of tests/host_cuda
and, where there is one, on a GPU of compute capability 9.0.

Integer inputs compare exactly, so that any wrong index shows; others follow the accuracy rule. Every y lies between
canaries, and is NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from host_cuda.build import emulator, gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from yardstick import assert_as_accurate

BF16, FP16, TF32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [pytest.param(BF16, id="bf16"), pytest.param(FP16, id="fp16"), pytest.param(TF32, id="tf32")]
# Channels and pixels of sm90::kTiles.
TILES = [(128, 256), (128, 192), (128, 128), (64, 192), (64, 128), (64, 96), (64, 64), (64, 32)]
SMALL = TILES.index((64, 32))
CANARY = 16  # elements before, after and, where y is a slice, between


HAS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_gpu = False


@pytest.fixture(scope="module", autouse=True, params=["emulator", "gpu"] if HAS_SM90 else ["emulator"])
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    global on_gpu
    on_gpu = request.param == "gpu"
    yield
    on_gpu = False


@dataclass(frozen=True)
class Case:
    """A unit, how its tensors lie, and how it is to run."""

    batch: int = 1
    c_in: int = 64
    height: int = 5
    width: int = 7
    c_out: int = 64
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dtype: torch.dtype = BF16
    activation: str = "leaky_relu"
    residual: str | None = None
    bias: bool = False
    batch_norm: bool = True
    planes: bool = False  # NCHW instead of channels_last
    gap: int = 0  # elements between the pixels (or planes) of y and of the residual
    shift: int = 0  # elements from a 16-byte boundary to y and residual
    integers: bool = True
    run: dict[str, int | bool] = field(default_factory=lambda: {"tile": SMALL})
    constant_weight: bool = False


def nan_buffer(shape: tuple[int, ...], dtype: torch.dtype, planes: bool, gap: int, shift: int) -> tuple[Tensor, Tensor]:
    """NaN everywhere: a buffer, and the tensor of this shape in it."""
    n, c, h, w = shape
    pitch = (h * w if planes else c) + gap
    strides = (c * pitch, pitch, w, 1) if planes else (h * w * pitch, 1, w * pitch, pitch)
    size = n * (c if planes else h * w) * pitch
    buffer = torch.full((size + 2 * CANARY + shift,), float("nan"), dtype=dtype)
    return buffer, buffer.as_strided(shape, strides, CANARY + shift)


def values(case: Case, *shape: int, low: int = -2, high: int = 3) -> Tensor:
    """Of numbers that the dtype holds: integers, or as TF32 multiplies them."""
    if case.integers:
        return torch.randint(low, high, shape).to(case.dtype)
    numbers = torch.randn(shape).to(case.dtype)
    if case.dtype is TF32:
        numbers = (numbers.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return numbers


def tensors_of(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layout = torch.contiguous_format if case.planes else torch.channels_last
    tensors = {
        "x": values(case, case.batch, case.c_in, case.height, case.width).contiguous(memory_format=layout),
        "weight": values(case, case.c_out, case.c_in, *case.kernel).contiguous(memory_format=torch.channels_last),
    }
    if case.bias:
        tensors["bias"] = values(case, case.c_out)
    if case.batch_norm:
        # With eps 0 and variances that are powers of 4 the scale is exact.
        tensors["mean"] = torch.randint(-3, 4, (case.c_out,)).float()
        tensors["var"] = 4.0 ** torch.randint(-1, 2, (case.c_out,)) if case.integers else torch.rand(case.c_out) + 0.5
        tensors["gamma"] = torch.randint(-2, 3, (case.c_out,)).float()
        tensors["beta"] = torch.randint(-3, 4, (case.c_out,)).float()
    if case.residual:
        shape = conv(tensors, case).shape
        _, tensors["residual"] = nan_buffer(tuple(shape), case.dtype, case.planes, case.gap, case.shift)
        tensors["residual"].copy_(values(case, *shape))
    return tensors


def conv(tensors: dict[str, Tensor], case: Case) -> Tensor:
    return functional.conv2d(tensors["x"], tensors["weight"], stride=case.stride, padding=case.padding)


def reference(tensors: dict[str, Tensor], case: Case) -> Tensor:
    """The unit in the dtype of the tensors, operation by operation."""
    dtype = tensors["x"].dtype
    channel = {name: value.to(dtype).view(1, -1, 1, 1) for name, value in tensors.items() if value.dim() == 1}
    z = conv(tensors, case) + channel.get("bias", 0)
    if case.batch_norm:
        scale = channel["gamma"] / torch.sqrt(channel["var"])
        z = (z - channel["mean"]) * scale + channel["beta"]
    activations = {
        "identity": lambda z: z,
        "leaky_relu": lambda z: functional.leaky_relu(z, 0.25),
        "relu": torch.relu,
        "relu6": functional.relu6,
        "silu": functional.silu,
    }
    if case.residual == "add_act":
        return activations[case.activation](z + tensors["residual"])
    z = activations[case.activation](z)
    return z + tensors["residual"] if case.residual else z


def whole(view: Tensor) -> Tensor:
    """All of a view's storage."""
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())


def moved_to_gpu(view: Tensor) -> Tensor:
    return whole(view).cuda().as_strided(view.shape, view.stride(), view.storage_offset())


def run(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The kernel's y; the memory around it is checked."""
    shape = tuple(conv(tensors, case).shape)
    buffer, y = nan_buffer(shape, case.dtype, case.planes, case.gap, case.shift)
    options = {
        "stride": case.stride,
        "padding": case.padding,
        "activation": case.activation,
        "residual_order": case.residual or "add_act",
        "eps": 0.0,
        "negative_slope": 0.25,
        "tf32": True,
        "constant_weight": case.constant_weight,
    }
    if on_gpu:
        moved = {name: moved_to_gpu(tensor) for name, tensor in {**tensors, "y": y}.items()}
        gpu().run(moved, options, kernel="sm90", **case.run)
        buffer.copy_(whole(moved["y"]))
    else:
        emulator().run({**tensors, "y": y}, options, kernel="sm90", **case.run)
    result = y.clone(memory_format=torch.preserve_format)
    y.fill_(float("nan"))
    assert buffer.isnan().all(), "written outside y"
    return result


def check_exact(case: Case) -> None:
    tensors = tensors_of(case)
    exact = reference({name: value.double() for name, value in tensors.items()}, case)
    torch.testing.assert_close(run(case, tensors), exact.to(case.dtype), rtol=0, atol=0, check_stride=False)


def tile_case(tile: int, dtype: torch.dtype, split_k: int = 1, **changes: object) -> Case:
    return replace(Case(dtype=dtype, run={"tile": tile, "split_k": split_k}), **changes)


# ---- Every tile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda tile: "x".join(map(str, TILES[tile])))
class TestEveryTile:
    def test_1x1_with_tails(self, tile: int, dtype: torch.dtype) -> None:
        pixels = TILES[tile][1] + 5  # two tiles, the second nearly empty, over two images
        check_exact(tile_case(tile, dtype, batch=2, c_in=72, height=1, width=pixels // 2 + 1, c_out=80))

    def test_3x3_with_tails(self, tile: int, dtype: torch.dtype) -> None:
        height = TILES[tile][1] // 20 + 1
        check_exact(
            tile_case(tile, dtype, batch=3, c_in=24, height=height, width=7, c_out=75, kernel=(3, 3), padding=(1, 1))
        )

    def test_residual(self, tile: int, dtype: torch.dtype) -> None:
        pixels = TILES[tile][1] + 3
        check_exact(tile_case(tile, dtype, c_in=40, height=1, width=pixels, c_out=88, residual="add_act", bias=True))

    def test_split_over_a_cluster(self, tile: int, dtype: torch.dtype) -> None:
        case = tile_case(tile, dtype, split_k=4, c_in=200, height=1, width=TILES[tile][1] + 3, c_out=80)
        check_exact(replace(case, residual="act_add"))

    def test_more_tiles_than_blocks(self, tile: int, dtype: torch.dtype) -> None:
        case = tile_case(tile, dtype, c_in=40, height=2, width=TILES[tile][1] + 1, c_out=136, residual="act_add")
        check_exact(replace(case, run={"tile": tile, "grid": 2}))


# ---- Geometry

GEOMETRIES = {
    "1x1": Case(),
    "1x1 stride 2": Case(stride=(2, 2)),
    "1x1 padding 1": Case(padding=(1, 1)),
    "3x3": Case(kernel=(3, 3)),
    "3x3 padding 1": Case(kernel=(3, 3), padding=(1, 1)),
    "3x3 stride 2": Case(kernel=(3, 3), stride=(2, 2)),
    "3x3 stride 2 padding 1": Case(kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2 padding 1, even": Case(kernel=(3, 3), stride=(2, 2), padding=(1, 1), height=6, width=8),
    "3x3 padding 2": Case(kernel=(3, 3), padding=(2, 2)),
    "1x7 padding 0, 3": Case(kernel=(1, 7), padding=(0, 3)),
    "7x7 stride 2, 3 padding 3": Case(kernel=(7, 7), stride=(2, 3), padding=(3, 3), c_in=8),
    "2x2 on a plane of one pixel": Case(kernel=(2, 2), padding=(1, 1), height=1, width=1),
    "a plane of one pixel": Case(height=1, width=1),
    "a column": Case(width=1, height=19),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name: str, batch: int) -> None:
    check_exact(replace(GEOMETRIES[name], batch=batch))


@pytest.mark.parametrize("c_out", [1, 8, 63, 64, 75, 128, 129, 255])
def test_output_channels(c_out: int) -> None:
    check_exact(Case(c_out=c_out))
    check_exact(Case(c_out=c_out, c_in=128, residual="add_act", run={"tile": SMALL, "split_k": 2}))


@pytest.mark.parametrize("c_in", [8, 24, 64, 72, 128, 200])
@pytest.mark.parametrize("kernel", [1, 3])
def test_input_channels(c_in: int, kernel: int) -> None:
    check_exact(Case(c_in=c_in, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2), height=4))


# ---- Where y and residual lie


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [None, "add_act", "act_add"])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(c_out=72), id="dense"),
        pytest.param(Case(c_out=72, gap=8), id="a slice of channels"),
        pytest.param(Case(c_out=75, gap=5), id="a slice that ends within 16 bytes"),
        pytest.param(Case(c_out=72, gap=3), id="a slice with an odd pitch"),
        pytest.param(Case(c_out=72, shift=1), id="at an odd address"),
    ],
)
def test_where_y_lies(case: Case, dtype: torch.dtype, residual: str | None, split_k: int) -> None:
    case = replace(case, c_in=128, dtype=dtype, residual=residual)
    check_exact(replace(case, run={"tile": SMALL, "split_k": split_k}))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_x_and_weight(dtype: torch.dtype, kernel: int) -> None:
    """A crop of a larger plane, and some of a wider weight's channels: what lies around is NaN."""
    case = Case(batch=2, c_in=40, c_out=72, dtype=dtype, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    tensors = tensors_of(case)
    for name, before, after in (("x", (0, 0, 1, 2), (0, 8, 2, 1)), ("weight", (0, 8, 0, 0), (0, 16, 0, 0))):
        shape = tensors[name].shape
        wide = [size + b + a for size, b, a in zip(shape, before, after, strict=True)]
        larger = torch.full(wide, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
        view = larger[tuple(slice(b, b + size) for size, b in zip(shape, before, strict=True))]
        tensors[name] = view.copy_(tensors[name])
    exact = reference({name: value.double() for name, value in tensors.items()}, case)
    torch.testing.assert_close(run(case, tensors), exact.to(dtype), rtol=0, atol=0, check_stride=False)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("residual", [None, "add_act", "act_add"])
@pytest.mark.parametrize("tile", [tile for tile, (_, pixels) in enumerate(TILES) if pixels in (64, 128, 256)])
def test_planes(dtype: torch.dtype, residual: str | None, tile: int) -> None:
    case = Case(batch=2, c_in=72, height=8, width=TILES[tile][1] // 8 + 2, c_out=80, planes=True, dtype=dtype)
    check_exact(replace(case, residual=residual, run={"tile": tile}))
    check_exact(replace(case, residual=residual, gap=8, run={"tile": tile, "grid": 3}))


# ---- Splits, clusters, persistence


@pytest.mark.parametrize("split_k", [1, 2, 4, 8])
@pytest.mark.parametrize("grid", [1, 2, 100])
@pytest.mark.parametrize("constant_weight", [False, True])
def test_splits_and_grids(split_k: int, grid: int, constant_weight: bool) -> None:
    case = Case(batch=2, c_in=72, c_out=75, kernel=(3, 3), padding=(1, 1), constant_weight=constant_weight)
    tiles = 2 * 3
    check_exact(replace(case, run={"tile": SMALL, "split_k": split_k, "grid": min(grid, tiles) * split_k}))


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("tile", [TILES.index((128, 128)), TILES.index((64, 96)), SMALL])
def test_any_schedule(late: bool, seed: int, split_k: int, tile: int) -> None:
    case = Case(
        batch=2, c_in=72, height=TILES[tile][1] // 16 + 2, width=9, c_out=144, kernel=(3, 1), residual="add_act"
    )
    schedule = {"late": late, "seed": seed, "tile": tile, "split_k": split_k, "grid": 2 * split_k}
    check_exact(replace(case, constant_weight=seed == 2, run=schedule))


@settings(max_examples=150)
@given(st.data())
def test_any_unit(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([BF16, FP16, TF32]))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    case = Case(
        batch=draw(st.integers(1, 4)),
        c_in=8 * draw(st.integers(1, 20)),
        height=draw(st.integers(kernel[0], 11)),
        width=draw(st.integers(kernel[1], 11)),
        c_out=draw(st.integers(1, 150)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dtype=dtype,
        activation=draw(st.sampled_from(["identity", "leaky_relu", "relu", "relu6"])),
        residual=draw(st.sampled_from([None, "add_act", "act_add"])),
        bias=draw(st.booleans()),
        batch_norm=draw(st.booleans()),
        gap=draw(st.sampled_from([0, 0, 1, 8])),
        constant_weight=draw(st.booleans()),
    )
    steps = -(-case.c_in * dtype.itemsize // 128) * kernel[0] * kernel[1]
    split_k = draw(st.sampled_from([split for split in (1, 2, 4, 8) if split <= steps]))
    tile = draw(st.integers(0, len(TILES) - 1))
    channels, pixels = TILES[tile]
    y = conv(tensors_of(replace(case, residual=None)), case)
    tiles = -(-y.shape[1] // channels) * -(-(y.numel() // y.shape[1]) // pixels)
    grid = split_k * draw(st.integers(1, tiles))
    late, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    run = {"tile": tile, "split_k": split_k, "grid": grid, "late": late, "seed": seed}
    check_exact(replace(case, run=run))


# ---- Numbers


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "relu", "relu6"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_activations(activation: str, split_k: int, batch_norm: bool) -> None:
    case = Case(activation=activation, c_in=128, batch_norm=batch_norm, bias=not batch_norm)
    check_exact(replace(case, run={"tile": SMALL, "split_k": split_k}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_accuracy(dtype: torch.dtype, split_k: int, activation: str, kernel: int) -> None:
    case = Case(batch=2, c_in=264, c_out=80, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2), bias=True)
    case = replace(case, dtype=dtype, activation=activation, residual="add_act", integers=False)
    case = replace(case, run={"tile": TILES.index((64, 64)), "split_k": split_k})
    tensors = tensors_of(case)
    exact = reference({name: value.double() for name, value in tensors.items()}, case)
    assert_as_accurate(run(case, tensors), reference(tensors, case), exact)


def rounded_to_tf32(t: Tensor) -> Tensor:
    """To ten bits of mantissa, halves to even."""
    bits = t.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("residual", [None, "add_act"])
def test_tf32_rounds_to_nearest(kernel: int, residual: str | None) -> None:
    """x and weight alone: what is left is fp32's own error. Truncation would shrink all of y."""
    case = Case(c_in=264, c_out=80, dtype=TF32, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    case = replace(case, residual=residual)
    tensors = {name: torch.randn_like(value) if value.dim() == 4 else value for name, value in tensors_of(case).items()}
    actual = run(case, tensors)
    tensors |= {name: rounded_to_tf32(tensors[name]) for name in ("x", "weight")}
    exact = reference({name: value.double() for name, value in tensors.items()}, case)
    assert_as_accurate(actual, reference(tensors, case), exact)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "relu", "relu6", "silu"])
def test_nan_and_infinity(activation: str, split_k: int) -> None:
    case = Case(activation=activation, c_in=128, batch_norm=False, run={"tile": SMALL, "split_k": split_k})
    tensors = tensors_of(case)
    tensors["x"][0, 3, 1, 2] = float("nan")
    tensors["x"][0, 3, 4, 5] = float("inf")
    tensors["weight"][:, 3] = 1
    actual, eager = run(case, tensors), reference({name: value.double() for name, value in tensors.items()}, case)
    torch.testing.assert_close(actual, eager.to(BF16), rtol=1e-2, atol=1e-2, equal_nan=True, check_stride=False)
    assert actual[0, :, 1, 2].isnan().all()


# ---- What it refuses


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(c_in=12), "16 bytes"),
        (Case(planes=True), "planes are not multiples of 16 bytes"),
        (Case(planes=True, kernel=(3, 3), height=8, width=8), "1x1"),
        (Case(planes=True, height=8, width=8, dtype=TF32), "TF32"),
        (Case(planes=True, height=8, width=8), "not built for NCHW"),
        (Case(planes=True, height=8, width=8, run={"tile": 0, "split_k": 2}), "not split"),
        (Case(c_in=512, run={"tile": 0, "split_k": 3}), "1, 2, 4 or 8"),
        (Case(kernel=(3, 3), stride=(9, 1), height=20), "at most 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals(case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(case, tensors_of(case))


def test_refuses_an_expanded_residual() -> None:
    case = Case(batch=2, residual="add_act")
    tensors = tensors_of(case)
    tensors["residual"] = tensors["residual"][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="residual is not channels_last"):
        run(case, tensors)
