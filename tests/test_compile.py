"""torch.compile takes converted and frozen models whole: one graph for any batch, and what it leaves out is said."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pointfuse
import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
from functorch.compile import min_cut_rematerialization_partition, nop
from models_for_tests import (
    Bottleneck,
    ConvBNAct,
    DarknetBlock,
    OptionalMask,
    gap,
    images,
    trained,
    training_step,
    unit,
)
from models_for_tests import one_thread as one_thread
from pointfuse.backends import BACKENDS, FallbackWarning, calls
from pointfuse.modules import warn_once
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

BATCHES = (2, 3, 5, 8)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks() -> nn.Sequential:
    """In float64, so that answers compare to the last digits."""
    return trained(nn.Sequential(Bottleneck(), DarknetBlock(), *unit(kernel=1, act=nn.SiLU()), *unit())).double()


def plain_unit() -> nn.Sequential:
    return trained(nn.Sequential(*unit())).double()


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "converted": (blocks, pointfuse.convert),
    "ConvBNAct2d": (plain_unit, lambda model: nn.Sequential(pointfuse.ConvBNAct2d.from_modules(*model))),
    "frozen": (blocks, lambda model: pointfuse.freeze(model.eval(), pack=False)),
}
TRAINED = {name: form for name, form in FORMS.items() if name != "frozen"}


def counted(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """The model compiled without code generation, and what counts its graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


def batches(marked: bool) -> Iterator[Tensor]:
    for batch in BATCHES:
        x = images(batch, 4, 8, 8).double()
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        yield x


@pytest.mark.parametrize(("make", "form"), FORMS.values(), ids=FORMS)
def test_there_is_one_graph_and_no_break(make: Any, form: Any) -> None:
    explained = torch._dynamo.explain(form(make().eval()))(images().double())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize(("make", "form"), TRAINED.values(), ids=TRAINED)
def test_the_compiler_is_given_the_graph_of_the_model_before_conversion(make: Any, form: Any, training: bool) -> None:
    """Operator by operator, forward and backward: compiled code is as fast as if the model were not converted."""
    model = make().train(training)
    assert operators(form(copy.deepcopy(model)), training) == operators(model, training)


