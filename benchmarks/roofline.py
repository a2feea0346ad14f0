"""The floor of a model's time: what its convolutions must compute and move, over what the device was seen to do.

Two ceilings are measured in the same run as the contenders: the rate of a large copy and of a large matrix product.
A layer takes at least the larger of its FLOPs over the one and its bytes over the other; a model the sum of these. What
a cache holds, a GPU's warm L2 or a CPU's, is not read from memory again: there less than the floor is possible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import DTYPES, device_seconds, tf32_allowed

# By the type of device: large enough to leave every cache.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# Half as large while a product takes longer than that: a CPU without fp16 arithmetic takes minutes for the largest.
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
LONGEST_PRODUCT = 1.0
WARMUP, REPEATS = 3, 10


@dataclass(frozen=True)
class Work:
    """What one convolution must do: a multiplication and an addition are two FLOPs, each tensor moves once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """The most a device does.

    Attributes:
        bytes_per_second: of device memory, read and written bytes counted together.
        flops_per_second: of its matrix units, for each of `DTYPES` asked for.
    """

    bytes_per_second: float
    flops_per_second: Mapping[str, float]


# NVIDIA's data sheet, dense: a yardstick for the counting, not a measurement.
H100_DATASHEET = Ceilings(bytes_per_second=3.35e12, flops_per_second={"bf16": 989e12, "fp16": 989e12})


@torch.no_grad()
def convolution_work(model: nn.Module, x: Tensor) -> tuple[Work, ...]:
    """The work of each convolution that `model` calls for an input like `x`, in the order of the calls.

    Nothing is computed: the model runs on tensors without storage. Batch norm, activation, residual and bias of a unit
    are free: a fused unit moves nothing for them but a few numbers a channel.
    """
    work: list[Work] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        per_output = module.weight[0].numel()
        elements = inputs[0].numel() + module.weight.numel() + y.numel()
        work.append(Work(flops=2 * y.numel() * per_output, bytes=elements * y.element_size()))

    tensors = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        torch.func.functional_call(model, tensors, (x.to("meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(work)


def floor_seconds(work: Iterable[Work], ceilings: Ceilings, dtype: str) -> float:
    """The sum over the layers of max(FLOPs / rate, bytes / bandwidth), in seconds."""
    rate = ceilings.flops_per_second[dtype]
    return sum(max(layer.flops / rate, layer.bytes / ceilings.bytes_per_second) for layer in work)


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[str],
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Ceilings:
    """Measure both ceilings on random data: zeros multiply faster than what a network multiplies.

    Args:
        seconds: how long a call takes on the device; by default events tell, or on a CPU the clock.
    """
    seconds = seconds or (device_seconds if device.type == "cuda" else _wall_seconds)
    bandwidth = 2 * COPY_BYTES[device.type] / _median_seconds(_copy(device), seconds)
    rates = {dtype: _product_rate(device, dtype, seconds) for dtype in dtypes}
    return Ceilings(bytes_per_second=bandwidth, flops_per_second=rates)


def _copy(device: torch.device) -> Callable[[], Any]:
    source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product_rate(device: torch.device, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> float:
    side = MATRIX_SIDE[device.type] // 8
    # Twice the side is eight times the work.
    while side < MATRIX_SIDE[device.type] and 8 * seconds(_product(device, dtype, side)) < LONGEST_PRODUCT:
        side *= 2
    return 2 * side**3 / _median_seconds(_product(device, dtype, side), seconds)


def _product(device: torch.device, dtype: str, side: int) -> Callable[[], Any]:
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    y = torch.empty_like(a)

    def multiply() -> None:
        with tf32_allowed(dtype == "tf32"):
            torch.matmul(a, b, out=y)

    return multiply


def _wall_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _median_seconds(call: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float]) -> float:
    for _ in range(WARMUP):
        call()
    return statistics.median(seconds(call) for _ in range(REPEATS))
