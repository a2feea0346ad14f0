"""``pointfuse doctor | plan | verify | bench``: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from planner_module import load_planner
from pointfuse import cli, doctor, functional, modules
from pointfuse.backends import aten
from torch import nn


class Tiny(nn.Module):
    """Two units, one residual, and a convolution that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1))
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.bn(self.conv(x)) + x))


tiny = Tiny()
not_a_model = dict
NAME = f"{__name__}:Tiny"


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_doctor_reports_and_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch                  {torch.__version__}" in out
    assert "backend aten           usable; sanity check passed" in out
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {b["name"] for b in report["backends"]} == {"cuda", "triton", "aten"}


def test_doctor_says_how_long_a_first_compile_takes(tmp_path: Path) -> None:
    """Of a kernel that is in no cache; the user's is left as it was."""
    if util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pointfuse", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)["first_compile"]
    assert found["seconds"] > 0.05
    assert (found["cache"], found["reason"]) == (str(tmp_path), "")
    if not torch.cuda.is_available():
        assert found["architecture"] == "sm_90"
        assert not list(tmp_path.iterdir())


def first_compile(capsys: pytest.CaptureFixture[str]) -> str:
    """What a healthy doctor prints of it."""
    assert cli.main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("triton first compile   "))
    return line.removeprefix("triton first compile   ")


def test_doctor_prints_the_first_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.compilation, "refusal", lambda: None)
    monkeypatch.setattr(doctor.compilation, "first_compile_seconds", lambda capability: 0.94)
    monkeypatch.setattr(doctor.compilation, "cache_folder", lambda: "caches/triton")
    kept = "Triton keeps what it compiled in caches/triton"
    assert re.fullmatch(rf"0\.9 s for a bf16 1x1 unit on sm_\d+; {kept}", first_compile(capsys))


def test_doctor_says_why_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and doctor.compilation.backend.triton_problem() is None:
        assert first_compile(capsys) == "TRITON_INTERPRET=1: kernels run in Triton's interpreter, and none is compiled"
    monkeypatch.setattr(doctor.compilation.backend, "triton_problem", lambda: "Triton is not installed")
    assert first_compile(capsys) == "Triton is not installed"


def test_doctor_survives_a_compiler_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(capability: tuple[int, int]) -> float:
        raise OSError("no ptxas")

    monkeypatch.setattr(doctor.compilation, "refusal", lambda: None)
    monkeypatch.setattr(doctor.compilation, "first_compile_seconds", fail)
    assert re.fullmatch(r"failed for sm_\d+: OSError: no ptxas", first_compile(capsys))


def test_doctor_finds_a_backend_that_computes_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = aten.conv_bn_act
    monkeypatch.setattr(aten, "conv_bn_act", lambda *a: original(*a) * 1.001)
    assert cli.main(["doctor"]) == 1
    assert "SANITY CHECK FAILED" in capsys.readouterr().out


def test_plan_prints_units_and_what_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", NAME, "--input", "2x3x16x16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["unit", "convolution", "normalisation", "activation", "residual", "input", "backend"]
    assert lines[1].split() == ["stem.0", "3x3", "3->8", "stem.1", "leaky_relu", "(stem.2)", "-", "2x3x16x16", "aten"]
    assert lines[2].split() == ["conv", "1x1", "8->8", "bn", "relu", "add_act", "2x8x16x16", "aten"]
    assert lines[-1] == "2 units, 1 convolutions skipped"
    assert any(line.startswith("head ") and "nothing follows" in line for line in lines)


def test_plan_gives_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"{__name__}:tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [u["conv"] for u in found["units"]] == ["stem.0", "conv"]
    assert found["units"][1]["residual"] == "add_act"
    assert [s["name"] for s in found["skipped"]] == ["head"]


def test_plan_yolov3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "yolov3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "72 units, 3 convolutions skipped"


def test_verify_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", NAME, "--input", "2x3x48x48"]) == 0
    assert capsys.readouterr().out.endswith("passed\n")
    assert cli.main(["verify", NAME, "--input", "2x3x48x48", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["units"] == 2
    assert [w["mode"] for w in report["worst"]] == ["eval", "train"]


def test_verify_fails_on_a_wrong_unit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = aten.finish
    monkeypatch.setattr(aten, "finish", lambda *a, **k: original(*a, **k) + 0.5)
    assert cli.main(["verify", NAME, "--input", "2x3x48x48"]) == 1
    assert "FAILED: output 0 of" in capsys.readouterr().out
    assert cli.main(["verify", NAME, "--input", "2x3x48x48", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "nothing"], "MODEL is 'nothing'; it must be pkg.module:callable"),
        (["plan", "no.such.module:thing"], "no.such.module:thing cannot be made: ModuleNotFoundError"),
        (["plan", f"{__name__}:absent"], "cannot be made: AttributeError"),
        (["verify", f"{__name__}:not_a_model"], "gave a dict; it must give an nn.Module"),
    ],
)
def test_a_model_that_cannot_be_made_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", NAME, "--input", "1xa"], "'1xa' is no shape; write sizes joined by x"),
        (["plan", NAME, "--input", "0x3x4x4"], "'0x3x4x4' is no shape"),
        (["plan", NAME, "--loud"], "unrecognized arguments: --loud"),
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "examine", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "pointfuse: interrupted\n"


