"""The suites: every distinct layer of the three heads, their last-layer stacks, the whole network, training steps of
units and stacks, and a unit so small that what it costs to call it is all it costs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Case
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
from benchmarks.timing import DTYPES
from benchmarks.training import training_step

IMAGE_SIZE = 416


@dataclass(frozen=True)
class Variant:
    """How a case is run: images at a time, a name from `DTYPES`, device, and the seed of weights and input."""

    batch: int
    dtype: str
    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class PendingCase:
    """A case not built yet, so that only one model is in memory at a time."""

    title: str
    build: Callable[[], Case]


def layer_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Each unit of the heads' stacks, once for each shape, and the last 1x1 convolution, on the input it gets there."""
    for head in heads:
        for index in _distinct_layers(head):
            yield PendingCase(f"layers: {head}x{head}, layer {index}", partial(_layer_case, head, index, variant))


def stack_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """The seven last layers of each head."""
    for head in heads:
        yield PendingCase(f"stack: {head}x{head}", partial(_stack_case, head, variant))


def network_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """YOLOv3 with 80 classes on 416x416 images; `heads` does not matter."""
    yield PendingCase("network: YOLOv3", partial(_network_case, variant))


def overhead_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """One unit on next to no pixels; `heads` does not matter."""
    yield PendingCase("overhead: one unit", partial(_overhead_case, variant))


def training_cases(heads: Sequence[int], variant: Variant) -> Iterator[PendingCase]:
    """Training steps: each unit of the heads' stacks, once for each shape, then each stack.

    In half precision they run under autocast, on inputs in its dtype, as other layers give them there.
    """
    for head in heads:
        for index in _distinct_layers(head)[:-1]:
            yield PendingCase(f"training: {head}x{head}, layer {index}", partial(_unit_step, head, index, variant))
    for head in heads:
        yield PendingCase(f"training: {head}x{head} stack", partial(_stack_step, head, variant))


OVERHEAD = "overhead"
TRAINING = "training"

SUITES: dict[str, Callable[[Sequence[int], Variant], Iterator[PendingCase]]] = {
    "layers": layer_cases,
    "stack": stack_cases,
    "network": network_cases,
    TRAINING: training_cases,
    OVERHEAD: overhead_cases,
}


def make_case(suite: str, name: str, model: nn.Module, x: Tensor, variant: Variant) -> Case:
    """A case of `model` in eval mode and `x`, in the variant's dtype and on its device; may change `model`."""
    dtype = DTYPES[variant.dtype]
    return Case(suite, name, model.eval().to(variant.device, dtype), x.to(variant.device, dtype))


def make_step(name: str, model: nn.Module, x: Tensor, variant: Variant) -> Case:
    """A case of training `model` on `x`, in the variant's dtype and on its device; may change `model`."""
    dtype, x = DTYPES[variant.dtype], x.to(variant.device)
    step = training_step(model.to(variant.device), x, dtype, variant.seed + 2)
    return Case(TRAINING, name, step, x.to(dtype))


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


def _network_case(variant: Variant) -> Case:
    x = noise_image(IMAGE_SIZE, variant.batch, variant.seed + 1)
    return make_case("network", f"YOLOv3 {IMAGE_SIZE}x{IMAGE_SIZE}", yolov3(seed=variant.seed), x, variant)


@torch.no_grad()
def _overhead_case(variant: Variant) -> Case:
    conv = nn.Conv2d(64, 64, kernel_size=1, bias=False)
    unit = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(64), relu=nn.LeakyReLU(SLOPE))).eval()
    generator = torch.Generator().manual_seed(variant.seed + 1)
    x = torch.randn(variant.batch, 64, 4, 4, generator=generator)
    initialise(unit, variant.seed)
    calibrate(unit, x)
    return make_case(OVERHEAD, "4x4 1x1 64->64", unit, x, variant)
