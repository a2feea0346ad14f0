"""Published architectures convert whole: the expected units, the same answers, state and classes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import assert_trains_like, gap, images, tensors_of, trained
from models_for_tests import one_thread as one_thread
from torch import nn

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


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """``torchvision.models``, also where torchvision's own operators were built for another PyTorch."""
    library = None
    try:
        import torchvision.models
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    yield torchvision.models
    del library


def build(models: Any, name: str) -> nn.Module:
    options = {
        "googlenet": {"aux_logits": False, "init_weights": False},
        "inception_v3": {"aux_logits": False, "init_weights": False},
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(models, name)(weights=None, num_classes=10, **options.get(name, {}))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    if name == "vgg11_bn":
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, 10)
    return model


CASES = [
    pytest.param("resnet18", RESNET18, 20, 33, id="resnet18"),
    pytest.param("resnet50", RESNET50, 53, 33, id="resnet50"),
    pytest.param("mobilenet_v2", MOBILENET_V2, 52, 33, id="mobilenet_v2"),
    pytest.param("densenet121", DENSENET121, 120, 33, id="densenet121"),
    pytest.param("vgg11_bn", VGG11, 8, 33, id="vgg11_bn"),
    pytest.param("googlenet", GOOGLENET, 57, 33, id="googlenet"),
    pytest.param("inception_v3", INCEPTION_V3, 94, 75, id="inception_v3"),
]


@pytest.mark.parametrize(("name", "units", "convolutions", "size"), CASES)
def test_a_torchvision_model_converts_and_reverts(
    models: Any, name: str, units: int, convolutions: int, size: int
) -> None:
    model = build(models, name)
    x = images(2, 3, size, size)
    plan = pointfuse.plan(model, x)
    assert sum(u.bn is not None for u in plan.units) == units
    assert len(plan.units) + len(plan.skipped) == convolutions
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
def test_a_torchvision_model_freezes(
    models: Any, name: str, units: int, convolutions: int, size: int, example: bool
) -> None:
    model = trained(build(models, name)).eval()
    x = images(2, 3, size, size)
    frozen = pointfuse.freeze(model, x if example else None)
    with torch.no_grad():
        exact, expected, actual = copy.deepcopy(model).double()(x.double()), model(x), frozen(x)
    assert gap(actual.double(), exact) <= 2 * gap(expected.double(), exact) + 1e-6
    assert gap(frozen(x), actual) <= 1e-6


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
