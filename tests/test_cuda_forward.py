"""A training forward in one launch of the sm_90 kernel gives bitwise what the convolution with statistics and the pass
that normalises by the same mean and rstd give: in the emulator, and on a GPU of compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from host_cuda.build import emulator, gpu
from planner_module import load_planner
from pointfuse.problem import ACTIVATIONS
from torch import Tensor
from units_for_tests import CANARY, MODES, Unit, as_placed, whole

# Channels and pixels of sm90::kTiles.
TILES = [(128, 256), (128, 192), (128, 128), (64, 192), (64, 128), (64, 96), (64, 64), (64, 32)]
SMALL = len(TILES) - 1
PLAIN = Unit(batch_norm=False, activation="identity", bias=True)
HAS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_gpu = False


@pytest.fixture(scope="module", autouse=True, params=["emulator", "gpu"] if HAS_SM90 else ["emulator"])
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    global on_gpu
    on_gpu = request.param == "gpu"
    yield
    on_gpu = False


def launch(name: str, *dicts: dict[str, Any], **how: Any) -> None:
    """A function of the machine of the moment, on the CPU's tensors in some of its dicts."""
    if not on_gpu:
        return getattr(emulator(), name)(*dicts, **how)
    moved = [
        {key: as_placed(whole(value).cuda(), value) if isinstance(value, Tensor) else value for key, value in d.items()}
        for d in dicts
    ]
    getattr(gpu(), name)(*moved, **how)
    for before, after in zip(dicts, moved, strict=True):
        for key, value in before.items():
            if isinstance(value, Tensor):
                whole(value).copy_(whole(after[key]))
    return None


@dataclass(frozen=True)
class Batch:
    """What follows the convolution."""

    activation: str = "leaky_relu"
    slope: float = 0.1
    order: str | None = None
    affine: torch.dtype | None = torch.float32
    running: torch.dtype | None = torch.float32
    momentum: float = 0.25
    eps: float = 1e-3


def framed(*shape: int, dtype: torch.dtype, value: float = torch.nan) -> Tensor:
    """Between canaries, channels_last, 16-byte aligned."""
    storage = torch.full((torch.Size(shape).numel() + 32,), CANARY, dtype=dtype)
    inside = storage[16:-16]
    if len(shape) == 4:
        n, c, h, w = shape
        return inside.view(n, h, w, c).permute(0, 3, 1, 2).fill_(value)
    return inside.view(shape).fill_(value)


def assert_framed(*tensors: Tensor) -> None:
    for tensor in tensors:
        beside = whole(tensor).clone()
        as_placed(beside, tensor).fill_(CANARY)
        assert torch.all(beside == CANARY)


