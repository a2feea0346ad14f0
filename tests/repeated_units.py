"""Small units of every kind of kernel, and where they can run here: for tests that call them again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pointfuse
import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """A backend, and the device that it runs on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside, units run on the backend alone, and tensors are made on the device."""
        with torch.device(self.device), pointfuse.use_backend(self.backend, strict=True):
            yield


PLACES = [Place("aten", "cpu")]
if torch.cuda.is_available():
    PLACES += [Place(name, "cuda") for name, status in pointfuse.backends().items() if status.usable]

# At least one of each: kernel, dtype, layout, split K, tails. `make sanitize` runs these under each tool.
REDUCED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "1x1 throughput": (dict(kernel=1, c_in=64, c_out=128), (4, 64, 26, 26)),
    "1x1 latency, K split": (dict(kernel=1, c_in=512, c_out=64), (1, 512, 13, 13)),
    "3x3": (dict(kernel=3, c_in=64, c_out=75), (1, 64, 13, 13)),
    "tails": (dict(kernel=1, c_in=24, c_out=75), (2, 24, 7, 7)),
    "fp16": (dict(kernel=3, c_in=32, c_out=64, dtype=torch.float16), (1, 32, 9, 9)),
    "tf32": (dict(kernel=1, c_in=64, c_out=64, dtype=torch.float32), (1, 64, 13, 13)),
}


def unit(kernel: int = 1, c_in: int = 64, c_out: int = 32, dtype: torch.dtype = torch.bfloat16) -> Any:
    made = pointfuse.ConvBNAct2d(c_in, c_out, kernel, padding=kernel // 2, negative_slope=0.1).eval().to(dtype)
    assert made.bn is not None
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one training step."""
    module.train().zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.enable_grad():
        y = module(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]
