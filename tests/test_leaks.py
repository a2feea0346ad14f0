"""Ten thousand calls leave nothing behind: no memory of the host or of the GPU, no object, no entry of a cache."""

from __future__ import annotations

import functools
import gc
import itertools
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import Bottleneck, ConvBNAct, DarknetBlock, unit
from models_for_tests import one_thread as one_thread
from pointfuse.backends import aten
from pointfuse.convert import hosts, normalisation
from pointfuse.modules import warn_once
from repeated_units import PLACES, Place
from torch import Tensor, nn

CALLS = 10_000
# Within the first calls libraries choose algorithms and pools fill; oneDNN keeps what it made for 1024 shapes.
FIRST_CALLS = 1500
# 420 bytes a call. A tensor, its storage and Python's object for it take more.
MAX_BYTES = 4 << 20
# What stays of shapes, up to a number of them: oneDNN's code for 1024, 20 MB; on a GPU 8192 plans and 4096 launches.
MAX_BYTES_OF_SHAPES = 64 << 20
STATM = Path("/proc/self/statm")


@dataclass
class Held:
    """What this process holds at a moment."""

    objects: int = field(init=False)
    tensors: int = field(init=False)
    resident: int = field(init=False)
    # Of the GPU: what torch's allocator gave out, and what this and other processes took beside its pools.
    allocated: int = 0
    outside: int = 0

    def __post_init__(self) -> None:
        gc.collect()
        found = gc.get_objects()
        self.objects = len(found)
        self.tensors = sum(type(o) in (Tensor, nn.Parameter) for o in found)
        self.resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.allocated = torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            self.outside = total - free - torch.cuda.memory_reserved()


def assert_nothing_is_left(call: Callable[[int], Any], max_bytes: int = MAX_BYTES, alone: bool = True) -> None:
    """With ``alone`` nothing else may run on the GPU meanwhile."""
    for i in range(FIRST_CALLS):
        call(i)
    before = Held()
    for i in range(CALLS):
        call(i)
    after = Held()
    assert after.tensors <= before.tensors
    # pytest's and Python's own come and go; one a call would be ten thousand.
    assert after.objects - before.objects < 100
    assert after.allocated <= before.allocated
    assert after.resident - before.resident < max_bytes
    assert not alone or after.outside - before.outside < max_bytes


@pytest.fixture(params=PLACES, ids=str, autouse=True)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    # Memory is not read before it is written here, and filling it takes as long as the calls.
    torch.use_deterministic_algorithms(False)
    with request.param.chosen(), torch.no_grad():
        yield request.param


def model() -> nn.Sequential:
    return nn.Sequential(*unit(4, 4, 1)).eval()


def image(batch: int = 2, height: int = 2, width: int = 2) -> Tensor:
    return torch.randn(batch, 4, height, width)


def converted() -> Callable[[Tensor], Any]:
    return pointfuse.convert(model())


def converted_traced() -> Callable[[Tensor], Any]:
    return pointfuse.convert(ConvBNAct().eval())


def frozen() -> Callable[[Tensor], Any]:
    return pointfuse.freeze(model(), image())


def functional() -> Callable[[Tensor], Any]:
    conv, bn, _ = model()[:3]
    return lambda x: pointfuse.conv_bn_act(x, conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias)


def training(recompute: bool = False) -> Callable[[Tensor], Any]:
    trained = pointfuse.convert(model().train(), recompute=recompute)

    def step(x: Tensor) -> None:
        trained.zero_grad()
        with torch.enable_grad():
            trained(x).square().sum().backward()

    return step


FORMS: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "converted": converted,
    "converted, traced": converted_traced,
    "frozen": frozen,
    "functional": functional,
    "training": training,
    "training with recompute": functools.partial(training, recompute=True),
}


@pytest.mark.parametrize("form", ["converted", "converted, traced", "frozen", "functional", "training with recompute"])
def test_calls_leave_nothing(form: str) -> None:
    call, x = FORMS[form](), image()
    assert_nothing_is_left(lambda i: call(x))


def test_graphs_leave_nothing(place: Place) -> None:
    """By a graph of the model's own for each call; on a CPU, which has none, that is refused."""
    if place.device == "cpu":
        with pytest.raises(ValueError, match="cuda_graph=True needs the whole model on one CUDA device"):
            pointfuse.freeze(model(), cuda_graph=True)
        return
    call, x = pointfuse.freeze(model(), image(), cuda_graph=True), image()
    assert_nothing_is_left(lambda i: call(x))


