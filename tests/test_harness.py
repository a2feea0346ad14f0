"""The harness checks before it times, times in turns, divides within one run, and saves what it has."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import demo, harness, options, peers, record, run
from benchmarks.cases import SUITES, PendingCase, Variant
from benchmarks.harness import Case, Contender, Limits, check_case, normalised_errors, quantiles, time_case
from benchmarks.record import (
    CaseResult,
    Quantiles,
    Result,
    report,
    result_path,
    write_json,
)
from benchmarks.runner import Job, run_jobs
from benchmarks.tables import case_table, disturbances
from benchmarks.timing import Prepared, WallTimer, method_for

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("known_ceilings")
METHOD = method_for(CPU)


@dataclass
class FakeClock:
    """A clock that moves only when a contender runs, and a record of which one ran."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.seconds

    def contender(self, name: str, durations: Sequence[float]) -> Contender:
        """A correct contender whose calls take the durations in turn, over and over."""
        count = 0

        def build(model: nn.Module, x: Tensor) -> Prepared:
            def call(x: Tensor) -> Tensor:
                nonlocal count
                self.calls.append(name)
                self.seconds += durations[count % len(durations)]
                count += 1
                return model(x)

            return Prepared(call, x)

        return Contender(name, build)


def small_case() -> Case:
    torch.manual_seed(0)
    return Case("layers", "small", nn.Conv2d(8, 4, 1).eval(), torch.randn(2, 8, 3, 3))


def contender_of(name: str, change: Callable[[Tensor], Any]) -> Contender:
    return Contender(name, lambda model, x: Prepared(lambda x: change(model(x)), x))


def run_once(contenders: Sequence[Contender], limits: Limits, clock: FakeClock, baselines: Sequence[str]) -> CaseResult:
    checked = check_case(small_case(), contenders, METHOD)
    clock.calls.clear()
    return time_case(checked, baselines, limits, WallTimer(clock=clock))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param([0.003], (3, 3, 3), id="one sample"),
        pytest.param([0.005, 0.001, 0.003, 0.002, 0.004, 0.006], (2, 3.5, 5), id="six in disorder"),
        pytest.param([0.001, 0.002], (1.2, 1.5, 1.8), id="between two"),
    ],
)
def test_quantiles_are_at_20_50_and_80_percent_in_milliseconds(
    seconds: list[float], expected: tuple[float, float, float]
) -> None:
    found = quantiles(seconds)
    assert (found.p20, found.p50, found.p80) == pytest.approx(expected)


def test_quantiles_and_ratios_on_a_clock_that_is_known() -> None:
    clock = FakeClock()
    # Each turn is an untimed call and a timed one, so the second of each pair of durations is what counts; the check
    # takes one call and the warm-up another.
    steady = clock.contender("steady", [0.004])
    uneven = clock.contender("uneven", [9, 0.001, 9, 0.002, 9, 0.003, 9, 0.002])
    result = run_once([steady, uneven], Limits(rounds=8, seconds=1e9, warmup=1), clock, ["steady", "absent"])
    first, second = result.results
    assert first.ms is not None
    assert second.ms is not None
    assert first.ms.p50 == pytest.approx(4)
    assert second.ms.p50 == pytest.approx(2)
    assert (first.rounds, second.rounds) == (8, 8)
    assert first.speedup == pytest.approx({"steady": 1.0})
    assert second.speedup == pytest.approx({"steady": 2.0})


def test_contenders_take_turns_in_a_rotated_order() -> None:
    clock = FakeClock()
    contenders = [clock.contender(name, [0.001]) for name in "abc"]
    run_once(contenders, Limits(rounds=4, seconds=1e9, warmup=0), clock, [])
    assert "".join(clock.calls) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


@pytest.mark.parametrize(("min_rounds", "expected"), [(1, 3), (5, 5)], ids=["the budget ends it", "but not too soon"])
def test_the_time_budget_ends_a_case(min_rounds: int, expected: int) -> None:
    clock = FakeClock()
    limits = Limits(rounds=100, seconds=5.0, min_rounds=min_rounds, warmup=0)
    result = run_once([clock.contender("slow", [1.0])], limits, clock, [])
    assert result.results[0].rounds == expected


