"""Backends are named, chosen and refused with reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pointfuse
import pytest
import torch
from pointfuse.backends import aten, fallback_reason, select


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
    usable = any(pointfuse.backends()[name].usable for name in ("cuda", "triton"))
    assert (fallback_reason("cuda") is None) == usable
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
