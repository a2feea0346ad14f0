"""The unit with gradients: batch norm by the batch's own statistics or by given ones.

The forward keeps x and the convolution's output y; the output of batch norm, from which PyTorch's activation takes its
gradient, is made again from y in the backward. With ``recompute`` it keeps x alone, and the backward convolves again.

Each step is a backend's: see ``backends/aten_training.py``. The convolution's own gradients are PyTorch's.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from pointfuse.backends import announce_refusal, aten, aten_training, training_steps
from pointfuse.problem import Activation, BatchNorm, Geometry, Refused

_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Call(NamedTuple):
    """What a unit's gradient needs beside tensors. ``group``: the processes whose batches are normalised together."""

    geometry: Geometry
    activation: Activation
    residual_order: str
    bn: BatchNorm
    group: Any
    recompute: bool


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def serves(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm,
    geometry: Geometry,
    residual: Tensor | None,
    *,
    recompute: bool = False,
    group: Any = None,
) -> bool:
    """Whether :func:`conv_bn_act` gives what the modules one by one give, and is worth its while.

    It serves no call that is wrong: the modules have the error to say.
    """
    if torch.compiler.is_compiling() or not _fits(x, weight, bias, bn, geometry, residual, group):
        return False
    if training_steps() is not aten_training or recompute:
        return True
    # On a GPU, PyTorch's own kernels one by one are as fast as the same with another pass between.
    if x.is_cuda or group is not None:
        return not x.is_cuda
    height, width = geometry.resolved(weight.shape).output_plane(x.shape, weight.shape)
    dtype = _autocast_dtype(x, "cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return aten_training.pays(len(x) * len(weight) * height * width, weight, dtype)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm,
    activation: Activation,
    geometry: Geometry,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    *,
    recompute: bool = False,
    group: Any = None,
) -> Tensor:
    """The unit with gradients, for a call that :func:`serves` admits.

    With ``group`` the statistics are those of the batches of all its processes, which must all call; some may be empty.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = _autocast(x, device), _autocast(weight, device)
        bias = None if bias is None else _autocast(bias, device)
    call = Call(geometry.resolved(weight.shape), activation, residual_order, bn, group, recompute)
    with _no_autocast(device):
        return _ConvBNAct.apply(x, weight, bias, bn.weight, bn.bias, residual, call)


class _ConvBNAct(torch.autograd.Function):
    """x, weight, bias, gamma, beta, residual -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        steps = training_steps()
        done = _forward_at_once(steps, x, weight, bias, gamma, beta, residual, call)
        ctx.count = None
        if done is not None:
            out, y, mean, rstd = done
        else:
            steps, out, y, mean, rstd, ctx.count = _forward_by_steps(
                steps, x, weight, bias, gamma, beta, residual, call
            )
        ctx.call, ctx.steps = call, steps
        ctx.residual_shape = None if residual is None else residual.shape
        seen = residual if call.residual_order == "add_act" and call.activation.name != "identity" else None
        ctx.save_for_backward(x, weight, bias, gamma, beta, seen, None if call.recompute else y, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call, steps = ctx.call, ctx.steps
        x, weight, bias, gamma, beta, residual, y, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad_out, x, weight, bias, gamma, beta, residual)
        want_x, want_weight, want_bias, want_gamma, want_beta, want_residual, _ = ctx.needs_input_grad
        with _no_autocast(x.device.type):
            if y is None:
                steps, y, _ = _conv(steps, x, weight, bias, call.geometry, call.bn.batch_statistics)
            wanted = (want_x or want_weight or want_bias, want_residual, want_gamma, want_beta)
            dy, d_residual, d_gamma, d_beta = _gradients(
                steps, call, ctx.count, grad_out, y, mean, rstd, _wide(gamma, y), _wide(beta, y), residual, wanted
            )
            d_x = d_weight = d_bias = None
            if dy is not None:
                stride, padding, dilation, groups = call.geometry
                d_x, d_weight, d_bias = torch.ops.aten.convolution_backward(
                    dy, x, weight, None if bias is None else list(bias.shape), stride, padding, dilation, False,
                    [0, 0], groups, [want_x, want_weight, want_bias],
                )  # fmt: skip
        if want_residual and (call.residual_order == "act_add" or d_residual is None):
            d_residual = grad_out
        d_gamma = None if d_gamma is None or not want_gamma else d_gamma.to(gamma.dtype)
        d_beta = None if d_beta is None or not want_beta else d_beta.to(beta.dtype)
        return d_x, d_weight, d_bias, d_gamma, d_beta, d_residual if want_residual else None, None


