"""What torch.compile sees of the Triton operator, and what Inductor makes of it, without a GPU.

Run as a script, because the tests' own process has Triton's interpreter on: cases as JSON on stdin, what came of each
as JSON on stdout, one line each, in order, after a line about the operator. Tensors are the CPU's, and nothing is
launched.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import pointfuse
import torch
from pointfuse.backends import BACKENDS, calls
from pointfuse.backends.triton import planning
from pointfuse.backends.triton.configs import Config
from pointfuse.functional import conv_bn_act
from torch import Tensor, fx

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
C_OUT = 64
# A small tile compiles fast.
TILE = Config(block_channels=32, block_pixels=32, block_k=32, stages=2, warps=4)
SPLIT = replace(TILE, split_k=4)


@dataclass(frozen=True)
class Case:
    """A unit that is compiled, with its weight in channels_last.

    Attributes:
        sizes: batch, rows and columns of one call after another.
        dynamic: which of the input's dimensions are marked so.
        split: whether the sum over input channels and taps is split.
        emit: whether Inductor takes part, for the first call alone.
    """

    sizes: tuple[tuple[int, int, int], ...] = ((2, 14, 14),)
    dynamic: tuple[int, ...] = ()
    kernel: int = 1
    layout: str = "channels_last"
    dtype: str = "bf16"
    c_in: int = 256
    activation: str = "leaky_relu"
    norm: bool = True
    residual: bool = False
    split: bool = False
    emit: bool = False


@dataclass
class Launch:
    """A kernel as a graph has it, functionalized.

    Attributes:
        name: the kernel's.
        written: the arguments that torch takes it to write.
        absent: the arguments that are ``None``.
        constants: the arguments that are strings.
        options: the compiler's, one set for each configuration.
        symbolic: whether the number of its programs depends on a size that is not known.
    """

    name: str
    written: list[str]
    absent: list[str]
    constants: dict[str, str]
    options: list[dict[str, int]]
    symbolic: bool


@dataclass
class Emitted:
    """A kernel of Inductor's code. Ours are compiled for an H100.

    Attributes:
        name: the kernel's.
        doubles: the operations with a number in fp64.
        scratch: bytes of memory that it asks Triton's allocator for.
        error: why it does not compile; empty where it does.
    """

    name: str
    doubles: list[str] = field(default_factory=list)
    scratch: int = 0
    error: str = ""


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        graphs: the launches of each graph that was compiled.
        guards: what the graphs demand of the sizes that are not known.
        strides: of the output of each call: as the graph has it, and PyTorch's.
        emitted: the kernels of Inductor's code.
        allocations: the tensors that it makes.
        error: why nothing came of it; empty where something did.
    """

    graphs: list[list[Launch]] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    strides: list[list[list[int]]] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)
    allocations: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class Registration:
    """How the operator is registered.

    Attributes:
        kernels: those by which torch's caches of compiled graphs know it.
        eager: whether eager calls on a GPU have an implementation of their own, beside what is traced.
    """

    kernels: list[str]
    eager: bool


class H100:
    """As much of a driver as tracing asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Stopped(Exception):
    """Inductor's code is complete, and must not be run."""


def registration() -> Registration:
    from torch._library.triton import get_triton_kernels_for_op

    name = "pointfuse::_conv_bn_act_triton"
    kernels = [kernel.fn.__name__ for kernel in get_triton_kernels_for_op(name)]
    return Registration(kernels, torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))


def came_of(case: Case) -> Outcome:
    torch._dynamo.reset()
    outcome = Outcome()
    with (
        mock.patch.object(planning, "choose", return_value=SPLIT if case.split else TILE),
        torch.no_grad(),
        pointfuse.use_backend("triton", strict=True),
    ):
        (emit if case.emit else trace)(case, outcome)
    return outcome


