"""Modules that other parts of PyTorch make or change: each is converted with equal answers or named with the reason."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import ConvBNAct, assert_trains_like, gap, images, trained, unit
from models_for_tests import one_thread as one_thread
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

from benchmarks.models.packages import package

pytestmark = [
    pytest.mark.filterwarnings("ignore:pointfuse.convert found no unit"),
    # PyTorch's own: TorchScript and torch.ao.quantization go on to work.
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min"),
]


def sequence(conv: nn.Module, bn: nn.Module) -> nn.Module:
    return nn.Sequential(conv, bn, nn.ReLU())


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def soft_gamma() -> nn.Module:
    bn = nn.BatchNorm2d(4)
    parametrize.register_parametrization(bn, "weight", nn.Softplus())
    return bn


def tied_weights() -> nn.Module:
    model = nn.Sequential(*unit(), *unit())
    model[3].weight = model[0].weight
    return model


def shared_convolution() -> nn.Module:
    first, second = unit(), unit()
    return nn.Sequential(*first, first[0], *second[1:])


class Quantized(nn.Module):
    """Two units, of which the first is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.first, self.second = sequence(conv(), nn.BatchNorm2d(4)), nn.Sequential(*unit())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dequant(self.first(self.quant(x))))


def prepared() -> nn.Module:
    model = trained(Quantized()).eval()
    torch.ao.quantization.fuse_modules(model.first, [["0", "1", "2"]], inplace=True)
    for part in (model.first, model.quant, model.dequant):
        part.qconfig = torch.ao.quantization.get_default_qconfig("qnnpack")
    model = torch.ao.quantization.prepare(model)
    model(images())
    return model


def quantization_aware() -> nn.Module:
    model = Quantized()
    torch.ao.quantization.fuse_modules_qat(model.first, [["0", "1", "2"]], inplace=True)
    model.first.qconfig = torch.ao.quantization.get_default_qat_qconfig("qnnpack")
    return torch.ao.quantization.prepare_qat(model)


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(trained(nn.Sequential(*unit())).eval()), *unit())


