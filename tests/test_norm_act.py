"""A batch norm that applies its activation itself is a unit's, where its forward is proven to be that and no more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import assert_trains_like, gap, images, trained
from models_for_tests import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNormAct(nn.BatchNorm2d):
    """As it is commonly written: ``nn.BatchNorm2d.forward`` copied, and an activation."""

    def __init__(self, channels: int = 4, act: nn.Module | None = None, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        average = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        kept = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            by_batch,
            average,
            self.eps,
        )
        return self.act(self.drop(x))


class SuperAct(nn.BatchNorm2d):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.slope = 0.2

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), self.slope)


class SyncAct(nn.SyncBatchNorm):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Host(nn.Module):
    """A traced host: convolution, batch norm, and perhaps a sum behind."""

    def __init__(self, bn: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = bn
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + x if self.residual else y


def sequence(bn: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), bn)


HOSTS = [pytest.param(Host, id="traced"), pytest.param(sequence, id="sequence")]
PROVEN = [
    pytest.param(lambda: BatchNormAct(), "relu", id="copied forward"),
    pytest.param(lambda: BatchNormAct(act=nn.LeakyReLU(0.3)), "leaky_relu", id="leaky"),
    pytest.param(lambda: BatchNormAct(act=nn.Identity()), "identity", id="without activation"),
    pytest.param(lambda: BatchNormAct(act=nn.Hardswish()), "identity", id="activation that is not fused"),
    pytest.param(lambda: BatchNormAct(affine=False), "relu", id="without parameters"),
    pytest.param(lambda: BatchNormAct(track_running_stats=False), "relu", id="without running statistics"),
    pytest.param(lambda: SuperAct(), "leaky_relu", id="forward of the base class"),
]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("make", "activation"), PROVEN)
def test_it_is_fused_and_answers_as_before(
    host: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], activation: str
) -> None:
    model = trained(host(make()))
    (unit,) = pointfuse.plan(model).units
    assert (unit.bn is not None, unit.activation) == (True, activation)
    converted = pointfuse.convert(copy.deepcopy(model))
    assert isinstance(converted.get_submodule(unit.bn), type(make()))
    with torch.no_grad():
        assert gap(converted.eval()(images()), model.eval()(images())) <= 1e-5
    assert_trains_like(converted, model, images())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("make", "activation"), PROVEN)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
def test_it_freezes(
    host: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], activation: str, pack: bool
) -> None:
    model = trained(host(make())).eval()
    frozen = pointfuse.freeze(model, images(), pack=pack)
    with torch.no_grad():
        exact, expected = copy.deepcopy(model).double()(images().double()), model(images())
        for answer in (frozen, copy.deepcopy(frozen)):
            assert gap(answer(images()).double(), exact) <= 2 * gap(expected.double(), exact) + 1e-6
    conv = frozen[0] if isinstance(frozen, nn.Sequential) else frozen.conv
    assert isinstance(conv, nn.Conv2d) == (not getattr(make(), "track_running_stats", True))


def test_what_runs_is_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the batch norm nor its activation is called."""
    frozen = pointfuse.freeze(trained(Host(BatchNormAct())).eval())
    monkeypatch.setattr(nn.ReLU, "forward", lambda *_: pytest.fail("the activation was called"))
    with torch.no_grad():
        assert frozen(images()).min() == 0


def test_a_synchronised_one_is_fused() -> None:
    (unit,) = pointfuse.plan(Host(SyncAct())).units
    assert (unit.bn, unit.act, unit.activation) == ("bn", "bn.act", "silu")


def test_a_residual_is_added_behind_the_activation() -> None:
    model = trained(Host(BatchNormAct(), residual=True))
    (unit,) = pointfuse.plan(model).units
    assert (unit.act, unit.residual) == ("bn.act", "act_add")
    converted = pointfuse.convert(copy.deepcopy(model))
    with torch.no_grad():
        assert gap(converted.eval()(images()), model.eval()(images())) <= 1e-5
        assert gap(pointfuse.freeze(model)(images()), model(images())) <= 1e-5
    assert_trains_like(converted, model, images())


