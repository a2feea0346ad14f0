"""Freezes a model and takes it out of Python's hands: torch.export, AOTInductor, ONNX, CUDA graphs.

    python examples/deployment.py --model torchvision.models:resnet50 --target export,onnx --output deployed

What was written is loaded in a fresh process, and its answer compared with the eager model's. By default every target
that can run here does, and of each other the reason is said. docs/deployment.md has every way and every error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pointfuse
import torch
from torch import Tensor, nn

# Of the largest magnitude; what folding batch norms into weights changes in fp32 is a hundredth of it.
TOLERANCE = 1e-3
BATCH = {0: torch.export.Dim("batch", min=1, max=1024)}
EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class CannotRun(Exception):
    """Why a target cannot run here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if an answer is wrong; 2 if something given cannot be used here; 130 after Ctrl-C."""
    options = _parse(argv)
    try:
        return run(options)
    except (OSError, ImportError, TypeError, CannotRun) as error:
        print(f"deployment.py: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


@torch.no_grad()
def run(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    x = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
    model = load_model(options.model).eval().to(options.device)
    expected = model(x)
    torch.save((x, expected), options.output / "call.pt")

    right = True
    for name in options.target or TARGETS:
        try:
            answer, where = TARGETS[name](model, x, options.output)
        except CannotRun as reason:
            if options.target:
                raise CannotRun(f"--target {name} cannot run here: {reason}") from reason
            print(f"{name}: cannot run here: {reason}")
            continue
        worst = ((answer - expected).abs().max() / expected.abs().max()).item()
        right = right and worst <= TOLERANCE
        print(f"{name}: {where}; largest difference {worst:.1e}{'' if worst <= TOLERANCE else ': WRONG'}")
    return EXIT_OK if right else EXIT_WRONG


def load_model(name: str) -> nn.Module:
    """What ``pkg.module:callable`` returns."""
    module, _, function = name.partition(":")
    torch.manual_seed(0)
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"--model {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def export(model: nn.Module, x: Tensor, folder: Path) -> tuple[Tensor, str]:
    """A program of PyTorch's own operators, which runs where there is no pointfuse."""
    path = folder / "program.pt2"
    torch.export.save(_program(model, x), path)
    return _fresh("torch.export.load('program.pt2').module()(x)", folder), f"saved {path}"


def aoti(model: nn.Module, x: Tensor, folder: Path) -> tuple[Tensor, str]:
    """Compiled ahead of time; C++ can load the package too."""
    compilers = [os.environ.get("CXX") or "g++", "clang++", "c++"]
    if not any(map(shutil.which, compilers)):
        raise CannotRun("AOTInductor needs a C++ compiler: install g++, or set CXX")
    path = torch._inductor.aoti_compile_and_package(_program(model, x), package_path=str(folder / "aoti.pt2"))
    return _fresh("torch._inductor.aoti_load_package('aoti.pt2')(x)", folder), f"saved {path}"


def onnx(model: nn.Module, x: Tensor, folder: Path) -> tuple[Tensor, str]:
    """ONNX's own operators, checked by ONNX Runtime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"pip install {' '.join(missing)}")
    path = folder / "model.onnx"
    frozen = pointfuse.freeze(model, pack=False)
    torch.onnx.export(frozen, (_example(x),), path, dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    session = "onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])"
    call = f"torch.from_numpy({session}.run(None, {{{session}.get_inputs()[0].name: x.cpu().numpy()}})[0])"
    return _fresh(call, folder).to(x.device), f"saved {path}"


def graphs(model: nn.Module, x: Tensor, folder: Path) -> tuple[Tensor, str]:
    """One CUDA graph for each shape of the input, in this process."""
    if not x.is_cuda:
        raise CannotRun("CUDA graphs need a GPU, and the model is on the CPU")
    return pointfuse.freeze(model, x, cuda_graph=True)(x), "replayed"


TARGETS: dict[str, Callable[[nn.Module, Tensor, Path], tuple[Tensor, str]]] = {
    "export": export,
    "aoti": aoti,
    "onnx": onnx,
    "graphs": graphs,
}


def _program(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    # Packed weights stay in Python: what is exported is frozen without.
    frozen = pointfuse.freeze(model, pack=False)
    return torch.export.export(frozen, (_example(x),), dynamic_shapes=(BATCH,))


def _example(x: Tensor) -> Tensor:
    """A batch of 1 would be taken for a constant."""
    return x if len(x) > 1 else x.repeat(2, 1, 1, 1)


def _fresh(call: str, folder: Path) -> Tensor:
    """What a call gives in a process that has loaded nothing but what the call needs."""
    needed = "import onnxruntime, torch" if "onnxruntime" in call else "import torch"
    code = f"{needed}\nx, _ = torch.load('call.pt')\nwith torch.no_grad():\n    torch.save({call}, 'answer.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    answer: Tensor = torch.load(folder / "answer.pt")
    return answer


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deployment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=_model, default="torchvision.models:resnet50", help="pkg.module:callable (default %(default)s)")
    add("--target", type=_targets, metavar="NAME,...", help=f"of {', '.join(TARGETS)} (default: all that can run)")
    add("--output", type=Path, default=Path("out/deployment"), metavar="DIR", help="default %(default)s")
    add("--size", type=_count, default=224, help="side of the input in pixels (default 224)")
    add("--batch", type=_count, default=2, help="default 2; what is written takes any")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def _model(text: str) -> str:
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"must be pkg.module:callable, got {text!r}")
    return text


def _targets(text: str) -> tuple[str, ...]:
    chosen = tuple(item.strip() for item in text.split(","))
    for item in chosen:
        if item not in TARGETS:
            raise argparse.ArgumentTypeError(f"{item!r} is no target; the targets are {', '.join(TARGETS)}")
    return chosen


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
