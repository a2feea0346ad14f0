"""The command ``pointfuse``, also ``python -m pointfuse``: doctor, plan, verify, tune and bench."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pointfuse import plans
from pointfuse._version import __version__
from pointfuse.backends import aten, calls, triton
from pointfuse.backends.triton import configs, reports, tables, tuning
from pointfuse.convert import VerificationError, convert, plan, verification
from pointfuse.doctor import convolutions, examine, kernel_plans

MODEL_HELP = "pkg.module:callable that returns an nn.Module, or 'yolov3' in a source checkout"
EXIT_CODES = "exit codes: 0 success, 1 the check failed, 2 wrong usage or a model that cannot be made, 130 interrupted"


class UsageError(Exception):
    """What the user gave cannot be used; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.run is not _bench:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"pointfuse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pointfuse: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pointfuse", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"pointfuse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what can run here, and a sanity check of each backend")
    doctor.set_defaults(run=_doctor)
    listing = doctor.add_argument_group("plans of the CUDA kernels; no GPU is needed")
    listing.add_argument("--plans", metavar="MODEL", help=f"list those of a model's convolutions; {MODEL_HELP}")
    listing.add_argument("--device", metavar="NAME", help="a GPU by name, such as h100 (the default) or a100")
    listing.add_argument("--dtype", choices=list(plans.DTYPES), help="bf16 by default")
    listing.add_argument("--batch", type=_count, metavar="N", help="images in the input, 1 by default")
    listing.add_argument(
        "--input", type=_shape, metavar="NxCxHxW", help="1x3x224x224 by default, and 416 for yolov3; --batch replaces N"
    )

    plan_parser = commands.add_parser("plan", help="the units of a model, and what is left alone with the reason")
    plan_parser.set_defaults(run=_plan)

    verify = commands.add_parser("verify", help="convert a model and compare it with the original, eval and train")
    verify.set_defaults(run=_verify)

    for command in (plan_parser, verify):
        command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
        command.add_argument(
            "--input",
            type=_shape,
            metavar="NxCxHxW",
            help="shape of a random input; verify takes 1x3x224x224 by default, and 416 for yolov3",
        )
    tune = commands.add_parser("tune", help="measure the triton backend's configurations on this machine's GPU")
    tune.set_defaults(run=_tune)
    tune.add_argument("model", metavar="MODEL", nargs="?", help=f"YOLOv3's last-layer stacks by default; {MODEL_HELP}")
    tune.add_argument(
        "--input", type=_shape, metavar="NxCxHxW", help="1x3x224x224 by default, and 416 for yolov3; --batch replaces N"
    )
    tune.add_argument("--batch", type=_counts, metavar="N,...", help="1,8,64 by default, and N of --input with MODEL")
    names = ", ".join(tuning.DTYPES)
    tune.add_argument(
        "--dtype", type=_dtypes, default=("bf16",), metavar="NAME,...", help=f"bf16 by default; of {names}"
    )
    tune.add_argument("--layout", choices=list(tuning.FORMATS), default="channels_last", help="%(default)s by default")
    tune.add_argument("--again", action="store_true", help="measure also what was measured before")
    tune.add_argument("--list", action="store_true", help="only list the shape classes; no GPU is needed")
    tune.add_argument("--device", choices=configs.FAMILIES, help="with --list: for another GPU than this machine's")

    for command in (doctor, plan_parser, verify, tune):
        command.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser("bench", help="run the benchmarks of a source checkout", add_help=False)
    bench.set_defaults(run=_bench)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.plans is not None:
        return _kernel_plans(arguments)
    for name in ("device", "dtype", "batch", "input"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} goes with --plans MODEL")
    report = examine()
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.healthy else 1


