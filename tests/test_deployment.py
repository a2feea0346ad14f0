"""Models leave Python: each row of docs/deployment.md, by torch.export, AOTInductor, TorchScript and ONNX."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pointfuse
import pytest
import torch
from models_for_tests import Bottleneck, DarknetBlock, images, trained, unit
from models_for_tests import one_thread as one_thread
from torch import Tensor, nn
from yardstick import error

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = torch.export.Dim("batch", min=1, max=64)
# The first is what is traced; the others are what a deployed model is given later.
INPUTS = (images(), images(5, 4, 8, 8), images(1, 4, 8, 8))

FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted": pointfuse.convert,
    "frozen": lambda model: pointfuse.freeze(model, pack=False),
    "frozen in NCHW": lambda model: pointfuse.freeze(model, memory_format=torch.contiguous_format),
    "reverted": lambda model: pointfuse.revert(pointfuse.convert(model)),
}


def network() -> nn.Sequential:
    return trained(nn.Sequential(Bottleneck(), DarknetBlock(), *unit(act=nn.SiLU()))).eval()


def own_units() -> nn.Module:
    return nn.Sequential(pointfuse.ConvBNAct2d(4, 8, 3, padding=1), pointfuse.ConvBNAct2d(8, 4, 1)).eval()


def packed() -> nn.Module:
    """As it is once it was called."""
    return pointfuse.freeze(network(), images())


def assert_answers(deployed: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    """Assert the accuracy rule for every batch, with PyTorch's shapes and dtypes."""
    wide = trained(network()).double().eval()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        for x in INPUTS:
            actual, eager, exact = deployed(x), model(x), wide(x.double())
            assert (actual.shape, actual.dtype) == (eager.shape, eager.dtype)
            assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, INPUTS[:1], dynamic_shapes=({0: BATCH},), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_program_is_exported_saved_and_loaded(form: Any, strict: bool, tmp_path: Path) -> None:
    model = network()
    program = exported(form(model), strict)
    torch.export.save(program, tmp_path / "model.pt2")
    assert_answers(torch.export.load(tmp_path / "model.pt2").module(), model)
    assert not [n for n in program.graph.nodes if "pointfuse" in str(n.target)]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_own_units_are_exported(strict: bool) -> None:
    model = own_units()
    program = exported(model, strict).module()
    with torch.no_grad():
        for x in INPUTS:
            torch.testing.assert_close(program(x), model(x))


