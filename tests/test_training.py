"""Units with gradients: the definition's gradients, PyTorch's statistics, and less memory."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pointfuse
import pytest
import torch
from pointfuse import reference, training
from pointfuse.backends import FallbackWarning, aten_training
from pointfuse.functional import conv_bn_act
from pointfuse.problem import ACTIVATIONS, IDENTITY, RESIDUAL_ORDERS, BatchNorm, Geometry, Refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from yardstick import assert_as_accurate, error

# `pointfuse.backends` is the public function of that name.
backends = importlib.import_module("pointfuse.backends")
GEOMETRIES = {
    "1x1": dict(kernel=1),
    "1x1 stride 2": dict(kernel=1, stride=2),
    "3x3": dict(kernel=3, padding=1),
    "3x3 same": dict(kernel=3, padding="same"),
    "3x3 stride 2 padded unevenly": dict(kernel=3, stride=(2, 1), padding=(1, 0)),
    "3x3 dilated in groups": dict(kernel=3, dilation=2, groups=2, padding=2),
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def served_by(y: Tensor) -> bool:
    """Whether a unit's own gradient stands behind a result."""
    return type(y.grad_fn).__name__ == "_ConvBNActBackward"


def unit(c_in: int = 8, c_out: int = 6, kernel: int = 1, act: nn.Module | None = None, **options: Any) -> nn.Sequential:
    """A unit with parameters that are far from their defaults."""
    conv = nn.Conv2d(c_in, c_out, kernel, **{"bias": False, "padding": kernel // 2} | options)
    bn = nn.BatchNorm2d(c_out)
    with torch.no_grad():
        for t in (bn.weight, bn.bias, bn.running_mean):
            t.normal_()
        bn.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, bn, nn.LeakyReLU(0.1) if act is None else act)


def step(model: nn.Module, x: Tensor, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) if grad_out is None else grad_out)
    found = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, e in expected.items():
        torch.testing.assert_close(actual[name], e, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# The definition


@pytest.mark.parametrize("training_mode", [True, False], ids=["batch statistics", "given statistics"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_are_the_definitions(geometry: dict[str, Any], training_mode: bool) -> None:
    options = {k: v for k, v in geometry.items() if k != "kernel"}
    kernel, groups = geometry["kernel"], geometry.get("groups", 1)
    x, weight = torch.randn(3, 4, 6, 7).double(), torch.randn(6, 4 // groups, kernel, kernel).double()
    bias, gamma, beta, mean = torch.randn(4, 6).double()
    var = torch.rand(6).double() + 0.5
    given = dict(options, padding=1) if options.get("padding") == "same" else options
    common = dict(training=training_mode, activation="leaky_relu", negative_slope=-0.3, momentum=0.3, eps=1e-3)
    running = [(mean.clone(), var.clone()) for _ in range(2)]
    expected, saved = reference.forward(x, weight, bias, *running[0], gamma, beta, **common, **given)
    grad_out = torch.randn_like(expected)
    gradients = reference.backward(grad_out, saved)

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, gamma, beta)]
    y = conv_bn_act(*leaves[:3], *running[1], *leaves[3:], **common, **options)
    assert served_by(y)
    y.backward(grad_out)
    torch.testing.assert_close(y, expected)
    for leaf, gradient in zip(leaves, gradients[:5], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    for actual, exact in zip(running[1], running[0], strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("training_mode", [True, False], ids=["batch statistics", "given statistics"])
@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, order: str | None, training_mode: bool) -> None:
    tensors = [torch.randn(2, 2, 2, 2), torch.randn(2, 2, 1, 1), *torch.randn(3, 2), torch.randn(2, 2, 2, 2)]
    leaves = [t.double().requires_grad_() for t in (tensors if order else tensors[:-1])]
    statistics = (torch.randn(2).double(), torch.rand(2).double() + 0.5)

    def function(*inputs: Tensor) -> Tensor:
        x, weight, bias, gamma, beta, *residual = inputs
        y = conv_bn_act(
            x, weight, bias, *(t.clone() for t in statistics), gamma, beta, training=training_mode,
            activation=activation, residual=residual[0] if order else None, residual_order=order or "add_act",
        )  # fmt: skip
        assert served_by(y)
        return y

    assert torch.autograd.gradcheck(function, leaves)
    assert activation not in ("leaky_relu", "silu") or torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("absent", [{"bn_weight"}, {"bn_bias"}, {"bn_weight", "bn_bias"}, {"running"}], ids=str)
def test_what_is_absent_needs_no_gradient(absent: set[str]) -> None:
    x, weight = torch.randn(2, 3, 4, 4).double().requires_grad_(), torch.randn(4, 3, 1, 1).double().requires_grad_()
    norm = [None if name in absent else torch.randn(4).double() for name in ("bn_weight", "bn_bias")]
    running = (None, None) if "running" in absent else (torch.zeros(4).double(), torch.ones(4).double())

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, *running, *norm, training=True)

    assert torch.autograd.gradcheck(function, (x, weight))


# PyTorch's answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("norm_dtype", ["fp32 norm", "norm as x"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_are_as_accurate_as_pytorchs(
    dtype: torch.dtype, memory_format: torch.memory_format, norm_dtype: str, mode: str
) -> None:
    model = unit(16, 24, 3).to(dtype).to(memory_format=memory_format)
    if norm_dtype == "fp32 norm":
        model[1].float()
    model.train(mode == "train")
    x = torch.randn(4, 16, 9, 7).to(dtype).to(memory_format=memory_format)
    grad_out = torch.randn(4, 24, 9, 7).to(dtype)
    exact = step(copy.deepcopy(model).double(), x.double(), grad_out.double())
    eager = step(copy.deepcopy(model), x, grad_out)
    converted = pointfuse.convert(copy.deepcopy(model))
    assert served_by(converted(x))
    actual = step(pointfuse.convert(copy.deepcopy(model)), x, grad_out)
    for name, expected in eager.items():
        assert actual[name].dtype == expected.dtype
        assert error(actual[name], exact[name]) <= 2 * error(expected, exact[name]) + 1e-6, name
    assert_as_accurate(actual["y"], eager["y"], exact["y"])


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unit().double()
    x = torch.randn(5, 8, 7, 9).double()
    expected = step(copy.deepcopy(model), x)
    for memory_format, size in itertools.product(FORMATS.values(), (1, 100, 6 * 63, 800, 10**6)):
        monkeypatch.setattr(aten_training, "_PIECE", size)
        converted = pointfuse.convert(copy.deepcopy(model).to(memory_format=memory_format))
        assert_same(step(converted, x.to(memory_format=memory_format)), expected)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda y: torch.linspace(-1, 2, y.shape[3], dtype=y.dtype).expand_as(y),
    "sliced": lambda y: torch.randn(len(y), 2 * y.shape[1], *y.shape[2:], dtype=y.dtype)[:, ::2],
    "of the other memory format": lambda y: torch.randn_like(y).to(memory_format=torch.channels_last),
    "transposed": lambda y: torch.randn(y.shape[1], len(y), *y.shape[2:], dtype=y.dtype).transpose(0, 1),
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("act", [nn.LeakyReLU(-0.2), nn.Identity(), nn.SiLU()], ids=["leaky", "identity", "silu"])
def test_any_gradient_of_the_output_will_do(make: Callable[[Tensor], Tensor], act: nn.Module) -> None:
    model = unit(act=act).double()
    x = torch.randn(3, 8, 6, 6).double()
    grad_out = make(torch.empty(3, 6, 6, 6).double())
    assert_same(step(pointfuse.convert(copy.deepcopy(model)), x, grad_out), step(model, x, grad_out))


@pytest.mark.parametrize("slope", [0.0, -0.5, 1.5, 1.0])
def test_any_slope_will_do_whatever_becomes_of_the_output(slope: float) -> None:
    model = unit(act=nn.LeakyReLU(slope)).double()
    converted = pointfuse.convert(copy.deepcopy(model))
    x = torch.randn(3, 8, 6, 6).double()
    grad_out = torch.randn(3, 6, 6, 6).double()
    expected = step(model, x, grad_out)
    a = x.clone().requires_grad_()
    y = converted(a)
    y.mul_(-3)
    y.backward(grad_out / -3)
    torch.testing.assert_close(a.grad, expected["x"])


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
def test_running_statistics_are_pytorchs(momentum: float | None, track: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6, momentum=momentum, track_running_stats=track), nn.LeakyReLU(0.1)
    ).double()
    converted = pointfuse.convert(copy.deepcopy(model))
    for mode in (True, True, False, True):
        x = torch.randn(3, 8, 5, 5).double()
        for m in (model, converted):
            m.train(mode)
        assert_same(step(converted, x), step(model, x))
    # Also where autograd does not record, and where it is told not to keep statistics any more.
    for m in (model, converted):
        m[1].track_running_stats = False
        with torch.no_grad():
            m(x)
    assert_same(dict(converted.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_the_variance_survives_a_mean_of_ten_deviations(memory_format: torch.memory_format) -> None:
    model = unit(64, 16).to(memory_format=memory_format)
    x = (torch.randn(8, 64, 13, 13) + 10).to(memory_format=memory_format)
    exact = F.conv2d(x.double(), model[0].weight.double()).var((0, 2, 3))
    model[1].momentum = 1.0
    y = pointfuse.convert(model)(x)
    assert served_by(y)
    assert ((model[1].running_var.double() - exact) / exact).abs().max() <= 1e-5


@pytest.mark.parametrize("count", [3, 7, 1000])
def test_the_statistics_of_a_constant_channel_are_exact(count: int) -> None:
    """What rounding leaves of the mean's distance from it would be multiplied by 1 / sqrt(eps)."""
    y = torch.randn(1, 64, 1, 1).expand(1, 64, 1, count).contiguous()
    merged = aten_training.merge(aten_training.statistics(y))
    assert torch.equal(merged[1], y[0, :, 0, 0])
    assert torch.equal(merged[2], torch.zeros(64))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_running_statistics_of_what_is_not_finite_are_pytorchs(value: float) -> None:
    y = torch.randn(2, 3, 4, 5)
    y[1, 1, 2, 3] = value
    bn = nn.BatchNorm2d(3)
    bn(y)
    ours = nn.BatchNorm2d(3)
    parts = aten_training.statistics(y)
    aten_training.finalise(parts, ours.running_mean, ours.running_var, 0.1, 1e-5)
    torch.testing.assert_close(ours.running_mean, bn.running_mean, equal_nan=True)
    torch.testing.assert_close(ours.running_var, bn.running_var, equal_nan=True)


def test_one_value_a_channel_is_pytorchs_error_and_changes_nothing_but_the_count() -> None:
    model = unit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pointfuse.convert(model)(torch.randn(1, 8, 1, 1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "1.num_batches_tracked"


def test_what_pytorch_refuses_is_refused_before_anything_is_counted() -> None:
    model = unit()
    with pytest.raises(RuntimeError, match="channels"):
        pointfuse.convert(model)(torch.randn(2, 7, 4, 4))
    assert model[1].num_batches_tracked == 0


def test_an_input_overwritten_before_the_backward_is_pytorchs_error() -> None:
    x = torch.randn(2, 8, 4, 4)
    y = pointfuse.convert(unit())(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Only what is asked for


class Counted(TorchDispatchMode):
    """Which gradients of convolutions and batch norms are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, list[bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("convolution_backward", "native_batch_norm_backward"):
            self.masks[name] = list(args[-1])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("wanted", ["x", "0.weight", "1.weight", "1.bias"])
def test_each_gradient_is_computed_only_if_asked_for(wanted: str, mode: str) -> None:
    model = pointfuse.convert(unit())
    model.train(mode == "train").requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, requires_grad=wanted == "x")
    if wanted != "x":
        model.get_parameter(wanted).requires_grad_()
    y = model(x)
    assert served_by(y)
    with Counted() as counted:
        y.sum().backward()
    convolution = counted.masks.get("convolution_backward")
    assert convolution == {"x": [True, False, False], "0.weight": [False, True, False]}.get(wanted)
    # With the batch's own statistics, the gradient of the convolution's output needs the sums of the other two.
    needs_sums = mode == "train" and convolution is not None
    asked = [convolution is not None, wanted == "1.weight", wanted == "1.bias"]
    assert counted.masks["native_batch_norm_backward"] == ([False, True, True] if needs_sums else asked)
    leaves = {"x": x, **dict(model.named_parameters())}
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}


def test_without_a_gradient_to_record_nothing_is_kept() -> None:
    model = pointfuse.convert(unit()).requires_grad_(False)
    assert model(torch.randn(2, 8, 4, 4)).grad_fn is None


# Memory


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward, each memory once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive.append(model(x))
    return sum(kept.values())


@pytest.mark.parametrize(("recompute", "bound"), [(False, 0.67), (True, 0.34)], ids=["default", "recompute"])
def test_a_third_or_two_of_the_memory_is_spared(recompute: bool, bound: float) -> None:
    def stack(width: int = 32) -> nn.Sequential:
        layers = [unit(width, width, kernel, bias=False) for kernel in (1, 3, 1, 3, 1, 3)]
        return nn.Sequential(*itertools.chain(*layers))

    model = stack()
    x = torch.randn(2, 32, 40, 40, requires_grad=True)
    eager = saved_bytes(model, x)
    assert saved_bytes(pointfuse.convert(model, recompute=recompute), x) <= bound * eager


def test_recomputing_gives_the_same_bit_for_bit() -> None:
    for memory_format, dtype in itertools.product(FORMATS.values(), (torch.float32, torch.bfloat16)):
        model = unit(16, 24, 3, bias=True).to(memory_format=memory_format)
        model[0].to(dtype)
        x = torch.randn(3, 16, 9, 9).to(dtype).to(memory_format=memory_format)
        kept = step(pointfuse.convert(copy.deepcopy(model)), x)
        again = step(pointfuse.convert(copy.deepcopy(model), recompute=True), x)
        assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_a_unit_too_small_to_gain_is_left_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    macs = 2 * 16 * 16 * 8 * 6
    monkeypatch.setattr(aten_training, "MIN_MACS_PER_THREAD", macs // torch.get_num_threads())
    for dtype, least, served in (
        (torch.float32, (8, 9), True),
        (torch.bfloat16, (8, 9), False),
        (torch.float32, (9, 8), False),
        (torch.bfloat16, (9, 8), True),
    ):
        monkeypatch.setattr(aten_training, "MIN_MACS_PER_OUTPUT", least[0])
        monkeypatch.setattr(aten_training, "MIN_MACS_PER_OUTPUT_IN_HALF", least[1])
        model = pointfuse.convert(unit().to(dtype))
        assert served_by(model(torch.randn(2, 8, 16, 16).to(dtype))) == served
        assert not served_by(model(torch.randn(2, 8, 16, 15).to(dtype)))
        assert served_by(pointfuse.convert(model, recompute=True)(torch.randn(2, 8, 2, 2).to(dtype)))


def test_recompute_is_asked_of_a_unit_or_of_a_model_and_taken_back_by_revert() -> None:
    x = torch.randn(2, 8, 6, 6)

    def keeps_x_alone(model: nn.Module) -> bool:
        return saved_bytes(model, x) < saved_bytes(pointfuse.revert(model), x) / 2

    module = pointfuse.ConvBNAct2d(8, 8, 1, recompute=True)
    assert keeps_x_alone(module)
    assert "recompute=True" in repr(module)
    assert keeps_x_alone(pointfuse.ConvBNAct2d.from_modules(*unit(8, 8), recompute=True))
    model = pointfuse.convert(unit(8, 8))
    assert not keeps_x_alone(model)
    model = pointfuse.convert(model, recompute=True)
    assert keeps_x_alone(model)
    assert keeps_x_alone(pointfuse.convert(model))
    assert keeps_x_alone(copy.deepcopy(model))
    assert not keeps_x_alone(pointfuse.convert(pointfuse.revert(model)))


# The tools of training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["default", "recompute"])
def test_autocast_gives_what_it_gives_pytorch(dtype: torch.dtype, recompute: bool) -> None:
    model = unit(16, 24, 3, bias=True)
    converted = pointfuse.convert(copy.deepcopy(model), recompute=recompute)
    x = torch.randn(3, 16, 8, 8)
    exact = step(copy.deepcopy(model).double(), x.double())
    results = []
    for m in (converted, model):
        a = x.clone().requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with torch.autocast("cpu", dtype):
            y = m(a)
            loss = (y.float() * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        optimiser = torch.optim.SGD(m.parameters(), lr=0.0)
        scaler.unscale_(optimiser)
        results.append({"y": y.detach(), "x": a.grad / 8} | {n: p.grad for n, p in m.named_parameters()})
    assert served_by(y) is False
    for name, eager in results[1].items():
        assert results[0][name].dtype == eager.dtype
        if name != "0.bias":  # which batch statistics take away again: rounding alone
            assert error(results[0][name], exact[name]) <= 2 * error(eager, exact[name]) + 1e-6, name


def test_a_backward_under_another_autocast_recomputes_what_the_forward_computed() -> None:
    model = unit(16, 24, 3)
    x = torch.randn(3, 16, 8, 8)
    expected = step(pointfuse.convert(copy.deepcopy(model)), x)
    converted = pointfuse.convert(copy.deepcopy(model), recompute=True)
    a = x.clone().requires_grad_()
    y = converted(a)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape))
    assert torch.equal(a.grad, expected["x"])


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(*unit(8, 8), *unit(8, 8, 3)).double()
    converted = pointfuse.convert(copy.deepcopy(model))

    def through(m: nn.Module) -> nn.Module:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.m = m

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.m, x, use_reentrant=reentrant)

        return Checkpointed()

    x = torch.randn(2, 8, 5, 5).double()
    assert_same(step(through(converted), x), step(through(model), x))


def test_gradients_accumulate() -> None:
    model = unit().double()
    converted = pointfuse.convert(copy.deepcopy(model))
    for _ in range(3):
        x = torch.randn(2, 8, 5, 5).double()
        for m in (model, converted):
            m(x).pow(2).sum().backward()
    for a, b in zip(converted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    model = pointfuse.convert(unit())
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    y = model(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_it_is_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    model = unit(16, 24, 3)
    x = torch.randn(3, 16, 9, 9)
    runs = [step(pointfuse.convert(copy.deepcopy(model)), x) for _ in range(3)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_double_backward_of_one_tensor_in_two_places() -> None:
    """The unit's input is its residual too: each place's gradient counts once."""
    weight = torch.randn(4, 4, 1, 1).double()
    norm = [torch.randn(4).double() for _ in range(2)]

    def function(x: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, None, None, *norm, training=True, activation="silu", residual=x)

    x = torch.randn(2, 4, 3, 3).double().requires_grad_()
    assert served_by(function(x))
    assert torch.autograd.gradgradcheck(function, (x,))


# Backends that refuse


@pytest.fixture
def other_backend(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A backend with kernels of its own for training: ATen's steps, until one is told to refuse."""
    names = ("conv", "normalise", "sums", "gradients")
    steps = SimpleNamespace(calls=[], refused=set())

    def recorded(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if name in steps.refused:
                raise Refused(f"it has no {name}")
            steps.calls.append(name)
            if name == "conv":
                y, _ = aten_training.conv(*args)
                return y, aten_training.statistics(y)
            return getattr(aten_training, name)(*args)

        return run

    for name in names:
        setattr(steps, name, recorded(name))
    monkeypatch.setattr(training, "training_steps", lambda: steps)
    monkeypatch.setattr(backends, "_requested", "triton")
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setitem(backends._preferred, "triton", backends.Preferred("triton"))
    return steps


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("refused", [None, "conv", "normalise", "sums", "gradients"])
def test_a_step_that_a_backend_refuses_is_atens(other_backend: SimpleNamespace, refused: str | None, mode: str) -> None:
    model = unit().double().train(mode == "train")
    converted = pointfuse.convert(copy.deepcopy(model))
    x = torch.randn(2, 8, 5, 5).double()
    expected = step(model, x)
    if refused is None:
        assert_same(step(converted, x), expected)
        assert other_backend.calls == ["conv", "normalise", "sums", "gradients"]
        return
    other_backend.refused = {refused}
    with pytest.warns(FallbackWarning, match=f"it has no {refused}"):
        assert_same(step(converted, x), expected)


def test_strict_makes_a_refused_step_an_error(other_backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_strict", True)
    other_backend.refused = {"conv"}
    with pytest.raises(RuntimeError, match="does not serve this call: it has no conv"):
        pointfuse.convert(unit())(torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "x"])
def test_gradients_by_steps_are_only_those_asked_for(other_backend: SimpleNamespace, frozen: str) -> None:
    model = unit().double()
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        m.requires_grad_(False)
        m[1].requires_grad_(True)
        if frozen != "x":
            m.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(2, 8, 5, 5).double()
    for m in (model, converted):
        m(x).pow(2).sum().backward()
    for a, b in zip(converted.parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    assert "gradients" not in other_backend.calls


def test_statistics_of_all_processes_are_not_made_again_from_this_ones_parts(
    other_backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, rstd = torch.full((6,), 2.0), torch.full((6,), 3.0)
    given = []
    monkeypatch.setattr(training, "_joint_statistics", lambda parts, bn, group: (mean, rstd, torch.ones(6)))
    monkeypatch.setattr(other_backend, "normalise", lambda *args: given.append(args) or (args[0], mean, rstd))
    bn = BatchNorm(None, None, None, None, True, 0.1, 1e-5)
    training.conv_bn_act(
        torch.randn(2, 8, 3, 3), torch.randn(6, 8, 1, 1), None, bn, IDENTITY, Geometry(), group=object()
    )
    ((_, parts, *statistics),) = (args[:4] for args in given)
    assert parts is None
    assert all(map(torch.equal, statistics, (mean, rstd)))


def test_one_batch_norm_unfused_and_fused_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a head that the levels of a pyramid share: PyTorch's batch norm keeps the running statistics for its backward,
    and the fused one, called later, writes to them."""
    conv, bn, act = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    head = nn.Sequential(conv, bn, act).double().train()
    converted = pointfuse.convert(copy.deepcopy(head))
    levels = [torch.randn(2, 4, size, size, dtype=torch.float64) for size in (4, 8, 12)]
    macs = 2 * 8 * 8 * 4 * 4 * 9
    monkeypatch.setattr(aten_training, "MIN_MACS_PER_THREAD", macs // torch.get_num_threads())
    for model in (head, converted):
        sum(model(x).square().mean() for x in levels).backward()
    for found, expected in zip(converted.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-9)
    for found, expected in zip(converted.buffers(), head.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
