"""What only a GPU can show: devices, streams, capture, sizes. `make sanitize` runs the reduced set of this file."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pointfuse
import pytest
import torch
import torch._dynamo.testing
from canaries import Canaries
from repeated_units import REDUCED, step, unit
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.yolov3 import last_layer_stack


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    status = pointfuse.backends()[request.param]
    if not status.usable:
        pytest.skip(f"the {request.param} backend cannot run here: {status.reason}")
    with torch.device("cuda"), pointfuse.use_backend(request.param, strict=True), torch.no_grad():
        yield request.param


def stack() -> nn.Module:
    """The last layers of YOLOv3's 13x13 head."""
    with torch.device("cpu"):
        return last_layer_stack(13).eval().cuda().bfloat16()


def assert_right(y: Tensor, module: nn.Module, x: Tensor) -> None:
    with pointfuse.use_backend("aten"):
        expected = module(x)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("options", "shape"), REDUCED.values(), ids=REDUCED)
def test_reduced(options: dict, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    module = unit(**options)
    x = torch.randn(shape, dtype=module.conv.weight.dtype).to(memory_format=memory_format)
    assert_right(module(x), module, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("options", "shape"), REDUCED.values(), ids=REDUCED)
def test_reduced_training(options: dict, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """On an H100 the small units take the cooperative forward."""
    module = unit(**options)
    module.bn.float()
    # Away from zero, on either side: rounding would decide between the two slopes.
    module.bn.weight.fill_(0.5)
    module.bn.bias.copy_(torch.where(torch.arange(len(module.bn.bias)) % 2 == 0, 8.0, -8.0))
    x = torch.randn(shape, dtype=module.conv.weight.dtype).to(memory_format=memory_format)
    first, again = step(module, x), step(module, x)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    module.recompute = True
    assert all(torch.equal(a, b) for a, b in zip(first, step(module, x), strict=True))
    module.recompute = False
    with pointfuse.use_backend("aten"):
        expected, exact = step(module, x), step(module.double(), x.double())
    for a, b, e in zip(first, expected, exact, strict=True):
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-3 * e.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("options", "shape"), REDUCED.values(), ids=REDUCED)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_memory_beside_tensors_is_neither_written_nor_read(
    training: bool, options: dict, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """A test of its own: `make sanitize` sees a tensor's end only where it is the end of an allocation."""
    module = unit(**options)
    module.bn.float()
    x = torch.randn(shape, dtype=module.conv.weight.dtype).to(memory_format=memory_format)
    expected = step(module, x) if training else [module(x)]
    with Canaries() as canaries:
        for tensors in (module.conv._parameters, module.bn._parameters, module.bn._buffers):
            for t in tensors.values():
                if t is not None:
                    t.data = canaries.guard(t.data)
        guarded = canaries.guard(x)
        found = step(module, guarded) if training else [module(guarded)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("recompute", "bound"), [(False, 0.75), (True, 0.45)], ids=["default", "recompute"])
def test_training_keeps_less_memory(recompute: bool, bound: float) -> None:
    """The input of the stack and of its last layer are kept by everyone."""

    def kept(model: nn.Module) -> int:
        x = torch.randn(16, 1024, 13, 13, dtype=torch.bfloat16, requires_grad=True)
        gc.collect()
        before = torch.cuda.memory_allocated()
        with torch.enable_grad():
            y = model.train()(x)
        return torch.cuda.memory_allocated() - before - y.nbytes + x.nbytes

    model = stack()
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    model = model.to(memory_format=torch.channels_last)
    with pointfuse.use_backend("aten"):
        eager = kept(model)
    assert kept(pointfuse.convert(model, recompute=recompute)) <= bound * eager


def test_training_is_captured_in_a_graph() -> None:
    module, x = unit(), torch.randn(8, 64, 26, 26, dtype=torch.bfloat16)
    module.bn.float()
    expected = step(module, x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(module, x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_call_neither_synchronises_nor_allocates_but_its_output(backend: str) -> None:
    module, x = unit(), torch.randn(8, 64, 26, 26, dtype=torch.bfloat16)
    module(x)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        y = module(x)
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        # Triton writes tensor descriptors to memory.
        assert allocations <= {"cuda": 1, "triton": 2}[backend]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right(y, module, x)


def test_the_current_stream_is_used() -> None:
    module, x = unit(), torch.randn(8, 64, 52, 52, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        changed = x + 1
        y = module(changed)
    torch.cuda.current_stream().wait_stream(side)
    assert_right(y, module, x + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    module, x = unit().to("cuda:1"), torch.randn(2, 64, 13, 13, dtype=torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = module(x)
    assert y.device == x.device
    assert torch.cuda.current_device() == 0
    assert_right(y, module, x)


def test_units_are_captured_in_a_graph_and_read_live_statistics() -> None:
    module, x = unit(3), torch.randn(1, 64, 13, 13, dtype=torch.bfloat16)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    module.bn.running_mean.add_(1)
    x.normal_()
    graph.replay()
    assert_right(y, module, x)


@pytest.mark.parametrize("kernel", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("shape", [(8, 64, 26, 26), (1, 64, 13, 13)], ids=["throughput", "latency"])
def test_a_graph_is_replayed_a_hundred_times_with_other_inputs(kernel: int, shape: tuple[int, ...]) -> None:
    """To the bits of the same unit without a graph."""
    module, x = unit(kernel), torch.randn(shape, dtype=torch.bfloat16)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    differing = torch.zeros((), dtype=torch.int64)
    for _ in range(100):
        x.normal_()
        graph.replay()
        differing += (y != module(x)).any()
    assert differing.item() == 0


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_two_units_on_two_streams_do_not_disturb_each_other(training: bool) -> None:
    """Both split K, and so have partial sums of their own in flight at once. The results are the serial ones' bits."""
    shapes = [(1, 512, 13, 13), (2, 256, 13, 13)]
    modules = [unit(1, shape[1], 64) for shape in shapes]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    for module in modules:
        module.bn.float()

    def call(i: int) -> list[Tensor]:
        return step(modules[i], inputs[i]) if training else [modules[i](inputs[i])]

    expected = [[t.clone() for t in call(i)] for i in (0, 1)]
    differing = torch.zeros(2, dtype=torch.int64)
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(300):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found = call(i)
                differing[i] += torch.stack([(a != b).any() for a, b in zip(found, expected[i], strict=True)]).any()
    torch.cuda.synchronize()
    assert differing.tolist() == [0, 0]


def test_threads_share_the_backend() -> None:
    module, failures = unit(), []

    def work(size: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                x = torch.randn(2, 64, size, size, dtype=torch.bfloat16, device="cuda")
                torch.cuda.current_stream().synchronize()
                expected = F.leaky_relu(module.bn(module.conv(x)), 0.1)
                for _ in range(50):
                    torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in (7, 13, 26, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_more_than_2_to_the_31_elements(memory_format: torch.memory_format) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("24 GB of GPU memory are not free")
    module = unit(1, 32, 32)
    x = torch.randn(1, 32, 1, 1, dtype=torch.bfloat16).expand(1, 32, 8200, 8200).contiguous(memory_format=memory_format)
    y = module(x)
    assert y.numel() > 1 << 31
    assert torch.equal(y[0, :, 0, 0], y[0, :, -1, -1])
    assert_right(y[:, :, -4:, -4:], module, x[:, :, -4:, -4:])


def test_memory_that_runs_out_leaves_the_library_usable() -> None:
    module = unit()
    free = torch.cuda.mem_get_info()[0]
    side = int((free / (64 * 2)) ** 0.5 * 1.05)
    x = torch.zeros(1, 64, 1, 1, dtype=torch.bfloat16).expand(1, 64, side, side)
    wide = pointfuse.ConvBNAct2d(64, 256, 1).eval().bfloat16()
    with pytest.raises(torch.OutOfMemoryError):
        wide(x)
    x = torch.randn(1, 64, 13, 13, dtype=torch.bfloat16)
    assert_right(module(x), module, x)


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "cuda graph"])
def test_the_13x13_stack_is_frozen(cuda_graph: bool) -> None:
    model = stack()
    x = torch.randn(1, 1024, 13, 13, dtype=torch.bfloat16)
    frozen = pointfuse.freeze(model, x, cuda_graph=cuda_graph)
    for _ in range(3):
        x = torch.randn(1, 1024, 13, 13, dtype=torch.bfloat16)
        y, expected = frozen(x), model(x)
        assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    if cuda_graph:
        with pytest.warns(pointfuse.NewShapeWarning, match="2x1024x13x13 bfloat16 are new"):
            frozen(torch.cat([x, x]))
        outputs = [frozen(x), frozen(x + 1)]
        assert not torch.equal(*outputs)


def test_graphs_of_one_model_may_be_replayed_on_several_streams() -> None:
    model = stack()
    shapes = [(1, 1024, 13, 13), (2, 1024, 13, 13)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    frozen = pointfuse.freeze(model, inputs[0], cuda_graph=True)
    with pytest.warns(pointfuse.NewShapeWarning):
        frozen(inputs[1])
    expected = [model(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    outputs = []
    for _ in range(20):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(frozen(x))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert (y - expected[i % 2]).abs().max() < 0.05 * expected[i % 2].abs().max()


@pytest.mark.parametrize("form", ["converted", "frozen", "frozen with graphs of its own"])
def test_a_whole_model_is_captured_in_the_callers_graph(form: str) -> None:
    """One that has graphs of its own runs without them where a capture is under way."""
    model, x = stack(), torch.randn(2, 1024, 13, 13, dtype=torch.bfloat16)
    if form == "converted":
        made = pointfuse.convert(model)
    else:
        made = pointfuse.freeze(model, x, cuda_graph=form != "frozen")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
    for _ in range(2):
        x.normal_()
        graph.replay()
        expected = model(x)
        assert (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_graphed_callables_train_a_converted_model() -> None:
    model = pointfuse.convert(stack()).train()
    graphed = copy.deepcopy(model)
    x = torch.randn(4, 1024, 13, 13, dtype=torch.bfloat16)
    expected = step(model, x)
    with torch.enable_grad():
        graphed = torch.cuda.make_graphed_callables(graphed, (x.clone().requires_grad_(),))
    for actual, right in zip(step(graphed, x), expected, strict=True):
        assert (actual - right).abs().max() <= 0.05 * right.abs().max()


def test_one_model_runs_on_several_streams_at_once() -> None:
    model = pointfuse.convert(stack())
    inputs = [torch.randn(batch, 1024, 13, 13, dtype=torch.bfloat16) for batch in (1, 2, 8)]
    expected, outputs = [model(x) for x in inputs], []
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream, x in zip(streams, inputs, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs.append([model(x) for _ in range(10)])
    torch.cuda.synchronize()
    for found, right in zip(outputs, expected, strict=True):
        assert all((y - right).abs().max() < 0.05 * right.abs().max() for y in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "cuda graph"])
def test_a_frozen_model_moves_to_another_device(cuda_graph: bool) -> None:
    model, x = stack(), torch.randn(1, 1024, 13, 13, dtype=torch.bfloat16)
    frozen, expected = pointfuse.freeze(model, x, cuda_graph=cuda_graph), model(x)
    for device in ("cuda:1", "cuda:0"):
        frozen.to(device)
        announced = pytest.warns(pointfuse.NewShapeWarning) if cuda_graph else contextlib.nullcontext()
        with announced:
            y = frozen(x.to(device))
        assert y.device == torch.device(device)
        assert torch.cuda.current_device() == 0
        assert (y.to("cuda:0") - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_runs_the_units_whole_and_once_for_every_batch(mode: str) -> None:
    torch._dynamo.reset()
    model = pointfuse.convert(stack())
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    counted = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 8):
        x = torch.randn(batch, 1024, 13, 13, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        expected = model(x)
        for run in (compiled, counted):
            assert (run(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_an_exported_model_is_compiled_ahead_of_time(backend: str, tmp_path: Path) -> None:
    model = pointfuse.freeze(stack(), pack=False)
    x = torch.randn(2, 1024, 13, 13, dtype=torch.bfloat16)
    exported = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "stack.pt2"))
    y, expected = torch._inductor.aoti_load_package(path)(x), model(x)
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
