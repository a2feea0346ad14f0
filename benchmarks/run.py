"""Command line of the benchmarks: `python benchmarks/run.py --suite stack --head 13 --batch 1,8 --dtype fp32,bf16`.

On a GPU contenders run as CUDA graphs, with the L2 cache cold and warm, and are compared with the floor: what they must
do, at the ceilings measured in the same run. Training steps, in half precision under autocast, have no floor, and
run as graphs only with `--graphs on`: without, a short step takes as long as the host takes to launch it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.cases import OVERHEAD, SUITES, TRAINING, Variant
from benchmarks.compare import compare_files
from benchmarks.harness import Contender, Limits
from benchmarks.models.yolov3 import HEADS
from benchmarks.peers import BASELINES, PEERS, TRAINING_BASELINES
from benchmarks.record import CaseResult, device_name, report, result_path, write_json
from benchmarks.roofline import measure_ceilings
from benchmarks.runner import Job, run_jobs
from benchmarks.summary import print_summary
from benchmarks.tables import case_table, ceilings_line, wide_console
from benchmarks.timing import DTYPES, L2_STATES, Method, method_for, overhead_method

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "results"
DEFAULT_LIMITS = Limits()
QUICK_LIMITS = Limits(rounds=3, seconds=2.0, min_rounds=1, warmup=0)

EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that `argv` asks for; every finished case is saved at once.

    With `--compare` nothing is run: see :mod:`benchmarks.compare`.

    Returns:
        0; or 1 if some contender's answer was wrong, or something became slower; or 130 after Ctrl-C.

    Raises:
        SystemExit: with 2 for an argument that is not accepted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    if options.compare:
        return _compare(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    # Without it cuDNN guesses an algorithm from the shape, and the eager baselines would be slower than they need be.
    torch.backends.cudnn.benchmark = options.device.type == "cuda"
    settings = {
        "argv": _without_output(arguments),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "batch": options.batch,
        "limits": asdict(options.limits),
        "graphs": options.graphs,
        "graphs_of_steps": options.graphs_of_steps,
        "l2": options.l2,
    }
    path = result_path(options.output, options.device)
    console = wide_console()
    done: list[CaseResult] = []

    console.print(f"{device_name(options.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    on_gpu = options.device.type == "cuda"
    ceilings = measure_ceilings(options.device, options.dtype) if on_gpu else None
    if ceilings is not None:
        console.print(ceilings_line(ceilings), highlight=False)

    def save(complete: bool) -> None:
        write_json(path, report(done, options.device, settings, complete, ceilings))

    def keep(result: CaseResult) -> None:
        done.append(result)
        console.print(case_table(result, TRAINING_BASELINES if result.suite == TRAINING else BASELINES))
        save(complete=False)

    baselines = tuple(dict.fromkeys((*BASELINES, *TRAINING_BASELINES)))
    complete = run_jobs(_jobs(options), baselines, console, keep, ceilings=ceilings)
    save(complete)
    print_summary([case for case in done if on_gpu or case.suite == TRAINING], console)
    outcome = "saved" if complete else "interrupted; what was measured is in"
    console.print(f"{outcome} {path}", soft_wrap=True, markup=False)
    if not complete:
        return EXIT_INTERRUPTED
    wrong = any(result.status == "wrong" for case in done for result in case.results)
    return EXIT_WRONG if wrong else EXIT_OK


def _compare(options: argparse.Namespace) -> int:
    try:
        before, after = options.compare
        return compare_files(before, after, wide_console(), options.any_machine)
    except (OSError, ValueError) as error:
        raise SystemExit(_usage_error(error)) from error


def _usage_error(error: Exception) -> int:
    print(f"run.py: error: {error}", file=sys.stderr)
    return EXIT_USAGE


def _without_output(arguments: Sequence[str]) -> list[str]:
    """The arguments that the figures depend on; where results go is a path of the machine."""
    pairs = itertools.pairwise(["", *arguments])
    return [a for before, a in pairs if before != "--output" and not re.match(r"--output(=|$)", a)]


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Job(pending, _contenders_of(suite, options.contenders), _method(suite, options), options.limits)
        for suite, dtype in itertools.product(options.suite, options.dtype)
        # What a call costs the host does not depend on the batch.
        for batch in (options.batch if suite != OVERHEAD else options.batch[:1])
        for pending in SUITES[suite](options.head, Variant(batch, dtype, options.device, options.seed))
    ]


def _contenders_of(suite: str, contenders: Iterable[Contender]) -> tuple[Contender, ...]:
    return tuple(c for c in contenders if (c.trains if suite == TRAINING else c.infers))


def _method(suite: str, options: argparse.Namespace) -> Method:
    if suite == OVERHEAD:
        return overhead_method(options.device)
    graphs = options.graphs_of_steps if suite == TRAINING else bool(options.graphs)
    return method_for(options.device, options.l2 or (), graphs)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Time pointfuse and its peers on YOLOv3's layers, interleaved and checked against float64.",
    )
    suites, dtypes = partial(_names, accepted=SUITES), partial(_names, accepted=DTYPES)
    states = partial(_names, accepted=L2_STATES)
    add = parser.add_argument
    add("--suite", type=suites, default=("stack",), help=f"of {', '.join(SUITES)} (default stack)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one")
    add("--batch", type=_batches, default=(1,), help="batch sizes, as in 1,8 (default 1)")
    add("--dtype", type=dtypes, default=("fp32",), help=f"of {', '.join(DTYPES)} (default fp32)")
    add("--head", type=_heads, default=tuple(HEADS), help=f"of {', '.join(map(str, HEADS))} (default all)")
    add("--contenders", type=_contenders, default=tuple(PEERS.values()), help=f"of {', '.join(PEERS)} (default all)")
    add("--graphs", choices=("on", "off"), help="CUDA graphs (default on, of training off; a GPU only)")
    add("--l2", type=states, help=f"L2 cache before a timing, of {', '.join(L2_STATES)} (default both; a GPU only)")
    add("--rounds", type=_positive_int, help=f"at most so many rounds a case (default {DEFAULT_LIMITS.rounds})")
    add("--seconds", type=_positive_seconds, help=f"of timing a case (default {DEFAULT_LIMITS.seconds:g})")
    add("--quick", action="store_true", help="a few rounds, to see that all works")
    add("--threads", type=_positive_int, help="CPU threads (default: as torch chooses)")
    add("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default %(default)s")
    add("--compare", type=Path, nargs=2, metavar="JSON", help="run nothing: what changed from one file to the other")
    add("--any-machine", action="store_true", help="compare files of different machines")
    options = parser.parse_args(argv)
    if options.any_machine and not options.compare:
        parser.error("argument --any-machine: only with --compare")
    if options.compare:
        return options

    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        parser.error("argument --device: no CUDA device here; accepted: auto, cpu")
    options.device = torch.device("cuda" if options.device != "cpu" and available else "cpu")
    _settle_for_device(options, parser)
    limits = QUICK_LIMITS if options.quick else DEFAULT_LIMITS
    given = {key: value for key in ("rounds", "seconds") if (value := getattr(options, key)) is not None}
    options.limits = replace(limits, **given)
    return options


def _settle_for_device(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Give the options that depend on the device their defaults, and drop the contenders that cannot run on it."""
    kind = options.device.type
    options.graphs_of_steps = options.graphs == "on"
    if kind == "cuda":
        options.graphs = options.graphs != "off"
        options.l2 = options.l2 or L2_STATES
    else:
        if options.l2:
            parser.error("argument --l2: a CPU's caches are not controlled; leave it out, or run on a CUDA device")
        if options.graphs == "on":
            parser.error("argument --graphs: CUDA graphs need a CUDA device; accepted here: off")
        options.graphs = None
    options.contenders = tuple(contender for contender in options.contenders if kind in contender.devices)
    if not options.contenders:
        parser.error(f"argument --contenders: none of them runs on {kind}")
    for suite in options.suite:
        if not _contenders_of(suite, options.contenders):
            parser.error(f"argument --contenders: none of them is for the suite {suite}")


def _names(text: str, accepted: Iterable[str]) -> tuple[str, ...]:
    """The items of a comma-separated argument, in order and once each."""
    items = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    for item in items:
        if item not in accepted:
            raise argparse.ArgumentTypeError(f"{item!r} is not among the accepted: {', '.join(accepted)}")
    return items


def _heads(text: str) -> tuple[int, ...]:
    return tuple(map(int, _names(text, [str(head) for head in HEADS])))


def _batches(text: str) -> tuple[int, ...]:
    return tuple(map(_positive_int, text.split(",")))


def _contenders(text: str) -> tuple[Contender, ...]:
    """Whole names, or parts of names that stand for all that contain them."""
    chosen: set[str] = set()
    for item in (item.strip() for item in text.split(",")):
        found = {item} if item in PEERS else {name for name in PEERS if item and item.lower() in name.lower()}
        if not found:
            raise argparse.ArgumentTypeError(f"{item!r} is in none of the names: {', '.join(PEERS)}")
        chosen |= found
    return tuple(contender for name, contender in PEERS.items() if name in chosen)


def _positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
