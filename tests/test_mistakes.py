"""What a user may get wrong: each mistake gives one clear error, or does no harm, and leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pointfuse
import pytest
import torch
from models_for_tests import ConvBNAct, gap, images, trained, unit
from models_for_tests import one_thread as one_thread
from pointfuse.folded import FoldedConv2d
from torch import Tensor, nn

FUNCTIONS = [pointfuse.plan, pointfuse.convert, pointfuse.freeze, pointfuse.revert]
WITH_INPUTS = FUNCTIONS[:3]
IN_PLACE = [functools.partial(f, inplace=True) for f in (pointfuse.convert, pointfuse.freeze)]


def name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"{function.func.__name__} in place"
    return function.__name__


class Intact:
    """A model of a sequential and a traced host, and what it has to be after whatever was done to it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = trained(nn.Sequential(*unit(), ConvBNAct())).eval()
        self.classes = [type(m) for m in self.model.modules()]
        self.state = copy.deepcopy(self.model.state_dict())
        self.answer = self.answer_of(self.model)

    def answer_of(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(images())

    def check(self) -> None:
        assert [type(m) for m in self.model.modules()] == self.classes
        assert [m.training for m in self.model.modules()] == [False] * len(self.classes)
        assert all(p.requires_grad for p in self.model.parameters())
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), self.state.values(), strict=True))
        assert torch.equal(self.answer_of(self.model), self.answer)


@pytest.fixture
def intact() -> Iterator[Intact]:
    made = Intact()
    yield made
    made.check()


# What is no model, or not the model


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        pytest.param(ConvBNAct, "type", id="a class"),
        pytest.param(None, "NoneType", id="None"),
        pytest.param({"conv.weight": torch.zeros(4)}, "dict", id="a state_dict"),
        pytest.param([ConvBNAct()], "list", id="a list of models"),
        pytest.param(lambda x: x, "function", id="a function"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS, ids=name)
def test_what_is_no_module_is_named(function: Any, given: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"pointfuse\.{name(function)} takes an nn\.Module, not a {kind}$"):
        function(given)


@pytest.mark.parametrize("function", FUNCTIONS, ids=name)
def test_a_model_behind_torch_compile_is_to_be_converted_first(function: Any, intact: Intact) -> None:
    compiled = torch.compile(intact.model, backend="eager")
    with pytest.raises(TypeError, match=rf"compiled: call pointfuse\.{name(function)} on the model first, then torch"):
        function(compiled)


def test_a_module_compiled_in_place_is_followed_and_a_copy_says_that_it_is_not_compiled(intact: Intact) -> None:
    compiled = copy.deepcopy(intact.model)
    compiled.compile(backend="eager")
    assert torch.equal(intact.answer_of(compiled), intact.answer)
    for function in (pointfuse.convert, pointfuse.freeze):
        with pytest.warns(UserWarning, match=r"compiled by their method compile\(\), which their copies are not"):
            copied = function(compiled)
        assert copied._compiled_call_impl is None
        assert gap(intact.answer_of(copied), intact.answer) <= 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = pointfuse.convert(compiled, inplace=True)
    assert converted._compiled_call_impl is not None
    assert gap(intact.answer_of(converted), intact.answer) <= 2e-6
    for p in converted.parameters():  # what was compiled before reads what is now
        p.data.mul_(0.5)
    plain = copy.deepcopy(intact.model)
    plain.load_state_dict(converted.state_dict())
    assert gap(intact.answer_of(converted), intact.answer_of(plain)) <= 2e-6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("function", FUNCTIONS, ids=name)
def test_a_model_in_distributed_data_parallel_is_to_be_converted_first(function: Any, intact: Intact) -> None:
    wrapped = nn.parallel.DistributedDataParallel(intact.model)
    with pytest.raises(
        TypeError, match=rf"wrapped in DistributedDataParallel: call pointfuse\.{name(function)} first, then wrap"
    ):
        function(wrapped)


# Example inputs

WRONG_INPUTS = {
    "rank": (lambda: torch.zeros(4, 8), RuntimeError, "conv2d", "which are 4x8 float32 on cpu"),
    "no batch": (lambda: torch.zeros(4, 8, 8), ValueError, "expected 4D input", "which are 4x8x8 float32 on cpu"),
    "channels": (lambda: torch.zeros(2, 3, 8, 8), RuntimeError, "4 channels, but got 3", "2x3x8x8 float32 on cpu"),
    "dtype": (lambda: images().double(), RuntimeError, "", "2x4x8x8 float64 on cpu; the model's tensors are float32"),
    "integers": (lambda: images().long(), RuntimeError, "", "2x4x8x8 int64 on cpu; the model's tensors are float32 on"),
    "device": (lambda: images().to("meta"), RuntimeError, "meta", "on meta; the model's tensors are float32 on cpu"),
    "two arguments": (lambda: (images(), images()), TypeError, "takes 2 positional", r"\(2x4x8x8 float32 on cpu, 2x4"),
    "no argument": (lambda: (), TypeError, "missing 1 required", r"which are \(\)"),
    "another name": (lambda: {"y": images()}, TypeError, "keyword argument 'y'", r"which are \{y: 2x4x8x8 float32"),
    "sizes": (lambda: (2, 4, 8, 8), TypeError, "takes 2 positional", r"which are \(a int, a int, a int, a int\)"),
    "arrays in a list": (lambda: [np.zeros((2, 4, 8, 8), "f")], TypeError, "ndarray", r"which are \(a ndarray\)"),
}


