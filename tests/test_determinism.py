"""The same call gives the same bits every time, by every kind of kernel, on every backend that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from repeated_units import PLACES, REDUCED, Place, step, unit
from torch import Tensor

# On a GPU the order in which blocks end changes from call to call. A CPU's threads take fixed shares.
REPEATS = {"cuda": 1000, "cpu": 10}
KINDS = ("1x1 throughput", "1x1 latency, K split", "3x3")
# A GPU's fp32 convolutions are TF32's unless torch is told otherwise.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=PLACES, ids=str, autouse=True)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.chosen(), torch.no_grad():
        yield request.param


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def calls_that_differ(call: Callable[[], list[Tensor]], place: Place) -> int:
    """How many calls gave other bits than the first. Nothing waits for the GPU, so that calls overlap in its queue."""
    expected = [bits(t).clone() for t in call()]
    differing = torch.zeros((), dtype=torch.int64)
    for _ in range(REPEATS[place.device]):
        found = [bits(t) for t in call()]
        differing += torch.stack([(a != b).any() for a, b in zip(found, expected, strict=True)]).any()
    return int(differing)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_inference_repeats_bitwise(
    kind: str, dtype: torch.dtype, memory_format: torch.memory_format, place: Place
) -> None:
    options, shape = REDUCED[kind]
    module = unit(**{**options, "dtype": dtype})
    x = torch.randn(shape).to(dtype).to(memory_format=memory_format)
    assert calls_that_differ(lambda: [module(x)], place) == 0


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats_bitwise(kind: str, dtype: torch.dtype, recompute: bool, place: Place) -> None:
    """Output and every gradient; the running statistics change with each call, and are in none of them."""
    options, shape = REDUCED[kind]
    module = unit(**{**options, "dtype": dtype})
    module.bn.float()
    module.recompute = recompute
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    assert calls_that_differ(lambda: step(module, x), place) == 0


def test_a_call_that_differs_is_counted(place: Place) -> None:
    x, calls = torch.ones(4), iter(range(10**6))
    assert calls_that_differ(lambda: [x if next(calls) % 10 else -x], place) == REPEATS[place.device] * 9 // 10