class BatchNorm(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(4)


class Scales(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ActsFirst(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.relu())


class Twice(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class SwapsParameters(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1 if self.training else 0)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.bias, self.weight, self.training, self.momentum, self.eps
        )


class DoesNotCount(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class CountsTwice(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


class OtherEps(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, 0.1
        )


class OtherMomentum(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.3, self.eps
        )


class AlwaysByBatch(BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


class OnlyInTraining(SuperAct):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training else nn.BatchNorm2d.forward(self, input)


class ByShape(SuperAct):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.shape[2] > 5 else input


class ChecksItself(SuperAct):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.shape[0] > 1:
            raise ValueError("one image")


class TwoActivations(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def dropping() -> nn.Module:
    bn = BatchNormAct()
    bn.drop = nn.Dropout2d(0.5)
    return bn


def hooked() -> nn.Module:
    bn = BatchNormAct()
    bn.register_forward_hook(lambda *_: None)
    return bn


REFUSED = [
    Scales, ActsFirst, Twice, SwapsParameters, DoesNotCount, CountsTwice, OtherEps, OtherMomentum, AlwaysByBatch,
    OnlyInTraining, ByShape, ChecksItself, TwoActivations, dropping, hooked, lambda: BatchNormAct(momentum=None),
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: getattr(make, "__name__", ""))
def test_one_that_does_more_is_left_alone(
    host: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    model = trained(host(make()))
    plan = pointfuse.plan(model, images(1, 4, 8, 8))
    assert not plan.units
    (skipped,) = plan.skipped
    said = "has hooks" if make is hooked else "a forward of its own that does more than normalise and activate"
    assert said in skipped.reason
    with pytest.warns(UserWarning, match="found no unit"):
        converted = pointfuse.convert(copy.deepcopy(model))
    x = images(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(x), model.eval()(x))
    if make is not dropping:
        assert_trains_like(converted, model, x)


def _drop(bn: BatchNormAct) -> None:
    bn.drop = nn.Dropout2d(1.0)


def _hook(bn: BatchNormAct, path: str = "") -> None:
    bn.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)


CHANGES = {
    "another activation": lambda bn: setattr(bn, "act", nn.SiLU()),
    "another slope": lambda bn: setattr(bn.act, "negative_slope", 0.7),
    "dropout": _drop,
    "a hook on the batch norm": _hook,
    "a hook on the activation": lambda bn: _hook(bn, "act"),
    "a hook on what is passed by": lambda bn: _hook(bn, "drop"),
    "another eps": lambda bn: setattr(bn, "eps", 0.5),
    "another momentum": lambda bn: setattr(bn, "momentum", 0.5),
    "a cumulative average": lambda bn: setattr(bn, "momentum", None),
    "no running statistics": lambda bn: setattr(bn, "track_running_stats", False),
    "evaluation mode": lambda bn: bn.eval(),
    "frozen parameters": lambda bn: bn.requires_grad_(False),
    "another forward": lambda bn: setattr(bn, "forward", lambda x: x * 3),
}


@pytest.mark.filterwarnings("ignore:pointfuse")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ran", [True, False], ids=["after a call", "before a call"])
def test_a_change_is_followed(host: Callable[[nn.Module], nn.Module], change: str, ran: bool) -> None:
    model = trained(host(BatchNormAct(act=nn.LeakyReLU(0.1))))
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        if ran:
            m(images())
        CHANGES[change](m.get_submodule("2" if isinstance(m, nn.Sequential) else "bn"))
    with torch.no_grad():
        assert gap(converted.eval()(images()), model.eval()(images())) <= 1e-5
        if change != "evaluation mode":
            assert gap(converted.train()(images()), model.train()(images())) <= 1e-5
            for found, expected in zip(converted.buffers(), model.buffers(), strict=True):
                torch.testing.assert_close(found, expected)


class Calls(BatchNorm):
    """Applies whatever it holds, which is no module."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.f = act

    def forward(self, input: Tensor) -> Tensor:
        return self.f(super().forward(input))


class Configured(BatchNorm):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(slope=slope)

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), self.config.slope)


class DefaultSettings(nn.BatchNorm2d):
    """Leaves ``eps`` and ``momentum`` to the function, whatever it was made with."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def test_one_proof_does_not_stand_for_another() -> None:
    """Of one class, but holding other functions, configurations and settings."""
    pairs = [
        (Calls(F.relu), Calls(F.silu)),
        (Configured(0.1), Configured(0.7)),
        (DefaultSettings(4), DefaultSettings(4, eps=0.5)),
        (DefaultSettings(4), DefaultSettings(4, momentum=0.5)),
    ]
    for first, second in pairs:
        model = trained(nn.Sequential(sequence(first), sequence(second)))
        converted = pointfuse.convert(copy.deepcopy(model))
        with torch.no_grad():
            assert gap(converted.eval()(images()), model.eval()(images())) <= 1e-5
            assert gap(pointfuse.freeze(model)(images()), model(images())) <= 1e-5
        assert_trains_like(converted, model, images())


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_no_module_is_followed_too(host: Callable[[nn.Module], nn.Module]) -> None:
    changes = [
        (Calls(F.relu), lambda bn: setattr(bn, "f", F.silu)),
        (Configured(0.1), lambda bn: setattr(bn.config, "slope", 0.7)),
        (DefaultSettings(4), lambda bn: setattr(bn, "momentum", 0.5)),
        (DefaultSettings(4), lambda bn: setattr(bn, "eps", 0.5)),
    ]
    for bn, change in changes:
        model = trained(host(bn)).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = pointfuse.convert(copy.deepcopy(model))
            for m in (model, converted):
                m(images(dtype=torch.float64))
                change(m.get_submodule("2" if isinstance(m, nn.Sequential) else "bn"))
            assert_trains_like(converted, model, images())


def test_in_evaluation_mode_while_its_host_trains() -> None:
    model = trained(Host(BatchNormAct()))
    converted = pointfuse.convert(copy.deepcopy(model))
    for m in (model, converted):
        m.train()
        m.bn.eval()
    assert gap(converted(images()), model(images())) <= 1e-5
    assert converted.bn.num_batches_tracked == 0


def test_proofs_do_not_keep_modules_alive() -> None:
    from pointfuse.convert import normalisation

    bn = BatchNormAct()
    assert normalisation.norm_act(bn) is normalisation.norm_act(bn)
    held = len(normalisation._PROVEN)
    del bn
    assert len(normalisation._PROVEN) == held - 1
