"""The passes of a training step by Triton kernels give PyTorch's answers: in Triton's interpreter, and on a GPU.

What runs before a pass is made up here, in float64 where it is a number: each is held to the accuracy rule alone. The
interpreter, where there is one, checks that kernels read and write nothing but what they were passed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pointfuse.backends import BACKENDS, calls
from pointfuse.backends import triton as backend
from pointfuse.backends.triton import training
from pointfuse.backends.triton.configs import REFERENCE_CHIPS
from pointfuse.problem import ACTIVATIONS, IDENTITY, RESIDUAL_ORDERS, Activation, Geometry, Refused
from torch import Tensor
from torch.nn import functional as F
from units_for_tests import MODES
from yardstick import error

if reason := BACKENDS["triton"].triton_problem():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from pointfuse.backends.triton import launching
from pointfuse.backends.triton.training_kernels import _elements

if not launching.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

DEVICE = "cpu" if launching.INTERPRETED else "cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
EPS = 1e-3
LEAKY = Activation("leaky_relu", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    """Tensors are made where the kernels run, and the backend takes them."""
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE):
        patch.setattr(calls, "on_gpu", lambda tensor: tensor.device.type == DEVICE)
        if launching.INTERPRETED:
            patch.setattr(backend, "unusable_reason", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _only_what_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a kernel reads and writes within the tensors that it was passed."""
    if not launching.INTERPRETED:
        return
    from triton.runtime.interpreter import interpreter_builder

    load, store, launch = (
        interpreter_builder.create_masked_load,
        interpreter_builder.create_masked_store,
        training._launch,
    )
    passed: list[Tensor] = []

    def within(pointers: Any, mask: Any) -> bool:
        asked = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        inside = [(asked >= t.data_ptr()) & (asked < t.data_ptr() + t.nbytes) for t in passed]
        return not passed or bool(np.logical_or.reduce(inside).all())

    def checked_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        assert within(pointers, mask)
        return load(pointers, mask, *rest, **options)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        assert within(pointers, mask)
        return store(pointers, value, mask, *rest)

    def noted(kernel: Any, programs: int, device: torch.device, *arguments: Any) -> None:
        passed[:] = [t for t in arguments if isinstance(t, Tensor)]
        launch(kernel, programs, device, *arguments)
        passed.clear()

    monkeypatch.setattr(interpreter_builder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", checked_store)
    monkeypatch.setattr(training, "_launch", noted)


def pointwise(z: Tensor, activation: Activation, residual: Tensor | None, order: str) -> Tensor:
    """PyTorch's residual and activation."""
    functions = {"leaky_relu": lambda t: F.leaky_relu(t, activation.negative_slope), "identity": lambda t: t}
    function = functions.get(activation.name) or getattr(F, activation.name)
    if residual is None:
        return function(z)
    return function(z + residual) if order == "add_act" else function(z) + residual


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=FORMATS[layout])


