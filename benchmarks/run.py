"""Command line of the benchmarks: `python benchmarks/run.py`, and `--help` for what else it takes.

On a GPU contenders run as CUDA graphs, with the L2 cache cold and warm, and are compared with the floor: what they must
do, at the ceilings measured in the same run. Training steps, in half precision under autocast, have no floor, and
run as graphs only with `--graphs on`: without, a short step takes as long as the host takes to launch it.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

from benchmarks.cases import OVERHEAD, SCALING, STEPS, SUITES, Variant
from benchmarks.compare import compare_files
from benchmarks.options import contenders_of, parse
from benchmarks.peers import BASELINES, TRAINING_BASELINES
from benchmarks.record import (
    CaseResult,
    Run,
    Skipped,
    commit_of_checkout,
    device_name,
    newest_unfinished,
    read_run,
    report,
    result_path,
    versions,
    write_json,
)
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.runner import Job, Outcome, run_jobs
from benchmarks.summary import print_summary
from benchmarks.tables import case_table, ceilings_line, drift_lines, wide_console
from benchmarks.timing import Method, method_for, overhead_method

EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that `argv` asks for; every finished case is saved at once.

    With `--compare` nothing is run: see :mod:`benchmarks.compare`.

    Returns:
        0, also where time was up before all was run; or 1 if some contender's answer was wrong, or something became
        slower; or 130 after Ctrl-C.

    Raises:
        SystemExit: with 2 for an argument that is not accepted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    try:
        if options.compare:
            before, after = options.compare
            return compare_files(before, after, wide_console(), options.any_machine)
        if options.resume is not None:
            return _resume(options)
    except (OSError, ValueError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from error
    return _Session(options, _without_output(arguments), result_path(options.output, options.device)).run()


def _resume(options: argparse.Namespace) -> int:
    """Go on with the run of a file, to which the results are added.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no file of an unfinished run, or of another commit, machine or version.
    """
    path = options.resume if options.resume.name else newest_unfinished(options.output)
    before = read_run(path)
    if not before.left:
        raise ValueError(f"{path} is of a run that was finished: nothing is left to do")
    given = options
    options = parse(before.settings["argv"])
    options.minutes, options.report = given.minutes or options.minutes, given.report
    here = {
        "commit": commit_of_checkout()["commit"],
        "device": device_name(options.device),
        "versions": versions(),
    }
    for what, now in here.items():
        if (then := getattr(before, what)) != now:
            raise ValueError(f"{path} is of {what} {then}, here is {now}: figures of both do not belong in one file")
    return _Session(options, before.settings["argv"], path, before).run()


class _Session:
    """One run, or the rest of one: its jobs, its file, and what was found so far."""

    def __init__(self, options: argparse.Namespace, argv: Sequence[str], path: Path, before: Run | None = None) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self._options, self._argv, self._path = options, list(argv), path
        self._console = wide_console()
        jobs = _jobs(options)
        self._left = len(jobs) if before is None else before.left
        self._jobs = jobs[len(jobs) - self._left :]
        # By title: what was cut short is replaced by what is measured anew.
        self._done: dict[str, CaseResult] = {} if before is None else {case.title: case for case in before.cases}
        self._skipped: list[Skipped] = [] if before is None else list(before.skipped)
        self._ceilings = None if before is None else before.ceilings
        self._ceilings_after: Ceilings | None = None

    def run(self) -> int:
        options, console = self._options, self._console
        # Without it cuDNN guesses an algorithm from the shape, and eager would be slower than it need be.
        torch.backends.cudnn.benchmark = options.device.type == "cuda"
        threads = torch.get_num_threads()
        console.print(f"{device_name(options.device)}, {threads} CPU threads, torch {torch.__version__}")
        self._ceilings = self._ceilings or measure_ceilings(options.device, options.dtype)
        console.print(ceilings_line(self._ceilings), highlight=False)
        outcome = run_jobs(
            self._jobs,
            tuple(dict.fromkeys((*BASELINES, *TRAINING_BASELINES))),
            console,
            self._keep,
            ceilings=self._ceilings,
            on_skipped=self._skip,
            on_done=self._finish_job,
            seconds=None if options.minutes is None else options.minutes * 60,
        )
        if not outcome.interrupted:
            self._ceilings_after = measure_ceilings(options.device, options.dtype)
        self._save()
        return self._tell(outcome)

    def _keep(self, result: CaseResult) -> None:
        self._done[result.title] = result
        self._console.print(case_table(result, TRAINING_BASELINES if result.trains else BASELINES))
        self._save()

    def _skip(self, skipped: Skipped) -> None:
        self._skipped.append(skipped)
        self._console.print(f"skipped {skipped.title}: {skipped.reason}", markup=False)

    def _finish_job(self, left: int) -> None:
        self._left = left
        self._save()

    def _save(self) -> None:
        options = self._options
        settings = {
            "argv": self._argv,
            "seed": options.seed,
            "threads": torch.get_num_threads(),
            "dtype": options.dtype,
            "batch": options.batch,
            "layout": options.layout,
            "limits": asdict(options.limits),
            "graphs": options.graphs,
            "graphs_of_steps": options.graphs_of_steps,
            "l2": options.l2,
        }
        content = report(
            self._done.values(),
            options.device,
            settings,
            complete=not self._left,
            ceilings=self._ceilings,
            ceilings_after=self._ceilings_after,
            skipped=self._skipped,
            left=self._left,
        )
        write_json(self._path, content)

    def _tell(self, outcome: Outcome) -> int:
        cases, console = list(self._done.values()), self._console
        on_gpu = self._options.device.type == "cuda"
        print_summary([case for case in cases if on_gpu or case.trains], console)
        for line in drift_lines(self._ceilings, self._ceilings_after, cases):
            console.print(line, markup=False, highlight=False)
        if outcome.left:
            why = "interrupted" if outcome.interrupted else "the time is up"
            console.print(f"{why}; {outcome.left} cases are left, which --resume runs", highlight=False)
        console.print(f"saved {self._path}", soft_wrap=True, markup=False)
        if cases and self._options.report:
            _report(self._path, console)
        if outcome.interrupted:
            return EXIT_INTERRUPTED
        wrong = any(result.status == "wrong" for case in cases for result in case.results)
        return EXIT_WRONG if wrong else EXIT_OK


def _report(path: Path, console: Console) -> None:
    """Write the page of a file. The figures are safe without it."""
    try:
        # What draws takes a second to import.
        from benchmarks.report import write_report
    except ModuleNotFoundError as error:
        console.print(f"no report: {error}; install it, then: python benchmarks/report.py {path}", markup=False)
        return
    console.print(f"report {write_report([path])}", soft_wrap=True, markup=False)


def _without_output(arguments: Sequence[str]) -> list[str]:
    """The arguments that the figures depend on; where results go is a path of the machine."""
    pairs = itertools.pairwise(["", *arguments])
    return [a for before, a in pairs if before != "--output" and not re.match(r"--output(=|$)|--no-report$", a)]


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Job(pending, contenders_of(suite, options.contenders), _method(suite, options), options.limits)
        for suite, dtype, layout in itertools.product(options.suite, options.dtype, options.layout)
        for batch in _batches(suite, options.batch)
        for pending in SUITES[suite](options.head, Variant(batch, dtype, options.device, options.seed, layout))
    ]


def _batches(suite: str, batches: Sequence[int]) -> Sequence[int]:
    """What a call costs the host does not depend on the batch; curves have their own, and else the largest."""
    return batches[:1] if suite == OVERHEAD else (max(batches),) if suite == SCALING else batches


def _method(suite: str, options: argparse.Namespace) -> Method:
    if suite == OVERHEAD:
        return overhead_method(options.device)
    graphs = options.graphs_of_steps if suite in STEPS else bool(options.graphs)
    return method_for(options.device, options.l2 or (), graphs)


if __name__ == "__main__":
    sys.exit(main())
