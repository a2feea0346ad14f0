"""What the CUDA kernels' planner decides for a convolution on a named GPU, and what it should cost; without a GPU.

The planner itself is ``csrc/kernels/plan.h``; ``pointfuse._plan`` is its binding, built where there is a C++ compiler.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pointfuse.problem import Geometry, Pair

if TYPE_CHECKING:
    from pointfuse import _plan

# By the name that a user gives: the tensors' type, and whether fp32 products may be rounded to TF32.
DTYPES = {
    "bf16": ("bfloat16", False),
    "fp16": ("float16", False),
    "fp32": ("float32", False),
    "tf32": ("float32", True),
}

Quadruple = tuple[int, int, int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution and what the kernel does after it; ``input_shape`` is ``[batch, c_in, height, width]``."""

    input_shape: Quadruple
    c_out: int
    kernel_size: Pair
    geometry: Geometry
    bias: bool
    batch_norm: bool
    activation: str
    residual: str | None

    @property
    def refusal(self) -> str | None:
        """Why no kernel of ours computes it, whatever the device, or ``None``."""
        if self.geometry.groups != 1:
            return f"groups={self.geometry.groups}: the kernels take 1"
        if self.geometry.dilation != (1, 1):
            return f"dilation={self.geometry.dilation}: the kernels take 1"
        if not self.geometry.well_formed:
            return f"padding={self.geometry.padding!r}: the kernels take numbers"
        return None

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        stride = "" if self.geometry.stride == (1, 1) else f" /{self.geometry.stride[0]}"
        return f"{kernel} {self.input_shape[1]}->{self.c_out}{stride}"


@dataclass(frozen=True)
class Row:
    """The plan of ``count`` equal convolutions, the first of which is ``name``; or, in ``refusal``, why there is none.

    Times are microseconds for one of them: as predicted, and the floor, which no kernel can pass: the arithmetic at the
    device's peak rate, or every tensor once at its bandwidth. ``text`` is the planner's own description.
    """

    name: str
    count: int
    convolution: Convolution
    refusal: str | None
    kernel: str = "-"
    block_channels: int = 0
    block_pixels: int = 0
    stages: int = 0
    split_k: int = 0
    cluster: int = 0
    grid: int = 0
    shared_bytes: int = 0
    predicted_us: float = 0.0
    floor_us: float = 0.0
    text: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        c = self.convolution
        norm = "batch norm, " if c.batch_norm else "bias, " if c.bias else ""
        after = norm + c.activation + (f", {c.residual}" if c.residual else "")
        start = (self.name, str(self.count), str(c), "x".join(map(str, c.input_shape)), after)
        if self.refusal is not None:
            return (*start, "-", "-", "-", "-", "-", "-", "-", "-")
        split = "-" if self.split_k == 1 else f"{self.split_k} {'cluster' if self.cluster > 1 else 'workspace'}"
        tile = f"{self.block_channels}x{self.block_pixels}"
        return (*start, self.kernel, tile, str(self.stages), split, str(self.grid), f"{self.shared_bytes / 1024:.0f}",
                f"{self.predicted_us:.1f}", f"{self.floor_us:.1f}")  # fmt: skip


