"""Convolution units whose operands lie in memory in every way, for tests that call kernels directly.

Inputs lie in buffers of NaN, so that a read outside them shows; outputs in buffers of canaries, for writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from canaries import guarded
from torch import Tensor
from torch.nn import functional as F

CANARY = 77.0
EPS = 0.5
# Arithmetic modes: the tensors' dtype, and for fp32 whether products are rounded to TF32.
MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


def _channels_of_wider(before: int, more: int) -> Callable[..., Tensor]:
    """A slice of a channels_last tensor, from channel ``before`` on; it has a multiple of 8 channels and ``more``."""

    def layout(n: int, c: int, h: int, w: int, **options: Any) -> Tensor:
        wide = torch.empty(n, (before + c + 7) // 8 * 8 + more, h, w, **options).to(memory_format=torch.channels_last)
        return wide[:, before : before + c]

    return layout


def _amid(before: int) -> Callable[..., Tensor]:
    """A channels_last tensor with other elements before it, so many, and after it."""

    def layout(n: int, c: int, h: int, w: int, **options: Any) -> Tensor:
        storage = torch.empty(n * c * h * w + 32, **options)
        return storage[before : before + n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)

    return layout


# How a tensor of a given shape may lie in memory: a view, whose storage may hold more.
BARE_LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "channels_last": lambda *shape, **o: torch.empty(shape, **o).to(memory_format=torch.channels_last),
    "NCHW": lambda *shape, **o: torch.empty(shape, **o),
    "aligned channel slice": _channels_of_wider(8, 8),
    "8-byte channel slice": _channels_of_wider(4, 4),
    "4-byte channel slice": _channels_of_wider(2, 2),
    "odd channel slice": _channels_of_wider(3, 1),
    "plane slice": lambda n, c, h, w, **o: torch.empty(n, c, h + 1, w + 3, **o)[:, :, 1:, 2 : 2 + w],
    "plane slice of even pitch": lambda n, c, h, w, **o: torch.empty(n, c, h + 4, w + w % 8 + 8, **o)[:, :, 2:-2, :w],
    "odd offset": lambda n, c, h, w, **o: torch.empty(n * c * h * w + 1, **o)[1:].view(n, c, h, w),
    "transposed planes": lambda n, c, h, w, **o: torch.empty(n, c, w, h, **o).transpose(2, 3),
    "every other": lambda n, c, h, w, **o: torch.empty(2 * n, 2 * c, h, 2 * w, **o)[::2, 1::2, :, ::2],
    "amid others": _amid(8),
    "amid others, at an odd offset": _amid(9),
    "channels outermost": lambda n, c, h, w, **o: torch.empty(c, n, h, w, **o).transpose(0, 1),
}


def _amid_more(layout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with room before and after, of which the dense ones have none of their own."""
    return lambda *shape, **options: guarded(layout(*shape, **options))


LAYOUTS = {name: _amid_more(layout) for name, layout in BARE_LAYOUTS.items()}


def place(values: Tensor, layout: str) -> Tensor:
    """``values`` in the given layout, NaN around them."""
    view = LAYOUTS[layout](*values.shape, dtype=values.dtype)
    whole(view).fill_(torch.nan)
    return view.copy_(values)


def whole(view: Tensor) -> Tensor:
    """All of a view's storage."""
    storage = view.untyped_storage()
    return view.new_empty(0).set_(storage, 0, (storage.nbytes() // view.element_size(),))


def as_placed(storage: Tensor, view: Tensor) -> Tensor:
    """The view of another storage that ``view`` is of its own."""
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


@dataclass(frozen=True)
class Unit:
    """A convolution unit and how its tensors lie. ``order`` is the residual's; None: no residual."""

    mode: str = "bf16"
    shape: tuple[int, int, int, int] = (2, 24, 5, 7)
    c_out: int = 75
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    batch_norm: bool = True
    affine: bool = True
    bias: bool = False
    channel_dtype: torch.dtype | None = None  # of bias and batch norm; None: that of x
    activation: str = "leaky_relu"
    slope: float = 0.5
    eps: float = EPS
    order: str | None = None
    x_layout: str = "channels_last"
    weight_layout: str = "channels_last"
    y_layout: str = "channels_last"
    residual_layout: str = "channels_last"

    @property
    def dtype(self) -> torch.dtype:
        return MODES[self.mode][0]

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.shape
        h, w = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip((h, w), self.padding, self.kernel, self.stride, strict=True)
        )
        return n, self.c_out, h, w

    def operands(self, numbers: Callable[..., Tensor], variance: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        c_in = self.shape[1]
        channels = {"dtype": self.channel_dtype or self.dtype}

        def per_channel(present: bool, make: Callable[..., Tensor] = numbers) -> Tensor | None:
            return guarded(make(self.c_out).to(**channels)) if present else None

        return dict(
            x=place(numbers(*self.shape).to(self.dtype), self.x_layout),
            weight=place(numbers(self.c_out, c_in, *self.kernel).to(self.dtype), self.weight_layout),
            bias=per_channel(self.bias),
            mean=per_channel(self.batch_norm),
            var=per_channel(self.batch_norm, variance),
            gamma=per_channel(self.batch_norm and self.affine),
            beta=per_channel(self.batch_norm and self.affine),
            residual=place(numbers(*self.y_shape).to(self.dtype), self.residual_layout) if self.order else None,
        )


def eager(unit: Unit, operands: dict[str, Tensor | None]) -> Tensor:
    """PyTorch's composition, in the operands' dtypes."""
    x, weight, bias, mean, var, gamma, beta, residual = operands.values()
    z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), unit.stride, unit.padding)
    if mean is not None:
        z = F.batch_norm(z, mean, var, gamma, beta, False, 0.0, unit.eps)
    if unit.order == "add_act":
        z = z + residual
    functions = {"leaky_relu": lambda t: F.leaky_relu(t, unit.slope), "identity": lambda t: t}
    z = functions.get(unit.activation, getattr(F, unit.activation, None))(z)
    return z + residual if unit.order == "act_add" else z


def doubled(operands: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in operands.items()}
