"""Residuals that a module adds to what a child puts out, sums without batch norm, and constant factors are a unit's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import ConvBNAct, Forward, assert_trains_like, gap, images, trained, unit
from models_for_tests import one_thread as one_thread
from pointfuse.convert import VerificationError, hosts
from pointfuse.modules import units_not_small
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBN(ConvBNAct):
    def __init__(self) -> None:
        super().__init__(act=nn.Identity())


class Block(nn.Module):
    """Two children, and whatever is done with what they put out: ``Block(lambda self, x: ...)``."""

    def __init__(self, body: Callable[..., Any], second: nn.Module | None = None, **attributes: Any) -> None:
        super().__init__()
        self.first = ConvBNAct()
        self.second = ConvBNAct() if second is None else second
        self.pass_on = nn.Identity()
        self.act = nn.ReLU()
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def darknet(self: Any, x: Tensor) -> Tensor:
    return x + self.second(self.first(x))


def resnet(self: Any, x: Tensor) -> Tensor:
    return self.act(self.second(self.first(x)) + x)


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.second(self.first(x))
    y += x
    return y


def behind_identities(self: Any, x: Tensor) -> Tensor:
    return self.pass_on(self.second(self.first(x))) + x


def nested() -> nn.Module:
    """Sequences without a convolution of their own, as torchvision nests them."""
    return nn.Sequential(nn.Sequential(*unit()), nn.Sequential(nn.Sequential(*unit()[:2])))


UNIT = pointfuse.ConvBNAct2d(4, 4, 1, activation="identity")
SUMMED = [
    pytest.param(lambda: Block(darknet), "act_add", "leaky_relu", id="darknet"),
    pytest.param(lambda: Block(resnet, ConvBN()), "add_act", "relu", id="resnet"),
    pytest.param(lambda: Block(in_place), "act_add", "leaky_relu", id="in place"),
    pytest.param(lambda: Block(in_place, ConvBN()), "add_act", "identity", id="in place without activation"),
    pytest.param(lambda: Block(behind_identities), "act_add", "leaky_relu", id="behind identities"),
    pytest.param(lambda: Block(resnet, nn.Sequential(*unit()[:2])), "add_act", "relu", id="to a sequence"),
    pytest.param(lambda: Block(darknet, nn.Sequential(*unit())), "act_add", "leaky_relu", id="to a sequence that acts"),
    pytest.param(lambda: Block(resnet, nested()), "add_act", "relu", id="to nested sequences"),
    pytest.param(
        lambda: Block(lambda s, x: F.silu(s.second(s.first(x)) + x), ConvBN()), "add_act", "silu", id="functional"
    ),
    pytest.param(lambda: Block(darknet, pointfuse.ConvBNAct2d(4, 4, 1)), "act_add", "leaky_relu", id="to a unit"),
    pytest.param(lambda: Block(resnet, UNIT), "add_act", "relu", id="to a unit without activation"),
    pytest.param(lambda: Forward(lambda s, x: s.conv(x) + x), "add_act", "identity", id="no batch norm"),
    pytest.param(lambda: Forward(lambda s, x: s.act(s.conv(x) + x)), "add_act", "leaky_relu", id="no batch norm, acts"),
    pytest.param(lambda: Forward(lambda s, x: s.act(s.conv(x) * 0.17 + x)), "add_act", "leaky_relu", id="scaled"),
    pytest.param(lambda: Forward(lambda s, x: s.conv(x).mul_(s.n) + x, n=-2), "add_act", "identity", id="mul_"),
    pytest.param(lambda: Forward(lambda s, x: 1.0 * s.conv(x) + x), "add_act", "identity", id="times one"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "order", "activation"), SUMMED)
def test_the_sum_is_the_units_and_the_answers_are_as_before(
    make: Callable[[], nn.Module], order: str, activation: str
) -> None:
    model = trained(make())
    *_, found = pointfuse.plan(model).units
    assert (found.residual, found.activation) == (order, activation)
    converted = pointfuse.convert(copy.deepcopy(model), images(), verify=True)
    with torch.no_grad():
        named = getattr(getattr(model, "body", None), "__name__", "<lambda>") != "<lambda>"
        pickled = [pickle.loads(pickle.dumps(converted))] if named else []
        for answer in (converted, copy.deepcopy(converted), *pickled):
            assert gap(answer.eval()(images()), model.eval()(images())) <= 1e-5
    assert_trains_like(converted, model, images())
    assert [type(m) for m in pointfuse.revert(converted).modules()][1:] == [
        nn.Sequential if type(m) is pointfuse.ConvBNAct2d else type(m) for m in model.modules()
    ][1:]


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize(("make", "order", "activation"), SUMMED)
def test_it_freezes(make: Callable[[], nn.Module], order: str, activation: str, pack: bool) -> None:
    model = trained(make()).eval()
    frozen = pointfuse.freeze(model, images(), pack=pack)
    with torch.no_grad():
        exact, expected = copy.deepcopy(model).double()(images().double()), model(images())
        for answer in (frozen, frozen, copy.deepcopy(frozen), pointfuse.freeze(pointfuse.convert(model), pack=pack)):
            assert gap(answer(images()).double(), exact) <= 2 * gap(expected.double(), exact) + 1e-6


@pytest.mark.parametrize(("make", "order", "activation"), SUMMED[:11])
@pytest.mark.parametrize("form", [pointfuse.freeze, pointfuse.convert], ids=["frozen", "converted"])
def test_the_child_is_given_the_sum(
    make: Callable[[], nn.Module], order: str, activation: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = form(trained(make()).eval())
    run, given = type(changed.second)._pointfuse_tail, []

    def spy(self: nn.Module, *args: Any) -> Tensor:
        y = run(self, *args)
        given.extend([y] if self is changed.second else [])
        return y

    monkeypatch.setattr(type(changed.second), "_pointfuse_tail", spy)
    with torch.no_grad():
        y = changed(images())
    assert len(given) == 1
    assert torch.equal(given[0], y)


LEFT = {
    "computed after the child": lambda s, x: s.second(x) + s.first(x),
    "the result goes elsewhere too": lambda s, x: (lambda y: (y + x) * y)(s.second(x)),
    "added to itself": lambda s, x: (lambda y: y + y)(s.second(x)),
    "with a factor": lambda s, x: torch.add(s.second(x), x, alpha=2),
    "added into the other": lambda s, x: x.clone().add_(s.second(x)),
    "a number": lambda s, x: s.second(x) + 1.5,
    "a module between": lambda s, x: s.dropout(s.second(x)) + x,
}


@pytest.mark.parametrize("name", LEFT)
def test_other_sums_stay_where_they_are(name: str) -> None:
    model = trained(Block(LEFT[name], dropout=nn.Dropout(0.0)))
    plan = pointfuse.plan(model)
    residuals = {u.conv: u.residual for u in plan.units}
    assert residuals["second.conv"] is None
    assert residuals["first.conv"] == ("act_add" if name == "computed after the child" else None)
    converted = pointfuse.convert(copy.deepcopy(model))
    with torch.no_grad():
        assert gap(converted.eval()(images()), model.eval()(images())) <= 1e-5
    assert_trains_like(converted, model, images())


def _doubling(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


OTHER = trained(ConvBNAct(act=nn.SiLU()))
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the child": lambda m: _doubling(m.second),
    "a hook on the child's batch norm": lambda m: _doubling(m.second.bn),
    "a hook on what is passed by": lambda m: _doubling(m.pass_on),
    "another child": lambda m: setattr(m, "second", copy.deepcopy(OTHER)),
    "a child that is no unit": lambda m: setattr(m, "second", nn.MaxPool2d(3, 1, 1)),
    "another activation in the child": lambda m: setattr(m.second, "act", nn.Tanh()),
    "no activation in the child": lambda m: setattr(m.second, "act", nn.Identity()),
    "the child's forward": lambda m: setattr(m.second, "forward", lambda x: x * 3),
    "the child in evaluation mode": lambda m: m.second.eval(),
}


@pytest.mark.filterwarnings("ignore:pointfuse")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ran", [True, False], ids=["after a call", "before a call"])
def test_a_change_is_followed(change: str, ran: bool) -> None:
    model = trained(Block(behind_identities))
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        if ran:
            m(images())
        CHANGES[change](m)
    for mode in (True, False):
        if mode and change == "the child in evaluation mode":
            model.first.train(), converted.first.train()
        else:
            model.train(mode), converted.train(mode)
        with torch.no_grad():
            assert gap(converted(images()), model(images())) <= 1e-5
        for found, expected in zip(converted.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("act", [None, nn.Identity()], ids=["no activation", "an identity"])
@pytest.mark.parametrize("change", ["activation", "hook"])
def test_a_unit_whose_activation_changes_is_followed(act: nn.Module | None, change: str) -> None:
    unit_ = pointfuse.ConvBNAct2d.from_modules(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)
    model = trained(Block(resnet, unit_)).eval()
    converted = pointfuse.convert(model)
    for m in (model, converted):
        if change == "activation":
            m.second.act = nn.SiLU()
        elif act is not None:
            _doubling(m.second.act)
    with torch.no_grad():
        assert gap(converted(images()), model(images())) <= 1e-5


def test_global_hooks_see_what_is_passed_by() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())).eval()
    for m in (model, trained(Block(behind_identities)).eval()):
        converted = pointfuse.convert(m)
        hook = register_module_forward_hook(lambda m, _, y: y * 2 if type(m) is nn.Identity else None)
        try:
            with torch.no_grad():
                assert gap(converted(images()), m(images())) <= 1e-5
        finally:
            hook.remove()


class Loud(nn.Sequential):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2


def test_a_child_that_is_called_in_its_own_way_is_called() -> None:
    for second in (Loud(*unit()[:2]), nn.Sequential(nn.ReLU(), Loud(*unit()[:2]))):
        model = trained(Block(resnet, second)).eval()
        for form in (pointfuse.convert, pointfuse.freeze):
            with torch.no_grad():
                assert gap(form(model)(images()), model(images())) <= 1e-5


class Generator(nn.Module):
    """Starts from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(images())
        self.conv, self.bn, self.act = unit()

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.act(self.bn(self.conv(self.start if x is None else x)))


