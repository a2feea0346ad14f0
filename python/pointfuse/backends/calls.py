"""Which calls the kernels of this package serve, and a call's arguments as their operators take them.

The kernels are for NVIDIA GPUs, in whichever language they are written: their backends serve the same calls, for the
same reasons, with the same eleven arguments. Those are of units without gradients; the convolution of one with
gradients (``cuda_training.py``, ``triton/training.py``) passes the same checks. What stands here knows of neither.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from pointfuse.problem import ACTIVATIONS, RESIDUAL_ORDERS, Activation, BatchNorm, Geometry, Pair, Refused

DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
PLAIN = frozenset((Tensor, nn.Parameter))
# What torch.export traces with.
_TRACED = PLAIN | {FakeTensor}
_KERNELS = frozenset(((1, 1), (3, 3)))
_WRONG_DTYPE = "its dtype is none of float32, float16 and bfloat16"
_UNKNOWN_DTYPE = "dtypes are float32, float16 and bfloat16"

# An operator's argument ``config``: a byte each for stride and padding, then the epilogue and the flags.
_ACTIVATIONS_BY_CODE = ("identity", "leaky_relu", "relu", "relu6", "silu")
_ACTIVATION_CODES = {name: _ACTIVATIONS_BY_CODE.index(name) << 32 for name in ACTIVATIONS}
_RESIDUAL_CODES = {order: (i + 1) << 35 for i, order in enumerate(RESIDUAL_ORDERS)}
TF32, FROZEN, CHANNELS_LAST = 1 << 37, 1 << 38, 1 << 39
_geometry_codes: dict[Geometry, int] = {}

# x, weight, bias, mean, var, gamma, beta, residual, config, eps, negative_slope
Arguments = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
    int, float, float,
]  # fmt: skip


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
    if not on_gpu(conv.weight):
        return "it is not on a GPU"
    if conv.weight.dtype not in DTYPES:
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


def arguments(
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
) -> Arguments:
    """A unit, as ``aten.conv_bn_act`` takes it, as the kernels' operators take it: eleven positional arguments.

    ``frozen`` promises that the weight is not written while the model runs, and allows a bias in fp32 beside
    half-precision weights; ``channels_last`` then asks for an output in that format whatever the inputs are.

    Raises :class:`Refused` for a call that these kernels do not serve, though PyTorch may. It costs 2 us on every call.
    What makes a call wrong rather than unusual, :func:`misfit`, is asked only for a compiler, which cannot fall back
    once its graph runs: in eager mode a binding in C++ looks more cheaply.
    """
    compiling = torch.compiler.is_compiling()
    reason = _operand_refusal(x, weight, bias, bn, residual, compiling)
    if reason is not None:
        raise Refused(reason)
    # A graph that had looked here would be compiled again whenever another geometry is met.
    config = 0 if compiling else _geometry_codes.get(geometry, 0)
    sizes = weight.shape
    # A slice of a torch.Size costs 0.1 us more.
    if not config or len(sizes) != 4 or (sizes[2], sizes[3]) not in _KERNELS:
        reason = geometry_refusal(sizes[2:], geometry)
        if reason is None and compiling:
            reason = misfit(x, weight, bias, bn, residual, geometry, frozen)
        if reason is not None:
            raise Refused(reason)
        config = _geometry_code(geometry, weight)
        # A model has a handful; a program that makes up geometries must not fill the memory.
        if not compiling and geometry.padding != "same" and len(_geometry_codes) < 256:
            _geometry_codes[geometry] = config
    config |= _ACTIVATION_CODES[activation.name]
    if residual is not None:
        config |= _RESIDUAL_CODES[residual_order]
    if x.dtype is torch.float32 and tf32_allowed():
        config |= TF32
    if frozen:
        config |= FROZEN | CHANNELS_LAST if channels_last else FROZEN
    slope = activation.negative_slope
    if bn is None:
        return x, weight, bias, None, None, None, None, residual, config, 0.0, slope
    mean, var, gamma, beta, _, _, eps = bn
    return x, weight, bias, mean, var, gamma, beta, residual, config, eps, slope


def epilogue_config(activation: Activation, residual_order: str) -> int:
    """The part of an operator's ``config`` that says the activation, and where a residual is added."""
    return _ACTIVATION_CODES[activation.name] | _RESIDUAL_CODES[residual_order]


