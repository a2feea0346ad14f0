"""Converted and frozen models in several threads and in worker processes, forked and spawned."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import Bottleneck, DarknetBlock, gap, images, trained, unit
from models_for_tests import one_thread as one_thread
from pointfuse.backends import chosen
from pointfuse.folded import FoldedConv2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

THREADS = 4
FORMS = {"converted": pointfuse.convert, "frozen": pointfuse.freeze}


def network() -> nn.Module:
    """A sequential host, traced ones, and a convolution alone, in evaluation mode."""
    torch.manual_seed(1)
    return trained(nn.Sequential(*unit(4, 8), Bottleneck(8), DarknetBlock(8), nn.Conv2d(8, 4, 1))).eval()


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What ``work(0)``, ``work(1)``, ... return, begun together in threads that take turns as often as Python can."""
    start = threading.Barrier(THREADS)
    interval = sys.getswitchinterval()

    def begin(i: int) -> Any:
        start.wait(timeout=60)
        return work(i)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(begin, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_threads_share_a_model(form: Callable[..., nn.Module]) -> None:
    model = network()
    inputs = [images(1, 4, 6 + i, 8, seed=i) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    shared = form(model)

    def work(i: int) -> float:
        with torch.no_grad():
            return max(gap(shared(inputs[i]), expected[i]) for _ in range(20))

    assert max(at_once(work)) <= 2e-6


@pytest.mark.parametrize("reader", ["forward", "state_dict", "deepcopy"])
def test_the_first_calls_may_come_at_once(reader: str) -> None:
    """One of them packs the weight and drops the plain one while others are on their way to it."""
    model = trained(nn.Sequential(*unit(8, 32, 1))).eval()
    x = images(1, 8, 8, 8)
    with torch.no_grad():
        expected = model(x)
    plain = pointfuse.freeze(model)
    state = plain.state_dict()
    for _ in range(60):
        frozen = pointfuse.freeze(model)

        def work(i: int, frozen: nn.Module = frozen) -> float:
            if i == 0 or reader == "forward":
                with torch.no_grad():
                    return gap(frozen(x), expected)
            if reader == "state_dict":
                return gap(list(frozen.state_dict().values()), list(state.values()))
            return gap(list(copy.deepcopy(frozen).state_dict().values()), list(state.values()))

        assert max(at_once(work)) <= 2e-6
        assert frozen[0]._packed is not None


def test_a_backend_chosen_by_several_threads_at_once_is_given_back() -> None:
    """Blocks that overlap end in any order; afterwards the choice of the process is what it was."""
    turn = [threading.Event() for _ in range(4)]

    def first() -> None:
        with pointfuse.use_backend("aten"):
            turn[0].set()
            assert turn[1].wait(timeout=60)
        turn[2].set()

    def second() -> None:
        assert turn[0].wait(timeout=60)
        with pointfuse.use_backend("aten", strict=True):
            turn[1].set()
            assert turn[2].wait(timeout=60)

    before = _choice()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert before == ("auto", False)
    assert _choice() == before
    assert chosen() == "aten"


def _choice() -> tuple[str, bool]:
    backends = sys.modules["pointfuse.backends"]
    return backends._requested, backends._strict


def test_blocks_of_one_thread_are_nested() -> None:
    with pointfuse.use_backend("aten", strict=True):
        with pointfuse.use_backend("auto"):
            assert _choice() == ("auto", False)
        assert _choice() == ("aten", True)
    assert _choice() == ("auto", False)


def test_converting_in_several_threads_gives_each_its_own() -> None:
    models = [network() for _ in range(THREADS)]
    x = images()
    with torch.no_grad():
        expected = models[0](x)
    converted = at_once(lambda i: pointfuse.convert(models[i], x))
    frozen = at_once(lambda i: pointfuse.freeze(models[i], x))
    with torch.no_grad():
        assert all(gap(m(x), expected) <= 2e-6 for m in (*converted, *frozen))
    assert all([type(m) for m in c.modules()] == [type(m) for m in converted[0].modules()] for c in converted)


# Worker processes

_inherited: nn.Module | None = None


def _answer_inherited(x: Tensor) -> Tensor:
    # PyTorch's own threads do not survive a fork.
    torch.set_num_threads(1)
    assert _inherited is not None
    with torch.no_grad():
        return _inherited(x)


def _answer(pickled: bytes, x: Tensor) -> tuple[Tensor, list[str]]:
    torch.set_num_threads(1)
    model = pickle.loads(pickled)
    with torch.no_grad():
        y = model(x)
    return y, [type(m).__mro__[1].__name__ for m in model.modules()]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """So that the parent has threads that a fork does not copy."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.usefixtures("two_threads")
def test_a_forked_worker_answers_by_what_the_parent_has_run(form: Callable[..., nn.Module]) -> None:
    global _inherited
    model, x = network(), images()
    _inherited = form(model, x)
    with torch.no_grad():
        expected = model(x)
        assert gap(_inherited(x), expected) <= 2e-6
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert gap(pool.submit(_answer_inherited, x).result(timeout=60), expected) <= 2e-6
    _inherited = None


class Answers(Dataset):
    """Runs a model where it is asked, as a data set does whose samples are features."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(1, 4, 8, 8, seed=i))[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_workers_of_a_data_loader_run_models(form: Callable[..., nn.Module]) -> None:
    model = form(network())
    answers = Answers(model)
    expected = torch.stack([answers[i] for i in range(4)])  # which packs a frozen model
    if form is pointfuse.freeze:
        assert any(m._packed is not None for m in model.modules() if isinstance(m, FoldedConv2d))
    loader = DataLoader(answers, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_spawned_workers_unpickle_models() -> None:
    model, x = network(), images()
    with torch.no_grad():
        expected = model(x)
        forms = {name: form(model, x) for name, form in FORMS.items()}
        for made in forms.values():
            made(x)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(_answer, pickle.dumps(made), x) for name, made in forms.items()}
        for name, future in running.items():
            y, bases = future.result(timeout=120)
            assert gap(y, expected) <= 2e-6
            assert bases == [type(m).__mro__[1].__name__ for m in forms[name].modules()]
            assert bases[0] == {"converted": "_Host", "frozen": "_Frozen"}[name]
