"""What a run shows on the terminal: a progress bar with the time left, a table for each case, and two at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.peers import CUDA_FROZEN
from benchmarks.record import CaseResult, Result
from benchmarks.roofline import Ceilings
from benchmarks.targets import Target, best_other, microseconds, speedup, times_floor

# Above what the system's own upkeep takes on an idle machine.
DISTURBED = 0.05
# Above what the thirds of a quiet run differ by.
DRIFTED = 0.05
LOG_WIDTH = 120

_MEMORY = {"saved_bytes": "saved MB", "peak_bytes": "peak MB"}


def wide_console() -> Console:
    """A console that gives tables room where the output is no terminal, as in a log."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


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
    """One row for each contender: latency quantiles, over the floor, over each baseline, error, of a training step the
    memory that it keeps for the backward and its peak; reasons below.

    Latencies are in microseconds where all medians are below a millisecond.
    """
    medians = [result.ms.p50 for result in case.results if result.ms is not None]
    unit = "us" if medians and max(medians) < 1 else "ms"
    columns = [f"20% {unit}", f"median {unit}", f"80% {unit}", *(f"x {b}" for b in baselines), "error"]
    memory = [attribute for attribute in _MEMORY if any(getattr(result, attribute) for result in case.results)]
    columns += [_MEMORY[attribute] for attribute in memory]
    if case.floor_us is not None:
        columns.insert(3, "x floor")
    table = plain_table(case.title, "contender", *columns)
    for result in case.results:
        cells = timing_cells(result, baselines, unit)
        if case.floor_us is not None:
            cells.insert(4, "-" if result.ms is None else f"{result.ms.p50 * 1e3 / case.floor_us:.2f}")
        cells.append("-" if result.error is None else f"{result.error:.1e}")
        table.add_row(*cells, *(_megabytes(getattr(result, attribute)) for attribute in memory))
    floor = [] if case.floor_us is None else [f"floor: {_in(unit, case.floor_us)} at the ceilings measured in this run"]
    add_notes(table, [*floor, *reasons(case.results), *disturbances([case]), *_drifted(case)])
    return table


def summary_table(cases: Sequence[CaseResult]) -> Table:
    """One row for each case: the frozen model on the CUDA kernels, over the floor, and over the best other."""
    table = plain_table(f"{CUDA_FROZEN}, medians", "case", "floor us", "us", "x floor", "x best other", "which is")
    for case in cases:
        best = best_other(case)
        figures = [case.floor_us, microseconds(case), times_floor(case), speedup(case)]
        cells = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        graphs = ", no graphs" if case.graphs is False and case.l2 else ""
        name = f"{case.suite} {case.name}, {case.batch}, {case.dtype}{f', {case.l2}' if case.l2 else ''}{graphs}"
        table.add_row(name, *cells, best.contender if best else "-")
    return table


def targets_table(targets: Sequence[Target]) -> Table:
    """One row for each target; empty where nothing was measured."""
    table = Table(title="Targets", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("what", "target", "measured", "met"):
        table.add_column(heading, no_wrap=heading != "measured")
    for target in targets:
        met = {None: "", True: "yes", False: "no"}[target.met]
        table.add_row(*map(escape, (target.what, target.limit, target.measured or "", met)))
    return table


def ceilings_line(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings.flops_per_second.items())
    return f"ceilings measured: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s; matrix product {rates}"


def drift_lines(before: Ceilings | None, after: Ceilings | None, cases: Sequence[CaseResult]) -> list[str]:
    """How the device changed in the course of a run: its ceilings, clock and temperature, and the case worst off."""
    lines = []
    if before is not None and after is not None:
        changes = [f"copy {after.bytes_per_second / before.bytes_per_second - 1:+.1%}"]
        rates = before.flops_per_second
        changes += [f"{dtype} {after.flops_per_second[dtype] / rate - 1:+.1%}" for dtype, rate in rates.items()]
        lines.append(f"ceilings after the run: {', '.join(changes)}")
    for name, unit in (("clock_mhz", "MHz"), ("temperature_c", "C"), ("power_w", "W")):
        states = [state for case in cases for state in (case.before, case.after) if state is not None]
        readings = [reading for state in states if (reading := getattr(state, name)) is not None]
        if readings:
            lines.append(f"{name.partition('_')[0]}: {min(readings):.0f} to {max(readings):.0f} {unit}")
    drifts = [(case.drift, case.title) for case in cases if case.drift is not None]
    if drifts:
        worst, title = max(drifts, key=lambda drift: abs(math.log(drift[0])))
        lines.append(f"drift within a case: at most {worst - 1:+.1%} ({title})")
    return lines


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


def has_drifted(case: CaseResult) -> bool:
    return case.drift is not None and abs(case.drift - 1) > DRIFTED


def _drifted(case: CaseResult) -> list[str]:
    if case.drift is None or not has_drifted(case):
        return []
    return [f"the last third of the timing took {case.drift - 1:+.0%} as against the first: the device changed speed"]


def timing_cells(result: Result, baselines: Sequence[str], unit: str = "ms") -> list[str]:
    """A contender's name, its three quantiles in `unit`, and how many times as fast as each baseline it is."""
    if result.ms is None:
        return [result.contender, result.status, *["-"] * (2 + len(baselines))]
    scale = 1e3 if unit == "us" else 1.0
    figures = [ms * scale for ms in (result.ms.p20, result.ms.p50, result.ms.p80)]
    return [
        result.contender,
        *(f"{figure:.{2 if figure < 1000 else 0}f}" for figure in figures),
        *(f"{result.speedup[name]:.2f}" if name in result.speedup else "-" for name in baselines),
    ]


def _in(unit: str, us: float) -> str:
    return f"{us:.1f} us" if unit == "us" else f"{us / 1e3:.2f} ms"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"