def test_bench_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Any] = []

    def run(command: list[str], check: bool) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "--suite", "stack", "--help"]) == 3
    assert commands[0][1:] == [str(ROOT / "benchmarks" / "run.py"), "--suite", "stack", "--help"]


def test_outside_a_checkout_bench_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "a" / "b" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "this needs a source checkout" in capsys.readouterr().err


def test_python_m_pointfuse() -> None:
    done = subprocess.run([sys.executable, "-m", "pointfuse", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "pointfuse 0.1.0\n"


def test_the_sanity_check_covers_the_function_users_call() -> None:
    assert doctor.conv_bn_act is functional.conv_bn_act
    assert modules.select() is aten


def test_doctor_lists_the_kernels_plans(capsys: pytest.CaptureFixture[str]) -> None:
    load_planner()
    command = ["doctor", "--plans", NAME, "--device", "a100", "--dtype", "fp16", "--input", "2x3x24x24", "--batch", "3"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in lines[:4]] == [
        ["layer", "times", "convolution", "input", "then"],
        ["stem.0", "1", "3x3", "3->8", "3x3x24x24"],
        ["conv", "1", "1x1", "8->8", "3x8x24x24"],
        ["head", "1", "1x1", "8->4", "3x8x24x24"],
    ]
    assert "batch norm, leaky_relu" in lines[1]
    assert "batch norm, relu, add_act" in lines[2]
    assert "bias, identity" in lines[3]
    assert all(" sm_80 " in line for line in lines[1:4])
    assert lines[-1].startswith("3 convolutions on a100, fp16, channels_last, nothing cached: predicted ")
    assert cli.main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == ["stem.0", "conv", "head"]
    assert data["floor_us"] == sum(row["floor_us"] for row in data["rows"])


def test_doctor_lists_the_plans_of_yolov3(capsys: pytest.CaptureFixture[str]) -> None:
    load_planner()
    assert cli.main(["doctor", "--plans", "yolov3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("75 convolutions on h100, bf16, channels_last, nothing cached: predicted ")
    (stem,) = (line for line in lines if line.startswith("backbone.conv1 "))
    assert "1x3x416x416" in stem
    (widest,) = (line.split() for line in lines if line.startswith("last_layer0.1.conv "))
    assert widest[1:5] == ["3", "3x3", "512->1024", "1x512x13x13"]


class Reads(nn.Module):
    """Its forward depends on its input's values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


class Grouped(nn.Module):
    """A unit of ours, and a convolution that the kernels do not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = modules.ConvBNAct2d(3, 8, kernel_size=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.unit(x))


def test_doctor_lists_units_of_ours_and_says_what_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    load_planner()
    assert cli.main(["doctor", "--plans", f"{__name__}:Grouped"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["unit.conv", "1", "1x1", "3->8", "1x3x224x224"]
    assert "depthwise: no plan: groups=8: the kernels take 1" in lines
    assert lines[-1].startswith("1 convolutions on h100, bf16,")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plans", NAME, "--device", "h1000"], "there is no device 'h1000'; the names are a100-40gb, "),
        (["--plans", "nothing"], "MODEL is 'nothing'; it must be pkg.module:callable"),
        (["--plans", f"{__name__}:Reads"], "Reads cannot run on an input that has a shape alone, 1x3x224x224: "),
        (["--device", "h100"], "--device goes with --plans MODEL"),
        (["--batch", "2"], "--batch goes with --plans MODEL"),
    ],
)
def test_plans_that_cannot_be_listed_say_why(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_planner()
    assert cli.main(["doctor", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_package_without_its_planner_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pointfuse._plan", None)
    assert cli.main(["doctor", "--plans", NAME]) == 2
    assert "install it where a C++ compiler is found, with `pip install .`" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_batch_is_a_count(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--plans", NAME, f"--batch={count}"])
    assert f"{count!r} is no count; write a number from 1" in capsys.readouterr().err