class ScriptedParts(ConvBNAct):
    """A traced module with parts in TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.jit.script(nn.Sequential(conv(), nn.ReLU())), torch.jit.script(nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.unit(self.before(x)))


# By name: the model, the convolutions of its units, and of what is skipped a part of the name with one of the reason.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "weight_norm": (lambda: sequence(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)), ["0"], {}),
    "spectral_norm": (lambda: sequence(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4)), ["0"], {}),
    "a parametrised batch norm": (lambda: sequence(conv(), soft_gamma()), ["0"], {}),
    "weight_norm by hooks": (
        lambda: sequence(nn.utils.weight_norm(conv()), nn.BatchNorm2d(4)), [], {"0": "has hooks"}),
    "pruned": (
        lambda: sequence(prune.random_unstructured(conv(), "weight", 0.5), nn.BatchNorm2d(4)), [], {"0": "has hooks"}),
    "pruned for good": (
        lambda: sequence(prune.remove(prune.random_unstructured(conv(), "weight", 0.5), "weight"), nn.BatchNorm2d(4)),
        ["0"], {}),
    "tied weights": (tied_weights, ["0", "3"], {}),
    "a convolution in two units": (shared_convolution, ["0", "3"], {}),
    "group norm": (lambda: sequence(conv(), nn.GroupNorm(2, 4)), [], {"0": "GroupNorm follows"}),
    "instance norm": (
        lambda: sequence(conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), [],
        {"0": "InstanceNorm2d follows"}),
    "dropout between": (
        lambda: nn.Sequential(conv(), nn.Dropout2d(0.5), nn.BatchNorm2d(4)), [], {"0": "Dropout2d follows"}),
    "prepared for quantization": (prepared, ["first.0.0", "second.0"], {}),
    "quantized": (
        lambda: torch.ao.quantization.convert(prepared()), ["second.0"],
        {"first.0": "it is quantized (torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d), not an nn.Con"}),
    "quantization-aware": (quantization_aware, ["second.0"], {"first.0": "ConvBnReLU2d has a forward of its own"}),
    "a child in TorchScript": (scripted, ["1"], {"0.0": "it is TorchScript: convert the Python module"}),
    "parts in TorchScript": (ScriptedParts, ["conv"], {"before.0": "it is TorchScript"}),
    "a graph of torch.fx": (lambda: fx.symbolic_trace(nn.Sequential(*unit(), ConvBNAct())), ["0", "3.conv"], {}),
    "a graph of torch.fx as a child": (
        lambda: nn.Sequential(fx.symbolic_trace(ConvBNAct()), *unit()), ["0.conv", "1"], {}),
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, list[str], dict[str, str]]]:
    make, units, skipped = request.param
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "qnnpack"
        yield trained(make()).eval(), units, skipped
    torch.backends.quantized.engine = engine


@pytest.mark.parametrize("example", [None, images()], ids=["without example inputs", "with example inputs"])
def test_it_answers_as_before_in_every_form(case: Any, example: Tensor | None) -> None:
    model, units, skipped = case
    x = images()
    with torch.no_grad():
        expected = model(x)
    plan = pointfuse.plan(model, example)
    assert [u.conv for u in plan.units] == units
    assert [s.name for s in plan.skipped] == list(skipped)
    assert all(reason in s.reason for s, reason in zip(plan.skipped, skipped.values(), strict=True)), plan.skipped
    converted, frozen = pointfuse.convert(model, example), pointfuse.freeze(model, example)
    reverted = pointfuse.revert(converted)
    forms = [model, converted, frozen, reverted, copy.deepcopy(converted), copy.deepcopy(frozen)]
    with torch.no_grad():
        assert max(gap(form(x), expected) for form in forms) <= 2e-6
    shared = zip([*model.parameters(), *model.buffers()], [*converted.parameters(), *converted.buffers()], strict=True)
    assert all(a is b for a, b in shared)
    owned = {t.data_ptr() for t in (*frozen.parameters(), *frozen.buffers()) if t.numel()}
    assert not owned & {t.data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("name", ["weight_norm", "a parametrised batch norm", "tied weights", "a graph of torch.fx"])
def test_it_trains_as_before(name: str) -> None:
    model = trained(MODELS[name][0]())
    assert_trains_like(pointfuse.convert(copy.deepcopy(model)), model, images())


# TorchScript


def test_verifying_runs_torchscript_in_both_modes_and_leaves_it_as_it_was() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(*unit())), *unit()).train()
    before = [b.clone() for b in model.buffers()]
    converted = pointfuse.convert(model, images(), verify=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(m.training for m in model.modules())
    converted.eval()
    assert not any(m.training for m in converted.modules())
    assert model[0].training
    with torch.no_grad():
        statistics = model[0].state_dict()["1.running_mean"].clone()
        converted(images())  # in evaluation mode, which TorchScript's own code has to see
        assert torch.equal(model[0].state_dict()["1.running_mean"], statistics)


# Graphs of torch.fx


def negate(graph: fx.GraphModule) -> None:
    """Put a minus before the output."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(torch.neg, (output.args[0],)),)
    graph.recompile()


def test_a_graph_that_is_changed_after_conversion_runs_as_changed() -> None:
    plain = trained(nn.Sequential(*unit(), ConvBNAct())).eval()
    converted = pointfuse.convert(fx.symbolic_trace(plain), inplace=True)
    fused = type(converted).__mro__
    with torch.no_grad():
        expected = plain(images())
        assert gap(converted(images()), expected) <= 2e-6
        negate(converted)
        assert gap(converted(images()), -expected) <= 2e-6
        assert len(type(converted).__mro__) == len(fused)
        assert [u.conv for u in pointfuse.plan(converted).units] == ["0", "3.conv"]
        reverted = pointfuse.revert(converted, inplace=True)
        assert gap(reverted(images()), -expected) == 0
        negate(reverted)
        again = pointfuse.convert(reverted, inplace=True)
        assert gap(again(images()), expected) <= 2e-6


