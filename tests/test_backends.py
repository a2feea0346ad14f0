"""Backends are named, chosen and refused with reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pointfuse
import pytest
import torch
import torch._dynamo.testing
from pointfuse.backends import FallbackWarning, aten, calls, chosen, cuda, fallback_reason, select, triton
from pointfuse.backends.triton import tables
from pointfuse.backends.triton.configs import Config, Entry, ShapeClass
from pointfuse.problem import Refused
from torch import Tensor, nn

CONFIG = Config(64, 16, 64, 3, 4)


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POINTFUSE_CACHE_DIR", str(tmp_path / "cache"))
    tables.forget()
    yield
    tables.forget()


def test_every_backend_is_listed_with_its_reason() -> None:
    found = pointfuse.backends()
    assert list(found) == ["cuda", "triton", "aten"]
    assert found["aten"] == pointfuse.BackendStatus(usable=True, reason="")
    for status in found.values():
        assert status.usable == (status.reason == "")


@pytest.mark.parametrize("name", ["auto", "aten"])
def test_a_usable_backend_can_be_chosen_and_the_choice_ends(name: str) -> None:
    with pointfuse.use_backend(name):
        assert select() is aten
    with pytest.raises(KeyError), pointfuse.use_backend(name):
        raise KeyError
    assert select() is aten


def test_an_unknown_backend_raises() -> None:
    with (
        pytest.raises(
            ValueError, match="use_backend\\('cudnn'\\): no such backend; the names are auto, cuda, triton, aten"
        ),
        pointfuse.use_backend("cudnn"),
    ):
        pass


def test_a_backend_that_cannot_run_says_why() -> None:
    for name, status in pointfuse.backends().items():
        if not status.usable:
            message = f"the {name} backend cannot run here: .+; 'auto' takes the best"
            with pytest.raises(RuntimeError, match=message), pointfuse.use_backend(name):
                pass


@pytest.mark.parametrize(
    ("value", "expected"), [("", "fine"), ("aten", "fine"), ("cuda", "RuntimeError"), ("x", "ValueError")]
)
def test_the_environment_variable_chooses_for_a_run(value: str, expected: str) -> None:
    if value == "cuda" and pointfuse.backends()["cuda"].usable:
        pytest.skip("the cuda backend can run here")
    code = (
        "import torch, pointfuse\n"
        "try:\n"
        "    pointfuse.conv_bn_act(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)); print('fine')\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    environment = {**os.environ, "POINTFUSE_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)
    assert expected == "fine" or f"POINTFUSE_BACKEND={value}" in done.stdout


def test_units_run_on_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = aten.conv_bn_act
    monkeypatch.setattr(aten, "conv_bn_act", lambda *a: calls.append(1) or original(*a))
    unit = pointfuse.ConvBNAct2d(2, 2, 1).eval()
    with torch.no_grad():
        unit(torch.zeros(1, 2, 3, 3))
    pointfuse.conv_bn_act(torch.zeros(1, 2, 3, 3), unit.conv.weight)
    torch.ops.pointfuse.conv_bn_act(
        torch.zeros(1, 2, 3, 3), unit.conv.weight.detach(), *[None] * 6, [1, 1], [0, 0], [1, 1], 1, 1e-5, "relu", 0.0,
        "add_act",
    )  # fmt: skip
    assert len(calls) == 3


def test_a_gpu_without_kernels_of_ours_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fallback_reason("cuda") is not None
    assert fallback_reason("cpu") is None
    with pointfuse.use_backend("aten"):
        assert fallback_reason("cuda") is None

    conversion = sys.modules["pointfuse.convert"]  # the package's attribute of that name is the function
    monkeypatch.setattr(conversion, "fallback_reason", lambda device_type: "a reason of the test")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="units on cpu run PyTorch's own operators.*a reason of the test"):
        pointfuse.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pointfuse.freeze(model)


BACKENDS = sys.modules["pointfuse.backends"]


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A usable cuda backend that gives twice the answer, and refuses for the reasons in the list."""
    reasons: list[str] = []

    def conv_bn_act(*unit: Any, **options: Any) -> Tensor:
        if reasons:
            raise Refused(reasons[0])
        return 2 * aten.conv_bn_act(*unit)

    monkeypatch.setattr(cuda, "unusable_reason", lambda: None)
    monkeypatch.setattr(cuda, "conv_bn_act", conv_bn_act)
    monkeypatch.setattr(BACKENDS, "_announced", set())
    return reasons


def one(value: float = 1.0) -> Tensor:
    return pointfuse.conv_bn_act(torch.full((1, 1, 1, 1), value), torch.ones(1, 1, 1, 1), activation="identity")


def test_the_backend_asked_for_serves(doubling: list[str]) -> None:
    assert (chosen(), one().item()) == ("aten", 1)
    with pointfuse.use_backend("cuda"):
        assert (chosen(), one().item()) == ("cuda", 2)
    assert one().item() == 1


