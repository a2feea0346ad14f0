"""The plots of a page, each in a light and a dark variant. Nothing is plotted that was not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks import peers
from benchmarks.cases import OVERHEAD
from benchmarks.peers import EAGER_CHANNELS_LAST, is_other, is_ours
from benchmarks.record import CaseResult, Result
from benchmarks.record import slug as slug_of
from benchmarks.reporting.analysis import (
    LEVEL,
    GroupSummary,
    Merged,
    by_suite,
    case_label,
    contenders,
    counted,
    fastest,
    group_label,
    least_saved,
    of_floor,
    span,
    summarise,
    times_as_fast,
    ways,
)
from benchmarks.reporting.drawing import (
    WIDTH,
    Plot,
    Theme,
    colour,
    digits,
    legend,
    logarithmic,
    marker,
    milliseconds,
    ratio_axis,
    si,
    tidy,
    time_unit,
)
from benchmarks.roofline import Ceilings

SCALING = "scaling"
AXES = {"batch": "batch size", "plane": "height and width of the plane", "channels": "channels"}
MOST_PANELS = 12
_COLUMNS = 3


def plots(merged: Merged) -> list[Plot]:
    """Every plot for which there are figures, in the order of the page."""
    summary = summarise(merged.cases)
    found = [gains_plot(summary)] if any(group.over_eager or group.over_other for group in summary) else []
    for suite, cases in by_suite(merged.cases).items():
        timed = [case for case in cases if _timed(case)]
        points = [case for case in timed if case.axis]
        found += [latency_plot(group) for group in _figures([case for case in timed if not case.axis])]
        found += [scaling_plot(group) for group in _alike(points)]
        found += [memory_plot(group) for group in _figures([case for case in cases if least_saved(case)])]
        if merged.ceilings is not None and suite != OVERHEAD:
            found += _rooflines(cases, merged.ceilings)
    return found


def gains_plot(groups: Sequence[GroupSummary]) -> Plot:
    """How many times as fast pointfuse is as eager and as the fastest other: a mark a case, a line for the mean."""
    ratios = {
        "as eager channels_last": [[s.over_eager for s in group.standings] for group in groups],
        "as the fastest other contender": [[s.over_other for s in group.standings] for group in groups],
    }
    means = {name: [_mean(row) for row in rows] for name, rows in ratios.items()}

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 0.75 + 0.3 * len(groups)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (name, rows) in zip(panels, ratios.items(), strict=True):
            tidy(axes, theme)
            axes.axvline(1, color=theme.muted, linewidth=1)
            for y, (row, mean) in enumerate(zip(rows, means[name], strict=True)):
                found = [ratio for ratio in row if ratio is not None]
                colours = [theme.bad if ratio * (1 + LEVEL) < 1 else colour(peers.CONVERTED, theme) for ratio in found]
                axes.scatter(found, [y] * len(found), c=colours, s=22, alpha=0.75, linewidths=0)
                if mean is not None:
                    axes.plot([mean, mean], [y - 0.32, y + 0.32], color=theme.text, linewidth=2.2)
            ratio_axis(axes, [ratio for row in rows for ratio in row if ratio is not None])
            axes.set_title(f"times as fast {name}", fontsize=9, loc="left", color=theme.text)
        panels[0].set_yticks(range(len(groups)), [group.label for group in groups])
        panels[0].set_ylim(len(groups) - 0.4, -0.6)
        return figure

    told = "; ".join(_told(group) for group in groups)
    alt = f"The fastest pointfuse contender, how many times as fast in each case, right of 1 being faster. {told}."
    caption = (
        "Each mark is a case: the fastest pointfuse contender against eager channels_last, and against the fastest of "
        "all others. Right of 1 pointfuse is faster; marks in red are cases in which it is slower by more than 2%; the "
        "upright stroke is the geometric mean."
    )
    return Plot("gains", "", caption, alt, [[group.label for group in groups], ratios], draw)


def latency_plot(cases: Sequence[CaseResult]) -> Plot:
    """A panel for each case, a bar for each contender's median."""
    wins: dict[str, int] = {}
    for case in cases:
        if first := fastest(case.results):
            wins[first.contender] = wins.get(first.contender, 0) + 1
    told = ", ".join(f"{name} in {count}" for name, count in sorted(wins.items(), key=lambda item: -item[1]))
    has_floor = any(case.floor_us is not None for case in cases)
    floor = " The dotted line is the floor: the least time at the ceilings measured in the same run." * has_floor
    return Plot(
        f"latency-{_name_of(cases)}",
        cases[0].suite,
        f"Median latency; the whisker spans the 20 to the 80% quantile; shorter is faster.{floor}",
        f"Bars of median latency, {_what(cases)}, {counted(cases)}. Fastest: {told}.",
        [
            [_label_within(case, cases), case.floor_us, [[r.contender, r.status, r.ms] for r in case.results]]
            for case in cases
        ],
        lambda theme: _bars(cases, "latency", theme, _latency_panel),
    )


