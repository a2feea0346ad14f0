"""Compares a converted model with the one it was made from, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pointfuse.convert.planning import ExampleInputs, call, fork_rng, run_quietly
from pointfuse.convert.structure import set_mode

# Largest difference over the largest magnitude, by dtype. For fp32 and fp64 far below what a wrong unit gives; in half
# precision deep networks amplify rounding (YOLOv3 in bf16: eager is 0.1 from float64), and only gross errors show.
# Training mode divides by the batch's own deviation, which costs another digit.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}


class VerificationError(RuntimeError):
    """A converted model answered otherwise than the original; ``worst`` holds the worst difference of each mode."""

    def __init__(self, message: str, worst: Sequence[Difference] = ()) -> None:
        super().__init__(message)
        self.worst = list(worst)


@dataclass(frozen=True)
class Difference:
    """How far two models' values are apart: the largest difference over the largest magnitude of the original's."""

    mode: str
    name: str
    error: float
    tolerance: float


def verify(original: nn.Module, converted: nn.Module, example_inputs: ExampleInputs) -> list[Difference]:
    """Run both models on example inputs in evaluation and training mode; raise where they differ.

    Compares the models' outputs, the output of every module that both call, and, after training mode, every buffer. In
    half precision only gross errors can be told from rounding: verify in fp32.
    Modes, buffers and random state are given back as they were. Returns the worst difference of each mode.

    Raises :class:`VerificationError` with the worst module's name and figures.
    """
    worst = []
    for mode in ("eval", "train"):
        expected = _record(original, example_inputs, mode == "train")
        actual = _record(converted, example_inputs, mode == "train")
        # A module that is watched adds to its children's results itself.
        unwatched = _record(converted, example_inputs, mode == "train", watched=False)
        differences = [
            _difference(mode, name, value, found[name])
            for found in (actual, unwatched)
            for name, value in expected.items()
            if name in found
        ]
        if not differences:
            raise VerificationError("the model gave no tensors to compare")
        worst.append(max(differences, key=lambda d: d.error / d.tolerance))
    failed = max(worst, key=lambda d: d.error / d.tolerance)
    if not failed.error <= failed.tolerance:
        raise VerificationError(
            f"{failed.name} differs most, in {failed.mode} mode: by {failed.error:.3g} of its largest magnitude, where "
            f"{failed.tolerance:.3g} is accepted; the model was not converted",
            worst,
        )
    return worst


def outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The floating-point tensors that a model puts out in evaluation mode."""
    leaves = pytree.tree_leaves(run_quietly(model, example_inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def compare(expected: list[Tensor], actual: list[Tensor]) -> None:
    """Raise :class:`VerificationError` where the outputs of a frozen model are not the original's."""
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        difference = _difference("eval", f"output {i}", a, b)
        if not difference.error <= difference.tolerance:
            raise VerificationError(
                f"{difference.name} of the frozen model differs by {difference.error:.3g} of its largest magnitude, "
                f"where {difference.tolerance:.3g} is accepted: something reads a convolution's result before its "
                "batch norm",
                [difference],
            )


def _record(model: nn.Module, example_inputs: ExampleInputs, training: bool, watched: bool = True) -> dict[str, Tensor]:
    """Every tensor that the model's modules, or it alone, put out, and its buffers, by name; it is left as it was."""
    values: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        for i, leaf in enumerate(pytree.tree_leaves(output)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                values[f"output {i} of {name or 'the model'}"] = leaf.detach().clone()

    # Only modules with children: the leaves of a unit are not called any more. TorchScript takes no hooks.
    parents = [
        (n, m)
        for n, m in model.named_modules()
        if watched and next(m.children(), None) is not None and not isinstance(m, torch.jit.ScriptModule)
    ]
    with _left_as_it_was(model), torch.set_grad_enabled(training):
        for m in model.modules():
            set_mode(m, training)
        handles = [m.register_forward_hook(lambda _, args, output, name=n: note(name, output)) for n, m in parents]
        try:
            note("", call(model, example_inputs))
        finally:
            for handle in handles:
                handle.remove()
        values |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return values


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with fork_rng(model):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for m, mode in modes:
                set_mode(m, mode)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _difference(mode: str, name: str, expected: Tensor, actual: Tensor) -> Difference:
    tolerance = TOLERANCES.get(expected.dtype, 1e-4) * (10 if mode == "train" and expected.dtype.itemsize > 2 else 1)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return Difference(mode, name, float("inf"), tolerance)
    if expected.numel() == 0:
        return Difference(mode, name, 0.0, tolerance)
    a, b = expected.double(), actual.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).max().item()
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    error = gap / scale if scale > 0 else gap
    return Difference(mode, name, float("inf") if error != error else error, tolerance)
