"""``conv_bn_act`` gives PyTorch's answers: values, shapes, memory formats, statistics, gradients and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pointfuse import conv_bn_act
from pointfuse.backends import aten
from pointfuse.problem import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional as F
from yardstick import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Large enough for oneDNN (more than 20480 inputs), and with outputs enough to be worth folding.
SHAPES = {
    "1x1 small": dict(x=(2, 16, 5, 7), weight=(8, 16, 1, 1)),
    "1x1 large": dict(x=(2, 64, 26, 26), weight=(24, 64, 1, 1)),
    "1x1 of the 13x13 head": dict(x=(1, 1024, 13, 13), weight=(75, 1024, 1, 1)),
    "3x3 large": dict(x=(1, 24, 40, 40), weight=(16, 24, 3, 3), padding=1),
    "3x3 stride 2": dict(x=(1, 24, 41, 40), weight=(16, 24, 3, 3), padding=1, stride=2),
    "depthwise": dict(x=(1, 32, 40, 40), weight=(32, 1, 3, 3), padding=1, groups=32),
    "5x5 dilated": dict(x=(1, 16, 40, 40), weight=(8, 16, 5, 5), dilation=2),
    "same padding": dict(x=(1, 16, 40, 40), weight=(8, 16, 3, 3), padding="same"),
}


def eager(x: Tensor, weight: Tensor, *args: Any, activation: str, negative_slope: float = 0.01, eps: float = 1e-5,
          training: bool = False, momentum: float = 0.1, residual: Tensor | None = None,
          residual_order: str = "add_act", **geometry: Any) -> Tensor:  # fmt: skip
    bias, mean, var, gamma, beta = (*args, *[None] * 5)[:5]
    z = F.conv2d(x, weight, bias, **geometry)
    if training or mean is not None:
        z = F.batch_norm(z, mean, var, gamma, beta, training, momentum, eps)
    if residual is not None and residual_order == "add_act":
        z = z + residual
    act = {"leaky_relu": lambda t: F.leaky_relu(t, negative_slope), "identity": lambda t: t}.get(activation)
    z = (act or getattr(F, activation))(z)
    return z + residual if residual is not None and residual_order == "act_add" else z


def bn_operands(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(channels), torch.rand(channels) + 0.5, torch.rand(channels) + 0.5, torch.randn(channels)]


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_is_as_accurate_as_pytorch(
    dtype: torch.dtype, shape: Any, memory_format: torch.memory_format
) -> None:
    geometry = {k: v for k, v in shape.items() if k not in ("x", "weight")}
    x = torch.randn(shape["x"]).to(dtype).to(memory_format=memory_format)
    weight = (torch.randn(shape["weight"]) * 0.2).to(dtype)
    bias = torch.randn(weight.shape[0]).to(dtype)
    bn = [t.to(dtype) if dtype == torch.float64 else t for t in bn_operands(weight.shape[0])]
    for activation in ACTIVATIONS:
        for conv_bias in (None, bias):
            for norm in (bn, [None] * 4):
                options = dict(activation=activation, negative_slope=0.1, **geometry)
                with torch.no_grad():
                    actual = conv_bn_act(x, weight, conv_bias, *norm, **options)
                    expected = eager(x, weight, conv_bias, *norm, **options)
                    exact = eager(*double(x, weight, conv_bias, *norm), **options)
                assert_as_accurate(actual, expected, exact)


@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_goes_where_it_is_asked_to(dtype: torch.dtype, activation: str, order: str) -> None:
    x, weight = torch.randn(2, 32, 30, 30).to(dtype), (torch.randn(16, 32, 1, 1) * 0.2).to(dtype)
    bn = bn_operands(16)
    residuals = {
        "of the output's shape": torch.randn(2, 16, 30, 30).to(dtype),
        "broadcast": torch.randn(16, 1, 30).to(dtype),
        "wider in dtype": torch.randn(2, 16, 30, 30),
        "channels_last": torch.randn(2, 16, 30, 30).to(dtype).to(memory_format=torch.channels_last),
    }
    for name, residual in residuals.items():
        before = residual.clone()
        options = dict(activation=activation, negative_slope=0.1, residual_order=order)
        with torch.no_grad():
            actual = conv_bn_act(x, weight, None, *bn, residual=residual, **options)
            expected = eager(x, weight, None, *bn, residual=residual, **options)
            exact = eager(*double(x, weight, None, *bn), residual=residual.double(), **options)
        assert torch.equal(residual, before), name
        assert actual.dtype == expected.dtype, name
        assert_as_accurate(actual, expected, exact) if name != "channels_last" else None
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


@given(data=st.data())
def test_small_integers_are_exact(data: st.DataObject) -> None:
    """With rstd a power of two, every product and sum is an integer that fp32 holds: any wrong index shows."""
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c_in, c_out = groups * draw(st.integers(1, 24)), groups * draw(st.integers(1, 24))
    kernel, stride, padding = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    height, width, batch = draw(st.integers(3, 40)), draw(st.integers(3, 40)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    x = integers(batch, c_in, height, width).to(memory_format=draw(st.sampled_from(list(FORMATS.values()))))
    if draw(st.booleans()):
        x = torch.cat([x, x], 3)[..., 1 : 1 + width]  # a slice: strides and offset that are not the natural ones
    weight, bias = integers(c_out, c_in // groups, kernel, kernel), integers(c_out)
    bn = [integers(c_out), torch.full((c_out,), 4 - 2.0**-10), integers(c_out), integers(c_out)]
    options: dict[str, Any] = dict(
        activation=draw(st.sampled_from(["leaky_relu", "relu", "relu6", "identity"])),
        negative_slope=draw(st.sampled_from([0.5, 0.0, -2.0])),
        stride=stride, padding=padding, groups=groups, eps=2.0**-10,
    )  # fmt: skip
    with torch.no_grad():
        actual = conv_bn_act(x, weight, bias, *bn, **options)
    expected = eager(*double(x, weight, bias, *bn), **options)
    assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("x_kind", ["sliced", "expanded", "transposed", "offset"])
def test_views_are_read_right(x_kind: str) -> None:
    base = torch.randn(4, 40, 33, 33)
    x = {
        "sliced": base[::2, 4:36, 1:, 1:],
        "expanded": base[:1, :32, :32, :32].expand(3, 32, 32, 32),
        "transposed": base[:, :32, :32, :32].transpose(2, 3),
        "offset": base.flatten()[3 : 3 + 2 * 32 * 32 * 32].view(2, 32, 32, 32),
    }[x_kind]
    weight, bn = torch.randn(8, 32, 1, 1), bn_operands(8)
    with torch.no_grad():
        actual = conv_bn_act(x, weight, None, *bn)
        expected = eager(x, weight, None, *bn, activation="leaky_relu")
    exact = eager(*double(x, weight, None, *bn), activation="leaky_relu")
    assert_as_accurate(actual, expected, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slope", [0.1, 0.0, -0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("bn", [True, False], ids=["with batch norm", "without"])
def test_nan_and_infinity_propagate_as_in_pytorch(activation: str, slope: float, bad: float, bn: bool) -> None:
    x, weight = torch.randn(1, 32, 30, 30), torch.rand(16, 32, 1, 1) + 0.1
    x[0, 3, 4, 5] = bad
    norm = bn_operands(16) if bn else [None] * 4
    options = dict(activation=activation, negative_slope=slope)
    with torch.no_grad():
        actual = conv_bn_act(x, weight, None, *norm, **options)
        expected = eager(x, weight, None, *norm, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_mean_far_from_zero_keeps_its_digits_in_half_precision() -> None:
    """The shift is a hundred times the output: rounding it to bf16 would leave one digit."""
    x, weight = torch.randn(2, 64, 30, 30).bfloat16(), (torch.randn(16, 64, 1, 1) * 0.1).bfloat16()
    mean = F.conv2d(x.double(), weight.double()).mean((0, 2, 3)).float() + 30
    bias = torch.full((16,), 30.0).bfloat16()
    bn = [mean, torch.ones(16), torch.ones(16), torch.zeros(16)]
    with torch.no_grad():
        actual = conv_bn_act(x, weight, bias, *bn, activation="leaky_relu")
        expected = eager(x, weight, bias, *bn, activation="leaky_relu")
    assert_as_accurate(actual, expected, eager(*double(x, weight, bias, *bn), activation="leaky_relu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_and_statistics_are_pytorchs(activation: str, order: str, training: bool) -> None:
    tensors = [torch.randn(3, 8, 9, 9), torch.randn(6, 8, 3, 3), torch.randn(6), torch.rand(6) + 0.5, torch.randn(6),
               torch.randn(3, 6, 4, 4)]  # fmt: skip
    statistics = [torch.randn(6), torch.rand(6) + 0.5]
    results = []
    for function, dtype in ((conv_bn_act, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        x, weight, bias, gamma, beta, residual = leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        mean, var = (t.to(dtype, copy=True) for t in statistics)
        y = function(x, weight, bias, mean, var, gamma, beta, training=training, activation=activation, stride=2,
                     residual=residual, residual_order=order, momentum=0.3, eps=1e-3, negative_slope=-0.2)  # fmt: skip
        y = y * 1
        y.backward(torch.linspace(-1, 2, 4, dtype=dtype).expand_as(y))  # an expanded gradient
        results.append([y.detach(), mean, var, *(t.grad for t in leaves)])
    for i, (actual, expected, exact) in enumerate(zip(*results, strict=True)):
        if training and i == 5:  # of the convolution's bias, which batch statistics take away again: rounding alone
            assert actual.abs().max() < 1e-5 * results[2][4].abs().max()
        else:
            assert_as_accurate(actual, expected, exact)


def test_the_caller_may_change_the_output_in_place_before_backward() -> None:
    for activation in ("leaky_relu", "silu", "identity"):
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        y = conv_bn_act(x, torch.randn(4, 8, 1, 1), None, *bn_operands(4), activation=activation, negative_slope=-0.1)
        y.mul_(2).sum().backward()
        assert x.grad is not None


def test_double_backward_is_right() -> None:
    x, weight = torch.randn(2, 2, 3, 3).double().requires_grad_(), torch.randn(2, 2, 1, 1).double().requires_grad_()
    bn = [t.double() for t in bn_operands(2)]
    assert torch.autograd.gradgradcheck(lambda a, b: conv_bn_act(a, b, None, *bn, activation="silu"), (x, weight))
    assert torch.autograd.gradgradcheck(
        lambda a, b: conv_bn_act(a, b, None, None, None, *bn[2:], training=True, activation="silu"), (x, weight)
    )


ERRORS = {
    "channels that do not fit": (RuntimeError, lambda a: {"x": a["x"][:, :5]}),
    "a dtype mix": (RuntimeError, lambda a: {"x": a["x"].double()}),
    "a bias of another length": (RuntimeError, lambda a: {"bias": torch.zeros(3)}),
    "statistics of another length": (RuntimeError, lambda a: {"running_mean": torch.zeros(3)}),
    "statistics of one channel": (RuntimeError, lambda a: {"running_mean": torch.zeros(1)}),
    "a kernel larger than the plane": (RuntimeError, lambda a: {"weight": torch.zeros(8, 32, 41, 41)}),
    "stride zero": (RuntimeError, lambda a: {"stride": 0}),
    "negative padding": (RuntimeError, lambda a: {"padding": -1}),
    "groups that do not divide": (RuntimeError, lambda a: {"groups": 3}),
    "two-dimensional input": (RuntimeError, lambda a: {"x": a["x"][0, 0]}),
    "batch norm on an unbatched input": (RuntimeError, lambda a: {"x": a["x"][0]}),
    "a stride of three numbers": (RuntimeError, lambda a: {"stride": (1, 1, 1)}),
    "an unknown activation": (ValueError, lambda a: {"activation": "gelu"}),
    "an unknown residual order": (ValueError, lambda a: {"residual_order": "first"}),
    "a residual that does not broadcast": (RuntimeError, lambda a: {"residual": torch.zeros(3, 3, 3)}),
    "running_var alone missing": (RuntimeError, lambda a: {"running_var": None}),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_bad_input_raises_what_pytorch_raises(case: Any) -> None:
    kind, change = case
    arguments: dict[str, Any] = dict(
        zip(("running_mean", "running_var", "bn_weight", "bn_bias"), bn_operands(8), strict=True),
        x=torch.randn(2, 32, 40, 40), weight=torch.randn(8, 32, 1, 1), bias=torch.randn(8),
    )  # fmt: skip
    arguments |= change(arguments)
    with torch.no_grad(), pytest.raises(kind) as raised:
        conv_bn_act(**arguments)
    assert str(raised.value)
    names = ("x", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    options = {k: v for k, v in arguments.items() if k not in names}
    if "activation" not in options and "residual_order" not in options:
        with torch.no_grad(), pytest.raises(kind):
            eager(*(arguments[n] for n in names), activation="leaky_relu", **options)


def test_one_value_a_channel_cannot_be_normalised_in_training() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_bn_act(torch.randn(1, 4, 1, 1), torch.randn(4, 4, 1, 1), training=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch_gives_an_empty_result_and_leaves_statistics(training: bool) -> None:
    bn = bn_operands(4)
    before = [t.clone() for t in bn]
    y = conv_bn_act(torch.randn(0, 8, 6, 6), torch.randn(4, 8, 3, 3), None, *bn, training=training)
    assert y.shape == (0, 4, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(bn, before, strict=True))


@pytest.mark.parametrize("kind", ["autocast", "inference_mode", "vmap", "compile", "meta", "fake"])
def test_it_works_inside_pytorchs_modes(kind: str) -> None:
    x, weight, bn = torch.randn(2, 64, 20, 20), torch.randn(8, 64, 1, 1) * 0.1, bn_operands(8)
    options = dict(activation="leaky_relu", negative_slope=0.1)
    with torch.no_grad():
        exact = eager(*double(x, weight, None, *bn), **options)
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert_as_accurate(
                    conv_bn_act(x, weight, None, *bn, **options), eager(x, weight, None, *bn, **options), exact
                )
            return
        if kind == "inference_mode":
            with torch.inference_mode():
                y = conv_bn_act(x, weight, None, *bn, **options)
            y = y.clone()
        elif kind == "vmap":
            y = torch.func.vmap(lambda a: conv_bn_act(a[None], weight, None, *bn, **options)[0])(x)
        elif kind == "compile":
            compiled = torch.compile(conv_bn_act, fullgraph=True, backend="aot_eager")
            y = compiled(x, weight, None, *bn, **options)
        else:
            from torch._subclasses.fake_tensor import FakeTensorMode

            mode = FakeTensorMode() if kind == "fake" else torch.device("meta")
            convert = mode.from_tensor if kind == "fake" else (lambda t: t.to("meta"))
            tensors = [None if t is None else convert(t) for t in (x, weight, None, *bn)]
            with mode:
                y = conv_bn_act(*tensors, **options)
            assert y.shape == (2, 8, 20, 20)
            return
    assert_as_accurate(y, eager(x, weight, None, *bn, **options), exact)


def count_onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    original = aten.onednn_conv
    monkeypatch.setattr(aten, "onednn_conv", lambda *a: calls.append(a) or original(*a))
    return calls


def test_folding_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls = count_onednn_calls(monkeypatch)
    bn = bn_operands(16)
    with torch.no_grad():
        conv_bn_act(torch.randn(1, 8, 255, 256), torch.randn(16, 8, 1, 1), None, *bn)
        conv_bn_act(torch.randn(1, 4096, 16, 16), torch.randn(4096, 4096, 1, 1), None, *bn_operands(4096))
        conv_bn_act(torch.randn(1, 8, 40, 40), torch.randn(16, 8, 1, 1))
        assert len(calls) == 0
        conv_bn_act(torch.randn(1, 8, 256, 256), torch.randn(16, 8, 1, 1), None, *bn)
        conv_bn_act(torch.randn(1, 8, 80, 80), torch.randn(16, 8, 1, 1))
        assert len(calls) == 2


def test_min_input_is_where_folding_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for conv in (
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(64, 32, 3),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(512, 1024, 3),
        nn.Conv2d(64, 32, 3, stride=2),
    ):
        pixels = aten.min_input(conv, nn.BatchNorm2d(1)) // conv.in_channels

        def folds(pixels: int, conv: nn.Conv2d = conv) -> bool:
            x = torch.empty(1, conv.in_channels, 1, pixels, device="meta")
            return aten._worth_folding(x, conv.weight, conv.stride)  # type: ignore[arg-type]

        assert not folds(pixels - 1)
        assert folds(pixels + 4)


def test_the_fused_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare PyTorch with itself."""
    calls = count_onednn_calls(monkeypatch)
    x, weight, bn = torch.randn(2, 64, 26, 26), torch.randn(24, 64, 1, 1), bn_operands(24)
    with torch.no_grad():
        conv_bn_act(x, weight, None, *bn)
        assert len(calls) == 1
        conv_bn_act(x, weight, None, *bn, activation="relu")  # oneDNN's ReLU loses NaN
    conv_bn_act(x.requires_grad_(), weight, None, *bn)
    assert len(calls) == 1