def test_an_exported_program_trains() -> None:
    """It updates running statistics, as the model that was exported does."""
    model = network().double().train()
    program = torch.export.export(pointfuse.convert(copy.deepcopy(model)), (images().double(),)).module()
    for x in (images().double(), images(seed=2).double()):
        torch.testing.assert_close(program(x), model(x))
    for actual, expected in zip(program.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("form", ["converted", "frozen"])
def test_aotinductor_makes_a_package_for_python(form: str, tmp_path: Path) -> None:
    model = network()
    path = torch._inductor.aoti_compile_and_package(
        exported(FORMS[form](model)), package_path=str(tmp_path / "model.pt2")
    )
    assert_answers(torch._inductor.aoti_load_package(path), model)
    if form == "frozen":
        assert_answers(lambda x: in_cpp(x, path, tmp_path), model)


PROGRAM = """
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

// model.pt2, and then the batch; images and answers come and go as fp32 on the standard streams.
int main(int argc, char** argv) {
  at::Tensor x = at::empty({std::atoi(argv[2]), 4, 8, 8});
  if (std::fread(x.data_ptr(), 4, x.numel(), stdin) != static_cast<size_t>(x.numel())) return 1;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  at::Tensor y = loader.run({x}).at(0).contiguous();
  std::fwrite(y.data_ptr(), 4, y.numel(), stdout);
}
"""


def in_cpp(x: Tensor, package: str, folder: Path) -> Tensor:
    """What a C++ program makes of images by a package."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler is not None, "AOTInductor made a package, so that there is a C++ compiler"
    program, torch_folder = folder / "program", Path(torch.__file__).parent
    if not program.exists():
        (folder / "program.cpp").write_text(PROGRAM, encoding="utf-8")
        include, lib = torch_folder / "include", torch_folder / "lib"
        libraries = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
        command = [compiler, "-std=c++20", "-O0", f"-I{include}", folder / "program.cpp", *libraries, "-o", program]
        subprocess.run(command, check=True)
    given = x.contiguous().numpy().tobytes()
    done = subprocess.run([program, package, str(len(x))], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).reshape(x.shape)


def saved_and_loaded(script: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("frozen", [False, True], ids=["torch.jit.trace", "torch.jit.freeze"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_traced_script_is_saved_and_loaded(form: Any, frozen: bool) -> None:
    model = network()
    with torch.no_grad():
        script = torch.jit.trace(form(model), INPUTS[0])
        script = torch.jit.freeze(script.eval()) if frozen else script
    assert_answers(saved_and_loaded(script), model)
    assert "pointfuse::" not in str(script.inlined_graph)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", [*FORMS.values(), lambda model: own_units()], ids=[*FORMS, "ConvBNAct2d"])
def test_nothing_but_operators_is_traced(form: Any) -> None:
    """No decision of ours depends on the example's shape."""
    with torch.no_grad():
        torch.jit.trace(form(network()), INPUTS[0])


def test_programs_and_scripts_run_where_there_is_no_pointfuse(tmp_path: Path) -> None:
    frozen = pointfuse.freeze(network(), pack=False)
    torch.export.save(exported(frozen), tmp_path / "program.pt2")
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(frozen, INPUTS[0]), tmp_path / "script.pt")
        torch.save((INPUTS[1], frozen(INPUTS[1])), tmp_path / "call.pt")
    code = """
        import sys, torch
        sys.modules["pointfuse"] = None
        x, expected = torch.load("call.pt")
        with torch.no_grad():
            torch.testing.assert_close(torch.export.load("program.pt2").module()(x), expected)
            torch.testing.assert_close(torch.jit.load("script.pt")(x), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)


@pytest.mark.parametrize(("form", "channels_last"), [("frozen", True), ("frozen in NCHW", False)])
def test_a_program_keeps_the_memory_format_that_was_frozen(form: str, channels_last: bool) -> None:
    with torch.no_grad():
        y = exported(FORMS[form](network())).module()(INPUTS[0])
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_reverted_model_is_scripted() -> None:
    model = network()
    assert_answers(saved_and_loaded(torch.jit.script(pointfuse.revert(pointfuse.convert(model)))), model)


NOT_SCRIPTED = {
    "converted": lambda: pointfuse.convert(network()),
    "frozen": lambda: pointfuse.freeze(network(), pack=False),
    "a slice of a frozen one": lambda: pointfuse.freeze(nn.Sequential(*unit()).eval(), pack=False)[:1],
    "a block inside another module": lambda: nn.Sequential(
        nn.Identity(), nn.ModuleList([pointfuse.convert(network())])
    ),
    "ConvBNAct2d": own_units,
}


@pytest.mark.parametrize("make", NOT_SCRIPTED.values(), ids=NOT_SCRIPTED)
def test_scripting_names_the_way_out(make: Callable[[], nn.Module]) -> None:
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script takes no .*torch\.jit\.trace"):
        torch.jit.script(model)
    assert [type(m) for m in model.modules()] == classes


def export_onnx(model: nn.Module, path: Path, dynamo: bool) -> None:
    """By torch's exporter, or by the one before it, which traces."""
    pytest.importorskip("onnx")
    with torch.no_grad():
        if dynamo:
            pytest.importorskip("onnxscript")
            torch.onnx.export(model, INPUTS[:1], path, dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
        else:
            axes = {"x": {0: "batch"}, "y": {0: "batch"}}
            names: Any = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
            torch.onnx.export(model, INPUTS[:1], path, dynamo=False, **names)


EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy exporter"])


@EXPORTERS
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_onnx_runtime_gives_pytorchs_answers(form: Any, dynamo: bool, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = network(), tmp_path / "model.onnx"
    export_onnx(form(model), path, dynamo)
    onnx.checker.check_model(path, full_check=True)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert sum(node.op_type == "Conv" for node in nodes) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert_answers(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model)


PACKED_WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "torch.compile": lambda model, path: torch.compile(model, backend="aot_eager")(images()),
    "torch.compile, fullgraph": lambda model, path: torch.compile(model, backend="eager", fullgraph=True)(images()),
    "torch.export": lambda model, path: exported(model),
    "torch.export, strict": lambda model, path: exported(model, strict=True),
    "torch.jit.trace": lambda model, path: torch.jit.trace(model, images()),
    "ONNX": lambda model, path: export_onnx(model, path / "model.onnx", dynamo=True),
    "ONNX, legacy exporter": lambda model, path: export_onnx(model, path / "model.onnx", dynamo=False),
}


@pytest.mark.parametrize("way", PACKED_WAYS.values(), ids=PACKED_WAYS)
def test_packed_weights_stay_in_python_and_name_the_way_out(way: Any, tmp_path: Path) -> None:
    torch._dynamo.reset()
    message = r"this frozen model is packed for oneDNN; to compile, export or trace it: freeze\(\.\.\., pack=False\)"
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        way(packed(), tmp_path)
