"""A plan's kernels compiled for any GPU, with none at hand: what Triton's launcher would compile for the same call.

Triton compiles a kernel anew for other types of its arguments, and for what it sees of their values: ``None``, the
number 1, multiples of 16 among numbers and addresses, and numbers beyond 32 bits. From Triton 3.7 on a launch finds
what was compiled here in ``TRITON_CACHE_DIR``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pointfuse.backends import triton as backend
from pointfuse.backends.triton.configs import REFERENCE_CHIPS, Chip
from pointfuse.backends.triton.planning import Plan, plan

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_TENSORS = ("x", "weight", "bias", "mean", "var", "gamma", "beta", "residual", "y", "partials")
# Numbers that a kernel is not compiled for.
_EPS, _SLOPE = 1e-5, 0.1
# Stride 1, no padding and no activation, as `backends.calls` packs them.
_PLAIN = 0x0101


@dataclass(frozen=True)
class Address:
    """A tensor as far as a kernel is compiled for it; ``aligned`` if it begins at a multiple of 16 bytes."""

    dtype: torch.dtype
    aligned: bool = True


def compile_plan(made: Plan, dtype: torch.dtype, capability: tuple[int, int], **operands: Any) -> list[Any]:
    """The kernels that a plan launches, compiled for a compute capability, in the order of launch.

    The other arguments are those of :func:`launches`. Gives Triton's compiled kernels: ``conv_bn_act``, and
    ``finish_split`` where the plan splits the sum. Raises ``RuntimeError`` where Triton is missing, or too old, or runs
    kernels in its interpreter.
    """
    found = launches(made, dtype, **operands)
    return [_compiled(kernel, arguments, options, capability) for kernel, arguments, options in found]


def launches(
    made: Plan,
    dtype: torch.dtype,
    *,
    bias: torch.dtype | None = None,
    norm: torch.dtype | None = torch.float32,
    affine: bool = True,
    residual: bool = False,
    statistics: bool = False,
    misaligned: Collection[str] = (),
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that a plan launches, their arguments with an :class:`Address` for each tensor, and the compiler's
    options.

    Args:
        made: the plan, of sizes that are known.
        dtype: of ``x``, the weight, the residual and ``y``.
        bias: the bias's dtype, or ``None`` without one.
        norm: the dtype of batch norm's tensors, or ``None`` without it.
        affine: whether batch norm has ``gamma`` and ``beta``.
        residual: whether there is one; its strides are the plan's.
        statistics: whether the plan's tiles give parts of them.
        misaligned: the kernels' names of tensors that do not begin at a multiple of 16 bytes.

    Raises ``RuntimeError`` as :func:`compile_plan`.
    """
    reason = refusal()
    if reason is not None:
        raise RuntimeError(reason)
    dtypes = {
        **dict.fromkeys(("x", "weight", "y"), dtype),
        "bias": bias,
        **dict.fromkeys(("mean", "var"), norm),
        **dict.fromkeys(("gamma", "beta"), norm if affine else None),
        "residual": dtype if residual else None,
        "partials": torch.float32 if made.partials else None,
    }
    tensors = [None if (d := dtypes[name]) is None else Address(d, name not in misaligned) for name in _TENSORS]
    launching = backend.loaded()
    parts = Address(torch.float32) if statistics else None
    found = launching.kernel_launches(made, tuple(tensors), _EPS, _SLOPE, parts)
    return [(kernel, arguments, options | launching.FUSED) for kernel, _, arguments, options in found]


def refusal() -> str | None:
    """Why nothing can be compiled here, or ``None``."""
    reason = backend.triton_problem()
    if reason is None and backend.loaded().INTERPRETED:
        return "TRITON_INTERPRET=1: kernels run in Triton's interpreter, and none is compiled"
    return reason


def first_compile_seconds(capability: tuple[int, int]) -> float:
    """How long it takes to compile the kernel of a bf16 1x1 unit that is in no cache. Raises as Triton does."""
    import triton

    c_in, c_out, size = 256, 128, 26
    x, weight, y = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        for shape in ((8, c_in, size, size), (c_out, c_in, 1, 1), (8, c_out, size, size))
    )
    chip = REFERENCE_CHIPS[Chip.of(capability, 1, 1).family]
    made = plan(x, weight, None, y, _PLAIN, chip, {}, aligned=(True, True))
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        start = time.perf_counter()
        compile_plan(made, torch.bfloat16, capability)
        return time.perf_counter() - start


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    import triton

    return str(triton.knobs.cache.dir)


def specialised(
    kernel: Any, arguments: Sequence[Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[Any]]]:
    """Types, constants and attributes of a kernel's positional arguments, as Triton's ``ASTSource`` takes them.

    An argument that Triton looked at has a list of attributes, empty or not: its cache tells that from none.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for i, (param, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if param.is_constexpr or value is None or (_is_number(value) and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[i,], attributes[i,] = "constexpr", value, []
        elif isinstance(value, Address):
            signature[param.name], attributes[i,] = _POINTERS[value.dtype], _multiple_of_16(value.aligned)
        elif _is_number(value):
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if not param.do_not_specialize:
                attributes[i,] = _multiple_of_16(value % 16 == 0)
        else:
            signature[param.name] = "fp32"
    return signature, constants, attributes


def _compiled(kernel: Any, arguments: Sequence[Any], options: dict[str, int], capability: tuple[int, int]) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    major, minor = capability
    source = ASTSource(kernel, *specialised(kernel, arguments))
    return compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)


def _is_number(value: Any) -> bool:
    return type(value) is int


def _multiple_of_16(holds: bool) -> list[Any]:
    return [["tt.divisibility", 16]] if holds else []
