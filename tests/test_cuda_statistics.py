"""The CUDA C++ kernels' batch statistics: each channel's count, mean and sum of squared distances by tiles of pixels,
beside a y that is bitwise what the kernel gives without them. In the emulator, and on a GPU where there is one.

Parts and y lie between canaries; parts are NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from host_cuda.build import emulator, gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_module import load_planner
from torch import Tensor
from torch.nn import functional
from units_for_tests import CANARY, LAYOUTS, MODES, Unit, as_placed, whole

# Channels and pixels of sm80::kTiles and sm90::kTiles.
TILES = {
    "sm80": [(128, 128), (64, 128), (64, 64), (64, 32)],
    "sm90": [(128, 256), (128, 192), (128, 128), (64, 192), (64, 128), (64, 96), (64, 64), (64, 32)],
}
EVERY_TILE = [
    pytest.param(kernel, tile, id=f"{kernel} {channels}x{pixels}")
    for kernel, tiles in TILES.items()
    for tile, (channels, pixels) in enumerate(tiles)
]
PLAIN = Unit(batch_norm=False, activation="identity")
# The last of each kernel's tiles, which is the smallest.
SMALL = {"sm80": 3, "sm90": 7}
machine: Any = None
on_gpu = False


@pytest.fixture(scope="module", autouse=True, params=["emulator", "gpu"] if torch.cuda.is_available() else ["emulator"])
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    global machine, on_gpu
    on_gpu = request.param == "gpu"
    machine = gpu() if on_gpu else emulator()
    yield
    on_gpu = False


@dataclass(frozen=True)
class How:
    """The candidate plan, and how the emulator runs it."""

    kernel: str = "sm80"
    tile: int = 3
    split_k: int = 1
    general: bool = False
    grid: int = 0
    late: bool = True
    seed: int = 1


def places(how: How) -> bool:
    """Whether this machine has the kernel."""
    return not on_gpu or how.kernel == "sm80" or torch.cuda.get_device_capability() == (9, 0)


def tiles_of(unit: Unit, how: How) -> list[slice]:
    """The pixels of each tile, as they lie in [batch * height * width]."""
    batch, _, height, width = unit.y_shape
    planes = batch if how.kernel == "sm90" and unit.x_layout == "NCHW" else 1
    pixels, size = batch * height * width // planes, TILES[how.kernel][how.tile][1]
    return [
        slice(plane * pixels + first, plane * pixels + min(first + size, pixels))
        for plane in range(planes)
        for first in range(0, pixels, size)
    ]


def amid_canaries(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    storage = torch.full((torch.Size(shape).numel() + 32,), CANARY, dtype=dtype)
    return storage[16:-16].view(shape).fill_(torch.nan)


def run(unit: Unit, operands: dict[str, Tensor | None], how: How, statistics: bool) -> tuple[Tensor, Tensor | None]:
    """y and parts; asserts that nothing beside them was written."""
    y = LAYOUTS[unit.y_layout](*unit.y_shape, dtype=unit.dtype)
    whole(y).fill_(CANARY)
    y.fill_(torch.nan)
    parts = amid_canaries((len(tiles_of(unit, how)), 3, unit.c_out), torch.float32) if statistics else None
    tensors = dict(operands, y=y, parts=parts)
    options = dict(
        stride=unit.stride, padding=unit.padding, eps=0.0, negative_slope=0.0, activation="identity",
        residual_order="add_act", tf32=MODES[unit.mode][1], constant_weight=False,
    )  # fmt: skip
    if on_gpu:
        moved = {name: None if t is None else as_placed(whole(t).cuda(), t) for name, t in tensors.items()}
        machine.run(moved, options, **vars(how))
        for name in ("y", "parts"):
            if tensors[name] is not None:
                whole(tensors[name]).copy_(whole(moved[name]))
    else:
        machine.run(tensors, options, **vars(how))
    for written in (y, parts):
        if written is not None:
            beside = whole(written).clone()
            as_placed(beside, written).fill_(CANARY)
            assert torch.all(beside == CANARY)
    return y, parts


def convolved(unit: Unit, operands: dict[str, Tensor | None]) -> Tensor:
    """In float64, [channel, pixel]."""
    bias = operands["bias"]
    y = functional.conv2d(
        operands["x"].double(), operands["weight"].double(), None if bias is None else bias.double(), unit.stride,
        unit.padding,
    )  # fmt: skip
    return y.transpose(0, 1).flatten(1)


def numbers_for(unit: Unit, mean: float = 0.0, seed: int = 0) -> dict[str, Tensor | None]:
    """Operands that TF32's rounding leaves alone, so that what is left is fp32's own error."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator) + mean
        return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)

    return unit.operands(numbers, torch.ones)


