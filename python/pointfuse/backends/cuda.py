"""The CUDA C++ backend: the whole unit as one kernel, for inference on GPUs of compute capability 8.0 and later.
Units with gradients are served by ``cuda_training.py``.

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

from pointfuse.backends import calls
from pointfuse.problem import Activation, BatchNorm, Geometry, Refused

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"
# What setup.py built, and why it did not build the rest.
BUILD_RECORD = LIBRARY.with_name("_build.json")
# Counts the changes of the operator's arguments; the library says for which it was built.
INTERFACE = 2

# As torch_binding.cpp says them.
_REFUSED = "pointfuse does not serve this call: "
_OUT_OF_MEMORY = "pointfuse: CUDA out of memory"

# As every backend has it, for what a module tells of the calls that are served.
conv_refusal = calls.conv_refusal
# Set by ops.py, which defines it. A graph that had to look it up would find this changed, and be compiled again.
operator: Any = None


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
        # Of torch's error the cause says what is missing.
        return f"{path.name} cannot be loaded ({str(error.__cause__ or error).splitlines()[0]}): {rebuild}"
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
    arguments = calls.arguments(
        x, weight, bias, bn, activation, geometry, residual, residual_order, frozen=frozen, channels_last=channels_last
    )
    return call(operator, *arguments)


def call(operator: Any, *arguments: Any) -> Any:
    """What an operator of the library returns. Raises as :func:`conv_bn_act` does."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        message = str(error)
        if message.startswith(_REFUSED):
            raise Refused(message.removeprefix(_REFUSED).splitlines()[0]) from None
        if message.startswith(_OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(f"{message} for the output of a unit, or for its partial sums") from None
        raise


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
