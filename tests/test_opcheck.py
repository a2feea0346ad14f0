"""Every operator of the cuda backend is what its schema and its fake say, however its tensors lie, and where empty.

It runs on the CPU, over emulated kernels. tests/test_ops.py has the public operator, tests/test_triton_graphs.py the
Triton backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_ops import host_ops
from pointfuse.backends import cuda, cuda_training
from pointfuse.problem import Refused
from torch import Tensor
from torch.library import opcheck

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
# How many parts an operator puts out is unknown to tracing, so that there is no graph to compare by sizes.
UNCOUNTED = ("test_schema", "test_faketensor")
BATCH, CHANNELS, HEIGHT, WIDTH = 4, 8, 5, 6
LEAKY, ADD_ACT = 1 << 32, 1 << 35
GEOMETRIES = {"1x1": (1, 1 | 1 << 8), "3x3 padded": (3, 1 | 1 << 8 | 1 << 16 | 1 << 24)}


@pytest.fixture(autouse=True)
def _emulated() -> None:
    host_ops().pointfuse_emulate(b"h100")


def image(channels: int = CHANNELS) -> Tensor:
    return torch.randn(BATCH, channels, HEIGHT, WIDTH)


# The operators that convolve read x, weight and residual by their strides.
ANYHOW: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "permuted": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda t: t.repeat(2, 2, 2, 2)[1 : BATCH + 1, :CHANNELS, 2 : HEIGHT + 2, 1 : WIDTH + 1],
    "every other": lambda t: t.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, ::2],
    "expanded": lambda t: t[:1].expand(BATCH, -1, -1, -1),
    "empty": lambda t: t[:0],
    "empty channels_last": lambda t: t.to(memory_format=torch.channels_last)[:0],
}
# The passes of training read y and what is laid out as it.
WHOLE = {name: ANYHOW[name] for name in ("contiguous", "channels_last")}
WHOLE["sliced"] = lambda t: t.repeat(2, 1, 1, 1)[1 : BATCH + 1]

anyhow = pytest.mark.parametrize("lay", ANYHOW.values(), ids=ANYHOW)
whole = pytest.mark.parametrize("lay", WHOLE.values(), ids=WHOLE)
kernels = pytest.mark.parametrize(("kernel", "config"), GEOMETRIES.values(), ids=GEOMETRIES)


def vectors() -> list[Tensor]:
    """Mean, variance, gamma and beta."""
    return list((torch.rand(4, CHANNELS) + 0.5).unbind())


@anyhow
@kernels
@pytest.mark.parametrize("chip", ["h100", "a100"])
def test_a_unit(lay: Callable[[Tensor], Tensor], kernel: int, config: int, chip: str) -> None:
    host_ops().pointfuse_emulate(chip.encode())
    weight, added = torch.randn(CHANNELS, CHANNELS, kernel, kernel), lay(image()) if kernel == 3 else None
    config |= LEAKY if added is None else LEAKY | ADD_ACT
    opcheck(
        cuda.operator, (lay(image()), weight, torch.randn(CHANNELS), *vectors(), added, config, 1e-5, 0.1),
        test_utils=TESTS,
    )  # fmt: skip


@pytest.mark.parametrize("lay", [ANYHOW[n] for n in ("channels_last", "permuted", "expanded")],
                         ids=["channels_last", "permuted", "expanded"])  # fmt: skip
def test_a_unit_whose_weight_lies_otherwise(lay: Callable[[Tensor], Tensor]) -> None:
    weight = lay(torch.randn(BATCH, CHANNELS, 3, 3))
    opcheck(
        cuda.operator, (image(), weight, *[None] * 6, GEOMETRIES["3x3 padded"][1], 0.0, 0.0), test_utils=TESTS
    )  # fmt: skip


@anyhow
@kernels
def test_a_convolution_and_its_statistics(lay: Callable[[Tensor], Tensor], kernel: int, config: int) -> None:
    weight = torch.randn(CHANNELS, CHANNELS, kernel, kernel)
    opcheck(cuda_training.conv_operator, (lay(image()), weight, torch.randn(CHANNELS), config), test_utils=UNCOUNTED)


@whole
@kernels
def test_a_whole_forward(lay: Callable[[Tensor], Tensor], kernel: int, config: int) -> None:
    weight = torch.randn(CHANNELS, CHANNELS, kernel, kernel)
    if lay is not ANYHOW["contiguous"]:
        weight = weight.to(memory_format=torch.channels_last)
    x = lay(image())
    residual = cuda_training.conv_operator(x, weight, None, config)[0]
    mean, var, *affine = vectors()
    opcheck(
        cuda_training.forward_operator,
        (x, weight, None, *affine, residual, mean, var, 0.1, 1e-5, config | LEAKY | ADD_ACT, 0.1),
        test_utils=TESTS,
    )


@whole
@pytest.mark.parametrize("given", ["parts", "statistics"])
def test_normalising(lay: Callable[[Tensor], Tensor], given: str) -> None:
    y, mean, (running_mean, running_var, *affine) = lay(image()), torch.zeros(CHANNELS), vectors()
    parts = torch.rand(2, 3, CHANNELS) + 0.5
    statistics = (parts, None, None) if given == "parts" else (None, mean, mean + 1)
    running = (running_mean, running_var) if given == "parts" else (None, None)
    opcheck(
        cuda_training.normalise_operator,
        (y, *statistics, *affine, lay(image()), *running, 0.1, 1e-5, LEAKY | ADD_ACT, 0.1),
        test_utils=TESTS,
    )


def upstream(lay: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """grad_out, y, mean, rstd, gamma, beta and residual."""
    return lay(image()), lay(image()), *vectors(), lay(image())


@whole
def test_the_sums_of_a_backward(lay: Callable[[Tensor], Tensor]) -> None:
    opcheck(cuda_training.sums_operator, (*upstream(lay), LEAKY | ADD_ACT, 0.1), test_utils=UNCOUNTED)


@whole
@pytest.mark.parametrize("given", ["parts", "statistics"])
@pytest.mark.parametrize("want_residual", [False, True], ids=["dy alone", "dy and d_residual"])
def test_the_gradients_of_a_backward(lay: Callable[[Tensor], Tensor], given: str, want_residual: bool) -> None:
    parts = torch.rand(2, 2, CHANNELS) if given == "parts" else None
    opcheck(
        cuda_training.gradients_operator,
        (*upstream(lay), parts, BATCH * HEIGHT * WIDTH, want_residual, LEAKY | ADD_ACT, 0.1),
        test_utils=TESTS,
    )


@pytest.mark.parametrize("lay", [ANYHOW["empty"], ANYHOW["empty channels_last"]], ids=["NCHW", "channels_last"])
def test_the_passes_of_training_refuse_an_empty_batch_in_one_word(lay: Callable[[Tensor], Tensor]) -> None:
    """Of which ATen has nothing to compute; a convolution without statistics answers it."""
    y, vector, affine, config = lay(image()), torch.ones(CHANNELS), vectors()[2:], LEAKY | ADD_ACT
    calls = [
        (cuda_training.forward_operator, (y, torch.randn(CHANNELS, CHANNELS, 1, 1), None, *affine, y, vector, vector,
                                          0.1, 1e-5, config | GEOMETRIES["1x1"][1], 0.1)),
        (cuda_training.normalise_operator, (y, None, vector, vector, *affine, y, None, None, 0.1, 1e-5, config, 0.1)),
        (cuda_training.sums_operator, (*upstream(lay), config, 0.1)),
        (cuda_training.gradients_operator, (*upstream(lay), None, 0, True, config, 0.1)),
    ]  # fmt: skip
    for operator, arguments in calls:
        with pytest.raises(Refused, match=r"^y is empty$"):
            cuda.call(operator, *arguments)
    assert torch.equal(vector, torch.ones(CHANNELS))
