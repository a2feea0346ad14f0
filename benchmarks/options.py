"""The options of `benchmarks/run.py`, and their defaults by device: what is measured where nothing is asked for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import SCALING, STEPS, SUITES
from benchmarks.harness import Contender, Limits
from benchmarks.models.yolov3 import HEADS
from benchmarks.peers import COMPILED_AUTOTUNED, PEERS
from benchmarks.timing import DTYPES, L2_STATES, LAYOUTS

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "results"
DEFAULT_LIMITS = Limits()
QUICK_LIMITS = Limits(rounds=3, seconds=2.0, min_rounds=1, warmup=0)

# What users decide by comes first: a run that is out of time leaves the rest.
DEFAULT_SUITES = ("stack", "layers", "network", "training", "scaling", "overhead", "network-training")
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
DEFAULT_BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 64)}
DEFAULT_MINUTES = 8.5
QUICK_SUITES, QUICK_HEADS, QUICK_MINUTES = ("layers", "stack"), (13,), 1.75


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with every default filled in; of `--compare` and `--resume` what was given.

    Raises:
        SystemExit: with 2 for an argument that is not accepted.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.any_machine and not options.compare:
        parser.error("argument --any-machine: only with --compare")
    if options.compare:
        return options
    if options.resume is not None:
        _refuse_more(argv, parser)
        return options

    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        parser.error("argument --device: no CUDA device here; accepted: auto, cpu")
    options.device = torch.device("cuda" if options.device != "cpu" and available else "cpu")
    _fill_in(options)
    _settle_for_device(options, parser)
    limits = QUICK_LIMITS if options.quick else DEFAULT_LIMITS
    given = {key: value for key in ("rounds", "seconds") if (value := getattr(options, key)) is not None}
    options.limits = replace(limits, **given)
    return options


def contenders_of(suite: str, contenders: Iterable[Contender]) -> tuple[Contender, ...]:
    """Those that a suite is for. On a curve nothing is compiled: it would be for each of its points."""
    if suite in STEPS:
        return tuple(contender for contender in contenders if contender.trains)
    return tuple(c for c in contenders if c.infers and (suite != SCALING or c.reset is None))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Time pointfuse and its peers on YOLOv3's layers and on networks, interleaved and checked against "
        "float64. Without options everything, as far as it fits into nine minutes; --resume does the rest.",
    )
    suites, dtypes = partial(_names, accepted=SUITES), partial(_names, accepted=DTYPES)
    states, layouts = partial(_names, accepted=L2_STATES), partial(_names, accepted=LAYOUTS)
    add = parser.add_argument
    add("--suite", type=suites, help=f"of {', '.join(SUITES)} (default all)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one")
    add("--batch", type=_batches, help="batch sizes, as in 1,8 (default 1,8,64; on a CPU 1,8)")
    add("--dtype", type=dtypes, help=f"of {', '.join(DTYPES)} (default bf16; on a CPU fp32,bf16)")
    add("--layout", type=layouts, default=("channels_last",), help=f"of {', '.join(LAYOUTS)} (default channels_last)")
    add("--head", type=_heads, help=f"of {', '.join(map(str, HEADS))} (default all)")
    add("--contenders", type=_contenders, help=f"of {', '.join(PEERS)} (default all)")
    add("--graphs", choices=("on", "off"), help="CUDA graphs (default on, of training off; a GPU only)")
    add("--l2", type=states, help=f"L2 cache before a timing, of {', '.join(L2_STATES)} (default both; a GPU only)")
    add("--rounds", type=_positive_int, help=f"at most so many rounds a case (default {DEFAULT_LIMITS.rounds})")
    add("--seconds", type=_positive, help=f"of timing a case (default {DEFAULT_LIMITS.seconds:g})")
    default = f"{DEFAULT_MINUTES:g}, with --quick {QUICK_MINUTES:g}, where no suite is named, else no limit"
    add("--minutes", type=_positive, help=f"for all of it (default {default})")
    add("--quick", action="store_true", help="a few rounds, by default of one head's layers and stack: two minutes")
    add("--threads", type=_positive_int, help="CPU threads (default: as torch chooses)")
    add("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default %(default)s")
    add("--no-report", dest="report", action="store_false", help="write no page beside the JSON")
    add("--resume", nargs="?", type=Path, const=Path(), metavar="JSON", help="go on with a run (default the newest)")
    add("--compare", type=Path, nargs=2, metavar="JSON", help="run nothing: what changed from one file to the other")
    add("--any-machine", action="store_true", help="compare files of different machines")
    return parser


def _refuse_more(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    given = {a.partition("=")[0] for a in argv if a.startswith("--")} - {"--resume"}
    beside = {"--minutes", "--output", "--no-report"}
    if given - beside:
        parser.error(
            "argument --resume: a run goes on with the options it was begun with; accepted beside it: --minutes, "
            f"--output, --no-report; given: {', '.join(sorted(given - beside))}"
        )


def _fill_in(options: argparse.Namespace) -> None:
    kind = options.device.type
    if options.minutes is None and options.suite is None:
        options.minutes = QUICK_MINUTES if options.quick else DEFAULT_MINUTES
    if options.contenders is None:
        # Its search for the fastest kernels takes a minute a model.
        slow = {COMPILED_AUTOTUNED} if options.quick else set()
        options.contenders = tuple(peer for name, peer in PEERS.items() if name not in slow)
    options.suite = options.suite or (QUICK_SUITES if options.quick else DEFAULT_SUITES)
    options.head = options.head or (QUICK_HEADS if options.quick else tuple(HEADS))
    options.dtype = options.dtype or DEFAULT_DTYPES[kind][: 1 if options.quick else None]
    options.batch = options.batch or DEFAULT_BATCHES[kind][: 1 if options.quick else None]


def _settle_for_device(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Settle the options that only a GPU has, and drop the contenders that cannot run on the device."""
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
        if "tf32" in options.dtype:
            parser.error("argument --dtype: tf32 is of GPUs; accepted here: fp32, bf16, fp16")
        options.graphs = None
    options.contenders = tuple(contender for contender in options.contenders if kind in contender.devices)
    if not options.contenders:
        parser.error(f"argument --contenders: none of them runs on {kind}")
    for suite in options.suite:
        if not contenders_of(suite, options.contenders):
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


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
