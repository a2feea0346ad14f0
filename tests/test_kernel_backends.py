"""The backends with kernels of their own, from the module's call to the kernel: each on a GPU where there is one, and
always on the CPU. There the cuda backend's ``torch_binding.cpp`` runs on tensors of the CPU over emulated kernels, with
the plans of two GPUs, and Triton's kernels run in its interpreter."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pointfuse
import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental.proxy_tensor
from canaries import Canaries
from host_ops import host_ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pointfuse.backends import BACKENDS, FallbackWarning, aten, calls
from pointfuse.convert.sequences import run_sequence, runs_of
from pointfuse.functional import conv_bn_act
from pointfuse.problem import ACTIVATIONS, IDENTITY, RESIDUAL_ORDERS, Activation, BatchNorm, Geometry, Refused
from torch import Tensor, nn
from torch.nn import functional as F
from yardstick import assert_as_accurate, error


class Place(NamedTuple):
    """A backend, and what runs its kernels."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


INTERPRETER = Place("triton", "interpreter")
PLACES = [Place("cuda", "h100"), Place("cuda", "a100")]
if os.environ.get("TRITON_INTERPRET") == "1":
    PLACES.append(INTERPRETER)
PLACES += [Place(name, "gpu") for name in ("cuda", "triton") if not BACKENDS[name].unusable_reason()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GEOMETRIES = {
    "1x1": dict(kernel=1),
    "1x1 stride 2": dict(kernel=1, stride=2),
    "1x1 padded": dict(kernel=1, padding=1),
    "3x3": dict(kernel=3, padding=1),
    "3x3 stride 2": dict(kernel=3, padding=1, stride=(2, 1)),
    "3x3 same": dict(kernel=3, padding="same"),
    "3x3 valid": dict(kernel=3, padding="valid"),
}


@pytest.fixture(params=PLACES, ids=str, autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The backend that is asked for, and where it runs; tensors are made there."""
    backend, device = request.param
    if device != "gpu":
        if backend == "cuda":
            host_ops().pointfuse_emulate(device.encode())
        elif reason := BACKENDS["triton"].triton_problem():
            pytest.skip(reason)
        monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
        monkeypatch.setattr(BACKENDS[backend], "unusable_reason", lambda: None)
    monkeypatch.setattr(sys.modules["pointfuse.backends"], "_announced", set())
    with torch.device("cuda" if device == "gpu" else "cpu"), pointfuse.use_backend(backend, strict=True):
        yield request.param


def in_graph(backend: str, compiler: torch._dynamo.testing.CompileCounterWithBackend) -> bool:
    """Whether a backend's operator is in what was compiled."""
    return any(f"_conv_bn_act_{backend}" in str(node.target) for graph in compiler.graphs for node in graph.graph.nodes)


@pytest.fixture
def served(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call that gets as far as the backend's kernels."""
    made: list[int] = []
    module, name = BACKENDS[place.backend], {"cuda": "operator", "triton": "execute"}[place.backend]
    execute = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: made.append(1) or execute(*arguments))
    return made


@pytest.fixture
def lenient(place: Place) -> Iterator[None]:
    with pointfuse.use_backend(place.backend):
        yield


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, norm: list[Tensor | None], activation: Activation,
          residual: Tensor | None = None, order: str = "add_act", **geometry: Any) -> Tensor:  # fmt: skip
    with pointfuse.use_backend("aten"):
        return conv_bn_act(
            x, weight, bias, *norm, activation=activation.name, negative_slope=activation.negative_slope,
            residual=residual, residual_order=order, **geometry,
        )  # fmt: skip


def vectors(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    positive = torch.rand(2, channels) + 0.5
    return [t.to(dtype) for t in (torch.randn(channels), positive[0], positive[1], torch.randn(channels))]


def as_tf32(t: Tensor) -> Tensor:
    """fp32 as Hopper's tensor cores read it for TF32, which torch allows by default: without the last 13 bits."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32) if t.dtype == torch.float32 else t


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_as_accurate_as_pytorchs(
    dtype: torch.dtype, geometry: dict[str, Any], memory_format: torch.memory_format, served: list[int]
) -> None:
    kernel, rest = geometry["kernel"], {k: v for k, v in geometry.items() if k != "kernel"}
    x = torch.randn(2, 24, 9, 7).to(dtype).to(memory_format=memory_format)
    weight = (torch.randn(40, 24, kernel, kernel) * 0.2).to(dtype)
    norm, activation = vectors(40), Activation("leaky_relu", 0.1)
    with torch.no_grad():
        y = conv_bn_act(x, weight, None, *norm, negative_slope=0.1, **rest)
        assert len(served) == 1
        with Canaries() as canaries:
            operands = [canaries.guard(t) for t in (x, weight, *norm)]
            assert torch.equal(conv_bn_act(*operands[:2], None, *operands[2:], negative_slope=0.1, **rest), y)
        expected = eager(as_tf32(x), as_tf32(weight), None, norm, activation, **rest)
        exact = eager(x.double(), weight.double(), None, [wide(t) for t in norm], activation, **rest)
    assert_as_accurate(y, expected, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues_are_exact_to_rounding(dtype: torch.dtype, activation: str, order: str | None) -> None:
    """Powers of two as statistics and small integers elsewhere: every operand arrives where it belongs, once."""
    whole = lambda *shape: torch.randint(-4, 5, shape).to(dtype)  # noqa: E731
    x, weight, bias = whole(1, 16, 3, 5), whole(8, 16, 1, 1), whole(8)
    residual = None if order is None else whole(1, 8, 3, 5)
    norm = [torch.randint(-3, 4, (8,)).float(), torch.tensor([0.25, 1.0, 4.0, 16.0] * 2), *torch.randint(-3, 4, (2, 8))]
    norm = [t.to(dtype) for t in norm]
    act = Activation(activation, -0.5)
    with torch.no_grad():
        for use_bias in (None, bias):
            for use_norm in (norm, [*norm[:2], None, norm[3]], [*norm[:2], norm[2], None], [None] * 4):
                y = conv_bn_act(
                    x, weight, use_bias, *use_norm, eps=1e-30, activation=activation, negative_slope=-0.5,
                    residual=residual, residual_order=order or "add_act",
                )  # fmt: skip
                operands = (x.double(), weight.double(), wide(use_bias), [wide(t) for t in use_norm])
                exact = eager(*operands, act, wide(residual), order or "add_act", eps=1e-30).to(dtype)
                torch.testing.assert_close(y, exact, rtol=4e-6 if dtype == torch.float32 else 8e-3, atol=1e-37)


def test_strict_fp32_is_followed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 32, 5, 5), torch.randn(8, 32, 1, 1)
    exact = F.conv2d(x.double(), weight.double())
    errors = []
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(calls, "tf32_allowed", lambda p=precision: p == "tf32")
        y = conv_bn_act(x, weight, activation="identity")
        errors.append(((y - exact).abs().max() / exact.abs().max()).item())
    assert errors[0] > 1e-5 or place == INTERPRETER  # which has no TF32
    assert errors[1] < 1e-6


def test_torchs_setting_of_tf32_is_read() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert calls.tf32_allowed() == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_everything_that_runs_units_runs_on_the_backend(served: list[int]) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)).eval()
    block[1].running_mean.uniform_()
    unit = pointfuse.ConvBNAct2d.from_modules(*block)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected = block(x)
        ways: list[Callable[[], Tensor]] = [
            lambda: unit(x),
            lambda: pointfuse.convert(block)(x),
            lambda: pointfuse.freeze(block, pack=False)(x).contiguous(),
            lambda: conv_bn_act(x, block[0].weight, None, block[1].running_mean, block[1].running_var, padding=1,
                                negative_slope=0.1),
            lambda: torch.ops.pointfuse.conv_bn_act(x, block[0].weight, None, block[1].running_mean,
                block[1].running_var, None, None, None, [1, 1], [1, 1], [1, 1], 1, 1e-5, "leaky_relu", 0.1, "add_act"),
        ]  # fmt: skip
        for i, way in enumerate(ways, 1):
            y = way()
            assert len(served) == i
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_what_a_sequence_remembers_does_not_choose_the_backend(
    monkeypatch: pytest.MonkeyPatch, served: list[int]
) -> None:
    monkeypatch.setattr(aten, "_FOLD_MIN_OUTPUTS", 1 << 20)
    modules = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8).eval(), nn.ReLU()]
    with pointfuse.use_backend("aten"):
        grouped = runs_of(modules)
    x = torch.randn(1, 8, 3, 3)
    with torch.no_grad():
        run_sequence(grouped, x)
        assert len(served) == 1
        with pointfuse.use_backend("aten"):
            run_sequence(grouped, x)
        assert len(served) == 1


UNSERVED = {
    "double": (dict(dtype=torch.float64), "its dtype is none of float32, float16 and bfloat16"),
    "groups": (dict(groups=2), "it has groups"),
    "dilated": (dict(dilation=2), "it is dilated"),
    "5x5": (dict(kernel=5, padding=2), "its kernel is neither 1x1 nor 3x3"),
    "1x3": (dict(kernel=(1, 3)), "its kernel is neither 1x1 nor 3x3"),
    "long stride": (dict(stride=300), "its stride or padding is not from 0 to 255"),
    "training in double": (dict(training=True, dtype=torch.float64), "its dtype is none of float32"),
    "broadcast residual": (dict(residual_shape=(8, 1, 1)), "x, weight and residual need four dimensions"),
    "broadcast batch": (dict(residual_shape=(1, 8, 6, 6)), "the residual must have the output's shape"),
    "residual of another dtype": (dict(residual_dtype=torch.float16), "x, weight and residual must have one dtype"),
    "strided statistics": (dict(gap=2), "a tensor of bias or batch norm is not contiguous"),
}  # fmt: skip


def unserved_call(
    dtype: torch.dtype = torch.float32, kernel: Any = 1, groups: int = 1, residual_shape: Any = None, gap: int = 1,
    residual_dtype: torch.dtype | None = None, **rest: Any,
) -> Callable[[], Tensor]:  # fmt: skip
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x, weight = torch.randn(2, 8, 6, 6, dtype=dtype), torch.randn(8, 8 // groups, kh, kw, dtype=dtype)
    norm = [t.to(dtype).repeat_interleave(gap)[::gap] for t in vectors(8)]
    residual = None
    if residual_shape is not None or residual_dtype is not None:
        residual = torch.randn(residual_shape or (2, 8, 6, 6)).to(residual_dtype or dtype)

    def call() -> Tensor:
        copies = [t.clone() if t.is_contiguous() else t for t in norm]
        return conv_bn_act(x, weight, None, *copies, groups=groups, residual=residual, **rest)

    return call


@pytest.mark.parametrize(("options", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_what_is_not_served_runs_on_aten_and_is_said_once(
    options: dict[str, Any], reason: str, place: Place, lenient: None
) -> None:
    call, backend = unserved_call(**options), place.backend
    with torch.no_grad():
        with pytest.warns(FallbackWarning, match=f"calls that the {backend} backend does not: {reason}"):
            y = call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(call(), y)
            with pointfuse.use_backend("aten"):
                torch.testing.assert_close(call(), y, rtol=0, atol=0)
        with (
            pointfuse.use_backend(backend, strict=True),
            pytest.raises(RuntimeError, match=f"the {backend} backend does not serve this call: {reason}"),
        ):
            call()


def test_gradients_autocast_and_transforms_are_pytorchs(
    lenient: None, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(1, 8, 3, 3, requires_grad=True), torch.randn(8, 8, 1, 1)
    with pytest.warns(FallbackWarning, match="gradients are recorded: these kernels are for inference"):
        conv_bn_act(x, weight).sum().backward()
    assert x.grad is not None
    x = x.detach()
    assert not served
    conv_bn_act(x, weight)  # nothing here requires a gradient
    assert len(served) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *device: not device)  # torch.autocast wants a GPU
        with pytest.warns(FallbackWarning, match="autocast is active"):
            conv_bn_act(x, weight)
    with pytest.warns(FallbackWarning, match="a function transform or a trace is active"):
        torch.func.vmap(lambda t: conv_bn_act(t, weight))(x[None])


class Subclass(torch.Tensor):
    pass


def test_subclasses_are_pytorchs(lenient: None) -> None:
    with pytest.warns(FallbackWarning, match="not a plain tensor"):
        y = conv_bn_act(torch.randn(1, 8, 3, 3).as_subclass(Subclass), torch.randn(8, 8, 1, 1))
    assert type(y) is Subclass


WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    "channels": lambda: dict(x=torch.zeros(1, 7, 4, 4)),
    "three dimensions": lambda: dict(x=torch.zeros(4, 4)),
    "weight of three dimensions": lambda: dict(weight=torch.zeros(8, 8, 1)),
    "smaller than the kernel": lambda: dict(x=torch.zeros(1, 8, 2, 2), weight=torch.zeros(8, 8, 3, 3)),
    "no input plane": lambda: dict(x=torch.zeros(1, 8, 0, 4)),
    "dtypes": lambda: dict(weight=torch.zeros(8, 8, 1, 1, dtype=torch.float16)),
    "bias": lambda: dict(bias=torch.zeros(7)),
    "bias dtype": lambda: dict(bias=torch.zeros(8, dtype=torch.float16)),
    "mean": lambda: dict(running_mean=torch.zeros(7)),
    "var": lambda: dict(running_var=None),
    "gamma": lambda: dict(bn_weight=torch.ones(9)),
    "eps": lambda: dict(eps=0.0),
    "stride": lambda: dict(stride=0),
    "padding": lambda: dict(padding=-1),
    "padding's name": lambda: dict(padding="full"),
    "same with a stride": lambda: dict(padding="same", stride=2),
    "residual": lambda: dict(residual=torch.zeros(1, 8, 3, 3)),
    "a list": lambda: dict(x=[1.0]),
    "sparse": lambda: dict(x=torch.zeros(1, 8, 4, 4).to_sparse()),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_calls_raise_pytorchs_own_errors_and_say_nothing(
    wrong: Callable[[], dict[str, Any]], place: Place
) -> None:
    right: dict[str, Any] = dict(
        x=torch.zeros(1, 8, 4, 4), weight=torch.zeros(8, 8, 1, 1), bias=torch.zeros(8), running_mean=torch.zeros(8),
        running_var=torch.ones(8), bn_weight=torch.ones(8), bn_bias=torch.zeros(8),
    )  # fmt: skip
    outcomes = []
    for backend in ("aten", place.backend):
        with pointfuse.use_backend(backend), torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                outcome = conv_bn_act(**right | wrong()).shape
            except Exception as error:
                outcome = (type(error), str(error))
            said = [str(w.message) for w in said if w.category is FallbackWarning]
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]
    assert not said or isinstance(outcomes[0], torch.Size)


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    c_out=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    permutation=st.permutations(range(4)),
    channels_last_weight=st.booleans(),
    frozen=st.booleans(),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_strides_are_pytorchs_and_what_tracing_expects(
    place: Place, sizes: tuple[int, ...], c_out: int, kernel: int, permutation: list[int],
    channels_last_weight: bool, frozen: bool,
) -> None:  # fmt: skip
    x = torch.randn([sizes[i] for i in permutation]).permute([permutation.index(i) for i in range(4)])
    weight = torch.randn(c_out, x.shape[1], kernel, kernel)
    if channels_last_weight:
        weight = weight.to(memory_format=torch.channels_last)
    unit = (x, weight, None, None, IDENTITY, Geometry((1, 1), (1, 1)))
    y = BACKENDS[place.backend].conv_bn_act(*unit, frozen=frozen, channels_last=frozen)
    config = 1 | 1 << 8 | 1 << 16 | 1 << 24 | (frozen and calls.FROZEN | calls.CHANNELS_LAST)
    with torch._subclasses.FakeTensorMode() as mode:
        operator = getattr(torch.ops.pointfuse, f"_conv_bn_act_{place.backend}")
        fake = operator(*[mode.from_tensor(t) for t in (x, weight)], *[None] * 6, config, 0.0, 0.0)
    channels_last = frozen or any(
        torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in (x, weight)
    )
    expected = torch.empty(y.shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for made in (y, fake, calls.empty_output(x, weight, config)):
        assert (made.shape, made.stride(), made.dtype) == (y.shape, expected.stride(), x.dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_the_unit_compiles_whole_and_once_for_every_batch(residual: bool, place: Place) -> None:
    torch._dynamo.reset()
    weight, norm = torch.randn(8, 8, 3, 3), vectors(8)

    def unit(x: Tensor, residual: Tensor | None) -> Tensor:
        return conv_bn_act(x * 2, weight, None, *norm, padding=1, residual=residual) + 1

    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unit, backend=compiler, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 8, 4, 5).to(memory_format=torch.channels_last)
        z = torch.randn(batch, 8, 4, 5) if residual else None
        torch._dynamo.mark_dynamic(x, 0)
        if z is not None:
            torch._dynamo.mark_dynamic(z, 0)
        with torch.no_grad():
            y, expected = compiled(x, z), unit(x, z)
            conv_bn_act(x, weight, padding=batch)  # a geometry that is new
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
    assert compiler.frame_count == 1
    assert in_graph(place.backend, compiler)


@pytest.mark.parametrize("options", [v[0] for k, v in UNSERVED.items() if "training" not in k])
def test_what_is_not_served_compiles_too(options: dict[str, Any], place: Place, lenient: None) -> None:
    torch._dynamo.reset()
    call = unserved_call(**options)
    with torch.no_grad(), pointfuse.use_backend("aten"):
        expected = call()
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        y = torch.compile(call, backend=compiler, fullgraph=True)()
    assert not in_graph(place.backend, compiler)
    torch.testing.assert_close(y, expected)


def test_an_empty_batch_gives_an_empty_result() -> None:
    y = conv_bn_act(torch.randn(0, 8, 5, 5), torch.randn(4, 8, 3, 3), stride=2)
    assert y.shape == (0, 4, 2, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_frozen_models_run_on_the_backend(
    dtype: torch.dtype, memory_format: torch.memory_format, served: list[int]
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.1),
        nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1),
    ).eval()  # fmt: skip
    for bn in (model[1], model[4]):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        exact = model.double()(x.double())
        model = model.to(dtype)
        frozen = pointfuse.freeze(model, memory_format=memory_format, pack=False)
        y = frozen(x.to(dtype))
        assert len(served) == 3
        with pointfuse.use_backend("aten"):
            expected = model(as_tf32(x.to(dtype)))
            frozen_by_aten = pointfuse.freeze(model, memory_format=memory_format, pack=False)(x.to(dtype))
    assert frozen[0].folded_bias.dtype == torch.float32
    assert y.stride() == frozen_by_aten.stride()
    assert y.is_contiguous(memory_format=memory_format)
    gap, allowed = ((t.double() - exact).abs().max().item() for t in (y, expected))
    assert gap <= max(2 * allowed, 2e-3 * exact.abs().max().item()) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_units_compile_whole(dtype: torch.dtype, place: Place) -> None:
    """The folded bias beside a weight in half precision stays fp32, which a unit that is not frozen may not have."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval().to(dtype)
    model[1].running_mean.normal_()
    frozen, x = pointfuse.freeze(model, pack=False), torch.randn(2, 8, 4, 5).to(dtype)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        y, expected = torch.compile(frozen, backend=compiler, fullgraph=True)(x), frozen(x)
    assert in_graph(place.backend, compiler)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


def test_a_frozen_unit_that_is_not_served_runs_on_aten(lenient: None) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 5, groups=2), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad(), pytest.warns(FallbackWarning, match="it has groups"):
        torch.testing.assert_close(pointfuse.freeze(model, pack=False)(x), model(x), rtol=1e-5, atol=1e-6)


def test_plans_name_the_backend_that_will_serve(place: Place) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 1).double(), nn.ReLU()
    )
    assert [u.backend for u in pointfuse.plan(model).units] == [place.backend, "aten", "aten"]


