"""A run of the benchmarks: what it covers unasked, that it ends in time, and that it can be gone on with."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cases, conditions, options, peers, record, run
from benchmarks.cases import SCALES, SUITES, PendingCase, Variant
from benchmarks.harness import Case, Contender, Limits, check_case, drift
from benchmarks.record import CaseResult, Conditions, Skipped, read_run
from benchmarks.roofline import Ceilings
from benchmarks.runner import Job, Outcome, OutOfTime, run_jobs, time_limit
from benchmarks.tables import drift_lines
from benchmarks.timing import LAYOUTS, Prepared, layout_of, method_for, tf32_allowed
from benchmarks.training import MAX_SHIFT, keep_off_kinks

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("known_ceilings")
QUICK = ["--suite", "layers", "--head", "52", "--quick", "--no-report", "--contenders", "eager", "--device", "cpu"]


def only_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


def pressing(after: int, then: Callable[[], None]) -> Contender:
    """Eager, named so, which in its call number `after` does something else first."""
    count = 0

    def build(model: nn.Module, x: Tensor) -> Prepared:
        def call(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count == after:
                then()
            return model(x)

        return Prepared(call, x)

    return Contender(peers.EAGER_NCHW, build)


def ctrl_c() -> None:
    raise KeyboardInterrupt


# What a run covers


def test_unasked_everything_is_run_and_what_users_decide_by_comes_first() -> None:
    chosen = options.parse(["--device", "cpu"])
    assert sorted(chosen.suite) == sorted(SUITES)
    assert chosen.suite[:3] == ("stack", "layers", "network")
    assert (chosen.dtype, chosen.batch, chosen.minutes) == (("fp32", "bf16"), (1, 8), 8.5)
    jobs = run._jobs(chosen)
    # Of two dtypes: at two batches 3 stacks, 11 layers, 2 networks, 11 steps and 2 of networks; 18 points; one call.
    assert len(jobs) == 2 * (2 * (3 + 11 + 2 + 11 + 2) + 18 + 1)


def test_a_gpu_is_asked_for_its_own_dtype_and_for_batches_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = options.parse([])
    assert (chosen.dtype, chosen.batch, chosen.minutes) == (("bf16",), (1, 8, 64), 8.5)
    quick = options.parse(["--quick"])
    assert (quick.suite, quick.head, quick.batch, quick.minutes) == (("layers", "stack"), (13,), (1,), 1.75)
    assert peers.COMPILED_AUTOTUNED not in [contender.name for contender in quick.contenders]
    assert options.parse(["--suite", "stack", "--dtype", "tf32,fp32,fp16"]).dtype == ("tf32", "fp32", "fp16")


def test_what_is_named_is_run_without_a_limit() -> None:
    assert options.parse(["--suite", "stack", "--device", "cpu"]).minutes is None
    assert options.parse(["--suite", "stack", "--minutes", "2.5", "--device", "cpu"]).minutes == 2.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "tf32", "--device", "cpu"], "--dtype: tf32 is of GPUs; accepted here: fp32, bf16, fp16"),
        (["--layout", "NHWC"], "--layout: 'NHWC' is not among the accepted: NCHW, channels_last"),
        (["--minutes", "0"], "--minutes: '0' is not a number above 0"),
        (["--resume", "--suite", "stack"], "accepted beside it: --minutes, --output, --no-report; given: --suite"),
    ],
)
def test_what_is_not_accepted_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_points_of_a_curve_are_told_apart_and_have_no_compiled_contender() -> None:
    points = [
        pending.build() for pending in SUITES["scaling"]((), Variant(2, "fp32", CPU)) if "1024" not in pending.title
    ]
    assert {axis: tuple(p.at for p in points if p.axis == axis) for axis in SCALES} == {
        **SCALES,
        "channels": (64, 128, 256, 512, 2048),
    }
    at_eight = next(p for p in points if (p.axis, p.at) == ("batch", 8))
    assert (tuple(at_eight.x.shape), at_eight.name) == ((8, 256, 26, 26), "26x26 1x1 256->128, batch")
    wide = next(p for p in points if (p.axis, p.at) == ("channels", 2048))
    assert (tuple(wide.x.shape), wide.name) == ((2, 2048, 26, 26), "26x26 1x1 2048->1024, channels")
    assert len({(p.name, p.x.shape[0]) for p in points}) == len(points)
    chosen = options.parse(["--suite", "scaling", "--device", "cpu"])
    names = {contender.name for job in run._jobs(chosen) for contender in job.contenders}
    assert peers.FROZEN in names
    assert not [name for name in names if "compile" in name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contenders_run_in_the_layout_of_the_case(layout: str) -> None:
    (pending,) = SUITES["stack"]((52,), Variant(1, "fp32", CPU, layout=layout))
    case = pending.build()
    assert layout_of(case.x) == layout
    assert pending.title == f"stack: 52x52, batch 1, fp32{', NCHW' if layout == 'NCHW' else ''}"
    with torch.no_grad():
        for name, contender in peers.PEERS.items():
            if "cpu" in contender.devices and contender.infers and contender.reset is None:
                prepared = contender.build(case.model, case.x)
                named = {peers.EAGER_NCHW: "NCHW", peers.EAGER_CHANNELS_LAST: "channels_last"}
                assert layout_of(prepared.x) == named.get(name, layout), name
                if name == "folded in-place":
                    assert isinstance(prepared.run, nn.Module)
                    weights = [w for w in prepared.run.parameters() if w.dim() == 4 and w.shape[2] > 1]
                    assert weights
                    assert {layout_of(weight) for weight in weights} == {layout}


def test_tf32_is_allowed_in_its_own_cases_alone() -> None:
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for dtype, allowed in (("tf32", True), ("fp32", False)):
        (pending,) = SUITES["overhead"]((), Variant(1, dtype, CPU))
        case = pending.build()
        assert (case.dtype, case.x.dtype) == (dtype, torch.float32)
        seen: list[bool] = []

        def look(model: nn.Module, x: Tensor, seen: list[bool] = seen) -> Prepared:
            def call(x: Tensor) -> Tensor:
                seen.extend(setting.allow_tf32 for setting in settings)
                return model(x)

            return Prepared(call, x)

        job = Job(
            PendingCase("", lambda case=case: case), (Contender("eager", look),), method_for(CPU), Limits(rounds=1)
        )
        assert run_jobs([job], [], Console(quiet=True), lambda result: None).complete
        assert set(seen) == {allowed}
    assert [setting.allow_tf32 for setting in settings] == before
    with pytest.raises(RuntimeError, match="within"), tf32_allowed(not before[1]):
        raise RuntimeError("within")
    assert [setting.allow_tf32 for setting in settings] == before


# Networks


def test_resnet_is_skipped_with_the_reason_where_torchvision_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> nn.Module:
        raise ModuleNotFoundError("torchvision.models is not installed")

    monkeypatch.setattr(cases, "build", missing)
    monkeypatch.setattr(cases, "IMAGE_SIZE", 32)
    argv = [
        "--suite",
        "network",
        "--quick",
        "--no-report",
        "--contenders",
        "eager",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    assert run.main(argv) == 0
    found = read_run(only_file(tmp_path))
    reason = "ModuleNotFoundError: torchvision.models is not installed"
    assert found.skipped == (Skipped("network: ResNet-50, batch 1, fp32", reason),)
    assert [case.name for case in found.cases] == ["YOLOv3 32x32"]
    assert (found.complete, found.left) == (True, 0)
    assert reason in " ".join(capsys.readouterr().out.split())


def test_networks_train_and_their_contenders_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    monkeypatch.setattr(cases, "IMAGE_SIZE", 32)
    monkeypatch.setattr(cases, "RESNET_IMAGE_SIZE", 64)
    contenders = [peers.PEERS[name] for name in (peers.EAGER_CHANNELS_LAST, peers.CONVERTED)]
    for pending in SUITES["network-training"]((), Variant(4, "fp32", CPU)):
        case = pending.build()
        assert case.step is not None
        assert case.step.model.training
        for verdict in check_case(case, contenders, method_for(CPU)).verdicts:
            assert (verdict.status, verdict.reason) == ("ok", None)
            assert verdict.saved_bytes
            # The output, and the gradients of the input and of every parameter.
            assert len(verdict.errors) == 2 + len(list(case.step.model.parameters()))


class Residual(nn.Module):
    """A ResNet block's end: the batch norm's output and a residual go through the ReLU together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += x
        return self.relu(y)


