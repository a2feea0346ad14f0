"""``make fuzz``: any number of random units against PyTorch in float64. See ``fuzzing.py``.

Exit codes: 0 no failure, 1 a failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import conftest
import fuzzing
import pytest
import torch
from fuzzing import Case, Found, Verdict, fuzz, missing, native_backends, save
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Tally:
    """What was run, by kind."""

    def __init__(self) -> None:
        self.cases = 0
        self.kinds: dict[str, Counter[str]] = {
            kind: Counter() for kind in ("backend", "mode", "dtype", "entry", "data", "ran", "decided by")
        }

    def add(self, case: Case, verdict: Verdict | None) -> None:
        self.cases += 1
        for kind in ("backend", "mode", "dtype", "entry", "data"):
            self.kinds[kind][getattr(case, kind)] += 1
        if verdict is None:
            self.kinds["ran"]["failed"] += 1
            return
        self.kinds["ran"]["raised as PyTorch" if verdict.raised else "fused" if verdict.fused else "composed"] += 1
        if verdict.unsteady:
            self.kinds["decided by"]["nothing: PyTorch's answer changes"] += 1
        elif not verdict.raised:
            by = "neighbours" if verdict.by_neighbours else "the fold's rounding" if verdict.by_fold else "one draw"
            self.kinds["decided by"][by] += 1

    def __str__(self) -> str:
        rows = (", ".join(f"{name} {count}" for name, count in found.most_common()) for found in self.kinds.values())
        return "\n".join(f"{kind:<12}{row}" for kind, row in zip(self.kinds, rows, strict=True))


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    torch.set_num_threads(1)  # the tensors are small
    commit = _commit()  # of what runs, whatever is committed meanwhile
    tally, found, interrupted = Tally(), [], False
    shares = _shares(arguments.count, arguments.backends)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, pytest.MonkeyPatch.context() as patch:
        conftest.fuse_small_units(patch)
        patch.setenv("POINTFUSE_CACHE_DIR", str(Path(__file__).parent / "no tuned tables"))
        task = progress.add_task("", total=arguments.count)

        def note(case: Case, verdict: Verdict | None) -> None:
            tally.add(case, verdict)
            progress.advance(task)

        try:
            for backend, count in shares.items():
                progress.update(task, description=f"seed {arguments.seed}, {backend}")
                found += fuzz(backend, count, arguments.seed, note)
        except KeyboardInterrupt:
            interrupted = True
    print(tally)
    _report(found, arguments.regressions)
    outcome = _outcome(tally.cases, arguments.count, len(found), interrupted)
    cases = str(tally.cases) if tally.cases == arguments.count else f"{tally.cases} of {arguments.count}"
    print(f"{cases} cases, seed {arguments.seed}, commit {commit}: {outcome}")
    return 130 if interrupted else 1 if found else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("count", type=int, help="how many cases, shared by the backends")
    parser.add_argument("--seed", type=int, default=None, help="a new one if left out")
    parser.add_argument("--backends", default=None, help="names with commas between; those of this machine if left out")
    parser.add_argument("--regressions", type=Path, default=Path(__file__).parent / "regressions", help="for failures")
    arguments = parser.parse_args(argv)
    arguments.backends = arguments.backends.split(",") if arguments.backends else native_backends()
    arguments.seed = random.SystemRandom().randrange(1 << 20) if arguments.seed is None else arguments.seed
    if arguments.count < 1:
        parser.error(f"count is {arguments.count}; it must be 1 or more")
    for backend in arguments.backends:
        if reason := missing(backend):
            parser.error(f"backend {backend!r} cannot run here: {reason}")
    return arguments


def _shares(count: int, backends: list[str]) -> dict[str, int]:
    """As many cases for each backend, and one more for the first ones where it does not come out even."""
    even, more = divmod(count, len(backends))
    return {backend: even + (i < more) for i, backend in enumerate(backends)}


def _report(found: list[Found], folder: Path) -> None:
    for one in found:
        print(f"FAILED {save(one.case, one.failure, folder)}: {one.failure}")


def _outcome(done: int, asked: int, failures: int, interrupted: bool) -> str:
    said = {0: "no failure", 1: "1 failure"}.get(failures, f"{failures} failures")
    if interrupted:
        return f"interrupted; {said} so far"
    return said if done == asked else f"ended early; {said}, and a backend is left at {fuzzing.MAX_FOUND}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