def test_progress_reaches_the_end() -> None:
    clock = FakeClock()
    checking: list[float] = []
    timing: list[float] = []
    checked = check_case(small_case(), [clock.contender(name, [0.001]) for name in "ab"], METHOD, checking.append)
    time_case(checked, [], Limits(rounds=4, seconds=1e9), WallTimer(clock=clock), timing.append)
    assert checking == [0.5, 1.0]
    assert timing == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_normalised_errors_are_relative_to_the_largest_value() -> None:
    truth = torch.tensor([2.0, -4.0])
    assert normalised_errors([truth + 0.5, truth], [truth, truth]) == pytest.approx((0.125, 0.0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda y: y * 1.01, "error .* against float64, allowed", id="a value off"),
        pytest.param(lambda y: y[:, :, :2], r"output shapes \[\(2, 4, 2, 3\)\], expected", id="a shape"),
        pytest.param(lambda y: y.double(), r"output dtypes \['torch.float64'\], expected", id="a dtype"),
        pytest.param(lambda y: y * math.nan, "error nan against float64", id="a NaN"),
        pytest.param(lambda y: (y, y), "output shapes", id="an output too many"),
    ],
)
def test_a_wrong_answer_is_named_with_figures_and_not_timed(change: Callable[[Tensor], Any], reason: str) -> None:
    clock = FakeClock()
    contenders = [clock.contender("right", [0.001]), contender_of("twisted", change)]
    right, twisted = run_once(contenders, Limits(rounds=2), clock, ["right"]).results
    assert (right.status, right.rounds) == ("ok", 2)
    assert (twisted.contender, twisted.status, twisted.ms) == ("twisted", "wrong", None)
    assert twisted.reason is not None
    assert re.search(reason, twisted.reason)


@torch.no_grad()
def test_the_error_allowed_is_twice_the_plain_models_and_a_little() -> None:
    case = small_case()
    truth = case.model.double()(case.x.double())
    own = normalised_errors([case.model.float()(case.x)], [truth])[0]
    (verdict,) = check_case(case, [contender_of("plain", lambda y: y)], METHOD).verdicts
    assert verdict.error == pytest.approx(own)
    assert verdict.tolerance == pytest.approx(2 * own + 1e-6)


def test_a_contender_that_cannot_run_says_why() -> None:
    def build(model: nn.Module, x: Tensor) -> Prepared:
        raise RuntimeError("no such kernel\nand much more")

    def silent(model: nn.Module, x: Tensor) -> Prepared:
        raise NotImplementedError

    contenders = [Contender("broken", build), Contender("silent", silent), Contender("gpu", build, devices=("cuda",))]
    verdicts = check_case(small_case(), contenders, METHOD).verdicts
    assert [verdict.status for verdict in verdicts] == ["failed"] * 3
    assert [verdict.reason for verdict in verdicts] == [
        "RuntimeError: no such kernel",
        "NotImplementedError",
        "does not run on cpu",
    ]


def test_each_case_begins_with_a_reset_once() -> None:
    calls: list[str] = []

    def reset() -> None:
        calls.append("reset")

    def build(model: nn.Module, x: Tensor) -> Prepared:
        calls.append("build")
        return Prepared(model, x)

    check_case(small_case(), [Contender("a", build, reset=reset), Contender("b", build, reset=reset)], METHOD)
    assert calls == ["reset", "build", "build"]