def test_kinks_behind_a_residual_sum_are_kept_off_too() -> None:
    model, x = Residual().train(), torch.randn(4, 4, 20, 20)

    def nearest() -> float:
        with torch.no_grad():
            mean, var = model.conv(x).mean((0, 2, 3)), model.conv(x).var((0, 2, 3), correction=0)
            z = F.batch_norm(model.conv(x), mean, var, model.bn.weight, model.bn.bias, eps=model.bn.eps)
            return float((z + x).abs().min())

    before, bias = nearest(), model.bn.bias.clone()
    keep_off_kinks(model, x)
    assert before < 1e-3 < 2e-3 < nearest()
    assert 0 < float((model.bn.bias - bias).detach().abs().max()) <= MAX_SHIFT
    assert not model.relu._forward_pre_hooks
    assert not model.bn._forward_hooks


# Time


def small_case() -> Case:
    torch.manual_seed(0)
    return Case("layers", "small", nn.Conv2d(8, 4, 1).eval(), torch.randn(2, 8, 3, 3))


def jobs_of(*contenders: Contender, count: int = 3) -> list[Job]:
    return [Job(PendingCase("small", small_case), contenders, method_for(CPU), Limits(rounds=1, warmup=0))] * count


def test_a_run_ends_when_its_time_is_up_whatever_is_under_way() -> None:
    started = time.monotonic()
    # One call to check, two to time: the second case's check would take a minute.
    contender = pressing(after=4, then=lambda: time.sleep(60))
    results: list[CaseResult] = []
    outcome = run_jobs(jobs_of(contender), [], Console(quiet=True), results.append, seconds=2.0)
    assert (outcome, len(results)) == (Outcome(left=2, interrupted=False), 1)
    assert time.monotonic() - started < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_time_that_is_up_in_a_timing_is_no_interruption() -> None:
    results: list[CaseResult] = []
    contender = pressing(after=2, then=lambda: time.sleep(60))
    outcome = run_jobs(jobs_of(contender), [], Console(quiet=True), results.append, seconds=1.0)
    assert outcome == Outcome(left=3, interrupted=False)
    assert [result.complete for result in results] == [False]


