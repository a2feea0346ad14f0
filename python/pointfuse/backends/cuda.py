"""The CUDA C++ backend: the whole unit as one kernel, for inference on GPUs of compute capability 8.0 and later.

Scale and shift come from the live tensors inside the kernel, so nothing is ever stale. The library ``_cuda.so`` beside
this package is loaded on the first question whether it can run; importing pointfuse does not touch it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pointfuse.problem import ACTIVATIONS, RESIDUAL_ORDERS, Activation, BatchNorm, Geometry, Refused

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"
# What setup.py built, and why it did not build the rest.
BUILD_RECORD = LIBRARY.with_name("_build.json")
# Counts the changes of the operator's arguments; the library says for which it was built.
INTERFACE = 1

_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_PLAIN = frozenset((Tensor, nn.Parameter))
_KERNELS = frozenset(((1, 1), (3, 3)))
_WRONG_DTYPE = "its dtype is none of float32, float16 and bfloat16"
# As torch_binding.cpp says them.
_REFUSED = "pointfuse does not serve this call: "
_OUT_OF_MEMORY = "pointfuse: CUDA out of memory"

# The operator's argument ``config``: a byte each for stride and padding, then the epilogue and the flags.
_ACTIVATION_CODES = {
    name: ("identity", "leaky_relu", "relu", "relu6", "silu").index(name) << 32 for name in ACTIVATIONS
}
_RESIDUAL_CODES = {order: (i + 1) << 35 for i, order in enumerate(RESIDUAL_ORDERS)}
_TF32, _FROZEN, _CHANNELS_LAST = 1 << 37, 1 << 38, 1 << 39
_geometry_codes: dict[Geometry, int] = {}
_operator: Any = None


@functools.cache
def unusable_reason() -> str | None:
    """Why the backend cannot run here, with what to do about it, or ``None`` where it can."""
    reason = library_problem(LIBRARY)
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a build with it"
    if not torch.cuda.is_available():
        return _library().pointfuse_unusable_reason().decode() or "torch.cuda.is_available() is false"
    return _library().pointfuse_unusable_reason().decode() or None


def library_problem(path: Path) -> str | None:
    """Why the operators' library is missing or cannot be loaded, or ``None`` once it is loaded."""
    if not path.is_file():
        return f"its kernels are not built: {build_record().get('cuda', 'nothing was compiled for this copy')}"
    rebuild = "build it again with `pip install --no-build-isolation .`, or `make build` in a checkout"
    if not _is_whole(path):
        return f"{path.name} is damaged: {rebuild}"
    try:
        torch.ops.load_library(str(path))
        interface = ctypes.CDLL(str(path)).pointfuse_interface()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({str(error).splitlines()[0]}): {rebuild}"
    return None if interface == INTERFACE else f"{path.name} is of another version of pointfuse: {rebuild}"


