"""``benchmarks/run.py --compare``: what is beyond the noise is told, and a regression of pointfuse's is exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import run
from benchmarks.compare import Change, compare
from benchmarks.record import CaseResult, Quantiles, Result, report, write_json

EAGER, FROZEN = "eager channels_last", "pointfuse frozen"


def result(contender: str, ms: float | None, spread: float = 0.02, rounds: int = 100, status: str = "ok") -> Result:
    """``spread`` is what lies between the 20% and the 80% quantile, over the median."""
    quantiles = None if ms is None else Quantiles(ms * (1 - spread / 2), ms, ms * (1 + spread / 2))
    return Result(contender, status, ms=quantiles, rounds=rounds)


def case(*results: Result, name: str = "13x13", suite: str = "stack") -> CaseResult:
    return CaseResult(suite, name, 1, "fp32", (1, 3, 8, 8), results, True)


def change(before: list[Result], after: list[Result], contender: str = FROZEN) -> Change:
    (found,) = [c for c in compare([case(*before)], [case(*after)]) if c.contender == contender]
    return found


@pytest.mark.parametrize(
    ("after", "spread", "rounds", "verdict"),
    [
        pytest.param(12.0, 0.02, 100, "slower", id="slower"),
        pytest.param(8.0, 0.02, 100, "faster", id="faster"),
        pytest.param(10.15, 0.0, 100, "same", id="less than what two runs of the same code differ by"),
        pytest.param(10.6, 0.02, 100, "slower", id="beyond the noise"),
        pytest.param(10.6, 0.4, 10, "same", id="within the noise of few and scattered timings"),
        pytest.param(10.6, 0.4, 2000, "slower", id="beyond the noise of many timings"),
    ],
)
def test_a_difference_counts_beyond_the_noise(after: float, spread: float, rounds: int, verdict: str) -> None:
    found = change([result(FROZEN, 10.0, spread, rounds)], [result(FROZEN, after, spread, rounds)])
    assert found.verdict == verdict
    assert found.by_clock is not None
    assert found.by_clock.speed == pytest.approx(10.0 / after)
    assert found.is_regression == (verdict == "slower")


def test_a_machine_that_is_slower_as_a_whole_is_no_regression() -> None:
    before = [result(EAGER, 20.0), result(FROZEN, 10.0)]
    after = [result(EAGER, 24.0), result(FROZEN, 12.0)]
    assert change(before, after).verdict == "same"
    baseline = change(before, after, EAGER)
    assert (baseline.verdict, baseline.by_baseline, baseline.is_regression) == ("slower", None, False)


def test_a_baseline_that_became_faster_is_no_regression() -> None:
    before, after = [result(EAGER, 26.0), result(FROZEN, 10.0)], [result(EAGER, 20.0), result(FROZEN, 10.0)]
    assert change(before, after).verdict == "same"


def test_what_both_measures_show_counts() -> None:
    before, after = [result(EAGER, 20.0), result(FROZEN, 10.0)], [result(EAGER, 21.0), result(FROZEN, 12.0)]
    found = change(before, after)
    assert found.is_regression
    assert found.by_baseline is not None
    assert found.by_baseline.speed == pytest.approx(10 / 12 * 21 / 20)


def test_the_noise_of_the_baseline_is_noise_too() -> None:
    before = [result(EAGER, 20.0, spread=0.5, rounds=10), result(FROZEN, 10.0)]
    after = [result(EAGER, 20.0, spread=0.5, rounds=10), result(FROZEN, 11.0)]
    assert change(before, after).verdict == "same"
    assert change(before[1:], after[1:]).verdict == "slower"


def test_the_noise_is_three_standard_errors_of_the_ratio() -> None:
    """Of normal timings: quantiles 0.8416 deviations to either side, and a median's error of 1.2533 / √n deviations."""
    found = change([result(FROZEN, 10.0, 0.3, 25)], [result(FROZEN, 10.0, 0.3, 25)])
    deviation = 0.3 / (2 * 0.8416)
    assert found.by_clock is not None
    assert found.by_clock.noise == pytest.approx(3 * 2**0.5 * 1.2533 * deviation / 5, rel=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        pytest.param(result(FROZEN, 10.0), result(FROZEN, None, status="wrong"), "broken", id="wrong now"),
        pytest.param(result(FROZEN, 10.0), result(FROZEN, None, status="failed"), "broken", id="fails now"),
        pytest.param(result(FROZEN, None, status="failed"), result(FROZEN, 10.0), "mended", id="runs now"),
    ],
)
def test_what_no_longer_runs_is_a_regression(before: Result, after: Result, verdict: str) -> None:
    found = change([before], [after])
    assert (found.verdict, found.by_clock, found.is_regression) == (verdict, None, verdict == "broken")


def test_only_what_both_ran_is_compared() -> None:
    before = [case(result(FROZEN, 1.0)), case(result(FROZEN, 1.0), name="26x26")]
    after = [
        case(result(EAGER, 1.0), result(FROZEN, None, status="interrupted")),
        case(result(FROZEN, 1.0), name="52x52"),
    ]
    assert compare(before, after) == []


def write(path: Path, milliseconds: float, device: str = "a CPU", name: str = "13x13") -> Path:
    made = case(result(EAGER, 20.0), result(FROZEN, milliseconds), name=name)
    content = report([made], torch.device("cpu"), {}, complete=True)
    write_json(path, {**content, "device": device, "machine": {"cpu": "a CPU", "threads": 2}})
    return path


@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (12.0, 1), (8.0, 0)], ids=["as before", "slower", "faster"])
def test_the_exit_code_tells_of_regressions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: float, code: int
) -> None:
    files = [write(tmp_path / "a.json", 10.0), write(tmp_path / "b.json", after)]
    assert run.main(["--compare", *map(str, files)]) == code
    shown = capsys.readouterr().out
    assert [word for word in ("slower", "faster") if word in shown] == {10: [], 12: ["slower"], 8: ["faster"]}[after]
    assert f"{2 if after == 10 else 1} of 2 are as before" in shown


def test_the_command_compares(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", 10.0), write(tmp_path / "b.json", 12.0)]
    command = [sys.executable, "-m", "pointfuse", "bench", "--compare", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "1.2" not in done.stderr) == (1, True)
    assert "0.833" in done.stdout


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other = write(tmp_path / "a.json", 10.0), write(tmp_path / "b.json", 10.0, device="a GPU")
    empty = tmp_path / "c.json"
    empty.write_text("{}", encoding="utf-8")
    elsewhere = write(tmp_path / "d.json", 10.0, name="26x26")
    for second, said in [
        (other, "is of a CPU, 2 threads and"),
        (empty, "is not a file of results"),
        (elsewhere, "have no case with a contender in common"),
        (tmp_path / "e.json", "No such file"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run.main(["--compare", str(a), str(second)])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
    assert run.main(["--compare", str(a), str(other), "--any-machine"]) == 0
    with pytest.raises(SystemExit):
        run.main(["--any-machine"])
    assert "only with --compare" in capsys.readouterr().err
