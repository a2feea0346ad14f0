"""The passes of a training step by Triton kernels, for eager calls on NVIDIA GPUs of compute capability 8.0 and later.

Forward, :func:`conv` and :func:`normalise`; backward, :func:`sums` and :func:`gradients`, whose ``dy`` is the gradient
of the convolution's output. Nothing here is differentiable, and importing it imports no Triton. Each function raises
:class:`Refused` for what it does not serve.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pointfuse.backends import calls
from pointfuse.backends import triton as backend
from pointfuse.problem import IDENTITY, Activation, Geometry, Refused

# Elements of a tile: 16 a thread, which are two or four loads of 16 bytes.
_TILE = 2048
_WARPS = 4
# So many channels side by side are 128 bytes in half precision; so many pixels fill a tile with two channels.
_MOST_CHANNELS, _MOST_PIXELS = 64, 1024
# Programs of a launch, where there are tiles for them: several for every multiprocessor of the GPUs served. More would
# read the parts more often.
_PROGRAMS = 1024
# More parts than these are added up before, since every program reads those of its channels.
_MOST_MERGED, _MOST_ADDED = 32, 16
# Parts that a program reads at once.
_BLOCK_PARTS = 16
_CHANNELS_MERGED = 32


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the statistics of its result in parts.

    Gives ``y``, ``[batch, c_out, h_out, w_out]``, and ``parts``, fp32 ``[P, 3, c_out]``: of each part the count, the
    mean and the sum of squared deviations from it, before ``y`` is rounded; ``None`` without ``statistics``. ``y`` is
    the same, bit for bit, either way.
    """
    launching, _ = _kernels()
    with torch.no_grad():
        *tensors, config, _, _ = calls.arguments(x, weight, bias, None, IDENTITY, geometry)
    launch = launching.launch_of(tuple(tensors), config, whole=True, statistics=statistics)
    count = 0 if launch is None else launch.plan.pixel_tiles
    parts = torch.empty(count, 3, weight.shape[0], dtype=torch.float32, device=x.device) if statistics else None
    if launch is None:
        return calls.empty_output(x, weight, config), parts
    with launching.on(x.device):
        return launch(tuple(tensors), 0.0, 0.0, parts), parts


