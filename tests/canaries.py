"""Buffers with canaries before and after them: a write past either end is seen, and a read brings NaN.

``Canaries`` is a dispatch mode in which every tensor that the code under test allocates lies amid such bytes, those of
C++ bindings too; ``guard`` puts an input there. Leaving the mode checks every buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# All bits set are a NaN in every floating dtype, and not the one that arithmetic makes.
CANARY_BYTE = 0xFF
# As many bytes before and after, so that a buffer is aligned as a tensor of its own would be.
MARGIN = 512

_ATEN = torch.ops.aten
_ALLOCATIONS = frozenset(
    overload
    for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like",
                 "new_zeros", "clone", "_to_copy", "ones", "ones_like", "new_ones", "full", "full_like", "new_full")
    for packet in [getattr(_ATEN, name)]
    for overload in [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
)  # fmt: skip


class Overrun(AssertionError):
    """Bytes beside a tensor were written."""


class Canaries(TorchDispatchMode):
    """Every allocation of the block lies amid canaries; its end raises :class:`Overrun` where one was written."""

    def __init__(self) -> None:
        super().__init__()
        self._guarded: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "pointfuse":
            # What an operator of ours allocates comes here too.
            with self:
                return func.redispatch(_backend_keys(args), *args, **kwargs)
        made = func(*args, **kwargs)
        return self.guard(made) if func in _ALLOCATIONS and _can_be_guarded(made) else made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._depth() == 0 and error[0] is None:
            self.check()

    def guard(self, x: Tensor) -> Tensor:
        """A copy of a tensor, of the same strides, amid canaries; they are between its elements too."""
        # Where it lies between two aligned addresses is a part of how it lies.
        start = MARGIN + x.storage_offset() * x.element_size() % MARGIN
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        nbytes = (span if x.numel() else 0) * x.element_size()
        with _disable_current_modes(), torch.no_grad():
            buffer = torch.full((start + nbytes + MARGIN,), CANARY_BYTE, dtype=torch.uint8, device=x.device)
            view = _view_of(buffer, x, start)
            _once(view).copy_(_once(x))
        self._guarded.append((buffer, view))
        return view

    def check(self) -> None:
        """Raise :class:`Overrun` if a byte beside a guarded tensor is not a canary."""
        for buffer, view in self._guarded:
            start = view.storage_offset() * view.element_size()
            inside, expected = buffer.clone(), torch.full_like(buffer, CANARY_BYTE)
            for t in (inside, expected):
                _once(_view_of(t, view, start)).zero_()
            wrong = (inside != expected).nonzero().flatten()
            if len(wrong):
                shape, place = tuple(view.shape), wrong[0].item() - start
                raise Overrun(f"{len(wrong)} bytes beside a tensor of {shape} were written, the first at byte {place}")
        self._guarded.clear()

    def _depth(self) -> int:
        return sum(mode is self for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack())


def guarded(x: Tensor) -> Tensor:
    """A copy of a tensor, of the same strides, amid canaries that nobody checks: a read past its ends brings NaN."""
    return Canaries().guard(x)


def _view_of(buffer: Tensor, like: Tensor, start: int) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), start // like.element_size(), like.shape, like.stride())


def _once(x: Tensor) -> Tensor:
    """The view in which every element of memory occurs once."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())].detach()


def _can_be_guarded(made: Tensor) -> bool:
    return type(made) is Tensor and made.layout is torch.strided and made.device.type in ("cpu", "cuda")


def _backend_keys(args: Any) -> torch._C.DispatchKeySet:
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in args)
    return torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA if on_gpu else torch._C.DispatchKey.CPU)
