"""What pointfuse stands on fails: memory, its compiled parts, its files. Each ends in an error or a recovery, never in
a wrong answer, a half-changed model or a lost file.

tests/test_build.py has broken libraries one by one, tests/test_tune.py tables that are not right and disks that are
full.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pointfuse
import pytest
import torch
from conftest import ROOT
from host_ops import host_ops
from pointfuse.backends import BACKENDS, calls, cuda
from pointfuse.backends.triton import tables
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class OutOfMemory(TorchDispatchMode):
    """The operator of that number of those that make a tensor finds no memory; the ones before it do."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.failing, self.count = failing, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func._schema.is_mutable or func.is_view):
            self.count += 1
            if self.count == self.failing:
                raise torch.OutOfMemoryError("planted: out of memory")
        return func(*args, **kwargs or {})


class Block(nn.Module):
    """A unit in a sequence, and one with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.relu(self.bn(self.conv(y)) + y)


def block() -> Block:
    model = Block().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model


def states(model: nn.Module) -> dict[str, Any]:
    """All that a failure must not change: tensors by identity and value, modes, classes and hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in tensors.items()},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "modules": {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], model: nn.Module) -> None:
    after = states(model)
    assert after["modules"] == before["modules"]
    assert after["requires_grad"] == before["requires_grad"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, name
        assert torch.equal(after["tensors"][name][1], value), name


def places(count: int) -> list[int]:
    """The first operators, the last, and some between."""
    return sorted({1, 2, 3, count, *range(1, count + 1, max(1, count // 10))})


def operators_of(call: Callable[[], Any]) -> int:
    with OutOfMemory(0) as counting:
        call()
    return counting.count


def each_failure(call: Callable[[], Any]) -> int:
    """Fail at one operator after another, a dozen over the whole call; how many operators it has."""
    count = operators_of(call)
    for failing in places(count):
        with pytest.raises(torch.OutOfMemoryError, match="planted"), OutOfMemory(failing):
            call()
    return count


@pytest.mark.parametrize("form", ["converted", "frozen", "frozen and packed"])
def test_memory_that_runs_out_in_a_forward_spoils_nothing(form: str) -> None:
    model, x = block(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = model(x)
        ready = pointfuse.convert(model) if form == "converted" else pointfuse.freeze(model, pack="packed" in form)
        first = copy.deepcopy(ready)
        before = states(first)
        assert each_failure(lambda: copy.deepcopy(first)(x)) >= 2
        assert_same(before, first)
        # A model that failed at every place one after the other, its first calls, packs and answers then.
        for failing in range(1, 12):
            try:
                with OutOfMemory(failing):
                    ready(x)
            except torch.OutOfMemoryError:
                pass
            torch.testing.assert_close(ready(x), expected)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_memory_that_runs_out_in_a_training_step_leaves_a_model_that_trains(recompute: bool) -> None:
    """A forward that failed may have counted a batch, as PyTorch's own; the parameters and answers are as they were."""
    model, x = block(), torch.randn(2, 4, 6, 6)
    converted = pointfuse.convert(copy.deepcopy(model), recompute=recompute).train()
    twin = model.train()

    def step(trained: nn.Module) -> list[Tensor]:
        trained.zero_grad()
        trained(x).square().mean().backward()
        return [p.grad.clone() for p in trained.parameters()]

    with torch.no_grad():
        parameters = [p.clone() for p in converted.parameters()]
    assert each_failure(lambda: step(converted)) > 20
    assert all(torch.equal(p, q) for p, q in zip(converted.parameters(), parameters, strict=True))
    assert all(b.isfinite().all() for b in converted.buffers())
    for found, expected in zip(step(converted), step(twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "convert": lambda model, x: pointfuse.convert(model, x, verify=True),
    "convert in place": lambda model, x: pointfuse.convert(model, x, inplace=True),
    "freeze": lambda model, x: pointfuse.freeze(model, x),
    "freeze without an example": lambda model, x: pointfuse.freeze(model),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_memory_that_runs_out_in_convert_or_freeze_leaves_the_model(function: Callable[..., nn.Module]) -> None:
    model, x = block(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = model(x)
        before = states(model)
        count = operators_of(lambda: function(copy.deepcopy(model), x))
        assert count > 0
        for failing in places(count):
            subject = model if function is not FUNCTIONS["convert in place"] else copy.deepcopy(model)
            try:
                with OutOfMemory(failing):
                    function(subject, x)
            except torch.OutOfMemoryError:
                assert_same(before, model)
            torch.testing.assert_close(subject(x), expected)
        torch.testing.assert_close(function(model, x)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_whose_output_finds_no_memory_raise_torchs_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not taken for refusals, which PyTorch's operators would answer."""
    if backend == "cuda":
        host_ops().pointfuse_emulate(b"h100")
    elif reason := BACKENDS["triton"].triton_problem():
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.device.type == device)
    monkeypatch.setattr(BACKENDS[backend], "unusable_reason", lambda: None)
    x, weight = torch.randn(1, 8, 3, 3, device=device), torch.randn(4, 8, 1, 1, device=device)

    class NoMemory(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "pointfuse":
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs or {})
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided):
                raise torch.OutOfMemoryError("planted")
            return func(*args, **kwargs or {})

    with torch.no_grad(), pointfuse.use_backend(backend):
        expected = pointfuse.conv_bn_act(x, weight)
        with pytest.raises(torch.OutOfMemoryError), NoMemory():
            pointfuse.conv_bn_act(x, weight)
        assert torch.equal(pointfuse.conv_bn_act(x, weight), expected)


# The compiled parts.


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package and none of its compiled parts."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(ROOT / "python" / "pointfuse", folder / "pointfuse", ignore=ignored)
    return folder


def in_python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that imports the copy."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("POINTFUSE_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**own, "PYTHONPATH": str(folder), "POINTFUSE_CACHE_DIR": str(folder / "tables"), **environment},
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip


LIBRARIES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "its kernels are not built"),
    "text": (b"<html>404</html>" * 100, "_cuda.so is damaged"),
    "cut short": (Path(torch._C.__file__).read_bytes()[:5000], "_cuda.so is damaged"),
    "of another program": (Path(torch._C.__file__).read_bytes(), "_cuda.so cannot be loaded"),
}
SYMBOLS = {
    "with a symbol that this torch lacks": (
        'extern "C" int torch_of_another_version(); extern "C" int pointfuse_interface() {{ '
        "return {interface} + torch_of_another_version(); }}",
        "_cuda.so cannot be loaded .*torch_of_another_version",
    ),
    "without the interface": ('extern "C" int something_else() {{ return 1; }}', "_cuda.so cannot be loaded"),
    "of another interface": (
        'extern "C" int pointfuse_interface() {{ return {interface} + 1; }}', "_cuda.so is of another version"),
}  # fmt: skip
GOES_ON = """
    import sys
    import pointfuse, torch
    status = pointfuse.backends()
    print("REASON", status["cuda"].reason)
    try:
        with pointfuse.use_backend("cuda"):
            pass
    except RuntimeError as error:
        print("ERROR", error)
    y = pointfuse.conv_bn_act(torch.ones(1, 4, 2, 2), torch.ones(3, 4, 1, 1), activation="relu")
    assert torch.equal(y, torch.full((1, 3, 2, 2), 4.0))
    from pointfuse.cli import main
    sys.exit(main(["doctor"]))
"""


def assert_it_goes_on(package: Path, reason: str) -> None:
    done = in_python(package, GOES_ON)
    assert done.returncode == 0, done.stderr
    assert re.search(f"REASON .*{reason}", done.stdout), done.stdout
    assert re.search(rf"ERROR use_backend\('cuda'\): the cuda backend cannot run here: .*{reason}.*'auto'", done.stdout)
    assert re.search(f"backend cuda .*not usable: .*{reason}", done.stdout)
    assert re.search("backend aten .*sanity check passed", done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files on Linux only")
@pytest.mark.parametrize(("content", "reason"), LIBRARIES.values(), ids=LIBRARIES)
def test_without_a_whole_library_the_cpu_goes_on(content: bytes | None, reason: str, package: Path) -> None:
    library = package / "pointfuse" / "_cuda.so"
    library.unlink(missing_ok=True)
    if content is not None:
        library.write_bytes(content)
    assert_it_goes_on(package, reason)


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files on Linux only")
@pytest.mark.parametrize(("source", "reason"), SYMBOLS.values(), ids=SYMBOLS)
def test_a_library_of_other_symbols_is_a_reason(source: str, reason: str, package: Path, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "other.cpp").write_text(source.format(interface=cuda.INTERFACE))
    library = package / "pointfuse" / "_cuda.so"
    library.unlink(missing_ok=True)
    command = [compiler, "-shared", "-fPIC", "-Wl,-z,now", str(tmp_path / "other.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    assert_it_goes_on(package, reason)


@pytest.mark.parametrize("content", [None, b"no module"], ids=["missing", "broken"])
def test_without_the_planner_only_plans_fail(content: bytes | None, package: Path) -> None:
    module = package / "pointfuse" / f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.unlink(missing_ok=True)
    if content is not None:
        module.write_bytes(content)
    code = """
        import sys
        from pointfuse.cli import main
        assert main(["doctor"]) == 0
        sys.exit(main(["doctor", "--plans", "torch.nn:Identity"]))
    """
    done = in_python(package, code)
    module.unlink(missing_ok=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "planner" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


# Files of what was measured.


def test_a_process_killed_while_it_writes_leaves_a_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment: the entries from before are there, and the next process writes on."""
    monkeypatch.setenv("POINTFUSE_CACHE_DIR", str(tmp_path))
    code = """
        import torch
        from pointfuse.backends.triton import tables
        from pointfuse.backends.triton.configs import Config, Entry, ShapeClass
        from test_tune import CLASS, FAST, OTHER
        tables.add(torch.device("cpu"), {CLASS: FAST})
        print("ready", flush=True)
        for _ in range(10000):
            tables.add(torch.device("cpu"), {OTHER: FAST})
    """
    path = tables.path_of(CPU)
    for moment in (0.0, 0.01):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests",
            env={**os.environ, "POINTFUSE_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tables.forget()
        assert len(tables.measured(CPU)) >= 1
        assert json.loads(path.read_text())["format"] == tables.FORMAT
    from test_tune import CLASS, FAST

    tables.add(CPU, {CLASS: FAST})
    assert tables.measured(CPU)[CLASS] == FAST
    tables.forget()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".new")) == ["cpu.json", "cpu.json.lock"]


def test_a_huge_file_in_the_place_of_a_table_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTFUSE_CACHE_DIR", str(tmp_path))
    tables.path_of(CPU).write_bytes(b"[" * (8 << 20))
    tables.forget()
    with pytest.warns(UserWarning, match="cannot be used .*`pointfuse tune` makes it anew"):
        assert tables.measured(CPU) == {}
    tables.forget()
