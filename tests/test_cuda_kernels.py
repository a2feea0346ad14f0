"""The sm_80 kernel gives PyTorch's answers, whatever the tile, layout and alignment: in the emulator, and on a GPU
where there is one.

Every output is written, nothing beside it is touched, and nothing but the operands is read: outputs lie in buffers of
canaries, inputs in buffers of NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from host_cuda.build import emulator, gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from pointfuse.problem import ACTIVATIONS
from torch import Tensor
from units_for_tests import CANARY, EPS, LAYOUTS, MODES, Unit, as_placed, doubled, eager, whole
from yardstick import error

SM80_TILES = range(4)
on_gpu = False


@pytest.fixture(scope="module", autouse=True, params=["emulator", "gpu"] if torch.cuda.is_available() else ["emulator"])
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    global on_gpu
    on_gpu = request.param == "gpu"
    yield
    on_gpu = False


def run(tensors: dict[str, Tensor | None], given: dict[str, Any], how: How) -> dict[str, Any]:
    """Run the kernel on the CPU's tensors, y among them, on the machine of the moment; its plan."""
    if not on_gpu:
        return emulator().run(tensors, given, **vars(how))
    moved = {name: None if t is None else as_placed(whole(t).cuda(), t) for name, t in tensors.items()}
    plan = gpu().run(moved, given, **vars(how))
    for name, t in tensors.items():
        if t is not None:
            whole(t).copy_(whole(moved[name]))
    return plan


def options(unit: Unit) -> dict[str, Any]:
    return dict(
        stride=unit.stride, padding=unit.padding, eps=unit.eps, negative_slope=unit.slope, activation=unit.activation,
        residual_order=unit.order or "add_act", tf32=MODES[unit.mode][1], constant_weight=False,
    )  # fmt: skip


@dataclass(frozen=True)
class How:
    """The candidate plan, and how the emulator runs it."""

    kernel: str = "sm80"
    tile: int = 3
    split_k: int = 1
    general: bool = False
    late: bool = True
    seed: int = 1


def fused(unit: Unit, operands: dict[str, Tensor | None], how: How) -> tuple[Tensor, dict[str, Any]]:
    """The kernel's output, in the unit's layout, and the plan; asserts that nothing beside the output was written."""
    y = LAYOUTS[unit.y_layout](*unit.y_shape, dtype=unit.dtype)
    whole(y).fill_(CANARY)
    y.fill_(torch.nan)
    before = {name: whole(t).clone() for name, t in operands.items() if t is not None}
    plan = run(dict(operands, y=y), options(unit), how)
    beside = whole(y).clone()
    as_placed(beside, y).fill_(CANARY)
    assert torch.all(beside == CANARY)
    for name, copy in before.items():
        assert torch.equal(whole(operands[name]).nan_to_num(CANARY), copy.nan_to_num(CANARY)), name
    return y, plan


def rounded_to_tf32(t: Tensor) -> Tensor:
    """To ten bits of mantissa, halves away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def assert_exact(unit: Unit, how: How = How(), seed: int = 0) -> dict[str, Any]:
    """With small integers and rstd a power of two fp32 holds every sum, and the one rounding at the end is the exact
    result's."""
    generator = torch.Generator().manual_seed(seed)
    operands = unit.operands(
        lambda *size: torch.randint(-3, 4, size, generator=generator).float(), lambda c: torch.full((c,), 4 - EPS)
    )
    actual, plan = fused(unit, operands, how)
    expected = eager(unit, doubled(operands)).to(unit.dtype)
    assert torch.equal(actual, expected), _difference(actual, expected)
    return plan


def _difference(actual: Tensor, expected: Tensor) -> str:
    wrong = (actual != expected).nonzero()
    return f"{len(wrong)} of {actual.numel()} differ, the first at {wrong[0].tolist()}"


def assert_accurate(unit: Unit, how: How = How()) -> None:
    """The rule of yardstick.py. To TF32 the operands are those it rounds to: what is left is fp32's own error."""
    operands = unit.operands(torch.randn, lambda c: torch.rand(c) + 0.5)
    operands["weight"].mul_(0.1)
    actual, _ = fused(unit, operands, how)
    if unit.mode == "tf32":
        operands["x"], operands["weight"] = (rounded_to_tf32(operands[name].contiguous()) for name in ("x", "weight"))
    exact, composed = eager(unit, doubled(operands)), eager(unit, operands)
    assert error(actual, exact) <= 2 * error(composed, exact) + 1e-6


ODD = Unit(shape=(2, 75, 5, 7), c_out=130, kernel=(3, 3), padding=(1, 1), bias=True)