HEADER = ("layer", "times", "convolution", "input", "then", "kernel", "tile", "stages", "K split", "grid",
          "shared KiB", "predicted us", "floor us")  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The plans of a model's convolutions on a device; prints as a table."""

    device: str
    dtype: str
    rows: tuple[Row, ...]

    @property
    def predicted_us(self) -> float:
        """Of all convolutions that have a plan, one after the other."""
        return sum(r.count * r.predicted_us for r in self.rows)

    @property
    def floor_us(self) -> float:
        """The sum of the same convolutions' floors."""
        return sum(r.count * r.floor_us for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data for JSON."""
        return asdict(self) | {"predicted_us": self.predicted_us, "floor_us": self.floor_us}

    def __str__(self) -> str:
        rows = [HEADER, *(r.cells() for r in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        numbers = {HEADER.index(name) for name in ("times", "stages", "grid", "shared KiB", "predicted us", "floor us")}
        lines = [
            "  ".join(
                cell.rjust(width) if i in numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        planned = sum(r.count for r in self.rows if r.refusal is None)
        lines += ["", *(f"{r.name}: no plan: {r.refusal}" for r in self.rows if r.refusal is not None)]
        lines.append(
            f"{planned} convolutions on {self.device}, {self.dtype}, channels_last, nothing cached: "
            f"predicted {self.predicted_us:.1f} us, floor {self.floor_us:.1f} us"
        )
        return "\n".join(lines)


def planner() -> Any:
    """The module ``pointfuse._plan``. Raises ``RuntimeError`` where the package was built without it."""
    try:
        return importlib.import_module("pointfuse._plan")
    except ImportError as error:
        raise RuntimeError(
            f"this pointfuse has no planner ({error}): install it where a C++ compiler is found, with `pip install .` "
            "in a source checkout"
        ) from error


def problem(convolution: Convolution, dtype: str = "bf16", channels_last: bool = True) -> _plan.Problem:
    """The planner's problem for dense, aligned tensors of a type (a name of ``DTYPES``) and memory format."""
    module = planner()
    batch, c_in, height, width = convolution.input_shape
    kernel_h, kernel_w = convolution.kernel_size
    h_out, w_out = convolution.geometry.output_plane(
        convolution.input_shape, (convolution.c_out, c_in, *convolution.kernel_size)
    )
    padding = convolution.geometry.padding
    assert not isinstance(padding, str)
    result = module.Problem()
    result.batch, result.c_in, result.height, result.width = convolution.input_shape
    result.c_out, result.kernel_h, result.kernel_w = convolution.c_out, kernel_h, kernel_w
    result.stride_h, result.stride_w = convolution.geometry.stride
    result.padding_h, result.padding_w = padding
    name, result.tf32 = DTYPES[dtype]
    result.dtype = getattr(module.DType, name)
    result.x = _strides((batch, c_in, height, width), channels_last)
    result.weight = _strides((convolution.c_out, c_in, kernel_h, kernel_w), channels_last)
    result.y = result.residual_strides = _strides((batch, convolution.c_out, h_out, w_out), channels_last)
    # What torch's allocators give.
    result.x_alignment = result.weight_alignment = result.y_alignment = result.residual_alignment = 16
    result.bias, result.batch_norm = convolution.bias, convolution.batch_norm
    result.activation = getattr(module.Activation, convolution.activation)
    result.residual = getattr(module.Residual, convolution.residual or "none")
    return result


def table(convolutions: Iterable[tuple[str, Convolution]], device: str, dtype: str = "bf16") -> Table:
    """The plans of named convolutions, channels_last, on a device; equal ones share a row, in order of appearance.

    Raises ``ValueError`` for an unknown device, with the names there are, and ``RuntimeError`` without a planner.
    """
    found = planner().device_by_name(device)
    convolutions = list(convolutions)
    counts = Counter(c for _, c in convolutions)
    names: dict[Convolution, str] = {}
    for name, convolution in convolutions:
        names.setdefault(convolution, name)
    return Table(device, dtype, tuple(_row(name, counts[c], c, found, dtype) for c, name in names.items()))


def _row(name: str, count: int, convolution: Convolution, device: _plan.Device, dtype: str) -> Row:
    if convolution.refusal is not None:
        return Row(name, count, convolution, convolution.refusal)
    module = planner()
    asked = problem(convolution, dtype)
    plan = module.select_plan(asked, device)
    text = module.describe(asked, plan)
    if plan.refusal is not None:
        return Row(name, count, convolution, plan.refusal, text=text)
    return Row(
        name, count, convolution, None, plan.kernel.name, plan.block_channels, plan.block_pixels, plan.stages,
        plan.split_k, plan.cluster, plan.grid, plan.shared_bytes, plan.predicted_us, plan.floor_us, text
    )  # fmt: skip


def _strides(shape: Quadruple, channels_last: bool) -> Quadruple:
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
