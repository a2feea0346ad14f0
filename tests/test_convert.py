"""A converted model answers as the model it was made from, in every mode, and stays the model it was."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import random
import warnings
import weakref
from typing import Any

import pointfuse
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models_for_tests import (
    BiasFreeBN,
    Bottleneck,
    ConvBNAct,
    DarknetBlock,
    DefinedBackwards,
    Forward,
    FrozenBatchNorm2d,
    ListOrTensor,
    Loop,
    LoudConv,
    OptionalMask,
    PreActivation,
    TwoInputs,
    assert_trains_like,
    functional_unit,
    gap,
    images,
    trained,
    unit,
)
from models_for_tests import one_thread as one_thread
from pointfuse.convert import hosts
from pointfuse.modules import units_not_small
from torch import Tensor, nn
from torch.nn import functional as F

# Ten roundings of fp32; a wrong unit is off by whole digits.
CLOSE = 2e-6


def big(act: nn.Module | None = None, bn: nn.Module | None = None) -> nn.Sequential:
    """A unit large enough, on ``images(2, 8, 48, 48)``, that the CPU folds its batch norm on every call."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), bn or nn.BatchNorm2d(8), act or nn.LeakyReLU(0.1))


def large() -> Tensor:
    return images(2, 8, 48, 48)


