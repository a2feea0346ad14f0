"""Converts a model, checks it, freezes it, and compares answers and latencies with PyTorch's own modules.

    python examples/inference.py --model yolov3 --image photo.jpg
    python examples/inference.py --model torchvision.models:resnet50 --batch 8 --dtype bf16 --threads 4

Without an image the input is noise. An image needs Pillow; yolov3 needs a checkout of pointfuse.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pointfuse
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if an answer is wrong; 2 if something given cannot be used; 130 after Ctrl-C."""
    options = _parse(argv)
    try:
        return run(options)
    except pointfuse.VerificationError as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return EXIT_WRONG
    except (OSError, ImportError, TypeError) as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    size = options.size or (416 if options.model == "yolov3" else 224)
    dtype = DTYPES[options.dtype]
    x = load_image(options.image, size) if options.image else torch.rand(1, 3, size, size)
    x = x.repeat(options.batch, 1, 1, 1).to(options.device, dtype)
    model = load_model(options.model).eval().to(options.device, dtype)
    print(f"{options.model} on {options.device}, {options.dtype}, input {'x'.join(map(str, x.shape))}")

    plan = pointfuse.plan(model, x)
    print(f"{len(plan.units)} units fused, {len(plan.skipped)} convolutions left alone")
    converted = pointfuse.convert(model, x, verify=True)  # raises where the answers differ
    frozen = pointfuse.freeze(converted, x)

    forms = {"eager": model, "converted": converted, "frozen": frozen}
    latencies = measure(forms, x, options.calls)
    expected = model(x)
    for name, form in forms.items():
        ms, times = latencies[name], latencies["eager"] / latencies[name]
        print(f"{name:<10} {ms:9.2f} ms  {times:5.2f}x  largest difference {difference(form(x), expected):.1e}")
    return EXIT_OK


def load_model(name: str) -> nn.Module:
    """``yolov3``, or what ``pkg.module:callable`` returns."""
    if name == "yolov3":
        # Where Python looks first is this folder; the model lies in the one beside it.
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        name = "benchmarks.models.yolov3:yolov3"
    module, _, function = name.partition(":")
    torch.manual_seed(0)
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"--model {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def load_image(path: Path, size: int) -> Tensor:
    """An image as [1, 3, size, size] in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("--image needs Pillow: pip install pillow") from error
    with Image.open(path) as file:
        image = file.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    scaled = pixels.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(scaled, size=(size, size), mode="bilinear", antialias=True)


def measure(forms: Mapping[str, Callable[[Tensor], Any]], x: Tensor, calls: int) -> dict[str, float]:
    """The median milliseconds of a call of each, in turns, so that what else the machine does meets all alike."""
    timings: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(calls + 2):
        for name, form in forms.items():
            began = time.perf_counter()
            form(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if i >= 2:  # the first calls choose algorithms
                timings[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in timings.items()}


def difference(actual: Any, expected: Any) -> float:
    """max|a - b| / max|b|, the worst of all outputs."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="inference.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=_model, default="yolov3", help="yolov3, or pkg.module:callable (default yolov3)")
    add("--image", type=Path, metavar="FILE", help="default: noise")
    add("--size", type=_count, help="side of the input in pixels (default 416 for yolov3, else 224)")
    add("--batch", type=_count, default=1, help="default 1")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="default fp32")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=_count, help="of the CPU (default: as torch chooses)")
    add("--calls", type=_count, default=20, help="timed, of each form (default 20)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.model == "yolov3" and options.size and options.size % 32:
        parser.error(f"--size must be a multiple of 32 for yolov3, got {options.size}")
    return options


def _model(text: str) -> str:
    if text != "yolov3" and not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"must be yolov3 or pkg.module:callable, got {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