def forward(unit: Unit, batch: Batch, tile: int, seed: int = 1, late: bool = True) -> dict[str, Any]:
    """All tensors of the launch, and in ``before`` the running statistics as they were."""
    torch.manual_seed(0)
    operands = unit.operands(lambda *size: torch.randn(size), torch.ones)
    c, pixels = unit.c_out, unit.y_shape[0] * unit.y_shape[2] * unit.y_shape[3]
    tensors = dict(
        operands,
        y=framed(*unit.y_shape, dtype=unit.dtype),
        parts=framed(-(-pixels // TILES[tile][1]), 3, c, dtype=torch.float32),
    )
    after: dict[str, Any] = dict(
        out=framed(*unit.y_shape, dtype=unit.dtype),
        residual=framed(*unit.y_shape, dtype=unit.dtype).copy_(torch.randn(unit.y_shape)) if batch.order else None,
        gamma=torch.randn(c, dtype=batch.affine) if batch.affine else None,
        beta=torch.randn(c, dtype=batch.affine) if batch.affine else None,
        running_mean=framed(c, dtype=batch.running, value=0.5) if batch.running else None,
        running_var=framed(c, dtype=batch.running, value=1.5) if batch.running else None,
        mean=framed(c, dtype=torch.float32),
        rstd=framed(c, dtype=torch.float32),
    )
    options = dict(
        stride=unit.stride, padding=unit.padding, eps=batch.eps, negative_slope=batch.slope, activation="identity",
        residual_order=batch.order or "add_act", tf32=MODES[unit.mode][1], constant_weight=False,
    )  # fmt: skip
    arrived = torch.zeros(1, dtype=torch.float32)
    call = dict(after, arrived=arrived, activation=batch.activation, momentum=batch.momentum)
    launch("forward", tensors, options, call, tile=tile, seed=seed, late=late)
    written = [tensors["y"], tensors["parts"], *(after[name] for name in ("out", "mean", "rstd"))]
    assert_framed(*written, *(after[name] for name in ("running_mean", "running_var") if after[name] is not None))
    return dict(tensors, **after, options=options)


def check(unit: Unit, batch: Batch = Batch(), tile: int = SMALL, seed: int = 1, late: bool = True) -> None:
    got = forward(unit, batch, tile, seed, late)
    y, parts = torch.full_like(got["y"], torch.nan), torch.full_like(got["parts"], torch.nan)
    inputs = {name: got[name] for name in ("x", "weight", "bias")}
    launch("run", dict(inputs, y=y, parts=parts), got["options"], kernel="sm90", tile=tile)
    assert torch.equal(got["y"], y)
    assert torch.equal(got["parts"], parts)

    # Float64, from the parts and from the rounded y.
    count, mean, m2 = parts.double().unbind(1)
    total = count.sum(dim=0)
    centre = (count * mean).sum(dim=0) / total
    var = (m2 + count * (mean - centre).square()).sum(dim=0) / total
    torch.testing.assert_close(got["mean"].double(), centre, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["rstd"].double(), 1 / (var + batch.eps).sqrt(), rtol=1e-6, atol=0)
    if batch.running:
        unbiased = var * total / (total - 1)
        rounding = 1e-6 if batch.running is torch.float32 else 1e-2
        for name, start, target in (("running_mean", 0.5, centre), ("running_var", 1.5, unbiased)):
            moved = start * (1 - batch.momentum) + batch.momentum * target
            torch.testing.assert_close(got[name].double(), moved, rtol=rounding, atol=rounding)

    # Bitwise, by the pass that has mean and rstd from memory.
    n, c, h, w = y.shape
    rows = {name: None if got[name] is None else got[name].permute(0, 2, 3, 1).reshape(n * h * w, c, 1)
            for name in ("y", "residual")}  # fmt: skip
    out = torch.full_like(rows["y"], torch.nan)
    given = dict(rows, out=out, **{name: got[name] for name in ("gamma", "beta", "mean", "rstd")})
    options = dict(
        activation=batch.activation, residual_order=batch.order or "add_act", negative_slope=batch.slope,
        momentum=0.0, eps=0.0,
    )  # fmt: skip
    launch("normalise", given, options)
    assert torch.equal(got["out"].permute(0, 2, 3, 1).reshape(n * h * w, c, 1), out)


@pytest.mark.parametrize("tile", range(SMALL + 1), ids=lambda tile: "x".join(map(str, TILES[tile])))
@pytest.mark.parametrize("mode", ["bf16", "fp16", "tf32"])
def test_every_tile(mode: str, tile: int) -> None:
    check(replace(PLAIN, mode=mode, shape=(1, 40, 2, TILES[tile][1] // 2 + 9), c_out=136), Batch(order="add_act"), tile)


@pytest.mark.parametrize("order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(activation: str, order: str | None) -> None:
    for tile in (SMALL, 4):
        check(replace(PLAIN, shape=(2, 24, 5, 8), c_out=72), Batch(activation, order=order), tile)


@pytest.mark.parametrize("running", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [None, torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_channels_may_be_absent_and_of_another_dtype(
    affine: torch.dtype | None, running: torch.dtype | None
) -> None:
    check(replace(PLAIN, shape=(2, 24, 5, 7), c_out=24, bias=False), Batch(affine=affine, running=running))


@pytest.mark.parametrize("geometry", ["1x1 stride 2", "3x3"])
def test_geometry(geometry: str) -> None:
    kernel = dict(kernel=(3, 3), padding=(1, 1)) if geometry == "3x3" else dict(stride=(2, 2))
    check(replace(PLAIN, shape=(3, 24, 9, 7), c_out=200, **kernel))


def test_what_one_launch_cannot_do() -> None:
    planner = load_planner()
    h100 = planner.device_by_name("h100")

    def refusal(kernel: Any, tile: int, **changes: Any) -> str | None:
        problem = planner.Problem()
        problem.batch, problem.c_in, problem.c_out, problem.height, problem.width = 8, 64, 512, 26, 26
        problem.kernel_h = problem.kernel_w = problem.stride_h = problem.stride_w = 1
        problem.dtype, problem.statistics = planner.DType.bfloat16, True
        problem.x, problem.y = (26 * 26 * 64, 1, 26 * 64, 64), (26 * 26 * 512, 1, 26 * 512, 512)
        problem.weight, problem.x_alignment = (64, 1, 1, 1), 16
        problem.weight_alignment = problem.y_alignment = 16
        for name, value in changes.items():
            setattr(problem, name, value)
        plan = planner.make_plan(problem, h100, kernel, tile, 1)
        assert plan.refusal is None, plan.refusal
        return planner.cooperative_refusal(problem, plan, h100)

    sm90 = planner.Kernel.sm_90
    # Of 128 by 256 there are 88 tiles for 132 places; of 128 by 128, 172; of 64 by 192, 232 for 264.
    assert [refusal(sm90, tile) is None for tile in (0, 2, 3)] == [True, False, True]
    assert refusal(sm90, 2) == "the tiles are more than the device holds at once"
    assert refusal(sm90, 0, statistics=False) == "there are no statistics to wait for"
    assert refusal(planner.Kernel.sm_80, 0) == "only the sm_90 kernel keeps a tile in registers"
    rows = "y is not channels_last with pixels at multiples of 16 bytes"
    assert refusal(sm90, 0, y_alignment=2) == rows
    planes = dict(height=16, width=26, x=(416 * 64, 416, 26, 1), y=(416 * 512, 416, 26, 1))
    assert refusal(sm90, 0, **planes) == rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("late", [True, False], ids=["late copies", "early copies"])
def test_threads_may_run_in_any_order(late: bool, seed: int) -> None:
    check(replace(PLAIN, shape=(1, 72, 9, 15), c_out=136), Batch(order="act_add"), tile=6, seed=seed, late=late)
