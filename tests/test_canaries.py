"""Writes and reads past the end of a tensor show, whoever makes them: Python, C, the kernels' own launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pointfuse
import pytest
import torch
from canaries import MARGIN, Canaries, Overrun, guarded
from host_ops import host_ops
from pointfuse.backends import BACKENDS, calls, cuda
from torch import Tensor


def by_python(t: Tensor, offset: int) -> None:
    t.as_strided((1,), (1,), t.storage_offset() + offset).fill_(0)


def by_c(t: Tensor, offset: int) -> None:
    ctypes.memset(t.data_ptr() + offset * t.element_size(), 0, t.element_size())


def by_triton(t: Tensor, offset: int) -> None:
    if reason := BACKENDS["triton"].triton_problem():
        pytest.skip(reason)
    import triton
    import triton.language as tl

    @triton.jit
    def write(pointer, offset):  # type: ignore[no-untyped-def]
        tl.store(pointer + offset, 0.0)

    write[(1,)](t, offset)


ALLOCATIONS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(5),
    "empty_strided": lambda: torch.empty_strided((5,), (1,)),
    "empty_like": lambda: torch.empty_like(torch.ones(5)),
    "new_empty": lambda: torch.ones(1).new_empty(5),
    "zeros": lambda: torch.zeros(5),
    "full in half precision": lambda: torch.full((5,), 2.0, dtype=torch.float16),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
@pytest.mark.parametrize("place", [-1, 5], ids=["before", "after"])
@pytest.mark.parametrize("write", [by_python, by_c, by_triton])
def test_a_write_beside_an_allocation_is_seen(
    write: Callable[[Tensor, int], None], place: int, allocate: Callable[[], Tensor]
) -> None:
    device = "cuda" if write is by_triton and torch.cuda.is_available() else "cpu"

    def write_once() -> None:
        with Canaries(), torch.device(device):
            t = allocate()
            write(t, 4)
            write(t, place)

    at = place * allocate().element_size()
    with pytest.raises(Overrun, match=rf"bytes beside a tensor of \(5,\) were written, the first at byte {at}$"):
        write_once()


def test_writes_inside_are_no_overrun() -> None:
    with Canaries() as canaries:
        t = canaries.guard(torch.ones(2, 3, 4, 5)[:, 1:, ::2])
        t.fill_(7)
        torch.empty(0).fill_(1)
    assert (t == 7).all()


def test_a_write_between_the_elements_of_a_slice_is_seen() -> None:
    def write() -> None:
        with Canaries() as canaries:
            t = canaries.guard(torch.ones(2, 6)[:, :4])
            by_c(t, 4)

    with pytest.raises(Overrun, match="4 bytes"):
        write()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_is_read_past_an_end_is_nan(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, 6).to(dtype)
    sources = {"dense": x, "slice": x[1:, ::2, 1:], "channels_last": x.to(memory_format=torch.channels_last)}
    for name, source in sources.items():
        t = guarded(source)
        assert torch.equal(t, source), name
        assert t.stride() == source.stride()
        end = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1
        for offset in (t.storage_offset() - 1, end):
            assert t.as_strided((1,), (1,), offset).isnan()
    assert MARGIN % 512 == 0


def test_alignment_is_kept() -> None:
    t = torch.randn(100)[1:]
    assert guarded(t).data_ptr() % 64 == 4
    assert guarded(torch.randn(3)).data_ptr() % 64 == 0


def test_an_expanded_tensor_stays_one() -> None:
    t = guarded(torch.randn(1, 3, 1, 1).expand(2, 3, 4, 4))
    assert t.stride() == (0, 1, 0, 0)
    assert t.untyped_storage().nbytes() == 2 * MARGIN + 3 * 4


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_the_backends_allocate_is_guarded(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ too: a buffer of the binding's lies where the canaries begin and end."""
    if backend == "cuda":
        host_ops().pointfuse_emulate(b"h100")
        monkeypatch.setattr(cuda, "unusable_reason", lambda: None)
    elif reason := BACKENDS["triton"].triton_problem():
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.device.type == device)
    monkeypatch.setattr(BACKENDS[backend], "unusable_reason", lambda: None)
    x, weight = torch.randn(1, 8, 3, 3, device=device), torch.randn(4, 8, 1, 1, device=device)
    with Canaries(), pointfuse.use_backend(backend, strict=True):
        y = pointfuse.conv_bn_act(x, weight)
    assert y.storage_offset() * y.element_size() == MARGIN
    assert y.untyped_storage().nbytes() == 2 * MARGIN + y.nbytes