def _kernel_plans(arguments: argparse.Namespace) -> int:
    device, dtype = arguments.device or "h100", arguments.dtype or "bf16"
    try:
        plans.planner().device_by_name(device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    model = _load(arguments.plans)
    shape = arguments.input or _usual_shape(arguments.plans)
    shape = shape if arguments.batch is None else (arguments.batch, *shape[1:])
    with _said_of(arguments.plans, shape):
        found = kernel_plans(model, shape, device, dtype)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    model = _load(arguments.model)
    found = plan(model, None if arguments.input is None else torch.randn(arguments.input))
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    model = _load(arguments.model)
    shape = arguments.input or _usual_shape(arguments.model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    converted = convert(model, x)
    try:
        worst, failure = verification.verify(model, converted, x), ""
    except VerificationError as error:
        worst, failure = error.worst, str(error)
    units = len(plan(model).units)
    if arguments.json:
        print(json.dumps({"passed": not failure, "units": units, "worst": [asdict(d) for d in worst]}, indent=2))
    else:
        print(f"{units} units in {arguments.model}, input {'x'.join(map(str, shape))}")
        for d in worst:
            print(
                f"{d.mode:<6} largest difference {d.error:.1e} of the largest value "
                f"(accepted {d.tolerance:.0e}): {d.name}"
            )
        print(f"FAILED: {failure}" if failure else "passed")
    return 1 if failure else 0


def _tune(arguments: argparse.Namespace) -> int:
    problems = _problems(arguments)
    if arguments.list:
        listing = _listing(arguments, problems)
        print(json.dumps(listing.to_dict(), indent=2) if arguments.json else listing)
        return 0
    if arguments.device is not None:
        raise UsageError("--device goes with --list: tuning takes this machine's GPU")
    device = _gpu()
    try:
        with _progress_bar() as progress:
            outcomes = tuning.tune(problems, device, aten=aten.conv_bn_act, again=arguments.again, progress=progress)
    except tables.Unwritable as error:
        raise UsageError(str(error)) from error
    except (KeyboardInterrupt, tuning.GpuLost) as error:
        lost, shapes = isinstance(error, tuning.GpuLost), tuning.distinct(problems).keys()
        kept = f"{len(shapes & tables.measured(device).keys())} of {len(shapes)} shape classes are kept"
        print(
            f"pointfuse: {error if lost else 'interrupted'}; {kept} in {tables.path_of(device)}, and the same command "
            "without --again measures the others",
            file=sys.stderr,
        )
        return 1 if lost else 130
    report = reports.Tuned(tables.device_name(device), tables.path_of(device), tuple(outcomes))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.complete else 1


def _problems(arguments: argparse.Namespace) -> list[tuning.Problem]:
    """What the command line asks to be tuned."""
    if arguments.model is None:
        if arguments.input is not None:
            raise UsageError("--input goes with MODEL")
        return list(tuning.yolov3(arguments.batch or (1, 8, 64), arguments.dtype, arguments.layout))
    model = _load(arguments.model)
    shape = arguments.input or _usual_shape(arguments.model)
    problems = []
    for batch in arguments.batch or shape[:1]:
        with _said_of(arguments.model, (batch, *shape[1:])):
            found = dict.fromkeys(c for _, c in convolutions(model, (batch, *shape[1:])))
        problems += [
            _problem(c, dtype, arguments.layout)
            for dtype in arguments.dtype
            for c in found
            if calls.geometry_refusal(c.kernel_size, c.geometry) is None
        ]
    if not problems:
        raise UsageError(f"{arguments.model} has no convolution that the kernels serve: 1x1 and 3x3, without groups")
    return problems


def _problem(c: plans.Convolution, dtype: str, layout: str) -> tuning.Problem:
    stride, padding, _, _ = c.geometry
    if isinstance(padding, str):
        padding = (c.kernel_size[0] // 2, c.kernel_size[1] // 2) if padding == "same" else (0, 0)
    return tuning.Problem(c.input_shape, c.c_out, c.kernel_size, stride, padding, dtype, layout, c.activation)


def _gpu() -> torch.device:
    """This machine's GPU, if the triton backend can use it."""
    reason = triton.unusable_reason()
    if reason is None:
        device = torch.device("cuda", torch.cuda.current_device())
        reason = tuning.refusal(device)
        if reason is None:
            return device
    raise UsageError(f"there is nothing to tune here: the triton backend cannot run: {reason}")


def _listing(arguments: argparse.Namespace, problems: Sequence[tuning.Problem]) -> reports.Listing:
    """The shape classes, with the configuration that each has now."""
    shapes = tuning.distinct(problems)
    if arguments.device is None and triton.unusable_reason() is None:
        device = _gpu()
        chip = triton.loaded().chip_of(device)
        return reports.Listing.of(shapes, tables.device_name(device), chip, tables.measured(device))
    family = arguments.device or "sm_90"
    return reports.Listing.of(shapes, family, configs.REFERENCE_CHIPS[family], {})


@contextmanager
def _progress_bar() -> Iterator[Callable[[float, int, str], object]]:
    """A bar on stderr with the time left, as what moves it."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError as error:
        raise UsageError(f"tuning shows its progress with rich ({error}): pip install 'pointfuse[triton]'") from error
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


@contextmanager
def _said_of(model: str, shape: Sequence[int]) -> Iterator[None]:
    """Say of what stops a model on the meta device that it did."""
    try:
        yield
    except Exception as error:  # the user's own code may raise anything
        said = f"{model} cannot run on an input that has a shape alone, {'x'.join(map(str, shape))}"
        raise UsageError(f"{said}: {type(error).__name__}: {error}") from error


def _bench(arguments: argparse.Namespace) -> int:
    script = _checkout() / "benchmarks" / "run.py"
    return subprocess.run([sys.executable, str(script), *arguments.rest], check=False).returncode


def _usual_shape(model: str) -> tuple[int, ...]:
    return (1, 3, 416, 416) if model == "yolov3" else (1, 3, 224, 224)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; write a number from 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(item) for item in text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    for item in text.split(","):
        if item not in tuning.DTYPES:
            raise argparse.ArgumentTypeError(f"{item!r} is no dtype; the names are {', '.join(tuning.DTYPES)}")
    return tuple(text.split(","))


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write sizes joined by x, as in 1x3x224x224")
    return shape


def _load(name: str) -> nn.Module:
    """The model that a command line names, seeded, in evaluation mode."""
    if name == "yolov3":
        sys.path.insert(0, str(_checkout()))
        name = "benchmarks.models.yolov3:yolov3"
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"MODEL is {name!r}; it must be {MODEL_HELP}")
    sys.path.insert(0, "")
    try:
        make: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            make = getattr(make, part)
        torch.manual_seed(0)
        model = make if isinstance(make, nn.Module) else make()
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave a {type(model).__name__}; it must give an nn.Module")
    return model.eval()


def _checkout() -> Path:
    """The root of the source checkout: the working directory, or where an editable install points."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "benchmarks" / "run.py").is_file() and (root / "python" / "pointfuse").is_dir():
            return root
    raise UsageError("this needs a source checkout, which holds the benchmarks: run it from the checkout's root")
