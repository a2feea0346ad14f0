"""A plan lists every unit the data flow proves, and every other convolution with its reason; it changes nothing."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

import pointfuse
import pytest
import torch
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
    QuietConv,
    functional_unit,
    images,
    trained,
    unit,
)
from models_for_tests import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


def rows(model: nn.Module, example: Any = None) -> list[tuple[Any, ...]]:
    return [(u.conv, u.bn, u.act, u.activation, u.residual) for u in pointfuse.plan(model, example).units]


def reasons(model: nn.Module, example: Any = None) -> dict[str, str]:
    return {s.name: s.reason for s in pointfuse.plan(model, example).skipped}


def test_a_shared_activation_object_serves_every_unit_of_a_bottleneck() -> None:
    assert rows(Bottleneck(downsample=nn.Sequential(*unit()[:2]))) == [
        ("conv1", "bn1", "relu", "relu", None),
        ("conv2", "bn2", "relu", "relu", None),
        ("conv3", "bn3", "relu", "relu", "add_act"),
        ("downsample.0", "downsample.1", None, "identity", None),
    ]


def test_a_shared_activation_object_in_a_sequential_does_not_shift_the_names() -> None:
    act = nn.ReLU()
    model = nn.Sequential(*unit(act=act), *unit(act=act), *unit(act=act))
    assert rows(model) == [("0", "1", "2", "relu", None), ("3", "4", "5", "relu", None), ("6", "7", "8", "relu", None)]


def test_the_residual_after_the_activation_is_act_add() -> None:
    assert [row[-1] for row in rows(DarknetBlock())] == [None, "act_add"]


def test_matching_follows_the_calls_and_not_the_definition() -> None:
    assert {row[:3] for row in rows(DefinedBackwards())} == {("conv_a", "bn_a", "act"), ("conv_b", "bn_b", "act")}


def test_units_in_lists_and_dicts_are_found_through_loops() -> None:
    assert [row[:3] for row in rows(Loop())] == [
        ("convs.0", "bns.0", "acts.relu"),
        ("convs.1", "bns.1", "acts.leaky"),
        ("convs.2", "bns.2", "acts.relu"),
    ]


def test_functional_activations_have_no_module() -> None:
    model = Forward(lambda self, x: F.leaky_relu(self.bn(self.conv(x)), 0.3))
    assert rows(model) == [("conv", "bn", None, "leaky_relu", None)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(lambda self, x: self.conv(x) + self.bn(self.conv(x)), "more than one place|nothing follows|add",
                     id="convolution called twice, once without batch norm"),
        pytest.param(lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), "more than one place",
                     id="result used twice"),
        pytest.param(lambda self, x: functional_unit(self, x), "functional batch_norm", id="functional batch norm"),
        pytest.param(lambda self, x: torch.cat([self.conv(x), x], 1), "cat", id="concatenated"),
        pytest.param(lambda self, x: self.conv(x), "nothing follows", id="result returned"),
        pytest.param(lambda self, x: self.bn(self.act(x)), "does not call it", id="never called"),
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x))) if x.sum() > 0 else x, "branches on a value",
                     id="branch on a value"),
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x))) if x.shape[0] > 1 else x, "example_inputs",
                     id="branch on a shape"),
        pytest.param(lambda self, x: self.unit(x) + torch.rand(1), "constants", id="makes a random tensor"),
        pytest.param(lambda self, x: self.unit(x) + torch.zeros(1), "constants", id="makes zeros"),
        pytest.param(lambda self, x: self.unit(x) + torch.tensor(1.0), "constants|tensor", id="makes a tensor"),
        pytest.param(lambda self, x: setattr(self, "seen", 1) or self.unit(x), "assigns self.seen",
                     id="assigns an attribute"),
        pytest.param(lambda self, x: nn.ReLU()(self.bn(self.conv(x))), "", id="makes a module"),
        pytest.param(lambda self, x: [self.unit(row[None]) for row in x], "", id="iterates over its input"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_skipped_with_the_reason(body: Any, reason: str) -> None:
    plan = pointfuse.plan(Forward(body))
    assert "conv" in {s.name for s in plan.skipped}
    assert any(re.search(reason, s.reason) and s.reason for s in plan.skipped), plan.skipped


@pytest.mark.parametrize(
    ("body", "residual"),
    [
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x)) + x), "add_act", id="sum before the activation"),
        pytest.param(lambda self, x: self.act(x + self.bn(self.conv(x))), "add_act", id="sum from the other side"),
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x)).add_(x)), "add_act", id="add_ method"),
        pytest.param(lambda self, x: self.act(torch.add(self.bn(self.conv(x)), x)), "add_act", id="torch.add"),
        pytest.param(lambda self, x: self.unit(x) + x, "act_add", id="sum after the activation"),
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x)) + 1.0), None, id="adds a number"),
        pytest.param(lambda self, x: self.act(torch.add(self.bn(self.conv(x)), x, alpha=2)), None, id="alpha"),
        pytest.param(lambda self, x: self.act(x.clone().add_(self.bn(self.conv(x)))), None, id="added into the other"),
        pytest.param(lambda self, x: (lambda z: self.act(z + z))(self.bn(self.conv(x))), None, id="added to itself"),
        pytest.param(lambda self, x: self.act(self.bn(self.conv(x)) - x), None, id="difference"),
    ],
)  # fmt: skip
def test_a_residual_is_part_of_the_unit_only_where_it_is_a_plain_sum(body: Any, residual: str | None) -> None:
    (found,) = rows(Forward(body))
    assert found[:2] == ("conv", "bn")
    assert found[-1] == residual


@pytest.mark.parametrize(
    ("conv", "bn", "reason"),
    [
        pytest.param(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), "padding_mode",
                     id="reflect padding"),
        pytest.param(LoudConv(4, 4, 3, padding=1), nn.BatchNorm2d(4), "forward of its own", id="own forward"),
        pytest.param(nn.Conv2d(4, 4, 3, padding=1), FrozenBatchNorm2d(4), "FrozenBatchNorm2d", id="frozen batch norm"),
        pytest.param(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), "InstanceNorm2d", id="instance norm"),
        pytest.param(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), "hooks", id="lazy convolution"),
        pytest.param(prune.identity(nn.Conv2d(4, 4, 3, padding=1), "weight"), nn.BatchNorm2d(4), "hooks",
                     id="pruned convolution"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("container", ["sequential", "traced"])
def test_modules_that_are_not_plain_are_skipped_with_the_reason(
    conv: nn.Module, bn: nn.Module, reason: str, container: str
) -> None:
    if container == "sequential":
        model: nn.Module = nn.Sequential(conv, bn, nn.ReLU())
    else:
        model = ConvBNAct()
        model.conv, model.bn = conv, bn
    plan = pointfuse.plan(model)
    assert plan.units == ()
    (skipped,) = plan.skipped
    assert reason in skipped.reason


@pytest.mark.parametrize("place", ["conv", "bn", "act"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_module_with_hooks_is_no_part_of_a_unit(place: str, kind: str) -> None:
    model = ConvBNAct()
    getattr(getattr(model, place), kind)(lambda *a: None)
    found = rows(model)
    if place == "act":
        assert found == [("conv", "bn", None, "identity", None)]
    else:
        assert found == []
        assert "hooks" in reasons(model)["conv"]


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(QuietConv(4, 4, 3), id="a subclass without a forward"),
        pytest.param(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), id="weight_norm parametrization"),
        pytest.param(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), id="spectral_norm parametrization"),
    ],
)
def test_what_leaves_forward_alone_is_supported(module: nn.Module) -> None:
    assert rows(nn.Sequential(module, BiasFreeBN(4), nn.SiLU())) == [("0", "1", "2", "silu", None)]


def test_example_inputs_let_a_plan_follow_branches_on_shapes() -> None:
    model = Forward(lambda self, x: self.unit(x) if x.shape[0] > 1 else x)
    assert rows(model) == []
    assert [row[0] for row in rows(model, images())] == ["conv"]
    (found,) = pointfuse.plan(model, images()).units
    assert (found.input_shape, found.output_shape) == ((2, 4, 8, 8), (2, 4, 8, 8))


@pytest.mark.parametrize(
    "example",
    [
        pytest.param([images(2, 2, 8, 8), images(2, 2, 8, 8)], id="a list"),
        pytest.param(images(), id="a tensor"),
    ],
)
def test_isinstance_branches_follow_the_example(example: Any) -> None:
    assert [row[0] for row in rows(ListOrTensor(), (example,))] == ["conv"]


def test_optional_arguments_do_not_prevent_a_plan() -> None:
    assert [row[0] for row in rows(OptionalMask())] == ["conv"]


@pytest.mark.parametrize("default", [None, True, 2.0, "name", (1, 2), [1], {"a": 1}], ids=repr)
def test_any_default_value_is_planned_or_refused_but_does_not_crash(default: Any) -> None:
    class Model(ConvBNAct):
        def forward(self, x: Tensor, option: Any = default) -> Tensor:
            return self.unit(x)

    plan = pointfuse.plan(Model())
    assert [*(u.conv for u in plan.units), *(s.name for s in plan.skipped)] == ["conv"]


@pytest.mark.parametrize("name", ["1x1", "class", "run_unit", "torch", "a-b", "self"])
def test_any_module_name_is_planned_or_refused_but_does_not_crash(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Conv2d(4, 4, 3))
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(getattr(self, name)(x))

    plan = pointfuse.plan(Model())
    assert [*(u.conv for u in plan.units), *(s.name for s in plan.skipped)] == [name]


def test_a_forward_that_reads_a_buffer_is_planned() -> None:
    model = Forward(lambda self, x: self.unit(x) * self.scale)
    model.register_buffer("scale", torch.ones(1))
    assert [row[0] for row in rows(model)] == ["conv"]


def test_two_names_of_one_module_are_one_unit() -> None:
    model = ConvBNAct()
    model.alias = model.conv
    assert [row[1:3] for row in rows(model)] == [("bn", "act")]
    host = nn.Sequential(block := ConvBNAct(), block)
    assert [row[0] for row in rows(host)] == ["0.conv"]


def test_a_module_that_only_holds_names_does_not_hide_its_units() -> None:
    class Namespace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Module()
            self.stem.conv, self.stem.bn, self.stem.act = unit()
            self.conv, self.bn, self.act = unit()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(self.stem.act(self.stem.bn(self.stem.conv(x))))))

    plan = pointfuse.plan(Namespace())
    names = [u.conv for u in plan.units] + [s.name for s in plan.skipped]
    assert sorted(names) == ["conv", "stem.conv"]


def test_every_convolution_is_listed_once() -> None:
    class CallsGrandchildren(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*unit(), *unit())
            self.head = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body[2](self.body[1](self.body[0](x))))

    for model in (CallsGrandchildren(), Loop(), Bottleneck(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))):
        plan = pointfuse.plan(model)
        convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert sorted([u.conv for u in plan.units] + [s.name for s in plan.skipped]) == sorted(convs)


def test_a_convolution_in_a_list_that_is_never_called_is_listed() -> None:
    model = Forward(lambda self, x: self.unit(x), spare=nn.ModuleList([nn.Conv2d(4, 4, 1)]))
    assert "does not call it" in reasons(model)["spare.0"]


def test_a_convolution_that_is_the_whole_model_is_listed() -> None:
    plan = pointfuse.plan(nn.Conv2d(4, 4, 1))
    assert plan.units == ()
    assert len(plan.skipped) == 1


def test_an_empty_model_has_an_empty_plan() -> None:
    for model in (nn.Sequential(), nn.ModuleList(), nn.Linear(2, 2)):
        assert pointfuse.plan(model).to_dict() == {"units": [], "skipped": []}


def test_an_in_place_write_to_the_input_between_convolution_and_sum_prevents_the_sum() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        x = F.relu_(x)
        return self.act(y + x)

    ((_, _, act, activation, residual),) = rows(Forward(body))
    assert (act, activation, residual) == (None, "identity", None)


def test_a_write_to_the_input_between_convolution_and_batch_norm_prevents_the_unit() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.add_(1)
        return self.bn(y) * x

    assert rows(Forward(body)) == []
    assert "may change its input" in reasons(Forward(body))["conv"]


def test_two_convolutions_that_feed_one_sum_give_the_sum_to_one_of_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn_a, self.act = unit()
            self.b, self.bn_b, _ = unit()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn_a(self.a(x)) + self.bn_b(self.b(x)))

    found = rows(Both())
    assert sorted(row[0] for row in found) == ["a", "b"]
    assert sorted(str(row[-1]) for row in found) == ["None", "add_act"]


def test_a_plan_changes_nothing() -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
    models = [
        trained(nn.Sequential(Bottleneck(), DarknetBlock(), Loop())),
        nn.Sequential(spectral, nn.BatchNorm2d(4), nn.ReLU()),
    ]
    for model in models:
        model[0].eval()
        model[1].train()
        classes = [type(m) for m in model.modules()]
        modes = [m.training for m in model.modules()]
        state = copy.deepcopy(model.state_dict())
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        pointfuse.plan(model)
        pointfuse.plan(model, images())
        assert [type(m) for m in model.modules()] == classes
        assert [m.training for m in model.modules()] == modes
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_plan_of_a_spectral_norm_in_training_mode_takes_no_power_iteration() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    pointfuse.plan(model)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []


def test_a_plan_leaves_the_random_state_alone() -> None:
    model = Forward(lambda self, x: self.unit(x + torch.rand_like(x)))
    before = torch.get_rng_state()
    pointfuse.plan(model, images())
    assert torch.equal(torch.get_rng_state(), before)


def test_tracing_leaves_nothing_behind_in_the_models_own_lists() -> None:
    model = Forward(lambda self, x: self.seen.append(self.unit(x)) or self.seen[-1], seen=[])
    pointfuse.plan(model)
    assert model.seen == []


def test_tracing_does_not_assign_attributes_of_children() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        self.bn.momentum = 0.5
        return self.unit(x)

    model = Forward(body)
    pointfuse.plan(model)
    assert model.bn.momentum == 0.1


def test_drawing_from_pythons_generator_in_forward_is_refused() -> None:
    model = Forward(lambda self, x: x if random.random() < 0.5 else self.unit(x))
    state = random.getstate()
    assert rows(model) == []
    assert random.getstate() == state


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(torch.no_grad, id="no_grad"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
        pytest.param(torch.inference_mode, id="inference_mode"),
    ],
)
def test_a_context_inside_forward_that_a_trace_would_lose_is_refused(context: Any) -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        with context():
            return self.unit(x)

    assert rows(Forward(body)) == []


def test_a_plan_prints_as_a_table_and_is_plain_data() -> None:
    plan = pointfuse.plan(nn.Sequential(*unit(), nn.Conv2d(4, 2, 1)), images())
    text = str(plan)
    assert "1 units, 1 convolutions skipped" in text
    assert "leaky_relu (2)" in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["units"][0]["input_shape"] == [2, 4, 8, 8]
    assert data["skipped"] == [{"name": "3", "reason": "nothing follows that could be fused"}]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(3, "takes an nn.Module, not a int", id="a number"),
        pytest.param(nn.Sequential, "takes an nn.Module, not a type", id="a class"),
        pytest.param(torch.compile(nn.Sequential(*unit())), "compiled", id="a compiled model"),
        pytest.param(nn.DataParallel(nn.Sequential(*unit())), "DataParallel", id="a DataParallel"),
        pytest.param(torch.jit.trace(nn.Sequential(*unit()).eval(), images()), "ScriptModule", id="a ScriptModule"),
    ],
)
@pytest.mark.parametrize("function", [pointfuse.plan, pointfuse.convert, pointfuse.freeze], ids=lambda f: f.__name__)
def test_a_model_of_the_wrong_kind_is_refused_by_name(model: Any, message: str, function: Any) -> None:
    with pytest.raises(TypeError, match=message):
        function(model)


def test_example_inputs_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="example_inputs is a int"):
        pointfuse.plan(Bottleneck(), 3)  # type: ignore[arg-type]


def test_drawing_from_pythons_generator_is_refused_whatever_is_drawn() -> None:
    model = Forward(lambda self, x: self.unit(x) if random.random() < 2 else x)
    before = random.getstate()
    assert "draws random numbers" in reasons(model)["conv"]
    assert random.getstate() == before
