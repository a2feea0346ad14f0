"""Published architectures convert whole: the expected units, the same answers, state and classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import assert_trains_like, gap, images, tensors_of, trained
from models_for_tests import one_thread as one_thread
from torch import Tensor, nn

from benchmarks.models.packages import build
from benchmarks.models.yolov3 import YOLOv3

# Convolutions with a batch norm behind them and, of these, with an activation; from the papers' tables.
RESNET18 = 1 + 2 * 2 * 4 + 3
RESNET50 = 1 + 3 * (3 + 4 + 6 + 3) + 4
MOBILENET_V2 = 1 + 2 + 3 * 16 + 1
VGG11 = 8
GOOGLENET = 3 + 9 * 6
INCEPTION_V3 = 5 + 3 * 7 + 4 + 4 * 10 + 6 + 2 * 9
# Batch norm comes before the convolution in DenseNet, but for the stem and between the two of a dense layer.
DENSENET121 = 1 + (6 + 12 + 24 + 16)
DARKNET53 = 1 + 5 + 2 * (1 + 2 + 8 + 8 + 4)
CSPDARKNET53 = 1 + 5 + 2 * (1 + 2 + 8 + 8 + 4) + 3 * 5
# The last convolution of each of the 10 + 20 + 10 residual blocks has a bias instead.
INCEPTION_RESNET_V2 = 244 - (10 + 20 + 10)
SKRESNET18 = 44 - 8


def make(name: str) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 10}
    if name in ("torchvision/googlenet", "torchvision/inception_v3"):
        options["aux_logits"] = False
    try:
        model = build(name, **options)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    if name == "torchvision/vgg11_bn":
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, 10)
    return model


def case(name: str, units: int, convolutions: int, size: int = 33) -> Any:
    return pytest.param(name, units, convolutions, size, id=name)


CASES = [
    case("torchvision/resnet18", RESNET18, 20),
    case("torchvision/resnet50", RESNET50, 53),
    case("torchvision/mobilenet_v2", MOBILENET_V2, 52),
    case("torchvision/densenet121", DENSENET121, 120),
    case("torchvision/vgg11_bn", VGG11, 8),
    case("torchvision/googlenet", GOOGLENET, 57),
    case("torchvision/inception_v3", INCEPTION_V3, 94, 75),
    case("timm/darknet53", DARKNET53, 52),
    case("timm/cspdarknet53", CSPDARKNET53, 67),
    case("timm/resnet50", RESNET50, 53),
    case("timm/inception_resnet_v2", INCEPTION_RESNET_V2, 244, 75),
    case("timm/mobilenetv2_100", MOBILENET_V2, 52),
    # Two convolutions in each of its 16 squeeze-and-excitation modules have no batch norm.
    case("timm/efficientnet_b0", 81 - 2 * 16, 81),
    case("timm/ghostnet_100", 95 - 2 * 7 - 1, 95),
    # One convolution in each of its 8 selective kernels, that weighs the branches, has no batch norm.
    case("timm/skresnet18", SKRESNET18, 44),
]


@pytest.mark.parametrize(("name", "units", "convolutions", "size"), CASES)
def test_a_published_model_converts_and_reverts(name: str, units: int, convolutions: int, size: int) -> None:
    model = trained(make(name))
    x = images(2, 3, size, size)
    plan = pointfuse.plan(model, x)
    assert len({u.conv for u in plan.units if u.bn is not None}) == units
    assert len({u.conv for u in plan.units}) + len(plan.skipped) == convolutions
    assert all(s.reason for s in plan.skipped)

    converted = pointfuse.convert(copy.deepcopy(model), x)
    assert str(converted.load_state_dict(model.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert list(converted.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert gap(converted.eval()(x), model.eval()(x)) <= 1e-5
    # With two values a channel in the last planes, batch norm after batch norm would amplify the last digit 1e10 times.
    assert_trains_like(converted, model, images(8, 3, size, size), tolerance=1e-7)
    assert [type(m) for m in pointfuse.revert(converted).modules()] == [type(m) for m in model.modules()]


@pytest.mark.filterwarnings("ignore:pointfuse")
@pytest.mark.parametrize("example", [True, False], ids=["with example inputs", "without example inputs"])
@pytest.mark.parametrize(("name", "units", "convolutions", "size"), CASES)
def test_a_published_model_freezes(name: str, units: int, convolutions: int, size: int, example: bool) -> None:
    model = trained(make(name)).eval()
    x = images(2, 3, size, size)
    frozen = pointfuse.freeze(model, x if example else None)
    with torch.no_grad():
        exact, expected, actual = copy.deepcopy(model).double()(x.double()), model(x), frozen(x)
    assert gap(actual.double(), exact) <= 2 * gap(expected.double(), exact) + 1e-6
    assert gap(frozen(x), actual) <= 1e-6


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output in training mode, and all gradients and running statistics end to end, in float64."""
    y = model.train()(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return y.detach().double(), torch.cat([t.double().flatten() for t in (*gradients, *statistics)])


@pytest.mark.parametrize(("name", "units", "convolutions", "size"), CASES)
def test_a_published_model_is_as_accurate_in_bf16(name: str, units: int, convolutions: int, size: int) -> None:
    model = trained(make(name))
    x = images(8, 3, size, size)
    exact = copy.deepcopy(model).double()
    eager, converted = (m.bfloat16() for m in (copy.deepcopy(model), pointfuse.convert(copy.deepcopy(model), x)))
    with torch.no_grad():
        y, expected, actual = (m.eval()(x.to(d)).double() for m, d in forms(exact, eager, converted))
    assert (actual - y).norm() <= 2 * (expected - y).norm() + 1e-6 * y.norm()
    reference, *found = (step(m, x.to(d)) for m, d in forms(exact, eager, converted))
    for y, expected, actual in zip(reference, *found, strict=True):
        assert (actual - y).norm() <= 2 * (expected - y).norm() + 1e-6 * y.norm()


def forms(exact: nn.Module, *others: nn.Module) -> list[tuple[nn.Module, torch.dtype]]:
    return [(exact, torch.float64), *((m, torch.bfloat16) for m in others)]


@pytest.fixture(scope="module")
def yolov3() -> YOLOv3:
    torch.manual_seed(0)
    return trained(YOLOv3(20))


def test_yolov3_converts_whole(yolov3: YOLOv3) -> None:
    plan = pointfuse.plan(yolov3)
    with_bn = [u for u in plan.units if u.bn is not None]
    assert len(with_bn) == 1 + 5 + 2 * (1 + 2 + 8 + 8 + 4) + 3 * 6 + 2 == 72
    assert {u.activation for u in with_bn} == {"leaky_relu"}
    assert sum(u.residual == "act_add" for u in with_bn) == 1 + 2 + 8 + 8 + 4
    assert {s.name for s in plan.skipped} == {f"last_layer{i}.6" for i in range(3)}


@pytest.mark.parametrize("form", [pointfuse.convert, pointfuse.freeze], ids=["converted", "frozen"])
def test_yolov3_answers_as_before(yolov3: YOLOv3, form: Callable[..., nn.Module]) -> None:
    x = images(1, 3, 64, 64)
    model = yolov3.eval()
    with torch.no_grad():
        expected = model(x)
        assert gap(form(model)(x), expected) <= 1e-5
        assert gap(form(model, x)(x), expected) <= 1e-5
    assert [tuple(t.shape) for t in tensors_of(expected)] == [(1, 75, 2, 2), (1, 75, 4, 4), (1, 75, 8, 8)]


def test_a_stack_of_yolov3_trains_as_before(yolov3: YOLOv3) -> None:
    stack = yolov3.last_layer2
    assert_trains_like(pointfuse.convert(copy.deepcopy(stack)), stack, images(2, 384, 4, 4))