def memory_plot(cases: Sequence[CaseResult]) -> Plot:
    """A panel for each training step, a bar for each contender: what its forward keeps for the backward."""
    shares = {}
    for name in filter(lambda name: name.startswith("pointfuse"), contenders(cases)):
        pairs = [(case.result(name), case.result(EAGER_CHANNELS_LAST)) for case in cases]
        found = [a.saved_bytes / b.saved_bytes for a, b in pairs if a and b and a.saved_bytes and b.saved_bytes]
        if found:
            shares[name] = span(min(found), max(found), ".2f")
    told = "".join(f" {name} keeps {share} times what eager channels_last keeps." for name, share in shares.items())
    has_peak = any(result.peak_bytes is not None for case in cases for result in case.results)
    return Plot(
        f"memory-{_name_of(cases)}",
        cases[0].suite,
        "What a step's forward keeps for its backward, in MB; less is better."
        + " The open mark, and the second figure, is the most that the step took at once." * has_peak,
        f"Bars of memory kept for the backward, {_what(cases)}, {counted(cases)}.{told}",
        [[_label_within(c, cases), [[r.contender, r.saved_bytes, r.peak_bytes] for r in c.results]] for c in cases],
        lambda theme: _bars(cases, "memory kept", theme, _memory_panel),
    )


def scaling_plot(cases: Sequence[CaseResult]) -> Plot:
    """A panel for each curve, log-log, a line for each contender."""
    lines = curves(cases)
    names = [name for name in contenders(cases) if any(_line(curve, name) for curve in lines.values())]

    def draw(theme: Theme) -> Figure:
        columns = min(_COLUMNS, len(lines))
        rows = math.ceil(len(lines) / columns)
        figure = Figure(figsize=(WIDTH, 2.9 * rows + 0.8), layout="constrained")
        figure.suptitle(f"{_what(cases)}: latency", x=0.005, ha="left", fontsize=10, fontweight="bold")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (label, curve) in zip(panels, lines.items(), strict=False):
            _curve_panel(axes, label, curve, names, theme)
        for axes in panels[len(lines) :]:
            axes.set_axis_off()
        legend(figure, names, theme, any(case.floor_us is not None for case in cases), lines=True)
        return figure

    told = "; ".join(_curve_told(label, curve) for label, curve in lines.items())
    return Plot(
        _name_of(cases),
        cases[0].suite,
        "Median latency as one size grows, both axes logarithmic; the band spans the 20 to the 80% quantile, and the "
        "dotted line is the floor, where one was measured.",
        f"Curves of latency, {_what(cases)}. {told}.",
        [
            [label, [[c.at, c.floor_us, [[r.contender, r.ms] for r in c.results]] for c in v]]
            for label, v in lines.items()
        ],
        draw,
    )