def test_float16_falls_to_the_plain_composition_where_onednn_lacks_it() -> None:
    assert not aten.onednn_takes_dtype(torch.float16)
    assert aten.onednn_takes_dtype(torch.float32) == torch.backends.mkldnn.is_available()


def test_onednn_can_be_switched_off() -> None:
    x, weight, bn = torch.randn(2, 64, 26, 26), torch.randn(24, 64, 1, 1), bn_operands(24)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        actual = conv_bn_act(x, weight, None, *bn)
        expected = eager(x, weight, None, *bn, activation="leaky_relu")
    assert torch.equal(actual, expected)


def test_batch_norm_dtypes_follow_pytorch() -> None:
    """BN in fp32 over bf16 activations is PyTorch's mixed mode; bf16 BN over fp32 is its error."""
    x, weight, bn = torch.randn(2, 64, 26, 26), torch.randn(24, 64, 1, 1), [t.bfloat16() for t in bn_operands(24)]
    with torch.no_grad(), pytest.raises(RuntimeError):
        conv_bn_act(x, weight, None, *bn)
    with torch.no_grad():
        y = conv_bn_act(x.bfloat16(), weight.bfloat16(), None, *bn)
    assert y.dtype == torch.bfloat16


def test_eps_that_pytorch_refuses_is_refused() -> None:
    bn = nn.BatchNorm2d(24, eps=-1.0).eval()
    x, weight = torch.randn(2, 64, 26, 26), torch.randn(24, 64, 1, 1)
    arguments = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    with torch.no_grad():
        try:
            expected = eager(x, weight, None, *arguments, activation="identity", eps=-1.0)
        except Exception as error:
            with pytest.raises(type(error)):
                conv_bn_act(x, weight, None, *arguments, activation="identity", eps=-1.0)
        else:
            actual = conv_bn_act(x, weight, None, *arguments, activation="identity", eps=-1.0)
            assert torch.equal(actual, expected) or (actual.isnan() == expected.isnan()).all()
