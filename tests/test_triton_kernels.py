"""The Triton kernels give PyTorch's answers on every branch: in Triton's interpreter, and natively on a GPU.

Every output is written, nothing beside it is touched, and nothing but the operands is read: outputs lie in buffers of
canaries, inputs in buffers of NaN. Planning and launching are the backend's own; a test only narrows what is planned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointfuse.backends import BACKENDS, calls
from pointfuse.backends.triton import planning
from pointfuse.backends.triton.configs import Chip, Config
from pointfuse.problem import ACTIVATIONS, RESIDUAL_ORDERS, Activation, BatchNorm, Geometry
from torch import Tensor
from units_for_tests import CANARY, EPS, LAYOUTS, MODES, Unit, as_placed, doubled, eager, place, whole
from yardstick import error

if reason := BACKENDS["triton"].triton_problem():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from pointfuse.backends.triton import launching
from pointfuse.backends.triton.kernels import _first_pixel, _pixel_tiles, _tile_pixels
from pointfuse.backends.triton.planning import Box, Plan

if not launching.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

DEVICE = "cpu" if launching.INTERPRETED else "cuda"
# Without tensor descriptors, and with them where addresses and pitches allow.
FAMILIES = ["sm_80", "sm_90"]
GEOMETRIES = {"1x1": dict(kernel=(1, 1)), "3x3": dict(kernel=(3, 3), padding=(1, 1))}
SMALL = Config(block_channels=32, block_pixels=32, block_k=32, stages=1, warps=4)
CONSECUTIVE: Box = (0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE):
        patch.setattr(calls, "on_gpu", lambda tensor: tensor.device.type == DEVICE)
        with interpreter_checks(False):
            yield


@contextlib.contextmanager
def interpreter_checks(on: bool) -> Iterator[None]:
    """Whether the interpreter, where there is one, looks for sums that leave 32 bits, which doubles its time."""
    if not launching.INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    with mock.patch.object(interpreter_builder, "options", InterpreterOptions(debug=on, sanitize_overflow=on)):
        yield


@contextlib.contextmanager
def only_operands_are_touched(operands: dict[str, Tensor | None], y: Tensor) -> Iterator[None]:
    """The interpreter, where there is one, loads from addresses of operands alone and stores to those of y."""
    if not launching.INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    allocate = launching._partials
    read = np.unique(np.concatenate([addresses(t) for t in operands.values() if t is not None]))
    written = np.unique(addresses(y))
    partials: list[Tensor] = []

    def among(known: np.ndarray, pointers: Any, mask: Any) -> bool:
        asked = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        found = known[np.searchsorted(known, asked).clip(max=len(known) - 1)] == asked
        for t in partials:
            found |= asked - np.uint64(t.data_ptr()) < np.uint64(t.nbytes)
        return bool(found.all())

    def checked_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        assert among(read, pointers, mask), "it loads what is no operand's"
        return load(pointers, mask, *rest, **options)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        assert among(written, pointers, mask), "it stores outside y"
        return store(pointers, value, mask, *rest)

    def kept(*given: Any) -> Tensor | None:
        made = allocate(*given)
        partials.extend([] if made is None else [made])
        return made

    with (
        mock.patch.object(interpreter_builder, "create_masked_load", checked_load),
        mock.patch.object(interpreter_builder, "create_masked_store", checked_store),
        mock.patch.object(launching, "_partials", kept),
    ):
        yield


def addresses(t: Tensor) -> np.ndarray:
    """Where each element of a tensor lies in memory."""
    offsets = sum(
        np.arange(size).reshape(-1, *[1] * (t.dim() - axis - 1)) * stride
        for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True))
    )
    return np.uint64(t.data_ptr()) + np.asarray(offsets * t.element_size(), dtype=np.uint64).reshape(-1)


@dataclass(frozen=True)
class How:
    """What a plan is narrowed to.

    ``parts``: of the sum over K. ``box``: of pixels where descriptors load x, or, with ``gathered``, where none does;
    None leaves it to the planner. ``programs``: that share the tiles; None: as planned.
    """

    family: str = "sm_80"
    tile: Config = SMALL
    parts: int = 1
    box: Box | None = None
    gathered: bool = False
    programs: int | None = None


def arguments(unit: Unit, operands: dict[str, Tensor | None]) -> tuple[Any, ...]:
    """The eleven arguments of the backend's operator."""
    x, weight, bias, mean, var, gamma, beta, residual = operands.values()
    norm = None if mean is None else BatchNorm(mean, var, gamma, beta, False, 0.0, unit.eps)
    activation, geometry = Activation(unit.activation, unit.slope), Geometry(unit.stride, unit.padding)
    with mock.patch.object(calls, "tf32_allowed", return_value=MODES[unit.mode][1]):
        return calls.arguments(
            x, weight, bias, norm, activation, geometry, residual, unit.order or "add_act", frozen=True
        )  # fmt: skip


