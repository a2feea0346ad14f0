"""Trains YOLOv3's last-layer stack, on a small backbone, to find drawn shapes; alone or under torchrun.

    python examples/train_yolo_head.py --checkpoint head.pt
    torchrun --nproc-per-node 2 examples/train_yolo_head.py --sync-bn --checkpoint head.pt --resume

The images are drawn from the seed as they are needed, so that nothing is read from disk but the checkpoint. Beside
pointfuse it needs rich.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pointfuse
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CLASSES = ("circle", "square", "triangle")
# Sides of the anchor boxes, as shares of the image's side, and the range of what is drawn.
ANCHORS = (0.2, 0.3, 0.45)
SIDES = (0.15, 0.5)
# The standard deviation of what is added to each pixel; colours are 0 and 1, the ground is 0.5.
NOISE = 0.1
STRIDE = 8
SLOPE = 0.1
OBJECTNESS_LOGIT = -4.0
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# A peer that has died closes its connections, which ends the others at once; this is for one that hangs.
PEER_TIMEOUT = timedelta(seconds=60)

EXIT_OK, EXIT_INTERRUPTED = 0, 130


@dataclass(frozen=True)
class Place:
    """This process among those that train together, and the device it trains on."""

    rank: int
    world: int
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say.

    Returns:
        0; or 130 after Ctrl-C.

    Raises:
        SystemExit: with a message if the arguments or the checkpoint cannot be used, or the loss is no number.
    """
    options = _parse(argv)
    try:
        with _process_group(options.device) as place:
            return train(options, place)
    except KeyboardInterrupt:
        # Before the first step, or after the last: there is nothing to save.
        return EXIT_INTERRUPTED