def misfit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm | None,
    residual: Tensor | None,
    geometry: Geometry,
    frozen: bool = False,
) -> str | None:
    """What makes a call wrong, in shapes, dtypes and devices, that :func:`arguments` has no other reason against.

    It refuses what ``csrc/torch_binding.cpp`` does, in its order and words, which its plans are not part of.
    """
    if x.dim() != 4 or weight.dim() != 4:
        return "x, weight and residual need four dimensions"
    dtype, device = x.dtype, x.device
    reason = _image_misfit(weight, dtype, device)
    if reason is not None:
        return reason
    _, c_in, height, width = x.shape
    c_out, c_taken, _, _ = weight.shape
    if c_in < 1 or c_out < 1 or height < 1 or width < 1:
        return "every size but the batch must be at least 1"
    if c_taken != c_in:
        return "weight and x must have the same input channels"
    shape = _output_shape(x, weight, _geometry_code(geometry, weight))
    if shape[2] < 1 or shape[3] < 1:
        return "the padded plane must not be smaller than the kernel"
    if residual is not None:
        reason = _image_misfit(residual, dtype, device)
        if reason is not None:
            return reason
        if residual.shape != shape:
            return "the residual must have the output's shape"
    if bias is not None:
        if bias.dtype not in DTYPES:
            return _UNKNOWN_DTYPE
        if bias.dtype != dtype and not frozen:
            return "bias must have the dtype of x"
        reason = _vector_misfit(bias, c_out, bias.dtype, device)
        if reason is not None:
            return reason
    return None if bn is None else _norm_misfit(bn, c_out, dtype, device)


def empty_output(x: Tensor, weight: Tensor, config: int) -> Tensor:
    """An output for a call to be written to: ``[batch, c_out, height_out, width_out]``, of the dtype of ``x``.

    It is channels_last if ``x`` or ``weight`` is by PyTorch's rule, or if ``config`` asks for it, and contiguous
    otherwise.
    """
    channels_last = config & CHANNELS_LAST or _is_channels_last(x) or _is_channels_last(weight)
    shape = _output_shape(x, weight, config)
    if not channels_last:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    # By its strides: a channels_last tensor of torch.empty would be filled in compiled graphs.
    _, c_out, height, width = shape
    strides = (height * width * c_out, 1, width * c_out, c_out)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def stride_and_padding(config: int) -> tuple[Pair, Pair]:
    """Stride and padding of an operator's ``config``."""
    return (config & 0xFF, config >> 8 & 0xFF), (config >> 16 & 0xFF, config >> 24 & 0xFF)


def activation_of(config: int) -> str:
    """The name of the activation of an operator's ``config``."""
    return _ACTIVATIONS_BY_CODE[config >> 32 & 7]


def residual_order_of(config: int) -> str | None:
    """The order of an operator's ``config``, or ``None`` where there is no residual."""
    code = config >> 35 & 3
    return RESIDUAL_ORDERS[code - 1] if code else None


def allows_tf32(config: int) -> bool:
    """Whether an operator's ``config`` lets it round products of fp32 to TF32."""
    return bool(config & TF32)


def is_frozen(config: int) -> bool:
    """Whether an operator's ``config`` promises that the weight is not written while the model runs."""
    return bool(config & FROZEN)