def build_record() -> dict[str, str]:
    """What the build said of each compiled part; empty where nothing was built."""
    try:
        return json.loads(BUILD_RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def min_input(conv: nn.Conv2d, bn: nn.Module | None) -> int:
    """From how many input elements the backend wants to be asked: always."""
    return 0


def geometry_refusal(kernel: tuple[int, ...], geometry: Geometry) -> str | None:
    """Why no kernel moves over the plane in this way, or ``None``."""
    if geometry.groups != 1:
        return "it has groups"
    if geometry.dilation != (1, 1):
        return "it is dilated"
    if kernel not in _KERNELS:
        return "its kernel is neither 1x1 nor 3x3"
    if isinstance(geometry.padding, str):
        known = geometry.padding == "valid" or (geometry.padding == "same" and geometry.stride == (1, 1))
        return None if known else f"padding={geometry.padding!r} has a stride, or no meaning"
    if not geometry.well_formed or max(*geometry.stride, *geometry.padding) > 255:
        return "its stride or padding is not from 0 to 255"
    return None


def conv_refusal(conv: nn.Conv2d) -> str | None:
    """Why no unit of a convolution is served, as far as the module tells, or ``None``."""
    if not _on_gpu(conv.weight):
        return "it is not on a GPU"
    if conv.weight.dtype not in _DTYPES:
        return _WRONG_DTYPE
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    return geometry_refusal(conv.kernel_size, geometry)


def tf32_allowed() -> bool:
    """Whether torch lets fp32 convolutions round products to TF32, by its older and its newer setting.

    A compiled graph keeps the answer of when it was traced.
    """
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


# As torch.compiler.assume_constant_result does, which would import the compiler with the package.
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    activation: Activation,
    geometry: Geometry,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    residual_inplace: bool = False,
    *,
    frozen: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """The unit as one kernel; ``bn=None`` leaves batch norm out.

    The output is channels_last if ``x`` or ``weight`` is, or ``channels_last`` asks for it. ``frozen`` promises that
    the weight is not written while the model runs, and allows a bias in fp32 beside half-precision weights.

    Raises :class:`Refused` for a call that these kernels do not serve, wrong ones included: PyTorch has the error to
    say. Raises ``RuntimeError`` with the plan where CUDA reports an error.
    """
    reason = refusal(x, weight, bias, bn, geometry, residual)
    if reason is not None:
        raise Refused(reason)
    config = _geometry_codes.get(geometry) or _geometry_code(geometry, weight)
    config |= _ACTIVATION_CODES[activation.name]
    if residual is not None:
        config |= _RESIDUAL_CODES[residual_order]
    if x.dtype is torch.float32 and tf32_allowed():
        config |= _TF32
    if frozen:
        config |= _FROZEN | _CHANNELS_LAST if channels_last else _FROZEN
    if bn is None:
        mean = var = gamma = beta = None
        eps = 0.0
    else:
        mean, var, gamma, beta, _, _, eps = bn
    try:
        return (_operator or _find_operator())(
            x, weight, bias, mean, var, gamma, beta, residual, config, eps, activation.negative_slope
        )
    except RuntimeError as error:
        message = str(error)
        if message.startswith(_REFUSED):
            raise Refused(message.removeprefix(_REFUSED).splitlines()[0]) from None
        if message.startswith(_OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(f"{message} for the output of a unit, or for its partial sums") from None
        raise


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm | None, geometry: Geometry, residual: Tensor | None
) -> str | None:
    """Why these kernels do not serve a call, though PyTorch may, or ``None``. It costs a microsecond on every call.

    What makes a call wrong rather than unusual (shapes, dtypes and devices that do not fit) is left to the binding,
    where looking is cheap.
    """
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return "x or the weight is not a plain tensor"
    if not _on_gpu(x):
        return "x is not on a GPU"
    if x.dtype not in _DTYPES:
        return _WRONG_DTYPE
    if bn is not None and (bn.batch_statistics or bn.running_mean is None or not bn.eps > 0):
        return "batch norm uses the batch's own statistics"
    if torch.is_grad_enabled() and _requires_grad(x, weight, bias, bn, residual):
        return "gradients are recorded: these kernels are for inference"
    if torch.is_autocast_enabled():
        return "autocast is active: convert the model to half precision instead"
    if x.layout is not torch.strided:
        return "x is sparse"
    if torch.compiler.is_compiling():
        return geometry_refusal(weight.shape[2:], geometry) or _misfit(x, weight, bias, bn, residual, geometry)
    transformed = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    if transformed or torch._C._is_tracing():
        return "a function transform or a trace is active"
    kernel = weight.shape[2:]
    if geometry in _geometry_codes and kernel in _KERNELS:
        return None
    return geometry_refusal(kernel, geometry)


def stride_and_padding(config: int) -> tuple[list[int], list[int]]:
    """Stride and padding of an operator's ``config``."""
    fields = [config >> shift & 0xFF for shift in (0, 8, 16, 24)]
    return fields[:2], fields[2:]


def asks_channels_last(config: int) -> bool:
    """Whether an operator's ``config`` asks for a channels_last output whatever the inputs are."""
    return bool(config & _CHANNELS_LAST)


def _find_operator() -> Any:
    global _operator
    _operator = torch.ops.pointfuse._conv_bn_act_cuda.default
    return _operator


def _geometry_code(geometry: Geometry, weight: Tensor) -> int:
    stride, padding = geometry.stride, geometry.padding
    if padding == "same":
        # Odd kernels pad alike on both sides.
        return stride[0] | stride[1] << 8 | weight.shape[2] // 2 << 16 | weight.shape[3] // 2 << 24
    if isinstance(padding, str):
        padding = (0, 0)
    code = stride[0] | stride[1] << 8 | padding[0] << 16 | padding[1] << 24
    # A model has a handful; a program that makes up geometries must not fill the memory.
    if geometry_refusal((1, 1), geometry) is None and len(_geometry_codes) < 256 and not torch.compiler.is_compiling():
        _geometry_codes[geometry] = code
    return code


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _misfit(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm | None, residual: Tensor | None, geometry: Geometry
) -> str | None:
    """What the binding would refuse, for a compiler that cannot fall back once its graph runs."""
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or min(*x.shape[1:], *weight.shape) < 1:
        return "x and weight do not fit"
    stride, padding = stride_and_padding(_geometry_code(geometry, weight))
    plane = Geometry(tuple(stride), tuple(padding)).output_plane(x.shape, weight.shape)  # type: ignore[arg-type]
    if min(plane) < 1 or (residual is not None and residual.shape != (x.shape[0], weight.shape[0], *plane)):
        return "the residual has not the output's shape"
    norm = [] if bn is None else [t for t in bn[:4] if t is not None]
    vectors = norm if bias is None else [bias, *norm]
    if any(t.shape != weight.shape[:1] or not t.is_contiguous() for t in vectors):
        return "a tensor of bias or batch norm is not a contiguous vector of the output channels"
    same_dtype = [t for t in (weight, bias, residual) if t is not None]
    if any(t.dtype != x.dtype for t in same_dtype) or any(t.dtype not in (x.dtype, torch.float32) for t in norm):
        return "its tensors have several dtypes"
    if any(t.dtype != norm[0].dtype for t in norm) or any(t.device != x.device for t in (*same_dtype, *norm)):
        return "its tensors have several dtypes or devices"
    return None


def _requires_grad(*operands: Any) -> bool:
    x, weight, bias, bn, residual = operands
    tensors = (x, weight, bias, residual, *(() if bn is None else bn[:4]))
    return any(t is not None and t.requires_grad for t in tensors)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.pointfuse_unusable_reason.restype = ctypes.c_char_p
    return library


def _is_whole(path: Path) -> bool:
    """Whether an ELF file is as long as its own headers say: the loader would crash on one cut short."""
    if sys.platform != "linux":
        return True
    with path.open("rb") as file:
        data = file.read(64)
    if len(data) < 64 or data[:4] != b"\x7fELF" or data[4:6] != b"\x02\x01":
        return False
    offset, entry, count = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
    return path.stat().st_size >= offset + entry * count
