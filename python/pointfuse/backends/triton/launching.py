"""Plans turned into launches, for eager calls and for graphs that are traced.

Importing this module imports Triton and registers the operator ``pointfuse::_conv_bn_act_triton``, which torch.compile
and AOTInductor see through: they get the kernels themselves. torch.export keeps it whole.
"""

# Annotations are read when the operator is registered: as they stand, not as strings.
import contextlib
import contextvars
import functools
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from pointfuse.backends import calls
from pointfuse.backends.triton import tables
from pointfuse.backends.triton.configs import REFERENCE_CHIPS, Chip
from pointfuse.backends.triton.kernels import conv_bn_act, finish_split
from pointfuse.backends.triton.planning import Plan, aligned, plan
from pointfuse.problem import BatchNorm, Geometry, Refused

# Whether TRITON_INTERPRET=1 has Triton run the kernels on the CPU.
INTERPRETED = not isinstance(conv_bn_act, triton.JITFunction)
# For every kernel. Left out, Triton 3.9 warns, and from 3.10 on a product is rounded before it is added, which takes an
# instruction more.
FUSED = {"enable_fp_fusion": True}
# A program that makes up shapes must not fill the memory.
_MOST_LAUNCHES = 4096
_STAY = contextlib.nullcontext()

# x, weight, bias, mean, var, gamma, beta, residual
Operands = tuple[Tensor | None, ...]

_launches: dict[tuple[Any, ...], "Launch"] = {}


def execute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    config: int,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """A unit by its eleven arguments, eagerly. Raises :class:`Refused` for what does not fit together."""
    tensors = (x, weight, bias, mean, var, gamma, beta, residual)
    launch = launch_of(tensors, config)
    if launch is None:
        return calls.empty_output(x, weight, config)
    # Triton would compile other kernels for integers, and a 1 into them.
    with on(x.device):
        return launch(tensors, float(eps), float(negative_slope))


def launch_of(tensors: Operands, config: int, *, whole: bool = False, statistics: bool = False) -> "Launch | None":
    """What serves a call, from ``x, weight, bias, mean, var, gamma, beta, residual``; ``None`` for an empty batch.

    With ``whole`` the sum over K is not split; with ``statistics``, which need that, the launch gives a part of them a
    tile of pixels. Raises :class:`Refused` for what does not fit together.
    """
    x, weight, bias, mean, var, gamma, beta, residual = tensors
    assert x is not None
    assert weight is not None
    try:
        key = (
            config,
            whole,
            statistics,
            x.data_ptr() % 16,
            weight.data_ptr() % 16,
            *(None if t is None else (type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg()) for t in tensors),
        )
    except RuntimeError as error:
        raise Refused("a tensor has no strides, or no memory") from error
    launch = _launches.get(key)
    if launch is None:
        # Whether they fit together does not depend on its numbers.
        norm = None if mean is None else BatchNorm(mean, var, gamma, beta, False, 0.0, 1.0)
        geometry = Geometry(*calls.stride_and_padding(config))
        reason = calls.misfit(x, weight, bias, norm, residual, geometry, calls.is_frozen(config))
        if reason is None:
            reason = _unreadable(tensors)
        if reason is not None:
            raise Refused(reason)
        if x.shape[0] == 0:
            return None
        y = calls.empty_output(x, weight, config)
        made = _plan(x, _packed(weight), residual, y, config, chip_of(x.device), whole)
        launch = Launch(made, weight, y)
        if os.environ.get("POINTFUSE_PRINT_PLAN", "0") not in ("", "0"):
            print(f"pointfuse: {launch.plan}", file=sys.stderr)
        if len(_launches) < _MOST_LAUNCHES:
            _launches[key] = launch
    return launch


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, on which Triton launches."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _STAY


def forget_plans() -> None:
    """Plan every call anew, because the tables have changed."""
    _launches.clear()
    tables.forget()


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device; the interpreter's is Hopper. Raises :class:`Refused` for one that is too old."""
    if device.type != "cuda":
        return REFERENCE_CHIPS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise Refused(f"its GPU has compute capability {properties.major}.{properties.minor}, the kernels need 8.0")
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Chip.of((properties.major, properties.minor), properties.multi_processor_count, shared_bytes)


