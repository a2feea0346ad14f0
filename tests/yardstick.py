"""The accuracy rule: against float64, at most twice PyTorch's own error in the same dtype, plus 1e-6."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude of the exact values."""
    scale = exact.abs().max().item()
    gap = (actual.double() - exact).abs().max().item()
    return gap / scale if scale else gap


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Assert the accuracy rule, and that shape, dtype and memory format are PyTorch's."""
    assert actual.shape == eager.shape
    assert actual.dtype == eager.dtype
    assert actual.stride() == eager.stride()
    assert exact.dtype == torch.float64
    assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6
