"""The kernels of a training step, compiled by Triton for GPUs that are not here.

Run as a script, as ``triton_compiler.py`` is: cases come as JSON on stdin, one a line, and for each its kernels go to
stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pointfuse.backends import calls, triton
from pointfuse.backends.triton import compilation, launching, planning, training
from pointfuse.problem import Activation, Geometry
from torch import Tensor
from triton_compiler import CAPABILITIES, CHIPS, DTYPES, FORMATS, Kernel, cpu_seconds, inspect, read, store_width


@dataclass(frozen=True)
class Case:
    """A training step of a convolution on a square plane.

    ``chip`` is one of ``CHIPS``, ``layout`` of ``FORMATS``, ``dtype`` of ``DTYPES``. One that is ``finished`` has a
    bias, a residual before its activation, SiLU, and batch norm of its dtype; else LeakyReLU, and batch norm in fp32.
    """

    chip: str
    kernel: int
    layout: str
    dtype: str
    batch: int
    plane: int
    c_in: int
    c_out: int
    finished: bool = False

    def __str__(self) -> str:
        return (
            f"{self.chip} {self.dtype} {self.layout} {self.kernel}x{self.kernel} {self.batch}x{self.c_in}x{self.plane}x"
            f"{self.plane}->{self.c_out}{' residual' if self.finished else ''}"
        )


def kernels(case: Case) -> list[tuple[Kernel, dict[str, int]]]:
    """The machine code of a step's kernels, in the order of launch, and of each its loads by their bits."""
    start = cpu_seconds()
    compiled = [compilation._compiled(*launch, CAPABILITIES[case.chip]) for launch in launches(case)]
    seconds = (cpu_seconds() - start) / len(compiled)
    return [(inspect(kernel, seconds), loads(kernel)) for kernel in compiled]


def loads(kernel: Any) -> dict[str, int]:
    """A kernel's loads from global memory by the bits that a thread loads at once."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, _ = read(code)
    return dict(Counter(store_width(modifiers) for opcode, modifiers, _ in instructions if opcode == "LDG"))


def launches(case: Case) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernels with their arguments and the compiler's options, from tensors that have no data."""
    found = []

    options = {"num_warps": training._WARPS} | launching.FUSED

    def note(kernel: Any, programs: int, device: torch.device, *arguments: Any) -> None:
        found.append((kernel, tuple(map(address, arguments)), options))

    training._launch = note
    dtype, channel_dtype = DTYPES[case.dtype], DTYPES[case.dtype] if case.finished else torch.float32
    with torch.device("meta"):
        x = torch.empty(case.batch, case.c_in, case.plane, case.plane, dtype=dtype)
        weight = torch.empty(case.c_out, case.c_in, case.kernel, case.kernel, dtype=dtype)
        gamma = torch.empty(case.c_out, dtype=channel_dtype)
        mean = torch.empty(case.c_out)
    x, weight = (t.to(memory_format=FORMATS[case.layout]) for t in (x, weight))
    geometry = Geometry((1, 1), (case.kernel // 2, case.kernel // 2))
    config = calls.arguments(x, weight, None, None, Activation("identity"), geometry)[8]
    config = config | calls.TF32 if case.dtype == "tf32" else config & ~calls.TF32
    y = calls.empty_output(x, weight, config)
    packed = weight.contiguous(memory_format=torch.channels_last)
    made = planning.plan(
        x, packed, None, y, config, CHIPS[case.chip], {}, aligned=(True, True), whole=True,
    )  # fmt: skip
    bias = dtype if case.finished else None
    found += compilation.launches(made, dtype, bias=bias, norm=None, statistics=True)

    activation = Activation("silu" if case.finished else "leaky_relu", 0.1)
    residual = y if case.finished else None
    parts = torch.empty(made.pixel_tiles, 3, case.c_out, device="meta")
    batch_norm = (gamma, gamma, residual)
    training.normalise(y, parts, None, None, *batch_norm, gamma, gamma, 0.1, 1e-5, activation, "add_act")
    sums = training.sums(y, y, mean, mean, *batch_norm, activation, "add_act")
    training.gradients(y, y, mean, mean, *batch_norm, activation, "add_act", sums, 2, case.finished)
    return found


def address(argument: Any) -> Any:
    """An address for a tensor, and anything else as it is."""
    return compilation.Address(argument.dtype) if isinstance(argument, Tensor) else argument


if __name__ == "__main__":
    calls.on_gpu = lambda tensor: True
    triton.unusable_reason = lambda: None
    for line in sys.stdin:
        print(
            json.dumps([(asdict(kernel), widths) for kernel, widths in kernels(Case(**json.loads(line)))]), flush=True
        )