def test_what_a_backend_refuses_aten_serves_and_each_reason_is_said_once(doubling: list[str]) -> None:
    with pointfuse.use_backend("cuda"):
        for reason in ("it is Monday", "it rains"):
            doubling[:] = [reason]
            with pytest.warns(FallbackWarning, match=f"operators serve calls that the cuda backend does not: {reason}"):
                assert one().item() == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                one()


def test_strict_makes_a_refusal_an_error(doubling: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    doubling.append("it is Monday")
    with (
        pointfuse.use_backend("cuda", strict=True),
        pytest.raises(RuntimeError, match="the cuda backend does not serve this call: it is Monday"),
    ):
        one()
    with pointfuse.use_backend("aten", strict=True):
        assert one().item() == 1


def test_why_gpus_run_pytorchs_operators(doubling: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unusable_reason", lambda: "no Triton")
    assert select() is aten
    assert fallback_reason("cuda") == (
        "the cuda backend has not been measured on a GPU yet; pointfuse.use_backend('cuda') asks for it"
    )
    monkeypatch.setattr(cuda, "unusable_reason", lambda: "no compiler")
    assert fallback_reason("cuda") == "triton: no Triton; cuda: no compiler"
    monkeypatch.setattr(triton, "unusable_reason", lambda: None)
    assert fallback_reason("cuda") == "the triton backend was not measured on this machine yet: `pointfuse tune` does"
    tables.add(torch.device("cpu"), {ShapeClass.of("1x1", "NCHW", "half", 1, 1, 1): Entry(CONFIG, 2.0, 1.0)})
    assert fallback_reason("cuda") is None


def test_the_environment_makes_a_run_strict() -> None:
    code = (
        "import pointfuse, torch\n"
        "from pointfuse.backends import cuda\n"
        "cuda.unusable_reason = lambda: None\n"
        "try: pointfuse.conv_bn_act(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1))\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {**os.environ, "POINTFUSE_BACKEND": "cuda", "POINTFUSE_STRICT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "the cuda backend does not serve this call: x is not on a GPU\n"


def test_a_backend_asked_for_before_it_can_run_is_refused_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS, "_requested", "cuda")
    monkeypatch.setattr(BACKENDS, "_preferred", {})
    monkeypatch.setattr(cuda, "unusable_reason", lambda: "there is no GPU")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="POINTFUSE_BACKEND=cuda: the cuda backend cannot run here: there is no"):
            one()


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which a user can do something about it."""
    ask = cuda.unusable_reason.__wrapped__
    monkeypatch.setattr(cuda, "library_problem", lambda path: "its kernels are not built")
    assert ask() == "its kernels are not built"
    monkeypatch.setattr(cuda, "library_problem", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ask() == "this PyTorch is built without CUDA: install a build with it"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for said, available, expected in (
        (b"there is no NVIDIA GPU", False, "there is no NVIDIA GPU"),
        (b"", False, "torch.cuda.is_available() is false"),
        (b"no GPU here has compute capability 8.0 or later", True, "no GPU here has compute capability 8.0 or later"),
        (b"", True, None),
    ):
        library = SimpleNamespace(pointfuse_unusable_reason=lambda said=said: said)
        monkeypatch.setattr(cuda, "_library", lambda library=library: library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert ask() == expected


FASTER, SLOWER = Entry(CONFIG, 1.0, 2.0), Entry(CONFIG, 2.0, 1.0)


def block(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Two units, of which the first is of the class of :func:`image`."""
    made = nn.Sequential(
        nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()
    )
    return made.eval().to(dtype).to(memory_format=torch.channels_last)


def image(batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(batch, 16, 4, 4).to(dtype).to(memory_format=torch.channels_last)


CLASS = ShapeClass.parse("1x1 channels_last half 16x16->16")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The triton backend runs on tensors of the CPU; grows by one with every call that it serves."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off, because there is a GPU")
    if reason := triton.triton_problem():
        pytest.skip(reason)
    made: list[int] = []
    execute = triton.execute
    monkeypatch.setattr(triton, "execute", lambda *arguments: made.append(1) or execute(*arguments))
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(triton, "unusable_reason", lambda: None)
    return made


def measured(entry: Entry) -> None:
    """The class of :func:`image` was measured here."""
    tables.add(torch.device("cpu"), {CLASS: entry})


@torch.no_grad()
def test_auto_takes_the_triton_backend_for_what_measured_faster_and_for_nothing_else(served: list[int]) -> None:
    unit, x, weight = pointfuse.ConvBNAct2d.from_modules(*block()[:3]), image(), torch.randn(16, 15, 1, 1).bfloat16()
    expected = unit(x)
    assert (select(), served) == (aten, [])
    measured(SLOWER)
    assert select() is aten
    measured(FASTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "triton"
        torch.testing.assert_close(unit(x), expected)
        assert len(served) == 1
        for other in (image(batch=2), image().contiguous()):
            unit(other)
        pointfuse.conv_bn_act(image(dtype=torch.float32), torch.randn(16, 16, 1, 1))
        pointfuse.conv_bn_act(x, torch.randn(8, 16, 1, 1).bfloat16())
        pointfuse.conv_bn_act(x, torch.randn(16, 16, 3, 3).bfloat16(), padding=1)
        assert len(served) == 1
        pointfuse.conv_bn_act(torch.randn(1, 15, 3, 4).bfloat16().to(memory_format=torch.channels_last), weight)
        assert len(served) == 2
    with pytest.raises(RuntimeError, match="to have 15 channels, but got 16"):
        pointfuse.conv_bn_act(x, weight)
    measured(SLOWER)
    assert select() is aten


@torch.no_grad()
@pytest.mark.parametrize(
    ("shipped", "here", "auto"),
    [
        (FASTER, None, 1),
        (FASTER, SLOWER, 0),
        (SLOWER, FASTER, 1),
        (Entry(CONFIG), None, 0),
        (None, Entry(Config(64, 16, 64, 3, 4, 0), 1.0, 2.0), 0),
        (None, Entry(Config(256, 256, 256, 8, 8), 1.0, 2.0), 0),
    ],
    ids=["shipped", "shipped, but slower here", "faster here", "not measured", "no configuration", "too large"],
)
def test_an_entry_serves_if_it_was_measured_here_or_else_shipped_and_can_run(
    shipped: Entry | None, here: Entry | None, auto: int, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "shipped", lambda family: {CLASS: shipped} if shipped and family == "sm_90" else {})
    if here:
        measured(here)
    pointfuse.conv_bn_act(image(), torch.randn(16, 16, 1, 1).bfloat16())
    assert len(served) == auto


@torch.no_grad()
def test_models_run_their_faster_units_on_the_triton_backend(served: list[int]) -> None:
    measured(FASTER)
    model, x = block(), image()
    expected = model(x)
    found = pointfuse.plan(model, x)
    assert [unit.backend for unit in found.units] == ["triton", "aten"]
    ways: list[Callable[[], nn.Module]] = [
        lambda: pointfuse.convert(model), lambda: pointfuse.freeze(model, pack=False)
    ]  # fmt: skip
    for i, way in enumerate(ways, 1):
        torch.testing.assert_close(way()(x), expected, rtol=2e-2, atol=2e-2)
        assert len(served) == i


@torch.no_grad()
def test_auto_leaves_what_is_compiled_to_the_compiler(served: list[int]) -> None:
    """Also once something was measured, for which no graph is compiled again."""
    torch._dynamo.reset()
    frozen = pointfuse.freeze(block(), pack=False)
    weight = torch.randn(16, 16, 1, 1).bfloat16()
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: frozen(pointfuse.conv_bn_act(x, weight)), backend=compiler, fullgraph=True)
    x = image()
    expected = frozen(pointfuse.conv_bn_act(x, weight))
    torch.testing.assert_close(compiled(x), expected)
    measured(FASTER)
    assert chosen() == "triton"
    torch.testing.assert_close(compiled(x), expected)
    assert (compiler.frame_count, served) == (1, [])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(frozen, backend=compiler, fullgraph=True)(x), frozen(x))
    assert len(served) == 1
    assert "_conv_bn_act_triton" not in str([graph.graph for graph in compiler.graphs])


