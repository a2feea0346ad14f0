"""The floor of a model's time: what its convolutions must compute and move, over what the device was seen to do.

Two ceilings are measured in the same run as the contenders: the rate of a large copy and of a large matrix product.
A layer takes at least the larger of its FLOPs over the one and its bytes over the other; a model the sum of these.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import DTYPES, device_seconds

COPY_BYTES = 1 << 30
MATRIX_SIDE = 8192
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
    seconds: Callable[[Callable[[], Any]], float] = device_seconds,
) -> Ceilings:
    """Measure both ceilings on random data: zeros multiply faster than what a network multiplies.

    Args:
        seconds: how long a call takes on the device.
    """
    bandwidth = 2 * COPY_BYTES / _median_seconds(_copy(device), seconds)
    flops = 2 * MATRIX_SIDE**3
    rates = {dtype: flops / _median_seconds(_product(device, DTYPES[dtype]), seconds) for dtype in dtypes}
    return Ceilings(bytes_per_second=bandwidth, flops_per_second=rates)


def _copy(device: torch.device) -> Callable[[], Any]:
    source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype) for _ in range(2))
    y = torch.empty_like(a)

    def multiply() -> None:
        matmul = torch.backends.cuda.matmul
        allowed = matmul.allow_tf32
        # In fp32 the convolutions' setting counts: by default they may use TF32 and matrix products may not.
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        try:
            torch.matmul(a, b, out=y)
        finally:
            matmul.allow_tf32 = allowed

    return multiply


def _median_seconds(call: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float]) -> float:
    for _ in range(WARMUP):
        call()
    return statistics.median(seconds(call) for _ in range(REPEATS))
