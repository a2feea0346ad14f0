"""What the cuda backend alone has: an operator of its library, launches that name their plan, and a binding whose
reasons Python knows too. tests/test_kernel_backends.py holds what it shares with the Triton backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pointfuse
import pytest
import torch
from conftest import ROOT
from host_ops import host_ops
from pointfuse.backends import calls, cuda
from pointfuse.functional import conv_bn_act
from pointfuse.problem import IDENTITY, BatchNorm, Geometry, Refused
from torch import Tensor
from torch.library import opcheck

EMULATED = ["h100", "a100"]
DEVICES = EMULATED if cuda.unusable_reason() else [*EMULATED, "gpu"]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend, which is the one asked for, runs; tensors are made there."""
    if request.param != "gpu":
        host_ops().pointfuse_emulate(request.param.encode())
        monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
        monkeypatch.setattr(cuda, "unusable_reason", lambda: None)
    with torch.device("cuda" if request.param == "gpu" else "cpu"), pointfuse.use_backend("cuda", strict=True):
        yield request.param


def test_opcheck() -> None:
    x, weight, norm = torch.randn(2, 8, 5, 6), torch.randn(8, 8, 3, 3), torch.rand(4, 8) + 0.5
    config = 2 | 1 << 8 | 1 << 16 | 1 << 24
    for sample in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:0], x[:, :, 1:]):
        opcheck(
            cuda.operator,
            (sample, weight, torch.randn(8), *norm, None, config, 1e-5, 0.1),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("device", EMULATED, indirect=True)
def test_a_launch_that_fails_names_the_plan() -> None:
    library = host_ops()
    library.pointfuse_emulate_fault(True)
    try:
        with pytest.raises(RuntimeError, match=r"pointfuse: .+ from 1x1 8->4 of 1x8x2x2 float32.+ tile \d+x\d+"):
            conv_bn_act(torch.randn(1, 8, 2, 2), torch.randn(4, 8, 1, 1))
    finally:
        library.pointfuse_emulate_fault(False)
    assert conv_bn_act(torch.randn(1, 8, 2, 2), torch.randn(4, 8, 1, 1)).isfinite().all()


def test_memory_that_runs_out_is_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output of 2^60 bytes: no machine has it."""
    weight = torch.randn(1, 1, 1, 1).expand(1 << 40, 1, 1, 1)
    with pytest.raises(torch.OutOfMemoryError, match="pointfuse: CUDA out of memory for the output of a unit"):
        conv_bn_act(torch.randn(1, 1, 1 << 9, 1 << 9), weight)
    assert conv_bn_act(torch.randn(1, 8, 2, 2), torch.randn(4, 8, 1, 1)).isfinite().all()


@pytest.mark.parametrize("device", EMULATED, indirect=True)
def test_each_new_plan_is_printed_once(device: str) -> None:
    code = (
        "import conftest, torch, pointfuse\n"
        "from host_ops import host_ops\n"
        "from pointfuse.backends import calls, cuda\n"
        f"host_ops().pointfuse_emulate({device!r}.encode())\n"
        "calls.on_gpu, cuda.unusable_reason = lambda tensor: tensor.is_cpu, lambda: None\n"
        "with pointfuse.use_backend('cuda', strict=True):\n"
        "    for size in (3, 3, 4):\n"
        "        pointfuse.conv_bn_act(torch.zeros(1, 8, size, size), torch.zeros(8, 8, 1, 1), activation='relu')\n"
    )
    environment = {**os.environ, "POINTFUSE_PRINT_PLAN": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT / "tests", check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("pointfuse: ")]
    assert len(lines) == 2
    assert lines[0].startswith("pointfuse: 1x1 8->8 of 1x8x3x3 float32 by TF32 relu: sm_")


def unit(**others: Any) -> dict[str, Any]:
    """The operands of a call that is served, but for the ``others``."""
    right: dict[str, Any] = dict(
        x=torch.zeros(2, 8, 4, 4), weight=torch.zeros(8, 8, 1, 1), bias=torch.zeros(8), mean=torch.zeros(8),
        var=torch.ones(8), gamma=torch.ones(8), beta=torch.zeros(8), residual=torch.zeros(2, 8, 4, 4), stride=(1, 1),
        padding=(0, 0), frozen=False,
    )  # fmt: skip
    return right | others


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def double(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


BRAIN = torch.bfloat16
MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str | None]] = {
    "nothing": (lambda: unit(), None),
    "x of three dimensions": (lambda: unit(x=torch.zeros(8, 4, 4)), "x, weight and residual need four dimensions"),
    "weight dtype": (lambda: unit(weight=half(8, 8, 1, 1)), "x, weight and residual must have one dtype"),
    "weight of a strange dtype": (
        lambda: unit(weight=double(8, 8, 1, 1)), "dtypes are float32, float16 and bfloat16"),
    "channels": (lambda: unit(x=torch.zeros(2, 7, 4, 4)), "weight and x must have the same input channels"),
    "no input plane": (lambda: unit(x=torch.zeros(2, 8, 0, 4)), "every size but the batch must be at least 1"),
    "no output channels": (
        lambda: unit(weight=torch.zeros(0, 8, 1, 1)), "every size but the batch must be at least 1"),
    "no batch": (lambda: unit(x=torch.zeros(0, 8, 4, 4), residual=torch.zeros(0, 8, 4, 4)), None),
    "smaller than the kernel": (
        lambda: unit(x=torch.zeros(2, 8, 4, 2), weight=torch.zeros(8, 8, 3, 3)),
        "the padded plane must not be smaller than the kernel"),
    "smaller than the kernel, with a stride": (
        lambda: unit(x=torch.zeros(2, 8, 4, 2), weight=torch.zeros(8, 8, 3, 3), stride=(2, 2)),
        "the padded plane must not be smaller than the kernel"),
    "large enough by its padding": (
        lambda: unit(x=torch.zeros(2, 8, 1, 1), weight=torch.zeros(8, 8, 3, 3), padding=(1, 1),
                     residual=torch.zeros(2, 8, 1, 1)), None),
    "residual of three dimensions": (
        lambda: unit(residual=torch.zeros(8, 1, 1)), "x, weight and residual need four dimensions"),
    "residual dtype": (lambda: unit(residual=half(2, 8, 4, 4)), "x, weight and residual must have one dtype"),
    "residual shape": (lambda: unit(residual=torch.zeros(1, 8, 4, 4)), "the residual must have the output's shape"),
    "bias dtype": (lambda: unit(bias=half(8)), "bias must have the dtype of x"),
    "bias of a strange dtype": (lambda: unit(bias=double(8)), "dtypes are float32, float16 and bfloat16"),
    "frozen bias dtype": (lambda: unit(bias=half(8), frozen=True), None),
    "frozen bias of a strange dtype": (
        lambda: unit(bias=double(8), frozen=True), "dtypes are float32, float16 and bfloat16"),
    "bias size": (lambda: unit(bias=torch.zeros(7)), "bias and batch norm need one number a channel"),
    "bias of two dimensions": (lambda: unit(bias=torch.zeros(8, 1)), "bias and batch norm need one number a channel"),
    "strided bias": (lambda: unit(bias=torch.zeros(16)[::2]), "a tensor of bias or batch norm is not contiguous"),
    "strided bias of one channel": (
        lambda: unit(weight=torch.zeros(1, 8, 1, 1), bias=torch.zeros(16)[::16], mean=torch.zeros(1),
                     var=torch.ones(1), gamma=None, beta=None, residual=None), None),
    "norm dtype": (lambda: unit(mean=half(8)), "batch norm must be of the dtype of x or float32"),
    "norm of a strange dtype": (lambda: unit(mean=double(8)), "dtypes are float32, float16 and bfloat16"),
    "norm in fp32": (
        lambda: unit(x=half(2, 8, 4, 4), weight=half(8, 8, 1, 1), residual=half(2, 8, 4, 4), bias=half(8)), None),
    "norm in another half": (
        lambda: unit(x=half(2, 8, 4, 4), weight=half(8, 8, 1, 1), residual=None, bias=None,
                     mean=torch.zeros(8, dtype=BRAIN)), "batch norm must be of the dtype of x or float32"),
    "norm of two dtypes": (lambda: unit(gamma=half(8)), "the tensors of batch norm must have one dtype"),
    "norm of a dtype and a strange one": (lambda: unit(beta=double(8)), "dtypes are float32, float16 and bfloat16"),
    "norm without variance": (lambda: unit(var=None), "batch norm needs running_var beside running_mean"),
    "norm size": (lambda: unit(gamma=torch.ones(9)), "bias and batch norm need one number a channel"),
    "strided norm": (lambda: unit(var=torch.ones(16)[::2]), "a tensor of bias or batch norm is not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), MISFITS.values(), ids=MISFITS)
def test_the_binding_refuses_in_the_words_of_python(make: Callable[[], dict[str, Any]], reason: str | None) -> None:
    """``misfit`` speaks for it to compilers, and for every backend that has no binding."""
    u = make()
    norm = BatchNorm(u["mean"], u["var"], u["gamma"], u["beta"], False, 0.0, 1e-5)
    operands, geometry = (u["x"], u["weight"], u["bias"], norm), Geometry(u["stride"], u["padding"])
    assert calls.misfit(*operands, u["residual"], geometry, u["frozen"]) == reason
    said = None
    try:
        cuda.conv_bn_act(*operands, IDENTITY, geometry, u["residual"], frozen=u["frozen"])
    except Refused as refused:
        said = str(refused)
    assert said == reason
