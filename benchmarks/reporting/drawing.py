"""What all plots share: themes, a colour and a mark for each contender, PNGs that say what they show."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import peers
from benchmarks.record import CaseResult

WIDTH = 10.5
DPI = 150


@dataclass(frozen=True)
class Theme:
    """Colours of what is no contender; `background` is the page's behind its figures."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    bad: str


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#59636e", "#e3e6ea", "#b3261e")
DARK = Theme("dark", "#161b22", "#e6e9ed", "#9aa4b0", "#2c333c", "#ff8f87")
THEMES = (LIGHT, DARK)

# Light, dark, marker. pointfuse's are saturated and the others muted, in hues that differ in lightness too (after
# Okabe and Ito, whose palette the colour-blind tell apart).
_LOOKS = {
    peers.EAGER_NCHW: ("#aab2bd", "#5b6572", "s"),
    peers.EAGER_CHANNELS_LAST: ("#7c8794", "#7f8b99", "D"),
    "folded in-place": ("#4d5762", "#a3aebb", "v"),
    peers.COMPILED: ("#d3b88c", "#7d6a4a", "^"),
    peers.COMPILED_FREEZING: ("#b08d4f", "#b3965f", "<"),
    peers.COMPILED_AUTOTUNED: ("#7d6231", "#d9c08e", ">"),
    peers.CUDNN_GRAPH: ("#9d86ad", "#a893b8", "h"),
    peers.COMPILED_CONVERTED: ("#8aa39b", "#7f9a92", "p"),
    peers.CONVERTED: ("#3a97db", "#7cc4f5", "o"),
    peers.RECOMPUTING: ("#b8528f", "#e08fc0", "X"),
    peers.FROZEN: ("#00558f", "#2f8de0", "o"),
    peers.CUDA_LIVE: ("#ef8a3c", "#f5b27d", "P"),
    peers.CUDA_FROZEN: ("#c04a00", "#ee7422", "P"),
    peers.TRITON_LIVE: ("#3fae8f", "#86d9c2", "*"),
    peers.TRITON_FROZEN: ("#00735a", "#1db793", "*"),
}
_UNKNOWN = ("#93877d", "#93877d", ".")


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: of its files, without theme and suffix.
        suite: where it belongs; empty for what is of all suites.
        caption: how to read it.
        alt: what is seen.
        shown: the figures in it, by which a file that was drawn from others is told.
        draw: draws it in a theme.
    """

    name: str
    suite: str
    caption: str
    alt: str
    shown: Any
    draw: Callable[[Theme], Figure]

    @property
    def digest(self) -> str:
        content = json.dumps([self.name, self.shown], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def png(self, theme: Theme) -> bytes:
        """A PNG with few colours, which takes a third of the space, and with the digest of what it shows."""
        style: Any = {
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "text.color": theme.text,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.grid,
            "xtick.color": theme.muted,
            "ytick.color": theme.text,
            "figure.facecolor": theme.background,
            "axes.facecolor": theme.background,
            "legend.frameon": False,
        }
        drawn = io.BytesIO()
        with matplotlib.rc_context(style):
            self.draw(theme).savefig(drawn, format="png", dpi=DPI)
        return _small_png(drawn, self.digest, theme)


def digest_of(png: bytes) -> str | None:
    """The digest that :meth:`Plot.png` put into a file."""
    with Image.open(io.BytesIO(png)) as image:
        found = image.info.get("Digest")
    return found if isinstance(found, str) else None


def colour(contender: str, theme: Theme) -> str:
    return _LOOKS.get(contender, _UNKNOWN)[0 if theme is LIGHT else 1]


def marker(contender: str) -> str:
    return _LOOKS.get(contender, _UNKNOWN)[2]


def tidy(axes: Axes, theme: Theme, both: bool = False) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="both" if both else "x", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def legend(figure: Figure, names: Sequence[str], theme: Theme, floor: bool = False, lines: bool = False) -> None:
    """One for all panels, below them; with `lines` where contenders are lines and not marks alone."""
    handles = []
    for name in names:
        width = 0.0 if not lines else 2.2 if name.startswith("pointfuse") else 1.1
        look: Any = dict(color=colour(name, theme), marker=marker(name), linewidth=width)
        handles.append(Line2D([], [], label=name, **look))
    if floor:
        handles.append(Line2D([], [], color=theme.text, linestyle=":", label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)


def ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    """A logarithmic axis with ticks at plain ratios, about the ratios and 1."""
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    margin = max(1.02, (high / low) ** 0.06)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    plain = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 20, 50]
    within = [tick for tick in plain if low / margin <= tick <= high * margin]
    least = (math.log(high * margin) - math.log(low / margin)) / 9
    kept = [1.0]
    for tick in itertools.chain([t for t in within if t > 1], reversed([t for t in within if t < 1])):
        if min(abs(math.log(tick / other)) for other in kept) >= least:
            kept.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())


def logarithmic(axis: Axis, label: Callable[[float], str], at: Sequence[float] | None = None) -> None:
    """Make an axis, behind all that is plotted, logarithmic; the ticks are `at`, or plain numbers close enough."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    if at is None and high / low < 5:
        at = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    close = (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=close) if at is None else FixedLocator(at))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_locator(NullLocator())


def time_unit(cases: Iterable[CaseResult]) -> tuple[str, float]:
    """Microseconds where all medians are below a millisecond, as on the terminal; and how many are a millisecond."""
    medians = [result.ms.p50 for case in cases for result in case.results if result.ms is not None]
    return ("µs", 1e3) if medians and max(medians) < 1 else ("ms", 1.0)


def digits(value: float) -> str:
    """Three significant digits, and whole numbers in full."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def milliseconds(value: float) -> str:
    return f"{value:g} ms" if value >= 1 else f"{value * 1e3:.3g} µs"


def si(value: float, unit: str) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _small_png(drawn: io.BytesIO, digest: str, theme: Theme) -> bytes:
    info = PngInfo()
    info.add_text("Digest", digest)
    small = io.BytesIO()
    with Image.open(drawn) as image:
        reduced = image.convert("RGB").quantize(32, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        # The nearest of few colours is not quite the page's, which would show.
        palette, index = reduced.getpalette() or [], reduced.getpixel((0, 0))
        assert isinstance(index, int)
        palette[3 * index : 3 * index + 3] = [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]
        reduced.putpalette(palette)
        reduced.save(small, format="png", optimize=True, pnginfo=info)
    return small.getvalue()
