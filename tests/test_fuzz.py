"""Random units give PyTorch's answers on every backend that can run here, and the fuzzer sees what is not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz as command
import fuzzing
import pytest
import torch
from fuzzing import EMULATED, REGRESSIONS, Case, Failure, Verdict, fuzz, load, missing, native_backends, run_case, save
from pointfuse.backends import aten, aten_training
from torch import Tensor

SHARES = dict.fromkeys(native_backends(), 300) | {"cuda-h100": 60, "cuda-a100": 30, "triton-interpreter": 40}
WRITTEN = sorted(REGRESSIONS.glob("*.json"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Of small tensors, threads make the most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def skip_what_cannot_run(backend: str) -> None:
    if reason := missing(backend):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", SHARES)
def test_random_units_are_pytorchs(backend: str) -> None:
    """As many as were asked for, and of every kind."""
    skip_what_cannot_run(backend)
    ran: list[tuple[Case, Verdict | None]] = []
    found = fuzz(backend, SHARES[backend], 0, lambda case, verdict: ran.append((case, verdict)))
    assert not [(one.failure, one.case) for one in found]
    assert len(ran) == SHARES[backend]
    for kind, least in (("entry", 4), ("mode", 3), ("dtype", 3), ("data", 5)):
        assert len({getattr(case, kind) for case, _ in ran}) >= least
    assert sum(verdict is not None and verdict.fused for _, verdict in ran) >= len(ran) // 8


def test_an_answer_of_pytorchs_that_changes_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kernel=(1, 1), c_in=4, c_out=4, height=3, width=3)
    plain, wrong = fuzzing._plain, {"turn": 0}

    def unsteady(case: Case, draw: int) -> Any:
        wrong["turn"] += 1
        results = plain(case, draw)
        return {"y": results["y"] + 1} if wrong["turn"] % 10 == 0 else results

    with monkeypatch.context() as patch:
        patch.setattr(fuzzing, "_ours", lambda case: ({"y": plain(case, 0)["y"] + 1}, False))
        with pytest.raises(Failure, match="y is 1 off"):
            run_case(case)
        patch.setattr(fuzzing, "_plain", unsteady)
        assert run_case(case).unsteady


@pytest.mark.parametrize(("exact", "right"), [(65519.0, True), (65504.0, True), (60000.0, False)])
def test_infinity_is_the_least_value_that_is_rounded_to_it(
    exact: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fp16 that is 65520; PyTorch is 16 off here, so 32 is allowed."""
    monkeypatch.setattr(fuzzing, "DRAWS", 0)
    plain = torch.tensor([exact - 16, 0.0], dtype=torch.float64)
    case = Case(dtype="fp16")

    def compare() -> str:
        ours = torch.tensor([float("inf"), 0.0], dtype=torch.float16)
        truth = torch.tensor([exact, 0.0], dtype=torch.float64)
        return fuzzing._compare(case, "y", ours, plain.half(), truth, 0.0)

    if right:
        assert compare() == "rule"
    else:
        with pytest.raises(Failure, match="off at a largest magnitude of 6e"):
            compare()


@pytest.mark.parametrize("path", WRITTEN, ids=[path.name for path in WRITTEN])
def test_what_failed_once_stays_right(path: Path) -> None:
    case = load(path)
    skip_what_cannot_run(case.backend)
    run_case(case)


ORIGINAL_EPILOGUE = aten.onednn_epilogue


def epilogue_with_a_wrong_slope(activation: Any) -> Any:
    named = ORIGINAL_EPILOGUE(activation)
    return (named[0], [scalar * 2 for scalar in named[1]]) if named else None