class Launch:
    """A plan with nothing left to do but pass tensors, of the shapes, strides and dtypes that it was made for.

    The first call goes through Triton's own launcher, which compiles, or finds what it compiled before. Later ones use
    what it gave them, as long as the tensors are aligned alike.
    """

    def __init__(self, plan: Plan, weight: Tensor, y: Tensor) -> None:
        self.plan = plan
        self._packs = not weight.is_contiguous(memory_format=torch.channels_last)
        self._output = y.shape, y.stride()
        self._described = plan.constants["DESCRIBE_X"] or plan.constants["DESCRIBE_WEIGHT"]
        # Which tensors were aligned and the kernels compiled for that: one attribute, so that threads see both or none.
        self._compiled: tuple[list[bool], list[Any]] | None = None

    def __call__(self, tensors: Operands, eps: float, negative_slope: float, parts: Tensor | None = None) -> Tensor:
        """The output, from ``x, weight, bias, mean, var, gamma, beta, residual``; statistics go to ``parts``."""
        x = tensors[0]
        assert x is not None
        y = torch.empty_strided(*self._output, dtype=x.dtype, device=x.device)
        self.write(y, tensors, eps, negative_slope, parts)
        return y

    def write(
        self, y: Tensor, tensors: Operands, eps: float, negative_slope: float, parts: Tensor | None = None
    ) -> None:
        """As a call, into ``y``."""
        x, tensors = tensors[0], self._operands(y, tensors)
        assert x is not None
        run = functools.partial(self._run, tensors, eps, negative_slope, parts)
        if self._described:
            # Triton writes descriptors to memory that it asks an allocator for. The program's own stays as it is.
            context = contextvars.copy_context()
            context.run(triton.set_allocator, functools.partial(_allocate, x.device))
            context.run(run)
        else:
            run()

    def compile(self, y: Tensor, tensors: Operands, eps: float, negative_slope: float) -> None:
        """Compile what :meth:`write` would launch, and launch nothing."""
        tensors = self._operands(y, tensors)
        for kernel, grid, arguments, options in kernel_launches(self.plan, tensors, eps, negative_slope):
            kernel.warmup(*arguments, grid=grid, **options, **FUSED)

    def _operands(self, y: Tensor, tensors: Operands) -> Operands:
        """The kernels' tensors, without the parts of statistics."""
        x, weight, *rest = tensors
        assert x is not None
        assert weight is not None
        return (x, _packed(weight) if self._packs else weight, *rest, y, _partials(self.plan, x))

    def _run(self, tensors: Operands, eps: float, negative_slope: float, parts: Tensor | None) -> None:
        launches = kernel_launches(self.plan, tensors, eps, negative_slope, parts)
        alignment = [t is None or t.data_ptr() % 16 == 0 for t in tensors]
        known = self._compiled
        if known is not None and known[0] == alignment:
            for compiled, (_, grid, arguments, _) in zip(known[1], launches, strict=True):
                compiled[grid](*arguments)
            return
        compiled = [kernel[grid](*arguments, **options, **FUSED) for kernel, grid, arguments, options in launches]
        if not INTERPRETED:
            self._compiled = alignment, compiled


def kernel_launches(
    plan: Plan, tensors: Operands, eps: float, negative_slope: float, parts: Tensor | None = None
) -> list[tuple[Any, tuple[Any, ...], tuple[Any, ...], dict[str, int]]]:
    """Kernels with their grids, positional arguments and options beside :data:`FUSED`, in the order of launch."""
    numbers = (*plan.integers.values(), eps, negative_slope)
    launches = [(conv_bn_act, (plan.grid, 1, 1), (*tensors, parts, *numbers, *plan.constants.values()), plan.options)]
    if plan.finish_constants:
        i = plan.integers
        numbers = (
            i["batch"], i["c_out"], i["out_height"], i["out_width"],
            i["y_n"], i["y_c"], i["y_h"], i["y_w"], i["residual_n"], i["residual_c"], i["residual_h"], i["residual_w"],
            eps, negative_slope,
        )  # fmt: skip
        arguments = (*tensors[2:], *numbers, *plan.finish_constants.values())
        launches.append((finish_split, (plan.finish_grid, 1, 1), arguments, {"num_warps": 4}))
    return launches


def _traced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    config: int,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """A unit by its eleven arguments, traceable: these launches are what a compiler sees."""
    y = calls.empty_output(x, weight, config)
    if x.shape[0] == 0:
        return y
    weight = _packed(weight)
    # Descriptors would need memory from Triton's allocator, which Inductor sets for the first call's thread alone
    # (torch 2.13 to 2.15), and of which AOTInductor gives too little (before 2.12).
    chip = replace(chip_of(x.device), descriptors=False)
    made = _plan(x, weight, residual, y, config, chip)
    tensors = (x, weight, bias, mean, var, gamma, beta, residual, y, _partials(made, x))
    # By name and one by one, so that torch finds the kernels in this source, for the keys of its caches. It would take
    # other options than these for arguments of the kernel.
    first, *second = kernel_launches(made, tensors, eps, negative_slope)
    _, grid, arguments, options = first
    wrap_triton(conv_bn_act)[grid](**dict(zip(conv_bn_act.arg_names, arguments, strict=True)), **options)
    for _, grid, arguments, options in second:
        wrap_triton(finish_split)[grid](**dict(zip(finish_split.arg_names, arguments, strict=True)), **options)
    return y


operator: Any
if INTERPRETED:
    # Python that runs on real tensors: there is nothing to see through.
    operator = custom_op("pointfuse::_conv_bn_act_triton", execute, mutates_args=())
else:
    operator = triton_op("pointfuse::_conv_bn_act_triton", _traced, mutates_args=())
    # An exported program that runs as it is runs eagerly.
    operator.register_kernel("cuda", execute)
operator.register_fake(lambda x, weight, *rest: calls.empty_output(x, weight, config=rest[6]))


def _unreadable(tensors: Operands) -> str | None:
    """Why memory does not hold what a tensor means, or ``None``."""
    given = [t for t in tensors if t is not None]
    if not calls.PLAIN.issuperset(map(type, given)):
        return "a tensor is not a plain one"
    return "a tensor is a negative view" if any(t.is_neg() for t in given) else None


def _plan(
    x: Tensor, weight: Tensor, residual: Tensor | None, y: Tensor, config: int, chip: Chip, whole: bool = False
) -> Plan:
    return plan(
        x,
        weight,
        residual,
        y,
        config,
        chip,
        tables.measured(x.device),
        aligned=aligned(x, weight),
        interpreted=INTERPRETED,
        whole=whole,
    )


def _packed(weight: Tensor) -> Tensor:
    """The weight with each tap's input channels side by side, as the kernels want it; a copy where they are not."""
    return weight.contiguous(memory_format=torch.channels_last)


def _partials(plan: Plan, x: Tensor) -> Tensor | None:
    return torch.empty(plan.partials, dtype=torch.float32, device=x.device) if plan.finish_constants else None


def _allocate(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)
