"""``ConvBNAct2d`` behaves as a ``Sequential`` of its three children would."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from pointfuse import ConvBNAct2d
from pointfuse.folded import FoldedBatchNorm2d, FoldedConv2d
from pointfuse.problem import ACTIVATIONS, Activation
from torch import Tensor, nn
from yardstick import assert_as_accurate


def make_unit(**options: Any) -> ConvBNAct2d:
    """A unit with BN statistics and parameters away from their initial values, in evaluation mode."""
    unit = ConvBNAct2d(32, 16, 3, padding=1, **{"negative_slope": 0.1, **options})
    randomise(unit)
    return unit.eval()


def randomise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.running_mean, -1), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -1)):
                if t is not None:
                    nn.init.uniform_(t, low, low + 1.5)


def sequential(unit: ConvBNAct2d) -> nn.Sequential:
    children = OrderedDict((n, m) for n, m in zip(("conv", "bn", "act"), unit.to_modules(), strict=True) if m)
    return nn.Sequential(children).train(unit.training)


X = (2, 32, 30, 30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_evaluation_is_as_accurate_as_the_sequential(activation: str, grad: bool) -> None:
    unit, x = make_unit(activation=activation), torch.randn(X)
    exact = copy.deepcopy(sequential(unit)).double()(x.double())
    with torch.set_grad_enabled(grad):
        assert_as_accurate(unit(x).detach(), sequential(unit)(x).detach(), exact.detach())


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum 0.1", "cumulative average"])
@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
def test_training_is_the_sequential(momentum: float | None, track: bool) -> None:
    unit = make_unit(momentum=momentum, track_running_stats=track).double().train()
    twin = copy.deepcopy(sequential(unit))
    for _ in range(3):
        x = torch.randn(X).double()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = unit(a), twin(b)
        (ya * ya).sum().backward()
        (yb * yb).sum().backward()
        torch.testing.assert_close(ya, yb, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    for (name, p), (_, q) in zip(unit.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, p), (_, q) in zip(unit.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)


def test_keys_and_repr_are_the_sequentials() -> None:
    unit = make_unit()
    twin = sequential(unit)
    assert list(unit.state_dict()) == list(twin.state_dict())
    assert repr(unit).split("\n")[1:] == repr(twin).split("\n")[1:]
    twin.load_state_dict(unit.state_dict(), strict=True)
    assert "residual_order='act_add'" in repr(make_unit(residual_order="act_add"))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_it_copies_after_a_forward(way: str) -> None:
    unit, x = make_unit(), torch.randn(X)
    with torch.no_grad():
        y = unit(x)
    if way == "deepcopy":
        twin = copy.deepcopy(unit)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(unit))
    else:
        buffer = io.BytesIO()
        torch.save(unit.state_dict(), buffer)
        buffer.seek(0)
        twin = make_unit()
        twin.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin(x), y)


@pytest.mark.parametrize("change", ["optimiser step", "load_state_dict", ".data", "eval after train", "double"])
def test_nothing_is_ever_stale(change: str) -> None:
    unit, x = make_unit(), torch.randn(X)
    with torch.no_grad():
        unit(x)
    if change == "optimiser step":
        optimiser = torch.optim.SGD(unit.parameters(), lr=0.5)
        unit(x).square().mean().backward()
        optimiser.step()
    elif change == "load_state_dict":
        unit.load_state_dict({k: v * 2 for k, v in unit.state_dict().items()})
    elif change == ".data":
        for p in unit.parameters():
            p.data = p.data * 0.5
    elif change == "eval after train":
        unit.train()(x)
        unit.eval()
    else:
        unit, x = unit.double(), x.double()
    with torch.no_grad():
        torch.testing.assert_close(unit(x), sequential(unit)(x), rtol=1e-5, atol=1e-5)


def test_hooks_on_children_run_and_may_change_values() -> None:
    unit, x = make_unit(), torch.randn(X)
    seen = []
    unit.bn.register_forward_hook(lambda m, a, out: seen.append("bn") or out + 1)
    unit.conv.register_forward_pre_hook(lambda m, a: seen.append("conv"))
    unit.act.register_forward_hook(lambda m, a, out: seen.append("act"))
    with torch.no_grad():
        y = unit(x)
        assert seen == ["conv", "bn", "act"]
        assert torch.equal(y, sequential(unit)(x))


def test_hooks_on_every_module_run() -> None:
    unit, seen = make_unit(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(type(m).__name__))
    try:
        with torch.no_grad():
            unit(torch.randn(X))
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "LeakyReLU", "ConvBNAct2d"]


def test_parametrised_weights_are_read_live() -> None:
    unit, x = make_unit(), torch.randn(X)
    nn.utils.parametrizations.weight_norm(unit.conv)
    with torch.no_grad():
        unit.conv.parametrizations.weight.original0.mul_(3)
        torch.testing.assert_close(unit(x), sequential(unit)(x), rtol=1e-5, atol=1e-5)


def test_statistics_that_are_plain_attributes_are_read() -> None:
    unit, x = make_unit(), torch.randn(X)
    assert unit.bn is not None
    for name, value in (
        ("running_mean", torch.randn(unit.bn.num_features)),
        ("running_var", torch.rand(unit.bn.num_features) + 0.5),
    ):
        delattr(unit.bn, name)
        setattr(unit.bn, name, value)
    with torch.no_grad():
        torch.testing.assert_close(unit(x), sequential(unit)(x))


@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_residual(order: str, grad: bool) -> None:
    unit, x, residual = make_unit(residual_order=order, activation="silu"), torch.randn(X), torch.randn(2, 16, 30, 30)
    with torch.set_grad_enabled(grad):
        z = unit.bn(unit.conv(x))
        expected = unit.act(z + residual) if order == "add_act" else unit.act(z) + residual
        torch.testing.assert_close(unit(x, residual), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unit(x, residual[:, :1]).shape, expected.shape)


def test_from_modules_shares_and_to_modules_gives_back() -> None:
    conv, bn, act = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()
    unit = ConvBNAct2d.from_modules(conv, bn, act)
    assert unit.to_modules() == (conv, bn, act)
    assert unit.conv.weight is conv.weight
    assert unit.training
    plain = ConvBNAct2d.from_modules(conv)
    assert [n for n, _ in plain.named_children()] == ["conv"]
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(plain(x), conv(x))
        assert torch.equal(ConvBNAct2d.from_modules(conv, None, act)(x), act(conv(x)))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((nn.Linear(2, 2),), TypeError, "conv is a Linear; it must be an nn.Conv2d"),
        ((nn.Conv2d(2, 2, 1), nn.BatchNorm1d(2)), TypeError, "bn is a BatchNorm1d"),
        ((nn.Conv2d(2, 2, 1), None, nn.GELU()), TypeError, "act is a GELU; it must be one of nn.LeakyReLU"),
        ((nn.Conv2d(2, 2, 1), nn.BatchNorm2d(3)), ValueError, "bn normalises 3 channels, but conv puts out 2"),
        ((nn.Conv2d(2, 2, 1), None, None, "first"), ValueError, "residual_order is 'first'"),
    ],
)
def test_from_modules_refuses_what_it_cannot_hold(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ConvBNAct2d.from_modules(*arguments)


def test_constructor_names_a_wrong_activation() -> None:
    with pytest.raises(ValueError, match="'gelu'; it must be one of 'leaky_relu'"):
        ConvBNAct2d(2, 2, 1, activation="gelu")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("shape", [(32, 30, 30), (1, 1, 32, 30, 30), (2, 31, 30, 30)], ids=str)
def test_wrong_shapes_raise_pytorchs_errors(shape: tuple[int, ...], grad: bool) -> None:
    unit = make_unit()
    with torch.set_grad_enabled(grad):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            sequential(unit)(torch.randn(shape))
        with pytest.raises(type(expected.value)) as actual:
            unit(torch.randn(shape))
    assert str(actual.value) == str(expected.value)


def test_statistics_flipped_off_after_construction_follow_pytorch() -> None:
    unit, x = make_unit(), torch.randn(X)
    unit.bn.track_running_stats = False
    with torch.no_grad():
        torch.testing.assert_close(unit(x), sequential(unit)(x), rtol=1e-5, atol=1e-5)
    unit.bn.running_mean = unit.bn.running_var = None
    with torch.no_grad():
        assert torch.equal(unit(x), sequential(unit)(x))


def test_frozen_parameters_get_no_gradient() -> None:
    unit = make_unit().train()
    unit.conv.weight.requires_grad_(False)
    unit(torch.randn(X)).sum().backward()
    assert unit.conv.weight.grad is None
    assert unit.bn.weight.grad is not None


def test_a_forward_under_inference_mode_does_not_spoil_a_later_backward() -> None:
    unit, x = make_unit(), torch.randn(X)
    with torch.inference_mode():
        unit(x)
    unit(x).sum().backward()
    assert unit.conv.weight.grad is not None


def test_autocast_is_pytorchs() -> None:
    unit, x = make_unit(), torch.randn(X)
    exact = copy.deepcopy(sequential(unit)).double()(x.double()).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_as_accurate(unit(x), sequential(unit)(x), exact)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_makes_one_graph(training: bool) -> None:
    unit, x = make_unit().train(training), torch.randn(X)
    twin = copy.deepcopy(sequential(unit))
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        y = torch.compile(unit, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, twin(x), rtol=1e-5, atol=1e-5)


def folded(has_bn: bool = False, **options: Any) -> FoldedConv2d:
    return FoldedConv2d(nn.Conv2d(32, 16, 1), torch.randn(16, 32, 1, 1), torch.randn(16), has_bn, **options)


def quietly(f: Any, *args: Any) -> Tensor:
    with torch.no_grad():
        return f(*args)


def test_a_folded_convolution_packs_at_its_first_call_and_says_so() -> None:
    conv = folded()
    assert "packed=False" in repr(conv)
    dense = conv.dense_weight().clone()
    y = quietly(conv, torch.randn(2, 32, 30, 30))
    assert "packed=True" in repr(conv)
    assert "32, 16, kernel_size=(1, 1)" in repr(conv)
    assert torch.equal(conv.dense_weight(), dense)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_its_weight_can_be_read_only_where_nothing_is_folded_in() -> None:
    conv = folded()
    assert torch.equal(conv.weight, conv.dense_weight())
    assert torch.equal(conv.bias, conv.folded_bias)
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match=f"this convolution's {name} is folded together with its batch norm"):
            getattr(folded(has_bn=True), name)
    assert FoldedBatchNorm2d()(1) == 1


def test_a_folded_convolution_loads_a_state_dict_of_its_own() -> None:
    first, second, x = folded(), folded(), torch.randn(2, 32, 30, 30)
    y = quietly(first, x)
    quietly(second, x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(quietly(second, x), y)


def test_a_folded_convolution_answers_inputs_it_is_not_packed_for() -> None:
    conv, x = folded(), torch.randn(2, 32, 30, 30)
    quietly(conv, x)
    weight, bias = conv.dense_weight(), conv.folded_bias
    for other in (torch.randn(5, 32, 7, 9), torch.randn(32, 8, 8), torch.randn(0, 32, 4, 4)):
        expected = nn.functional.leaky_relu(nn.functional.conv2d(other, weight, bias), 0.1)
        actual = quietly(conv.run, other, Activation("leaky_relu", 0.1))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for wrong in (torch.randn(2, 31, 30, 30), torch.randn(2, 32, 30, 30).double()):
        with pytest.raises(RuntimeError):
            quietly(conv, wrong)