@torch.no_grad()
def assert_infers_like(converted: nn.Module, eager: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Assert the same outputs in evaluation mode, and the same module modes, strides and container types."""
    converted.eval()
    eager.eval()
    expected = eager(*copy.deepcopy(inputs), **kwargs)
    actual = converted(*copy.deepcopy(inputs), **kwargs)
    assert type(actual) is type(expected)
    assert gap(actual, expected) <= CLOSE
    if isinstance(expected, Tensor):
        assert actual.stride() == expected.stride()


def assert_same(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """Convert a copy of a model and assert that it infers and trains as the model does."""
    trained(model)
    converted = pointfuse.convert(copy.deepcopy(model), **options)
    assert_infers_like(converted, model, *inputs)
    assert_trains_like(converted, model, *inputs)
    assert_infers_like(converted, model, *inputs)
    return converted


def in_place_identity(self: Any, x: Tensor) -> Tensor:
    identity = x * 1
    identity += self.bn(self.conv(x))
    return self.act(identity)


def written_between(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x * 1)
    x = x * 1
    z = self.bn(y)
    x.add_(1)
    return self.act(z + x)


def relu_on_the_input(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.bn(self.conv(x))
    x = F.relu_(x)
    return self.act(y + x)


def write_through_a_view(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv(x)
    x[:, 0].mul_(3)
    return self.act(self.bn(y) + x)


def write_through_a_slice_assignment(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv(x)
    x[:, 0] = 3
    return self.act(self.bn(y) + x)


def write_by_out_argument(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv(x.detach())
    torch.add(x.detach(), 5, out=x.detach())
    return self.act(self.bn(y))


def sum_in_place_through_another_name(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(self.conv(x))
    z = y
    z += x
    return self.act(y), z


def batch_norm_twice(self: Any, x: Tensor) -> Tensor:
    first = self.bn(self.conv(x))
    second = self.bn(self.other(x))
    return self.act(second) - self.act(first)


def weight_read_elsewhere(self: Any, x: Tensor) -> Tensor:
    return F.conv_transpose2d(self.unit(x), self.conv.weight)


HOSTS = [
    pytest.param(Bottleneck(), id="bottleneck"),
    pytest.param(Bottleneck(downsample=nn.Sequential(*unit()[:2])), id="bottleneck with downsampling"),
    pytest.param(DarknetBlock(), id="darknet block"),
    pytest.param(DefinedBackwards(), id="defined backwards"),
    pytest.param(PreActivation(), id="pre-activation"),
    pytest.param(Loop(), id="loop over lists"),
    pytest.param(ConvBNAct(act=nn.ReLU(inplace=True)), id="activation in place"),
    pytest.param(ConvBNAct(act=nn.Tanh()), id="unknown activation"),
    pytest.param(ConvBNAct(act=nn.Identity()), id="no activation"),
    pytest.param(ConvBNAct(act=nn.Hardtanh(0, 6)), id="base class of a known activation"),
    pytest.param(Forward(functional_unit), id="functional batch norm"),
    pytest.param(Forward(in_place_identity), id="in place on the residual"),
    pytest.param(Forward(written_between), id="residual written before the sum"),
    pytest.param(Forward(relu_on_the_input), id="input overwritten before the sum"),
    pytest.param(Forward(write_through_a_view), id="input overwritten through a view"),
    pytest.param(Forward(write_through_a_slice_assignment), id="input overwritten by slice assignment"),
    pytest.param(Forward(write_by_out_argument), id="input overwritten by an out argument"),
    pytest.param(Forward(sum_in_place_through_another_name), id="in-place sum seen through another name"),
    pytest.param(Forward(batch_norm_twice, other=nn.Conv2d(4, 4, 1)), id="batch norm used twice in another order"),
    pytest.param(Forward(lambda s, x: s.bn(s.conv(x)) + s.bn(x)), id="batch norm used alone too"),
    pytest.param(Forward(lambda s, x: s.conv(s.unit(x))), id="convolution used alone too"),
    pytest.param(Forward(lambda s, x: s.unit(s.unit(x))), id="unit used twice"),
    pytest.param(Forward(lambda s, x: (lambda y: s.bn(y) * y)(s.conv(x))), id="result used twice"),
    pytest.param(Forward(lambda s, x: (lambda z: s.act(z) * z)(s.bn(s.conv(x)))), id="batch norm's result used twice"),
    pytest.param(Forward(lambda s, x: (lambda z: s.act(z + z))(s.bn(s.conv(x)))), id="added to itself"),
    pytest.param(Forward(lambda s, x: s.act(torch.add(s.bn(s.conv(x)), x, alpha=2))), id="sum with alpha"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + 1.5)), id="sum with a number"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x.shape[0])), id="sum with a size"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x.double())), id="float64 residual"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x.bool())), id="bool residual"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x[:, :1])), id="one-channel residual"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x[None])), id="five-dimensional residual"),
    pytest.param(Forward(lambda s, x: s.unit(x) + s.bn.bias.reshape(1, -1, 1, 1)), id="parameter as residual"),
    pytest.param(Forward(lambda s, x: torch.cat([s.unit(x), s.unit(x), x], 1)), id="concatenated"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(input=x)))), id="keyword call"),
    pytest.param(Forward(lambda s, x: x - 1 if s.training else s.unit(x)), id="branch on training"),
    pytest.param(Forward(lambda s, x: s.unit(F.dropout(x, 0.5, s.training))), id="functional dropout"),
    pytest.param(Forward(lambda s, x: s.unit(x + torch.rand_like(x)) * 0 + s.conv(x)), id="random numbers"),
    pytest.param(Forward(weight_read_elsewhere), id="weight read elsewhere"),
    pytest.param(Forward(lambda s, x: {"a": s.unit(x), "b": [x, None]}), id="dict output"),
    pytest.param(Forward(lambda s, x: collections.OrderedDict(a=s.unit(x))), id="OrderedDict output"),
    pytest.param(Forward(lambda s, x: (s.unit(x), "name", 3)), id="mixed tuple output"),
    pytest.param(nn.Sequential(*unit(), *unit(act=nn.SiLU())), id="sequential"),
    pytest.param(nn.Sequential(nn.Sequential(*unit()), nn.Sequential(nn.MaxPool2d(2), *unit())), id="nested"),
    pytest.param(nn.Sequential(*unit(), nn.Dropout(0.5), *unit(), nn.Identity(), nn.ReLU()), id="with dropout"),
    pytest.param(nn.Sequential(LoudConv(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), id="own forward"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.ReLU()), id="frozen batch norm"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), *unit()[1:]), id="reflect"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU6()), id="not affine"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), BiasFreeBN(4), nn.ReLU()), id="batch norm without bias"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, 1e-3, 0.03), nn.ReLU()), id="eps and momentum"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU()), id="momentum None"),
    pytest.param(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()), id="no statistics"
    ),
    pytest.param(nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, 1, 2), nn.BatchNorm2d(8), nn.LeakyReLU(0)), id="groups"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 5, padding="same", dilation=2), *unit()[1:]), id="padding same"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LeakyReLU(-0.5)), id="no batch norm, negative slope"),
    pytest.param(nn.Sequential(pointfuse.ConvBNAct2d(4, 4, 3), pointfuse.ConvBNAct2d(4, 2, 1)), id="units already"),
    pytest.param(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), *unit()[1:]),
                 id="weight_norm"),
    pytest.param(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), *unit()[1:]),
                 id="spectral_norm"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:pointfuse.convert found no unit")
@pytest.mark.parametrize("model", HOSTS)
def test_a_converted_model_infers_and_trains_as_it_did(model: nn.Module) -> None:
    assert_same(copy.deepcopy(model), images())


@pytest.mark.filterwarnings("ignore:pointfuse.convert found no unit")
@pytest.mark.parametrize("model", HOSTS)
def test_a_model_converted_with_example_inputs_infers_and_trains_as_it_did(model: nn.Module) -> None:
    assert_same(copy.deepcopy(model), images(), example_inputs=images())


@pytest.mark.parametrize("old", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore")
def test_old_style_reparametrization_is_left_alone(old: Any) -> None:
    model = trained(nn.Sequential(old(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), *unit())).eval()
    converted = pointfuse.convert(model)
    assert_infers_like(converted, model, images())


@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.1), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.3), nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Identity()],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_units_large_enough_to_fold_on_the_fly_answer_as_pytorch_does(
    act: nn.Module, memory_format: torch.memory_format
) -> None:
    model = trained(big(act)).to(memory_format=memory_format)
    x = large().contiguous(memory_format=memory_format)
    x[0, :, 3, 3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0, 1, 1, 1, 1])
    with torch.no_grad():
        expected, actual = model.eval()(x), pointfuse.convert(model)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "sequence"])
def test_calls_too_small_to_gain_are_not_asked_about_twice(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the module's own forward; any other call is looked at."""
    monkeypatch.undo()
    model = trained(ConvBNAct() if traced else nn.Sequential(*unit()))
    converted = pointfuse.convert(model).eval()
    asked = []
    monkeypatch.setattr(hosts, "run_sequence", lambda *a, run=hosts.run_sequence: asked.append(1) or run(*a))
    monkeypatch.setattr(hosts.Trace, "current", lambda t, run=hosts.Trace.current: asked.append(1) or run(t))

    def calls(x: Tensor) -> int:
        before = len(asked)
        assert gap(converted(x), model.train(converted.training)(x)) <= 1e-5
        return len(asked) - before

    small, large = images(), images(2, 4, 512, 520)
    with torch.no_grad():
        assert [calls(small), calls(small), calls(small)] == [1, 0, 0]
        assert [calls(large), calls(large)] == [1, 1]
        assert calls(small) == 0
        assert [calls(small.double().float()[:1]), calls(small[:1])] == [1, 0]
    converted.train()
    assert [calls(small), calls(small)] == [1, 0]
    # The input alone is kept, whatever the size.
    pointfuse.convert(converted, inplace=True, recompute=True)
    assert [calls(small), calls(small)] == [1, 1]


def test_a_call_that_hooks_kept_from_fusing_is_asked_about_again() -> None:
    model = trained(ConvBNAct()).eval()
    converted = pointfuse.convert(model)

    def fused() -> int:
        before = units_not_small()
        with torch.no_grad():
            converted(images())
        return units_not_small() - before

    assert fused() == 1
    pointfuse.plan(converted, images())  # watches convolutions by hooks
    assert fused() == 1


@pytest.mark.parametrize(
    "cut", [slice(0, 1), slice(1, None), slice(0, 2), slice(2, 5), slice(3, 7), slice(0, 0)], ids=str
)
def test_slices_that_cut_units_apart_run(cut: slice) -> None:
    model = trained(nn.Sequential(*unit(), *unit(), nn.ReLU())).eval()
    converted = pointfuse.convert(model)
    assert len(converted[cut]) == len(model[cut])
    assert_infers_like(converted[cut], model[cut], images())


def test_children_can_be_indexed_and_iterated_over() -> None:
    model = trained(nn.Sequential(*unit(), *unit())).eval()
    converted = pointfuse.convert(model)
    assert type(converted[0]) is nn.Conv2d
    x = y = images()
    for ours, theirs in zip(converted, model, strict=True):
        x, y = ours(x), theirs(y)
        assert torch.equal(x, y)


def test_a_write_to_the_callers_tensor_still_reaches_it() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        x += self.bn(self.conv(x))
        return self.act(x)

    model = trained(Forward(body)).eval()
    seen = []
    for m in (model, pointfuse.convert(model)):
        x = images()
        with torch.no_grad():
            m(x)
        seen.append(x)
    assert gap(seen[1], seen[0]) <= CLOSE


def test_slices_in_a_traced_forward_are_followed() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Sequential(nn.Sequential(*unit()), nn.Sequential(*unit()), nn.Conv2d(4, 4, 1))
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            branch = self.stack[:1](x)
            return self.stack[1:](branch) + self.conv(branch)

    assert_same(Sliced(), images())


def test_calls_outside_what_was_traced_run_as_they_did() -> None:
    model = trained(OptionalMask())
    converted = pointfuse.convert(copy.deepcopy(model))
    x, mask = images(), images(2, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_infers_like(converted, model, x)
        assert_infers_like(converted, model, x=x)
        assert_infers_like(converted, model, x, mask)
        assert_infers_like(converted, model, x, None)
        assert_infers_like(converted, model, x, scale=2.0)
        assert_infers_like(converted, model, x, mask, 3.0)


def test_arguments_by_keyword_go_to_their_parameters() -> None:
    model = trained(TwoInputs())
    converted = pointfuse.convert(copy.deepcopy(model))
    x, other = images(), images(seed=5)
    assert_infers_like(converted, model, other=other, x=x)
    assert_infers_like(converted, model, x, other=other)
    for ours in (model, converted):
        with pytest.raises(TypeError):
            ours(x)
        with pytest.raises(TypeError):
            ours(x, wrong=other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("example", [None, "a list", "a tensor"])
def test_a_forward_that_takes_a_list_or_a_tensor_takes_both(example: str | None) -> None:
    model = trained(ListOrTensor())
    inputs = {"a list": ([images(2, 2, 8, 8), images(2, 2, 8, 8)],), "a tensor": (images(),), None: None}
    converted = pointfuse.convert(copy.deepcopy(model), example_inputs=inputs[example])
    assert_infers_like(converted, model, images())
    assert_infers_like(converted, model, [images(2, 1, 8, 8), images(2, 3, 8, 8)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_branches_on_shapes_are_checked_on_every_call() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x[None]
        if x.shape[3] % 2:
            x = F.pad(x, (0, 1))
        return self.unit(x)

    model = trained(Forward(body))
    converted = pointfuse.convert(copy.deepcopy(model), images())
    for shape in ((2, 4, 8, 8), (2, 4, 8, 7), (4, 8, 8), (1, 4, 3, 3)):
        assert_infers_like(converted, model, images(*shape))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda s, x: s.unit(x) * 2 if type(x) is Tensor else s.unit(x), id="type() of the input"),
        pytest.param(lambda s, x: s.unit(x) * 2 if torch.is_grad_enabled() else s.unit(x), id="grad mode"),
        pytest.param(lambda s, x: s.unit(x) * 2 if torch.is_autocast_enabled("cpu") else s.unit(x), id="autocast"),
        pytest.param(lambda s, x: s.unit(x) * 2 if isinstance(x, Tensor) else s.unit(x), id="isinstance"),
        pytest.param(lambda s, x: s.unit(x) * 2 if x.requires_grad else s.unit(x), id="requires_grad"),
        pytest.param(lambda s, x: s.unit(x) * 2 if x.is_contiguous() else s.unit(x), id="contiguity"),
        pytest.param(lambda s, x: s.unit(x) * 2 if x.device.type == "cpu" else s.unit(x), id="device"),
        pytest.param(lambda s, x: s.unit(x) * 2 if hasattr(x, "shape") else s.unit(x), id="hasattr"),
        pytest.param(lambda s, x: s.unit(x) * 2 if x is not None else s.unit(x), id="None check"),
        pytest.param(lambda s, x: s.unit(x) * 2 if torch.is_tensor(x) else s.unit(x), id="is_tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_branch_in_forward_goes_the_way_it_went(body: Any) -> None:
    model = trained(Forward(body)).eval()
    converted = pointfuse.convert(copy.deepcopy(model), images())
    assert_infers_like(converted, model, images())
    x = images().requires_grad_()
    assert gap(converted(x), model(x)) <= CLOSE
    strided = images().transpose(2, 3)
    assert gap(converted(strided), model(strided)) <= CLOSE


def test_a_branch_on_a_childs_mode_follows_the_child() -> None:
    model = trained(Forward(lambda s, x: s.unit(x) * 2 if s.bn.training else s.unit(x)))
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        m.train()
        m.bn.eval()
    assert gap(converted(images()), model(images())) < 1e-6


def test_drawing_from_pythons_generator_goes_on() -> None:
    model = Forward(lambda s, x: x if random.random() < 0.5 else s.unit(x)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = pointfuse.convert(model)
    random.seed(0)
    assert {torch.equal(converted(images()), images()) for _ in range(20)} == {True, False}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_are_cut_where_forward_cuts_them() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.unit(x)

    class Decorated(ConvBNAct):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.unit(x)

    for model in (Forward(body), Decorated()):
        assert not pointfuse.convert(model)(images()).requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_autocast_inside_forward_stays() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.unit(x)

    assert pointfuse.convert(Forward(body))(images()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_forward_appends_to_a_list_is_appended_on_every_call() -> None:
    model = Forward(lambda s, x: s.seen.append(s.unit(x)) or s.seen[-1], seen=[])
    converted = pointfuse.convert(model)
    converted(images())
    converted(images())
    assert [type(t) for t in converted.seen] == [Tensor, Tensor]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda s, x: s.act(s.bn(s.conv(x)) + x), id="sum"),
        pytest.param(lambda s, x: s.act(s.bn(s.conv(x)).add_(x)), id="sum in place"),
        pytest.param(lambda s, x: s.unit(x).add_(x), id="activation, then sum in place"),
    ],
)
def test_under_autocast_dtypes_are_pytorchs(body: Any) -> None:
    model = trained(Forward(body)).eval()
    converted = pointfuse.convert(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert converted(images()).dtype == model(images()).dtype


def test_an_in_place_sum_that_cannot_broadcast_raises_pytorchs_error() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = unit(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y += x
            return self.act(y)

    model = Narrow().eval()
    with torch.no_grad():
        for m in (model, pointfuse.convert(model)):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                m(images())


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([images()], id="a list"),
        pytest.param(None, id="None"),
        pytest.param(images().double(), id="float64"),
        pytest.param(images().long(), id="integers"),
        pytest.param(images(2, 3, 8, 8), id="three channels"),
        pytest.param(images(4), id="one dimension"),
        pytest.param(images(2, 4, 1, 1), id="a plane smaller than the kernel"),
    ],
)
def test_bad_input_raises_the_error_that_pytorch_raises(bad: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), *unit()[1:]).eval()
    with torch.no_grad():
        with pytest.raises(Exception) as expected:  # noqa: PT011
            model(bad)
        with pytest.raises(expected.type) as actual:
            pointfuse.convert(model)(bad)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_one_value_a_channel_in_training_raises_pytorchs_error() -> None:
    converted = pointfuse.convert(nn.Sequential(nn.Conv2d(4, 4, 1), *unit()[1:]))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        converted(images(1, 4, 1, 1))


def test_converting_copies_no_tensor() -> None:
    model = nn.Sequential(Bottleneck(), *unit())
    converted = pointfuse.convert(model)
    assert converted is not model
    assert type(model[0]) is Bottleneck
    pairs = zip([*model.parameters(), *model.buffers()], [*converted.parameters(), *converted.buffers()], strict=True)
    assert all(a is b for a, b in pairs)


def test_a_converted_model_keeps_identity_classes_names_and_state() -> None:
    model = nn.Sequential(Bottleneck(), *unit())
    state = model.state_dict()
    names = dict(model.named_modules())
    converted = pointfuse.convert(model, inplace=True)
    assert converted is model
    assert dict(model.named_modules()) == names
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], Bottleneck)
    assert repr(model) == repr(nn.Sequential(Bottleneck(), *unit()))
    assert list(model.state_dict()) == list(state)
    plain = nn.Sequential(Bottleneck(), *unit())
    assert str(plain.load_state_dict(model.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert str(model.load_state_dict(plain.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert_infers_like(model, plain, images())


def test_converting_twice_changes_nothing_and_reverting_gives_the_classes_back() -> None:
    model = nn.Sequential(Bottleneck(), DarknetBlock(), *unit(), nn.Sequential(*unit()))
    classes = [type(m) for m in model.modules()]
    once = pointfuse.convert(model)
    twice = pointfuse.convert(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert pointfuse.plan(once) == pointfuse.plan(model)
    assert_infers_like(twice, model, images())
    reverted = pointfuse.revert(twice)
    assert [type(m) for m in reverted.modules()] == classes
    assert [vars(m).keys() for m in reverted.modules()] == [vars(m).keys() for m in model.modules()]
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert pointfuse.revert(twice, inplace=True) is twice
    assert [type(m) for m in twice.modules()] == classes


def test_reverting_gives_sequentials_for_units_and_keeps_their_hooks() -> None:
    model = trained(nn.Sequential(pointfuse.ConvBNAct2d(4, 4, 3), pointfuse.ConvBNAct2d(4, 4, 3)))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *a: seen.append(1))
    reverted = pointfuse.revert(model)
    assert [type(m) for m in reverted] == [nn.Sequential, nn.Sequential]
    assert list(reverted.state_dict()) == list(model.state_dict())
    assert_infers_like(reverted, model, images())
    assert len(seen) == 2


def test_a_model_without_units_warns() -> None:
    with pytest.warns(UserWarning, match="found no unit"):
        pointfuse.convert(nn.Sequential(nn.Conv2d(4, 4, 1)))


def test_a_class_registry_keeps_the_users_class() -> None:
    registry: dict[str, type] = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            registry[cls.__name__] = cls

    class Block(Registered):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = unit()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

    pointfuse.convert(Block())
    assert registry["Block"] is Block


STATE_CHANGES = {
    "other weights loaded": lambda m: m.load_state_dict(
        trained(copy.deepcopy(pointfuse.revert(m)), seed=9).state_dict()
    ),
    "an average written to data": lambda m: [p.data.mul_(0.5) for p in m.parameters()],
    "statistics reset": lambda m: [b.reset_running_stats() for b in m.modules() if isinstance(b, nn.BatchNorm2d)],
    "eps changed": lambda m: [setattr(b, "eps", 0.1) for b in m.modules() if isinstance(b, nn.BatchNorm2d)],
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "slope changed": lambda m: [setattr(a, "negative_slope", 0.7) for a in m.modules() if isinstance(a, nn.LeakyReLU)],
    "statistics no longer tracked": lambda m: [
        setattr(b, "track_running_stats", False) for b in m.modules() if isinstance(b, nn.BatchNorm2d)
    ],
    "statistics removed": lambda m: [
        (setattr(b, "running_mean", None), setattr(b, "running_var", None))
        for b in m.modules()
        if isinstance(b, nn.BatchNorm2d)
    ],
    "batch norm in training mode": lambda m: [b.train() for b in m.modules() if isinstance(b, nn.BatchNorm2d)],
    "dilation and padding changed": lambda m: [
        (setattr(c, "padding", (2, 2)), setattr(c, "dilation", (2, 2)))
        for c in m.modules()
        if isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3)
    ],
    "SyncBatchNorm": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
    "a step of an optimiser": lambda m: _step(m),
}


def _step(model: nn.Module) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    dtype = next(model.parameters()).dtype
    c_in = next(c for c in model.modules() if isinstance(c, nn.Conv2d)).in_channels
    model(images(2, c_in, 8, 8, dtype=dtype)).pow(2).mean().backward()
    optimiser.step()
    model.eval()


@pytest.mark.parametrize("change", STATE_CHANGES)
@pytest.mark.parametrize("kind", ["sequential", "traced"])
def test_nothing_is_stale_after(change: str, kind: str) -> None:
    if kind == "sequential":
        model: nn.Module = nn.Sequential(*big(), *big())
        x = large()
    else:
        model, x = nn.Sequential(Bottleneck(), ConvBNAct()), images(2, 4, 80, 80)
    trained(model).eval()
    converted = pointfuse.convert(copy.deepcopy(model))
    with torch.no_grad():
        converted(x)
    for m in (model, converted):
        STATE_CHANGES[change](m)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        expected, actual = model(x.to(dtype)), converted(x.to(dtype))
    assert actual.dtype == expected.dtype
    assert gap(actual, expected) <= (2e-2 if dtype == torch.bfloat16 else CLOSE)


def test_training_then_evaluating_then_training_follows_the_original() -> None:
    model = trained(nn.Sequential(Bottleneck(), DarknetBlock(), *unit())).double()
    converted = pointfuse.convert(copy.deepcopy(model))
    x = images().double()
    for _ in range(2):
        for m in (model, converted):
            m.train()
            optimiser = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
            optimiser.zero_grad()
            m(x).pow(2).mean().backward()
            optimiser.step()
        assert_infers_like(converted, model, x)
    for a, b in zip(model.state_dict().values(), converted.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_gradients_in_evaluation_mode_are_pytorchs() -> None:
    model = trained(nn.Sequential(Bottleneck(), *unit())).eval().double()
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        m(images().double()).sum().backward()
    for a, b in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)


def test_requires_grad_stays_as_it_was() -> None:
    model = nn.Sequential(*unit())
    model[0].weight.requires_grad_(False)
    converted = pointfuse.convert(model)
    assert [p.requires_grad for p in converted.parameters()] == [False, True, True]
    converted(images()).sum().backward()
    assert converted[0].weight.grad is None


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    model = trained(Bottleneck()).eval()
    converted = pointfuse.convert(model)
    state = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, state, images())
        assert gap(torch.func.functional_call(converted, state, images()), expected) <= CLOSE


def test_forward_mode_derivatives_survive_no_grad() -> None:
    model = trained(big()).eval()
    x, tangent = large(), images(2, 8, 48, 48, seed=3)
    tangents = []
    for m in (model, pointfuse.convert(model)):
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            y = m(torch.autograd.forward_ad.make_dual(x, tangent))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert tangents[0] is not None
    assert tangents[1] is not None
    assert gap(tangents[1], tangents[0]) <= 1e-5


@pytest.mark.parametrize("place", ["conv", "bn", "act"])
def test_a_hook_registered_after_conversion_fires(place: str) -> None:
    for model in (ConvBNAct(), nn.Sequential(collections.OrderedDict(zip(("conv", "bn", "act"), unit(), strict=True)))):
        converted = pointfuse.convert(model.eval())
        seen: list[str] = []
        handles = [
            getattr(converted, place).register_forward_hook(lambda *a, to=seen: to.append("after")),
            getattr(converted, place).register_forward_pre_hook(lambda *a, to=seen: to.append("before")),
        ]
        with torch.no_grad():
            converted(images())
        assert seen == ["before", "after"]
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            converted(images())
        assert seen == ["before", "after"]


def test_a_global_hook_sees_every_module() -> None:
    model = nn.Sequential(*unit()).eval()
    converted = pointfuse.convert(model)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    try:
        with torch.no_grad():
            converted(images())
    finally:
        handle.remove()
    assert seen[:3] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]


def _replaced(name: str, module: nn.Module) -> Any:
    return lambda m: setattr(m, name, copy.deepcopy(module))


HOST_CHANGES = {
    "activation replaced": _replaced("act", nn.Tanh()),
    "batch norm replaced by identity": _replaced("bn", nn.Identity()),
    "convolution replaced by a larger one": _replaced("conv", nn.Conv2d(4, 4, 5, padding=2)),
    "convolution replaced by a sequence": _replaced("conv", nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())),
    "None replaced by a module": _replaced("down", nn.Conv2d(4, 4, 1)),
    "None replaced by add_module": lambda m: (delattr(m, "down"), m.add_module("down", nn.MaxPool2d(3, 1, 1))),
    "None replaced by a parameter": lambda m: setattr(m, "scale", nn.Parameter(torch.full((1,), 3.0))),
    "module replaced by None": lambda m: setattr(m, "extra", None),
    "number changed": lambda m: setattr(m, "factor", 3.0),
    "value in a dict changed": lambda m: m.config.update(factor=5.0),
    "attribute of a child changed": lambda m: setattr(m.holder, "factor", 7.0),
    "module appended to a list": lambda m: m.tail.append(nn.MaxPool2d(3, 1, 1)),
    "module of a list replaced": lambda m: m.tail.__setitem__(0, nn.AvgPool2d(3, 1, 1)),
    "module taken from a list": lambda m: m.tail.__delitem__(0),
    "module wrapped": lambda m: setattr(m, "extra", nn.Sequential(m.extra, nn.ReLU())),
}


def _changeable(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x)) + (x if self.down is None else self.down(x))
    y = self.act(y) if isinstance(self.act, nn.LeakyReLU) else self.act(y) * 2
    if self.extra is not None:
        y = self.extra(y)
    if self.scale is not None:
        y = y * self.scale
    for module in self.tail:
        y = module(y)
    return y * self.factor * self.config["factor"] * self.holder.factor


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", HOST_CHANGES)
def test_a_traced_module_follows_when_it_is_changed(change: str) -> None:
    model = Forward(
        _changeable,
        holder=nn.Identity(),
        down=None,
        scale=None,
        extra=nn.AvgPool2d(3, 1, 1),
        factor=1.0,
        config={"factor": 1.0},
        tail=nn.ModuleList([nn.Identity()]),
    )
    model.holder.factor = 1.0
    trained(model).eval()
    converted = pointfuse.convert(copy.deepcopy(model))
    assert_infers_like(converted, model, images())
    torch.manual_seed(0)
    HOST_CHANGES[change](model)
    torch.manual_seed(0)
    HOST_CHANGES[change](converted)
    assert_infers_like(converted, model, images())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.append(nn.Tanh()), id="appended"),
        pytest.param(lambda m: m.insert(1, nn.MaxPool2d(3, 1, 1)), id="inserted inside a unit"),
        pytest.param(lambda m: m.__setitem__(2, nn.Tanh()), id="activation replaced"),
        pytest.param(lambda m: m.__setitem__(1, nn.Identity()), id="batch norm replaced"),
        pytest.param(lambda m: m.__delitem__(1), id="batch norm deleted"),
        pytest.param(lambda m: m.extend(nn.Sequential(nn.Tanh(), nn.ReLU())), id="extended"),
        pytest.param(lambda m: m.pop(2), id="activation popped"),
    ],
)
def test_a_sequential_follows_when_it_is_changed(change: Any) -> None:
    model = trained(nn.Sequential(*unit(), *unit())).eval()
    converted = pointfuse.convert(copy.deepcopy(model))
    change(model)
    change(converted)
    assert_infers_like(converted, model, images())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Bottleneck(), id="bottleneck"),
        pytest.param(nn.Sequential(DarknetBlock(), *unit()), id="sequential"),
        pytest.param(OptionalMask(), id="optional arguments"),
    ],
)
def test_copies_and_pickles_stay_converted(model: nn.Module) -> None:
    model = trained(copy.deepcopy(model)).eval()
    converted = pointfuse.convert(model, images())
    with torch.no_grad():
        converted(images())
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(converted),
        "pickle": pickle.loads(pickle.dumps(converted)),
        "torch.load": torch.load(file, weights_only=False),
    }
    for copied in copies.values():
        assert [type(m) for m in copied.modules()] == [type(m) for m in converted.modules()]
        assert all(a is not b for a, b in zip(copied.parameters(), converted.parameters(), strict=True))
        assert_infers_like(copied, model, images())
        assert [type(m) for m in pointfuse.revert(copied).modules()] == [type(m) for m in model.modules()]


