"""What converting a large model adds to memory: no tensor, and of Python's objects less than 1% of the weights."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pointfuse
import pytest
from models_for_tests import one_thread as one_thread
from torch import Tensor, nn

from benchmarks.models.yolov3 import YOLOv3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return YOLOv3(20)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def storages() -> set[int]:
    """The addresses of the storages of this process's tensors."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
def test_a_converted_model_adds_less_than_a_hundredth(model: nn.Module, inplace: bool) -> None:
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert weights > 200 << 20
    pointfuse.revert(pointfuse.convert(model))  # what is made once for a process
    tensors, (python, _) = storages(), tracemalloc.get_traced_memory()
    converted = pointfuse.convert(model, inplace=inplace)
    assert storages() <= tensors
    assert tracemalloc.get_traced_memory()[0] - python <= 0.01 * weights
    assert {p.data_ptr() for p in converted.parameters()} <= tensors
    pointfuse.revert(converted, inplace=True)