def roofline_plot(groups: Sequence[Sequence[CaseResult]], ceilings: Ceilings) -> Plot:
    """FLOP/s over arithmetic intensity under the two measured ceilings, a panel for each group of one dtype: of each
    case the fastest of pointfuse's contenders and the fastest other."""
    every = [case for group in groups for case in group]
    shown = {result.contender for case in every for result in _two_fastest(case)}
    names = [name for name in contenders(every) if name in shown]

    def draw(theme: Theme) -> Figure:
        rows = math.ceil(len(groups) / 2)
        figure = Figure(figsize=(WIDTH, 3.3 * rows + 0.4), layout="constrained")
        panels = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, group in zip(panels, groups, strict=False):
            _roofline_panel(axes, group, ceilings, theme)
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        legend(figure, names, theme)
        return figure

    told = "; ".join(_roofline_told(group, ceilings) for group in groups)
    figures = [
        [[_intensity(case), [[r.contender, r.ms] for r in _two_fastest(case)]] for case in group] for group in groups
    ]
    return Plot(
        f"roofline-{slug_of(every[0].suite)}",
        every[0].suite,
        "FLOP/s over arithmetic intensity, under the ceilings measured in the same run: of each case the fastest "
        "pointfuse contender and, joined to it, the fastest other. Of several layers it is the sum of their work.",
        f"Roofline. {told}.",
        [ceilings.bytes_per_second, ceilings.flops_per_second, figures],
        draw,
    )


def speedup_plot(cases: Sequence[CaseResult], names: Sequence[str], name: str) -> Plot:
    """A row for each case, and on it a mark for each contender: how many times as fast as eager in channels_last."""
    eager = [(case, case.result(EAGER_CHANNELS_LAST)) for case in cases]
    found = [(case_label(case), {n: times_as_fast(case.result(n), base) for n in names}) for case, base in eager]
    rows = [(label, {n: ratio for n, ratio in ratios.items() if ratio is not None}) for label, ratios in found]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(8.0, 0.9 + 0.235 * len(rows)), layout="constrained")
        axes = figure.subplots()
        tidy(axes, theme)
        axes.axvline(1, color=theme.muted, linewidth=1)
        for y, (_, ratios) in enumerate(rows):
            axes.axhline(y, color=theme.grid, linewidth=0.6, zorder=0)
            for contender, ratio in ratios.items():
                # With an edge, since marks of equal contenders lie on each other.
                look: Any = dict(color=colour(contender, theme), marker=marker(contender), edgecolors=theme.background)
                axes.scatter([ratio], [y], s=46, linewidths=0.8, zorder=2, **look)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        ratio_axis(axes, [1.0, *(ratio for _, ratios in rows for ratio in ratios.values())])
        axes.set_xlabel("times as fast as eager channels_last: right is faster")
        legend(figure, names, theme)
        return figure

    means = [(n, _mean([ratios.get(n) for _, ratios in rows])) for n in names]
    told = ", ".join(f"{n} {mean:.2f}" for n, mean in means if mean is not None)
    alt = f"How many times as fast as eager channels_last in {len(rows)} cases, geometric means: {told}."
    return Plot(name, "", "", alt, rows, draw)


def _mean(ratios: Iterable[float | None]) -> float | None:
    found = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(found) / len(found)) if found else None


def _told(group: GroupSummary) -> str:
    parts = [
        f"{spread.mean:.2f} times as fast as {name} ({span(spread.low, spread.high, '.2f')})"
        for spread, name in ((group.over_eager, "eager channels_last"), (group.over_other, "the fastest other"))
        if spread is not None
    ]
    return f"{group.label}: {', '.join(parts)}"


def _figures(cases: Sequence[CaseResult]) -> list[list[CaseResult]]:
    """The cases of a suite in groups of which each is a figure: by how they ran, then by dtype, then by batch."""
    groups = [list(cases)]
    for key in (ways, group_label, lambda case: str(case.batch)):
        split = [_grouped(group, key) if len(group) > MOST_PANELS or key is ways else [group] for group in groups]
        groups = [part for parts in split for part in parts]
    return groups


