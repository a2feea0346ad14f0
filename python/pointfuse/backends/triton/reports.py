"""What ``pointfuse tune`` prints: the shape classes with their configurations, as text or as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointfuse.backends.triton.configs import Chip, Config, Entry, ShapeClass, Table, candidates, choose, shipped
from pointfuse.backends.triton.tuning import Outcome

# Columns that are aligned to the right.
_NUMBERS = ("candidates", "us", "ATen us", "times as fast", "skipped")


@dataclass(frozen=True)
class Listed:
    """A shape class, how many configurations tuning would try, and the one it has now, from where."""

    shape: ShapeClass
    candidates: int
    entry: Entry
    source: str


@dataclass(frozen=True)
class Listing:
    """What would be tuned on a device; prints as a table."""

    device: str
    rows: tuple[Listed, ...]

    @classmethod
    def of(cls, shapes: Iterable[ShapeClass], device: str, chip: Chip, measured: Table) -> Listing:
        """The listing of classes on a chip with this table."""
        rows = []
        for shape in shapes:
            count = sum(1 for _ in candidates(shape, chip))
            entry, source = measured.get(shape), "measured here"
            if entry is None:
                entry = Entry(choose(shape, chip, measured))
                source = "shipped" if shape in shipped(chip.family) else "shipped for the nearest"
            rows.append(Listed(shape, count, entry, source))
        return cls(device, tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """The listing as plain data for JSON."""
        classes = [
            {"class": str(r.shape), "candidates": r.candidates, "source": r.source, **r.entry.to_dict()}
            for r in self.rows
        ]
        return {"device": self.device, "classes": classes}

    def __str__(self) -> str:
        header = ("class", "candidates", "configuration", "from", "us", "ATen us")
        rows = [
            (str(r.shape), str(r.candidates), _text(r.entry.config), r.source, *_times(r.entry)[:2]) for r in self.rows
        ]
        total = sum(r.candidates for r in self.rows)
        return f"{_table(header, rows)}\n\n{len(rows)} shape classes, {total} candidates, on {self.device}"


@dataclass(frozen=True)
class Tuned:
    """What was measured on a device, and where it is kept; prints as a table."""

    device: str
    path: Path
    outcomes: tuple[Outcome, ...]

    @property
    def complete(self) -> bool:
        """Whether each class has a configuration."""
        return all(o.entry is not None for o in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        classes = [
            {"class": str(o.shape), "measured_now": o.measured, "tried": o.tried, "skipped": dict(o.skipped)}
            | (o.entry.to_dict() if o.entry else {})
            for o in self.outcomes
        ]
        return {"device": self.device, "table": str(self.path), "classes": classes}

    def __str__(self) -> str:
        header = ("class", "configuration", "us", "ATen us", "times as fast", "skipped")
        rows = [
            (str(o.shape), _text(o.entry.config) if o.entry else "none ran", *_times(o.entry), _skipped(o))
            for o in self.outcomes
        ]
        reasons: Counter[str] = Counter()
        for o in self.outcomes:
            reasons.update(o.skipped)
        faster = sum(o.entry is not None and o.entry.faster_than_aten for o in self.outcomes)
        return "\n".join(
            [
                _table(header, rows),
                "",
                *(f"skipped {count}: {reason}" for reason, count in reasons.most_common()),
                f"{sum(o.measured for o in self.outcomes)} of {len(rows)} shape classes measured now; {faster} faster "
                "than PyTorch's own operators: 'auto' gives these to the triton backend",
                f"kept in {self.path}",
            ]
        )


def _text(config: Config) -> str:
    tile = f"{config.block_channels}x{config.block_pixels}x{config.block_k}"
    split = f", K split by {config.split_k}" if config.split_k > 1 else ""
    return f"{tile}, {config.stages} stages, {config.warps} warps{split}"


def _times(entry: Entry | None) -> tuple[str, str, str]:
    """Its time, ATen's, and how many times as fast it is."""
    if entry is None or entry.us is None or entry.aten_us is None:
        return "-", "-", "-"
    return f"{entry.us:.1f}", f"{entry.aten_us:.1f}", f"{entry.aten_us / entry.us:.2f}" if entry.us > 0 else "-"


def _skipped(outcome: Outcome) -> str:
    return str(sum(outcome.skipped.values())) if outcome.measured else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    every = [header, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    right = {i for i, name in enumerate(header) if name in _NUMBERS}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )
