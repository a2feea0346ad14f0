"""The Triton backend: the whole unit as one kernel, or two where the sum is split, for inference on NVIDIA GPUs of
compute capability 8.0 and later. It needs Triton, which comes with torch's CUDA builds, and no compiler. Units with
gradients are served by ``training.py``.

Scale and shift come from the live tensors inside the kernel, so nothing is ever stale. Importing this module imports no
Triton: that happens on the first question whether it can run.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends import calls
from pointfuse.backends.calls import conv_refusal
from pointfuse.backends.triton import tables
from pointfuse.backends.triton.configs import ShapeClass
from pointfuse.problem import Refused

__all__ = ["conv_bn_act", "conv_refusal", "execute", "min_input", "not_faster", "unusable_reason"]

OLDEST = (3, 6)
_NOT_FASTER = "it did not measure faster than PyTorch's own operators, or was not measured"

_launching: Any = None


@functools.cache
def unusable_reason() -> str | None:
    """Why the backend cannot run here, with what to do about it, or ``None`` where it can."""
    reason = triton_problem()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a build with it"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is false"
    if all(torch.cuda.get_device_capability(i) < (8, 0) for i in range(torch.cuda.device_count())):
        return "no GPU here has compute capability 8.0 or later"
    return None


@functools.cache
def triton_problem() -> str | None:
    """Why Triton is missing or cannot be used, or ``None`` once the kernels are loaded."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is too old: pip install 'triton>=3.6'"
    try:
        loaded()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"Triton {version} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def loaded() -> Any:
    """The module that needs Triton, imported when it is first needed."""
    global _launching
    if _launching is None:
        _launching = importlib.import_module("pointfuse.backends.triton.launching")
    return _launching


def min_input(conv: nn.Conv2d, bn: nn.Module | None) -> int:
    """From how many input elements the backend wants to be asked: always."""
    return 0


def not_faster(conv: nn.Conv2d) -> str | None:
    """Why "auto" leaves every unit of a convolution to ATen, as far as the module tells, or ``None``."""
    reason = conv_refusal(conv) or unusable_reason()
    if reason is not None:
        return reason
    kernel = "x".join(str(n) for n in conv.kernel_size)
    channels = (conv.out_channels, conv.in_channels)
    alike = (
        ShapeClass.of(kernel, s.layout, s.products, s.pixels, *channels) == s
        and (s.products == "half") == (conv.weight.dtype != torch.float32)
        for s in tables.faster(conv.weight.device)
    )
    return None if any(alike) else _NOT_FASTER


def conv_bn_act(*unit: Any, frozen: bool = False, channels_last: bool = False, only_faster: bool = False) -> Tensor:
    """The unit, as ``calls.arguments`` takes it. In a graph that is traced, one operator.

    Raises :class:`Refused` for a call that these kernels do not serve, wrong ones included: PyTorch has the error to
    say. With ``only_faster``, which is for eager calls, also where nothing shows that they are faster than ATen.
    """
    arguments = calls.arguments(*unit, frozen=frozen, channels_last=channels_last)
    if only_faster:
        x, weight, config = arguments[0], arguments[1], arguments[8]
        if unusable_reason() is not None or not tables.measured_faster(x, weight, config):
            raise Refused(_NOT_FASTER)
    # A mode that watches operators, as a tracer does, has to see one.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.ops.pointfuse._conv_bn_act_triton(*arguments)
    return execute(*arguments)


def execute(*arguments: Any) -> Tensor:
    """A unit by its eleven arguments, eagerly."""
    return (_launching or loaded()).execute(*arguments)
