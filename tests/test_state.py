"""State survives: state_dicts both ways in every form, averages of weights, wrapped models, files, optimisers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import Bottleneck, ConvBNAct, gap, images, trained, unit
from models_for_tests import one_thread as one_thread
from pointfuse.folded import FoldedConv2d
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

MATCHED = "<All keys matched successfully>"


def network(seed: int = 0) -> nn.Module:
    """A sequential host, traced ones, a unit of ours and a convolution alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(*unit(), Bottleneck(), ConvBNAct(), pointfuse.ConvBNAct2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    return trained(model, seed)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images())


def through_a_file(content: Any, **how: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, **how)


PLAIN_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it was": lambda m: m,
    "converted": pointfuse.convert,
    "converted in place": lambda m: pointfuse.convert(m, inplace=True),
    "converted with example inputs": lambda m: pointfuse.convert(m, images()),
    "reverted": lambda m: pointfuse.revert(pointfuse.convert(m)),
}
FROZEN_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "packed at the first call": lambda m: pointfuse.freeze(m.eval()),
    "packed": lambda m: pointfuse.freeze(m.eval(), images()),
    "not packed": lambda m: pointfuse.freeze(m.eval(), pack=False),
    "in NCHW": lambda m: pointfuse.freeze(m.eval(), memory_format=torch.contiguous_format),
    "of a converted model": lambda m: pointfuse.freeze(pointfuse.convert(m.eval())),
}


@pytest.mark.parametrize("forms", [PLAIN_FORMS, FROZEN_FORMS], ids=["plain", "frozen"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied in", "assigned"])
def test_every_form_loads_the_state_of_every_other_strictly(
    forms: dict[str, Callable[[nn.Module], nn.Module]], assign: bool
) -> None:
    """Each after it has run, from a file that is read with ``weights_only``."""
    expected = answer(network(1))
    for source in forms.values():
        giver = source(network(1))
        answer(giver)
        state = through_a_file(giver.state_dict(), weights_only=True)
        assert list(state) == list(giver.state_dict())
        for target in forms.values():
            taker = target(network(2))
            assert gap(answer(taker), expected) > 1e-3
            assert str(taker.load_state_dict(state, strict=True, assign=assign)) == MATCHED
            assert gap(answer(taker), expected) <= 2e-6


def test_the_keys_of_a_frozen_model() -> None:
    frozen = pointfuse.freeze(nn.Sequential(*unit(), nn.Conv2d(4, 2, 1, bias=False), nn.PReLU()).eval(), images())
    assert list(frozen.state_dict()) == ["0.folded_weight", "0.folded_bias", "3.folded_weight", "4.weight"]


def test_whole_models_are_saved_and_loaded() -> None:
    plain = network().eval()
    expected = answer(plain)
    for made in (pointfuse.convert(plain), pointfuse.freeze(plain, images())):
        loaded = through_a_file(made, weights_only=False)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in made.modules()]
        assert str(loaded.load_state_dict(made.state_dict(), strict=True)) == MATCHED
        assert gap(answer(loaded), expected) <= 2e-6
        with pytest.raises(Exception, match="Weights only load failed"):
            through_a_file(made, weights_only=True)


# Optimisers


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3), id="SGD"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.01), id="AdamW"),
    ],
)
def test_an_optimiser_goes_on_through_conversion_and_reversion(make: Callable[..., torch.optim.Optimizer]) -> None:
    def steps(change: Callable[[nn.Module, int], None]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network().double().train()
        optimiser = make(model.parameters())
        for i in range(4):
            change(model, i)
            optimiser.zero_grad()
            model(images(seed=i).double()).square().mean().backward()
            optimiser.step()
        return model, optimiser

    def convert_and_revert(model: nn.Module, i: int) -> None:
        if i in (1, 3):
            pointfuse.convert(model, inplace=True)
        if i == 2:
            # A unit of ours becomes a Sequential, whose keys and parameters are the same.
            pointfuse.revert(model, inplace=True)

    (plain, expected), (changed, actual) = steps(lambda model, i: None), steps(convert_and_revert)
    assert len(actual.state) == len(expected.state) == len(list(changed.parameters()))
    for p, q in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        for kept, other in zip(expected.state[p].values(), actual.state[q].values(), strict=True):
            torch.testing.assert_close(kept, other, rtol=0, atol=1e-9)
    fresh = make(network().double().parameters())
    fresh.load_state_dict(through_a_file(actual.state_dict(), weights_only=True))


# Averages of weights

AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "EMA one by one": {"avg_fn": get_ema_avg_fn(0.5)},
    "EMA with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
}


def averaged(model: nn.Module, options: dict[str, Any]) -> AveragedModel:
    """The average over three steps of training, with batch norm calibrated on three batches."""
    model.train()
    average = AveragedModel(model, **options)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(3):
        optimiser.zero_grad()
        model(images(seed=i).double()).square().mean().backward()
        optimiser.step()
        average.update_parameters(model)
    if not options.get("use_buffers"):
        update_bn([images(seed=i).double() for i in range(3)], average)
    return average.eval()


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_an_average_of_a_converted_model_is_that_of_the_original(options: dict[str, Any]) -> None:
    plain, converted = averaged(network().double(), options), averaged(pointfuse.convert(network().double()), options)
    x = images().double()
    with torch.no_grad():
        expected = plain(x)
        assert gap(converted(x), expected) <= 1e-9
        assert str(plain.load_state_dict(converted.state_dict(), strict=True)) == MATCHED
        assert gap(plain(x), expected) <= 1e-9
        assert pointfuse.plan(converted).units == pointfuse.plan(plain).units
        assert gap(pointfuse.freeze(converted)(x), expected) <= 1e-9
        assert gap(pointfuse.convert(plain)(x), expected) <= 1e-9


def test_an_average_that_writes_data_between_calls_is_followed() -> None:
    plain, source = network().eval(), network(3)
    converted = pointfuse.convert(copy.deepcopy(plain))
    for decay in (0.9, 0.5):
        for model in (plain, converted):
            for ours, theirs in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
                if ours.is_floating_point():
                    ours.data.mul_(decay).add_(theirs.data, alpha=1 - decay)
        before = answer(pointfuse.freeze(converted))
        assert gap(answer(converted), answer(plain)) <= 2e-6
        assert gap(before, answer(plain)) <= 2e-6


# Wrapped in DistributedDataParallel


@pytest.mark.usefixtures("one_process")
def test_states_go_in_and_out_of_distributed_data_parallel() -> None:
    plain, converted = network(1), pointfuse.convert(network(1))
    wrapped = DistributedDataParallel(converted)
    assert list(wrapped.state_dict()) == [f"module.{name}" for name in plain.state_dict()]
    wrapped(images()).square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters())
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    state = through_a_file(wrapped.state_dict(), weights_only=True)
    other = DistributedDataParallel(network(2))
    assert str(other.load_state_dict(state, strict=True)) == MATCHED
    assert gap(answer(other), answer(wrapped)) <= 2e-6
    assert str(wrapped.load_state_dict(other.state_dict(), strict=True)) == MATCHED
    consume_prefix_in_state_dict_if_present(state, "module.")
    for taker in (plain, converted, pointfuse.revert(converted)):
        assert str(taker.load_state_dict(state, strict=True)) == MATCHED
        assert gap(answer(taker), answer(wrapped)) <= 2e-6
    frozen = pointfuse.freeze(wrapped.module)
    assert any(isinstance(m, FoldedConv2d) for m in frozen.modules())
    assert gap(answer(frozen), answer(wrapped)) <= 2e-6
