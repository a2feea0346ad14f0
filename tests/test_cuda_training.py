"""The cuda backend's passes of training give the definition's numbers, whatever the layout, alignment and cut: in the
emulator, and on a GPU where there is one; first the kernels alone, then from Python's functions down.

Outputs lie in buffers of canaries and inputs in buffers of NaN; the emulator allows no access outside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from host_cuda.build import emulator, gpu
from host_ops import host_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from pointfuse import reference
from pointfuse.backends import calls, cuda, cuda_training
from pointfuse.problem import ACTIVATIONS, RESIDUAL_ORDERS, Activation, Geometry, Refused
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
from units_for_tests import CANARY, as_placed, whole
from yardstick import error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_gpu = False


@pytest.fixture(params=["emulator", "gpu"] if torch.cuda.is_available() else ["emulator"])
def machine(request: pytest.FixtureRequest) -> Iterator[None]:
    global on_gpu
    on_gpu = request.param == "gpu"
    yield
    on_gpu = False


kernels = pytest.mark.usefixtures("machine")


def built() -> ModuleType:
    """The kernels for the machine of the moment."""
    return gpu() if on_gpu else emulator()


@dataclass(frozen=True)
class Case:
    """Tensors ``[outer, channels, inner]``, ``offset`` elements into their storage, and what is to be made of them.

    ``order`` is the residual's; None: no residual. Powers of two as rstd keep small integers exact.
    """

    dtype: torch.dtype = torch.bfloat16
    outer: int = 8
    channels: int = 24
    inner: int = 1
    offset: int = 0
    activation: str = "leaky_relu"
    slope: float = 0.5
    order: str | None = None
    affine: bool = True
    channel_dtype: torch.dtype = torch.float32
    multiprocessors: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer, self.channels, self.inner

    @property
    def elements(self) -> int:
        return self.outer * self.inner

    @property
    def given(self) -> dict[str, Any]:
        return dict(
            activation=self.activation, negative_slope=self.slope, residual_order=self.order or "add_act",
            momentum=0.25, eps=0.5, elements=self.elements,
        )  # fmt: skip

    def tensor(self, values: Tensor) -> Tensor:
        """Values of y's shape as the kernels take them."""
        storage = torch.full((values.numel() + self.offset + 32,), torch.nan, dtype=self.dtype)
        return storage[self.offset : self.offset + values.numel()].view(values.shape).copy_(values)

    def output(self) -> Tensor:
        t = self.tensor(torch.empty(self.shape))
        whole(t).fill_(CANARY)
        return t.fill_(torch.nan)

    def operands(self, numbers: Callable[..., Tensor], positive: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        per_channel = {"gamma": numbers, "beta": numbers} if self.affine else {}
        return dict(
            y=self.tensor(numbers(*self.shape)),
            mean=numbers(self.channels).float(),
            rstd=positive(self.channels).float(),
            residual=self.tensor(numbers(*self.shape)) if self.order else None,
            grad_out=self.tensor(numbers(*self.shape)),
            **{name: make(self.channels).to(self.channel_dtype) for name, make in per_channel.items()},
        )


def floats(*shape: int) -> Tensor:
    """An output of fp32 amid canaries."""
    count = torch.Size(shape).numel()
    storage = torch.full((count + 32,), CANARY)
    return storage[16 : 16 + count].view(shape).fill_(torch.nan)


def run(name: str, tensors: dict[str, Tensor | None], *given: Any, written: tuple[str, ...], **how: Any) -> None:
    """Run one pass on the CPU's tensors, on the machine of the moment: it writes what it is to, and nothing else."""
    before = {n: whole(t).clone() for n, t in tensors.items() if t is not None}
    if on_gpu:
        moved = {n: None if t is None else as_placed(whole(t).cuda(), t) for n, t in tensors.items()}
        getattr(built(), name)(moved, *given, **how)
        for n, t in tensors.items():
            if t is not None:
                whole(t).copy_(whole(moved[n]))
    else:
        getattr(built(), name)(tensors, *given, **how)
    for n, copy in before.items():
        t = tensors[n]
        if n in written:
            as_placed(copy, t).copy_(t)
        assert torch.equal(whole(t).view(torch.uint8), copy.view(torch.uint8)), n


def normalised(case: Case, tensors: dict[str, Tensor | None], **how: Any) -> Tensor:
    """``out``; with parts, mean and rstd and the running statistics are written in ``tensors``."""
    out = case.output()
    written = ("out", "mean", "rstd", "running_mean", "running_var") if tensors.get("parts") is not None else ("out",)
    run("normalise", dict(tensors, grad_out=None, out=out), case.given, written=written,
        multiprocessors=case.multiprocessors, **how)  # fmt: skip
    return out


def backward_operands(case: Case, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return dict(tensors, residual=tensors["residual"] if case.order == "add_act" else None)


def summed(case: Case, tensors: dict[str, Tensor | None], **how: Any) -> Tensor:
    tensors = backward_operands(case, tensors)
    how["multiprocessors"] = case.multiprocessors
    _, count = built().cut(tensors, case.given, multiprocessors=case.multiprocessors)
    parts = floats(count, 2, case.channels)
    run("sums", dict(tensors, parts=parts), case.given, written=("parts",), **how)
    return parts


def differentiated(
    case: Case, tensors: dict[str, Tensor | None], parts: Tensor | None, **how: Any
) -> dict[str, Tensor]:
    outputs = dict(dy=case.output())
    if case.order == "add_act":
        outputs["d_residual"] = case.output()
    if parts is not None:
        outputs |= dict(d_gamma=floats(case.channels), d_beta=floats(case.channels))
    run("gradients", dict(backward_operands(case, tensors), parts=parts, **outputs), case.given,
        written=tuple(outputs), multiprocessors=case.multiprocessors, **how)  # fmt: skip
    return outputs


# ---- The definition, in float64


def per_channel(t: Tensor | None, otherwise: float) -> Tensor:
    return torch.tensor(otherwise, dtype=torch.float64) if t is None else t.double()[:, None]


def pre_activation(case: Case, tensors: dict[str, Tensor | None], order: str) -> Tensor:
    t = tensors
    x_hat = (t["y"].double() - per_channel(t["mean"], 0)) * per_channel(t["rstd"], 1)
    z = x_hat * per_channel(t.get("gamma"), 1) + per_channel(t.get("beta"), 0)
    return z + t["residual"].double() if case.order == order else z


def expected_out(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    out = reference.activate(pre_activation(case, tensors, "add_act"), case.activation, case.slope)
    return out + tensors["residual"].double() if case.order == "act_add" else out


def expected_dz(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    z = pre_activation(case, tensors, "add_act")
    return tensors["grad_out"].double() * reference.activation_derivative(z, case.activation, case.slope)


def expected_sums(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    """``[2, channels]``."""
    dz = expected_dz(case, tensors)
    x_hat = (tensors["y"].double() - per_channel(tensors["mean"], 0)) * per_channel(tensors["rstd"], 1)
    return torch.stack([dz.sum((0, 2)), (dz * x_hat).sum((0, 2))])


def expected_dy(case: Case, tensors: dict[str, Tensor | None], sums: Tensor | None) -> Tensor:
    dy, rstd = expected_dz(case, tensors), per_channel(tensors["rstd"], 1)
    if sums is not None:
        x_hat = (tensors["y"].double() - per_channel(tensors["mean"], 0)) * rstd
        mean_dz, mean_dzx = sums.double() / case.elements
        dy = dy - mean_dz[:, None] - x_hat * mean_dzx[:, None]
    return dy * rstd * per_channel(tensors.get("gamma"), 1)


def moments(y: Tensor, count: int) -> Tensor:
    """``y`` [outer, channels, inner] in fp32 as parts ``[count, 3, channels]``, some of which may have no elements."""
    values = y.double().transpose(0, 1).flatten(1)
    parts = []
    for part in values.tensor_split(count, dim=1):
        mean = part.mean(1) if part.shape[1] else part.new_zeros(len(part))
        m2 = ((part - mean[:, None]) ** 2).sum(1)
        parts.append(torch.stack([torch.full_like(mean, part.shape[1]), mean, m2]))
    return torch.stack(parts).float()


# ---- The kernels


def integers(seed: int = 0) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    whole_numbers = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float()  # noqa: E731
    powers = lambda *shape: 2.0 ** torch.randint(-1, 2, shape, generator=generator)  # noqa: E731
    return whole_numbers, powers


def assert_exact(case: Case, numbers: int = 0, **how: Any) -> None:
    """fp32 holds every term and sum of small integers, so that the one rounding at the end is the exact result's."""
    tensors = case.operands(*integers(numbers))
    assert torch.equal(normalised(case, tensors, **how), expected_out(case, tensors).to(case.dtype))
    sums = expected_sums(case, tensors)
    parts = summed(case, tensors, **how)
    assert torch.equal(parts.sum(0, dtype=torch.float64), sums)
    # With N a power of two the means of the sums are exact as well.
    power = replace(case, outer=8, inner=2 if case.inner > 1 else 1)
    tensors = power.operands(*integers(numbers))
    sums = expected_sums(power, tensors)
    parts = torch.randint(-3, 4, (3, 2, case.channels)).float()
    parts[2] = sums.float() - parts[0] - parts[1]
    for given_parts in (parts, None):
        actual = differentiated(power, tensors, given_parts, **how)
        expected = expected_dy(power, tensors, None if given_parts is None else sums)
        assert torch.equal(actual["dy"], expected.to(case.dtype))
        if case.order == "add_act":
            assert torch.equal(actual["d_residual"], expected_dz(power, tensors).to(case.dtype))
        if given_parts is not None:
            assert torch.equal(actual["d_beta"].double(), sums[0])
            assert torch.equal(actual["d_gamma"].double(), sums[1])


SHAPES = {
    "channels_last": dict(outer=37, channels=24, inner=1),
    "channels_last, a tile and a half": dict(outer=9, channels=96, inner=1),
    "channels_last, one vector": dict(outer=70, channels=8, inner=1),
    "channels_last, 3 channels": dict(outer=37, channels=3, inner=1),
    "channels_last, 75 channels": dict(outer=11, channels=75, inner=1),
    "channels_last, 255 channels": dict(outer=5, channels=255, inner=1),
    "one channel": dict(outer=50, channels=1, inner=1),
    "NCHW of whole vectors": dict(outer=3, channels=5, inner=64),
    "NCHW, long planes": dict(outer=2, channels=3, inner=5000),
    "NCHW of half vectors": dict(outer=3, channels=5, inner=36),
    "NCHW, 13x13": dict(outer=3, channels=7, inner=169),
    "NCHW, small planes": dict(outer=40, channels=3, inner=4),
    "NCHW, 255 channels": dict(outer=2, channels=255, inner=9),
}


@kernels
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_is_exact(dtype: torch.dtype, shape: dict[str, int]) -> None:
    assert_exact(Case(dtype=dtype, **shape))


@kernels
@pytest.mark.parametrize("inner", [1, 16], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize(
    ("activation", "slope"),
    [("leaky_relu", 0.5), ("leaky_relu", -2.0), ("leaky_relu", 0.0), ("relu", 9.0), ("relu6", 9.0), ("identity", 9.0)],
    ids=["leaky", "leaky, negative slope", "leaky, slope 0", "relu", "relu6", "identity"],
)
def test_every_epilogue_is_exact(activation: str, slope: float, order: str | None, inner: int) -> None:
    assert_exact(Case(outer=17, channels=16, inner=inner, activation=activation, slope=slope, order=order))


@kernels
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8], ids="{} elements in".format)
@pytest.mark.parametrize("inner", [1, 32], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_are_as_wide_as_addresses_allow(dtype: torch.dtype, inner: int, offset: int) -> None:
    case = Case(dtype=dtype, outer=9, channels=16, inner=inner, offset=offset, order="add_act")
    assert_exact(case)
    vector, _ = built().cut(case.operands(*integers()), case.given)
    full = 16 // dtype.itemsize
    if offset % full == 0:
        assert vector == full
    elif offset == 4 and inner > 1:
        assert vector == 4
    else:
        assert vector == 1


@kernels
@pytest.mark.parametrize("channel_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "without gamma and beta"])
def test_gamma_and_beta_are_of_either_dtype_or_absent(affine: bool, channel_dtype: torch.dtype) -> None:
    case = Case(affine=affine, channel_dtype=channel_dtype)
    assert_exact(case)
    assert_exact(replace(case, inner=8))
    tensors = case.operands(*integers())
    for missing in ("gamma", "beta"):
        fewer = {name: t for name, t in tensors.items() if name != missing}
        assert torch.equal(normalised(case, fewer), expected_out(case, fewer).to(case.dtype))


@kernels
@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    outer=st.integers(1, 70),
    channels=st.one_of(st.integers(1, 40), st.integers(1, 20).map(lambda n: 8 * n)),
    inner=st.one_of(st.just(1), st.integers(2, 60), st.integers(1, 30).map(lambda n: 8 * n)),
    offset=st.sampled_from([0, 0, 1, 4]),
    order=st.sampled_from([None, *RESIDUAL_ORDERS]),
    multiprocessors=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_shape_however_it_is_cut_is_exact(seed: int, **case: Any) -> None:
    assert_exact(Case(**case), seed, late=bool(seed % 2), seed=seed)


def composed(case: Case, tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's own batch norm by the batch's statistics, activation and residual, and their gradients."""
    leaf = {
        name: None if tensors.get(name) is None else tensors[name].to(dtype).clone().requires_grad_()
        for name in ("y", "gamma", "beta", "residual")
    }
    running = [torch.zeros(case.channels, dtype=dtype), torch.ones(case.channels, dtype=dtype)]
    z = F.batch_norm(leaf["y"], *running, leaf["gamma"], leaf["beta"], True, 0.25, 0.5)
    z = z + leaf["residual"] if case.order == "add_act" else z
    functions = {"leaky_relu": lambda t: F.leaky_relu(t, case.slope), "identity": lambda t: t}
    out = functions.get(case.activation, getattr(F, case.activation, None))(z)
    out = out + leaf["residual"] if case.order == "act_add" else out
    out.backward(tensors["grad_out"].to(dtype))
    gradients = dict(dy="y", d_gamma="gamma", d_beta="beta") | (dict(d_residual="residual") if case.order else {})
    found = {name: leaf[of].grad for name, of in gradients.items() if leaf[of] is not None}
    if case.order == "act_add":
        del found["d_residual"]
    return dict(out=out.detach(), running_mean=running[0], running_var=running[1], **found)


@kernels
@pytest.mark.parametrize("shift", [0.0, 10.0], ids=["mean 0", "mean 10 sigma"])
@pytest.mark.parametrize("count", [1, 5, 31, 70], ids="{} parts".format)
@pytest.mark.parametrize("inner", [1, 40], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_statistics_are_as_accurate_as_pytorchs(dtype: torch.dtype, inner: int, count: int, shift: float) -> None:
    case = Case(dtype=dtype, outer=51, channels=16, inner=inner, slope=0.1, channel_dtype=dtype)
    assert_trains(case, count, shift)


@kernels
@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_epilogue_is_as_accurate_as_pytorchs(dtype: torch.dtype, activation: str, order: str | None) -> None:
    assert_trains(Case(dtype=dtype, outer=65, activation=activation, slope=-0.3, order=order, channel_dtype=dtype))


def assert_trains(case: Case, count: int = 3, shift: float = 0.0) -> None:
    """Forward, sums and gradients of a unit by the batch's statistics keep the rule of yardstick.py."""
    tensors = case.operands(lambda *shape: torch.randn(shape), lambda *shape: torch.rand(shape))
    tensors["y"] += shift
    exact, torchs = composed(case, tensors, torch.float64), composed(case, tensors, case.dtype)
    written = dict(mean=floats(case.channels), rstd=floats(case.channels))
    running = dict(running_mean=torch.zeros(case.channels), running_var=torch.ones(case.channels))
    tensors |= written
    actual = dict(running, out=normalised(case, dict(tensors, parts=moments(tensors["y"], count), **running)))
    values = tensors["y"].double()
    assert error(written["mean"], values.mean((0, 2))) <= 1e-6
    assert error(written["rstd"], 1 / (values.var((0, 2), correction=0) + 0.5).sqrt()) <= 1e-6
    actual |= differentiated(case, tensors, summed(case, tensors))
    for name, value in exact.items():
        assert error(actual[name], value) <= 2 * error(torchs[name], value) + 1e-6, name


@kernels
@pytest.mark.parametrize("fields", [3, 2], ids=["moments", "sums"])
@pytest.mark.parametrize(("count", "channels"), [(33, 1), (64, 75), (1000, 9), (2, 16)], ids=str)
def test_many_parts_merge_to_one(count: int, channels: int, fields: int) -> None:
    y = torch.randn(count, channels, 5) + 10
    parts = moments(y, count) if fields == 3 else torch.randn(count, 2, channels)
    exact = moments(y, 1)[0].double() if fields == 3 else parts.sum(0, dtype=torch.float64)
    merged = floats(1, fields, channels)
    run("merge", dict(parts=parts, merged=merged), written=("merged",))
    for actual, value in zip(merged[0], exact, strict=True):
        assert error(actual, value) <= 2e-6


@kernels
def test_parts_without_elements_count_for_nothing() -> None:
    case = Case(dtype=torch.float32, outer=6, channels=5)
    tensors = case.operands(*integers())
    parts = moments(tensors["y"], 3)
    nothing = torch.zeros(1, 3, 5)
    results = []
    for some in (parts, torch.cat([nothing, parts[:1], nothing, nothing, parts[1:], nothing])):
        tensors |= dict(parts=some, mean=floats(5), rstd=floats(5))
        results += [normalised(case, tensors), tensors["mean"], tensors["rstd"]]
        assert error(tensors["mean"], tensors["y"].double().mean((0, 2))) <= 1e-6
        assert torch.isfinite(results[-1]).all()
    for first, second in zip(results[:3], results[3:], strict=True):
        assert error(second, first.double()) <= 1e-6


@kernels
@pytest.mark.parametrize("inner", [1, 40], ids=["channels_last", "NCHW"])
def test_every_run_gives_the_same_bits(inner: int) -> None:
    case = Case(dtype=torch.float16, outer=33, channels=16, inner=inner, order="add_act")
    tensors = case.operands(lambda *shape: torch.randn(shape), lambda *shape: torch.rand(shape))
    runs = []
    for seed in range(3):
        how = dict(seed=seed, late=bool(seed % 2))
        tensors |= dict(mean=floats(case.channels), rstd=floats(case.channels))
        out = normalised(case, dict(tensors, parts=moments(tensors["y"], 20)), **how)
        parts = summed(case, tensors, **how)
        gradients = differentiated(case, tensors, parts, **how)
        runs.append([out, tensors["mean"], tensors["rstd"], parts, *gradients.values()])
    for again in runs[1:]:
        for first, second in zip(runs[0], again, strict=True):
            assert torch.equal(first, second)


@kernels
@pytest.mark.parametrize("running_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_move_by_momentum(running_dtype: torch.dtype) -> None:
    case = Case(outer=9, channels=70, multiprocessors=1)
    tensors = case.operands(*integers())
    running = dict(running_mean=torch.randn(70).to(running_dtype), running_var=torch.rand(70).to(running_dtype))
    y = tensors["y"].double()
    moved_to = y.mean((0, 2)), y.var((0, 2))
    expected = [t.double() * 0.75 + 0.25 * s for t, s in zip(running.values(), moved_to, strict=True)]
    tensors |= dict(parts=moments(tensors["y"], 2), mean=floats(70), rstd=floats(70))
    normalised(case, dict(tensors, **running))
    for actual, value in zip(running.values(), expected, strict=True):
        assert error(actual, value) <= (1e-6 if running_dtype == torch.float32 else 2**-8)
    alone = running["running_var"].clone()
    normalised(case, dict(tensors, mean=floats(70), rstd=floats(70), running_var=running["running_var"]))
    assert not torch.equal(running["running_var"], alone)


@kernels
@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_as_in_pytorch(activation: str, order: str | None) -> None:
    """With mean 0 and rstd 1 PyTorch's activation alone says what becomes of every value."""
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6.0, -2.0, 2.0])
    case = Case(dtype=torch.float32, outer=64, channels=1, activation=activation, slope=0.0, order=order, affine=False)
    tensors = case.operands(*integers())
    tensors |= dict(mean=torch.zeros(1), rstd=torch.ones(1))
    tensors["y"].copy_(strange.repeat(8).view(64, 1, 1))
    tensors["grad_out"].copy_(strange.repeat_interleave(8).view(64, 1, 1))
    z = tensors["y"].clone().requires_grad_()
    residual = tensors["residual"]
    functions = {"leaky_relu": lambda t: F.leaky_relu(t, 0.0), "identity": lambda t: t + 0}
    out = functions.get(activation, getattr(F, activation, None))(z + residual if order == "add_act" else z)
    expected = out + residual if order == "act_add" else out
    torch.testing.assert_close(normalised(case, tensors), expected, equal_nan=True)
    out.backward(tensors["grad_out"])
    expected = z.grad
    if activation == "relu6":
        # PyTorch on a GPU; on a CPU it gives 0 where z is NaN.
        z = pre_activation(case, tensors, "add_act")
        expected = torch.where((z <= 0) | (z >= 6), 0, tensors["grad_out"])
    torch.testing.assert_close(differentiated(case, tensors, None)["dy"], expected, equal_nan=True)
    assert summed(case, tensors).isnan().any()


# ---- From Python's functions down

EMULATED = ["h100", "a100"]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LEAKY = Activation("leaky_relu", 0.1)


@pytest.fixture(params=EMULATED if cuda.unusable_reason() else [*EMULATED, "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs; tensors are made there."""
    if request.param != "gpu":
        host_ops().pointfuse_emulate(request.param.encode())
        monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
        monkeypatch.setattr(cuda, "unusable_reason", lambda: None)
    with torch.device("cuda" if request.param == "gpu" else "cpu"):
        yield request.param


functions = pytest.mark.usefixtures("device")


@dataclass
class Step:
    """Operands of the functions; ``y`` and the tensors like it are [3, 16, 5, 7]."""

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    order: str = "add_act"

    def __post_init__(self) -> None:
        self.y, self.residual, self.grad_out = (
            torch.randn(3, 16, 5, 7).to(self.dtype).to(memory_format=self.memory_format) for _ in range(3)
        )
        self.gamma, self.beta, self.running_mean, self.running_var = (
            torch.randn(2, 16).unbind() + torch.rand(2, 16).unbind()
        )
        self.parts = moments(self.y.flatten(2).cpu(), 4).to(self.y.device)

    def forward(self, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
        o = vars(self) | dict(mean=None, rstd=None) | others
        return cuda_training.normalise(
            o["y"], o["parts"], o["mean"], o["rstd"], o["gamma"], o["beta"], o["residual"], o["running_mean"],
            o["running_var"], 0.25, 1e-5, LEAKY, o["order"],
        )  # fmt: skip

    def upstream(self, others: dict[str, Any]) -> tuple[Any, ...]:
        zeros, ones = torch.zeros(16), torch.ones(16)
        o = vars(self) | dict(mean=zeros, rstd=ones) | others
        return (o["grad_out"], o["y"], o["mean"], o["rstd"], o["gamma"], o["beta"], o["residual"], LEAKY, o["order"])

    def sums(self, **others: Any) -> Tensor:
        return cuda_training.sums(*self.upstream(others))

    def gradients(self, parts: Tensor | None, want_residual: bool = True, **others: Any) -> tuple[Tensor | None, ...]:
        return cuda_training.gradients(*self.upstream(others), parts, 105, want_residual)


@functions
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_unit_trains_as_accurately_as_pytorchs(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """From x to every gradient of what follows the convolution; PyTorch has the rest."""
    x = (torch.randn(2, 24, 9, 7) + 1).to(dtype).to(memory_format=memory_format)
    weight, bias = (torch.randn(40, 24, 3, 3) * 0.1).to(dtype), torch.randn(40).to(dtype)
    residual, grad_out = (torch.randn(2, 40, 9, 7).to(dtype).to(memory_format=memory_format) for _ in range(2))
    gamma, beta, running_mean, running_var = torch.randn(40), torch.randn(40), torch.zeros(40), torch.ones(40)
    geometry = Geometry(padding=(1, 1))

    y, parts = cuda_training.conv(x.requires_grad_(), weight, bias, geometry)
    assert parts.shape[1:] == (3, 40)
    assert not y.requires_grad
    again, none = cuda_training.conv(x, weight, bias, geometry, statistics=False)
    assert none is None
    assert torch.equal(y, again)
    out, mean, rstd = cuda_training.normalise(
        y, parts, None, None, gamma, beta, residual, running_mean, running_var, 0.25, 1e-5, LEAKY, "add_act"
    )
    upstream = (grad_out, y, mean, rstd, gamma, beta, residual, LEAKY, "add_act")
    dy, d_residual, d_gamma, d_beta = cuda_training.gradients(*upstream, cuda_training.sums(*upstream), 126, True)
    actual = dict(out=out, running_mean=running_mean, running_var=running_var, dy=dy, d_residual=d_residual,
                  d_gamma=d_gamma, d_beta=d_beta)  # fmt: skip

    def composed(of: torch.dtype, given_x: Tensor, given_weight: Tensor) -> dict[str, Tensor]:
        """PyTorch's, of tensors in a dtype; its y has the kernels' rounding where that is what is compared."""
        leaf = {
            n: t.detach().to(of).requires_grad_() for n, t in dict(gamma=gamma, beta=beta, residual=residual).items()
        }
        made = F.conv2d(given_x.to(of), given_weight.to(of), bias.to(of), padding=1).detach().requires_grad_()
        running = [torch.zeros(40, dtype=of), torch.ones(40, dtype=of)]
        z = F.batch_norm(made, *running, leaf["gamma"], leaf["beta"], True, 0.25, 1e-5)
        result = F.leaky_relu(z + leaf["residual"], 0.1)
        result.backward(grad_out.to(of))
        return dict(out=result.detach(), running_mean=running[0], running_var=running[1], dy=made.grad,
                    d_residual=leaf["residual"].grad, d_gamma=leaf["gamma"].grad, d_beta=leaf["beta"].grad)  # fmt: skip

    exact = composed(torch.float64, x.detach(), weight)
    torchs = composed(dtype, *(as_tf32(t.detach()) for t in (x, weight)))
    for name, value in exact.items():
        assert error(actual[name], value) <= 2 * error(torchs[name], value) + 1e-6, name
    for name in ("out", "dy", "d_residual"):
        assert actual[name].stride() == y.stride(), name


def as_tf32(t: Tensor) -> Tensor:
    """fp32 as Hopper's tensor cores read it for TF32, which torch allows by default: without the last 13 bits."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32) if t.dtype == torch.float32 else t


@functions
@pytest.mark.parametrize("geometry", [Geometry(), Geometry((2, 2)), Geometry((1, 1), (1, 1))], ids=str)
def test_parts_are_the_statistics_of_y(geometry: Geometry) -> None:
    x, weight = torch.randint(-3, 4, (2, 8, 12, 11)).float(), torch.randint(-3, 4, (20, 8, 1, 1)).float()
    y, parts = cuda_training.conv(x, weight, None, geometry)
    assert torch.equal(y, F.conv2d(x, weight, None, geometry.stride, geometry.padding))
    count, mean, m2 = parts.double().unbind(1)
    total = count.sum(0)
    assert torch.all(total == y.numel() / 20)
    whole_mean = (count * mean).sum(0) / total
    torch.testing.assert_close(whole_mean, y.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    spread = (m2 + count * (mean - whole_mean) ** 2).sum(0)
    torch.testing.assert_close(spread, total * y.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6)


@functions
@pytest.mark.parametrize("kernel", [1, 3], ids=["1x1, in one launch on an H100", "3x3, in two"])
@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_convolution_and_normalise(
    dtype: torch.dtype, memory_format: torch.memory_format, order: str | None, kernel: int
) -> None:
    c_in, c_out = {1: (256, 64), 3: (16, 40)}[kernel]
    x = torch.randn(2, c_in, 8, 8).to(dtype).to(memory_format=memory_format)
    weight, bias = (torch.randn(c_out, c_in, kernel, kernel) * 0.1).to(dtype), torch.randn(c_out).to(dtype)
    residual = torch.randn(2, c_out, 8, 8).to(dtype).to(memory_format=memory_format) if order else None
    geometry, gamma, beta = (
        Geometry(padding=(kernel // 2, kernel // 2)),
        torch.randn(c_out),
        torch.randn(c_out).to(dtype),
    )
    tail = (0.25, 1e-5, LEAKY, order or "add_act")
    running, other_running = ([torch.zeros(c_out), torch.ones(c_out).to(dtype)] for _ in range(2))
    y, parts = cuda_training.conv(x, weight, bias, geometry)
    expected = cuda_training.normalise(y, parts, None, None, gamma, beta, residual, *other_running, *tail)
    out, same_y, mean, rstd = cuda_training.forward(x, weight, bias, geometry, gamma, beta, residual, *running, *tail)
    assert torch.equal(same_y, y)
    assert out.stride() == same_y.stride() == y.stride()
    for actual, value in zip((out, mean, rstd, *running), (*expected, *other_running), strict=True):
        # The order in which parts merge may differ, and a number then round to its neighbour.
        assert error(actual, value.double()) <= 1e-6 + torch.finfo(value.dtype).eps


@functions
def test_forward_refuses_a_residual_that_lies_otherwise() -> None:
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1)
    residual = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(Refused, match="must lie as y does"):
        cuda_training.forward(
            x, weight, None, Geometry(), None, None, residual, None, None, 0.1, 1e-5, LEAKY, "add_act"
        )


@functions
def test_an_empty_batch_has_no_parts() -> None:
    y, parts = cuda_training.conv(torch.randn(0, 8, 4, 4), torch.randn(6, 8, 1, 1), None, Geometry())
    assert y.shape == (0, 6, 4, 4)
    assert parts.shape == (0, 3, 6)


@functions
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_grad_out_and_residual_may_lie_anyhow(memory_format: torch.memory_format) -> None:
    step = Step(memory_format=memory_format)
    wide = torch.randn(3, 33, 6, 8)
    views = {
        "expanded": torch.randn(3, 16, 1, 1).expand(3, 16, 5, 7),
        "one number": torch.ones(()).expand(3, 16, 5, 7),
        "sliced": wide[:, 1:17, 1:, 1:],
        "contiguous": torch.randn(3, 16, 5, 7),
        "channels_last": torch.randn(3, 16, 5, 7).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 16, 7, 5).transpose(2, 3),
        "at an odd address": torch.randn(3 * 16 * 5 * 7 + 1)[1:].view(3, 16, 5, 7),
    }
    for name, view in views.items():
        dense = view.clone(memory_format=torch.preserve_format).contiguous(memory_format=memory_format).clone()
        for place in ("grad_out", "residual"):
            (parts, same_parts), (results, same) = (
                zip(*((step.sums(**{place: t}), step.gradients(step.parts[:, :2].contiguous(), **{place: t}))
                      for t in (view, dense)), strict=True)
            )  # fmt: skip
            torch.testing.assert_close(parts.sum(0), same_parts.sum(0), msg=f"{name} {place}")
            for first, second in zip(results, same, strict=True):
                assert torch.equal(first, second), f"{name} {place}"
        out, same_out = (step.forward(residual=t, running_mean=None, running_var=None)[0] for t in (view, dense))
        assert torch.equal(out, same_out), name


@functions
def test_what_is_not_wanted_is_none() -> None:
    step = Step()
    statistics = torch.randn(16), torch.rand(16)
    out, mean, rstd = step.forward(parts=None, mean=statistics[0], rstd=statistics[1])
    assert mean is statistics[0]
    assert rstd is statistics[1]
    assert out.isfinite().all()
    parts = step.sums()
    assert [t is None for t in step.gradients(parts)] == [False] * 4
    assert [t is None for t in step.gradients(parts, want_residual=False)] == [False, True, False, False]
    assert [t is None for t in step.gradients(parts, order="act_add")] == [False, True, False, False]
    assert [t is None for t in step.gradients(None)] == [False, False, True, True]


@functions
@pytest.mark.parametrize("count", [32, 33, 200])
def test_many_parts_are_merged_first(count: int) -> None:
    step = Step()
    many, one = moments(step.y.flatten(2).cpu(), 105), moments(step.y.flatten(2).cpu(), 1)
    for few, several in zip(
        step.forward(parts=one.to(step.y.device)), step.forward(parts=many.to(step.y.device)), strict=True
    ):
        torch.testing.assert_close(several, few)
    parts = torch.randn(count, 2, 16)
    for few, several in zip(step.gradients(parts.sum(0, keepdim=True)), step.gradients(parts), strict=True):
        torch.testing.assert_close(several, few)


@functions
@pytest.mark.parametrize("shape", [(4, 1, 3, 5), (6, 16, 1, 1), (1, 1, 1, 2), (1, 16, 1, 7)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_both_formats_at_once(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """One channel, or planes of one pixel: strides say little, and are kept."""
    y, grad_out = (torch.randn(shape).to(memory_format=memory_format) for _ in range(2))
    channels = shape[1]
    parts = moments(y.flatten(2).cpu(), 2).to(y.device)
    out, mean, rstd = cuda_training.normalise(
        y, parts, None, None, None, None, None, None, None, 0.1, 1e-5, LEAKY, "add_act"
    )
    leaf = y.detach().clone().requires_grad_()
    expected = F.leaky_relu(F.batch_norm(leaf, None, None, None, None, True, 0.1, 1e-5), 0.1)
    expected.backward(grad_out)
    upstream = (grad_out, y, mean, rstd, None, None, None, LEAKY, "add_act")
    dy, *_ = cuda_training.gradients(*upstream, cuda_training.sums(*upstream), y.numel() // channels, False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dy, leaf.grad, rtol=1e-4, atol=1e-4)
    assert out.stride() == dy.stride() == y.stride()


MISFITS: dict[str, tuple[Callable[[Step], Any], str]] = {
    "grad_out of another dtype": (lambda s: s.sums(grad_out=s.grad_out.half()), "one dtype"),
    "grad_out of another shape": (lambda s: s.sums(grad_out=s.grad_out[:1]), "must have the shape of y"),
    "residual of another shape": (lambda s: s.forward(residual=s.residual[:, :, :1]), "must have the shape of y"),
    "a sliced y": (lambda s: s.forward(y=s.y[:, :, 1:]), "neither contiguous nor channels_last"),
    "an empty y": (lambda s: s.forward(y=s.y[:0], residual=None), "y is empty"),
    "y in float64": (lambda s: s.forward(y=s.y.double(), residual=None), "dtypes are float32, float16 and bfloat16"),
    "y of two dimensions": (lambda s: s.sums(y=s.y.flatten(1)), "need four dimensions"),
    "gamma of another half": (lambda s: s.forward(gamma=s.gamma.half()), "of the dtype of x or float32"),
    "gamma of other channels": (lambda s: s.forward(gamma=s.gamma[:3]), "one number a channel"),
    "strided beta": (lambda s: s.sums(beta=torch.randn(32)[::2]), "not contiguous"),
    "running_var of other channels": (lambda s: s.forward(running_var=torch.ones(3)), "one number a channel"),
    "mean in half": (lambda s: s.sums(mean=torch.zeros(16).half()), "one dtype"),
    "neither parts nor mean": (lambda s: s.forward(parts=None), "without parts there must be mean and rstd"),
    "parts of two fields": (lambda s: s.forward(parts=s.parts[:, :2].contiguous()), "parts must be contiguous"),
    "sliced parts": (lambda s: s.gradients(s.parts[:, :2]), "parts must be contiguous"),
    "no parts at all": (lambda s: s.gradients(s.parts[:0, :2].contiguous()), "parts must be contiguous"),
    "parts in half": (lambda s: s.forward(parts=s.parts.half()), "parts must be float32"),
}  # fmt: skip


@functions
@pytest.mark.parametrize(("wrong", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_a_wrong_launch_could_come_from_is_refused(wrong: Callable[[Step], Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        wrong(Step())


@functions
def test_what_no_kernel_serves_is_refused() -> None:
    with pytest.raises(Refused, match="1x1 nor 3x3"):
        cuda_training.conv(torch.randn(1, 8, 5, 5), torch.randn(8, 8, 5, 5), None, Geometry())


@pytest.mark.parametrize("device", EMULATED, indirect=True)
def test_a_pass_that_fails_says_which(device: str) -> None:
    library, step = host_ops(), Step()
    statistics = dict(parts=None, mean=torch.zeros(16), rstd=torch.ones(16))
    library.pointfuse_emulate_fault(True)
    try:
        with pytest.raises(RuntimeError, match=r"pointfuse: .+ from normalise over 3x16x5x7"):
            step.forward(**statistics)
        with pytest.raises(RuntimeError, match=r"pointfuse: .+ from sums over 3x16x5x7"):
            step.sums()
    finally:
        library.pointfuse_emulate_fault(False)
    assert step.forward(**statistics)[0].isfinite().all()


@functions
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_opcheck(memory_format: torch.memory_format) -> None:
    step = Step(memory_format=memory_format)
    tests = ("test_schema", "test_faketensor")
    ones, zeros, config = torch.ones(16), torch.zeros(16), 1 << 32 | 1 << 35
    opcheck(
        cuda_training.conv_operator, (step.y, torch.randn(8, 16, 1, 1), torch.randn(8), 1 | 1 << 8), test_utils=tests
    )
    affine = (step.gamma, step.beta, step.residual)
    forward_config = config | 1 | 1 << 8
    opcheck(
        cuda_training.forward_operator,
        (step.y, torch.randn(16, 16, 1, 1), None, *affine, ones, zeros, 0.1, 1e-5, forward_config, 0.1),
        test_utils=(*tests, "test_aot_dispatch_dynamic"),
    )
    running = (step.running_mean, step.running_var)
    for statistics in ((step.parts, None, None), (None, zeros, ones)):
        opcheck(
            cuda_training.normalise_operator,
            (step.y, *statistics, *affine, *running, 0.1, 1e-5, config, 0.1),
            test_utils=(*tests, "test_aot_dispatch_dynamic"),
        )
    upstream = (step.grad_out, step.y, zeros, ones, *affine)
    opcheck(cuda_training.sums_operator, (*upstream, config, 0.1), test_utils=tests)
    for parts in (torch.randn(3, 2, 16), None):
        opcheck(
            cuda_training.gradients_operator,
            (*upstream, parts, 105, True, config, 0.1),
            test_utils=(*tests, "test_aot_dispatch_dynamic"),
        )
