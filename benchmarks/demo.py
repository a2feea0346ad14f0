"""A photograph through YOLOv3, eager, converted and frozen: is the answer the same, and what was gained?"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# Run as a script, Python looks for packages in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.cbook
import numpy as np
import pointfuse
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cases import IMAGE_SIZE, PendingCase, Variant, make_case
from benchmarks.harness import Case, CheckedCase, Limits
from benchmarks.models.yolov3 import HEADS, YOLOv3, yolov3
from benchmarks.peers import COMPILED_FREEZING, CONVERTED, EAGER_CHANNELS_LAST, EAGER_NCHW, FROZEN, PEERS
from benchmarks.record import CaseResult, device_name, versions
from benchmarks.runner import Job, run_jobs
from benchmarks.tables import add_notes, disturbances, plain_table, reasons, timing_cells
from benchmarks.timing import DTYPES, method_for

DEFAULT_OUTPUT = Path("out/demo.png")
BASELINES = (EAGER_NCHW, EAGER_CHANNELS_LAST)
CONTENDERS = (EAGER_NCHW, EAGER_CHANNELS_LAST, CONVERTED, FROZEN)
STACK_LIMITS = Limits(rounds=40, seconds=8.0)
NETWORK_LIMITS = Limits(rounds=12, seconds=25.0, warmup=1)
QUICK_LIMITS = Limits(rounds=3, seconds=3.0, min_rounds=1, warmup=1)

EXIT_OK, EXIT_WRONG, EXIT_INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; or 1 if a pointfuse model could not run or gave a wrong answer; or 130 after Ctrl-C.

    Raises:
        SystemExit: with a message if the photograph or the weights cannot be read, or the chart not be written.
    """
    options = _parse(argv)
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        image = load_photograph(options.image)
        with console.status("building YOLOv3"):
            model = yolov3(options.classes, options.weights)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error

    variant = Variant(batch=1, dtype=options.dtype or ("bf16" if device.type == "cuda" else "fp32"), device=device)
    network = make_case("network", f"YOLOv3 {IMAGE_SIZE}x{IMAGE_SIZE}", model, letterbox(image), variant)
    console.print(_what_is_used(options, network), markup=False)
    console.print(_plan_in_short(model), markup=False)
    results: list[CaseResult] = []

    def show_differences(checked: CheckedCase) -> None:
        if checked.case is network:
            console.print(_differences(checked))

    jobs = _jobs(network, model, options.quick)
    if not run_jobs(jobs, BASELINES, console, results.append, show_differences).complete:
        console.print("interrupted")
        return EXIT_INTERRUPTED
    # The stacks first: the table goes from the parts to the whole.
    results = results[1:] + results[:1]
    console.print(_latencies(results))
    draw_chart(results, options.output)
    console.print(f"chart: {options.output}", soft_wrap=True, markup=False)
    return EXIT_OK if _pointfuse_held(results) else EXIT_WRONG


def load_photograph(path: Path | None) -> Tensor:
    """Read an image file as [3, height, width] in [0, 1], upright; without a path the one that matplotlib ships.

    Raises:
        OSError: there is no such file, or it is not an image.
    """
    if path is None:
        path = Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    with Image.open(path) as file:
        pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).float() / 255