@pytest.mark.parametrize("form", [pointfuse.convert, pointfuse.freeze], ids=["converted", "frozen"])
def test_a_graph_is_pickled_and_stays_what_it_is(form: Callable[..., nn.Module]) -> None:
    model = trained(fx.symbolic_trace(nn.Sequential(*unit(), ConvBNAct()))).eval()
    made = form(model)
    loaded = pickle.loads(pickle.dumps(made))
    with torch.no_grad():
        assert gap(loaded(images()), model(images())) <= 2e-6
    assert type(loaded)._pointfuse_kind == type(made)._pointfuse_kind
    if form is pointfuse.freeze:
        with pytest.raises(RuntimeError, match="cannot be trained"):
            loaded.train()
    else:
        assert type(pointfuse.revert(loaded)).__mro__[1] is fx.GraphModule


@pytest.fixture
def models() -> Any:
    try:
        return package("torchvision.models")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_a_feature_extractor_keeps_its_mode_and_follows_when_it_is_switched(models: Any) -> None:
    """Torchvision's has a graph for each mode, and its copies forget theirs."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = trained(create_feature_extractor(models.resnet18(), {"layer1": "out"})).eval()
    converted = pointfuse.convert(extractor)
    assert not any(m.training for m in converted.modules())
    plain = copy.deepcopy(extractor).eval()
    x = images(2, 3, 32, 32)
    for mode in (False, True, False):
        with torch.no_grad():
            assert gap(converted.train(mode)(x), plain.train(mode)(x)) <= 1e-6
        assert [u.conv for u in pointfuse.plan(converted).units][:2] == ["conv1", "layer1.0.conv1"]


class CopiesItself(ConvBNAct):
    """A class with a ``__deepcopy__`` of its own, which asks for the very class."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        assert type(self) is CopiesItself
        made = CopiesItself()
        made.load_state_dict(self.state_dict())
        return made.train(self.training)


def test_a_class_that_copies_itself_is_copied_in_its_own_way() -> None:
    model = trained(CopiesItself()).eval()
    converted = pointfuse.convert(model, inplace=True)
    copied = copy.deepcopy(converted)
    with torch.no_grad():
        assert gap(copied(images()), converted(images())) == 0
    assert type(copied) is type(converted)
    assert copied.conv is not converted.conv


# Not initialised


def test_an_uninitialised_module_is_left_alone_and_not_frozen() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).eval()

    model = lazy()
    assert {s.name: s.reason for s in pointfuse.plan(model).skipped} == {"0": "it has hooks or a forward of its own"}
    converted = pointfuse.convert(model)
    with pytest.raises(ValueError, match=r"reads the weights, and 0\.weight is uninitialised: run the model once"):
        pointfuse.freeze(model)
    with torch.no_grad():
        expected = converted(images())
        assert gap(model(images()), expected) == 0
        frozen = pointfuse.freeze(lazy(), images())
        assert frozen(images()).shape == expected.shape
    # Once it has run it is as any other.
    assert [u.conv for u in pointfuse.plan(converted).units] == ["0"]
    with torch.no_grad():
        assert gap(pointfuse.freeze(converted)(images()), expected) <= 2e-6


def test_a_model_on_the_meta_device_is_planned_and_converted_and_not_frozen() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*unit(), ConvBNAct()).eval()
        x = torch.empty(2, 4, 8, 8)
    plan = pointfuse.plan(model, x)
    assert [(u.conv, u.output_shape) for u in plan.units] == [("0", (2, 4, 8, 8)), ("3.conv", (2, 4, 8, 8))]
    converted = pointfuse.convert(model, x)
    assert converted(x).is_meta
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device, without numbers: call model\.to_empty"):
        pointfuse.freeze(model, x)
    with pytest.raises(ValueError, match=r"convert\(verify=True\) reads the weights, and 0\.weight is on the meta"):
        pointfuse.convert(model, x, verify=True)
    plain = trained(nn.Sequential(*unit(), ConvBNAct())).eval()
    converted.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        assert gap(converted(images()), plain(images())) <= 2e-6


def test_frozen_batch_norm_of_torchvision_is_named(models: Any) -> None:
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = sequence(conv(), FrozenBatchNorm2d(4)).eval()
    model[1].running_var.fill_(3.0)
    (skipped,) = pointfuse.plan(model).skipped
    assert skipped.reason.startswith("FrozenBatchNorm2d follows")
    with torch.no_grad():
        assert gap(pointfuse.freeze(model, images())(images()), model(images())) <= 2e-6
