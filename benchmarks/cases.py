"""The suites: every distinct layer of the three heads, their last-layer stacks, whole networks, training steps of all
three, curves of one unit's cost, and a unit so small that what it costs to call it is all it costs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case
from benchmarks.models.packages import build
from benchmarks.models.yolov3 import (
    HEADS,
    SLOPE,
    calibrate,
    initialise,
    last_layer_stack,
    noise_image,
    stack_input,
    yolov3,
)
from benchmarks.timing import DTYPES, LAYOUTS
from benchmarks.training import training_step

IMAGE_SIZE = 416
RESNET_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Variant:
    """How a case is run: images at a time, a name from `DTYPES`, device, the seed of weights and input, and a name from
    `LAYOUTS`."""

    batch: int
    dtype: str
    device: torch.device
    seed: int = 0
    layout: str = "channels_last"

    @property
    def words(self) -> str:
        """As titles have it."""
        return f"batch {self.batch}, {self.dtype}{', NCHW' if self.layout == 'NCHW' else ''}"


@dataclass(frozen=True)
class PendingCase:
    """A case not built yet, so that only one model is in memory at a time."""

    title: str
    build: Callable[[], Case]


def layer_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Each unit of the heads' stacks, once for each shape, and the last 1x1 convolution, on the input it gets there."""
    for head in heads:
        for index in _distinct_layers(head):
            yield _pending(f"layers: {head}x{head}, layer {index}", variant, _layer_case, head, index)


def stack_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """The seven last layers of each head."""
    for head in heads:
        yield _pending(f"stack: {head}x{head}", variant, _stack_case, head)


def network_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """YOLOv3 with 80 classes on 416x416 images, and ResNet-50 with 1,000 on 224x224; `heads` does not matter."""
    yield _pending("network: YOLOv3", variant, _yolov3_case)
    yield _pending("network: ResNet-50", variant, _resnet_case)


def overhead_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """One unit on next to no pixels; `heads` does not matter."""
    yield _pending("overhead: one unit", variant, _overhead_case)


def scaling_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Curves: how the cost of a 1x1 unit grows with the batch, the plane and the channels, each from where a GPU or a
    CPU is idle for the most part to where it is not. `heads` does not matter.

    The variant's batch is that of the two curves on which the batch stays.
    """
    for axis, sizes in SCALES.items():
        for size in sizes:
            here = replace(variant, batch=size) if axis == "batch" else variant
            yield _pending(f"scaling: {axis} {size}", here, _scaling_case, axis, size)


def training_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Training steps: each unit of the heads' stacks, once for each shape, then each stack.

    In half precision they run under autocast, on inputs in its dtype, as other layers give them there.
    """
    for head in heads:
        for index in _distinct_layers(head)[:-1]:
            yield _pending(f"training: {head}x{head}, layer {index}", variant, _unit_step, head, index)
    for head in heads:
        yield _pending(f"training: {head}x{head} stack", variant, _stack_step, head)


def network_training_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Training steps of the networks, on the loss of one upstream gradient for all outputs; `heads` does not matter."""
    yield _pending("network-training: YOLOv3", variant, _yolov3_step)
    yield _pending("network-training: ResNet-50", variant, _resnet_step)


OVERHEAD = "overhead"
SCALING = "scaling"
TRAINING = "training"
NETWORK_TRAINING = "network-training"
STEPS = (TRAINING, NETWORK_TRAINING)

# The sizes of each curve: YOLOv3's planes are 13 to 104 there, its 1x1 units' channels 64 to 1,024.
SCALES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "plane": (7, 13, 26, 52, 104),
    "channels": (64, 128, 256, 512, 1024, 2048),
}

SUITES: dict[str, Callable[[Sequence[int], Variant], Iterator[PendingCase]]] = {
    "layers": layer_cases,
    "stack": stack_cases,
    "network": network_cases,
    TRAINING: training_cases,
    NETWORK_TRAINING: network_training_cases,
    SCALING: scaling_cases,
    OVERHEAD: overhead_cases,
}


def make_case(
    suite: str, name: str, model: nn.Module, x: Tensor, variant: Variant, axis: str | None = None, at: int | None = None
) -> Case:
    """A case of `model` in eval mode and `x`, as the variant has it; may change `model`."""
    model = model.eval().to(variant.device, DTYPES[variant.dtype])
    return Case(suite, name, model, _placed(x, variant), variant.dtype == "tf32", axis, at)


def make_step(name: str, model: nn.Module, x: Tensor, variant: Variant, suite: str = TRAINING) -> Case:
    """A case of training `model` on `x`, as the variant has it; may change `model`."""
    step = training_step(model.to(variant.device), x.to(variant.device), DTYPES[variant.dtype], variant.seed + 2)
    return Case(suite, name, step, _placed(x, variant), variant.dtype == "tf32")


def _placed(x: Tensor, variant: Variant) -> Tensor:
    return x.to(variant.device, DTYPES[variant.dtype]).contiguous(memory_format=LAYOUTS[variant.layout])


def _pending(title: str, variant: Variant, build: Callable[..., Case], *arguments: Any) -> PendingCase:
    return PendingCase(f"{title}, {variant.words}", partial(build, *arguments, variant))


def _distinct_layers(head: int) -> tuple[int, ...]:
    """Indices in the stack: the third unit differs from the first only where the stack takes another width."""
    return (0, 1, 6) if HEADS[head].c_in == HEADS[head].f1 else (0, 1, 2, 6)


def _layer_case(head: int, index: int, variant: Variant) -> Case:
    layer, x = _layer(head, index, variant)
    if isinstance(layer, nn.Conv2d):
        return make_case("layers", _layer_name(head, layer), nn.Sequential(OrderedDict(conv=layer)), x, variant)
    return make_case("layers", _layer_name(head, layer.get_submodule("conv")), layer, x, variant)


@torch.no_grad()
def _layer(head: int, index: int, variant: Variant) -> tuple[nn.Module, Tensor]:
    """A layer of a head's stack, in eval mode, and its input there, in fp32."""
    stack = last_layer_stack(head, seed=variant.seed).to(variant.device)
    x = stack[:index](stack_input(head, variant.batch, variant.seed + 1).to(variant.device))
    return stack[index], x