def planned(unit: Unit, operands: dict[str, Tensor | None], y: Tensor, how: How) -> Plan:
    """The backend's plan, narrowed."""
    x, weight, residual = operands["x"], operands["weight"], operands["residual"]
    assert x is not None
    assert weight is not None
    chip = Chip(how.family, 132, 227 << 10, how.family != "sm_80")
    boxed = mock.patch.object(planning, "_best_box", return_value=how.box)
    with contextlib.nullcontext() if how.box is None else boxed:
        plan = planning.plan(
            x, weight, residual, y, arguments(unit, operands)[8], chip, {}, aligned=planning.aligned(x, weight),
            interpreted=launching.INTERPRETED, tile=replace(how.tile, split_k=how.parts),
        )  # fmt: skip
    box = how.box if how.box is not None and how.gathered else plan.box
    if (plan.box, plan.config.split_k) != (box, how.parts):
        plan = retiled(plan, box, how.parts)
    return plan if how.programs is None else replace(plan, grid=how.programs)


def retiled(plan: Plan, box: Box, parts: int) -> Plan:
    """A plan with another box, and in so many parts, which may be more than the sum has steps."""
    config = replace(plan.config, split_k=parts)
    sizes = (plan.plane.batch, plan.plane.out_height, plan.plane.out_width)
    if any(box):
        pixel_tiles = math.prod(-(-size // extent) for size, extent in zip(sizes, box, strict=True))
    else:
        pixel_tiles = -(-math.prod(sizes) // config.block_pixels)
    tiles = -(-plan.integers["c_out"] // config.block_channels) * pixel_tiles
    constants = plan.constants | dict(SPLIT_K=parts, BOX_N=box[0], BOX_H=box[1], BOX_W=box[2])
    finishing = {name: constants.get(name, 16) for name in launching.finish_split.arg_names if name.isupper()}
    return replace(
        plan,
        config=config,
        box=box,
        grid=tiles * parts,
        finish_grid=tiles * config.block_channels // 16,
        partials=tiles * parts * config.block_channels * config.block_pixels,
        constants=constants,
        finish_constants=finishing if parts > 1 else {},
    )


def launch(plan: Plan, operands: dict[str, Tensor | None], y: Tensor, unit: Unit) -> None:
    weight = operands["weight"]
    assert weight is not None
    with only_operands_are_touched(operands, y):
        launching.Launch(plan, weight, y).write(y, tuple(operands.values()), unit.eps, unit.slope)


def amid_nan(vector: Tensor | None) -> Tensor | None:
    if vector is None:
        return None
    return torch.full((len(vector) + 16,), torch.nan, dtype=vector.dtype)[8:-8].copy_(vector)


def fused(unit: Unit, operands: dict[str, Tensor | None], how: How = How()) -> tuple[Tensor, Plan]:
    """The kernels' output, in the unit's layout, and the plan; asserts that nothing beside the output was written."""
    operands = {name: amid_nan(t) if t is not None and t.dim() == 1 else t for name, t in operands.items()}
    y = LAYOUTS[unit.y_layout](*unit.y_shape, dtype=unit.dtype)
    whole(y).fill_(CANARY)
    y.fill_(torch.nan)
    before = {name: whole(t).clone() for name, t in operands.items() if t is not None}
    plan = planned(unit, operands, y, how)
    launch(plan, operands, y, unit)
    beside = whole(y).clone()
    as_placed(beside, y).fill_(CANARY)
    assert torch.all(beside == CANARY)
    for name, copy in before.items():
        assert torch.equal(whole(operands[name]).nan_to_num(CANARY), copy.nan_to_num(CANARY)), name
    return y, plan


def on_cpu(operands: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.cpu() for name, t in operands.items()}


def assert_exact(unit: Unit, how: How = How()) -> Plan:
    """With small integers and rstd a power of two fp32 holds every sum, and the one rounding at the end is the exact
    result's."""
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), lambda c: torch.full((c,), 4 - unit.eps))
    actual, plan = fused(unit, operands, how)
    expected = eager(unit, doubled(on_cpu(operands))).to(unit.dtype)
    assert torch.equal(actual.cpu(), expected), _difference(actual.cpu(), expected)
    return plan


def _difference(actual: Tensor, expected: Tensor) -> str:
    wrong = (actual != expected).nonzero()
    return f"{len(wrong)} of {actual.numel()} differ, the first at {wrong[0].tolist()}"


def as_tf32(t: Tensor) -> Tensor:
    """fp32 without its last 13 bits, which every way of rounding to TF32 leaves as it is."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def random_operands(unit: Unit) -> dict[str, Tensor | None]:
    """Normal numbers, of which x and the weight are TF32's own in that mode: what is left is fp32's error."""
    operands = unit.operands(torch.randn, lambda c: torch.rand(c) + 0.5)
    x, weight = operands["x"], operands["weight"]
    assert x is not None
    assert weight is not None
    weight.mul_(0.1)
    if unit.mode == "tf32":
        for t in (x, weight):
            t.copy_(as_tf32(t.contiguous()))
    return operands


def assert_accurate(unit: Unit, how: How = How(), operands: dict[str, Tensor | None] | None = None) -> Plan:
    """The rule of yardstick.py."""
    operands = operands or random_operands(unit)
    actual, plan = fused(unit, operands, how)
    operands = on_cpu(operands)
    exact, composed = eager(unit, doubled(operands)), eager(unit, operands)
    assert error(actual.cpu(), exact) <= 2 * error(composed, exact) + 1e-6
    return plan


ODD = Unit(shape=(2, 24, 5, 7), c_out=40, kernel=(3, 3), padding=(1, 1), bias=True, x_layout="amid others",
           weight_layout="amid others")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_as_accurate_as_pytorch(mode: str, geometry: dict[str, Any], family: str) -> None:
    unit = Unit(mode, c_out=40, x_layout="amid others", weight_layout="amid others", **geometry)
    plan = assert_accurate(unit, How(family, box=(2, 4, 4)))
    described = family == "sm_90"
    assert plan.constants["DESCRIBE_X"] == described
    # Past its 24 channels a row of the weight goes on with the next tap.
    assert plan.constants["DESCRIBE_WEIGHT"] == (described and unit.kernel == (1, 1))
    assert plan.constants["PRECISION"] == ("tf32x3" if mode == "fp32" else "tf32")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_x_may_lie_anyhow(geometry: dict[str, Any], layout: str, family: str) -> None:
    unit = Unit(c_out=24, x_layout=layout, weight_layout="amid others", **geometry)
    plan = assert_exact(unit, How(family, box=(1, 4, 8)))
    rows_of_16_bytes = layout in ("channels_last", "aligned channel slice", "amid others")
    assert plan.constants["DESCRIBE_X"] == (family == "sm_90" and rows_of_16_bytes)


@pytest.mark.parametrize("mode", MODES)
def test_channels_of_a_slice_are_loaded_by_descriptor_in_every_mode(mode: str) -> None:
    """24 of 32 channels at an aligned offset: past them lie NaN, which a block of 32 must not load."""
    unit = replace(ODD, mode=mode, x_layout="aligned channel slice")
    assert assert_exact(unit, How("sm_90", box=(1, 4, 8))).constants["DESCRIBE_X"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_a_batch_may_be_expanded(kernel: tuple[int, int], family: str) -> None:
    unit = Unit(shape=(3, 24, 5, 7), c_out=24, kernel=kernel, weight_layout="amid others")
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), lambda c: torch.full((c,), 4 - EPS))
    operands["x"] = operands["x"][:1].expand(3, -1, -1, -1)
    y, plan = fused(unit, operands, How(family))
    assert plan.plane.x[0] == 0
    assert not plan.constants["DESCRIBE_X"]
    assert torch.equal(y.cpu(), eager(unit, doubled(on_cpu(operands))).to(unit.dtype))


@pytest.mark.parametrize("residual_layout", ["channels_last", "NCHW", "odd channel slice"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_and_the_residual_may_lie_anyhow(layout: str, residual_layout: str) -> None:
    unit = Unit("fp16", shape=(2, 24, 4, 8), c_out=40, order="add_act", y_layout=layout)
    assert_exact(replace(unit, residual_layout=residual_layout))


@pytest.mark.parametrize("layout", ["amid others", "NCHW"])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (1, 0), (0, 2)], ids="padding {0[0]}x{0[1]}".format)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (1, 4)], ids="stride {0[0]}x{0[1]}".format)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_geometry(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], layout: str) -> None:
    unit = replace(ODD, c_out=24, kernel=kernel, stride=stride, padding=padding, x_layout=layout, y_layout=layout)
    assert_exact(unit, How("sm_90", box=(1, 4, 8)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("c_in", [1, 3, 24, 32, 33, 64])
@pytest.mark.parametrize("c_out", [1, 32, 75])
def test_channels(c_in: int, c_out: int, family: str) -> None:
    unit = replace(ODD, shape=(1, c_in, 5, 5), c_out=c_out, kernel=(1, 1), padding=(0, 0), order="act_add")
    plan = assert_exact(unit, How(family))
    assert plan.constants["EVEN_K"] == (c_in in (32, 64))
    assert plan.constants["DESCRIBE_X"] == (family == "sm_90" and c_in % 8 == 0)


def test_channels_of_a_detection_head() -> None:
    assert_exact(Unit("fp32", shape=(1, 32, 3, 3), c_out=255, activation="identity", batch_norm=False, bias=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("c_in", [1, 3, 33, 64])
def test_channels_under_nine_taps(c_in: int, family: str) -> None:
    plan = assert_exact(replace(ODD, shape=(1, c_in, 3, 4), c_out=33), How(family))
    # No row of it ends within a block here, so that it may be described as one of 9 * 64.
    assert plan.constants["DESCRIBE_WEIGHT"] == (family == "sm_90" and c_in == 64)


@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_activations_and_residuals(mode: str, activation: str, order: str | None) -> None:
    for slope in (0.1, 0.0, -0.5) if activation == "leaky_relu" else (0.1,):
        assert_accurate(Unit(mode, activation=activation, slope=slope, order=order, shape=(1, 24, 4, 7), c_out=32))


def test_silu_holds_far_from_zero() -> None:
    """Where exp overflows, and where it vanishes."""
    x = torch.tensor([-1e4, -200.0, -88.8, -17.0, -1e-30, 0.0, 1e-30, 17.0, 88.8, 200.0, 1e4, 3e38])
    unit = Unit("fp32", shape=(1, 1, 1, 12), c_out=1, activation="silu", batch_norm=False)
    operands = unit.operands(torch.ones, torch.ones) | {"x": x.view(1, 1, 1, 12)}
    y = fused(unit, operands)[0].cpu().double()
    exact = torch.nn.functional.silu(x.cpu().double()).view_as(y)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("channel_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_norm", ["affine", "plain", None], ids="batch norm: {}".format)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bias_and_batch_norm_may_be_absent_and_of_another_dtype(
    bias: bool, batch_norm: str | None, channel_dtype: torch.dtype
) -> None:
    for mode in ("bf16", "fp32"):
        unit = Unit(mode, bias=bias, batch_norm=batch_norm is not None, affine=batch_norm == "affine")
        assert_exact(replace(unit, shape=(1, 24, 3, 3), channel_dtype=channel_dtype))


@pytest.mark.parametrize("absent", ["gamma", "beta"])
def test_batch_norm_may_lack_one_of_its_parameters(absent: str) -> None:
    unit = Unit("fp32", shape=(1, 24, 3, 3))
    operands = unit.operands(lambda *size: torch.randint(1, 4, size).float(), lambda c: torch.full((c,), 4 - EPS))
    operands[absent] = None
    y, _ = fused(unit, operands)
    assert torch.equal(y.cpu(), eager(unit, doubled(on_cpu(operands))).float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "parts"), [("sm_80", 2), ("sm_90", 3), ("sm_80", 8), ("sm_90", 8)])
def test_k_may_be_split(family: str, parts: int, mode: str) -> None:
    """27 steps: in eight parts of four the last has none."""
    unit = replace(ODD, mode=mode, shape=(1, 65, 3, 4), c_out=33, order="act_add")
    plan = assert_exact(unit, How(family, parts=parts))
    assert plan.finish_constants["SPLIT_K"] == parts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", range(2, 9))
def test_there_may_be_more_parts_than_steps(parts: int, family: str) -> None:
    """Two steps; the other parts are zeros, and read nothing."""
    unit = Unit("fp32", shape=(1, 64, 4, 5), c_out=33, order="add_act")
    assert_exact(unit, How(family, parts=parts))


@pytest.mark.parametrize("tile", [replace(SMALL, block_channels=16), replace(SMALL, block_channels=64)], ids=["1", "4"])
def test_a_split_tile_is_finished_in_bands(tile: Config) -> None:
    unit = replace(ODD, c_out=75, kernel=(1, 1), padding=(0, 0))
    plan = assert_exact(unit, How("sm_90", tile, parts=2))
    assert plan.finish_grid == -(-75 // tile.block_channels) * 3 * tile.block_channels // 16


@pytest.mark.parametrize("parts", [1, 3], ids=["whole", "split"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_and_repetition_change_no_bit(family: str, parts: int) -> None:
    unit = replace(ODD, mode="fp32", shape=(1, 24, 4, 9))
    operands = random_operands(unit)
    hows = [How(family, parts=parts, programs=programs) for programs in (None, None, 1, 3, 100)]
    hows.append(How(family, replace(SMALL, flatten=True), parts, programs=2))
    first, *others = [fused(unit, operands, how)[0] for how in hows]
    assert first.isfinite().all()
    assert all(torch.equal(first, other) for other in others)


BOXES = [(16 >> i >> j, 1 << i, 1 << j) for i in range(5) for j in range(5 - i)]


@pytest.mark.parametrize("box", BOXES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def test_boxes(box: Box) -> None:
    """Each box of 16 pixels, which may hang over the last image, row and column."""
    unit = replace(ODD, shape=(3, 8, 5, 3), c_out=16)
    plan = assert_exact(unit, How("sm_90", Config(16, 16, 16, 1, 4), box=box))
    assert plan.box == box
    assert plan.constants["DESCRIBE_X"]


@pytest.mark.parametrize("box", BOXES[::4], ids="{0[0]}x{0[1]}x{0[2]}".format)
def test_boxes_without_descriptors(box: Box) -> None:
    """The planner has them for rows alone; the kernel takes any."""
    unit = replace(ODD, shape=(3, 8, 5, 3), c_out=16, x_layout="NCHW", stride=(2, 1))
    plan = assert_exact(unit, How("sm_80", Config(16, 16, 16, 1, 4), box=box, gathered=True))
    assert plan.box == box


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["amid others", "NCHW"])
def test_consecutive_pixels_run_across_images(layout: str, family: str) -> None:
    """Planes of 9 pixels in tiles of 32: four images in one tile."""
    unit = replace(ODD, shape=(5, 24, 3, 3), c_out=16, x_layout=layout, y_layout="NCHW", order="act_add")
    assert assert_exact(unit, How(family, box=CONSECUTIVE)).box == CONSECUTIVE


def test_planes_of_one_pixel() -> None:
    for layout in ("channels_last", "NCHW"):
        assert_exact(Unit(shape=(5, 24, 1, 1), c_out=16, x_layout=layout, y_layout=layout), How("sm_90"))
        assert_exact(replace(ODD, shape=(2, 24, 1, 1), c_out=16, x_layout=layout), How("sm_90"))


def test_an_empty_batch_launches_nothing() -> None:
    unit = replace(ODD, shape=(0, 24, 5, 7), x_layout="channels_last", order="add_act")
    with mock.patch.object(launching, "Launch", side_effect=AssertionError):
        y = launching.execute(*arguments(unit, unit.operands(torch.randn, torch.ones)))
    assert y.shape == (0, 40, 5, 7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "weight", "residual", "var", "mean", "beta"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_propagate_as_in_pytorch(activation: str, where: str, bad: float) -> None:
    unit = Unit("fp32", activation=activation, shape=(1, 24, 3, 5), c_out=16, slope=0.0, order="add_act")
    operands = random_operands(unit)
    operands["weight"].abs_().add_(0.1)
    operands["residual"].abs_().add_(2)  # positive before the activation, so that none hides a change
    sound = eager(unit, on_cpu(operands))
    spoiled = operands[where]
    spoiled[(3,) if spoiled.dim() == 1 else (0, 3, 0, 0)] = bad
    y = fused(unit, operands)[0].cpu()
    expected = eager(unit, on_cpu(operands))
    assert not torch.equal(expected, sound)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_infinity_times_a_slope_of_zero_is_nan() -> None:
    unit = Unit("fp32", shape=(1, 1, 1, 2), c_out=1, slope=0.0, batch_norm=False)
    operands = unit.operands(torch.ones, torch.ones)
    operands["x"].copy_(torch.tensor([-torch.inf, -1.0]).view(1, 1, 1, 2))
    y = fused(unit, operands)[0].flatten().tolist()
    assert math.isnan(y[0])
    assert y[1] == 0


@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_the_pixels_that_read_it_alone(mode: str) -> None:
    unit = replace(ODD, mode=mode, shape=(2, 24, 5, 6), c_out=16, activation="relu")
    operands = random_operands(unit)
    operands["x"][1, 5, 2, 5] = torch.nan
    for family in FAMILIES:
        y = fused(unit, operands, How(family, box=(2, 4, 4)))[0]
        reads = torch.zeros(2, 16, 5, 6, dtype=torch.bool)
        reads[1, :, 1:4, 4:] = True
        assert torch.equal(y.isnan(), reads)


def test_half_precision_overflows_to_infinity_as_in_pytorch() -> None:
    unit = Unit("fp16", activation="identity", batch_norm=False, shape=(1, 24, 3, 3), c_out=16)
    operands = unit.operands(lambda *size: torch.full(size, 60.0), torch.ones)
    assert torch.equal(fused(unit, operands)[0].cpu(), eager(unit, on_cpu(operands)))
    below = unit.operands(lambda *size: torch.full(size, 52.0), torch.ones)  # 24 * 52^2 = 64896
    assert torch.equal(fused(unit, below)[0].cpu(), torch.full(unit.y_shape, 64896, dtype=torch.float16, device="cpu"))


def test_sums_pass_the_range_of_fp16_on_their_way() -> None:
    """Sums of 24 * 3600, which batch norm brings back within the range."""
    unit = Unit("fp16", activation="identity", shape=(1, 24, 3, 3), c_out=16, affine=False, channel_dtype=torch.float32)
    operands = unit.operands(lambda *size: torch.full(size, 60.0), lambda c: torch.full((c,), 1e6))
    exact = eager(unit, doubled(on_cpu(operands)))
    assert error(fused(unit, operands)[0].cpu(), exact) < 1e-3


@pytest.mark.parametrize("var", [0.0, 1e-38, 1e-20, 1e30], ids="variance {}".format)
def test_variance_may_be_tiny_or_large(var: float) -> None:
    unit = Unit("fp32", shape=(1, 24, 3, 3), c_out=16, eps=1e-30)
    operands = random_operands(unit)
    operands["var"].fill_(var)
    assert_accurate(unit, operands=operands)


def test_a_mean_far_above_the_deviation_loses_nothing() -> None:
    """Sums around means of 10^4 with a deviation of 0.1, all held by fp32: subtracting first keeps every digit."""
    unit = Unit("fp32", shape=(1, 2, 5, 5), c_out=2, bias=True, activation="identity", channel_dtype=torch.float32)
    operands = unit.operands(torch.ones, lambda c: torch.full((c,), 0.0123))
    operands["x"].copy_(torch.randint(-2, 3, unit.shape) / 8 + 1e4)
    operands["weight"].copy_(torch.eye(2).view(2, 2, 1, 1))
    operands["bias"].copy_(torch.tensor([0.0, -1e4]))
    operands["mean"].copy_(torch.tensor([1e4, 0.125]))
    unit = replace(unit, eps=1e-30)
    exact = eager(unit, doubled(on_cpu(operands)))
    assert error(fused(unit, operands)[0].cpu(), exact) < 3e-7


def test_operands_may_share_memory() -> None:
    """x is the residual too, and the weight lies in its memory."""
    unit = Unit("fp32", shape=(1, 16, 4, 4), c_out=16, order="act_add", batch_norm=False)
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), torch.ones)
    operands["residual"] = operands["x"]
    memory = operands["x"].permute(0, 2, 3, 1)
    assert memory.is_contiguous()
    operands["weight"] = memory.flatten().view(16, 16, 1, 1)
    assert torch.equal(fused(unit, operands)[0].cpu(), eager(unit, doubled(on_cpu(operands))).float())


def reserved(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that is reserved, and on the CPU not touched."""
    if DEVICE == "cuda":
        return torch.empty(count, dtype=dtype)
    return torch.from_numpy(np.empty(count, dtype=np.int16)).view(dtype)


@pytest.mark.parametrize(("size", "stride"), [(4, (1 << 30) + 8), (2, (1 << 31) + 8)], ids=["32-bit strides", "64-bit"])
@pytest.mark.parametrize("axis", range(4), ids=["images", "channels", "rows", "columns"])
@pytest.mark.parametrize("far", ["x", "y", "residual"])
def test_offsets_past_two_to_the_31(far: str, axis: int, size: int, stride: int) -> None:
    """Neighbours along an axis are far apart; the interpreter looks for sums that overflow."""
    shape = [2, 2, 2, 2]
    shape[axis] = size
    unit = Unit(shape=tuple(shape), c_out=shape[1], kernel=(3, 3), padding=(1, 1), order="add_act")
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), lambda c: torch.full((c,), 4 - EPS))
    tensors = dict(operands, y=torch.empty(unit.y_shape, dtype=unit.dtype))
    strides = [8, 4, 2, 1]
    strides[axis] = stride
    values = tensors[far]
    assert values is not None
    tensors[far] = reserved((size - 1) * stride + 16, unit.dtype).as_strided(shape, strides).copy_(values)
    y = tensors.pop("y")
    with interpreter_checks(True):
        launch(planned(unit, tensors, y, How()), tensors, y, unit)
    assert torch.equal(y.cpu(), eager(unit, doubled(on_cpu(operands))).to(unit.dtype))