def _alike(cases: Iterable[CaseResult]) -> list[list[CaseResult]]:
    return _grouped(cases, group_label)


def _grouped(cases: Iterable[CaseResult], key: Callable[[CaseResult], str]) -> list[list[CaseResult]]:
    groups: dict[str, list[CaseResult]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def _common(cases: Sequence[CaseResult]) -> list[str]:
    """What all of them have in common, of batch, dtype and ways."""
    parts = [{f"batch {case.batch}" for case in cases}, {case.dtype for case in cases}, {ways(case) for case in cases}]
    return [part.pop() if len(part) == 1 else "" for part in parts]


def _what(cases: Sequence[CaseResult]) -> str:
    return ", ".join(filter(None, (cases[0].suite, *_common(cases))))


def _name_of(cases: Sequence[CaseResult]) -> str:
    return slug_of(_what(cases))


def _label_within(case: CaseResult, cases: Sequence[CaseResult]) -> str:
    """A case by what tells it from others of a figure; the layout of its title is that of a panel's width."""
    common = set(_common(cases))
    parts = (f"batch {case.batch}", case.dtype, ways(case))
    return ", ".join([case.name, *(part for part in parts if part and part not in common)])


def _timed(case: CaseResult) -> bool:
    return any(result.ms is not None for result in case.results)


def _bars(
    cases: Sequence[CaseResult],
    title: str,
    theme: Theme,
    panel: Callable[[Axes, CaseResult, Sequence[str], Theme], str],
) -> Figure:
    names = contenders(cases)
    columns = min(_COLUMNS, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure = Figure(
        figsize=(WIDTH, rows * (0.36 + 0.185 * len(names)) + 0.35),
        layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06),
    )
    figure.suptitle(f"{_what(cases)}: {title}", x=0.005, ha="left", fontsize=10, fontweight="bold")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, case in zip(panels, cases, strict=False):
        # Each bar has its figure, so that an axis would say it twice.
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0)
        unit = panel(axes, case, names, theme)
        axes.set_title(f"{_label_within(case, cases)} ({unit})", fontsize=8.5, loc="left", color=theme.text)
        axes.set_ylim(len(names) - 0.4, -0.6)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    panels[0].set_yticks(range(len(names)), names)
    for axes in panels[::columns]:
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if name.startswith("pointfuse") else "normal")
    return figure


def _latency_panel(axes: Axes, case: CaseResult, names: Sequence[str], theme: Theme) -> str:
    """Draw the bars; returns their unit."""
    unit, scale = time_unit([case])
    widest = max(result.ms.p80 for result in case.results if result.ms is not None) * scale
    for y, name in enumerate(names):
        result = case.result(name)
        if result is None:
            continue
        if result.ms is None:
            axes.text(widest * 0.01, y, result.status, va="center", color=theme.bad, style="italic")
            continue
        median, low, high = (value * scale for value in (result.ms.p50, result.ms.p20, result.ms.p80))
        axes.barh(y, median, height=0.72, color=colour(name, theme), zorder=2)
        axes.plot([low, high], [y, y], color=theme.text, linewidth=1.1, zorder=3, solid_capstyle="butt")
        weight = "bold" if name.startswith("pointfuse") else "normal"
        axes.text(max(high, median) + widest * 0.02, y, digits(median), va="center", fontsize=7.5, fontweight=weight)
    if case.floor_us is not None:
        axes.axvline(case.floor_us / 1e3 * scale, color=theme.text, linewidth=1.1, linestyle=":", zorder=4)
    axes.set_xlim(0, widest * 1.2)
    return unit


