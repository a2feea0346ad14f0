"""What the kernels reached, for the cases of one run or of several files of results together.

python benchmarks/summary.py benchmarks/results/DEVICE/*.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.record import CaseResult, read_cases
from benchmarks.tables import summary_table, targets_table, wide_console
from benchmarks.targets import targets, training_targets


def print_summary(cases: Sequence[CaseResult], console: Console) -> None:
    """A row for each case of inference, and its targets; then those of training, where there are steps."""
    inference = [case for case in cases if not case.trains]
    if inference:
        console.print(summary_table(inference))
        console.print(targets_table(targets(inference)))
    if len(inference) < len(cases):
        console.print(targets_table(training_targets(cases)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of the files that `argv` names; returns 0.

    Raises:
        SystemExit: with a message if a file cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks/summary.py", description="What the kernels reached, from files of results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="written by benchmarks/run.py")
    files = parser.parse_args(argv).files
    try:
        cases = [case for path in files for case in read_cases(path)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"summary: {error}") from error
    print_summary(cases, wide_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