def test_a_forward_without_arguments_has_units() -> None:
    model = trained(Generator()).eval()
    assert len(pointfuse.plan(model).units) == 1
    with torch.no_grad():
        assert gap(pointfuse.convert(model)(), model()) <= 1e-5


def test_a_module_twice_in_a_sequence_is_both_times_its_last() -> None:
    twice = nn.Sequential(*unit()[:2])
    model = trained(Block(resnet, nn.Sequential(twice, nn.Sequential(), twice))).eval()
    with torch.no_grad():
        assert gap(pointfuse.convert(model)(images()), model(images())) <= 1e-5


def test_a_residual_that_the_unit_does_not_take_leaves_the_rest_fused() -> None:
    """PyTorch's own modules would raise here, since the sum in place overwrites what the activation keeps."""

    class Offset(nn.Module):
        def __init__(self, unit_: nn.Module) -> None:
            super().__init__()
            self.unit = unit_
            self.offset = nn.Parameter(images(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.unit(x)
            y += self.offset
            return y

    for activation in ("relu", "identity"):
        model = trained(Offset(pointfuse.ConvBNAct2d(4, 4, 3, activation=activation))).train()
        converted = pointfuse.convert(copy.deepcopy(model))
        before = units_not_small()
        assert_trains_like(converted, model, images())
        converted(images()).sum().backward()
        assert units_not_small() > before


def test_a_reverted_child_leaves_the_sum_to_its_parent() -> None:
    model = trained(Block(darknet)).eval()
    converted = pointfuse.convert(model)
    converted.second = pointfuse.revert(converted.second)
    with torch.no_grad():
        assert gap(converted(images()), model(images())) <= 1e-5


def test_sums_that_broadcast_or_change_the_dtype_are_pytorchs() -> None:
    for body in (
        lambda s, x: s.second(x) + x[:, :1],
        lambda s, x: s.second(x) + x.double(),
        lambda s, x: s.second(x) + x[None],
    ):
        model = trained(Block(body)).eval()
        for form in (pointfuse.convert, pointfuse.freeze):
            with torch.no_grad():
                assert gap(form(model)(images()), model(images())) <= 1e-5


def test_a_factor_that_changes_after_freezing_is_followed() -> None:
    model = trained(Forward(lambda s, x: s.act(s.conv(x) * s.by), by=0.5)).eval()
    frozen = pointfuse.freeze(model, images())
    with torch.no_grad():
        for by in (0.5, 0.25, 0.0, 1):
            model.by = frozen.by = by
            assert gap(frozen(images()), model(images())) <= 1e-5
            assert gap(frozen.conv(images()), model.conv(images())) <= 1e-5


def test_a_weight_with_a_factor_in_it_is_not_given_for_the_convolutions() -> None:
    frozen = pointfuse.freeze(Forward(lambda s, x: s.act(s.conv(x) * 0.5)).eval())
    with pytest.raises(AttributeError, match=r"weight is folded together with a factor of 0.5 by freeze"):
        _ = frozen.conv.weight


def test_a_convolution_with_two_factors_is_not_folded_into() -> None:
    model = trained(Forward(lambda s, x: s.act(s.conv(x) * 0.5) - s.act(s.conv(x) * 2.0))).eval()
    frozen = pointfuse.freeze(model, images())
    assert type(frozen.conv) is nn.Conv2d
    with torch.no_grad():
        assert gap(frozen(images()), model(images())) <= 1e-5


def test_verification_sees_a_sum_that_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the hooks by which it watches the modules inside keep their sums from being fused."""
    taken = hosts._traced_tail
    monkeypatch.setattr(hosts, "_traced_tail", lambda self, x, residual, *rest: taken(self, x, residual * 2, *rest))
    monkeypatch.setattr(hosts, "_CLASSES", {})
    with pytest.raises(VerificationError, match="output 0 of the model differs most, in eval mode"):
        pointfuse.convert(trained(Block(darknet)), images(), verify=True)