def _layer_name(head: int, conv: nn.Module) -> str:
    assert isinstance(conv, nn.Conv2d)
    size = "x".join(map(str, conv.kernel_size))
    return f"{head}x{head} {size} {conv.in_channels}->{conv.out_channels}"


def _stack_case(head: int, variant: Variant) -> Case:
    x = stack_input(head, variant.batch, variant.seed + 1)
    return make_case("stack", f"{head}x{head}", last_layer_stack(head, seed=variant.seed), x, variant)


def _unit_step(head: int, index: int, variant: Variant) -> Case:
    unit, x = _layer(head, index, variant)
    return make_step(_layer_name(head, unit.get_submodule("conv")), unit, x, variant)


def _stack_step(head: int, variant: Variant) -> Case:
    x = stack_input(head, variant.batch, variant.seed + 1)
    return make_step(f"{head}x{head} stack", last_layer_stack(head, seed=variant.seed), x, variant)


def _yolov3_case(variant: Variant) -> Case:
    x = noise_image(IMAGE_SIZE, variant.batch, variant.seed + 1)
    return make_case("network", f"YOLOv3 {IMAGE_SIZE}x{IMAGE_SIZE}", yolov3(seed=variant.seed), x, variant)


def _yolov3_step(variant: Variant) -> Case:
    x = noise_image(IMAGE_SIZE, variant.batch, variant.seed + 1)
    model = OneOutput(yolov3(seed=variant.seed))
    return make_step(f"YOLOv3 {IMAGE_SIZE}x{IMAGE_SIZE}", model, x, variant, NETWORK_TRAINING)


def _resnet_case(variant: Variant) -> Case:
    return make_case("network", _RESNET, *_resnet(variant), variant)


def _resnet_step(variant: Variant) -> Case:
    return make_step(_RESNET, *_resnet(variant), variant, NETWORK_TRAINING)


_RESNET = f"ResNet-50 {RESNET_IMAGE_SIZE}x{RESNET_IMAGE_SIZE}"


def _resnet(variant: Variant) -> tuple[nn.Module, Tensor]:
    """torchvision's, with weights drawn from its own initialisation, in eval mode, and its input, in fp32.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    with torch.random.fork_rng():
        model = build("torchvision/resnet50").eval()
    calibrate(model, noise_image(RESNET_IMAGE_SIZE, 1, variant.seed + 2))
    return model, noise_image(RESNET_IMAGE_SIZE, variant.batch, variant.seed + 1)


class OneOutput(nn.Module):
    """A network's outputs flattened and put together, [batch, features], so that one gradient is that of all."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(1) for y in self.network(x)], 1)


def _scaling_case(axis: str, size: int, variant: Variant) -> Case:
    plane = size if axis == "plane" else 26
    c_in = size if axis == "channels" else 256
    unit, x = _plain_unit(c_in, c_in // 2, plane, variant)
    # The curves meet, and a case's title is its own.
    name = f"{plane}x{plane} 1x1 {c_in}->{c_in // 2}, {axis}"
    return make_case(SCALING, name, unit, x, variant, axis, size)


def _overhead_case(variant: Variant) -> Case:
    return make_case(OVERHEAD, "4x4 1x1 64->64", *_plain_unit(64, 64, 4, variant), variant)


@torch.no_grad()
def _plain_unit(c_in: int, c_out: int, plane: int, variant: Variant) -> tuple[nn.Module, Tensor]:
    """A 1x1 unit in eval mode and an input for it, in fp32."""
    conv = nn.Conv2d(c_in, c_out, kernel_size=1, bias=False)
    unit = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out), relu=nn.LeakyReLU(SLOPE))).eval()
    generator = torch.Generator().manual_seed(variant.seed + 1)
    x = torch.randn(variant.batch, c_in, plane, plane, generator=generator)
    initialise(unit, variant.seed)
    calibrate(unit, x)
    return unit, x