def test_where_nothing_was_measured_faster_triton_is_not_even_imported() -> None:
    """Nor where something was, for tensors of the CPU."""
    code = (
        "import sys, torch, pointfuse\n"
        "from pointfuse.backends.triton import tables\n"
        "from pointfuse.backends.triton.configs import Config, Entry, ShapeClass\n"
        "unit = pointfuse.ConvBNAct2d(16, 16, 1).eval()\n"
        "with torch.no_grad():\n"
        "    for aten_us in (0.5, 2.0):\n"
        "        shape = ShapeClass.parse('1x1 channels_last tf32 16x16->16')\n"
        "        tables.add(torch.device('cpu'), {shape: Entry(Config(64, 16, 64, 3, 4), 1.0, aten_us)})\n"
        "        unit(torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last))\n"
        "        print(type(pointfuse.backends.__globals__['select']()).__name__, 'triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["module False", "Preferred False"]


@torch.no_grad()
def test_a_tuned_machine_whose_backend_cannot_run_is_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(FASTER)
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(triton, "unusable_reason", lambda: "Triton is not installed")
    monkeypatch.setattr(triton, "loaded", lambda: pytest.fail("it is not there"))
    weight, x = torch.randn(16, 16, 1, 1).bfloat16(), image()
    with pointfuse.use_backend("aten"):
        expected = pointfuse.conv_bn_act(x, weight)
    assert torch.equal(pointfuse.conv_bn_act(x, weight), expected)
    assert chosen() == "aten"
    assert [unit.backend for unit in pointfuse.plan(block()).units] == ["aten", "aten"]


@torch.no_grad()
def test_a_gpu_that_is_too_old_is_left_to_aten(served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise Refused("its GPU has compute capability 7.5, the kernels need 8.0")

    monkeypatch.setattr(triton.loaded(), "chip_of", refuse)
    measured(FASTER)
    pointfuse.conv_bn_act(image(), torch.randn(16, 16, 1, 1).bfloat16())
    assert served == []
    assert [unit.backend for unit in pointfuse.plan(block()).units] == ["aten", "aten"]