def operators(model: nn.Module, training: bool) -> list[list[str]]:
    """The operators of the graphs that a compiler gets of a call, and in training of its backward."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> torch.fx.GraphModule:
        graphs.append([f"{node.target} {node.meta['val'].stride()}" for node in graph.graph.nodes if computes(node)])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    with torch.set_grad_enabled(training):
        y = compiled(images().double())
    if training:
        y.sum().backward()
    assert len(graphs) == 1 + training
    return graphs


def computes(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


@pytest.mark.parametrize(("marked", "graphs"), [(True, 1), (False, 2)], ids=["marked dynamic", "found dynamic"])
@pytest.mark.parametrize(("make", "form"), FORMS.values(), ids=FORMS)
def test_inference_of_any_batch_is_compiled_once(make: Any, form: Any, marked: bool, graphs: int) -> None:
    model = make().eval()
    compiled, counter = counted(form(copy.deepcopy(model)))
    with torch.no_grad():
        for x in batches(marked):
            assert gap(compiled(x), model(x)) <= 1e-12
    assert counter.frame_count == graphs


@pytest.mark.parametrize(("marked", "graphs"), [(True, 1), (False, 2)], ids=["marked dynamic", "found dynamic"])
@pytest.mark.parametrize(("make", "form"), TRAINED.values(), ids=TRAINED)
def test_training_of_any_batch_is_compiled_once(make: Any, form: Any, marked: bool, graphs: int) -> None:
    """With PyTorch's gradients, running statistics and numbers of batches."""
    model = make()
    compiled, counter = counted(form(copy.deepcopy(model)))
    for x in batches(marked):
        expected, actual = training_step(model, x), training_step(compiled, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-10 * max(1.0, e.abs().max().item()))
    assert counter.frame_count == graphs
    (tracked,) = {int(b) for name, b in compiled.named_buffers() if name.endswith("num_batches_tracked")}
    assert tracked == len(BATCHES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_gives_pytorchs_answers(mode: str | None) -> None:
    """On a CPU the mode with CUDA graphs is the one without."""
    model = plain_unit()
    compiled = torch.compile(pointfuse.convert(copy.deepcopy(model)), fullgraph=True, mode=mode)
    with torch.no_grad():
        for x in (images().double(), images(5, 4, 8, 8).double()):
            assert gap(compiled.eval()(x), model.eval()(x)) <= 1e-12
    if mode is None:
        x = images().double()
        for a, e in zip(training_step(compiled, x), training_step(model, x), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-10 * max(1.0, e.abs().max().item()))


def test_a_model_is_compiled_in_place() -> None:
    model = blocks().eval()
    converted = pointfuse.convert(copy.deepcopy(model))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    converted.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        assert gap(converted(images().double()), model(images().double())) <= 1e-12
        assert counter.frame_count == 1
        # The copies that these make are not compiled.
        for again in (pointfuse.convert(converted), pointfuse.revert(converted), pointfuse.freeze(converted)):
            assert gap(again(images().double()), model(images().double())) <= 1e-12
    assert counter.frame_count == 1


def test_one_block_of_a_model_is_compiled() -> None:
    model = blocks().eval()
    converted = pointfuse.convert(copy.deepcopy(model))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    converted[1].compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        assert gap(converted(images().double()), model(images().double())) <= 1e-12
    assert counter.frame_count == 1


def test_blocks_of_one_class_share_a_graph() -> None:
    converted = pointfuse.convert(trained(nn.Sequential(*(DarknetBlock() for _ in range(12))))).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in converted:
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        converted(images())
    assert counter.frame_count == 1


def test_every_class_has_a_recompile_limit_of_its_own() -> None:
    """As its own forward has: more classes than the limit compile, each for itself."""
    count = torch._dynamo.config.recompile_limit + 2
    kinds = [type(f"Block{i}", (ConvBNAct,), {"forward": forward(i)}) for i in range(count)]
    converted = pointfuse.convert(trained(nn.Sequential(*(kind() for kind in kinds))), images()).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in converted:
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        converted(images())
    assert counter.frame_count == count


def forward(number: int) -> Callable[..., Tensor]:
    names: dict[str, Any] = {}
    exec(f"def forward(self, x):\n    return self.unit(x) + {number}", names)
    return names["forward"]


def test_every_class_keeps_the_signature_of_its_forward() -> None:
    converted = [pointfuse.convert(model) for model in (OptionalMask(), DarknetBlock(), nn.Sequential(*unit()))]
    for model, own in zip(converted, (OptionalMask, DarknetBlock, nn.Sequential), strict=True):
        assert inspect.signature(model.forward) == inspect.signature(own.forward.__get__(model))
        assert inspect.unwrap(type(model).forward) is own.forward


# Batch, input channels, output channels and plane. A dimension of one element leaves the memory format open.
SHAPES = {
    "3x3": (2, 4, 8, 6, 3),
    "1x1": (2, 8, 4, 5, 1),
    "one input channel": (2, 1, 8, 6, 3),
    "one output channel": (2, 8, 1, 6, 3),
    "one image": (1, 4, 8, 6, 3),
    "one pixel": (2, 8, 4, 1, 1),
    "one pixel of one image": (1, 8, 4, 1, 1),
    "one pixel and one channel": (3, 8, 1, 1, 1),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def unit_operator(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
    conv, bn, act = model
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    padding = list(conv.padding)
    rest = (None, [1, 1], padding, [1, 1], 1, bn.eps, "leaky_relu", act.negative_slope, "add_act")
    return lambda x: torch.ops.pointfuse.conv_bn_act(x, conv.weight, conv.bias, *norm, *rest)


STRIDED: dict[str, Callable[[nn.Sequential], Callable[[Tensor], Tensor]]] = {
    "converted": pointfuse.convert,
    "frozen": lambda model: pointfuse.freeze(model, pack=False),
    "frozen in NCHW": lambda model: pointfuse.freeze(model, pack=False, memory_format=torch.contiguous_format),
    "ConvBNAct2d": lambda model: pointfuse.ConvBNAct2d.from_modules(*model),
    "operator": unit_operator,
}


@pytest.mark.parametrize("form", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fake_strides_are_the_real_ones(shape: tuple[int, ...], form: Any) -> None:
    """Of every dimension with more than one element; of the others too, wherever PyTorch's own convolution does."""
    batch, c_in, c_out, side, kernel = shape
    for weights, inputs in itertools.product(LAYOUTS.values(), repeat=2):
        model = trained(nn.Sequential(*unit(c_in, c_out, kernel))).eval().to(memory_format=weights)
        x = images(batch, c_in, side, side).to(memory_format=inputs)
        ours = form(copy.deepcopy(model))
        with torch.no_grad():
            real, fake = ours(x), faked(ours, x)
            assert fake.shape == real.shape
            assert significant(fake) == significant(real)
            if faked(model, x).stride() == model(x).stride():
                assert fake.stride() == real.stride()


@pytest.mark.parametrize("form", [pointfuse.convert, STRIDED["ConvBNAct2d"]], ids=["converted", "ConvBNAct2d"])
@pytest.mark.parametrize("inputs", LAYOUTS.values(), ids=LAYOUTS)
def test_fake_strides_are_the_real_ones_in_training(inputs: torch.memory_format, form: Any) -> None:
    for shape in SHAPES.values():
        batch, c_in, c_out, side, kernel = shape
        if batch * side > 1:
            ours = form(trained(nn.Sequential(*unit(c_in, c_out, kernel)))).train()
            x = images(batch, c_in, side, side).to(memory_format=inputs)
            assert significant(faked(ours, x)) == significant(ours(x)), shape


def faked(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What tracing sees of an output."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


def significant(y: Tensor) -> list[tuple[int, int]]:
    return [(i, stride) for i, stride in enumerate(y.stride()) if y.shape[i] > 1]


def kept_by(model: nn.Module, budget: float = 1.0) -> int:
    """How many elements of images a compiled training step keeps for its backward, which is run."""
    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend=backend, fullgraph=True)
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        y = compiled(images())
    y.sum().backward()
    return sum(t.numel() for t in kept if t.shape == images().shape)


RECOMPUTING: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: pointfuse.convert(nn.Sequential(*unit(), *unit()), recompute=True),
    "a traced host": lambda: pointfuse.convert(Bottleneck(), recompute=True),
    "ConvBNAct2d": lambda: pointfuse.ConvBNAct2d(4, 4, 3, padding=1, recompute=True),
}


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize("make", RECOMPUTING.values(), ids=RECOMPUTING)
def test_a_compiled_graph_without_recompute_says_so_once(make: Callable[[], nn.Module]) -> None:
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"recompute=True does nothing in its graphs; torch\._functorch\.config\.act"):
        kept_by(make())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pointfuse", UserWarning)
        kept_by(make())


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_a_graph_that_keeps_nothing_says_nothing_of_recompute() -> None:
    """In evaluation, without gradients, and where nothing is to be recomputed."""
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pointfuse", UserWarning)
        for make in RECOMPUTING.values():
            counted(make().eval())[0](images())
            with torch.no_grad():
                counted(make())[0](images())
        kept_by(pointfuse.convert(nn.Sequential(*unit(), *unit())))


@pytest.mark.filterwarnings("ignore")
def test_the_memory_budget_of_pytorch_recomputes_instead() -> None:
    """As the warning says: four units keep the input of each, and by default also what stands between."""
    model = pointfuse.convert(nn.Sequential(*unit(), *unit(), *unit(), *unit()))
    size = images().numel()
    assert kept_by(model) == 12 * size
    assert kept_by(model, 0.5) <= 6 * size


@pytest.mark.parametrize("form", ["converted", "frozen"])
def test_another_backend_is_another_graph(form: str) -> None:
    """A choice is guarded, and the first graph serves again when it ends."""
    compiled, counter = counted(FORMS[form][1](blocks().eval()))
    with torch.no_grad():
        expected = compiled(images().double())
        for name in ("aten", "auto", "aten"):
            with pointfuse.use_backend(name):
                assert torch.equal(compiled(images().double()), expected)
    assert counter.frame_count == 2


def test_a_backend_is_chosen_inside_a_compiled_function() -> None:
    frozen = FORMS["frozen"][1](blocks())

    def run(x: Tensor) -> Tensor:
        with pointfuse.use_backend("aten"):
            return frozen(x)

    with torch.no_grad():
        assert torch.equal(
            torch.compile(run, fullgraph=True, backend="eager")(images().double()), run(images().double())
        )


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend serves the CPU, by Triton's interpreter."""
    if reason := BACKENDS["triton"].triton_problem():
        pytest.skip(reason)
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off, because there is a GPU")
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(BACKENDS["triton"], "unusable_reason", lambda: None)
    monkeypatch.setattr(sys.modules[FallbackWarning.__module__], "_announced", set())
    BACKENDS["triton"].loaded()


def kernels(counter: Any) -> list[bool]:
    """Of each graph, whether the triton backend's operator is in it."""
    return ["_conv_bn_act_triton" in str(graph.graph) for graph in counter.graphs]


@pytest.mark.usefixtures("_interpreted")
def test_a_frozen_models_graph_follows_the_backend() -> None:
    model = trained(nn.Sequential(*unit(), *unit())).eval()
    compiled, counter = counted(pointfuse.freeze(model, pack=False))
    with torch.no_grad():
        for name in ("auto", "triton", "auto", "triton"):
            with pointfuse.use_backend(name, strict=name == "triton"):
                assert gap(compiled(images()), model(images())) <= 1e-5
    assert kernels(counter) == [False, True]


LIVE = {"converted": pointfuse.convert, "ConvBNAct2d": STRIDED["ConvBNAct2d"]}


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("form", LIVE.values(), ids=LIVE)
def test_live_units_are_left_to_the_compiler_and_that_is_said(form: Any) -> None:
    model = plain_unit().eval().float()
    compiled, counter = counted(form(copy.deepcopy(model)))
    with torch.no_grad(), pointfuse.use_backend("triton"):
        with pytest.warns(
            FallbackWarning, match=r"own operators; torch\.compile and torch\.export put the kernels into"
        ):
            assert gap(compiled(images()), model(images())) <= 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            compiled(images(3, 4, 8, 8))
        assert not any(kernels(counter))
        with (
            pointfuse.use_backend("triton", strict=True),
            pytest.raises(RuntimeError, match="the triton backend does not serve this call: a graph of a converted"),
        ):
            compiled(images())


@pytest.mark.usefixtures("_interpreted")
def test_a_refusal_in_a_graph_is_said_as_it_is_in_eager() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU()).eval()
    compiled, counter = counted(pointfuse.freeze(grouped, pack=False))
    with (
        torch.no_grad(),
        pointfuse.use_backend("triton"),
        pytest.warns(
            FallbackWarning, match="PyTorch's own operators serve calls that the triton backend does not: .*group"
        ),
    ):
        assert gap(compiled(images()), grouped(images())) <= 1e-6
    assert kernels(counter) == [False]