def check(unit: Unit, how: How, mean: float = 0.0, seed: int = 0) -> None:
    """y is bitwise the same, and each part is float64's: counts exactly, means within 1e-6 of the deviation's and the
    mean's size, sums of squares within 1e-5."""
    if not places(how):
        return
    operands = numbers_for(unit, mean, seed)
    y, parts = run(unit, operands, how, statistics=True)
    assert parts is not None
    plain, _ = run(unit, operands, how, statistics=False)
    assert torch.equal(y, plain)
    exact = convolved(unit, operands)
    spread = exact.std(dim=1, correction=0)
    for part, pixels in zip(parts.double(), tiles_of(unit, how), strict=True):
        values = exact[:, pixels]
        centre = values.mean(dim=1)
        m2 = (values - centre[:, None]).square().sum(dim=1)
        assert torch.all(part[0] == values.shape[1])
        assert torch.all((part[1] - centre).abs() <= 1e-6 * (spread + exact.abs().amax(dim=1)))
        # A rounding of a sum in fp32 is as large as that of the values, whatever their distances.
        roundings = values.shape[1] * (1e-6 * exact.abs().amax(dim=1)).square()
        assert torch.all((part[2] - m2).abs() <= 1e-5 * m2 + 1e-5 * spread.square() + roundings)


def merged_variance(parts: Tensor) -> Tensor:
    """The parts' variance, in float64."""
    count, mean, m2 = parts.double().unbind(1)
    total = count.sum(dim=0)
    centre = (count * mean).sum(dim=0) / total
    return (m2 + count * (mean - centre).square()).sum(dim=0) / total


@pytest.mark.parametrize(("kernel", "tile"), EVERY_TILE)
@pytest.mark.parametrize("mode", MODES)
def test_every_tile_by_1x1_with_tails(mode: str, kernel: str, tile: int) -> None:
    if kernel == "sm90" and mode == "fp32":
        return
    width = TILES[kernel][tile][1] + 5
    check(replace(PLAIN, mode=mode, shape=(1, 40, 1, width), c_out=75, bias=True), How(kernel, tile))


@pytest.mark.parametrize(("kernel", "tile"), EVERY_TILE)
def test_every_tile_by_3x3_over_many_images(kernel: str, tile: int) -> None:
    check(replace(PLAIN, shape=(9, 24, 5, 7), c_out=75, kernel=(3, 3), padding=(1, 1)), How(kernel, tile))


@pytest.mark.parametrize("tile", [0, 2, 4, 6])
@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_planes(mode: str, tile: int) -> None:
    """NCHW in the sm_90 kernel: tiles stay inside an image."""
    unit = replace(PLAIN, mode=mode, shape=(2, 40, 4, 38), c_out=75, x_layout="NCHW", y_layout="NCHW", bias=True)
    check(unit, How("sm90", tile))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", range(4))
def test_y_may_lie_anyhow(tile: int, layout: str) -> None:
    check(replace(PLAIN, mode="fp16", shape=(2, 24, 5, 15), c_out=70, y_layout=layout), How(tile=tile))


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("c_out", [1, 3, 8, 9, 64, 75, 129, 255])
def test_output_channels(c_out: int, kernel: str) -> None:
    check(replace(PLAIN, shape=(1, 24, 5, 8), c_out=c_out, bias=True), How(kernel, SMALL[kernel]))


@pytest.mark.parametrize("c_in", [3, 8, 72])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_geometry(stride: tuple[int, int], kernel: tuple[int, int], c_in: int) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2)
    unit = replace(PLAIN, shape=(2, c_in, 9, 7), kernel=kernel, stride=stride, padding=padding)
    check(unit, How())
    if c_in % 8 == 0:
        check(unit, How("sm90", SMALL["sm90"]))


@pytest.mark.parametrize("split_k", [2, 5])
@pytest.mark.parametrize("mode", MODES)
def test_k_may_be_split_in_the_sm_80_kernel(mode: str, split_k: int) -> None:
    unit = replace(PLAIN, mode=mode, shape=(1, 70, 5, 8), kernel=(2, 2), bias=True)
    check(unit, How(split_k=split_k))


@pytest.mark.parametrize("tile", range(len(TILES["sm90"])))
def test_blocks_of_the_sm_90_kernel_go_on_to_further_tiles(tile: int) -> None:
    unit = replace(PLAIN, shape=(1, 24, 3, TILES["sm90"][tile][1] - 3), c_out=140, bias=True)
    check(unit, How("sm90", tile, grid=2))


def test_pixels_that_are_the_tile_s_but_not_the_output_s_have_no_say() -> None:
    """What stands there is a bias, or where the weight is infinite NaN."""
    unit = replace(PLAIN, shape=(1, 8, 1, 5), c_out=24, bias=True)
    operands = numbers_for(unit)
    operands["x"].fill_(1.0)
    operands["weight"].abs_()[3] = torch.inf
    for kernel, tile in SMALL.items():
        if places(How(kernel)):
            _, parts = run(unit, operands, How(kernel, tile), statistics=True)
            assert parts[0, 1, 3] == torch.inf
            others = [c for c in range(24) if c != 3]
            assert torch.all(parts[0, 2, others] == 0)