@pytest.mark.parametrize("general", [False, True], ids=["vectorised", "general"])
@pytest.mark.parametrize("tile", SM80_TILES)
@pytest.mark.parametrize("mode", MODES)
def test_every_tile_is_as_accurate_as_pytorch(mode: str, tile: int, general: bool) -> None:
    unit = replace(ODD, mode=mode, shape=(2, 80, 5, 7))
    assert_accurate(unit, How(tile=tile, general=general))


@pytest.mark.parametrize("tile", SM80_TILES)
@pytest.mark.parametrize("mode", MODES)
def test_every_tile_is_exact_where_nothing_is_a_multiple_of_anything(mode: str, tile: int) -> None:
    assert_exact(replace(ODD, mode=mode), How(tile=tile, late=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_x_may_lie_anyhow(mode: str, layout: str) -> None:
    assert_exact(replace(ODD, mode=mode, c_out=24, x_layout=layout, kernel=(3, 3)))
    assert_exact(replace(ODD, mode=mode, c_out=24, x_layout=layout, kernel=(1, 1), padding=(0, 0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_may_lie_anyhow(mode: str, layout: str) -> None:
    assert_exact(replace(ODD, mode=mode, weight_layout=layout))


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_end_inside_sixteen_aligned_bytes(mode: str) -> None:
    """Both operands are aligned slices, whose rows go on with NaN after c_in."""
    layout = "aligned channel slice"
    plan = assert_exact(Unit(mode, shape=(1, 75, 5, 7), kernel=(2, 2), x_layout=layout, weight_layout=layout))
    assert plan["x_vector"] == plan["weight_vector"] == 16


@pytest.mark.parametrize("residual_layout", ["channels_last", "NCHW", "odd channel slice"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_y_and_the_residual_may_lie_anyhow(mode: str, layout: str, residual_layout: str) -> None:
    unit = Unit(mode, y_layout=layout, residual_layout=residual_layout, order="add_act", shape=(2, 24, 4, 8), c_out=72)
    assert_exact(unit)


@pytest.mark.parametrize("vector", [2, 4, 8, 16])
@pytest.mark.parametrize("pixel_major", [False, True], ids=["along channels", "along pixels"])
@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_stores_are_as_wide_as_alignment_allows(mode: str, pixel_major: bool, vector: int) -> None:
    """Every width of a store, and that the planner chooses it."""
    elements = max(1, vector // (4 if mode == "fp32" else 2))
    shape, c_out = ((2, 16, 3, 3 * elements), 24) if pixel_major else ((2, 16, 3, 3), 25 * elements)
    layout = "NCHW" if pixel_major else "channels_last"
    unit = Unit(mode, shape=shape, c_out=c_out, y_layout=layout, residual_layout=layout, order="act_add")
    plan = assert_exact(unit, How(tile=2))
    assert plan["y_vector"] == max(vector, unit.dtype.itemsize)
    assert plan["y_pixel_major"] == pixel_major


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (3, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 2)], ids=str)
def test_geometry(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    unit = Unit(shape=(2, 24, 7, 8), c_out=72, kernel=kernel, stride=stride, padding=padding)
    assert_exact(unit)
    assert_exact(replace(unit, mode="tf32", x_layout="NCHW", y_layout="NCHW"))


@pytest.mark.parametrize("c_in", [1, 3, 24, 64, 65, 80, 130])
@pytest.mark.parametrize("c_out", [1, 3, 64, 65, 130])
def test_channels(c_in: int, c_out: int) -> None:
    assert_exact(Unit(shape=(1, c_in, 5, 5), c_out=c_out))
    assert_exact(Unit(shape=(1, c_in, 5, 5), c_out=c_out, mode="fp32", x_layout="NCHW"), How(tile=2))


@pytest.mark.parametrize("order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_activations_and_residuals(mode: str, activation: str, order: str | None) -> None:
    for slope in (0.1, 0.0, -0.5) if activation == "leaky_relu" else (0.1,):
        assert_accurate(Unit(mode, activation=activation, slope=slope, order=order, shape=(1, 64, 5, 7)))


@pytest.mark.parametrize("channel_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_norm", ["affine", "plain", None])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_batch_norm_may_be_absent_and_of_another_dtype(
    bias: bool, batch_norm: str | None, channel_dtype: torch.dtype
) -> None:
    for mode in ("bf16", "fp32"):
        unit = Unit(mode, bias=bias, batch_norm=batch_norm is not None, affine=batch_norm == "affine")
        assert_exact(replace(unit, channel_dtype=channel_dtype))


@pytest.mark.parametrize("split_k", [2, 3, 5, 10])
@pytest.mark.parametrize("tile", SM80_TILES)
@pytest.mark.parametrize("mode", MODES)
def test_k_may_be_split(mode: str, tile: int, split_k: int) -> None:
    c_in = 130 if mode in ("bf16", "fp16") else 65
    unit = Unit(mode, shape=(1, c_in, 5, 7), c_out=75, kernel=(2, 2), padding=(1, 0), order="act_add", bias=True)
    assert assert_exact(unit, How(tile=tile, split_k=split_k))["split_k"] == split_k


def test_a_split_adds_in_a_fixed_order() -> None:
    unit = Unit("fp32", shape=(1, 130, 5, 7), kernel=(3, 3), padding=(1, 1))
    operands = unit.operands(torch.randn, lambda c: torch.rand(c) + 0.5)
    outputs = [fused(unit, operands, How(split_k=6, seed=seed, late=seed % 2 == 0))[0] for seed in range(4)]
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize("far", ["x", "weight", "y", "residual"])
def test_offsets_past_two_to_the_31(far: str) -> None:
    """Neighbours along the outermost dimension are 2^31 elements apart, in memory that is reserved, not touched."""
    unit = Unit(shape=(2, 16, 3, 3), c_out=2, order="add_act")
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), lambda c: torch.full((c,), 4 - EPS))
    tensors = dict(operands, y=torch.empty(unit.y_shape, dtype=unit.dtype))
    values = tensors[far]
    assert values is not None
    n, c, h, w = values.shape
    memory = torch.from_numpy(np.empty((n - 1) * (2**31 + 8) + c * h * w, dtype=np.int16)).view(unit.dtype)
    tensors[far] = memory.as_strided(values.shape, (2**31 + 8, 1, w * c, c)).copy_(values)
    run(tensors, options(unit), How())
    assert torch.equal(tensors["y"], eager(unit, doubled(operands)).to(unit.dtype))


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize("late", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("tile", SM80_TILES)
def test_threads_may_run_in_any_order(tile: int, layout: str, late: bool, seed: int) -> None:
    """More steps than the pipeline has stages, so that each is used again."""
    unit = Unit(shape=(1, 80, 5, 7), c_out=72, kernel=(2, 3), x_layout=layout, y_layout=layout)
    assert_exact(unit, How(tile=tile, late=late, seed=seed))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_propagate_as_in_pytorch(mode: str, activation: str, bad: float) -> None:
    unit = Unit(mode, activation=activation, shape=(1, 80, 5, 7), kernel=(3, 3), slope=0.0)
    operands = unit.operands(torch.randn, lambda c: torch.rand(c) + 0.5)
    operands["weight"].abs_().add_(0.1)
    operands["x"][0, 3, 2, 3] = bad
    actual = fused(unit, operands, How())[0].double()
    expected = eager(unit, doubled(operands))
    assert expected.isfinite().any()
    assert not expected.isfinite().all() or activation == "relu6" or bad < 0
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1, equal_nan=True)


def test_half_precision_overflows_to_infinity_as_in_pytorch() -> None:
    unit = Unit("fp16", activation="identity", batch_norm=False, shape=(1, 64, 5, 7))
    operands = unit.operands(lambda *size: torch.full(size, 60.0), torch.ones)
    assert torch.equal(fused(unit, operands, How())[0], eager(unit, operands))


def test_what_a_plan_cannot_be_raises_with_the_reason() -> None:
    unit = Unit()
    operands = unit.operands(torch.randn, torch.ones)
    with pytest.raises(ValueError, match="split_k must be from 1 to the k steps"):
        fused(unit, operands, How(split_k=2))
    with pytest.raises(ValueError, match="no such tile"):
        fused(unit, operands, How(tile=len(SM80_TILES)))


@settings(max_examples=120)
@given(data=st.data())
def test_any_unit_is_exact(data: st.DataObject) -> None:
    draw = data.draw
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, padding = draw(pairs), draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    layouts = st.sampled_from(list(LAYOUTS))
    unit = Unit(
        mode=draw(st.sampled_from(list(MODES))),
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.integers(3, 9)), draw(st.integers(3, 9))),
        c_out=draw(st.integers(1, 140)),
        kernel=kernel,
        stride=draw(pairs),
        padding=padding,
        batch_norm=draw(st.booleans()),
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["leaky_relu", "relu", "relu6", "identity"])),
        slope=draw(st.sampled_from([0.5, 0.0, -2.0])),
        order=draw(st.sampled_from([None, "add_act", "act_add"])),
        x_layout=draw(layouts),
        weight_layout=draw(layouts),
        y_layout=draw(layouts),
        residual_layout=draw(layouts),
    )
    blocks_k = -(-unit.shape[1] // (128 // unit.dtype.itemsize))
    how = How(
        tile=draw(st.sampled_from(SM80_TILES)),
        split_k=draw(st.integers(1, min(4, kernel[0] * kernel[1] * blocks_k))),
        general=draw(st.booleans()),
        late=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    assert_exact(unit, how, draw(st.integers(0, 1000)))