def interrupting(after: int, clock: FakeClock | None = None) -> Contender:
    """A correct contender that presses Ctrl-C in its call number `after`; the others take a second on the clock."""
    count = 0

    def build(model: nn.Module, x: Tensor) -> Prepared:
        def call(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count == after:
                raise KeyboardInterrupt
            if clock is not None:
                clock.seconds += 1
            return model(x)

        return Prepared(call, x)

    return Contender("interrupting", build)


def test_ctrl_c_keeps_the_rounds_there_were() -> None:
    clock = FakeClock()
    contenders = [clock.contender("steady", [0.002]), interrupting(after=4, clock=clock)]
    result = run_once(contenders, Limits(rounds=9, warmup=0), clock, ["steady"])
    assert not result.complete
    assert [entry.rounds for entry in result.results] == [1, 1]


def test_ctrl_c_before_the_first_timing_leaves_no_figures() -> None:
    clock = FakeClock()
    contenders = [interrupting(after=2), clock.contender("steady", [0.002])]
    result = run_once(contenders, Limits(rounds=9, warmup=0), clock, ["steady"])
    assert [entry.status for entry in result.results] == ["interrupted", "interrupted"]


def jobs_of(*contenders: Contender) -> list[Job]:
    return [Job(PendingCase("small", small_case), contenders, METHOD, Limits(rounds=1, warmup=0))] * 2


def test_ctrl_c_ends_a_run_after_the_case_it_cut_short() -> None:
    results: list[CaseResult] = []
    outcome = run_jobs(jobs_of(interrupting(after=2)), [], Console(quiet=True), results.append)
    assert (outcome.left, outcome.interrupted) == (2, True)
    assert [result.complete for result in results] == [False]


def test_ctrl_c_in_a_check_ends_a_run_without_that_case() -> None:
    results: list[CaseResult] = []
    outcome = run_jobs(jobs_of(interrupting(after=1)), [], Console(quiet=True), results.append)
    assert (outcome.left, outcome.interrupted) == (2, True)
    assert results == []


def test_a_run_gives_every_case_its_check_and_its_result() -> None:
    events: list[str] = []
    jobs = jobs_of(FakeClock().contender("steady", [0.001]))
    outcome = run_jobs(
        jobs,
        baselines=[],
        console=Console(quiet=True),
        on_result=lambda result: events.append("timed"),
        on_checked=lambda checked: events.append("checked"),
    )
    assert outcome.complete
    assert events == ["checked", "timed", "checked", "timed"]


def example_result() -> CaseResult:
    results = (
        Result("eager", "ok", None, (1e-7,), 1e-6, Quantiles(1.0, 2.0, 3.0), rounds=5, speedup={"eager": 1.0}),
        Result("broken", "failed", "RuntimeError: no [such] kernel"),
        Result("odd", "wrong", "error nan", errors=(math.nan,), tolerance=1e-6),
    )
    return CaseResult("stack", "13x13", 1, "fp32", (1, 1024, 13, 13), results, complete=True)


def test_the_report_says_what_is_needed_to_read_it(tmp_path: Path) -> None:
    settings = {"argv": ["--quick"], "seed": 0}
    path = tmp_path / "a" / "b.json"
    write_json(path, report([example_result()], CPU, settings, complete=True))
    content = json.loads(path.read_text())
    run_itself = "schema commit dirty date machine device versions settings ceilings ceilings_after complete left"
    assert list(content) == [*run_itself.split(), "skipped", "cases"]
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert set(content["machine"]) == {"cpu", "cores", "threads", "system"}
    assert content["versions"]["torch"] == torch.__version__
    assert " ".join(content["versions"]) == "python torch pointfuse onednn cuda cudnn cudnn-frontend triton"
    assert content["ceilings"] is None
    assert content["settings"] == settings
    eager, broken, odd = content["cases"][0]["results"]
    assert eager["ms"] == {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    assert eager["speedup"] == {"eager": 1.0}
    assert (broken["ms"], broken["reason"]) == (None, "RuntimeError: no [such] kernel")
    # JSON has no NaN; the figure must not make the file unreadable elsewhere.
    assert odd["errors"] == ["nan"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"run": 1})

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_results_lie_in_a_folder_for_the_device_and_are_named_by_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "cpu_name", lambda: "AMD EPYC(tm) 9004 / 2")
    monkeypatch.setattr(record, "_git", lambda *arguments: "0123456789abcdef")
    path = result_path(Path("results"), CPU, datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert path == Path("results/amd-epyc-tm-9004-2/20300102-030405-012345678.json")


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    content = report([], CPU, {}, complete=False)
    assert (content["commit"], content["dirty"], content["complete"]) == (None, None, False)


def test_the_table_shows_ratios_and_reasons() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(case_table(example_result(), ["eager", "absent"]))
    text = console.export_text()
    assert "stack: 13x13, batch 1, fp32" in text
    assert "broken: failed, RuntimeError: no [such] kernel" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("eager  ")] == [
        ["eager", "1.00", "2.00", "3.00", "1.00", "-", "1.0e-07"]
    ]