def trace(case: Case, outcome: Outcome) -> None:
    """Compile with a backend that keeps the graphs, whose kernels leave what they write as it is."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        outcome.graphs.append([launch_of(n) for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)])
        outcome.guards += [str(guard.expr) for guard in TracingContext.get().fake_mode.shape_env.guards]
        return make_boxed_func(Unlaunched(graph).run)

    weight, *vectors = parameters(case)
    compiled = torch.compile(unit(case), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for size in case.sizes:
        x, residual = images(case, size)
        y = compiled(x, weight, residual, *vectors)
        with pointfuse.use_backend("aten"):
            expected = unit(case)(x, weight, residual, *vectors)
        outcome.strides.append([list(y.stride()), list(expected.stride())])


def emit(case: Case, outcome: Outcome) -> None:
    """Compile with Inductor, and the kernels of its code with Triton."""
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []

    def save(code: Any) -> None:
        codes.append(getattr(code, "value", code))
        raise Stopped

    x, residual = images(case, case.sizes[0])
    weight, *vectors = parameters(case)
    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(save)), on_any_device():
        try:
            torch.compile(unit(case), fullgraph=True)(x, weight, residual, *vectors)
        except Exception:
            if not codes:
                raise
    (code,) = codes
    kernels = re.findall(r"= async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    outcome.emitted = [compile_emitted(*kernel) for kernel in kernels]
    outcome.emitted += [Emitted(name) for name in re.findall(r"^(\w+) = async_compile\.cpp", code, re.MULTILINE)]
    outcome.allocations = re.findall(r"\w+ = (empty_strided\w*\(.*)", code)


def unit(case: Case) -> Any:
    def run(x: Tensor, weight: Tensor, residual: Tensor | None, *norm: Tensor | None) -> Tensor:
        return conv_bn_act(
            x, weight, None, *norm, padding=case.kernel // 2, activation=case.activation, negative_slope=0.1,
            residual=residual,
        )  # fmt: skip

    return run


def parameters(case: Case) -> list[Tensor | None]:
    weight = torch.randn(C_OUT, case.c_in, case.kernel, case.kernel).to(DTYPES[case.dtype])
    norm = [torch.rand(C_OUT) + 0.5 for _ in range(4)] if case.norm else [None] * 4
    return [weight.to(memory_format=torch.channels_last), *norm]


def images(case: Case, size: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
    n, h, w = size
    x, residual = (
        torch.randn(n, c, h, w).to(DTYPES[case.dtype]).to(memory_format=FORMATS[case.layout])
        for c in (case.c_in, C_OUT)
    )
    for dim in case.dynamic:
        torch._dynamo.mark_dynamic(x, dim)
        torch._dynamo.mark_dynamic(residual, dim)
    return x, residual if case.residual else None


class Unlaunched(fx.Interpreter):
    """Runs a graph without its kernels."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "triton_kernel_wrapper" in str(target):
            return {name: kwargs["kwargs"][name].clone() for name in kwargs["tensors_to_clone"]}
        return super().call_function(target, args, kwargs)


@contextlib.contextmanager
def on_any_device() -> Iterator[None]:
    """Inductor writes code for Triton's kernels on tensors of the CPU too, as for an H100."""
    from torch._dynamo import device_interface
    from triton.compiler import compiler

    backend = compiler.make_backend(H100().get_current_target())
    with (
        mock.patch.object(compiler, "make_backend", return_value=backend),
        mock.patch.object(device_interface.CpuInterface, "raise_if_triton_unavailable"),
    ):
        yield


def compile_emitted(name: str, code: str) -> Emitted:
    """Compile a kernel of Inductor's code, as its autotuner would."""
    import triton
    from torch._inductor.runtime import triton_heuristics

    emitted = Emitted(name)
    if name not in ("conv_bn_act", "finish_split"):
        return emitted
    found: dict[str, Any] = {}

    def keep(triton_meta: dict[str, Any], configs: list[dict[str, int]], **_: Any) -> Any:
        found.update(triton_meta, options=configs[0])
        return lambda kernel: kernel

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(triton_heuristics, "user_autotune", keep):
        path = Path(folder) / "emitted.py"
        path.write_text(ast.literal_eval(f"'''{code}'''"), encoding="utf-8")
        spec = util.spec_from_file_location("emitted", path)
        module = util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        source = triton.compiler.ASTSource(
            getattr(module, name), found["signature"], found["constants"], found["configs"][0]
        )
        try:
            kernel = triton.compile(source, target=H100().get_current_target(), options=found["options"])
        except Exception:
            emitted.error = traceback.format_exc()
            return emitted
    doubles = re.findall(r"^.*? ([a-z_]+\.[a-z_]+)\b.*f64\b", kernel.asm["ttir"], re.MULTILINE)
    emitted.doubles = sorted(set(doubles))
    emitted.scratch = kernel.metadata.global_scratch_size
    return emitted


def launch_of(node: fx.Node) -> Launch:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    arguments: dict[str, Any] = {**node.kwargs["kwargs"], **constants}  # type: ignore[dict-item]
    ((programs, *_),) = node.kwargs["grid"]  # type: ignore[misc, union-attr]
    return Launch(
        kernel.fn.__name__,
        sorted(node.kwargs["tensors_to_clone"]),  # type: ignore[arg-type]
        sorted(name for name, value in arguments.items() if value is None),
        {name: value for name, value in arguments.items() if isinstance(value, str)},
        [{"num_warps": c.num_warps, "num_stages": c.num_stages} for c in getattr(kernel, "configs", [])],
        isinstance(programs, fx.Node),
    )


if __name__ == "__main__":
    from triton.runtime import driver

    driver.set_active(H100())
    calls.on_gpu = lambda tensor: True
    BACKENDS["triton"].unusable_reason = lambda: None  # type: ignore[attr-defined]
    BACKENDS["triton"].loaded()
    print(json.dumps(asdict(registration())), flush=True)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            outcome = came_of(case)
        except Exception:
            outcome = Outcome(error=traceback.format_exc())
        print(json.dumps(asdict(outcome)), flush=True)
