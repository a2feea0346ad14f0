"""Backends are named, chosen and refused with reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pointfuse
import pytest
import torch
from pointfuse.backends import FallbackWarning, aten, chosen, cuda, fallback_reason, select
from pointfuse.problem import Refused
from torch import Tensor


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


def test_auto_takes_no_backend_that_was_never_measured(doubling: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKENDS.AUTOMATIC == ()
    assert select() is aten
    assert fallback_reason("cuda") == (
        "the cuda backend has not been measured on a GPU yet; pointfuse.use_backend('cuda') asks for it"
    )
    monkeypatch.setattr(BACKENDS, "AUTOMATIC", ("cuda",))
    assert (chosen(), one().item()) == ("cuda", 2)
    assert fallback_reason("cuda") is None
    doubling.append("it is Monday")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one().item() == 1
    monkeypatch.setattr(cuda, "unusable_reason", lambda: "no GPU")
    assert select() is aten


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