def normalise(
    y: Tensor,
    parts: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation,
    residual_order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, residual and activation of a convolution's output.

    Args:
        y: ``[batch, c_out, height, width]``, contiguous or channels_last.
        parts: of its statistics, as :func:`conv` gives them, of two elements a channel or more; not looked at where
            ``mean`` and ``rstd`` are given.
        mean, rstd: fp32 ``[c_out]``, or ``None`` for those of the parts.
        gamma, beta: ``[c_out]``, fp32 or of the dtype of ``y``, or ``None``.
        residual: of the shape and dtype of ``y``, or ``None``.
        running_mean, running_var: as ``gamma``; updated in place where the statistics are those of the parts.
        momentum, eps: batch norm's.
        activation, residual_order: as in ``problem.py``.

    Gives ``out``, laid out as ``y``, with the ``mean`` and ``rstd`` that were used.
    """
    _, kernels = _kernels()
    view = _view(y)
    _check_vectors(y, (mean, rstd, gamma, beta, running_mean, running_var))
    if mean is None or rstd is None:
        assert parts is not None
        parts = _fewer_statistics(parts)
        mean, rstd = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    else:
        parts = None
    out = torch.empty_like(y)
    _launch(
        kernels.normalise, view.programs, y.device,
        y, parts, mean, rstd, gamma, beta, view.like(residual), out, running_mean, running_var,
        0 if parts is None else parts.shape[0], *view.sizes, float(momentum), float(eps),
        float(activation.negative_slope), activation.name, residual_order == "act_add", *view.constants, _BLOCK_PARTS,
        _interpreted(),
    )  # fmt: skip
    return out, mean, rstd


def sums(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    residual_order: str,
) -> Tensor:
    """The sums that the gradients of batch norm with the batch's statistics need, in parts, fp32 ``[P, 2, c_out]``.

    They are those of dz, the gradient before activation and residual, and of dz * (y - mean) * rstd. ``grad_out`` has
    the shape and dtype of ``y``; the other arguments are those of :func:`normalise`.
    """
    _, kernels = _kernels()
    view = _view(y)
    _check_vectors(y, (mean, rstd, gamma, beta))
    parts = torch.empty(view.slices, 2, y.shape[1], dtype=torch.float32, device=y.device)
    _launch(
        kernels.sums, view.programs, y.device,
        view.like(grad_out), y, mean, rstd, gamma, beta, _added_before(residual, residual_order, view), parts,
        *view.sizes, float(activation.negative_slope), activation.name, *view.constants,
    )  # fmt: skip
    return _fewer_sums(parts)


def gradients(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    residual_order: str,
    parts: Tensor | None,
    count: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the arguments of :func:`normalise`: ``dy``, ``d_residual``, ``d_gamma`` and ``d_beta``.

    Args:
        parts: as :func:`sums` gives them, of which there may be one, or ``None`` where the statistics were given.
        count: elements a channel that the statistics are of, which may be more than those of ``y``.
        want_residual: whether to give the gradient of a residual that is added before the activation.

    The other arguments are those of :func:`sums`. ``dy`` and ``d_residual`` are laid out as ``y``; ``d_gamma`` and
    ``d_beta``, fp32 ``[c_out]``, are the sums themselves, and ``None`` without ``parts``.
    """
    _, kernels = _kernels()
    view = _view(y)
    _check_vectors(y, (mean, rstd, gamma, beta))
    residual = _added_before(residual, residual_order, view)
    dy = torch.empty_like(y)
    d_residual = torch.empty_like(y) if want_residual and residual is not None else None
    d_gamma = d_beta = None
    if parts is not None:
        parts = _fewer_sums(parts.contiguous())
        d_gamma, d_beta = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    _launch(
        kernels.gradients, view.programs, y.device,
        view.like(grad_out), y, mean, rstd, gamma, beta, residual, parts, dy, d_residual, d_gamma, d_beta,
        0 if parts is None else parts.shape[0], *view.sizes, float(count), float(activation.negative_slope),
        activation.name, *view.constants, _BLOCK_PARTS, _interpreted(),
    )  # fmt: skip
    return dy, d_residual, d_gamma, d_beta


@dataclass(frozen=True)
class _View:
    """How the kernels see a tensor, and share it among their programs.

    Attributes:
        sizes: its outer size, channels and inner size.
        format: its memory format.
        block_pixels, block_channels: of a tile.
        slices: programs that share a block of channels.
        programs: of a launch.
    """

    sizes: tuple[int, int, int]
    format: torch.memory_format
    block_pixels: int
    block_channels: int
    slices: int
    programs: int

    @property
    def constants(self) -> tuple[bool, int, int, int]:
        """The kernels' arguments that say the layout and the tile."""
        channels_last = self.format is torch.channels_last
        vector = math.gcd(self.sizes[1 if channels_last else 2], 16)
        return channels_last, vector, self.block_pixels, self.block_channels

    def like(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor of the same shape in the same format; a copy where it is in another."""
        return None if tensor is None else tensor.resolve_neg().contiguous(memory_format=self.format)


def _view(y: Tensor) -> _View:
    batch, channels, height, width = y.shape
    # Of a tensor in both formats too, whose channels or pixels are one: the pixels of all images then make a tile.
    if y.is_contiguous(memory_format=torch.channels_last):
        layout, outer, inner = torch.channels_last, 1, batch * height * width
        block_channels = min(_MOST_CHANNELS, _power_of_two(channels))
        block_pixels = _TILE // block_channels
    elif y.is_contiguous():
        layout, outer, inner = torch.contiguous_format, batch, height * width
        block_pixels = min(_MOST_PIXELS, _power_of_two(inner))
        block_channels = min(_TILE // block_pixels, _power_of_two(channels))
    else:
        raise Refused("y is neither contiguous nor channels_last")
    blocks = -(-channels // block_channels)
    slices = min(outer * -(-inner // block_pixels), max(1, _PROGRAMS // blocks))
    return _View((outer, channels, inner), layout, block_pixels, block_channels, slices, blocks * slices)


def _check_vectors(y: Tensor, vectors: tuple[Tensor | None, ...]) -> None:
    """Raise :class:`Refused` for numbers of the channels that the kernels cannot read where they lie."""
    if y.dtype not in calls.DTYPES:
        raise Refused(f"y is of {y.dtype}")
    for t in vectors:
        if t is not None and (t.dtype not in (y.dtype, torch.float32) or not t.is_contiguous()):
            raise Refused("a tensor of batch norm is not contiguous, or neither of the dtype of x nor float32")


def _added_before(residual: Tensor | None, residual_order: str, view: _View) -> Tensor | None:
    """The residual where the activation's derivative depends on it."""
    return view.like(residual) if residual_order == "add_act" else None


def _fewer_statistics(parts: Tensor) -> Tensor:
    """Parts ``[P, 3, c_out]`` merged until every program may read them."""
    count, _, channels = parts.shape
    if count <= _MOST_MERGED:
        return parts
    _, kernels = _kernels()
    share = -(-count // _MOST_ADDED)
    merged = parts.new_empty(-(-count // share), 3, channels)
    programs = len(merged) * -(-channels // _CHANNELS_MERGED)
    _launch(
        kernels.merge_statistics, programs, parts.device, parts, merged, count, share, channels,
        _CHANNELS_MERGED, _BLOCK_PARTS,
    )  # fmt: skip
    return merged


def _fewer_sums(parts: Tensor) -> Tensor:
    """Parts ``[P, 2, c_out]`` added up unless every program may read them."""
    count, _, channels = parts.shape
    if count <= _MOST_ADDED:
        return parts
    _, kernels = _kernels()
    added = parts.new_empty(1, 2, channels)
    programs = -(-2 * channels // _CHANNELS_MERGED)
    _launch(
        kernels.add_parts, programs, parts.device, parts, added, count, 2 * channels, _CHANNELS_MERGED, _BLOCK_PARTS
    )
    return added


def _launch(kernel: Any, programs: int, device: torch.device, *arguments: Any) -> None:
    launching, _ = _kernels()
    with launching.on(device):
        kernel[programs, 1, 1](*arguments, num_warps=_WARPS, **launching.FUSED)


def _interpreted() -> bool:
    return bool(_kernels()[0].INTERPRETED)


def _kernels() -> tuple[Any, Any]:
    """The modules that need Triton: the launching of convolutions, and the kernels of the other passes."""
    reason = backend.unusable_reason()
    if reason is not None:
        raise Refused(reason)
    return _loaded()


@functools.cache
def _loaded() -> tuple[Any, Any]:
    return backend.loaded(), importlib.import_module("pointfuse.backends.triton.training_kernels")


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