def _memory_panel(axes: Axes, case: CaseResult, names: Sequence[str], theme: Theme) -> str:
    """Draw the bars; returns their unit."""
    figures = [size for r in case.results for size in (r.saved_bytes, r.peak_bytes) if size is not None]
    widest = max(figures) / 1e6
    for y, name in enumerate(names):
        result = case.result(name)
        if result is None:
            continue
        if result.saved_bytes is None or result.status != "ok":
            axes.text(widest * 0.01, y, result.status if result.status != "ok" else "", va="center", color=theme.bad)
            continue
        saved = result.saved_bytes / 1e6
        axes.barh(y, saved, height=0.72, color=colour(name, theme), zorder=2)
        right, said = saved, digits(saved)
        if result.peak_bytes is not None:
            peak = result.peak_bytes / 1e6
            axes.scatter([peak], [y], s=20, facecolors="none", edgecolors=theme.text, linewidths=1, zorder=3)
            right, said = max(saved, peak), f"{said} / {digits(peak)}"
        weight = "bold" if name.startswith("pointfuse") else "normal"
        axes.text(right + widest * 0.03, y, said, va="center", fontsize=7.5, fontweight=weight)
    has_peak = any(r.peak_bytes is not None for r in case.results)
    axes.set_xlim(0, widest * (1.4 if has_peak else 1.2))
    return "MB"


def curves(cases: Iterable[CaseResult]) -> dict[str, list[CaseResult]]:
    """Points by curve, each from small to large: those along one axis, and where that leaves several of one size, those
    whose names differ by what grows alone."""
    found: dict[str, list[CaseResult]] = {}
    for along in _grouped(sorted(cases, key=lambda case: case.at or 0), _axis_label):
        is_one = len({case.at for case in along}) == len(along)
        for curve in [along] if is_one else _grouped(along, _family):
            families = {_family(case) for case in curve}
            found[": ".join(filter(None, [_axis_label(curve[0]), *(families if len(families) == 1 else ())]))] = curve
    return found


def _axis_label(case: CaseResult) -> str:
    return f"over {case.axis}" if case.axis == "batch" else f"over {case.axis}, batch {case.batch}"


def _family(case: CaseResult) -> str:
    """A point's name without the size that grows."""
    sizes = {"plane": rf"\b{case.at}x{case.at}\b", "channels": r"\b\d+->\d+\b", "batch": rf"\bbatch {case.batch}\b"}
    return re.sub(r"\s+", " ", re.sub(sizes.get(case.axis or "", r"(?!)"), "", case.name, count=1)).strip(" ,")


def _line(curve: Sequence[CaseResult], name: str) -> list[tuple[int, Result]]:
    found = [(case.at or 0, case.result(name)) for case in curve]
    return [(at, result) for at, result in found if result is not None and result.ms is not None]


def _curve_panel(axes: Axes, label: str, curve: Sequence[CaseResult], names: Sequence[str], theme: Theme) -> None:
    tidy(axes, theme, both=True)
    for name in names:
        line = _line(curve, name)
        if not line:
            continue
        ours = name.startswith("pointfuse")
        at = [x for x, _ in line]
        ms = [result.ms for _, result in line if result.ms is not None]
        look: Any = dict(color=colour(name, theme), zorder=3 if ours else 2)
        axes.fill_between(at, [q.p20 for q in ms], [q.p80 for q in ms], alpha=0.15, linewidth=0, **look)
        axes.plot(at, [q.p50 for q in ms], marker=marker(name), markersize=4.5, linewidth=2.2 if ours else 1.1, **look)
    floors = [(case.at or 0, case.floor_us / 1e3) for case in curve if case.floor_us is not None]
    if floors:
        axes.plot(*zip(*floors, strict=True), color=theme.text, linewidth=1.1, linestyle=":")
    axes.set_title(label, fontsize=8.5, loc="left", color=theme.text)
    axes.set_xlabel(AXES.get(curve[0].axis or "", curve[0].axis or ""))
    logarithmic(axes.yaxis, milliseconds)
    logarithmic(axes.xaxis, lambda value: f"{value:g}", at=sorted({case.at or 0 for case in curve}))