def _forward_at_once(
    steps: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """out, y, mean and rstd by a backend that has one call for them, where it takes the unit."""
    bn = call.bn
    if not hasattr(steps, "forward") or not bn.batch_statistics or call.group is not None or x.numel() == 0:
        return None
    try:
        return steps.forward(
            x, weight, bias, call.geometry, gamma, beta, residual, bn.running_mean, bn.running_var, bn.momentum,
            bn.eps, call.activation, call.residual_order,
        )  # fmt: skip
    except Refused:
        # Its steps one by one may serve, and say why if they do not.
        return None


def _forward_by_steps(
    steps: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    call: Call,
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The backend that served, out, y, mean, rstd, and how many elements a channel all processes have together."""
    bn = call.bn
    steps, y, parts = _conv(steps, x, weight, bias, call.geometry, bn.batch_statistics)
    mean = rstd = count = None
    if not bn.batch_statistics:
        mean, rstd = _given_statistics(bn, y)
    elif call.group is not None:
        parts = aten_training.statistics(y) if parts is None else parts
        mean, rstd, count = _joint_statistics(parts, bn, call.group)
        parts = None
    if y.numel() == 0:
        assert mean is not None
        assert rstd is not None
        return steps, torch.empty_like(y), y, mean, rstd, count
    out, mean, rstd = _step(
        steps, "normalise", y, parts, mean, rstd, _wide(gamma, y), _wide(beta, y), residual,
        bn.running_mean, bn.running_var, bn.momentum, bn.eps, call.activation, call.residual_order,
    )  # fmt: skip
    return steps, out, y, mean, rstd, count


def _gradients(
    steps: Any,
    call: Call,
    count: Tensor | None,
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of y, residual, gamma and beta, as far as wanted; ``count`` is that of all processes."""
    unit = (grad_out, y, mean, rstd, gamma, beta, residual, call.activation, call.residual_order)
    batch_statistics = call.bn.batch_statistics
    want_y, want_residual, want_gamma, want_beta = wanted
    # Where the activation does not see the residual, its gradient is grad_out.
    want_residual = want_residual and residual is not None
    if call.group is None and steps is aten_training:
        return aten_training.backward(*unit, batch_statistics, (want_y, want_residual, want_gamma, want_beta))
    d_gamma = d_beta = parts = None
    elements: float = y.numel() // y.shape[1]
    if want_gamma or want_beta or (want_y and batch_statistics):
        parts = _step(steps, "sums", *unit)
    if call.group is not None:
        assert parts is not None
        assert count is not None
        d_beta, d_gamma = parts.sum(0)
        if want_y:
            # Divided here, so that the count need not be brought to the host.
            parts = _sum_of_all(parts.sum(0, keepdim=True), call.group) / count
            elements = 1
    elif parts is not None and not (want_y and batch_statistics):
        d_beta, d_gamma = parts.sum(0)
    if not want_y and not want_residual:
        return None, None, d_gamma, d_beta
    given = parts if batch_statistics else None
    dy, d_residual, *d_norm = _step(steps, "gradients", *unit, given, elements, want_residual)
    if d_gamma is None and given is not None:
        d_gamma, d_beta = d_norm
    return dy if want_y else None, d_residual, d_gamma, d_beta


def _differentiable_backward(
    ctx: Any,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients as PyTorch's own operators give them, which can be differentiated again (``create_graph=True``)."""
    call: Call = ctx.call
    if call.group is not None:
        raise RuntimeError(
            "pointfuse: batch norm synchronised over processes cannot be differentiated twice (create_graph=True)"
        )
    bn = call.bn
    if bn.batch_statistics:
        bn = bn._replace(running_mean=None, running_var=None)
    stands_in = residual is None and ctx.residual_shape is not None
    if stands_in:
        # Its own value is in no gradient.
        residual = grad_out.new_zeros(ctx.residual_shape).requires_grad_()
    with torch.enable_grad(), _no_autocast(x.device.type):
        # As views, each is a tensor of its own, also where one was given for two.
        inputs = [t if t is None else t.view_as(t) for t in (x, weight, bias, gamma, beta, residual)]
        x, weight, bias, gamma, beta, residual = inputs  # type: ignore[assignment]
        bn = bn._replace(weight=gamma, bias=beta)
        out = aten.conv_bn_act(x, weight, bias, bn, call.activation, call.geometry, residual, call.residual_order)
    wanted = {i: t for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]}
    given = torch.autograd.grad(out, list(wanted.values()), grad_out, create_graph=True, allow_unused=True)
    found = dict(zip(wanted, given, strict=True))
    return tuple(found.get(i) for i in range(7))


def _conv(
    steps: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool
) -> tuple[Any, Tensor, Tensor | None]:
    """The convolution, and the backend that served it and is to go on."""
    if steps is not aten_training and x.numel() > 0:
        try:
            return steps, *steps.conv(x, weight, bias, geometry, statistics)
        except Refused as refused:
            announce_refusal(str(refused))
    return aten_training, *aten_training.conv(x, weight, bias, geometry, statistics)


def _step(steps: Any, name: str, *args: Any) -> Any:
    """A step by a backend, or by ATen where it refuses."""
    if steps is not aten_training:
        try:
            return getattr(steps, name)(*args)
        except Refused as refused:
            announce_refusal(str(refused))
    return getattr(aten_training, name)(*args)


def _given_statistics(bn: BatchNorm, y: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _wide(bn.running_mean, y), _wide(bn.running_var, y)
    assert mean is not None
    assert var is not None
    return mean, torch.rsqrt(var + bn.eps)


def _joint_statistics(parts: Tensor, bn: BatchNorm, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and reciprocal deviation of the batches of all processes, and how many elements a channel they have."""
    own = torch.stack(aten_training.merge(parts)) if len(parts) > 1 else parts[0]
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own.contiguous(), group)
    joint = torch.stack(every)
    mean, rstd = aten_training.finalise(joint, bn.running_mean, bn.running_var, bn.momentum, bn.eps)
    return mean, rstd, joint[:, 0].sum(0)


def _sum_of_all(parts: Tensor, group: Any) -> Tensor:
    total = parts.clone()
    dist.all_reduce(total, group=group)
    return total


def _fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm,
    geometry: Geometry,
    residual: Tensor | None,
    group: Any,
) -> bool:
    operands = [t for t in (x, weight, bias, *bn[:4], residual) if t is not None]
    geometry = geometry.resolved(weight.shape)
    if (
        any(type(t) not in _PLAIN for t in operands)
        or x.dim() != 4
        or weight.dim() != 4
        or x.layout is not torch.strided
        or x.is_meta  # which has no autocast to ask about, and nothing to gain
        or not geometry.well_formed
        or weight.shape[0] % geometry.groups
        or x.shape[1] != weight.shape[1] * geometry.groups
        or (group is None and x.numel() == 0)
        or any(t.device != x.device for t in operands)
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    ):
        return False
    height, width = geometry.output_plane(x.shape, weight.shape)
    c_out, dtype = weight.shape[0], x.dtype
    if min(height, width) < 1 or min(x.shape[1:]) < 1 or c_out < 1:
        return False
    if torch.is_autocast_enabled(x.device.type):
        dtype = _autocast_dtype(x, x.device.type)
        same = all(_autocast_dtype(t, x.device.type) == dtype for t in (weight, bias) if t is not None)
    else:
        same = weight.dtype == dtype and (bias is None or bias.dtype == dtype)
    norms = [t for t in bn[:4] if t is not None]
    return (
        same
        and dtype in _DTYPES
        and (bias is None or bias.shape == (c_out,))
        and (residual is None or (residual.shape == (len(x), c_out, height, width) and residual.dtype == dtype))
        and all(t.shape == (c_out,) and t.dtype == norms[0].dtype for t in norms)
        and all(t.dtype in (dtype, torch.float32) for t in norms)
        and (bn.running_mean is None) == (bn.running_var is None)
        and (bn.batch_statistics or bn.running_mean is not None)
        and bn.eps > 0
        and (not bn.batch_statistics or group is not None or len(x) * height * width > 1)
    )


def _autocast_dtype(t: Tensor, device: str) -> torch.dtype:
    """The dtype that autocast convolves a tensor in: it leaves fp64 alone."""
    eligible = t.is_floating_point() and t.dtype != torch.float64
    return torch.get_autocast_dtype(device) if eligible else t.dtype


def _autocast(t: Tensor, device: str) -> Tensor:
    return t.to(_autocast_dtype(t, device))


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _wide(t: Tensor | None, y: Tensor) -> Tensor | None:
    """In the dtype of statistics."""
    return None if t is None else t.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