def test_a_refusal_is_the_backends_own_affair(place: Place) -> None:
    norm = BatchNorm(*vectors(4), True, 0.1, 1e-5)
    with pytest.raises(Refused, match="batch norm uses the batch's own statistics"):
        BACKENDS[place.backend].conv_bn_act(
            torch.zeros(1, 4, 2, 2), torch.zeros(4, 4, 1, 1), None, norm, IDENTITY, Geometry()
        )


@pytest.mark.parametrize("order", [None, *RESIDUAL_ORDERS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operators_are_told_what_was_asked(
    activation: str, order: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8)
    residual = None if order is None else torch.randn(1, 8, 3, 6)
    norm = BatchNorm(*vectors(8), False, 0.1, 1e-3)
    for tf32, frozen in ((False, True), (True, False)):
        monkeypatch.setattr(calls, "tf32_allowed", lambda tf32=tf32: tf32)
        unit = (x, weight, bias, norm, Activation(activation, 0.3), Geometry((2, 1), (1, 1)), residual)
        *tensors, config, eps, slope = calls.arguments(*unit, order or "add_act", frozen=frozen, channels_last=frozen)
        assert all(a is b for a, b in zip(tensors, (x, weight, bias, *norm[:4], residual), strict=True))
        assert (eps, slope) == (1e-3, 0.3)
        assert calls.stride_and_padding(config) == ((2, 1), (1, 1))
        assert (calls.activation_of(config), calls.residual_order_of(config)) == (activation, order)
        flags = calls.allows_tf32(config), calls.is_frozen(config), calls.asks_channels_last(config)
        assert flags == (tf32, frozen, frozen)


# (c_in, c_out, plane, kernel, stride, padding) of YOLOv3's heads, ResNet-50 and Inception-ResNet-v2, the odd planes and
# channel counts among them; the largest are left to a GPU, since the emulator takes a second for 10^8 products.
LAYERS = {
    "YOLOv3 13x13 1x1": (1024, 512, 13, 1, 1, 0),
    "YOLOv3 13x13 head": (1024, 255, 13, 1, 1, 0),
    "YOLOv3 13x13 head, VOC": (1024, 75, 13, 1, 1, 0),
    "YOLOv3 26x26 1x1": (768, 256, 26, 1, 1, 0),
    "YOLOv3 52x52 1x1": (384, 128, 52, 1, 1, 0),
    "YOLOv3 52x52 3x3": (128, 256, 52, 3, 1, 1),
    "YOLOv3 first": (3, 32, 33, 3, 1, 1),
    "YOLOv3 down": (64, 128, 26, 3, 2, 1),
    "ResNet-50 reduce": (256, 64, 56, 1, 1, 0),
    "ResNet-50 shortcut": (256, 512, 28, 1, 2, 0),
    "ResNet-50 3x3": (512, 512, 7, 3, 1, 1),
    "Inception-ResNet-v2 stem": (64, 80, 35, 1, 1, 0),
    "Inception-ResNet-v2 stem 3x3": (80, 192, 35, 3, 1, 0),
    "Inception-ResNet-v2 block17": (1088, 192, 17, 1, 1, 0),
    "Inception-ResNet-v2 block17 up": (384, 1088, 17, 1, 1, 0),
    "Inception-ResNet-v2 block8": (2080, 192, 8, 1, 1, 0),
    "Inception-ResNet-v2 mixed": (1088, 24, 7, 1, 1, 0),
}


# Those that the interpreter does in a second or two each.
INTERPRETED = (
    "YOLOv3 first", "YOLOv3 down", "YOLOv3 13x13 head, VOC", "ResNet-50 shortcut", "Inception-ResNet-v2 block8",
    "Inception-ResNet-v2 mixed",
)  # fmt: skip


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("place", "layer"),
    [
        pytest.param(place, layer, id=f"{place}-{name}")
        for place in PLACES
        for name, layer in LAYERS.items()
        if place != INTERPRETER or name in INTERPRETED
    ],
    indirect=["place"],
)
def test_layers_of_real_networks_are_exact_by_the_plan_chosen(
    layer: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Small integers and powers of two, so that bf16's one rounding is the exact result's."""
    c_in, c_out, plane, kernel, stride, padding = layer
    x = torch.randint(-2, 3, (1, c_in, plane, plane)).bfloat16().to(memory_format=memory_format)
    weight = torch.randint(-2, 3, (c_out, c_in, kernel, kernel)).bfloat16().to(memory_format=memory_format)
    mean, beta = torch.randint(-3, 4, (2, c_out)).bfloat16()
    var, gamma = torch.tensor([0.25, 1.0, 4.0, 16.0]).bfloat16()[torch.randint(4, (2, c_out))]
    with torch.no_grad():
        y = conv_bn_act(
            x, weight, None, mean, var, gamma, beta, eps=1e-30, negative_slope=0.5, stride=stride, padding=padding
        )
        z = F.conv2d(x.float(), weight.float(), None, stride, padding).double()
        z = F.batch_norm(z, *(t.double() for t in (mean, var, gamma, beta)), False, 0.0, 1e-30)
    assert torch.equal(y, F.leaky_relu(z, 0.5).bfloat16())


@pytest.mark.parametrize("place", [p for p in PLACES if p.backend == "triton"], ids=str, indirect=True)
def test_each_new_plan_of_a_triton_kernel_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    BACKENDS["triton"].loaded().forget_plans()
    monkeypatch.setenv("POINTFUSE_PRINT_PLAN", "1")
    for size in (3, 3, 4):
        conv_bn_act(torch.zeros(1, 8, size, size), torch.zeros(8, 8, 1, 1), activation="relu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pointfuse: ")]
    assert len(lines) == 2
    assert lines[0].startswith("pointfuse: 1x1 NCHW tf32 16x8->8: tile 64x")


def test_negative_views_are_what_they_mean(lenient: None) -> None:
    x, weight = torch.randn(1, 8, 3, 3, dtype=torch.complex64).conj().imag, torch.randn(8, 8, 1, 1)
    assert x.is_neg()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        y = conv_bn_act(x, weight, activation="identity", residual=x)
    torch.testing.assert_close(y, F.conv2d(x, weight) + x, rtol=1e-2, atol=1e-2)


def test_a_tracer_of_operators_sees_the_unit() -> None:
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 8, 1, 1)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: conv_bn_act(x, weight) + 1)(x)
    torch.testing.assert_close(graph(2 * x), conv_bn_act(2 * x, weight) + 1)


# Training


def gradients_of(unit: Callable[..., Tensor], tensors: list[Tensor | None], statistics: list[Tensor]) -> list[Tensor]:
    """Output, statistics after it, and the gradients of those of ``tensors`` that there are."""
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    statistics = [t.clone() for t in statistics]
    y = unit(*leaves, *statistics)
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    y.backward(weights)
    return [y.detach(), *statistics, *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.fixture
def trained(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by each step of a unit with gradients that the backend's kernels take."""
    steps, made = sys.modules["pointfuse.backends"].training_steps(), []

    def recorded(name: str) -> Callable[..., Any]:
        step = getattr(steps, name)

        def run(*args: Any) -> Any:
            result = step(*args)
            made.append(name)
            return result

        return run

    for name in ("forward", "conv", "normalise", "sums", "gradients"):
        if hasattr(steps, name):
            monkeypatch.setattr(steps, name, recorded(name))
    return made


@pytest.fixture
def whole_fp32() -> Iterator[None]:
    """fp32 without TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


TRAINED = {
    "1x1": dict(kernel=1),
    "1x1 with a bias": dict(kernel=1, bias=True),
    "3x3 stride 2": dict(kernel=3, padding=1, stride=2),
    "residual before SiLU": dict(kernel=1, order="add_act", activation="silu"),
    "residual after leaky ReLU": dict(kernel=3, padding=1, order="act_add", negative_slope=-0.2),
    "given statistics": dict(kernel=1, training=False),
    "given statistics, residual before ReLU": dict(kernel=1, training=False, order="add_act", activation="relu"),
}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_accurate_as_pytorchs(
    dtype: torch.dtype, case: dict[str, Any], memory_format: torch.memory_format, trained: list[str],
    whole_fp32: None,
) -> None:  # fmt: skip
    options = {"training": True, "negative_slope": 0.1, "stride": 1, "padding": 0} | case
    kernel, order, with_bias = (options.pop(k, d) for k, d in (("kernel", 1), ("order", None), ("bias", False)))
    x = torch.randn(3, 24, 8, 6).to(dtype).to(memory_format=memory_format)
    weight = (torch.randn(40, 24, kernel, kernel) * 0.2).to(dtype)
    mean, var, gamma, beta = vectors(40)
    # Pre-activations away from zero, on either side, where rounding would decide between two slopes.
    gamma, beta = 0.3 * gamma, torch.where(beta > 0, 6.0, -6.0)
    plane = F.conv2d(x, weight, None, options["stride"], options["padding"]).shape
    bias = torch.randn(40).to(dtype) if with_bias else None
    residual = torch.randn(plane).to(dtype).to(memory_format=memory_format) if order else None

    def unit(x: Tensor, weight: Tensor, bias: Any, gamma: Tensor, beta: Tensor, residual: Any, mean: Tensor,
             var: Tensor) -> Tensor:  # fmt: skip
        return conv_bn_act(
            x, weight, bias, mean, var, gamma, beta, residual=residual, residual_order=order or "add_act", **options
        )

    tensors, statistics = [x, weight, bias, gamma, beta, residual], [mean, var]
    actual = gradients_of(unit, tensors, statistics)
    assert trained[-2:] == ["sums", "gradients"]
    assert trained[0] == ("conv" if not options["training"] or len(trained) == 4 else "forward")
    with pointfuse.use_backend("aten"):
        expected = gradients_of(unit, tensors, statistics)
        exact = gradients_of(unit, [wide(t) for t in tensors], [t.double() for t in statistics])
    names = ["y", "mean", "var", "x", "weight", *(["bias"] if with_bias else []), "gamma", "beta", "residual"]
    for name, a, e, reference in zip(names, actual, expected, exact, strict=False):
        assert a.dtype == e.dtype, name
        if name == "bias" and options["training"]:  # which batch statistics take away again: rounding alone
            continue
        assert error(a, reference) <= 2 * error(e, reference) + 1e-6, name


def test_recomputing_gives_the_same_bit_for_bit(trained: list[str]) -> None:
    unit = pointfuse.ConvBNAct2d(24, 40, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, 6, 6).to(memory_format=torch.channels_last)
    results = []
    for recompute in (False, True):
        unit.recompute = recompute
        unit.zero_grad()
        a = x.clone().requires_grad_()
        (unit(a) * torch.linspace(-1, 1, 6)).sum().backward()
        results.append([a.grad, *(p.grad for p in unit.parameters())])
    assert trained.count("conv") >= 1  # in the backward
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_trains_on_the_kernels(place: Place, trained: list[str]) -> None:
    unit = pointfuse.ConvBNAct2d(24, 40, 1)
    with torch.autocast("cuda" if place.device == "gpu" else "cpu", torch.bfloat16):
        y = unit(torch.randn(2, 24, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert trained[-2:] == ["sums", "gradients"]
    assert unit.conv.weight.grad.dtype == torch.float32


def test_a_residual_that_is_not_served_is_said_and_added_by_pytorch(lenient: None, trained: list[str]) -> None:
    unit = pointfuse.ConvBNAct2d(24, 40, 1)
    x, residual = torch.randn(2, 24, 6, 6), torch.randn(40, 1, 1)
    exact = copy.deepcopy(unit).double()
    with pytest.warns(FallbackWarning, match="gradients are recorded of a call that is no plain unit's"):
        y = unit(x, residual)
    assert trained  # the rest of the unit is
    expected = exact.act(exact.bn(exact.conv(x.double())) + residual)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-2)
    assert y.requires_grad
    with pointfuse.use_backend(sys.modules["pointfuse.backends"].chosen(), strict=True), pytest.raises(RuntimeError):
        unit(x, residual)
