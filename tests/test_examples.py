"""The examples of inference and deployment, as a user starts them: what they print, write and refuse."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import deployment
import inference

TINY = """
    import os, pathlib
    from torch import nn

    def tiny():
        convs = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1)
        return nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.SiLU(), convs[1])

    class Telling(nn.Identity):
        def forward(self, x):
            pathlib.Path("running").touch()
            return x

    def telling():
        return nn.Sequential(Telling(), *tiny())

    def text():
        return "no model"
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(textwrap.dedent(TINY))


def started(folder: Path, script: str, arguments: str, **environment: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(folder), str(ROOT / "python")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments.split(), "--device", "cpu"]
    return dict(args=command, cwd=folder, env=settings, text=True)


def run(folder: Path, script: str, arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**started(folder, script, arguments, **environment), capture_output=True, timeout=120)


@pytest.mark.parametrize(("dtype", "largest"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_inference_compares_the_forms(dtype: str, largest: float, tmp_path: Path) -> None:
    options = "--model models:tiny --size 16 --batch 3 --threads 1 --calls 2"
    done = run(tmp_path, "inference.py", f"{options} --dtype {dtype}")
    assert done.returncode == 0, done.stderr
    title, plan, *rows = done.stdout.splitlines()
    assert title == f"models:tiny on cpu, {dtype}, input 3x3x16x16"
    assert plan == "1 units fused, 1 convolutions left alone"
    assert [row.split()[0] for row in rows] == ["eager", "converted", "frozen"]
    figures = [re.search(r"([\d.]+) ms +([\d.]+)x  largest difference (\S+)$", row) for row in rows]
    assert all(float(figure[1]) > 0 and float(figure[3]) <= largest for figure in figures)
    assert (figures[0][2], figures[0][3]) == ("1.00", "0.0e+00")


def test_inference_reads_an_image(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("L", (20, 30), 128).save(tmp_path / "grey.png")
    done = run(tmp_path, "inference.py", "--model models:tiny --size 16 --calls 1 --image grey.png")
    assert done.returncode == 0, done.stderr
    assert "input 1x3x16x16" in done.stdout


def test_yolov3_runs_through_the_inference_example(tmp_path: Path) -> None:
    done = run(tmp_path, "inference.py", "--size 64 --calls 1")
    assert done.returncode == 0, done.stderr
    assert "yolov3 on cpu, fp32, input 1x3x64x64\n72 units fused, 3 convolutions left alone\n" in done.stdout


def test_deployment_writes_what_fresh_processes_load(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    options = "--model models:tiny --size 16 --batch 1 --target export,onnx --output deployed"
    done = run(tmp_path, "deployment.py", options)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+): saved \S+; largest difference (\S+)$", done.stdout, re.MULTILINE))
    assert found.keys() == {"export", "onnx"}
    assert all(float(worst) < 1e-5 for worst in found.values())
    assert {path.name for path in (tmp_path / "deployed").iterdir()} >= {"program.pt2", "model.onnx", "call.pt"}
    x, expected = torch.load(tmp_path / "deployed" / "call.pt")
    program = torch.export.load(tmp_path / "deployed" / "program.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), expected)
        assert program(x.repeat(5, 1, 1, 1)).shape == (5, 4, 16, 16)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples run in this process, where the models are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "models", raising=False)


def refusal(main: Any, arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that an example says before it ends with exit code 2."""
    try:
        code = main([*arguments.split(), "--device", "cpu"])
    except SystemExit as raised:
        code = raised.code
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


CANNOT = {
    "aoti": "AOTInductor needs a C++ compiler: install g++, or set CXX",
    "onnx": "pip install onnx onnxscript onnxruntime",
    "graphs": "CUDA graphs need a GPU, and the model is on the CPU",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("target", CANNOT)
def test_a_target_that_cannot_run_here_is_said(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal(deployment.main, f"--model models:tiny --size 16 --target {target}", capsys)
    assert said == f"deployment.py: --target {target} cannot run here: {CANNOT[target]}"


@pytest.mark.usefixtures("here")
def test_by_default_targets_that_cannot_run_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(deployment.TARGETS, "export", lambda model, x, folder: (model(x), "stood in for"))
    assert deployment.main(["--model", "models:tiny", "--size", "16", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    expected = [f"{name}: cannot run here: {reason}" for name, reason in CANNOT.items()]
    assert said == ["export: stood in for; largest difference 0.0e+00", *expected]


@pytest.mark.usefixtures("here")
def test_a_wrong_answer_ends_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deployment.TARGETS, "export", lambda model, x, folder: (model(x) * 1.01, "stood in for"))
    arguments = ["--model", "models:tiny", "--size", "16", "--device", "cpu", "--target", "export"]
    assert deployment.main(arguments) == 1
    assert capsys.readouterr().out == "export: stood in for; largest difference 1.0e-02: WRONG\n"


WRONG = {
    "unknown module": (inference, "--model nowhere:model", "--model nowhere:model: No module named 'nowhere'"),
    "unknown name": (deployment, "--model models:resnet", "--model models:resnet: module 'models' has no attribute"),
    "no model": (deployment, "--model models:text", "models:text returned str, not an nn.Module"),
    "no callable": (inference, "--model resnet50", "--model: must be yolov3 or pkg.module:callable, got 'resnet50'"),
    "no image": (inference, "--model models:tiny --image no.png", "No such file or directory: "),
    "odd size": (inference, "--size 40", "--size must be a multiple of 32 for yolov3, got 40"),
    "no batch": (inference, "--batch 0", "--batch: must be a whole number of at least 1, got '0'"),
    "unknown target": (deployment, "--target tvm", "'tvm' is no target; the targets are export, aoti, onnx, graphs"),
    "no folder": (deployment, "--model models:tiny --output models.py/out", "Not a directory: 'models.py/out'"),
}  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("example", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(example: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(example.main, arguments, capsys)


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    options = "--model models:telling --size 16 --calls 100000000"
    with subprocess.Popen(**started(tmp_path, "inference.py", options), stderr=subprocess.PIPE) as process:
        try:
            while not (tmp_path / "running").exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
