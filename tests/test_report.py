"""The report of a benchmark: its numbers, what it refuses, its plots, and its page in a browser."""

from __future__ import annotations

import html
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image, ImageColor
from runs_for_tests import (
    COMPILED,
    CONVERTED,
    CUDA,
    EAGER,
    EVIL,
    FREEZING,
    FROZEN,
    RECOMPUTE,
    TRITON,
    case,
    cpu_run,
    gpu_run,
    timed,
    write,
)

from benchmarks import report
from benchmarks.record import Result, read_cases
from benchmarks.reporting import analysis, caveats, page, plots
from benchmarks.reporting.analysis import Merged, Source, merge
from benchmarks.reporting.drawing import DARK, LIGHT, Theme, digest_of

COMPILED_CONVERTED = "torch.compile of converted"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED = [path for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")) if path.name in README]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def merged(*runs: Any) -> Merged:
    return merge([Source(Path(f"{index}.json"), run) for index, run in enumerate(runs)])


def one(*results: Result, **more: Any) -> Merged:
    return merged(cpu_run(case("stack", "13x13", results, dtype="fp32", **more)))


def test_the_means_are_geometric_and_of_the_fastest_of_each_side() -> None:
    first = case("stack", "a", [timed(EAGER, 40), timed(FREEZING, 20), timed(CONVERTED, 30), timed(FROZEN, 10)])
    second = case("stack", "b", [timed(EAGER, 40), timed(FREEZING, 45), timed(CONVERTED, 20), timed(FROZEN, 80)])
    (group,) = analysis.summarise([first, second])
    assert group.label == "stack, bf16"
    assert group.over_eager == analysis.Spread(pytest.approx(8**0.5), 2.0, 4.0, 2)
    assert group.over_other == analysis.Spread(2.0, 2.0, 2.0, 2)
    assert group.behind == 0


def test_groups_are_apart_by_suite_dtype_and_way_of_running() -> None:
    labels = [group.label for group in analysis.summarise(gpu_run().cases)]
    assert labels == [
        "layers, bf16, cold L2, CUDA graphs",
        "layers, bf16, warm L2, CUDA graphs",
        "scaling, bf16, cold L2, CUDA graphs",
        "training, bf16, autocast, cold L2, no CUDA graphs",
    ]


@pytest.mark.parametrize(
    ("ours", "is_behind"),
    [
        pytest.param(timed(FROZEN, 10.19), False, id="within 2 percent"),
        pytest.param(timed(FROZEN, 10.21), True, id="more than 2 percent slower"),
        pytest.param(timed(FROZEN, 5), False, id="faster"),
        pytest.param(Result(FROZEN, "failed", "no kernel"), True, id="failed"),
    ],
)
def test_what_is_not_faster_is_told(ours: Result, is_behind: bool) -> None:
    found = analysis.behind([case("stack", "13x13", [timed(EAGER, 20), timed(FREEZING, 10), ours])])
    assert [standing.other.contender for standing in found if standing.other] == [FREEZING] * is_behind


def test_the_worst_comes_first_and_what_has_no_answer_before_it() -> None:
    slow = [case("stack", f"{ms}", [timed(EAGER, 10), timed(FROZEN, ms)]) for ms in (11, 15, 12)]
    broken = case("stack", "broken", [timed(EAGER, 10), Result(FROZEN, "wrong", "3 times the tolerance")])
    assert [s.case.name for s in analysis.behind([*slow, broken])] == ["broken", "15", "12", "11"]


def test_a_compiled_converted_model_counts_on_neither_side() -> None:
    (standing,) = analysis.standings(
        [case("stack", "a", [timed(EAGER, 9), timed(COMPILED_CONVERTED, 1), timed(FROZEN, 3)])]
    )
    assert standing.over_other == 3.0
    assert analysis.standings([case("stack", "a", [timed(EAGER, 9), timed(COMPILED_CONVERTED, 1)])]) == []


def test_a_case_cut_short_is_in_no_mean() -> None:
    assert analysis.standings([case("stack", "a", [timed(EAGER, 9), timed(FROZEN, 3)], complete=False)]) == []


def test_the_fraction_of_the_floor() -> None:
    found = case("layers", "a", [timed(EAGER, 0.04), Result(FROZEN, "failed")], floor_us=10.0)
    assert [analysis.of_floor(found, result) for result in found.results] == [0.25, None]
    rows = page.table("layers", [found]).rows
    assert any(cell.text == "25%" and cell.value == "0.25" for cell in rows[0].cells)


def test_of_a_case_measured_twice_the_fuller_counts_then_the_newest() -> None:
    full = [timed(EAGER, 10), timed(FROZEN, 5)]
    runs = [
        cpu_run(case("stack", "a", full), case("stack", "b", full), date="2026-01-01T00:00:00+00:00"),
        cpu_run(case("stack", "a", [timed(EAGER, 7)]), case("stack", "b", [timed(EAGER, 8), timed(FROZEN, 2)])),
    ]
    found = merged(*reversed(runs))
    medians = {c.name: [r.ms.p50 for r in c.results if r.ms] for c in found.cases}
    assert medians == {"a": [10, 5], "b": [8, 2]}
    assert found.measured_again == 2
    assert any("2 cases were measured again" in warning for warning in caveats.warnings(found))


def test_curves_that_cross_keep_their_points() -> None:
    found = merged(gpu_run())
    assert (len(found.cases), found.measured_again) == (len(gpu_run().cases), 0)
    assert {(c.axis, c.at) for c in found.cases if c.axis} >= {("batch", 64), ("plane", 26), ("channels", 256)}


def test_what_makes_figures_less_than_they_seem_is_at_the_top() -> None:
    told = "\n".join(caveats.warnings(merged(gpu_run())))
    for words in (
        "0.json is incomplete: the run ended before its last case; 7 cases were not run",
        "1 case was skipped",
        f"Wrong answers: 1, of {CUDA}",
        f"Could not run: 2, of {TRITON}",
        "up to 31% of the CPU",
        "did not run evenly in 4 cases: the last third of the timing took 1.21 times",
        "a ceiling changed by -10%",
    ):
        assert words in told
    assert caveats.warnings(one(timed(EAGER, 2), timed(FROZEN, 1), drift=1.04, disturbance=0.01)) == []


def test_the_page_tells_what_was_run() -> None:
    said = text_of(page.render(merged(gpu_run()), []))
    for words in (
        "NVIDIA H100 80GB HBM3",
        "python benchmarks/run.py --suite layers,scaling,training --dtype bf16",
        "012345678 with changes",
        "CUDA graphs on, of training steps off; L2 cache cold and warm",
        "copy 3 TB/s (-10.0% after the last case); matrix product bf16 700 TFLOP/s (-1.4% after the last case)",
        "1755 to 1980 MHz",
        "41 to 55 °C",
        "no: 7 cases left",
        "PyTorch 2.13.0+cu130",
    ):
        assert words in said
    assert "2 threads of 4 cores" in text_of(page.render(one(timed(EAGER, 1)), []))


def test_an_old_file_without_conditions_makes_a_page() -> None:
    """The dataclasses' defaults: what a file does not have is not told."""
    said = text_of(page.render(one(timed(EAGER, 2), timed(FROZEN, 1)), []))
    for words in ("clock", "worst drift", "ceilings", "of floor", "saved MB", "Before you read"):
        assert words not in said
    assert "2.00x" in said


def test_what_results_say_is_text_on_the_page() -> None:
    made = page.render(merged(gpu_run()), [])
    assert EVIL not in made
    assert made.count(html.escape(EVIL).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) == 4
    assert made.count("<script") == 1


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", markup)))


def test_only_plots_whose_data_exist() -> None:
    names = [plot.name for plot in plots.plots(merged(gpu_run()))]
    kinds = [name.partition("-")[0] for name in names]
    assert [kinds.count(kind) for kind in ("gains", "latency", "roofline", "scaling", "memory")] == [1, 4, 2, 1, 1]
    assert [plot.name for plot in plots.plots(one(timed(EAGER, 1)))] == ["latency-stack-batch-1-fp32"]
    for more in ({}, {"axis": "batch", "at": 1}):
        assert plots.plots(one(Result(FROZEN, "failed", "no kernel"), **more)) == []


def test_a_curve_of_nearly_one_latency_has_an_axis_that_can_be_read() -> None:
    points = [case("scaling", f"{at}", [timed(EAGER, 1.1 + at / 100)], axis="channels", at=at) for at in (1, 16)]
    (plot,) = plots.plots(merged(cpu_run(*points)))
    axes, *_ = plot.draw(LIGHT).axes
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2
    assert list(axes.get_xticks()) == [1, 16]


def test_alternative_texts_say_what_is_seen() -> None:
    alts = {"-".join(plot.name.split("-")[:2]): plot.alt for plot in plots.plots(merged(gpu_run()))}
    assert "1.54 times as fast as eager channels_last" in alts["gains"]
    assert f"{CONVERTED} keeps 0.60 times what eager channels_last keeps" in alts["memory-training"]
    assert f"{CUDA} at 1 (18 µs), {CUDA} at 64 (648 µs)" in alts["scaling-bf16"]
    assert "under 700 TFLOP/s and 3 TB/s, pointfuse at 50% to 89% of the floor's speed" in alts["roofline-scaling"]


def test_a_contender_has_one_colour_and_ours_differ_from_all_others() -> None:
    names = [EAGER, COMPILED, FREEZING, CONVERTED, RECOMPUTE, FROZEN, CUDA, TRITON]
    for theme in (LIGHT, DARK):
        assert len({plots.colour(name, theme) for name in names}) == len(names)


def test_a_picture_tells_which_figures_it_shows() -> None:
    (first,), (second,) = (plots.plots(one(timed(EAGER, ms))) for ms in (1, 2))
    assert first.digest != second.digest
    assert digest_of(first.png(LIGHT)) == digest_of(first.png(DARK)) == first.digest


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_a_picture_has_the_pages_background(theme: Theme) -> None:
    (plot,) = plots.plots(one(timed(EAGER, 1)))
    with Image.open(io.BytesIO(plot.png(theme))) as image:
        corner = image.convert("RGB").getpixel((0, 0))
    assert corner == ImageColor.getrgb(theme.background)


def test_points_make_curves_by_what_grows() -> None:
    curves = plots.curves([c for c in gpu_run().cases if c.axis])
    sizes = {label: [point.at for point in curve] for label, curve in curves.items()}
    assert sizes == {
        "over batch: 26x26 1x1 256->256": [1, 4, 16, 64],
        "over plane, batch 8: 1x1 256->256": [13, 26, 52],
        "over channels, batch 8: 26x26 1x1": [64, 256, 1024],
    }
    both = [case("scaling", f"{at}x{at} {k}", [], axis="plane", at=at) for at in (13, 1) for k in ("1x1", "3x3")]
    sizes = {label: [point.at for point in curve] for label, curve in plots.curves(both).items()}
    assert sizes == {"over plane, batch 1: 1x1": [1, 13], "over plane, batch 1: 3x3": [1, 13]}


def test_files_of_different_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = cpu_run(threads=2), cpu_run(threads=4)
    files = [str(write(run, tmp_path / f"{name}.json")) for name, run in (("a", few), ("b", many), ("c", gpu_run()))]
    for second in files[1:]:
        assert report.main([files[0], second]) == 2
        assert (
            "files of one device, with one number of threads, make one report: a.json is of" in capsys.readouterr().err
        )
    assert list(tmp_path.glob("*.html")) == []


def test_what_is_no_file_of_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    for name, said in (("a.json", "is not a file of results"), ("b.json", "No such file")):
        assert report.main([str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_several_files_make_one_page_named_after_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = [timed(EAGER, 10), timed(FROZEN, 5)]
    new = write(cpu_run(case("stack", "a", full), date="2026-02-01T00:00:00+00:00"), tmp_path / "new.json")
    old = write(cpu_run(case("stack", "b", full), date="2026-01-01T00:00:00+00:00"), tmp_path / "old.json")
    (tmp_path / "out" / "new").mkdir(parents=True)
    (tmp_path / "out" / "new" / "stale-dark.png").touch()
    assert report.main([str(new), str(old), "--output", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "new.html"
    assert capsys.readouterr().out.strip() == str(written)
    assert "new.json" in (said := text_of(written.read_text(encoding="utf-8")))
    assert "old.json" in said
    names = {path.name for path in (tmp_path / "out" / "new").iterdir()}
    assert names == {
        f"{name}-{theme}.png" for name in ("gains", "latency-stack-batch-1-bf16") for theme in ("light", "dark")
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    return report.write_report([write(gpu_run(), tmp_path_factory.mktemp("report") / "gpu.json")])


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the files that the README names."""
    return report.write_report(NAMED, tmp_path_factory.mktemp("committed"))


class Opened:
    """A page in the browser, with what went wrong and what was asked for since it was opened."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __call__(self, script: str, *given: Any) -> Any:
        return self.page.evaluate(script, *given)


@pytest.mark.parametrize("which", ["everything", "committed"])
def test_the_page_is_whole_and_loads_nothing_else(which: str, browser: Any, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    files = NAMED if which == "committed" else [path.with_suffix(".json")]
    opened = Opened(browser, path)
    assert opened.wrong == []
    assert {url.partition(":")[0] for url in opened.requests} <= {"file", "data"}
    assert [url for url in opened.requests if url.startswith("file:")] == [path.as_uri()]
    widths = opened("[...document.images].map(image => [image.naturalWidth, image.alt.length])")
    pictures = len(list(path.with_suffix("").glob("*-light.png")))
    assert len(widths) == pictures > 0
    assert all(width > 0 and alt > 20 for width, alt in widths)
    suites = opened(
        "[...document.querySelectorAll('details.suite')].map(d => [d.open, d.querySelectorAll('tr').length])"
    )
    assert [is_open for is_open, _ in suites] == [True] + [False] * (len(suites) - 1)
    # What was measured twice is shown once.
    cases = {(case.title, case.axis): case for file in files for case in read_cases(file)}
    assert sum(rows - 1 for _, rows in suites) == sum(len(case.results) for case in cases.values())
    assert opened("document.querySelector('.summary tbody').rows.length") > 0
    assert path.stat().st_size < 1_500_000


def column(opened: Opened, name: str) -> list[str]:
    """The texts of a column of the first suite's table, from top to bottom."""
    script = """name => {
        const table = document.querySelector("table.sortable");
        const index = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === name);
        return [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
    }"""
    found: list[str] = opened(script, name)
    return found


@pytest.mark.parametrize(("name", "without"), [("median µs", 3), ("error", 2)], ids=["latency", "error"])
def test_a_heading_sorts_by_number_and_what_has_none_stays_last(
    everything: Path, browser: Any, name: str, without: int
) -> None:
    opened = Opened(browser, everything)
    headers = opened.page.locator("table.sortable").first.locator("th")
    header = headers.filter(has_text=name)
    before, names = column(opened, name), column(opened, "contender")
    figures = sorted((text for text in before if text[:1].isdigit()), key=float)
    others = [text for text in before if not text[:1].isdigit()]
    assert len(others) == without
    assert before != figures + others
    assert names != sorted(names)
    assert header.get_attribute("aria-sort") == "none"
    header.locator("button").click()
    assert column(opened, name) == figures + others
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").press("Enter")
    assert column(opened, name) == figures[::-1] + others
    assert header.get_attribute("aria-sort") == "descending"
    headers.filter(has_text="contender").locator("button").click()
    assert column(opened, "contender") == sorted(names)
    assert header.get_attribute("aria-sort") == "none"


@pytest.mark.parametrize("which", ["everything", "committed"])
def test_a_phone_does_not_scroll_sideways(which: str, browser: Any, request: pytest.FixtureRequest) -> None:
    opened = Opened(browser, request.getfixturevalue(which), width=360)
    opened("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert opened("document.documentElement.scrollWidth") <= 360
    assert opened("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)], ids=["light", "dark"])
def test_the_page_follows_the_colour_scheme(everything: Path, browser: Any, scheme: str, theme: Theme) -> None:
    opened = Opened(browser, everything, scheme=scheme)
    card = opened("getComputedStyle(document.querySelector('.card#short')).backgroundColor")
    assert tuple(map(int, re.findall(r"\d+", card))) == ImageColor.getrgb(theme.background)
    luminance = opened("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).slice(0, 3)")
    assert (max(luminance) < 64) == (scheme == "dark")
    chosen = opened("[...document.images].map(i => i.currentSrc === i.previousElementSibling.srcset)")
    assert set(chosen) == {scheme == "dark"}
