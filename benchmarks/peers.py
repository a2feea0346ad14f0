"""The contenders: each a function from an eval model and an input to something that runs.

Those that prefer channels_last get the model and the input in it, in a copy of their own. To add one, write its
function under `@peer`; it shows in every suite, in the order of this file.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.harness import Contender, Prepared

EAGER_NCHW = "eager NCHW"
EAGER_CHANNELS_LAST = "eager channels_last"
COMPILED = "torch.compile"
COMPILED_FREEZING = "torch.compile freezing"
CONVERTED = "pointfuse converted"
FROZEN = "pointfuse frozen"

BASELINES = (EAGER_CHANNELS_LAST, COMPILED_FREEZING)

PEERS: dict[str, Contender] = {}

Build = Callable[[nn.Module, Tensor], Prepared]


def peer(
    name: str, *, devices: tuple[str, ...] = ("cpu", "cuda"), reset: Callable[[], None] | None = None
) -> Callable[[Build], Build]:
    """Register the function below as the contender `name`."""

    def register(build: Build) -> Build:
        PEERS[name] = Contender(name, build, devices, reset)
        return build

    return register


def _reset_dynamo() -> None:
    """Forget compiled code: the recompile limit counts all cases together, since all stacks share one forward."""
    torch._dynamo.reset()


@peer(EAGER_NCHW)
def eager_nchw(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(model, x)


@peer(EAGER_CHANNELS_LAST)
def eager_channels_last(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(*_channels_last(model, x))


@peer("folded in-place")
def folded(model: nn.Module, x: Tensor) -> Prepared:
    """Batch norm folded into the convolution by hand, the usual way to deploy without a compiler."""
    model, x = _channels_last(model, x)
    _fold(model)
    return Prepared(model, x)


@peer(COMPILED, reset=_reset_dynamo)
def compiled(model: nn.Module, x: Tensor) -> Prepared:
    model, x = _channels_last(model, x)
    run = torch.compile(model, dynamic=False)
    run(x)
    return Prepared(run, x)


@peer(COMPILED_FREEZING, reset=_reset_dynamo)
def compiled_freezing(model: nn.Module, x: Tensor) -> Prepared:
    import torch._inductor.config as inductor

    model, x = _channels_last(model, x)
    # The option keeps this compilation apart from the plain one, whose code for the same forward would be reused. The
    # patch is for dynamo, which reads the global setting when it compiles: at the first call.
    run = torch.compile(model, dynamic=False, options={"freezing": True})
    with inductor.patch(freezing=True):
        run(x)
    return Prepared(run, x)


@peer(CONVERTED)
def converted(model: nn.Module, x: Tensor) -> Prepared:
    import pointfuse

    model, x = _channels_last(model, x)
    with warnings.catch_warnings():
        # The heads' last convolutions are timed alone too, and have nothing behind them to fuse.
        warnings.filterwarnings("ignore", "pointfuse.convert found no unit", UserWarning)
        return Prepared(pointfuse.convert(model), x)


@peer(FROZEN)
def frozen(model: nn.Module, x: Tensor) -> Prepared:
    import pointfuse

    x = x.to(memory_format=torch.channels_last)
    return Prepared(pointfuse.freeze(model, example_inputs=(x,)), x)


def _channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of both in channels_last."""
    # mypy knows `to` without a memory format only.
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.to(memory_format=torch.channels_last)


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
        if isinstance(child, nn.LeakyReLU):
            child.inplace = True
        _fold(child)