def last_pixel_left_out(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(*args: Any) -> Tensor:
        y = original(*args)
        if y.shape[3] > 2:
            y[..., -1, -1] = 0
        return y

    return conv


def biased_variance(original: Callable[..., Any]) -> Callable[..., Any]:
    def normalise(y: Tensor, *args: Any) -> Any:
        result = original(y, *args)
        count = y.numel() // y.shape[1]
        if args[7] is not None and args[1] is None:
            args[7].mul_(1 - 0.5 / count)
        return result

    return normalise


def input_overwritten(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(x: Tensor, *args: Any) -> Tensor:
        y = original(x, *args)
        x[0, 0, 0, 0] += 1
        return y

    return conv


def written_past_the_end(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(x: Tensor, *args: Any) -> Tensor:
        y = original(x, *args)
        beyond = torch.empty(8)
        beyond.as_strided((9,), (1,)).fill_(0)
        return y

    return conv


def contiguous_output(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: original(*args).contiguous()


def forgotten_nan(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: original(*args).nan_to_num(0)


def wider(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: original(*args).float()


def raising(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(*args: Any) -> Tensor:
        raise KeyError("planted")

    return conv


def barely_off(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: original(*args) * (1 + 2**-22)


# By what is broken: the module and function, the replacement of it, and what is said.
FAULTS = {
    "the slope": (aten, "onednn_epilogue", lambda original: epilogue_with_a_wrong_slope, "y .*off|y.* exactly"),
    "one pixel": (aten, "onednn_conv", last_pixel_left_out, "y .*off|y.* exactly"),
    "the running variance": (aten_training, "normalise", biased_variance, "running_var"),
    "memory beside a buffer": (aten, "onednn_conv", written_past_the_end, "4 bytes beside a tensor of"),
}
# Of a case that would show it.
MORE_FAULTS = {
    "an input": (input_overwritten, {}, "x changed"),
    "the memory format": (contiguous_output, dict(x_layout="channels_last"), "y has strides"),
    "NaN": (forgotten_nan, dict(data="special"), r"y\[.*\] is 0.0, PyTorch's nan"),
    "its dtype": (wider, dict(dtype="bf16"), "y is torch.float32 of .*, PyTorch's torch.bfloat16"),
    "an error": (raising, {}, "pointfuse raises KeyError"),
    "exactness": (barely_off, dict(data="integers", eps=fuzzing.INTEGER_EPS), "y.* of small integers is .*, exactly"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_shrunk_and_kept(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken, said = FAULTS[fault]
    monkeypatch.setattr(fuzzing, "MAX_FOUND", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken(getattr(module, name)))
        (found,) = fuzz("aten", 2000, 1, lambda case, verdict: None)
        path = save(found.case, found.failure, tmp_path)
        with pytest.raises(Failure, match=said):
            run_case(load(path))
    case = load(path)
    assert case == found.case
    assert case.c_in * case.c_out * case.groups * case.height * case.width <= 64
    run_case(case)


@pytest.mark.parametrize(("broken", "options", "said"), MORE_FAULTS.values(), ids=MORE_FAULTS)
def test_whatever_is_wrong_is_a_failure(
    broken: Any, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(entry="module", batch=2, c_in=5, c_out=3, height=4, width=5, norm="affine")
    case = dataclasses.replace(case, **options)
    assert run_case(case).fused
    monkeypatch.setattr(aten, "onednn_conv", broken(aten.onednn_conv))
    with pytest.raises(Failure, match=said):
        run_case(case)


def test_a_call_that_pytorch_refuses_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(c_in=3, kernel=(3, 3))  # of a plane of one pixel
    assert run_case(case).raised
    monkeypatch.setattr(aten, "conv", lambda *args: torch.zeros(1, 1, 1, 1))
    with pytest.raises(Failure, match=r"PyTorch raises RuntimeError .*, and pointfuse nothing"):
        run_case(case)


def test_a_written_case_names_every_field(tmp_path: Path) -> None:
    text = save(Case(kernel=(3, 3), padding="same"), "y is 1 off", tmp_path).read_text()
    assert all(f'"{field.name}":' in text for field in dataclasses.fields(Case))
    assert '"failure": "y is 1 off"' in text
    (path,) = tmp_path.iterdir()
    assert load(path) == Case(kernel=(3, 3), padding="same")


def test_the_command_counts_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["50", "--seed", "5", "--backends", "aten", "--regressions", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "backend     aten 50\n" in printed
    assert printed.splitlines()[-1].startswith("50 cases, seed 5, commit ")
    assert printed.endswith(": no failure\n")


def test_the_command_keeps_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(case: Case) -> Verdict:
        raise Failure("planted")

    monkeypatch.setattr(fuzzing, "run_case", run)
    monkeypatch.setattr(fuzzing, "MAX_FOUND", 1)
    assert command.main(["50", "--seed", "1", "--backends", "aten", "--regressions", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert f"FAILED {path}: planted" in printed
    assert printed.splitlines()[-1].startswith("1 of 50 cases, seed 1, commit ")
    assert printed.endswith(": ended early; 1 failure, and a backend is left at 1\n")


def test_an_interrupted_command_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(range(3))

    def run(case: Case) -> Verdict:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return Verdict(fused=True, raised=False, by_neighbours=False, by_fold=False)

    monkeypatch.setattr(fuzzing, "run_case", run)
    assert command.main(["50", "--seed", "5", "--backends", "aten"]) == 130
    assert capsys.readouterr().out.splitlines()[-1].endswith(": interrupted; no failure so far")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["0"], "count is 0; it must be 1 or more"),
        (["5", "--backends", "metal"], f"there is no such backend; the names are aten, .*{EMULATED[-1]}"),
    ],
    ids=["no case", "no backend"],
)
def test_wrong_usage_exits_with_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(argv)
    assert re.search(said, capsys.readouterr().err)
