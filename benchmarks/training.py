"""Training steps: what is run, what it keeps for the backward, and inputs on which right answers agree.

A step is a module like any other, whose outputs are gradients too, so that contenders of training are built, checked
and timed as those of inference are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models.yolov3 import SLOPE

# How far batch norm's shift may be moved. Its own deviation is 0.1.
MAX_SHIFT = 0.1
# Half precision takes a unit's values no farther from where they are.
NEAR_ZERO = 1 / 16


class Step(nn.Module):
    """Forward and backward of a model, without an optimiser, from an upstream gradient that is always the same.

    Every call begins with gradients of None, also those of its input, and hands out what it found: to clear them costs
    an assignment for each.

    Args:
        model: in training mode.
        upstream: the gradient of its output, [batch, c_out, height, width].
        autocast: the dtype to run the forward in, with parameters in fp32; None runs it as it is.
    """

    def __init__(self, model: nn.Module, upstream: Tensor, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("upstream", upstream)
        self.autocast = autocast

    @property
    def inplace(self) -> bool:
        """Whether activations write over their input, of which eager then keeps one tensor less."""
        return any(getattr(module, "inplace", False) for module in self.model.modules())

    def output(self, x: Tensor) -> Tensor:
        """The forward alone, recorded."""
        # The check's float64 run stays float64.
        dtype = None if x.dtype == torch.float64 else self.autocast
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return self.model(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output, then the gradients of x and of the model's parameters, in their order."""
        x = x.detach().requires_grad_()
        y = self.output(x)
        y.backward(self.get_buffer("upstream"))
        leaves = [x, *self.model.parameters()]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        missing = sum(gradient is None for gradient in gradients)
        if missing:
            raise RuntimeError(f"{missing} of {len(leaves)} gradients were not computed")
        return (y.detach(), *(gradient for gradient in gradients if gradient is not None))


def saved_bytes(step: Step, x: Tensor) -> int:
    """What autograd keeps of a step's forward: the memory of each tensor once, without parameters and buffers.

    The input counts, as in a network, where it is what the unit before gave.
    """
    own = {t.untyped_storage().data_ptr() for t in (*step.parameters(), *step.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        # Held until all is counted: freed memory would be given out again, and counted once for two.
        y = step.output(x.detach().requires_grad_())
    del y
    return sum(kept.values())


def peak_bytes(step: Callable[[Tensor], object], x: Tensor) -> int | None:
    """The most memory that a step takes beyond what was taken before it; None on a device that does not tell."""
    if not x.is_cuda:
        return None
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    step(x)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


@torch.no_grad()
def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype, seed: int) -> Step:
    """A step of `model` on inputs like x; both are in fp32 and on one device. Changes `model`.

    In half precision it runs under autocast. The weights of convolutions are rounded to `dtype`: then autocast's own
    rounding is exact, and errors against float64 are those of the computation alone. The upstream gradient is zero
    where a last LeakyReLU's input is next to its kink, as far as half precision can tell.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters():
                parameter.copy_(parameter.to(dtype))
    y = keep_off_kinks(model, x.to(dtype).float())
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=generator).to(y.device, dtype)
    upstream[torch.where(y > 0, y, y / -SLOPE) < NEAR_ZERO] = 0
    return Step(model, upstream, None if dtype == torch.float32 else dtype)


@torch.no_grad()
def keep_off_kinks(model: nn.Module, x: Tensor) -> Tensor:
    """Move batch norms' shifts by at most `MAX_SHIFT`, so that for x no activation is given a value next to zero.

    There its derivative jumps: a value that rounding moves across zero changes gradients by more than any rounding, in
    PyTorch as well as in a contender, and by chance in one of them alone. Of each activation the batch norm that ran
    last before it is moved, through a residual sum too.

    Returns:
        what the model gives.
    """
    last: list[nn.BatchNorm2d] = []

    def remember(bn: nn.Module, inputs: tuple[Tensor], z: Tensor) -> None:
        assert isinstance(bn, nn.BatchNorm2d)
        last[:] = [bn]

    def move(activation: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return (_into_the_widest_gap(last.pop(), inputs[0]),) if last else None

    modules = list(model.modules())
    hooks = [module.register_forward_hook(remember) for module in modules if isinstance(module, nn.BatchNorm2d)]
    hooks += [m.register_forward_pre_hook(move) for m in modules if isinstance(m, nn.LeakyReLU | nn.ReLU)]
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def _into_the_widest_gap(bn: nn.BatchNorm2d, z: Tensor) -> Tensor:
    """Shift each channel of [batch, c, height, width] so that zero is in the middle of its widest gap around there."""
    values = z.transpose(0, 1).flatten(1).sort(1).values
    gaps, middles = values.diff(dim=1), (values[:, 1:] + values[:, :-1]) / 2
    gaps = gaps.where(middles.abs() <= MAX_SHIFT, 0)
    widest = gaps.argmax(1, keepdim=True)
    # A channel with no gap near zero has no value there either.
    shift = torch.where(gaps.gather(1, widest) > 0, middles.gather(1, widest), 0)[:, 0]
    bn.bias.sub_(shift)
    return z - shift[:, None, None]
