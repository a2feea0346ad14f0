"""Writes the README's figures from files of results: `python benchmarks/readme.py`, or `make readme`.

What stands between two lines such as

    <!-- begin results/cpu: benchmarks/results/DEVICE/FILE.json [MORE.json ...] -->
    <!-- end results/cpu -->

is made from the files that the first line names; between `begin results/cpu/commands` and its end, the commands that
made those files. With `--check` nothing is written, and the exit code is 1 if anything would be.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import machine
from benchmarks.peers import (
    COMPILED_AUTOTUNED,
    COMPILED_FREEZING,
    CONVERTED,
    CUDA_FROZEN,
    CUDNN_GRAPH,
    EAGER_CHANNELS_LAST,
    EAGER_NCHW,
    FROZEN,
    TRITON_FROZEN,
)
from benchmarks.record import CaseResult, Result
from benchmarks.reporting.analysis import (
    Merged,
    case_label,
    command,
    commit_of,
    counted,
    merge,
    read_sources,
    spread,
    times_as_fast,
    versions_text,
)
from benchmarks.reporting.caveats import unsteady
from benchmarks.reporting.drawing import THEMES, Plot, digest_of
from benchmarks.reporting.plots import speedup_plot

ROOT = Path(__file__).resolve().parents[1]
FIGURES = Path("docs/figures")
SUITES = ("stack", "network")
COLUMNS = (
    EAGER_NCHW, EAGER_CHANNELS_LAST, COMPILED_FREEZING, COMPILED_AUTOTUNED, CUDNN_GRAPH, CONVERTED, FROZEN,
    CUDA_FROZEN, TRITON_FROZEN,
)  # fmt: skip
HOW = "python benchmarks/readme.py, or make readme, writes it"
EXIT_OK, EXIT_DIFFERS, EXIT_USAGE = 0, 1, 2

_BLOCK = re.compile(r"(<!-- begin (\S+?)(?:: (.+?))? -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)
_COMMANDS = "/commands"


@dataclass(frozen=True)
class Made:
    """The text of the README as its files of results make it, and its figures by name."""

    text: str
    plots: tuple[Plot, ...]


def make(root: Path) -> Made:
    """What the README of a checkout should be.

    Raises:
        OSError: a file that it names cannot be read.
        ValueError: it has no block, or a block of it cannot be made.
    """
    readme = (root / "README.md").read_text(encoding="utf-8")
    blocks = {match[2]: (match[3] or "").split() for match in _BLOCK.finditer(readme)}
    if not blocks:
        raise ValueError("README.md has no block <!-- begin NAME: FILE ... --> with its <!-- end NAME -->")
    if lost := [name for name in re.findall(r"<!-- begin (\S+?)(?::| -->)", readme) if name not in blocks]:
        raise ValueError(f"README.md: <!-- begin {lost[0]} --> has no <!-- end {lost[0]} -->")
    merged = {name: _merged(root, name, files) for name, files in blocks.items() if not name.endswith(_COMMANDS)}
    plots = {name: _plot(name, of) for name, of in merged.items()}

    def text_of(match: re.Match[str]) -> str:
        begin, name, end = match[1], match[2], match[5]
        parent = name.removesuffix(_COMMANDS)
        if parent not in merged:
            raise ValueError(f"README.md: {name} is of {parent}, which is no block")
        text = commands(merged[parent]) if name != parent else results(merged[name], plots[name])
        return f"{begin}{text}\n{end}"

    return Made(_BLOCK.sub(text_of, readme), tuple(plots.values()))


def differences(root: Path) -> list[str]:
    """What `make` would change: nothing in a checkout as it should be. Raises as `make` does."""
    made = make(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    texts = ({match[2]: match[0] for match in _BLOCK.finditer(text)} for text in (readme, made.text))
    before, after = texts
    found = [f"README.md: {name} is not what its files say: {HOW}" for name in after if before[name] != after[name]]
    for plot in made.plots:
        for path in _files(plot):
            if not (root / path).is_file():
                found.append(f"{path} is missing: {HOW}")
            elif digest_of((root / path).read_bytes()) != plot.digest:
                found.append(f"{path} shows other figures than its files: {HOW}")
    return found


def figures(made: Made) -> list[Path]:
    """The paths of its figures in a checkout."""
    return [path for plot in made.plots for path in _files(plot)]


def write(root: Path) -> None:
    """Write the README and its figures; raises as `make` does."""
    made = make(root)
    for plot in made.plots:
        for path, theme in zip(_files(plot), THEMES, strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(plot.png(theme))
    (root / "README.md").write_text(made.text, encoding="utf-8")


def results(merged: Merged, plot: Plot) -> str:
    """What was measured on what, a table of medians, their geometric means, and the figure."""
    cases, columns = _cases(merged), _columns(merged)
    run = merged.newest
    commits = ", ".join(dict.fromkeys(commit_of(source.run) for source in merged.sources))
    versions = versions_text(run.versions, ("torch", "onednn", "cuda", "cudnn", "triton"))
    where = f"{machine(run)}; {versions}; pointfuse at commit {commits}."
    if not merged.complete:
        where += " Not all that was asked for was run."
    parts = [_wrapped(" ".join([where, *unsteady(merged)])), _table(cases, columns), _wrapped(_means(cases, columns))]
    return "\n\n".join([*parts, _picture(plot)])


def commands(merged: Merged) -> str:
    """What made each of the files, as a block of code."""
    blocks = [f"    # {source.name}\n    {command(source.run)}" for source in merged.sources]
    return "\n" + "\n".join(blocks) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the README, or check it; returns 0, or 1 if the check found a difference, or 2 if it cannot be made."""
    parser = argparse.ArgumentParser(prog="benchmarks/readme.py", description="The README's figures, from results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    options = parser.parse_args(argv)
    try:
        if options.check:
            found = differences(ROOT)
            print("\n".join(found) or "README.md is what its files of results say")
            return EXIT_DIFFERS if found else EXIT_OK
        write(ROOT)
    except (OSError, ValueError) as error:
        print(f"readme.py: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


def _merged(root: Path, name: str, files: Sequence[str]) -> Merged:
    if not files:
        raise ValueError(f"README.md: {name} names no file; it must, as in <!-- begin {name}: FILE.json -->")
    merged = merge(read_sources(root / file for file in files))
    if not _cases(merged):
        raise ValueError(f"README.md: the files of {name} have no case of {' or '.join(SUITES)}")
    return merged


def _cases(merged: Merged) -> list[CaseResult]:
    """Those of the table, in the order of `SUITES`."""
    return [case for suite in SUITES for case in merged.cases if case.suite == suite and case.complete]


def _columns(merged: Merged) -> list[str]:
    took_part = {result.contender for case in _cases(merged) for result in case.results}
    return [name for name in COLUMNS if name in took_part]


def _plot(name: str, merged: Merged) -> Plot:
    return speedup_plot(_cases(merged), [n for n in _columns(merged) if n != EAGER_CHANNELS_LAST], name)


def _files(plot: Plot) -> Iterator[Path]:
    """Of each theme, in a checkout."""
    return (FIGURES / f"{plot.name.replace('/', '-')}-{theme.name}.png" for theme in THEMES)


def _table(cases: Iterable[CaseResult], columns: Sequence[str]) -> str:
    rows = [["median latency", *columns], ["---"] * (1 + len(columns))]
    rows += [[case_label(case), *_cells(case, columns)] for case in cases]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")


def _cells(case: CaseResult, columns: Sequence[str]) -> list[str]:
    """Medians, in brackets how many times as fast as eager; the fastest, as far as the figures tell, in bold."""
    cells = [_cell(case, case.result(name)) for name in columns]
    medians = [r.ms.p50 for name in columns if (r := case.result(name)) is not None and r.ms is not None]
    least = _milliseconds(min(medians)) if medians else None
    return [f"**{cell}**" if least and cell.startswith(f"{least} ") else cell for cell in cells]


def _cell(case: CaseResult, result: Result | None) -> str:
    if result is None:
        return "-"
    if result.ms is None:
        return result.status
    ratio = times_as_fast(result, case.result(EAGER_CHANNELS_LAST))
    return _milliseconds(result.ms.p50) + ("" if ratio is None else f" ({ratio:.2f}x)")


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value >= 1 else f"{value * 1e3:.1f} µs"


def _means(cases: Sequence[CaseResult], columns: Sequence[str]) -> str:
    """How pointfuse's contenders stand against eager and the best of the compilers, by geometric means and ranges."""
    others = [name for name in (EAGER_CHANNELS_LAST, COMPILED_FREEZING, COMPILED_AUTOTUNED) if name in columns]
    told = []
    for ours in (name for name in columns if name.startswith("pointfuse")):
        spreads = {n: spread(times_as_fast(case.result(ours), case.result(n)) for case in cases) for n in others}
        parts = [f"{s.mean:.2f}x as fast as {n} ({s.low:.2f}x to {s.high:.2f}x)" for n, s in spreads.items() if s]
        if parts:
            told.append(f"{ours} is {' and '.join(parts)}")
    return f"Geometric means over these {counted(cases)}, and the ranges: {'; '.join(told)}." if told else ""


def _picture(plot: Plot) -> str:
    light, dark = _files(plot)
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark.as_posix()}">\n'
        f'  <img src="{light.as_posix()}" width="768" alt="{plot.alt}">\n'
        "</picture>"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
