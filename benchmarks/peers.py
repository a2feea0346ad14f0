"""The contenders: each a function from an eval model, or a training step, and an input to something that runs.

The input's layout, NCHW or channels_last, is the one to run in: contenders copy the model into it, but for the two of
eager PyTorch, and cuDNN's graph, which name theirs. To add one, write its
function under `@peer`; it shows in every suite of inference, or of training, or both, in the order of this file. On a
GPU all of them may run as CUDA graphs, captured by the harness: none brings graphs of its own.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Contender
from benchmarks.timing import LAYOUTS, Prepared, layout_of
from benchmarks.training import Step

EAGER_NCHW = "eager NCHW"
EAGER_CHANNELS_LAST = "eager channels_last"
COMPILED = "torch.compile"
COMPILED_FREEZING = "torch.compile freezing"
COMPILED_AUTOTUNED = "torch.compile max-autotune"
CUDNN_GRAPH = "cuDNN graph"
INPLACE_ABN = "inplace_abn"
CONVERTED = "pointfuse converted"
RECOMPUTING = "pointfuse recompute"
COMPILED_CONVERTED = "torch.compile of converted"
FROZEN = "pointfuse frozen"
CUDA_LIVE = "pointfuse cuda live"
CUDA_FROZEN = "pointfuse cuda"
TRITON_LIVE = "pointfuse triton live"
TRITON_FROZEN = "pointfuse triton"

BASELINES = (EAGER_CHANNELS_LAST, COMPILED_FREEZING)
TRAINING_BASELINES = (EAGER_CHANNELS_LAST, COMPILED)

PEERS: dict[str, Contender] = {}


def is_ours(contender: str) -> bool:
    return contender.startswith("pointfuse")


def is_other(contender: str) -> bool:
    """A compiled converted model is pointfuse's model and the compiler's speed: it is neither."""
    return not is_ours(contender) and contender != COMPILED_CONVERTED


Build = Callable[[nn.Module, Tensor], Prepared]


def peer(
    name: str,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    reset: Callable[[], None] | None = None,
    infers: bool = True,
    trains: bool = False,
) -> Callable[[Build], Build]:
    """Register the function below as the contender `name`."""

    def register(build: Build) -> Build:
        PEERS[name] = Contender(name, build, devices, reset, infers, trains)
        return build

    return register


def _reset_dynamo() -> None:
    """Forget compiled code: the recompile limit counts all cases together, since all stacks share one forward."""
    torch._dynamo.reset()


@peer(EAGER_NCHW, trains=True)
def eager_nchw(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(*_in_layout(model, x, "NCHW"))


@peer(EAGER_CHANNELS_LAST, trains=True)
def eager_channels_last(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(*_in_layout(model, x, "channels_last"))


@peer("folded in-place")
def folded(model: nn.Module, x: Tensor) -> Prepared:
    """Batch norm folded into the convolution by hand, the usual way to deploy without a compiler."""
    model, x = _in_layout(model, x)
    _fold(model)
    return Prepared(model, x)


@peer(COMPILED, reset=_reset_dynamo, trains=True)
def compiled(model: nn.Module, x: Tensor) -> Prepared:
    model, x = _in_layout(model, x)
    run = _compiled(model, {})
    run(x)
    return Prepared(run, x)


@peer(COMPILED_FREEZING, reset=_reset_dynamo)
def compiled_freezing(model: nn.Module, x: Tensor) -> Prepared:
    return _compiled_frozen(model, x, {})


@peer(COMPILED_AUTOTUNED, devices=("cuda",), reset=_reset_dynamo, trains=True)
def compiled_autotuned(model: nn.Module, x: Tensor) -> Prepared:
    """The mode "max-autotune", with freezing at inference, and without its own CUDA graphs, since all contenders get
    the same."""
    import torch._inductor.select_algorithm as select_algorithm

    # It prints a table of candidates for each layer.
    select_algorithm.PRINT_AUTOTUNE = False
    options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    if not isinstance(model, Step):
        return _compiled_frozen(model, x, options)
    model, x = _in_layout(model, x)
    run = _compiled(model, options)
    run(x)
    return Prepared(run, x)


@peer(CUDNN_GRAPH, devices=("cuda",))
def cudnn_graph(model: nn.Module, x: Tensor) -> Prepared:
    """Batch norm folded, and each unit one graph of cuDNN's: convolution, bias and activation."""
    from benchmarks.cudnn_graph import fuse_units

    model, x = _in_layout(model, x, "channels_last")
    fuse_units(model)
    return Prepared(model, x)