def test_cpu_time_of_other_processes_is_told_and_warned_of() -> None:
    before, after = harness._CpuTimes(total=10, busy=4, own=3), harness._CpuTimes(total=20, busy=12, own=7)
    assert harness._disturbance(before, after) == pytest.approx(0.4)
    assert harness._disturbance(None, after) is None
    case = replace(example_result(), disturbance=0.4)
    assert disturbances([case]) == ["13x13: other processes took 40% of the CPU; the figures are not reliable"]
    assert disturbances([replace(case, disturbance=0.01), replace(case, disturbance=None)]) == []


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_our_own_cpu_time_is_no_disturbance() -> None:
    times = harness._cpu_times()
    assert times is not None
    assert 0 < times.own <= times.busy <= times.total


def test_every_case_is_in_eval_mode() -> None:
    for pending in SUITES["layers"]((52,), Variant(1, "bf16", CPU)):
        case = pending.build()
        assert not any(module.training for module in case.model.modules())
        assert case.dtype == "bf16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--suite", "layer"],
            "'layer' is not among the accepted: layers, stack, network, training, network-training,",
        ),
        (["--dtype", "fp32,fp8"], "--dtype: 'fp8' is not among the accepted: fp32, tf32, bf16, fp16"),
        (["--head", "13,14"], "--head: '14' is not among the accepted: 13, 26, 52"),
        (["--batch", "1,0"], "--batch: '0' is not a whole number of at least 1"),
        (["--rounds", "many"], "--rounds: 'many' is not a whole number of at least 1"),
        (["--seconds", "-1"], "--seconds: '-1' is not a number above 0"),
        (["--seconds", "soon"], "--seconds: 'soon' is not a number above 0"),
        (["--contenders", "eager,cublas"], "--contenders: 'cublas' is in none of the names: eager NCHW, eager"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu' (choose from"),
    ],
)
def test_a_bad_argument_is_refused_with_what_is_accepted(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "no CUDA device here; accepted: auto, cpu" in capsys.readouterr().err


def test_contenders_are_chosen_by_name_or_part_of_it() -> None:
    def chosen(text: str) -> list[str]:
        return [contender.name for contender in options._contenders(text)]

    assert chosen("torch.compile") == ["torch.compile"]
    assert chosen("EAGER,folded") == ["eager NCHW", "eager channels_last", "folded in-place"]


def test_the_layer_suite_has_each_shape_once() -> None:
    variant = Variant(1, "fp32", CPU)
    assert {suite: len(list(cases((13, 26, 52), variant))) for suite, cases in SUITES.items()} == {
        "layers": 11,
        "stack": 3,
        "network": 2,
        "training": 11,
        "network-training": 2,
        "scaling": 18,
        "overhead": 1,
    }
    names = [pending.build().name for pending in SUITES["layers"]((52,), variant)]
    assert names == ["52x52 1x1 384->128", "52x52 3x3 128->256", "52x52 1x1 256->128", "52x52 1x1 256->75"]


@pytest.mark.parametrize("name", [peers.EAGER_NCHW, peers.EAGER_CHANNELS_LAST, "folded in-place"])
def test_a_peer_is_right_and_leaves_the_model_as_it_was(name: str) -> None:
    (pending,) = SUITES["stack"]((52,), Variant(1, "fp32", CPU))
    case = pending.build()
    before = {key: (value.clone(), value.stride()) for key, value in case.model.state_dict().items()}
    (verdict,) = check_case(case, [peers.PEERS[name]], METHOD).verdicts
    assert (verdict.status, verdict.reason) == ("ok", None)
    for key, value in case.model.state_dict().items():
        assert torch.equal(value, before[key][0])
        assert value.stride() == before[key][1]


def test_folding_leaves_no_batch_norm_and_no_copying_activation() -> None:
    (pending,) = SUITES["stack"]((52,), Variant(1, "fp32", CPU))
    case = pending.build()
    with torch.no_grad():
        folded = peers.PEERS["folded in-place"].build(case.model, case.x).run
    assert isinstance(folded, nn.Module)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(module.inplace for module in folded.modules() if isinstance(module, nn.LeakyReLU))


def only_file(folder: Path) -> Any:
    (path,) = folder.rglob("*.json")
    return json.loads(path.read_text())


QUICK = [
    "--suite",
    "layers,stack",
    "--head",
    "52",
    "--quick",
    "--no-report",
    "--contenders",
    "eager",
    "--device",
    "cpu",
]


def test_a_quick_run_saves_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*QUICK, "--output", str(tmp_path)]) == 0
    content = only_file(tmp_path)
    assert content["complete"]
    assert content["settings"]["argv"][:2] == ["--suite", "layers,stack"]
    assert [case["suite"] for case in content["cases"]] == ["layers"] * 4 + ["stack"]
    for case in content["cases"]:
        plain, channels_last = case["results"]
        assert plain["status"] == channels_last["status"] == "ok"
        ratio = channels_last["ms"]["p50"] / plain["ms"]["p50"]
        assert plain["speedup"] == {"eager channels_last": pytest.approx(ratio)}
    assert "stack: 52x52, batch 1, fp32" in capsys.readouterr().out