def of_another_shape(i: int) -> Tensor:
    """The first 10,648 are all different."""
    return image(2 + i // 484 % 22, 2 + i // 22 % 22, 2 + i % 22)


@pytest.mark.parametrize("form", ["converted", "frozen", "functional", "training"])
def test_ten_thousand_shapes_leave_nothing(form: str) -> None:
    """Without PyTorch's way to oneDNN, which takes ten times as long for a new shape; frozen models go by their own."""
    call, before = FORMS[form](), sizes_of_caches()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_nothing_is_left(lambda i: call(of_another_shape(i)), MAX_BYTES_OF_SHAPES, alone=False)
    assert_caches_are_bounded(before)


def test_ten_thousand_shapes_too_small_to_gain_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which models remember, so as not to ask again."""
    monkeypatch.setattr(aten, "_ONEDNN_MIN_INPUT", 1 << 40)
    call, before = pointfuse.convert(model()), sizes_of_caches()
    for i in range(CALLS):
        call(of_another_shape(i))
    assert_caches_are_bounded(before)
    assert sum(name.startswith("_pointfuse") for name in vars(call)) <= 2


def assert_caches_are_bounded(before: dict[str, int]) -> None:
    grown = {name: size for name, size in sizes_of_caches().items() if size > before.get(name, 0) + 8}
    assert all(size <= BOUNDED.get(name, 0) for name, size in grown.items()), grown


# Of the caches that grow with the shapes of calls, on a GPU; everything else must not grow at all.
BOUNDED = {
    "pointfuse.backends.triton.launching._launches": 4096,
    "pointfuse.backends.triton.tables._measured_faster": 4096,
}


def sizes_of_caches() -> dict[str, int]:
    """The entries of every collection and every memory of a function that a module of pointfuse holds."""
    sizes = {}
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "pointfuse"]:
        for name, value in vars(module).items():
            if hasattr(value, "cache_info"):
                sizes[f"{module.__name__}.{name}"] = value.cache_info().currsize
            elif not isinstance(value, type) and hasattr(value, "__len__") and hasattr(value, "clear"):
                sizes[f"{module.__name__}.{name}"] = len(value)
    return sizes


# What grows with models, not with calls


def test_caches_of_modules_are_found() -> None:
    assert {
        "pointfuse.backends._announced",
        "pointfuse.backends.calls._geometry_codes",
        "pointfuse.convert.hosts._CLASSES",
        "pointfuse.convert.normalisation._PROVEN",
        "pointfuse.convert.normalisation._STEPS",
        "pointfuse.convert.tracing._compiled",
        "pointfuse.modules.warn_once",
    } <= sizes_of_caches().keys()


def test_classes_made_on_the_fly_are_given_up_with_their_models() -> None:
    """As a notebook makes one each time that a cell runs."""
    before = len(hosts._CLASSES)
    for _ in range(20):

        class Block(Bottleneck):
            pass

        pointfuse.convert(Block(4).eval())(image())
        pointfuse.freeze(Block(4).eval())(image())
    gc.collect()
    # The last class is still known by its name here.
    assert len(hosts._CLASSES) <= before + 2


class ListedNorm(nn.BatchNorm2d):
    """Its forward is its own, and reads a list: no two of its proofs are known to be the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.names = ["one"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.names else x


def test_proofs_of_batch_norms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_MOST_STEPS", 10)
    for _ in range(25):
        assert normalisation.norm_act(ListedNorm(4)) is not None
        assert len(normalisation._STEPS) <= 10


def test_what_was_said_once_is_bounded() -> None:
    warn_once.cache_clear()
    limit = warn_once.cache_info().maxsize
    assert limit is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(2 * limit):
            warn_once(f"{i}")
    assert warn_once.cache_info().currsize == limit
    warn_once.cache_clear()


@pytest.mark.parametrize("form", [pointfuse.convert, pointfuse.freeze], ids=["converting", "freezing"])
def test_models_are_given_up(form: Callable[[nn.Module], nn.Module]) -> None:
    def make_and_call() -> None:
        form(nn.Sequential(Bottleneck(4), DarknetBlock(4), *unit(4, 4, 1)).eval())(image())

    for _ in range(5):
        make_and_call()
    before = Held()
    for _ in range(50):
        make_and_call()
    after = Held()
    assert after.tensors <= before.tensors
    assert after.objects - before.objects < 50


def test_a_leak_of_one_tensor_a_call_is_seen() -> None:
    leaked = []
    with pytest.raises(AssertionError, match="tensors"):
        assert_nothing_is_left(lambda i: leaked.append(torch.empty(1)))


@pytest.mark.skipif(not STATM.exists(), reason="only Linux tells what of a process is resident")
def test_a_leak_of_one_page_a_call_is_seen() -> None:
    """Of memory that the system gives: what a process has freed before, Python and C give out again."""
    page, pages = mmap.PAGESIZE, itertools.count()

    def leak(leaked: mmap.mmap) -> None:
        leaked[next(pages) * page] = 1

    with mmap.mmap(-1, (FIRST_CALLS + CALLS) * page) as leaked, pytest.raises(AssertionError, match="resident"):
        assert_nothing_is_left(lambda i: leak(leaked))