def make_model(width: int) -> nn.Sequential:
    """A backbone of three strided units and YOLOv3's last-layer stack; every unit is one that pointfuse fuses.

    Args:
        width: output channels of the stack's 1x1 units; its 3x3 units have twice as many.

    Returns:
        A module from images [batch, 3, size, size] to maps [batch, 3 * (5 + 3), size / 8, size / 8]: for each of three
        anchors x, y, w, h, objectness, and the three classes.
    """
    wide = 2 * width
    units = [_unit(3, width // 2, 3, stride=2), _unit(width // 2, width, 3, stride=2), _unit(width, wide, 3, stride=2)]
    for _ in range(3):
        units += [_unit(wide, width, 1), _unit(width, wide, 3)]
    head = nn.Conv2d(wide, len(ANCHORS) * (5 + len(CLASSES)), kernel_size=1)
    assert head.bias is not None
    with torch.no_grad():
        # Almost everywhere there is no object: not having to learn that first keeps the first steps small.
        head.bias.unflatten(0, (len(ANCHORS), -1))[:, 4] = OBJECTNESS_LOGIT
    return nn.Sequential(*units, head)


def draw(seed: int, index: int, size: int) -> tuple[Tensor, list[tuple[int, float, float, float]]]:
    """One to three shapes on noise, the same ones for the same seed and index.

    Returns:
        The image [3, size, size] in [0, 1], and for each shape its class and its bounding box, a square: centre x,
        centre y and side, in pixels. Later shapes may hide parts of earlier ones.
    """
    # The generator takes 32 bits; a prime keeps the images of small seeds apart.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    image = torch.full((3, size, size), 0.5)
    centres = torch.arange(size) + 0.5
    shapes = []
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        kind = int(torch.randint(len(CLASSES), (), generator=generator))
        colour = torch.randint(2, (3, 1, 1), generator=generator).float()
        u, v, w = torch.rand(3, generator=generator).tolist()
        side = size * (SIDES[0] + w * (SIDES[1] - SIDES[0]))
        x, y = side / 2 + u * (size - side), side / 2 + v * (size - side)
        inside = _inside(CLASSES[kind], (centres - x) / (side / 2), (centres - y)[:, None] / (side / 2))
        image = torch.where(inside, colour, image)
        shapes.append((kind, x, y, side))
    return image + NOISE * torch.randn(3, size, size, generator=generator), shapes


def encode(shapes: Sequence[tuple[int, float, float, float]], size: int) -> Tensor:
    """What the maps should say of an image's shapes.

    Returns:
        [3, 6, size / 8, size / 8]: for each anchor the centre's x and y within its cell, the logarithms of width and
        height over the anchor's, 1 where there is an object and 0 elsewhere, and its class. A shape is the business of
        the cell that its centre lies in, and of the anchor nearest in size.
    """
    targets = torch.zeros(len(ANCHORS), 6, size // STRIDE, size // STRIDE)
    for kind, x, y, side in shapes:
        scales = [math.log(side / (share * size)) for share in ANCHORS]
        anchor = min(range(len(ANCHORS)), key=lambda i: abs(scales[i]))
        column, row = int(x / STRIDE), int(y / STRIDE)
        values = (x / STRIDE - column, y / STRIDE - row, scales[anchor], scales[anchor], 1.0, float(kind))
        targets[anchor, :, row, column] = torch.tensor(values)
    return targets


def make_batch(seed: int, indices: range, size: int) -> tuple[Tensor, Tensor]:
    """Images [batch, 3, size, size] and their targets [batch, 3, 6, size / 8, size / 8]."""
    drawn = [draw(seed, index, size) for index in indices]
    return torch.stack([image for image, _ in drawn]), torch.stack([encode(shapes, size) for _, shapes in drawn])


def yolo_loss(maps: Tensor, targets: Tensor) -> Tensor:
    """YOLOv3's loss: a sum over cells and anchors, a mean over images, in float32 at least.

    The mean is over images, not over objects, so that equal shares of a batch weigh the same however many objects are
    in them: the mean of the shares' losses is the loss of the whole batch.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    predicted = maps.unflatten(1, (len(ANCHORS), -1))
    centre, extent, objectness, classes = predicted.split((2, 2, 1, len(CLASSES)), dim=2)
    objects = targets[:, :, 4:5]
    kinds = F.one_hot(targets[:, :, 5].long(), len(CLASSES)).movedim(-1, 2).to(maps.dtype)
    box = (centre.sigmoid() - targets[:, :, 0:2]).square() + (extent - targets[:, :, 2:4]).square()
    total = F.binary_cross_entropy_with_logits(objectness, objects, reduction="sum")
    total = total + (objects * box).sum()
    total = total + (objects * F.binary_cross_entropy_with_logits(classes, kinds, reduction="none")).sum()
    return total / len(maps)


def train(options: argparse.Namespace, place: Place) -> int:
    """Train from the first step, or from the checkpoint's, to the last one or to Ctrl-C; see `main`."""
    console = Console(quiet=place.rank != 0)
    trainer = Trainer(options, place)
    first = trainer.load(options.checkpoint) if options.resume else 0
    if first:
        console.print(f"going on after step {first}, from {options.checkpoint}", soft_wrap=True, markup=False)
    losses: list[float] = []
    stopped = False
    with _interruption() as asked, _progress(console) as progress:
        task = progress.add_task("", total=options.steps, completed=first, loss="")
        for step in range(first, options.steps):
            loss, stopped = trainer.step(step, asked.is_set())
            if not math.isfinite(loss):
                raise SystemExit(f"the loss of step {step + 1} is {loss}: try a smaller --lr than {options.lr}")
            losses.append(loss)
            progress.update(task, advance=1, loss=f"loss {loss:.4g}")
            done = step + 1
            last = stopped or done == options.steps
            if last or done % max(1, options.steps // 10) == 0:
                progress.console.print(f"step {done}: loss {loss:.4g}", markup=False)
            if options.checkpoint and (last or done % options.save_every == 0):
                trainer.save(options.checkpoint, done)
            if stopped:
                break
    if options.json and place.rank == 0:
        options.json.write_text(json.dumps({"first_step": first, "losses": losses}), encoding="utf-8")
    if stopped:
        advice = "--checkpoint was not given: nothing is saved"
        if options.checkpoint:
            advice = f"saved in {options.checkpoint}; the same command with --resume goes on"
        console.print(f"interrupted after step {first + len(losses)}; {advice}", soft_wrap=True, markup=False)
        return EXIT_INTERRUPTED
    return EXIT_OK


class Trainer:
    """The model and all that changes with it: one step, and the checkpoint."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        self.options, self.place = options, place
        torch.manual_seed(options.seed)
        self.model = make_model(options.width).to(place.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which mypy does not know
        self.parallel: DistributedDataParallel | None = None
        if place.world > 1:
            # Before the batch norms are synchronised: with that done it refuses models on a CPU, where PyTorch's own
            # SyncBatchNorm does not run. What follows changes modules in place, and leaves the parameters it holds.
            devices = [place.device] if place.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, devices)
        if options.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if not options.eager:
            pointfuse.convert(self.model, inplace=True, recompute=options.recompute)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=options.lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.amp == "fp16")

    def step(self, step: int, stop: bool) -> tuple[float, bool]:
        """Take one step on this process's share of the global batch.

        Args:
            step: counted from 0; it decides which images are drawn.
            stop: whether this process was asked to stop.

        Returns:
            The loss of the global batch, and whether any process was asked to stop: all of them stop after the same
            step, or those that go on would wait for the others.
        """
        accumulate = self.options.accumulate
        sums = torch.zeros(2, device=self.place.device)
        sums[1] = float(stop)
        for part in range(accumulate):
            # DistributedDataParallel averages the gradients over the processes, once a step.
            last = part == accumulate - 1
            with nullcontext() if self.parallel is None or last else self.parallel.no_sync():
                loss = self._loss(step * accumulate + part) / accumulate
                self.scaler.scale(loss).backward()
            sums[0] += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.parallel is not None:
            dist.all_reduce(sums)
        loss_sum, asked = sums.tolist()
        return loss_sum / self.place.world, asked > 0

    def _loss(self, part: int) -> Tensor:
        """The loss of this process's share of the batch number `part`, all processes' batches counted as one."""
        batch, device = self.options.batch, self.place.device
        first = (part * self.place.world + self.place.rank) * batch
        images, targets = make_batch(self.options.seed, range(first, first + batch), self.options.size)
        images = images.to(device, memory_format=torch.channels_last)
        dtype = AMP_DTYPES[self.options.amp]
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            maps = (self.parallel or self.model)(images)
        return yolo_loss(maps, targets.to(device))

    def save(self, path: Path, step: int) -> None:
        """Write the checkpoint after `step` steps; whatever happens meanwhile, the file is the old one or the new."""
        if self.place.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": step,
            "rng": torch.get_rng_state(),
        }
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> int:
        """Read a checkpoint, in every process, and give the number of steps that were taken.

        Raises:
            SystemExit: the file cannot be read, is no checkpoint of this script, or is one of another model.
        """
        state = _read_checkpoint(path)
        differences = _differences(state["model"], self.model.state_dict())
        if differences:
            listed = "\n  ".join(differences[:5] + ["..."] * (len(differences) > 5))
            raise SystemExit(f"{path} is a checkpoint of another model than --width {self.options.width}:\n  {listed}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The options of this run win over those that the optimizer had.
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        return int(state["step"])


def _unit(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, a=SLOPE)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(SLOPE, inplace=True))


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Where a shape is, from coordinates that run from -1 to 1 across its box, y downwards."""
    if shape == "circle":
        return x.square() + y.square() <= 1
    if shape == "square":
        return (x.abs() <= 1) & (y.abs() <= 1)
    return (x.abs() <= (1 + y) / 2) & (y.abs() <= 1)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SystemExit(f"there is no checkpoint {path} to go on from: leave out --resume to start anew") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{path} cannot be read as a checkpoint: {error}") from error
    entries = {"model", "optimizer", "scaler", "step", "rng"}
    if not isinstance(state, dict) or entries - state.keys():
        found = f"the entries {', '.join(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise SystemExit(f"{path} holds {found}; a checkpoint of this script has {', '.join(sorted(entries))}")
    return state


def _differences(given: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """A line for each entry of a state_dict that one model has and the other has not, or in another shape."""
    lines = [f"{key}: not in the file" for key in expected.keys() - given.keys()]
    lines += [f"{key}: only in the file" for key in given.keys() - expected.keys()]
    for key in expected.keys() & given.keys():
        if given[key].shape != expected[key].shape:
            lines.append(f"{key}: {list(given[key].shape)} in the file, {list(expected[key].shape)} in this model")
    return sorted(lines)


@contextmanager
def _process_group(device_type: str) -> Iterator[Place]:
    """This process's place; under torchrun in a process group, which ends with the block."""
    if "RANK" not in os.environ:
        yield Place(0, 1, torch.device(device_type))
        return
    device = torch.device("cpu")
    if device_type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise SystemExit(f"process {local} has no GPU of its own: here are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PEER_TIMEOUT, device_id=device if device_type == "cuda" else None)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
        # torchrun ends all processes when one has left with an error, as they do after Ctrl-C: rank 0 may be writing.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets: raised in the middle of a step, KeyboardInterrupt would leave it half taken."""
    asked = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


class _RateColumn(TextColumn):
    """Steps a second."""

    def __init__(self) -> None:
        super().__init__("{task.speed:.3g} steps/s")

    def render(self, task: Any) -> Any:
        return super().render(task) if task.speed else ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[loss]}"),
        _RateColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_yolo_head.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=_count, default=200, help="of the optimiser, those of a checkpoint included (default 200)")
    add("--batch", type=_count, default=8, help="images a process draws at a time (default 8)")
    add("--accumulate", type=_count, default=1, metavar="K", help="batches to a step (default 1)")
    add("--size", type=_count, default=64, help="side of the images in pixels, a multiple of 8 (default 64)")
    add("--width", type=_count, default=16, help="channels of the stack's 1x1 units, an even number (default 16)")
    add("--lr", type=_positive, default=0.005, help="learning rate (default 0.005)")
    add("--seed", type=_seed, default=0, help="of the weights and the images (default 0)")
    add("--eager", action="store_true", help="without pointfuse, for comparison")
    add("--sync-bn", action="store_true", help="batch norm by the statistics of all processes' images")
    add("--recompute", action="store_true", help="keep less for the backward pass: pointfuse.convert(recompute=True)")
    add("--amp", choices=tuple(AMP_DTYPES), default="off", help="automatic mixed precision (default off)")
    add("--checkpoint", type=_output, metavar="PATH", help="saved as the training goes, at its end, and by Ctrl-C")
    add("--save-every", type=_count, default=50, metavar="N", help="steps between two checkpoints (default 50)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--json", type=_output, metavar="PATH", help="write each step's loss")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if problem := _conflict(options):
        parser.error(problem)
    return options


def _conflict(options: argparse.Namespace) -> str | None:
    """What is wrong with the options together."""
    if options.size % STRIDE:
        return f"--size must be a multiple of {STRIDE}, got {options.size}"
    if options.width % 2:
        return f"--width must be even, got {options.width}"
    if options.resume and not options.checkpoint:
        return "--resume needs --checkpoint, to go on from"
    if options.eager and options.recompute:
        return "--recompute is an option of pointfuse.convert, which --eager leaves out"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no GPU here"
    if options.eager and options.sync_bn and options.device == "cpu":
        return "PyTorch's own SyncBatchNorm does not run on a CPU: leave out --eager or --sync-bn"
    return None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^32 - 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _output(text: str) -> Path:
    """A file that can be written: an hour of training is a bad time to find out that it cannot."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


if __name__ == "__main__":
    sys.exit(main())