def test_a_wrong_contender_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, peers.EAGER_NCHW, contender_of(peers.EAGER_NCHW, lambda y: y + 1))
    argv = [
        "--suite",
        "stack",
        "--head",
        "52",
        "--quick",
        "--no-report",
        "--contenders",
        "eager NCHW",
        "--output",
        str(tmp_path),
    ]
    assert run.main(argv) == 1
    assert only_file(tmp_path)["cases"][0]["results"][0]["status"] == "wrong"


def test_an_interrupted_run_is_exit_code_130_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The check is one call, each round two: the sixth is in the third round.
    monkeypatch.setitem(peers.PEERS, peers.EAGER_NCHW, replace(interrupting(after=6), name=peers.EAGER_NCHW))
    argv = [
        "--suite",
        "stack",
        "--head",
        "52",
        "--quick",
        "--no-report",
        "--contenders",
        "eager NCHW",
        "--output",
        str(tmp_path),
    ]
    # However slow the machine, three rounds fit.
    argv += ["--seconds", "1000"]
    assert run.main(argv) == 130
    content = only_file(tmp_path)
    assert not content["complete"]
    assert content["cases"][0]["results"][0]["rounds"] == 2


@pytest.mark.parametrize(
    ("height", "width", "grey"),
    [
        pytest.param(32, 16, (slice(None), slice(0, 16)), id="tall"),
        pytest.param(10, 40, (slice(0, 24), slice(None)), id="wide"),
    ],
)
def test_letterboxing_keeps_proportions_and_fills_with_grey(height: int, width: int, grey: tuple[slice, slice]) -> None:
    boxed = demo.letterbox(torch.ones(3, height, width), size=64)
    assert tuple(boxed.shape) == (1, 3, 64, 64)
    assert (boxed[0][:, *grey] == 0.5).all()
    assert boxed[0].mean() == pytest.approx(1 - 0.5 * (1 - min(height, width) / max(height, width)))


def test_the_photograph_is_there_without_a_download() -> None:
    image = demo.load_photograph(None)
    assert tuple(image.shape) == (3, 600, 512)
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        pytest.param("--image", None, "No such file or directory", id="no image"),
        pytest.param("--image", b"text", "cannot identify image file", id="not an image"),
        pytest.param("--weights", None, "No such file or directory", id="no weights"),
        pytest.param("--weights", b"text", "is not a checkpoint", id="not weights"),
    ],
)
def test_the_demo_says_which_file_it_cannot_read(
    tmp_path: Path, option: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=f"^demo: .*{message}") as caught:
        demo.main([option, str(file), "--output", str(tmp_path / "demo.png")])
    assert "given" in str(caught.value)


@pytest.mark.parametrize("panels", [1, 3, 4])
def test_the_chart_is_a_png_with_a_panel_for_each_case(tmp_path: Path, panels: int) -> None:
    demo.draw_chart([example_result()] * panels, tmp_path / "chart")
    assert (tmp_path / "chart").read_bytes().startswith(b"\x89PNG")


def test_the_record_of_a_run_holds_no_path_of_the_machine() -> None:
    assert run._without_output(["--a", "1", "--output", "there", "--b"]) == ["--a", "1", "--b"]
    assert run._without_output(["--output=there", "--b"]) == ["--b"]
