"""A frozen model as CUDA graphs: keyed by shape, told of, bounded, and invisible otherwise."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pointfuse
import pytest
import torch
from fake_cuda import POOL, FakeCuda
from pointfuse.convert import graphs
from pointfuse.convert.graphs import GpuCapture, NewShapeWarning, ShapeGraphs
from pointfuse.convert.hosts import graphs_of, replay_graphs
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class FakeCapture:
    """Runs once and "replays" by running again into the same outputs; a replay sees only the graph's own inputs."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.forgotten = 0
        self.busy = False

    def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        assert self.busy
        self.captured += 1
        outputs = run()

        def replay() -> None:
            assert self.busy
            self.replayed += 1
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(run()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, outputs

    def forget(self) -> None:
        self.forgotten += 1

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        assert not self.busy
        self.busy = True
        try:
            yield
        finally:
            self.busy = False


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1))
    return pointfuse.freeze(model.eval(), pack=False)


@pytest.fixture
def graphed() -> tuple[nn.Module, FakeCapture, ShapeGraphs]:
    model, capture = small_model(), FakeCapture()
    return model, capture, replay_graphs(model, capture)


class Tree(nn.Module):
    """Inputs and outputs as trees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 1.0, *, more: dict[str, Any]) -> dict[str, Any]:
        a, b = pair
        return {"sum": self.conv(a) * scale + b, "rest": [more["x"] * 2, more["name"], a.shape[0]]}


def test_a_shape_is_captured_once_and_then_replayed(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, capture, made = graphed
    plain = copy.deepcopy(small_model())
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for size in (5, 6):
            with pytest.warns(
                NewShapeWarning, match=f"inputs 1x3x{size}x{size} float32 are new: graph .+ of at most 16"
            ):
                model(torch.randn(1, 3, size, size))
        assert (capture.captured, len(made)) == (2, 2)
        for size in (5, 6, 5):
            x = torch.randn(1, 3, size, size)
            y = model(x)
            torch.testing.assert_close(y, plain(x))
            assert y.stride() == plain(x).stride()
    assert (capture.captured, capture.replayed) == (2, 5)


def test_outputs_are_the_callers_own(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, _, made = graphed
    made.announce = False
    x = torch.randn(1, 3, 4, 4)
    first = model(x)
    kept = first.clone()
    assert not torch.equal(model(torch.randn(1, 3, 4, 4)), kept)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(model(x), kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.bfloat16(),
        lambda x: x[:, :, :3],
        lambda x: torch.cat([x, x]),
    ],
    ids=["memory format", "dtype", "shape", "batch"],
)
def test_what_a_graph_depends_on_makes_a_new_one(change: Callable[[Tensor], Tensor]) -> None:
    model, capture = nn.Sequential(nn.ReLU()), FakeCapture()
    replay_graphs(model, capture).announce = False
    x = torch.randn(1, 3, 4, 4)
    for _ in range(2):
        model(x)
        torch.testing.assert_close(model(change(x)), change(x).relu())
    assert capture.captured == 2


def test_the_chosen_backend_is_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, capture = nn.Sequential(nn.ReLU()), FakeCapture()
    replay_graphs(model, capture).announce = False
    for name in ("aten", "cuda", "aten"):
        monkeypatch.setattr(graphs, "chosen", lambda name=name: name)
        model(torch.zeros(2))
    assert capture.captured == 2


def test_trees_of_inputs_and_outputs() -> None:
    model, capture = Tree().eval().requires_grad_(False), FakeCapture()
    plain = copy.deepcopy(model)
    replay_graphs(model, capture).announce = False
    for scale in (1.0, 1.0, 2.0):
        a, b, x = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(5)
        inputs: dict[str, Any] = {"pair": (a, b), "scale": scale, "more": {"x": x, "name": "n"}}
        y, expected = model(**inputs), plain(**inputs)
        assert y["rest"][1:] == ["n", 3]
        torch.testing.assert_close((y["sum"], y["rest"][0]), (expected["sum"], expected["rest"][0]))
    assert capture.captured == 2


def test_inputs_laid_out_in_any_way_are_copied_in() -> None:
    model, capture = nn.Sequential(nn.ReLU()), FakeCapture()
    replay_graphs(model, capture).announce = False
    base = torch.randn(2, 3, 8, 8)
    for x in (base[:, :, ::2], base[:1, :1].expand(2, 3, 8, 8), base.transpose(1, 3), base[..., 1:]):
        torch.testing.assert_close(model(x), x.relu())


def test_calls_that_are_no_graphs_run_plainly() -> None:
    model, capture = Tree().eval().requires_grad_(False), FakeCapture()
    replay_graphs(model, capture)
    a = torch.randn(1, 2, 3, 3)
    unknown = {"x": a, "name": object()}
    assert model((a, a), more=unknown)["rest"][1] is unknown["name"]
    with pytest.raises(RuntimeError, match="device"):
        model((a, a.to("meta")), more={"x": a, "name": ""})
    compiled = torch.compile(nn.Sequential(nn.ReLU()), backend="eager")
    assert compiled(torch.tensor([-1.0])).item() == 0
    assert capture.captured == 0


def test_gradients_are_refused(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, capture, _ = graphed
    with pytest.raises(RuntimeError, match="a frozen model has no gradient"):
        model(torch.randn(1, 3, 4, 4, requires_grad=True))
    assert capture.captured == 0


def test_graphs_are_bounded_and_the_bound_is_told_once(
    graphed: tuple[nn.Module, FakeCapture, ShapeGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model, capture, made = graphed
    with torch.no_grad():
        for size in (3, 4):
            with pytest.warns(NewShapeWarning, match="are new: graph"):
                model(torch.randn(1, 3, size, size))
        with pytest.warns(NewShapeWarning, match="1x3x5x5 float32 are new, and 2 shapes have graphs: further ones run"):
            model(torch.randn(1, 3, 5, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model(torch.randn(1, 3, 6, 6)).shape == (1, 4, 6, 6)
            model(torch.randn(1, 3, 4, 4))
    assert (capture.captured, len(made)) == (2, 2)


def test_graphs_are_forgotten_when_tensors_are_replaced(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, capture, made = graphed
    made.announce = False
    x = torch.randn(1, 3, 4, 4)
    model(x)
    state = {k: v * 2 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert len(made) == 0
    torch.testing.assert_close(model(x), model[3](model[2](model[1](model[0](x)))))
    model.double()
    assert len(made) == 0
    assert model(x.double()).dtype == torch.float64
    assert capture.captured == 3
    assert capture.forgotten == 2


def test_a_graphed_model_is_the_model_otherwise(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, _, made = graphed
    made.announce = False
    x = torch.randn(1, 3, 4, 4)
    y = model(x)
    assert isinstance(model, nn.Sequential)
    assert type(model).__name__ == "Sequential"
    assert model.state_dict().keys() == small_model().state_dict().keys()
    with pytest.raises(RuntimeError, match="a frozen model cannot be trained"):
        model.train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(graphs_of(twin)) == 0
        torch.testing.assert_close(twin(x), y)  # tensors of the CPU, which the twin's real capture leaves alone


def test_inference_mode_and_its_absence_share_a_graph(graphed: tuple[nn.Module, FakeCapture, ShapeGraphs]) -> None:
    model, capture, made = graphed
    made.announce = False
    with torch.inference_mode():
        model(torch.randn(1, 3, 4, 4))
    model(torch.randn(1, 3, 4, 4))
    assert capture.captured == 1


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(nn.ReLU())], ids=["cpu", "empty"])
def test_a_model_off_the_gpu_is_refused(model: nn.Module) -> None:
    where = "cpu" if list(model.parameters()) else "nothing, for it has no parameters"
    with pytest.raises(ValueError, match=f"needs the whole model on one CUDA device, and it is on {where}"):
        pointfuse.freeze(model.eval(), cuda_graph=True)


def test_freeze_captures_the_example_inputs_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = FakeCapture()
    monkeypatch.setattr(graphs, "GpuCapture", lambda: capture)
    monkeypatch.setattr(graphs, "check_device", lambda model: None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(1, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = pointfuse.freeze(model, x, pack=False, cuda_graph=True)
        torch.testing.assert_close(frozen(x), model(x))
    assert capture.captured == 1
    with pytest.warns(NewShapeWarning):
        frozen(torch.randn(1, 3, 6, 6))
    again = pointfuse.freeze(pointfuse.freeze(model, pack=False), cuda_graph=True)
    with pytest.warns(NewShapeWarning):
        again(x)
    assert capture.captured == 3


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return fake


DEVICE = torch.device("cuda", 0)


def test_a_capture_follows_warm_ups_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    capture, y = GpuCapture(), torch.zeros(1)
    replay, outputs = capture(lambda: cuda.launch(1e-6, lambda: y.add_(1)) or y, DEVICE)
    assert cuda.log == ["side waits for main", *["kernel on side"] * 3, "main waits for side", "capture on side"]
    assert cuda.stream == "main"
    replay()
    assert outputs.item() == 4


def test_a_capture_that_fails_leaves_everything_usable(cuda: FakeCuda) -> None:
    capture, calls = GpuCapture(), []

    def reads_a_value() -> None:
        calls.append(1)
        if len(calls) > 3:  # not while it warms up
            torch.cuda.synchronize()

    with pytest.raises(RuntimeError, match="CUDA error") as caught:
        capture(reads_a_value, DEVICE)
    assert "raised while capturing the model as a CUDA graph" in caught.value.__notes__[0]
    assert cuda.stream == "main"
    assert cuda.ended == [(0, POOL)]
    capture(lambda: None, DEVICE)


def test_graphs_share_a_pool_until_none_is_left(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, pools = GpuCapture(), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(1) or POOL)
    for count in (1, 1):
        capture(lambda: None, DEVICE)
        assert len(pools) == count
    ShapeGraphs(capture).clear()
    capture(lambda: None, DEVICE)
    assert len(pools) == 2


def test_threads_that_call_at_once_share_one_capture(cuda: FakeCuda) -> None:
    class Shared(GpuCapture):
        """Captures as ``FakeCapture`` does; takes turns as on a GPU."""

        device_type = "cpu"

        def __init__(self) -> None:
            super().__init__()
            self.inner = FakeCapture()
            self.inner.busy = True

        def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
            return self.inner(run, device)

    model, capture, together = small_model(), Shared(), threading.Barrier(4)
    inputs = [torch.randn(1, 3, 5, 5) for _ in range(4)]
    expected = [model(x) for x in inputs]
    replay_graphs(model, capture).announce = False

    def work(i: int) -> list[Tensor]:
        together.wait(timeout=60)
        return [model(inputs[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found, y in zip(pool.map(work, range(4)), expected, strict=True):
            assert all(torch.equal(one, y) for one in found)
    assert capture.inner.captured == 1
    assert capture.inner.replayed == 4 * 20


def test_replays_of_one_model_take_turns_across_streams(cuda: FakeCuda) -> None:
    capture = GpuCapture()
    for name in ("main", "main", "other", "main"):
        cuda.stream = name
        with capture.in_turn(DEVICE):
            pass
    assert cuda.log == ["other waits for main", "main waits for other"]