def test_offsets_of_descriptors_past_two_to_the_31() -> None:
    unit = Unit(shape=(2, 8, 2, 2), c_out=2)
    operands = unit.operands(lambda *size: torch.randint(-3, 4, size).float(), lambda c: torch.full((c,), 4 - EPS))
    far = reserved((1 << 31) + 64, unit.dtype).as_strided(unit.shape, ((1 << 31) + 16, 1, 16, 8))
    y = torch.empty(unit.y_shape, dtype=unit.dtype)
    tensors = operands | {"x": far.copy_(operands["x"])}
    plan = planned(unit, tensors, y, How("sm_90", box=(2, 4, 4)))
    assert plan.constants["DESCRIBE_X"]
    launch(plan, tensors, y, unit)
    assert torch.equal(y.cpu(), eager(unit, doubled(on_cpu(operands))).to(unit.dtype))


@triton.jit(do_not_specialize=["tile", "batch", "out_height", "out_width"])
def _write_pixels(
    out, tiles, tile, batch, out_height, out_width,
    BLOCK_PIXELS: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    n0, h0, w0 = _first_pixel(tile, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    n, h, w = _tile_pixels(n0, h0, w0, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W)
    i = tl.arange(0, BLOCK_PIXELS)
    tl.store(out + 3 * i, n.to(tl.int64))
    tl.store(out + 3 * i + 1, h.to(tl.int64))
    tl.store(out + 3 * i + 2, w.to(tl.int64))
    tl.store(tiles, _pixel_tiles(batch, out_height, out_width, BLOCK_PIXELS, BOX_N, BOX_H, BOX_W).to(tl.int64))


PLANES = {
    "small planes": ((5, 3, 7), CONSECUTIVE, 32),
    "a plane past 2^31": ((2, 46341, 46341), CONSECUTIVE, 64),
    "planes that end just before 2^31": ((3, 1 << 15, (1 << 16) - 1), CONSECUTIVE, 256),
    "batch past 2^31 pixels": ((70000, 180, 180), CONSECUTIVE, 256),
    "small boxes": ((5, 3, 7), (2, 2, 8), 32),
    "boxes of a plane past 2^31": ((2, 46341, 46341), (1, 4, 16), 64),
    "a row that ends just before 2^31": ((1, 1, (1 << 31) - 1), (1, 1, 256), 256),
    "a row past 2^31": ((1, 1, (1 << 31) + 77), (1, 1, 64), 64),
}


@pytest.mark.parametrize(("sizes", "box", "block"), PLANES.values(), ids=PLANES)
def test_a_tiles_pixels(sizes: tuple[int, int, int], box: Box, block: int) -> None:
    """Python's integers know no overflow. The first tile, the last, and those between."""
    batch, height, width = sizes
    if box == CONSECUTIVE:
        count = -(-batch * height * width // block)
    else:
        counts = [-(-size // extent) for size, extent in zip(sizes, box, strict=True)]
        count = math.prod(counts)
    for tile in sorted({0, 1, count // 3, count // 2 + 1, count - 1}):
        out, tiles = torch.empty(block, 3, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        with interpreter_checks(True):
            _write_pixels[(1,)](out, tiles, tile, *sizes, block, *box)
        assert tiles.item() == count
        if box == CONSECUTIVE:
            flat = range(tile * block, (tile + 1) * block)
            expected = [(p // (height * width), p % (height * width) // width, p % width) for p in flat]
        else:
            first = [i * extent for i, extent in zip(_unravelled(tile, counts), box, strict=True)]
            expected = [tuple(a + b for a, b in zip(first, _unravelled(i, box), strict=True)) for i in range(block)]
        assert [tuple(pixel) for pixel in out.tolist()] == expected


def _unravelled(index: int, sizes: Any) -> tuple[int, int, int]:
    return index // sizes[2] // sizes[1], index // sizes[2] % sizes[1], index % sizes[2]


def test_numbers_are_floats_whatever_they_were() -> None:
    """Triton takes an int otherwise than a float, and 1 for a constant: a kernel kept for one would serve another."""
    passed: list[tuple[type, type]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., Kernel]:
            return self.take

        def take(self, *given: Any, **options: Any) -> Kernel:
            passed.append(tuple(type(given[arg_names.index(name)]) for name in ("eps", "negative_slope")))
            return self

    arg_names = launching.conv_bn_act.arg_names
    unit = Unit("fp32", shape=(1, 8, 2, 2), c_out=8, weight_layout="channels_last")
    with mock.patch.object(launching, "conv_bn_act", Kernel()), mock.patch.dict(launching._launches, clear=True):
        for number in (1, 2, 0.5):
            changed = replace(unit, slope=number, eps=number)
            launching.execute(*arguments(changed, random_operands(unit)))
    assert passed == [(float, float)] * 3


@settings(max_examples=60)
@given(data=st.data())
def test_any_unit_is_exact(data: st.DataObject) -> None:
    draw = data.draw
    layouts = st.sampled_from(list(LAYOUTS))
    kernel = draw(st.sampled_from([(1, 1), (3, 3)]))
    unit = Unit(
        mode=draw(st.sampled_from(list(MODES))),
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(3, 6)), draw(st.integers(3, 6))),
        c_out=draw(st.integers(1, 70)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        batch_norm=draw(st.booleans()),
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["leaky_relu", "relu", "relu6", "identity"])),
        slope=draw(st.sampled_from([0.5, 0.0, -2.0])),
        order=draw(st.sampled_from([None, *RESIDUAL_ORDERS])),
        x_layout=draw(layouts),
        weight_layout=draw(st.sampled_from(["channels_last", "amid others", "amid others, at an odd offset"])),
        y_layout=draw(layouts),
        residual_layout=draw(layouts),
    )
    tile = Config(draw(st.sampled_from([16, 64])), draw(st.sampled_from([32, 128])), 64, 1, 4)
    how = How(draw(st.sampled_from(FAMILIES)), tile, draw(st.integers(1, 4)), programs=draw(st.sampled_from([None, 3])))
    assert_exact(unit, how)


def test_what_lies_amid_nan_is_what_was_placed() -> None:
    """The harness itself: a tensor aligned at 16 bytes and one that is not, with NaN on both sides."""
    for layout, aligned in (("amid others", True), ("amid others, at an odd offset", False)):
        x = place(torch.ones(2, 3, 4, 5), layout)
        around = whole(x)
        assert around.isnan().sum() == around.numel() - x.numel() >= 32
        assert around[[0, -1]].isnan().all()
        assert planning.aligned(x) == (aligned,)
        assert x.is_contiguous(memory_format=torch.channels_last)