@pytest.mark.parametrize(("given", "error", "message", "note"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
@pytest.mark.parametrize("function", [*WITH_INPUTS, *IN_PLACE], ids=name)
def test_inputs_that_the_model_refuses_are_described(
    function: Any, given: Callable[[], Any], error: type[Exception], message: str, note: str, intact: Intact
) -> None:
    with pytest.raises(error, match=f"(?s){message}.*\nraised while .*{note}") as caught:
        function(intact.model, given())
    assert caught.value.__notes__[0].endswith("pass what the model itself can be called with")
    assert len(caught.value.__notes__) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(np.zeros((2, 4, 8, 8), "f"), "example_inputs is a ndarray; it must be a tensor, a tuple or list",
                     id="an array"),
        pytest.param("images", "example_inputs is a str; it must be a tensor, a tuple or list", id="a string"),
        pytest.param(224, "example_inputs is a int; it must be a tensor, a tuple or list", id="a number"),
        pytest.param((t for t in [images()]), "example_inputs is a generator; it must be", id="a generator"),
        pytest.param(torch.Size((2, 4, 8, 8)), r"example_inputs is a shape \(torch.Size\); pass a tensor of it",
                     id="a shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", WITH_INPUTS, ids=name)
@pytest.mark.parametrize("kind", ["sequential", "traced"])
def test_inputs_that_no_model_takes_are_named(function: Any, given: Any, message: str, kind: str) -> None:
    model = nn.Sequential(*unit()).eval() if kind == "sequential" else ConvBNAct().eval()
    with pytest.raises(TypeError, match=message) as caught:
        function(model, given)
    assert not hasattr(caught.value, "__notes__")


def test_verifying_needs_inputs(intact: Intact) -> None:
    with pytest.raises(ValueError, match="verify=True runs the models: pass example_inputs"):
        pointfuse.convert(intact.model, inplace=True, verify=True)


# Devices


def test_a_model_on_two_devices_is_converted_and_its_freezing_names_the_tensor() -> None:
    model = trained(nn.Sequential(ConvBNAct(), ConvBNAct())).eval()
    model[1].to("meta")
    classes = [type(m) for m in model.modules()]
    assert [u.conv for u in pointfuse.plan(model).units] == ["0.conv", "1.conv"]
    converted = pointfuse.convert(model)
    with torch.no_grad():
        assert gap(converted[0](images()), model[0](images())) <= 2e-6
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"1\.conv\.weight is on the meta device, without numbers"):
            pointfuse.freeze(model, inplace=inplace)
    with pytest.raises(RuntimeError, match="meta") as caught:
        pointfuse.convert(model, images(), inplace=True)
    assert "the model's tensors are float32 on cpu, float32 on meta" in caught.value.__notes__[0]
    assert [type(m) for m in model.modules()] == classes


# Modes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_converting_and_freezing_without_gradients_spoils_nothing(context: Any, intact: Intact) -> None:
    model = copy.deepcopy(intact.model)
    with context():
        converted, frozen = pointfuse.convert(model), pointfuse.freeze(model)
        checked = pointfuse.freeze(model, images())
        assert gap(frozen(images()), intact.answer) <= 2e-6  # where it is packed
    for made in (frozen, checked):
        assert gap(made(images()), intact.answer) <= 2e-6
        assert str(made.load_state_dict(pointfuse.freeze(model).state_dict())) == "<All keys matched successfully>"
        assert not any(t.is_inference() for t in made.state_dict().values())
        assert gap(made.double()(images().double()).float(), intact.answer) <= 2e-6
    converted.train()(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_in_training_mode_is_not_frozen_and_may_be_afterwards(intact: Intact) -> None:
    model = copy.deepcopy(intact.model).train()
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=r"freeze needs a model in evaluation mode: call model\.eval\(\) first"):
            pointfuse.freeze(model, images(), inplace=inplace)
    assert all(m.training for m in model.modules())
    assert gap(intact.answer_of(pointfuse.freeze(model.eval())), intact.answer) <= 2e-6


# Frozen models


def frozen_with_a_head(intact: Intact) -> nn.Module:
    """Frozen units, and behind them parameters that stay parameters."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.PReLU(), nn.Flatten(), nn.Linear(256, 2))
    return pointfuse.freeze(nn.Sequential(intact.model, *head).eval(), images())


def test_training_a_frozen_model_fails_at_the_first_step_that_asks_for_it(intact: Intact) -> None:
    frozen = pointfuse.freeze(intact.model)
    with pytest.raises(RuntimeError, match="a frozen model cannot be trained: its batch norms are folded"):
        frozen.train()
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        torch.optim.SGD(frozen.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        frozen(images()).sum().backward()
    with pytest.raises(RuntimeError, match=r"a frozen model has no gradient: call it under torch\.no_grad\(\), or use"):
        frozen(images().requires_grad_()).sum().backward()
    assert gap(intact.answer_of(frozen), intact.answer) <= 2e-6


def test_an_optimiser_moves_only_the_parameters_of_a_frozen_model_that_are_given_gradients(intact: Intact) -> None:
    frozen = frozen_with_a_head(intact)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert [n for n, _ in frozen.named_parameters()] == ["1.weight", "3.weight", "3.bias"]
    before = [p.clone() for p in frozen.parameters()]
    optimiser = torch.optim.SGD(frozen.parameters(), lr=0.1)
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))
    features = frozen[0](images())
    frozen[3].requires_grad_()
    frozen(images()).sum().backward()
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True)]
    assert moved == [False, True, True]
    assert torch.equal(frozen[0](images()), features)


def test_a_frozen_model_is_neither_converted_nor_reverted(intact: Intact) -> None:
    frozen = pointfuse.freeze(intact.model)
    with pytest.warns(UserWarning, match="found no unit in this model; it is frozen, and its units run fused already"):
        converted = pointfuse.convert(frozen)
    assert gap(intact.answer_of(converted), intact.answer) <= 2e-6
    with pytest.raises(RuntimeError, match=r"cannot be reverted: use the model that was given to pointfuse\.freeze"):
        pointfuse.revert(frozen, inplace=True)
    assert sum(isinstance(m, FoldedConv2d) for m in frozen.modules()) == 2
    assert gap(intact.answer_of(frozen), intact.answer) <= 2e-6


def test_the_state_of_a_plain_model_is_refused_by_a_frozen_one_and_the_other_way(intact: Intact) -> None:
    frozen = pointfuse.freeze(intact.model, images())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.folded_') as caught:
        frozen.load_state_dict(intact.model.state_dict())
    assert caught.value.__notes__ == [
        "this model is frozen, and the state_dict is not of a frozen model: load it into the model that was given to "
        "pointfuse.freeze, and freeze that again"
    ]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\.folded_weight'):
        copy.deepcopy(intact.model).load_state_dict(frozen.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.folded_weight") as other:
        frozen.load_state_dict({**frozen.state_dict(), "0.folded_weight": torch.zeros(1)})
    assert not hasattr(other.value, "__notes__")
    missing, unexpected = frozen.load_state_dict(intact.model.state_dict(), strict=False)
    assert len(missing) == 4
    assert len(unexpected) == 12
    assert gap(intact.answer_of(frozen), intact.answer) <= 2e-6


# Backends


@pytest.mark.parametrize("given", ["cudnn", "CUDA", "", None, 1, torch.device("cuda")], ids=repr)
def test_a_backend_of_another_name_is_refused_with_the_names(given: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"no such backend; the names are auto, cuda, triton, aten") as caught,
        pointfuse.use_backend(given),
    ):
        pass
    assert str(caught.value).startswith(f"use_backend({given!r})")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_without_its_gpu_is_refused_and_the_next_call_runs(backend: str, intact: Intact) -> None:
    converted = pointfuse.convert(intact.model)
    with (
        pytest.raises(RuntimeError, match=f"the {backend} backend cannot run here: .+; 'auto' takes the best usable"),
        pointfuse.use_backend(backend),
    ):
        pass
    assert gap(intact.answer_of(converted), intact.answer) <= 2e-6


def test_a_strictness_that_is_neither_0_nor_1_ends_the_run_with_its_name() -> None:
    environment = {**os.environ, "POINTFUSE_STRICT": "maybe"}
    done = subprocess.run([sys.executable, "-c", "import pointfuse"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: POINTFUSE_STRICT=maybe: it must be 0 or 1, or not be set"


@pytest.mark.parametrize(("value", "strict"), [("", False), ("0", False), ("1", True)])
def test_strictness_is_0_or_1(value: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTFUSE_STRICT", value)
    assert sys.modules["pointfuse.backends"]._as_flag("POINTFUSE_STRICT") is strict


def test_converting_where_nothing_fuses_warns_under_a_strict_backend_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)).eval()
    with (
        pointfuse.use_backend("aten", strict=True),
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"found no unit in this model; pointfuse\.plan\(model\) lists the reason"),
    ):
        assert gap(pointfuse.convert(model)(images()), model(images())) == 0


def test_converting_twice_and_freezing_twice_change_nothing(intact: Intact) -> None:
    once = pointfuse.convert(intact.model)
    assert pointfuse.convert(once, inplace=True) is once
    frozen = pointfuse.freeze(once)
    assert pointfuse.freeze(frozen) is frozen
    for model in (once, pointfuse.convert(once), frozen):
        assert gap(intact.answer_of(model), intact.answer) <= 2e-6
    assert [type(m) for m in pointfuse.revert(pointfuse.convert(once)).modules()] == intact.classes