def test_a_state_dict_of_a_converted_model_loads_safely() -> None:
    converted = pointfuse.convert(Bottleneck())
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    Bottleneck().load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_a_converted_model_is_collected_when_dropped() -> None:
    converted = pointfuse.convert(nn.Sequential(Bottleneck(), *unit()), images(), verify=True)
    with torch.no_grad():
        converted(images())
    alive = weakref.ref(converted[0].conv1.weight)
    del converted
    gc.collect()
    assert alive() is None


COMPILED = [
    pytest.param(lambda: nn.Sequential(Bottleneck(), DarknetBlock(), *unit()), None, id="blocks"),
    pytest.param(lambda: OptionalMask(), None, id="optional arguments"),
    pytest.param(lambda: Forward(lambda s, x: s.unit(x) if x.shape[1] == 4 else x), images(), id="branch on a shape"),
    pytest.param(lambda: Forward(_counts, steps=0), None, id="counts its training steps"),
]


def _counts(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.steps = self.steps + 1
    return self.unit(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("make", "example"), COMPILED)
def test_a_converted_model_compiles_whole(make: Any, example: Any, backend: str) -> None:
    torch._dynamo.reset()
    model = trained(make())
    converted = pointfuse.convert(copy.deepcopy(model), example)
    compiled = torch.compile(converted, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert gap(compiled.eval()(images()), model.eval()(images())) <= CLOSE
    compiled.train()
    model.train()
    assert gap(compiled(images()), model(images())) <= CLOSE


def test_a_dynamic_batch_does_not_recompile() -> None:
    torch._dynamo.reset()
    model = trained(nn.Sequential(Bottleneck(), *unit())).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(pointfuse.convert(model), fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = images(batch, 4, 8, 8)
            torch._dynamo.mark_dynamic(x, 0)
            assert gap(compiled(x), model(x)) <= CLOSE
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_exports() -> None:
    model = trained(nn.Sequential(Bottleneck(), DarknetBlock(), *unit())).eval()
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(pointfuse.convert(model), (images(),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        assert gap(exported.module()(images(5, 4, 8, 8)), model(images(5, 4, 8, 8))) <= CLOSE


def test_verification_passes_and_leaves_everything_as_it_was() -> None:
    model = trained(nn.Sequential(Bottleneck(), nn.Dropout(0.5), DarknetBlock(), *unit()))
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    converted = pointfuse.convert(model, images(), verify=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert [m.training for m in converted.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in converted.modules())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("broken", ["eval", "train"])
def test_verification_names_the_module_that_differs_with_figures(
    monkeypatch: pytest.MonkeyPatch, inplace: bool, broken: str
) -> None:
    from pointfuse.convert import matching

    right = matching.run_unit

    def wrong(x: Tensor, conv: nn.Module, *rest: Any, **options: Any) -> Tensor:
        y = right(x, conv, *rest, **options)
        return y * 1.25 if conv.training == (broken == "train") and conv.kernel_size == (3, 3) else y

    monkeypatch.setattr(matching, "run_unit", wrong)
    model = trained(nn.Sequential(collections.OrderedDict(stem=nn.Conv2d(4, 4, 1), body=Bottleneck(), head=nn.ReLU())))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        pointfuse.VerificationError, match=rf"body.* in {broken} mode: by 0\.\d+ .*0?\.?\d+ is accepted"
    ):
        pointfuse.convert(model, images(), verify=True, inplace=inplace)
    assert [type(m) for m in model.modules()] == classes


def test_verification_catches_wrong_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from pointfuse.convert import matching

    right = matching.run_unit

    def wrong(x: Tensor, conv: nn.Module, bn: nn.Module, *rest: Any, **options: Any) -> Tensor:
        y = right(x, conv, bn, *rest, **options)
        if bn.training:
            bn.running_mean.add_(1)
        return y

    monkeypatch.setattr(matching, "run_unit", wrong)
    with pytest.raises(pointfuse.VerificationError, match=r"buffer 0\.bn\.running_mean"):
        pointfuse.convert(nn.Sequential(ConvBNAct()), images(), verify=True)


def test_verification_needs_example_inputs() -> None:
    with pytest.raises(ValueError, match="pass example_inputs"):
        pointfuse.convert(nn.Sequential(*unit()), verify=True)


LAYERS = st.sampled_from(
    ["conv", "bn", "relu", "leaky", "silu", "relu6", "identity", "dropout", "pool", "tanh", "nested"]
)


@st.composite
def sequentials(draw: st.DrawFn, depth: int = 1) -> nn.Sequential:
    """Sequences of layers in any order, with four channels between them."""
    layers: list[nn.Module] = []
    for kind in draw(st.lists(LAYERS, min_size=1, max_size=7)):
        if kind == "conv":
            kernel, dilation = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2]))
            layers.append(
                nn.Conv2d(4, 4, kernel, draw(st.sampled_from([1, 1, 2])), dilation * (kernel // 2), dilation,
                          draw(st.sampled_from([1, 2, 4])), draw(st.booleans()))
            )  # fmt: skip
        elif kind == "bn":
            layers.append(
                nn.BatchNorm2d(4, draw(st.sampled_from([1e-5, 1e-2])), draw(st.sampled_from([None, 0.1, 0.7])),
                               draw(st.booleans()), draw(st.booleans()))
            )  # fmt: skip
        elif kind == "nested":
            layers.append(draw(sequentials(depth - 1)) if depth else nn.Identity())
        else:
            inplace = draw(st.booleans())
            layers.append(
                {"relu": nn.ReLU(inplace), "leaky": nn.LeakyReLU(draw(st.sampled_from([0.1, 0.0, -0.2])), inplace),
                 "silu": nn.SiLU(inplace), "relu6": nn.ReLU6(inplace), "identity": nn.Identity(),
                 "dropout": nn.Dropout(0.3), "pool": nn.MaxPool2d(3, 1, 1), "tanh": nn.Tanh()}[kind]
            )  # fmt: skip
    return nn.Sequential(*layers)


@hypothesis_settings(max_examples=25)
@given(sequentials(), st.integers(0, 7), st.integers(0, 7))
def test_any_sequence_and_any_slice_of_it_answers_as_before(model: nn.Sequential, start: int, stop: int) -> None:
    trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = pointfuse.convert(copy.deepcopy(model))
    x = images(2, 4, 12, 12)
    with torch.no_grad():
        assert gap(converted.eval()(x.clone()), model.eval()(x.clone())) <= 1e-5
        if len(model[start:stop]):
            assert gap(converted[start:stop](x.clone()), model[start:stop](x.clone())) <= 1e-5
    assert_trains_like(converted, model, images(2, 4, 12, 12))


class RandomBlock(nn.Module):
    """A random graph of layers, sums and products, and modules that hold a unit, over values made so far."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(self._layer(kind) for kind, _, _ in steps)

    @staticmethod
    def _layer(kind: str) -> nn.Module:
        made = {
            "conv": unit()[0],
            "bn": nn.BatchNorm2d(4),
            "relu": nn.ReLU(),
            "relu_": nn.ReLU(inplace=True),
            "unit": ConvBNAct(),
            "conv and bn": nn.Sequential(*unit()[:2]),
        }
        return made.get(kind, nn.Identity())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1]
        for (kind, a, b), layer in zip(self.steps, self.layers, strict=True):
            first, second = values[-1 - a % len(values)], values[-1 - b % len(values)]
            if kind == "add":
                values.append(first + second)
            elif kind == "iadd":
                first += second
                values.append(first)
            elif kind == "half":
                values.append(first * 0.5)
            else:
                values.append(layer(first))
        return values[-1], values[-2]


KINDS = ["conv", "conv", "bn", "bn", "relu", "relu_", "unit", "unit", "conv and bn", "identity", "half"]


@hypothesis_settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*KINDS, "add", "add", "iadd"]),
            st.sampled_from([0, 0, 0, 1, 2]),
            st.integers(0, 4),
        ),
        min_size=3,
        max_size=10,
    )
)
def test_any_graph_of_layers_and_sums_answers_as_before(steps: list[tuple[str, int, int]]) -> None:
    model = trained(RandomBlock(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = pointfuse.convert(copy.deepcopy(model))
        frozen = pointfuse.freeze(model.eval(), pack=False)
    with torch.no_grad():
        expected = model(images())
        assert gap(converted.eval()(images()), expected) <= 1e-5
        assert gap(frozen(images()), expected) <= 1e-5
    assert_trains_like(converted, model, images())


def test_a_slice_with_one_activation_object_twice_runs_it_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.LeakyReLU(0.1)
            self.body = nn.Sequential(*unit(act=act), *unit(act=act))
            self.head = nn.Conv2d(4, 4, 1)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.head(self.body[:6](x)))

    model = trained(Model()).eval()
    assert {u.conv for u in pointfuse.plan(model).units} == {"body.0", "body.3", "head"}
    assert_infers_like(pointfuse.convert(model), model, images())


def test_tracing_in_one_thread_does_not_disturb_another() -> None:
    import threading

    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        linear = nn.Linear(2, 2)
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert not torch.is_grad_enabled()
                    linear.scale = 1.0
                    linear(torch.zeros(1, 2))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        pointfuse.plan(Bottleneck())
    stop.set()
    thread.join()
    assert failures == []
