"""The page of a run as one HTML file that asks for nothing else."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.compare import machine
from benchmarks.peers import BASELINES, TRAINING_BASELINES, is_ours
from benchmarks.record import CaseResult, Conditions, Result, Run
from benchmarks.reporting.analysis import (
    LEVEL,
    GroupSummary,
    Merged,
    Source,
    Spread,
    Standing,
    behind,
    by_suite,
    case_label,
    command,
    commit_of,
    counted,
    fastest,
    of_floor,
    span,
    standings,
    summarise,
    versions_text,
    ways,
)
from benchmarks.reporting.caveats import warnings
from benchmarks.reporting.drawing import DARK, DPI, LIGHT, Plot, digits, si, time_unit
from benchmarks.roofline import Ceilings

_METHOD = "All contenders of a case run interleaved, after a check against float64."


@dataclass(frozen=True)
class Cell:
    """A cell; with `value` it is a number, by which it sorts. `classes` are for its looks."""

    text: str
    value: str | None = None
    classes: str = ""


@dataclass(frozen=True)
class Column:
    name: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    classes: str


@dataclass(frozen=True)
class Table:
    label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def render(merged: Merged, pictures: Sequence[tuple[Plot, bytes, bytes]]) -> str:
    """The page; `pictures` are plots with their light and dark PNGs."""
    templates = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    images: dict[str, list[dict[str, Any]]] = {"": []}
    for plot, light, dark in pictures:
        images.setdefault(plot.suite, []).append(_image(plot, light, dark))
    return environment.get_template("page.html").render(
        title=machine(merged.newest),
        subtitle=_subtitle(merged),
        light=LIGHT,
        dark=DARK,
        warnings=warnings(merged),
        summary=[_summary_row(group) for group in summarise(merged.cases)],
        behind=[
            {"suite": standing.case.suite, "case": case_label(standing.case), "text": _told(standing)}
            for standing in behind(merged.cases)
        ],
        compared=sum(standing.other is not None for standing in standings(merged.cases)),
        commands=list(dict.fromkeys(command(source.run) for source in merged.sources)),
        setting=_setting(merged.newest),
        suites=[
            {"name": suite, "count": counted(cases), "notes": _suite_notes(cases), "table": table(suite, cases)}
            for suite, cases in by_suite(merged.cases).items()
        ],
        images=images,
        facts=_facts(merged),
        sources=[{"name": source.name, "facts": _source_facts(source)} for source in merged.sources],
        skipped=list(dict.fromkeys(case for source in merged.sources for case in source.run.skipped)),
    )


def table(suite: str, cases: Sequence[CaseResult]) -> Table:
    """A row for each case and contender; columns without any figure are left out."""
    baselines = [name for name in dict.fromkeys((*BASELINES, *TRAINING_BASELINES)) if _has_baseline(cases, name)]
    unit, scale = time_unit(cases)
    columns = {
        "case": Column("case", numeric=False),
        "batch": Column("batch"),
        "dtype": Column("dtype", numeric=False),
        "ways": Column("run with", numeric=False),
        "contender": Column("contender", numeric=False),
        "median": Column(f"median {unit}"),
        **{name: Column(f"x {name}") for name in baselines},
        "floor": Column("of floor"),
        "p20": Column(f"20% {unit}"),
        "p80": Column(f"80% {unit}"),
        "error": Column("error"),
        "saved": Column("saved MB"),
        "peak": Column("peak MB"),
        "note": Column("note", numeric=False),
    }
    common = _common_ways(cases)
    rows = []
    for case in cases:
        first = fastest(case.results)
        apart = Cell(", ".join(way for way in ways(case).split(", ") if way not in common))
        for index, result in enumerate(case.results):
            classes = {"first": index == 0, "ours": is_ours(result.contender), "fastest": result is first}
            classes["failed"] = result.status in ("failed", "wrong")
            cells = {"ways": apart, **_cells(case, result, baselines, scale)}
            rows.append((cells, " ".join(name for name, is_so in classes.items() if is_so)))
    used = [key for key in columns if any(cells[key].text for cells, _ in rows)]
    return Table(
        f"Results of the suite {suite}",
        tuple(columns[key] for key in used),
        tuple(Row(tuple(cells[key] for key in used), classes) for cells, classes in rows),
    )


def _cells(case: CaseResult, result: Result, baselines: Iterable[str], scale: float) -> dict[str, Cell]:
    return {
        "case": Cell(case.name if case.complete else f"{case.name} (cut short)"),
        "batch": _number(case.batch, "d"),
        "dtype": Cell(case.dtype),
        "contender": Cell(result.contender, classes="name"),
        **_times(result, scale),
        **{name: _number(result.speedup.get(name), ".2f") for name in baselines},
        "floor": _number(of_floor(case, result), ".0%"),
        "error": _number(result.error, ".1e"),
        "saved": _number(_mega(result.saved_bytes), ".2f"),
        "peak": _number(_mega(result.peak_bytes), ".2f"),
        "note": Cell(result.reason or "", classes="note"),
    }


def _times(result: Result, scale: float) -> dict[str, Cell]:
    if result.ms is None:
        return {"median": Cell(result.status, classes="n"), "p20": Cell(""), "p80": Cell("")}
    times = {"median": result.ms.p50 * scale, "p20": result.ms.p20 * scale, "p80": result.ms.p80 * scale}
    return {key: Cell(_four_digits(time), f"{time:.6g}", key) for key, time in times.items()}


def _common_ways(cases: Sequence[CaseResult]) -> list[str]:
    """What all of them ran with."""
    every = [ways(case).split(", ") for case in cases]
    return [way for way in every[0] if way and all(way in others for others in every)]


def _number(value: float | None, form: str) -> Cell:
    return Cell("") if value is None else Cell(format(value, form), f"{value:.6g}")


def _four_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def _mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _has_baseline(cases: Iterable[CaseResult], name: str) -> bool:
    return any(name in result.speedup for case in cases for result in case.results)


def _image(plot: Plot, light: bytes, dark: bytes) -> dict[str, Any]:
    # Of a PNG's header, behind signature, length and type of its first chunk.
    width, height = struct.unpack(">II", light[16:24])
    uris = {
        name: f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for name, png in (("light", light), ("dark", dark))
    }
    size = {"width": round(width * 96 / DPI), "height": round(height * 96 / DPI)}
    return {"name": plot.name, "alt": plot.alt, "caption": plot.caption, **size, **uris}


def _subtitle(merged: Merged) -> str:
    dates = sorted({source.run.date[:10] for source in merged.sources})
    parts = [
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        versions_text(merged.newest.versions, ("pointfuse", "torch")),
    ]
    commits = list(dict.fromkeys(commit_of(source.run) for source in merged.sources))
    return " · ".join([*parts, f"commit {', '.join(commits)}", counted(merged.cases)])


def _summary_row(group: GroupSummary) -> dict[str, Any]:
    compared = sum(standing.other is not None for standing in group.standings)
    return {
        "label": group.label,
        "cases": len(group.standings),
        "eager": _spread(group.over_eager),
        "other": _spread(group.over_other),
        "behind": f"{group.behind} of {compared}" if compared else "-",
    }


def _spread(spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {"mean": "-", "range": "", "slower": False}
    shown = span(spread.low, spread.high, ".2f") if spread.count > 1 else ""
    return {"mean": f"{spread.mean:.2f}x", "range": shown, "slower": spread.mean < 1 / (1 + LEVEL)}


def _told(standing: Standing) -> str:
    other = standing.other
    assert other is not None
    assert other.ms is not None
    if standing.ours is None or standing.ours.ms is None or standing.over_other is None:
        ours = [result for result in standing.case.results if is_ours(result.contender)]
        why = "; ".join(f"{result.contender}: {result.status}, {result.reason}" for result in ours)
        return f"no right answer of pointfuse's ({why}); {other.contender} {_time(other.ms.p50)}"
    return (
        f"{other.contender} is {1 / standing.over_other:.2f}x as fast ({_time(other.ms.p50)}; "
        f"{standing.ours.contender} {_time(standing.ours.ms.p50)})"
    )


def _time(ms: float) -> str:
    return f"{digits(ms * 1e3)} µs" if ms < 1 else f"{digits(ms)} ms"


def _setting(run: Run) -> str:
    """What holds for the command beyond its arguments."""
    if not run.on_gpu:
        return f"On {run.machine.get('threads')} threads of {run.machine.get('cores')} cores. {_METHOD}"
    settings = run.settings
    graphs, of_steps = ("on" if settings.get(name) else "off" for name in ("graphs", "graphs_of_steps"))
    parts = [f"CUDA graphs {graphs}, of training steps {of_steps}"]
    if settings.get("l2"):
        parts.append(f"L2 cache {' and '.join(settings['l2'])}")
    return f"{'; '.join(parts)}. {_METHOD}"


def _suite_notes(cases: Sequence[CaseResult]) -> str:
    notes = [f"All ran with {', '.join(common)}."] if (common := _common_ways(cases)) else []
    if any(case.floor_us is not None for case in cases):
        notes.append(
            "Of floor is the floor over the median: 100% is as fast as the ceilings measured in the same run allow."
        )
    if any(result.saved_bytes is not None for case in cases for result in case.results):
        notes.append("Saved is what the forward keeps for the backward.")
    notes.append("The error is the largest difference from float64, over the largest value.")
    return " ".join(notes)


def _facts(merged: Merged) -> list[tuple[str, str]]:
    run = merged.newest
    cpu, cores, threads, system = (run.machine.get(name) for name in ("cpu", "cores", "threads", "system"))
    host = f"{cpu}, {cores} cores, {threads} threads; {system}"
    facts = [("device", run.device), ("host", host), ("versions", versions_text(run.versions, run.versions))]
    moments = [c for case in merged.cases for c in (case.before, case.after) if c is not None]
    for term, attribute, unit in (
        ("clock", "clock_mhz", "MHz"),
        ("temperature", "temperature_c", "°C"),
        ("power", "power_w", "W"),
    ):
        if text := _range(moments, attribute, unit):
            facts.append((term, text))
    drifts = [(case.drift, case) for case in merged.cases if case.drift is not None]
    if drifts:
        worst, case = max(drifts, key=lambda pair: abs(pair[0] - 1))
        facts.append(
            (
                "worst drift",
                f"the last third of the timing took {worst:.3f} times as long as the first in {case_label(case)}",
            )
        )
    shares = [(case.disturbance, case) for case in merged.cases if case.disturbance is not None]
    if shares:
        most, case = max(shares, key=lambda pair: pair[0])
        facts.append(("other processes", f"took at most {most:.1%} of the CPU, in {case_label(case)}"))
    return facts


def _source_facts(source: Source) -> list[tuple[str, str]]:
    run = source.run
    state = "yes" if run.complete else f"no: {run.left} cases left" if run.left else "no"
    facts = [("command", command(run)), ("date", run.date), ("commit", commit_of(run)), ("complete", state)]
    facts.append(("cases", f"{len(run.cases)}, {len(run.skipped)} skipped"))
    facts += [("ceilings", _ceilings(run.ceilings, run.ceilings_after))] if run.ceilings else []
    return facts


def _ceilings(before: Ceilings, after: Ceilings | None) -> str:
    def rates(ceilings: Ceilings) -> dict[str, tuple[float, str]]:
        products = {f"matrix product {dtype}": (value, "FLOP/s") for dtype, value in ceilings.flops_per_second.items()}
        return {"copy": (ceilings.bytes_per_second, "B/s"), **products}

    later = rates(after) if after else {}
    return "; ".join(
        f"{name} {si(value, unit)}"
        + (f" ({later[name][0] / value - 1:+.1%} after the last case)" if name in later else "")
        for name, (value, unit) in rates(before).items()
    )


def _range(moments: Iterable[Conditions], attribute: str, unit: str) -> str:
    found = [value for moment in moments if (value := getattr(moment, attribute)) is not None]
    if not found:
        return ""
    return f"{span(min(found), max(found), '.0f')} {unit}"