def letterbox(image: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Fit an image [3, height, width] into a square of `size` pixels, in proportion, with grey where it does not reach.

    Returns:
        [1, 3, size, size]
    """
    height, width = image.shape[1:]
    scale = size / max(height, width)
    fitted = max(1, round(height * scale)), max(1, round(width * scale))
    resized = F.interpolate(image[None], size=fitted, mode="bilinear", antialias=True)
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    canvas = torch.full((1, 3, size, size), 0.5)
    canvas[:, :, top : top + fitted[0], left : left + fitted[1]] = resized
    return canvas


def draw_chart(results: Sequence[CaseResult], path: Path) -> None:
    """Write a PNG with a panel for each case: a bar for each contender's median, a whisker from 20 to 80%."""
    rows = math.ceil(len(results) / 2)
    figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, case in zip(panels, results, strict=False):
        _draw_panel(axes, case)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.supxlabel("milliseconds: median, whisker from 20 to 80%; shorter is faster", fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def _draw_panel(axes: Axes, case: CaseResult) -> None:
    timed = [(result.contender, result.ms) for result in case.results if result.ms is not None]
    names, medians = [name for name, _ in timed], [ms.p50 for _, ms in timed]
    whiskers = [[ms.p50 - ms.p20 for _, ms in timed], [ms.p80 - ms.p50 for _, ms in timed]]
    colours = ["tab:blue" if name.startswith("pointfuse") else "silver" for name in names]
    bars = axes.barh(names, medians, xerr=whiskers, color=colours, capsize=3)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"{case.name}, {case.dtype}", fontsize=10)


def _what_is_used(options: argparse.Namespace, network: Case) -> str:
    device = network.x.device
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return (
        f"device: {device_name(device)} ({device.type}), {torch.get_num_threads()} CPU threads, {network.dtype}\n"
        f"versions: {found}\n"
        f"image: {options.image or 'grace_hopper.jpg of matplotlib'}\n"
        f"weights: {options.weights or 'drawn from a seed, batch norm calibrated'}\n"
    )


def _plan_in_short(model: nn.Module) -> str:
    plan = pointfuse.plan(model)
    kernels = Counter("x".join(map(str, unit.kernel_size)) for unit in plan.units)
    fused = ", ".join(f"{count} of {kernel}" for kernel, count in sorted(kernels.items()))
    skipped_for = Counter(skipped.reason for skipped in plan.skipped)
    lines = [f"plan: {len(plan.units)} units fused ({fused}), {len(plan.skipped)} convolutions skipped"]
    return "\n".join([*lines, *(f"  {count} skipped: {reason}" for reason, count in skipped_for.most_common())]) + "\n"


def _jobs(network: Case, model: YOLOv3, quick: bool) -> list[Job]:
    """The network first, since its check is shown first, then each head's stack on what reaches it there."""
    contenders = tuple(PEERS[name] for name in CONTENDERS)
    method = method_for(network.x.device)
    jobs = [Job(_ready(network), contenders, method, QUICK_LIMITS if quick else NETWORK_LIMITS)]
    stacks = (model.last_layer0, model.last_layer1, model.last_layer2)
    for head, stack, x in zip(HEADS, stacks, _inputs_of(stacks, network), strict=True):
        case = Case("stack", f"last layers {head}x{head}", stack, x)
        # Compiling takes longer than everything else here, so one stack stands for the three.
        extra = (PEERS[COMPILED_FREEZING],) if head == 13 and not quick else ()
        jobs.append(Job(_ready(case), contenders + extra, method, QUICK_LIMITS if quick else STACK_LIMITS))
    return jobs


def _ready(case: Case) -> PendingCase:
    return PendingCase(case.name, lambda: case)


@torch.no_grad()
def _inputs_of(stacks: Sequence[nn.Sequential], network: Case) -> list[Tensor]:
    """What each stack receives when the network runs."""
    inputs: list[Tensor] = []
    # Of some stacks only slices are called, so the hooks go to the first units.
    hooks = [stack[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0])) for stack in stacks]
    network.model(network.x)
    for hook in hooks:
        hook.remove()
    return inputs


def _differences(checked: CheckedCase) -> Table:
    heads = [f"{head}x{head}" for head in HEADS]
    table = plain_table("Largest relative difference from float64", "model", *heads, "allowed")
    for verdict in checked.verdicts:
        figures = (*verdict.errors, verdict.tolerance) if verdict.tolerance is not None else ()
        table.add_row(verdict.contender, *(f"{figure:.1e}" for figure in figures))
    add_notes(table, reasons(checked.verdicts))
    return table


def _latencies(cases: Sequence[CaseResult]) -> Table:
    table = plain_table("Latency", "", "20% ms", "median ms", "80% ms", *(f"x {name}" for name in BASELINES))
    for case in cases:
        table.add_section()
        table.add_row(f"[bold]{case.name}[/]")
        for result in case.results:
            table.add_row(*timing_cells(result, BASELINES))
    add_notes(table, [*reasons([result for case in cases for result in case.results]), *disturbances(cases)])
    return table


def _pointfuse_held(cases: Sequence[CaseResult]) -> bool:
    ours = [result for case in cases for result in case.results if result.contender in (CONVERTED, FROZEN)]
    return all(result.status == "ok" for result in ours)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/demo.py", description=__doc__)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a YOLOv3 checkpoint (default: seeded weights)")
    parser.add_argument("--classes", type=int, default=80, help="of the checkpoint, 80 for COCO (default %(default)s)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: a photograph that matplotlib ships")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="PNG", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few rounds, and no torch.compile")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