@peer(INPLACE_ABN, infers=False, trains=True)
def inplace_abn(model: nn.Module, x: Tensor) -> Prepared:
    """Batch norm and LeakyReLU as one operator that keeps its output alone for the backward, where the package of that
    name is installed: https://github.com/mapillary/inplace_abn."""
    activated = importlib.import_module("inplace_abn").InPlaceABN
    model, x = _in_layout(model, x)
    if not _activate_in_place(model, activated):
        raise ValueError("no batch norm with a LeakyReLU behind it")
    return Prepared(model, x)


@peer(CONVERTED, trains=True)
def converted(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(*_converted(model, x))


@peer(RECOMPUTING, infers=False, trains=True)
def recomputing(model: nn.Module, x: Tensor) -> Prepared:
    """Converted so that units keep their input alone, and convolve again in the backward."""
    return Prepared(*_converted(model, x, recompute=True))


@peer(COMPILED_CONVERTED, devices=("cpu",), reset=_reset_dynamo, trains=True)
def compiled_converted(model: nn.Module, x: Tensor) -> Prepared:
    """`torch.compile` of a converted model, which is to cost nothing beside `torch.compile` of the model."""
    run, x = _converted(model, x)
    run = _compiled(run, {})
    run(x)
    return Prepared(run, x)


@peer(FROZEN)
def frozen(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(*_frozen(model, x))


@peer(CUDA_LIVE, devices=("cuda",), trains=True)
def cuda_live(model: nn.Module, x: Tensor) -> Prepared:
    """The CUDA C++ kernels with batch norm read on every call. Convolutions outside units, and those of gradients, stay
    PyTorch's."""
    return _live_alone("cuda", model, x)


@peer(CUDA_FROZEN, devices=("cuda",))
def cuda_frozen(model: nn.Module, x: Tensor) -> Prepared:
    """The CUDA C++ kernels on a frozen model, and nothing else."""
    return _frozen_alone("cuda", model, x)


@peer(TRITON_LIVE, devices=("cuda",), trains=True)
def triton_live(model: nn.Module, x: Tensor) -> Prepared:
    """The Triton kernels with batch norm read on every call. Convolutions outside units, and those of gradients, stay
    PyTorch's."""
    return _live_alone("triton", model, x)


@peer(TRITON_FROZEN, devices=("cuda",))
def triton_frozen(model: nn.Module, x: Tensor) -> Prepared:
    """The Triton kernels on a frozen model, and nothing else."""
    return _frozen_alone("triton", model, x)


def refuse_convolutions(model: nn.Module, x: Tensor, allowed: int) -> None:
    """Run `model`, and raise `RuntimeError` if more than `allowed` of PyTorch's own convolutions ran in it.

    What is timed under a kernel's name must be that kernel. Gradients of convolutions do not count.
    """
    with _Convolutions() as seen:
        model(x)
    if len(seen.names) > allowed:
        raise RuntimeError(f"{len(seen.names)} convolutions ran as {seen.names[0]}, {allowed} may")


class _Convolutions(TorchDispatchMode):
    """Keeps the names of the forward convolution operators that are called in its block, other than pointfuse's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "convolution" in name and "backward" not in name and not name.startswith("pointfuse::"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _compiled(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The model compiled; of a training step the model in it, and with it its backward. May change `model`."""
    if isinstance(model, Step):
        model.model = _compiled(model.model, options)
        return model
    # mypy knows what becomes of a function only.
    return cast(nn.Module, torch.compile(model, dynamic=False, options=options))


def _compiled_frozen(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Prepared:
    import torch._inductor.config as inductor

    model, x = _in_layout(model, x)
    # The option keeps this compilation apart from the plain one, whose code for the same forward would be reused. The
    # patch is for dynamo, which reads the global setting when it compiles: at the first call.
    run = torch.compile(model, dynamic=False, options={**options, "freezing": True})
    with inductor.patch(freezing=True):
        run(x)
    return Prepared(run, x)


def _converted(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, Tensor]:
    import pointfuse

    model, x = _in_layout(model, x)
    with warnings.catch_warnings():
        # The heads' last convolutions are timed alone too, and have nothing behind them to fuse.
        warnings.filterwarnings("ignore", "pointfuse.convert found no unit", UserWarning)
        return pointfuse.convert(model, **options), x


def _frozen(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    import pointfuse

    return pointfuse.freeze(model, example_inputs=(x,)), x


def _live_alone(backend: str, model: nn.Module, x: Tensor) -> Prepared:
    import pointfuse

    others = _others(model)
    alone = partial(_alone, backend, strict=not others)
    with alone():
        plan = pointfuse.plan(model)
        if not plan.units:
            raise ValueError("no unit to convert")
        model, x = _converted(model, x)
        refuse_convolutions(model, x, allowed=len(plan.skipped) + others)
    return Prepared(model, x, alone)


def _frozen_alone(backend: str, model: nn.Module, x: Tensor) -> Prepared:
    others = _others(model)
    alone = partial(_alone, backend, strict=not others)
    with alone():
        model, x = _frozen(model, x)
        refuse_convolutions(model, x, allowed=others)
    return Prepared(model, x, alone)


@contextmanager
def _alone(backend: str, strict: bool) -> Iterator[None]:
    import pointfuse

    with warnings.catch_warnings():
        # Where PyTorch must run some of a network, which ones is counted by `refuse_convolutions`.
        warnings.filterwarnings("ignore", "pointfuse", UserWarning)
        with pointfuse.use_backend(backend, strict=strict):
            yield


def _others(model: nn.Module) -> int:
    """How many convolutions are neither 1x1 nor 3x3, as the first of ResNet-50, which stay PyTorch's."""
    sizes = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(size not in ((1, 1), (3, 3)) for size in sizes)


def _in_layout(model: nn.Module, x: Tensor, layout: str | None = None) -> tuple[nn.Module, Tensor]:
    """A copy of the model in a layout, the input's unless given, and the input in it."""
    memory_format = LAYOUTS[layout or layout_of(x)]
    # mypy knows `to` without a memory format only.
    model = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    return model, x.contiguous(memory_format=memory_format)


@torch.no_grad()
def _activate_in_place(model: nn.Module, activated: Callable[..., nn.Module]) -> int:
    """Make one module of each batch norm and the LeakyReLU that follows it among a module's children; returns how many.

    Holds for YOLOv3, whose children are registered in the order in which they run.
    """
    children = list(model.named_children())
    count = 0
    for (bn_name, bn), (act_name, act) in itertools.pairwise(children):
        if isinstance(bn, nn.BatchNorm2d) and isinstance(act, nn.LeakyReLU):
            unit = activated(bn.num_features, bn.eps, bn.momentum, activation_param=act.negative_slope)
            unit.load_state_dict(bn.state_dict())
            # It scales by |weight| + eps.
            cast(nn.Parameter, unit.weight).sub_(bn.eps)
            setattr(model, bn_name, unit.to(bn.weight.device).train(bn.training))
            setattr(model, act_name, nn.Identity())
            count += 1
    return count + sum(_activate_in_place(child, activated) for _, child in children)


def _fold(model: nn.Module) -> None:
    """Fold each batch norm that follows a convolution among a module's children, and make the activations in place.

    Holds for the networks here, whose children are registered in the order in which they run.
    """
    children = list(model.named_children())
    for (conv_name, conv), (bn_name, bn) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            setattr(model, conv_name, fuse_conv_bn_eval(conv, bn))
            setattr(model, bn_name, nn.Identity())
    for _, child in children:
        if isinstance(child, nn.LeakyReLU | nn.ReLU):
            child.inplace = True
        _fold(child)