def asks_channels_last(config: int) -> bool:
    """Whether an operator's ``config`` asks for a channels_last output whatever the inputs are."""
    return bool(config & CHANNELS_LAST)


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels can read a tensor. Tests that run them on the CPU replace it."""
    return tensor.is_cuda


def _operand_refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm | None, residual: Tensor | None, compiling: bool
) -> str | None:
    plain = _TRACED if compiling else PLAIN
    if type(x) not in plain or type(weight) not in plain:
        return "x or the weight is not a plain tensor"
    if not on_gpu(x):
        return "x is not on a GPU"
    if x.dtype not in DTYPES:
        return _WRONG_DTYPE
    if bn is not None and (bn.batch_statistics or bn.running_mean is None or not bn.eps > 0):
        return "batch norm uses the batch's own statistics"
    if torch.is_grad_enabled() and _requires_grad(x, weight, bias, bn, residual):
        return "gradients are recorded: these kernels are for inference"
    if torch.is_autocast_enabled():
        return "autocast is active: convert the model to half precision instead"
    if x.layout is not torch.strided:
        return "x is sparse"
    if compiling:
        return None
    transformed = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    return "a function transform or a trace is active" if transformed or torch._C._is_tracing() else None


def _geometry_code(geometry: Geometry, weight: Tensor) -> int:
    stride, padding = geometry.stride, geometry.padding
    if isinstance(padding, str):
        # Odd kernels pad alike on both sides.
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if padding == "same" else (0, 0)
    return stride[0] | stride[1] << 8 | padding[0] << 16 | padding[1] << 24


def _output_shape(x: Tensor, weight: Tensor, config: int) -> tuple[int, int, int, int]:
    # As Geometry.output_plane has it, in a third of its time.
    (stride_h, stride_w), (padding_h, padding_w) = stride_and_padding(config)
    batch, _, height, width = x.shape
    c_out, _, kernel_h, kernel_w = weight.shape
    height, width = height + 2 * padding_h - kernel_h, width + 2 * padding_w - kernel_w
    return batch, c_out, height // stride_h + 1, width // stride_w + 1


def _is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes ``[outer, channels, height, width]`` for channels_last: ``csrc/memory_format.h``."""
    if type(t) not in PLAIN:
        # What tracing sees. This one knows symbolic sizes, and takes 25 us.
        return torch._prims_common.suggest_memory_format(t) == torch.channels_last
    _, channels, height, width = t.shape
    outer, channel, row, column = t.stride()
    # Each dimension steps over the one inside it, of which the channels are the innermost.
    steps_over = column >= channel * channels and row >= column * width and outer >= row * height
    return steps_over and channel != 0 and row * height != channel and t.numel() > 0


def _image_misfit(t: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    if t.dim() != 4:
        return "x, weight and residual need four dimensions"
    if t.device != device:
        return "all tensors must be on one device"
    if t.dtype != dtype:
        return "x, weight and residual must have one dtype" if t.dtype in DTYPES else _UNKNOWN_DTYPE
    return None


def _norm_misfit(bn: BatchNorm, c_out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    if mean.dtype not in DTYPES:
        return _UNKNOWN_DTYPE
    if mean.dtype not in (dtype, torch.float32):
        return "batch norm must be of the dtype of x or float32"
    if var is None:
        return "batch norm needs running_var beside running_mean"
    for t in (mean, var, bn.weight, bn.bias):
        reason = None if t is None else _vector_misfit(t, c_out, mean.dtype, device)
        if reason is not None:
            return reason
    return None


def _vector_misfit(t: Tensor, c_out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with a tensor of one number an output channel."""
    if t.dim() != 1 or t.shape[0] != c_out:
        return "bias and batch norm need one number a channel"
    if t.device != device:
        return "all tensors must be on one device"
    if t.dtype != dtype:
        return "the tensors of batch norm must have one dtype" if t.dtype in DTYPES else _UNKNOWN_DTYPE
    if c_out > 1 and t.stride(0) != 1:
        return "a tensor of bias or batch norm is not contiguous"
    return None


def _requires_grad(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNorm | None, residual: Tensor | None
) -> bool:
    for t in (x, weight, bias, residual, *(() if bn is None else bn[:4])):  # noqa: SIM110  # any() costs 0.4 us more
        if t is not None and t.requires_grad:
            return True
    return False
