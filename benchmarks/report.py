"""One HTML page and PNGs from files of results: `python benchmarks/report.py FILE.json [MORE.json ...]`.

The page is one file that asks for nothing else. Files of several runs make one page, if they are of one device and, on
a CPU, of one number of threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reporting.analysis import merge, read_sources
from benchmarks.reporting.drawing import DARK, LIGHT, THEMES
from benchmarks.reporting.page import render
from benchmarks.reporting.plots import plots

EXIT_OK, EXIT_USAGE = 0, 2


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of files of results and, in a folder of its name, the PNGs in it.

    Args:
        output: a folder; by default that of the newest file, whose name both take.

    Returns:
        The page's path.

    Raises:
        OSError: a file cannot be opened, or the report not be written.
        ValueError: a file is none of results, or they are of different machines.
    """
    merged = merge(read_sources(paths))
    newest = merged.sources[-1].path
    page = (output or newest.parent) / f"{newest.stem}.html"
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        for stale in folder.glob(f"*-{theme.name}.png"):
            stale.unlink()
    pictures = [(plot, plot.png(LIGHT), plot.png(DARK)) for plot in plots(merged)]
    for plot, *drawn in pictures:
        for theme, png in zip(THEMES, drawn, strict=True):
            (folder / f"{plot.name}-{theme.name}.png").write_bytes(png)
    page.write_text(render(merged, pictures), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that `argv` asks for; returns 0, or 2 if the files cannot make one."""
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description="One HTML page of files of results.")
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="written by benchmarks/run.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: beside the newest file")
    options = parser.parse_args(argv)
    try:
        page = write_report(options.files, options.output)
    except (OSError, ValueError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(page)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