def test_a_case_that_would_not_end_in_time_is_not_begun() -> None:
    calls: list[int] = []

    def slow(model: nn.Module, x: Tensor) -> Prepared:
        calls.append(1)
        time.sleep(0.7)
        return Prepared(model, x)

    outcome = run_jobs(jobs_of(Contender("slow", slow)), [], Console(quiet=True), lambda result: None, seconds=1.2)
    assert (outcome.left, len(calls)) == (2, 1)


def test_a_time_limit_leaves_the_alarm_as_it_was() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(10)
    with time_limit(None), time_limit(100):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# Going on


def cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a run of four layers that was interrupted in the timing of its second."""
    # A layer takes a call to check and, in at most three rounds, six to time.
    with monkeypatch.context() as patch:
        patch.setitem(peers.PEERS, peers.EAGER_NCHW, pressing(after=11, then=ctrl_c))
        assert run.main([*QUICK, "--seconds", "1000", "--output", str(tmp_path)]) == 130
    return only_file(tmp_path)


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut_short(tmp_path, monkeypatch)
    before = read_run(path)
    assert (before.left, before.complete, before.ceilings_after) == (3, False, None)
    assert [case.complete for case in before.cases] == [True, False]
    assert "3 cases are left, which --resume runs" in capsys.readouterr().out

    assert run.main(["--resume", str(path), "--no-report"]) == 0
    after = read_run(only_file(tmp_path))
    assert (after.left, after.complete) == (0, True)
    assert after.settings == before.settings
    assert after.ceilings_after is not None
    assert after.cases[0] == before.cases[0], "what was finished is not measured again"
    names = ["52x52 1x1 384->128", "52x52 3x3 128->256", "52x52 1x1 256->128", "52x52 1x1 256->75"]
    assert [case.name for case in after.cases] == names
    assert all(case.complete and case.results[0].rounds == 3 for case in after.cases)

    with pytest.raises(SystemExit, match="2"):
        run.main(["--resume", str(path), "--no-report"])
    assert "is of a run that was finished: nothing is left to do" in capsys.readouterr().err


def test_without_a_name_the_newest_unfinished_file_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut_short(tmp_path, monkeypatch)
    finished = path.with_name("99999999-000000-x.json")
    content = json.loads(path.read_text())
    finished.write_text(json.dumps({**content, "left": 0}))
    path.with_name("99999999-000001-x.json").write_text("no results")
    path.with_name("00000000-000000-x.json").write_text(path.read_text())
    assert record.newest_unfinished(tmp_path) == path
    assert run.main(["--resume", "--minutes", "30", "--no-report", "--output", str(tmp_path)]) == 0
    assert read_run(path).left == 0
    assert record.newest_unfinished(tmp_path).name.startswith("00000000")
    with pytest.raises(SystemExit, match="2"):
        run.main(["--resume", "--output", str(tmp_path / "nothing")])
    assert "is of a run that was not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("commit", "0" * 40, "is of commit 0000000"),
        ("device", "another CPU", "is of device another CPU, here is"),
        ("versions", {"torch": "1.0"}, "is of versions {'torch': '1.0'}, here is"),
    ],
)
def test_figures_of_another_commit_machine_or_version_do_not_go_into_one_file(
    key: str,
    value: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = cut_short(tmp_path, monkeypatch)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run.main(["--resume", str(path), "--no-report"])
    assert message in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == before


def test_a_run_ends_with_its_page_and_without_what_draws_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument for argument in QUICK if argument != "--no-report"]
    assert run.main([*argv, "--output", str(tmp_path)]) == 0
    (page,) = tmp_path.rglob("*.html")
    assert page.with_suffix(".json") == only_file(tmp_path)
    assert f"report {page}" in capsys.readouterr().out.replace("\n", "")

    monkeypatch.setitem(sys.modules, "benchmarks.report", None)
    assert run.main([*argv, "--output", str(tmp_path / "other")]) == 0
    assert not list((tmp_path / "other").rglob("*.html"))
    assert "then: python benchmarks/report.py" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_is_out_of_time_is_no_failure_and_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, peers.EAGER_NCHW, pressing(after=9, then=lambda: time.sleep(60)))
    argv = [*QUICK, "--seconds", "1000", "--minutes", "0.1", "--output", str(tmp_path)]
    assert run.main(argv) == 0
    found = read_run(only_file(tmp_path))
    assert (found.left, found.complete) == (3, False)
    assert found.ceilings_after is not None
    assert "the time is up; 3 cases are left" in capsys.readouterr().out


# The device


def test_drift_is_the_last_third_over_the_first() -> None:
    steady, slowing = [1.0] * 9, [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 1.21, 1.21, 9.0]
    assert drift({"a": steady}) == pytest.approx(1.0)
    assert drift({"a": steady, "b": slowing}) == pytest.approx(1.1)
    assert drift({"a": steady, "b": [1.0] * 8}) is None
    assert drift({}) is None


def test_a_device_that_changed_is_told() -> None:
    made = CaseResult("stack", "13x13", 1, "fp32", (1, 8, 2, 2), (), True)
    states = Conditions(1700.0, 40.0, None), Conditions(1400.0, 81.0, None)
    hot = replace(made, drift=1.12, before=states[0], after=states[1])
    before, after = Ceilings(1e12, {"bf16": 8e14}), Ceilings(0.99e12, {"bf16": 7.2e14})
    assert drift_lines(before, after, [replace(made, drift=0.95), hot]) == [
        "ceilings after the run: copy -1.0%, bf16 -10.0%",
        "clock: 1400 to 1700 MHz",
        "temperature: 40 to 81 C",
        "drift within a case: at most +12.0% (stack: 13x13, batch 1, fp32)",
    ]
    assert drift_lines(None, None, [made]) == []


def test_the_state_of_a_gpu_is_read_and_what_it_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1755)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 312_345)

    def absent(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "temperature", absent)
    assert conditions.conditions(torch.device("cuda")) == Conditions(1755.0, None, 312.3)


def test_results_carry_the_state_of_the_device(tmp_path: Path) -> None:
    assert run.main([*QUICK, "--output", str(tmp_path)]) == 0
    for case in read_run(only_file(tmp_path)).cases:
        assert case.before is not None
        assert case.after is not None
        assert (case.layout, case.drift) == ("channels_last", None)
        assert case.floor_us is not None
        assert case.floor_us > 0