def _curve_told(label: str, curve: Sequence[CaseResult]) -> str:
    ends = [curve[0], curve[-1]] if len(curve) > 1 else [curve[0]]
    firsts = [(case.at, fastest(case.results)) for case in ends]
    told = ", ".join(
        f"{first.contender} at {at} ({milliseconds(first.ms.p50)})" for at, first in firsts if first and first.ms
    )
    return f"{label}, fastest: {told}"


def _rooflines(cases: Sequence[CaseResult], ceilings: Ceilings) -> list[Plot]:
    rates = ceilings.flops_per_second
    with_work = [case for case in cases if case.flops and case.bytes and case.dtype in rates]
    groups = _alike(case for case in with_work if _two_fastest(case) and not case.trains)
    return [roofline_plot(groups, ceilings)] if groups else []


def _roofline_panel(axes: Axes, cases: Sequence[CaseResult], ceilings: Ceilings, theme: Theme) -> None:
    tidy(axes, theme, both=True)
    peak, bandwidth = ceilings.flops_per_second[cases[0].dtype], ceilings.bytes_per_second
    intensities = [_intensity(case) for case in cases]
    left, right = min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
    roof = [left, peak / bandwidth, right]
    axes.plot(roof, [min(peak, bandwidth * x) for x in roof], color=theme.text, linewidth=1.4)
    for case in cases:
        x, results = _intensity(case), _two_fastest(case)
        rates = [_rate(case, result) for result in results]
        axes.plot([x] * len(rates), rates, color=theme.muted, linewidth=0.8, zorder=1)
        for result, rate in zip(results, rates, strict=True):
            look: Any = dict(color=colour(result.contender, theme), marker=marker(result.contender), linewidths=0)
            axes.scatter(
                [x], [rate], s=46 if is_ours(result.contender) else 22, zorder=2 + is_ours(result.contender), **look
            )
    beside: Any = dict(textcoords="offset points", color=theme.muted, fontsize=7.5)
    axes.annotate(f"matrix product {si(peak, 'FLOP/s')}", (right, peak), (0, 5), ha="right", **beside)
    axes.annotate(f"copy {si(bandwidth, 'B/s')}", (left, bandwidth * left), (4, -4), va="top", **beside)
    axes.set_title(group_label(cases[0]), fontsize=8.5, loc="left", color=theme.text)
    axes.set_xlabel("FLOP per byte")
    logarithmic(axes.xaxis, lambda value: f"{value:g}")
    logarithmic(axes.yaxis, lambda value: si(value, "FLOP/s"))


def _roofline_told(cases: Sequence[CaseResult], ceilings: Ceilings) -> str:
    peak = si(ceilings.flops_per_second[cases[0].dtype], "FLOP/s")
    ceiling = f"{group_label(cases[0])}, {counted(cases)} under {peak} and {si(ceilings.bytes_per_second, 'B/s')}"
    ours = [(case, result) for case in cases for result in _two_fastest(case) if is_ours(result.contender)]
    reached = [share for case, result in ours if (share := of_floor(case, result)) is not None]
    if not reached:
        return ceiling
    return f"{ceiling}, pointfuse at {span(min(reached), max(reached), '.0%')} of the floor's speed"


def _two_fastest(case: CaseResult) -> list[Result]:
    """Of the others and of pointfuse's, as far as there are."""
    both = (fastest(r for r in case.results if chosen(r.contender)) for chosen in (is_other, is_ours))
    return [result for result in both if result is not None]


def _intensity(case: CaseResult) -> float:
    assert case.flops is not None
    assert case.bytes is not None
    return case.flops / case.bytes


def _rate(case: CaseResult, result: Result) -> float:
    assert case.flops is not None
    assert result.ms is not None
    return case.flops / (result.ms.p50 / 1e3)
