"""The README's figures are those of the files of results that it names; `make readme` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from runs_for_tests import CONVERTED, EAGER, FREEZING, FROZEN, case, cpu_run, timed, write

from benchmarks import readme
from benchmarks.record import Result


def test_the_readme_is_what_its_files_say() -> None:
    found = readme.differences(ROOT)
    assert not found, "\n".join([*found, "make readme writes it"])


def test_the_readmes_figures_are_small() -> None:
    for path in readme.figures(readme.make(ROOT)):
        assert (ROOT / path).stat().st_size < 60_000


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    results = [
        timed("eager NCHW", 30),
        timed(EAGER, 20),
        timed(FREEZING, 11.0),
        timed(CONVERTED, 19),
        timed(FROZEN, 10.96),
    ]
    broken = [timed(EAGER, 8), Result(FREEZING, "failed", "no compiler"), timed(FROZEN, 0.5)]
    cases = [case("stack", "13x13", results, dtype="fp32"), case("network", "YOLOv3", broken, dtype="fp32")]
    write(cpu_run(*cases), tmp_path / "a.json")
    block = "<!-- begin results/cpu: a.json -->\nold\n<!-- end results/cpu -->\n"
    commands = "<!-- begin results/cpu/commands -->\n<!-- end results/cpu/commands -->\n"
    (tmp_path / "README.md").write_text(f"before\n{block}between\n{commands}behind\n", encoding="utf-8")
    return tmp_path


def test_the_readme_is_written_between_its_marks(checkout: Path) -> None:
    told = readme.differences(checkout)
    assert [line.partition(" is")[0] for line in told] == [
        "README.md: results/cpu",
        "README.md: results/cpu/commands",
        "docs/figures/results-cpu-light.png",
        "docs/figures/results-cpu-dark.png",
    ]
    assert all("make readme" in line for line in told)
    readme.write(checkout)
    assert readme.differences(checkout) == []
    said = (checkout / "README.md").read_text(encoding="utf-8")
    assert said.startswith("before\n<!-- begin results/cpu: a.json -->\n")
    assert "a CPU, 2 threads; PyTorch 2.13.0, oneDNN 3.12.0; pointfuse at commit fedcba987." in said
    assert (
        "| 13x13, batch 1, fp32 | 30.0 ms (0.67x) | 20.0 ms (1.00x) | **11.0 ms (1.82x)** | 19.0 ms (1.05x) "
        "| **11.0 ms (1.82x)** |" in said
    )
    assert "| YOLOv3, batch 1, fp32 | - | 8.0 ms (1.00x) | failed | - | **500.0 µs (16.00x)** |" in said
    assert "pointfuse frozen is 5.40x as fast as eager channels_last (1.82x to 16.00x)" in said.replace("\n", " ")
    assert "    python benchmarks/run.py --suite stack\n" in said
    assert said.endswith("behind\n")


def test_figures_that_change_are_found(checkout: Path) -> None:
    readme.write(checkout)
    content = json.loads((checkout / "a.json").read_text(encoding="utf-8"))
    content["cases"][0]["results"][4]["ms"]["p50"] = 12.0
    (checkout / "a.json").write_text(json.dumps(content), encoding="utf-8")
    found = readme.differences(checkout)
    assert [line.partition(" ")[0] for line in found] == [
        "README.md:",
        "docs/figures/results-cpu-light.png",
        "docs/figures/results-cpu-dark.png",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param((": a.json", ""), "results/cpu names no file", id="no file named"),
        pytest.param(("a.json", "b.json"), "No such file", id="a file that is not there"),
        pytest.param(
            ("cpu/commands", "gpu/commands"),
            "of results/gpu, which is no block",
            id="no files for the commands",
        ),
        pytest.param(("end results/cpu -->", "end -->"), "has no <!-- end results/cpu -->", id="no end"),
        pytest.param(("<!-- begin", "<!-- start"), "has no block", id="no block"),
    ],
)
def test_a_readme_that_cannot_be_made_is_refused(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    said: str,
) -> None:
    path = checkout / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    monkeypatch.setattr(readme, "ROOT", checkout)
    assert readme.main(["--check"]) == 2
    assert said in capsys.readouterr().err
