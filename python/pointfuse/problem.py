"""The vocabulary of a convolution unit as plain data, shared by every layer of the package."""

from __future__ import annotations

from typing import NamedTuple

from torch import Size, Tensor

ACTIVATIONS = ("leaky_relu", "relu", "relu6", "silu", "identity")
RESIDUAL_ORDERS = ("add_act", "act_add")

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How the kernel moves over the plane. ``padding`` is the string ``"same"`` where PyTorch is to work it out."""

    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def well_formed(self) -> bool:
        """Whether every number is one that a convolution accepts, and padding is a number at all."""
        return (
            not isinstance(self.padding, str)
            and min(self.padding) >= 0
            and min(self.stride) > 0
            and min(self.dilation) > 0
            and self.groups > 0
        )

    def resolved(self, kernel: Size | tuple[int, ...]) -> Geometry:
        """The same with padding as numbers; as it is where ``"same"`` pads unevenly or PyTorch has an error to say."""
        if self.padding == "valid":
            return self._replace(padding=(0, 0))
        reach = [d * (k - 1) for d, k in zip(self.dilation, kernel[-2:], strict=True)]
        if self.padding == "same" and self.stride == (1, 1) and not any(r % 2 for r in reach):
            return self._replace(padding=(reach[0] // 2, reach[1] // 2))
        return self

    def output_plane(self, input_shape: Size | tuple[int, ...], kernel: Size | tuple[int, ...]) -> Pair:
        """Height and width of the output of a well-formed geometry, from ``[batch, c, h, w]`` and ``[.., kh, kw]``."""
        padding = self.padding
        assert not isinstance(padding, str)
        h, w = (
            (input_shape[2 + i] + 2 * padding[i] - self.dilation[i] * (kernel[i - 2] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return h, w


class BatchNorm(NamedTuple):
    """Operands of a batch norm, each ``[c_out]`` or absent. ``batch_statistics`` normalises with the batch's own."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    batch_statistics: bool
    momentum: float
    eps: float


class Activation(NamedTuple):
    """An activation by name. ``negative_slope`` is read by ``leaky_relu`` alone; ``inplace`` is a wish, as in torch."""

    name: str
    negative_slope: float = 0.01
    inplace: bool = False


IDENTITY = Activation("identity")


class Refused(Exception):
    """A backend does not serve a call; the message says why. Never raised to users: ATen serves the call instead."""


def check_activation(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a known activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}")


def check_residual_order(order: str) -> None:
    """Raise ``ValueError`` unless ``order`` is a known residual order."""
    if order not in RESIDUAL_ORDERS:
        raise ValueError(
            f"residual_order is {order!r}; it must be 'add_act' (act(z + residual), as in ResNet) "
            "or 'act_add' (act(z) + residual, as in Darknet)"
        )


def as_pair(value: int | tuple[int, ...] | list[int], name: str) -> Pair:
    """An int or a sequence of one or two ints as a pair, as ``torch.nn.functional.conv2d`` reads it."""
    if isinstance(value, int):
        return value, value
    if len(value) not in (1, 2):
        raise RuntimeError(f"{name} is {value!r}; it must be an int or a pair of ints (height, width)")
    return int(value[0]), int(value[-1])