@pytest.mark.parametrize("pixels", [1, 7, 4001])
@pytest.mark.parametrize(("kernel", "tile"), [("sm80", 0), ("sm80", 3), ("sm90", 0), ("sm90", 7)])
def test_the_variance_far_from_zero(kernel: str, tile: int, pixels: int) -> None:
    """With the mean at ten deviations, where sum and sum of squares would lose four digits."""
    unit = replace(PLAIN, mode="tf32", shape=(1, 8, 1, pixels), c_out=9, bias=True)
    how = How(kernel, tile)
    if not places(how):
        return
    operands = numbers_for(unit)
    operands["weight"].fill_(0.0)[:, 0] = 1.0
    operands["x"][:, 0] = (operands["x"][:, 0] + 10).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32)
    operands["bias"].zero_()
    y, parts = run(unit, operands, how, statistics=True)
    exact = y.double().flatten(2).var(dim=(0, 2), correction=0)
    assert exact.max() > 0.1 or pixels == 1
    assert torch.all((merged_variance(parts) - exact).abs() <= 1e-5 * exact)


@pytest.mark.parametrize("kernel", TILES)
def test_integers_are_exact(kernel: str) -> None:
    """Sixteen pixels a tile's part of 32, so that the mean is a short binary fraction."""
    unit = replace(PLAIN, shape=(1, 8, 1, 48), c_out=70, bias=True)
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), torch.ones)
    how = How(kernel, SMALL[kernel])
    if not places(how):
        return
    _, parts = run(unit, operands, how, statistics=True)
    for part, pixels in zip(parts.double(), tiles_of(unit, how), strict=True):
        values = convolved(unit, operands)[:, pixels]
        centre = values.mean(dim=1)
        assert torch.equal(part[1], centre)
        assert torch.equal(part[2], (values - centre[:, None]).square().sum(dim=1))


@pytest.mark.parametrize("kernel", TILES)
def test_they_are_the_same_on_every_call(kernel: str) -> None:
    unit = replace(PLAIN, shape=(2, 40, 5, 7), c_out=130, kernel=(3, 3), padding=(1, 1), bias=True)
    if not places(How(kernel)):
        return
    operands = numbers_for(unit)
    calls = [
        run(unit, operands, How(kernel, 1, seed=seed, late=seed % 2 == 0), statistics=True)[1] for seed in range(4)
    ]
    assert all(torch.equal(calls[0], other) for other in calls)


def test_what_cannot_be_raises_with_the_reason() -> None:
    planner = load_planner()
    problem = planner.Problem()
    problem.batch = problem.height = problem.width = 8
    problem.c_in = problem.c_out = 512
    problem.kernel_h = problem.kernel_w = problem.stride_h = problem.stride_w = 1
    problem.dtype, problem.statistics = planner.DType.bfloat16, True
    problem.x = problem.y = (8 * 8 * 512, 1, 8 * 512, 512)
    problem.weight = (512, 1, 1, 1)
    problem.x_alignment = problem.weight_alignment = problem.y_alignment = 16
    h100 = planner.device_by_name("h100")
    assert planner.make_plan(problem, h100, planner.Kernel.sm_90, 0, 1).refusal is None
    refused = planner.make_plan(problem, h100, planner.Kernel.sm_90, 0, 2).refusal
    assert refused == "a cluster's blocks have no statistics of a whole tile of pixels"
    plan = planner.select_plan(problem, h100)
    assert plan.cluster == 1
    assert planner.statistics_parts(plan, problem) == -(-512 // plan.block_pixels)
    assert ", statistics" in planner.describe(problem, plan)
    problem.activation = planner.Activation.relu
    assert "the convolution with its bias alone" in planner.select_plan(problem, h100).refusal


@settings(max_examples=60)
@given(data=st.data())
def test_any_unit(data: st.DataObject) -> None:
    draw = data.draw
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel = draw(st.sampled_from(list(TILES)))
    sm90 = kernel == "sm90"
    layouts = st.just("channels_last") if sm90 else st.sampled_from(list(LAYOUTS))
    unit = Unit(
        mode=draw(st.sampled_from(["bf16", "fp16", "tf32"] if sm90 else list(MODES))),
        shape=(
            draw(st.integers(1, 3)),
            draw(st.sampled_from([8, 24, 72])) if sm90 else draw(st.integers(1, 80)),
            draw(st.integers(3, 12)),
            draw(st.integers(3, 12)),
        ),
        c_out=draw(st.integers(1, 140)),
        kernel=draw(pairs),
        stride=draw(pairs),
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        batch_norm=False,
        bias=draw(st.booleans()),
        activation="identity",
        x_layout=draw(layouts),
        weight_layout=draw(layouts),
        y_layout=draw(layouts),
    )
    tile = draw(st.sampled_from(range(len(TILES[kernel]))))
    how = How(kernel, tile, late=draw(st.booleans()), seed=draw(st.integers(0, 1000)))
    check(unit, how, mean=draw(st.sampled_from([0.0, 3.0])), seed=draw(st.integers(0, 1000)))