def parts_of(y: Tensor, parts: int = 3) -> Tensor:
    """Statistics in parts of unlike sizes, by float64."""
    rows = y.double().movedim(1, 0).flatten(1)
    total = rows.shape[1]
    cuts = [0, *sorted({max(1, total * i * i // parts**2) for i in range(1, parts)}), total]
    pieces = [rows[:, a:b] for a, b in itertools.pairwise(cuts) if a < b]
    found = [
        torch.stack([torch.full((len(p),), p.shape[1]).double(), p.mean(1), p.var(1, unbiased=False) * p.shape[1]])
        for p in pieces
    ]
    return torch.stack(found).float()


def statistics_of(y: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Mean and rstd, by float64."""
    var, mean = torch.var_mean(y.double(), (0, 2, 3), unbiased=False)
    return mean.float(), (var + eps).rsqrt().float()


def merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of parts, by float64."""
    count, mean, m2 = parts.double().unbind(1)
    total = count.sum(0)
    whole = (count * mean).sum(0) / total
    return total, whole, (m2 + count * (mean - whole) ** 2).sum(0) / total


@contextlib.contextmanager
def chip(family: str) -> Iterator[None]:
    """Plans for a GPU of a family."""
    with (
        mock.patch.object(launching, "chip_of", return_value=REFERENCE_CHIPS[family]),
        mock.patch.dict(launching._launches, clear=True),
    ):
        yield


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, tf32: bool = False, **options: bool
) -> tuple[Tensor, Any]:
    with mock.patch.object(calls, "tf32_allowed", return_value=tf32):
        return training.conv(x, weight, bias, geometry, **options)


CONVOLUTIONS = {
    "1x1, channels_last": (1, (2, 32, 7, 9), 75, (1, 1), (0, 0), "channels_last"),
    "1x1, NCHW": (1, (2, 24, 5, 7), 3, (1, 1), (0, 0), "NCHW"),
    "1x1, stride 2, padded": (1, (2, 16, 7, 6), 24, (2, 2), (1, 1), "channels_last"),
    "1x1 of a detection head": (1, (1, 16, 5, 5), 255, (1, 1), (0, 0), "channels_last"),
    "3x3, channels_last": (3, (2, 16, 13, 13), 40, (1, 1), (1, 1), "channels_last"),
    "3x3, NCHW": (3, (2, 8, 6, 11), 33, (1, 1), (1, 1), "NCHW"),
    "3x3, stride 2x1": (3, (3, 8, 9, 5), 16, (2, 1), (1, 0), "channels_last"),
    "3x3, 3 channels": (3, (2, 3, 16, 12), 32, (1, 1), (1, 1), "channels_last"),
    "3x3, planes that share tiles": (3, (15, 8, 4, 4), 16, (1, 1), (1, 1), "channels_last"),
    "planes of one pixel": (1, (5, 16, 1, 1), 16, (1, 1), (0, 0), "channels_last"),
}


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_convolution_and_its_statistics(mode: str, case: Any, family: str) -> None:
    """Of small integers every sum is exact; the statistics are of what is inside the output alone."""
    kernel, shape, c_out, stride, padding, layout = case
    dtype, tf32 = MODES[mode]
    x = torch.randint(-3, 4, shape).to(dtype).to(memory_format=FORMATS[layout])
    weight = torch.randint(-3, 4, (c_out, shape[1], kernel, kernel)).to(dtype).to(memory_format=FORMATS[layout])
    bias = torch.randint(-9, 10, (c_out,)).to(dtype) if c_out % 2 else None
    with chip(family):
        y, parts = convolved(x, weight, bias, Geometry(stride, padding), tf32)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride, padding)
    assert torch.equal(y, exact.to(dtype))
    assert y.stride() == F.conv2d(x, weight, bias, stride, padding).stride()
    assert parts.dtype == torch.float32
    assert parts.shape[1:] == (3, c_out)
    count, mean, var = merged(parts)
    assert torch.equal(count, torch.full((c_out,), y.numel() // c_out).double())
    assert error(mean, exact.mean((0, 2, 3))) < 1e-6
    assert error(var, exact.var((0, 2, 3), unbiased=False)) < 1e-6


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_and_repetition_change_no_bit(mode: str, family: str) -> None:
    """Of a call, too, for which an inference kernel splits its sum."""
    dtype, tf32 = MODES[mode]
    x, weight = drawn((1, 256, 5, 6), dtype, "channels_last"), drawn((32, 256, 3, 3), dtype, "channels_last")
    same = Geometry((1, 1), (1, 1))
    with chip(family):
        y, parts = convolved(x, weight, None, same, tf32)
        again, parts_again = convolved(x, weight, None, same, tf32)
        without, none = convolved(x, weight, None, same, tf32, statistics=False)
        assert {launch.plan.config.split_k for launch in launching._launches.values()} == {1}
        with mock.patch.object(calls, "tf32_allowed", return_value=tf32):
            launching.execute(*calls.arguments(x, weight, None, None, IDENTITY, same))
        assert [launch.plan.config.split_k for launch in launching._launches.values()][-1] > 1
    assert none is None
    assert torch.equal(y, again)
    assert torch.equal(y, without)
    assert torch.equal(parts, parts_again)


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
@pytest.mark.parametrize("mode", MODES)
def test_variance_under_a_mean_of_ten_deviations(mode: str, family: str) -> None:
    """Of the convolution itself, before it is rounded to half precision."""
    dtype, tf32 = MODES[mode]
    x = (torch.randn(2, 32, 16, 16) + 10).to(dtype)
    weight = torch.randn(32, 32, 1, 1).to(dtype)
    if tf32:
        x, weight = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight))
    with chip(family):
        _, parts = convolved(x, weight, None, Geometry(), tf32)
    exact = F.conv2d(x.double(), weight.double())
    _, mean, var = merged(parts)
    true = exact.var((0, 2, 3), unbiased=False)
    assert ((var - true).abs() / true).max() <= 1e-5
    assert error(mean, exact.mean((0, 2, 3))) <= 1e-6
    _, _, rstd = training.normalise(
        exact.to(dtype), parts, None, None, None, None, None, None, None, 0.1, 0.0, IDENTITY, "add_act"
    )
    assert ((rstd.double() ** -2 - true).abs() / true).max() <= 1e-5


def test_a_mean_far_above_the_deviation() -> None:
    """A mean of 1e4 and a deviation of 0.1: what fp32 holds of it, no worse than twice PyTorch."""
    x = 1e4 + 0.1 * torch.randn(2, 4, 16, 16)
    weight = torch.eye(4).view(4, 4, 1, 1) + 0.01
    y, parts = convolved(x, weight, None, Geometry())
    vectors = (None, None, None, None, None, 0.1, 1e-5)
    out, _, _ = training.normalise(y, parts, None, None, *vectors, IDENTITY, "add_act")
    exact = F.batch_norm(F.conv2d(x.double(), weight.double()), None, None, training=True, eps=1e-5)
    composed = F.batch_norm(F.conv2d(x, weight), None, None, training=True, eps=1e-5)
    assert error(out, exact) <= 2 * error(composed, exact) + 1e-6
    assert error(composed, exact) > 1e-5


def test_constant_channels_have_no_variance() -> None:
    y, parts = convolved(torch.full((2, 3, 9, 7), 0.1), torch.ones(5, 3, 1, 1), torch.arange(5.0), Geometry())
    assert parts[:, 2].abs().max() < 1e-11
    out, mean, _ = training.normalise(y, parts, *[None] * 7, 0.1, 1e-5, IDENTITY, "add_act")
    assert error(mean, 0.3 + torch.arange(5).double()) < 1e-6
    assert out.abs().max() < 1e-3


SHAPES = {
    "64 channels": (2, 64, 5, 7),
    "3 channels": (2, 3, 9, 7),
    "75 channels": (3, 75, 5, 5),
    "255 channels": (1, 255, 4, 3),
    "24 channels of 16-pixel planes": (3, 24, 4, 4),
    "one channel": (2, 1, 5, 3),
    "planes of one pixel": (6, 40, 1, 1),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_step_of_every_shape(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    assert_forward(dtype, shape, layout, LEAKY)
    assert_backward(dtype, shape, layout, LEAKY)


@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_step_with_every_activation_and_residual(dtype: torch.dtype, activation: str, order: str | None) -> None:
    for slope in (0.1, 0.0, -0.5) if activation == "leaky_relu" else (0.1,):
        assert_forward(dtype, (2, 16, 5, 6), "channels_last", Activation(activation, slope), order)
        assert_backward(dtype, (2, 16, 5, 6), "channels_last", Activation(activation, slope), order)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_a_step_whose_programs_have_many_tiles(programs: int, layout: str) -> None:
    """24 channels are one block in channels_last, and several in NCHW."""
    with mock.patch.object(training, "_PROGRAMS", programs), mock.patch.object(training, "_TILE", 256):
        assert_forward(torch.float32, (3, 24, 9, 11), layout, LEAKY, "add_act")
        assert_backward(torch.float32, (3, 24, 9, 11), layout, LEAKY, "add_act")


@pytest.mark.parametrize("given", ["gamma", "beta", "neither"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_step_without_some_parameters(dtype: torch.dtype, given: str) -> None:
    present = {"gamma": given == "gamma", "beta": given == "beta"}
    assert_forward(dtype, (2, 16, 5, 6), "channels_last", LEAKY, **present)
    assert_backward(dtype, (2, 16, 5, 6), "channels_last", LEAKY, **present)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_step_with_parameters_in_half_precision(dtype: torch.dtype) -> None:
    assert_forward(dtype, (2, 16, 5, 6), "channels_last", LEAKY, channel_dtype=dtype)
    assert_backward(dtype, (2, 16, 5, 6), "channels_last", LEAKY, channel_dtype=dtype)


def vectors(channels: int, gamma: bool, beta: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return tuple(torch.randn(channels).to(dtype) if present else None for present in (gamma, beta))  # type: ignore[return-value]


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor, like: Tensor) -> None:
    """The rule of yardstick.py for a tensor that lies as another does."""
    assert (actual.shape, actual.dtype, actual.stride()) == (like.shape, like.dtype, like.stride())
    assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6


def assert_forward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    activation: Activation,
    order: str | None = None,
    gamma: bool = True,
    beta: bool = True,
    channel_dtype: torch.dtype = torch.float32,
) -> None:
    """Of the batch's statistics, and of given ones: the rule of yardstick.py."""
    channels = shape[1]
    y = drawn(shape, dtype, layout) * 2 + 1
    affine = vectors(channels, gamma, beta, channel_dtype)
    residual = drawn(shape, dtype, layout) if order else None
    running = (torch.randn(channels).to(channel_dtype), (torch.rand(channels) + 0.5).to(channel_dtype))
    moved = tuple(t.clone() for t in running)
    arguments = (affine[0], affine[1], residual, *moved, 0.3, EPS, activation, order or "add_act")
    out, mean, rstd = training.normalise(y, parts_of(y), None, None, *arguments)

    def composed(convert: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean, var = (convert(t).clone() for t in running)
        weight, bias, added = (None if t is None else convert(t) for t in (*affine, residual))
        z = F.batch_norm(convert(y), mean, var, weight, bias, True, 0.3, EPS)
        return pointwise(z, activation, added, order or "add_act"), (mean, var)

    exact, exact_moved = composed(lambda t: t.double())
    eager, eager_moved = composed(lambda t: t)
    assert_as_accurate(out, eager, exact, y)
    for ours, theirs, true, old in zip(moved, eager_moved, exact_moved, running, strict=True):
        assert_as_accurate(ours, theirs, true, old)
    true_mean, true_rstd = statistics_of(y)
    assert mean.dtype == rstd.dtype == torch.float32
    assert error(mean, true_mean.double()) < 1e-6
    assert error(rstd, true_rstd.double()) < 1e-6

    # Then nothing else is looked at, and the running statistics stay.
    before = [t.clone() for t in moved]
    given, *same = training.normalise(y, parts_of(2 * y), true_mean, true_rstd, *arguments)
    assert all(map(torch.equal, moved, before))
    assert_as_accurate(given, eager, exact, y)
    assert same[0] is true_mean
    assert same[1] is true_rstd


def assert_backward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    activation: Activation,
    order: str | None = None,
    gamma: bool = True,
    beta: bool = True,
    channel_dtype: torch.dtype = torch.float32,
) -> None:
    """Of the batch's statistics, and of given ones: the rule of yardstick.py against autograd."""
    channels = shape[1]
    y, grad_out = drawn(shape, dtype, layout) * 2 + 1, drawn(shape, dtype, layout)
    affine = vectors(channels, gamma, beta, channel_dtype)
    residual = drawn(shape, dtype, layout) if order else None
    mean, rstd = statistics_of(y)
    arguments = (grad_out, y, mean, rstd, *affine, residual, activation, order or "add_act")
    parts = training.sums(*arguments)
    assert parts.dtype == torch.float32
    assert parts.shape[1:] == (2, channels)
    count = y.numel() // channels
    actual = training.gradients(*arguments, parts, count, want_residual=True)
    frozen = training.gradients(*arguments, None, count, want_residual=False)

    def differentiated(convert: Any, batch_statistics: bool) -> list[Tensor | None]:
        # Parameters that are absent are made up, so that there are gradients to compare with; PyTorch wants fp32.
        weight, bias = (
            torch.full((channels,), i) if t is None else t.float() for t, i in zip(affine, (1.0, 0.0), strict=True)
        )
        inputs = [None if t is None else convert(t).detach().requires_grad_() for t in (y, residual, weight, bias)]
        running = None if batch_statistics else convert(mean)
        var = None if batch_statistics else convert((rstd.double() ** -2 - EPS).float())
        z = F.batch_norm(inputs[0], running, var, *inputs[2:], batch_statistics, 0.0, EPS)
        pointwise(z, activation, inputs[1], order or "add_act").backward(convert(grad_out))
        return [None if t is None else t.grad for t in inputs]

    for ours, batch_statistics in ((actual, True), (frozen, False)):
        exact = differentiated(lambda t: t.double(), batch_statistics)
        eager = differentiated(lambda t: t, batch_statistics)
        assert_as_accurate(ours[0], eager[0], exact[0], y)
        if batch_statistics:
            for i in (2, 3):
                assert ours[i].dtype == torch.float32
                assert error(ours[i], exact[i]) <= 2 * error(eager[i], exact[i]) + 1e-6
        else:
            assert ours[2:] == (None, None)
        if ours is actual and order == "add_act":
            assert_as_accurate(ours[1], eager[1], exact[1], y)
        else:
            assert ours[1] is None


@pytest.mark.parametrize("momentum", [0.0, 0.03, 1.0])
def test_momentum(momentum: float) -> None:
    """The unbiased variance moves the running one, and a statistic that is absent is left out."""
    y = drawn((2, 16, 5, 6), torch.float32, "channels_last")
    var, mean = torch.var_mean(y.double(), (0, 2, 3))
    for with_mean, with_var in itertools.product((True, False), repeat=2):
        running = (torch.full((16,), 5.0) if with_mean else None, torch.full((16,), 7.0) if with_var else None)
        training.normalise(y, parts_of(y), *[None] * 5, *running, momentum, EPS, IDENTITY, "add_act")
        for actual, old, new in zip(running, (5.0, 7.0), (mean, var), strict=True):
            if actual is not None:
                assert error(actual, (1 - momentum) * old + momentum * new) < 1e-6


@pytest.mark.parametrize("count", [2, 31, 32, 33, 64, 200])
def test_parts_merge(count: int) -> None:
    """Of unlike sizes, with means far apart and far from zero, whether a kernel of their own merges them or not."""
    sizes = torch.randint(1, 300, (count, 1)).double().expand(-1, 40)
    means = 1e3 + 10 * torch.randn(count, 40).double()
    parts = torch.stack([sizes, means, sizes * torch.rand(count, 40)], 1).float()
    y = drawn((1, 40, 1, 2), torch.float32, "channels_last")
    with mock.patch.object(training, "_launch", wraps=training._launch) as launch:
        _, mean, rstd = training.normalise(y, parts, *[None] * 7, 0.1, EPS, IDENTITY, "add_act")
    assert launch.call_count == (1 if count <= 32 else 2)
    _, true_mean, true_var = merged(parts)
    assert error(mean, true_mean) < 1e-7
    assert error(rstd, (true_var + EPS).rsqrt()) < 1e-6


@pytest.mark.parametrize("count", [1, 16, 17, 300])
def test_parts_of_sums_add_up(count: int) -> None:
    """A process of several that train together has the others' parts."""
    parts = torch.randint(-50, 50, (count, 2, 24)).float()
    y = drawn((1, 24, 3, 3), torch.float32, "channels_last")
    arguments = (y, y, torch.zeros(24), torch.ones(24), None, None, None, IDENTITY, "add_act", parts, 1000, False)
    dy, _, d_gamma, d_beta = training.gradients(*arguments)
    assert torch.equal(torch.stack([d_beta, d_gamma]), parts.sum(0))
    exact = y.double() - (d_beta / 1000).double().view(-1, 1, 1) - y.double() * (d_gamma / 1000).double().view(-1, 1, 1)
    assert error(dy, exact) < 1e-6


def test_batches_of_several_processes_are_one() -> None:
    """Statistics and sums of two halves, put together, give what the whole batch gives."""
    whole, grad_out = (drawn((4, 24, 5, 6), torch.float32, "channels_last") for _ in range(2))
    gamma, beta = vectors(24, True, True, torch.float32)
    mean, rstd = statistics_of(whole)
    halves = list(zip(grad_out.chunk(2), whole.chunk(2), strict=True))
    rest = (mean, rstd, gamma, beta, None, LEAKY, "add_act")
    sums = sum(training.sums(g, y, *rest).sum(0, keepdim=True) for g, y in halves)
    dy = torch.cat([training.gradients(g, y, *rest, sums, 4 * 30, False)[0] for g, y in halves])

    y = whole.double().requires_grad_()
    pointwise(F.batch_norm(y, None, None, gamma.double(), beta.double(), True, 0.0, EPS), LEAKY, None, "").backward(
        grad_out.double()
    )
    assert error(dy, y.grad) < 1e-6


VIEWS = {
    "expanded": lambda t: t[:1, :, :1, :1].expand_as(t),
    "a slice of channels": lambda t: torch.cat([t, t], 1)[:, t.shape[1] - 3 : 2 * t.shape[1] - 3],
    "transposed planes": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "the other layout": lambda t: t.contiguous(
        memory_format=torch.channels_last if t.is_contiguous() else torch.contiguous_format
    ),
    "a negative view": lambda t: torch._neg_view(t),
    "at an odd address": lambda t: (
        torch.cat([t.new_zeros(1), t.permute(0, 2, 3, 1).reshape(-1)])[1:]
        .view(t.shape[0], *t.shape[2:], t.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_gradient_and_residual_may_lie_anyhow(view: Any, layout: str) -> None:
    y, grad_out, residual = (drawn((2, 16, 5, 6), torch.bfloat16, layout) for _ in range(3))
    grad_out, residual = view(grad_out), view(residual)
    mean, rstd = statistics_of(y)

    def step(grad_out: Tensor, residual: Tensor) -> list[Tensor | None]:
        rest = (residual, LEAKY, "add_act")
        arguments = (grad_out, y, mean, rstd, None, None, *rest)
        parts = training.sums(*arguments)
        forward = training.normalise(y, None, mean, rstd, None, None, residual, None, None, 0.1, EPS, *rest[1:])
        return [forward[0], parts, *training.gradients(*arguments, parts, 60, True)]

    plain = [torch.empty_like(y).copy_(t) for t in (grad_out, residual)]
    for actual, expected in zip(step(grad_out, residual), step(*plain), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_a_step_repeats_bit_by_bit() -> None:
    x, residual = drawn((2, 32, 9, 9), torch.bfloat16, "channels_last"), None
    weight, gamma = drawn((48, 32, 3, 3), torch.bfloat16, "channels_last"), torch.randn(48)

    def step() -> list[Tensor]:
        y, parts = convolved(x, weight, None, Geometry((1, 1), (1, 1)))
        out, mean, rstd = training.normalise(y, parts, None, None, gamma, *[None] * 4, 0.1, EPS, LEAKY, "add_act")
        arguments = (out, y, mean, rstd, gamma, None, residual, LEAKY, "add_act")
        sums = training.sums(*arguments)
        dy, _, d_gamma, d_beta = training.gradients(*arguments, sums, 162, False)
        return [y, parts, out, mean, rstd, sums, dy, d_gamma, d_beta]

    for first, second in zip(step(), step(), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


# NumPy's word on infinity less infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_reach_what_they_reach_in_pytorch(activation: str, bad: float) -> None:
    """In the channel whose statistics they spoil, and nowhere else."""
    y = drawn((2, 16, 5, 6), torch.float32, "channels_last")
    y[1, 3, 2, 2] = bad
    grad_out = drawn((2, 16, 5, 6), torch.float32, "channels_last")
    gamma, beta = vectors(16, True, True, torch.float32)
    kind = Activation(activation, 0.1)
    parts = parts_of(y)
    out, mean, rstd = training.normalise(y, parts, None, None, gamma, beta, None, None, None, 0.1, EPS, kind, "add_act")
    arguments = (grad_out, y, mean, rstd, gamma, beta, None, kind, "add_act")
    dy = training.gradients(*arguments, training.sums(*arguments), 60, False)[0]

    inputs = y.clone().requires_grad_()
    expected = pointwise(F.batch_norm(inputs, None, None, gamma, beta, True, 0.0, EPS), kind, None, "add_act")
    expected.backward(grad_out)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(dy, inputs.grad, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert out[:, 3].isnan().all()
    assert dy[:, 3].isnan().all()
    assert dy[:, :3].isfinite().all()


@pytest.mark.parametrize("where", ["grad_out", "y", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_given_statistics_as_in_pytorch(activation: str, where: str) -> None:
    """Element by element, through comparisons that NaN fails."""
    tensors = {name: drawn((1, 8, 3, 4), torch.float32, "channels_last") for name in ("grad_out", "y", "residual")}
    tensors[where][0, 2, 1, 1] = torch.nan
    mean, rstd = torch.randn(8), torch.rand(8) + 0.5
    kind = Activation(activation, 0.1)
    grad_out, y, residual = tensors.values()
    arguments = (grad_out, y, mean, rstd, None, None, residual, kind, "add_act")
    dy, d_residual, _, _ = training.gradients(*arguments, None, 12, True)
    out, _, _ = training.normalise(y, None, mean, rstd, *[None] * 2, residual, *[None] * 2, 0.1, EPS, kind, "add_act")

    z = ((y - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1) + residual).requires_grad_()
    expected = pointwise(z, kind, None, "add_act")
    expected.backward(grad_out)
    dz = z.grad
    if activation == "relu6":
        # As on a GPU: on the CPU PyTorch's vectors lose the gradient where z is NaN, and its scalars do not.
        dz = torch.where((z <= 0) | (z >= 6), 0, grad_out)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(d_residual, dz, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(dy, dz * rstd.view(-1, 1, 1), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_gradients_where_the_activations_bend() -> None:
    """At 0 a leaky ReLU has its slope and ReLU nothing; ReLU6 has nothing at 6 either."""
    y = torch.tensor([-1.0, 0.0, 6.0, 7.0]).view(1, 1, 1, 4)
    expected = {
        ("leaky_relu", -0.5): [-0.5, -0.5, 1, 1],
        ("leaky_relu", 0.0): [0, 0, 1, 1],
        ("relu", 0.0): [0, 0, 1, 1],
        ("relu6", 0.0): [0, 0, 0, 0],
        ("identity", 0.0): [1, 1, 1, 1],
    }
    for (name, slope), gradient in expected.items():
        kind = Activation(name, slope)
        arguments = (torch.ones_like(y), y, torch.zeros(1), torch.ones(1), None, None, None, kind, "add_act")
        assert training.gradients(*arguments, None, 4, False)[0].flatten().tolist() == gradient, name


def test_silu_far_from_zero_has_pytorchs_gradient() -> None:
    y = torch.tensor([-1e4, -200.0, -88.8, -17.0, 0.0, 17.0, 88.8, 1e4]).view(1, 1, 1, 8)
    arguments = (torch.ones_like(y), y, torch.zeros(1), torch.ones(1), None, None, None, Activation("silu"), "add_act")
    z = y.double().requires_grad_()
    F.silu(z).sum().backward()
    assert error(training.gradients(*arguments, None, 8, False)[0], z.grad) < 1e-6


def test_an_empty_batch_has_no_parts() -> None:
    y, parts = convolved(torch.empty(0, 8, 5, 5), torch.ones(4, 8, 1, 1), None, Geometry())
    assert y.shape == (0, 4, 5, 5)
    assert parts.shape == (0, 3, 4)


def test_what_is_not_served_is_refused() -> None:
    x, weight, y = torch.ones(1, 8, 4, 4), torch.ones(4, 8, 1, 1), torch.ones(1, 4, 4, 4)
    with pytest.raises(Refused, match="it has groups"):
        training.conv(x, torch.ones(4, 4, 1, 1), None, Geometry(groups=2))
    with pytest.raises(Refused, match="neither 1x1 nor 3x3"):
        training.conv(x, torch.ones(4, 8, 2, 2), None, Geometry())
    with pytest.raises(Refused, match="same input channels"):
        training.conv(x, torch.ones(4, 7, 1, 1), None, Geometry())
    with pytest.raises(Refused, match="float32, float16 and bfloat16"):
        training.conv(x.double(), weight.double(), None, Geometry())
    rest = (None, None, None, None, 0.1, EPS, IDENTITY, "add_act")
    with pytest.raises(Refused, match="neither contiguous nor channels_last"):
        training.normalise(y.transpose(1, 2), parts_of(y), None, None, None, *rest)
    with pytest.raises(Refused, match="not contiguous, or neither"):
        training.normalise(y, parts_of(y), None, None, torch.ones(4).double(), *rest)
    with pytest.raises(Refused, match="not contiguous, or neither"):
        training.normalise(y, parts_of(y), None, None, torch.ones(8)[::2], *rest)
    with mock.patch.object(backend, "unusable_reason", return_value="no GPU"), pytest.raises(Refused, match="no GPU"):
        training.sums(y, y, torch.zeros(4), torch.ones(4), None, None, None, IDENTITY, "add_act")


def test_recorded_gradients_do_not_matter() -> None:
    """Autograd is taught by what calls this."""
    x, weight = torch.ones(1, 8, 4, 4), torch.nn.Parameter(torch.ones(4, 8, 1, 1))
    y, _ = convolved(x, weight, None, Geometry())
    assert not y.requires_grad
    assert torch.equal(y, torch.full((1, 4, 4, 4), 8.0))


@triton.jit(do_not_specialize=["tile"])
def _write_elements(
    out, tile, channels, inner, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile's offsets, with -1 for what the mask leaves out."""
    element, mask = _elements(tile, tl.arange(0, BLOCK_CHANNELS), channels, inner, CHANNELS_LAST, VECTOR, BLOCK_PIXELS)
    place = tl.arange(0, BLOCK_PIXELS)[:, None] * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    tl.store(out + place, tl.where(mask, element, -1))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
def test_offsets_past_two_to_the_31(channels_last: bool) -> None:
    """Of the last tile of more than 2^31 elements; Python's integers know no overflow."""
    channels, inner, images = (100, 40_000_003, 1) if channels_last else (3, 400_003, 2000)
    tiles = -(-inner // 32)
    for image in {0, images - 1}:
        out = torch.empty(32, 4, dtype=torch.int64)
        _write_elements[(1,)](out, image * tiles + tiles - 1, channels, inner, channels_last, 1, 32, 4)
        pixels = range((tiles - 1) * 32, tiles * 32)
        steps = (channels, 1) if channels_last else (1, inner)
        expected = [
            [
                image * channels * inner + p * steps[0] + c * steps[1] if p < inner and c < channels else -1
                for c in range(4)
            ]
            for p in pixels
        ]
        assert out.tolist() == expected
    assert out.max() > 1 << 31


def test_training_loads_no_triton() -> None:
    """Not until it is called."""
    import subprocess
    import sys

    code = "import sys, pointfuse.backends.triton.training; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
