"""What a run shows on the terminal: a progress bar with the time left, and a table for each case."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.harness import CaseResult, Result

# Above what the system's own upkeep takes on an idle machine.
DISTURBED = 0.05


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def case_table(case: CaseResult, baselines: Sequence[str]) -> Table:
    """One row for each contender: latency quantiles, how many times as fast as each baseline, error; reasons below."""
    title = f"{case.suite}: {case.name}, batch {case.batch}, {case.dtype}"
    table = plain_table(title, "contender", "20% ms", "median ms", "80% ms", *(f"x {b}" for b in baselines), "error")
    for result in case.results:
        table.add_row(*timing_cells(result, baselines), "-" if result.error is None else f"{result.error:.1e}")
    add_notes(table, [*reasons(case.results), *disturbances([case])])
    return table


def plain_table(title: str, first: str, *figures: str) -> Table:
    """An empty table of one column of names and columns of figures, narrow enough for a terminal of 80 characters."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in figures:
        # Rich breaks a heading at spaces alone.
        table.add_column(heading.replace("_", " ").replace(".", " ."), justify="right")
    return table


def add_notes(table: Table, notes: Sequence[str]) -> None:
    """Lines below a table, each of them once."""
    if notes:
        table.caption = escape("\n".join(dict.fromkeys(notes)))
        table.caption_justify = "left"


def reasons(results: Sequence[Result]) -> list[str]:
    """Why contenders have no figures."""
    return [f"{result.contender}: {result.status}, {result.reason}" for result in results if result.reason]


def disturbances(cases: Sequence[CaseResult]) -> list[str]:
    """A warning for each case in which other processes ran beside the timing."""
    return [
        f"{case.name}: other processes took {case.disturbance:.0%} of the CPU; the figures are not reliable"
        for case in cases
        if case.disturbance is not None and case.disturbance > DISTURBED
    ]


def timing_cells(result: Result, baselines: Sequence[str]) -> list[str]:
    """A contender's name, its three quantiles in milliseconds, and how many times as fast as each baseline it is."""
    if result.ms is None:
        return [result.contender, result.status, *["-"] * (2 + len(baselines))]
    quantiles = [f"{ms:.{2 if ms < 1000 else 0}f}" for ms in (result.ms.p20, result.ms.p50, result.ms.p80)]
    return [
        result.contender,
        *quantiles,
        *(f"{result.speedup[name]:.2f}" if name in result.speedup else "-" for name in baselines),
    ]
