"""Units compiled by Triton for GPUs that are not here, and what their machine code is like.

Run as a script, since the tests' own process may have Triton's interpreter on: units come as JSON on stdin, one a line,
and an outcome goes to stdout for each. ``triton_compiler.py specialisations`` says what Triton's launcher would compile
for some calls, beside what ``compilation.py`` would.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pointfuse.backends import calls
from pointfuse.backends.triton.compilation import Address, compile_plan, launches, specialised
from pointfuse.backends.triton.configs import REFERENCE_CHIPS, Chip, Config
from pointfuse.backends.triton.planning import Plan, plan
from pointfuse.problem import Activation, Geometry

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}
# Those of a family with the least shared memory beside those that stand for it.
CHIPS = REFERENCE_CHIPS | {name: Chip.of(CAPABILITIES[name], 128, 99 << 10) for name in ("sm_89", "sm_120")}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)(\S*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")

Instruction = tuple[str, str, str]


@dataclass(frozen=True)
class Unit:
    """A unit on a square plane, and the configuration to compile it with.

    ``chip`` is one of ``CHIPS``, ``layout`` of ``FORMATS``, ``dtype`` of ``DTYPES``. One that is ``finished`` has a
    bias, a residual and SiLU, else LeakyReLU alone; all have batch norm. Without ``descriptors`` it is as in graphs.
    """

    chip: str
    kernel: int
    layout: str
    dtype: str
    batch: int
    plane: int
    c_in: int
    c_out: int
    config: Config
    stride: int = 1
    finished: bool = False
    descriptors: bool = True

    def __str__(self) -> str:
        c = self.config
        kind = f"{self.kernel}x{self.kernel}{f' stride {self.stride}' if self.stride > 1 else ''}"
        where = f"{' residual' if self.finished else ''}{'' if self.descriptors else ' in a graph'}"
        return (
            f"{self.chip} {self.dtype} {self.layout} {kind} {self.batch}x{self.c_in}x{self.plane}x{self.plane}"
            f"->{self.c_out}{where} tile {c.block_channels}x{c.block_pixels}x{c.block_k} stages {c.stages}"
            f" warps {c.warps} split {c.split_k}{' flattened' if c.flatten else ''}"
        )

    def plan(self) -> Plan:
        """The plan, from tensors that have no data."""
        geometry = Geometry((self.stride, self.stride), (self.kernel // 2, self.kernel // 2))
        x, weight = (
            torch.empty(shape, dtype=DTYPES[self.dtype], device="meta").to(memory_format=FORMATS[self.layout])
            for shape in (
                (self.batch, self.c_in, self.plane, self.plane),
                (self.c_out, self.c_in, self.kernel, self.kernel),
            )
        )
        activation = Activation("silu" if self.finished else "leaky_relu", 0.1)
        bits = calls.arguments(x, weight, None, None, activation, geometry)[8] & ~calls.TF32
        if self.dtype == "tf32":
            bits |= calls.TF32
        y = calls.empty_output(x, weight, bits)
        weight = weight.contiguous(memory_format=torch.channels_last)
        residual = y if self.finished else None
        chip = CHIPS[self.chip]
        chip = replace(chip, descriptors=chip.descriptors and self.descriptors)
        return plan(x, weight, residual, y, bits, chip, {}, aligned=(True, True), tile=self.config)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Unit:
        """The inverse of ``asdict``."""
        return cls(**(data | {"config": Config(**data["config"])}))


@dataclass
class Kernel:
    """A compiled kernel.

    Attributes:
        name: the kernel's.
        registers: of a thread.
        local: bytes of local memory of a thread, the stack included.
        shared: bytes of shared memory of a block.
        seconds: of CPU time that compiling it took.
        opcodes: how often each instruction stands in it.
        loop: the same for the innermost loop with products; empty where there is none.
        stores: its stores to global memory by the bits that a thread stores at once.
        fused: whether a product is rounded together with what it is added to.
    """

    name: str
    registers: int
    local: int
    shared: int
    seconds: float
    opcodes: dict[str, int]
    loop: dict[str, int]
    stores: dict[str, int]
    fused: bool


@dataclass
class Outcome:
    """What came of a unit: how much shared memory its configuration claims, which tensors it loads by descriptor, into
    how many parts the sum is split, and the kernels."""

    shared_claimed: int
    described: list[str]
    parts: int
    kernels: list[Kernel]


def outcome(unit: Unit) -> Outcome:
    """Compile a unit and read its machine code."""
    made = unit.plan()
    dtype = DTYPES[unit.dtype]
    start = cpu_seconds()
    bias = dtype if unit.finished else None
    compiled = compile_plan(made, dtype, CAPABILITIES[unit.chip], bias=bias, residual=unit.finished)
    seconds = (cpu_seconds() - start) / len(compiled)
    return Outcome(
        made.config.shared_bytes(made.shape),
        [name for name in ("x", "weight") if made.constants[f"DESCRIBE_{name.upper()}"]],
        made.config.split_k,
        [inspect(kernel, seconds) for kernel in compiled],
    )


def inspect(kernel: Any, seconds: float) -> Kernel:
    """What NVIDIA's tools, which come with Triton, say of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((knobs.nvidia.cuobjdump.path, "-res-usage"), (knobs.nvidia.nvdisasm.path, "-c", "-ndf"))
        )
    registers, stack, _, local = map(int, USAGE.search(usage).groups())  # type: ignore[union-attr]
    instructions, loops = read(code)
    products = [body for body in loops if any(opcode in PRODUCTS for opcode, _, _ in body)]
    return Kernel(
        kernel.metadata.name,
        registers,
        stack + local,
        kernel.metadata.shared,
        seconds,
        count(instructions),
        count(min(products, key=len, default=[])),
        dict(Counter(store_width(modifiers) for opcode, modifiers, _ in instructions if opcode == "STG")),
        kernel.metadata.enable_fp_fusion,
    )


def read(code: str) -> tuple[list[Instruction], list[list[Instruction]]]:
    """The instructions of a disassembly, and those of each of its loops: opcode, modifiers, operands."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append((instruction[1], instruction[2], instruction[3]))
            if instruction[1] == "BRA":
                loops += [instructions[start:] for name, start in labels.items() if f"({name})" in instruction[3]]
    return instructions, loops


def count(instructions: list[Instruction]) -> dict[str, int]:
    return dict(Counter(opcode for opcode, _, _ in instructions))


def store_width(modifiers: str) -> str:
    """Bits that a thread stores at once, from ``.E.U16`` and the like."""
    return next((bits for bits in ("128", "64", "16", "8") if bits in modifiers), "32")


def cpu_seconds() -> float:
    """CPU time of this process and its children, of which the assembler is one."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


class Hopper:
    """Triton's driver for a GPU, as far as its launcher asks before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def specialisations() -> Iterator[dict[str, Any]]:
    """What kernels are compiled for: by ``compilation.py``, and by Triton's launcher for tensors and numbers alike."""
    from triton import knobs
    from triton.compiler import ASTSource
    from triton.runtime import driver

    def note(**call: Any) -> bool:
        compiled = call["compile"]
        seen.append((compiled["signature"], compiled["constants"], compiled["configs"][0]))
        return True  # nothing is compiled then

    driver.set_active(Hopper())
    for unit, operands in SPECIALISED:
        for kernel, arguments, options in launches(unit.plan(), DTYPES[unit.dtype], residual=unit.finished, **operands):
            seen: list[Any] = []
            knobs.runtime.jit_cache_hook = note
            kernel.warmup(*map(tensor, arguments), grid=(1,), **options)
            knobs.runtime.jit_cache_hook = None
            both = [specialised(kernel, arguments), seen[0]]
            yield {
                "call": f"{kernel.__name__}: {unit} {operands}",
                "described": [describe(*one) for one in both],
                "hashes": [ASTSource(kernel, *one).hash() for one in both],
            }
    unit, _ = SPECIALISED[0]
    made = unit.plan()
    (kernel, arguments, options), *_ = launches(made, DTYPES[unit.dtype])
    both = [
        compile_plan(made, DTYPES[unit.dtype], (9, 0))[0],
        kernel.warmup(*map(tensor, arguments), grid=(1,), **options),
    ]
    yield {
        "call": "compiled",
        "described": [describe(k.src.signature, k.src.constants, k.src.attrs) for k in both],
        "hashes": [k.hash for k in both],
    }


def tensor(argument: Any) -> Any:
    """A tensor for an address, and anything else as it is."""
    if not isinstance(argument, Address):
        return argument
    return torch.empty(32, dtype=argument.dtype)[0 if argument.aligned else 1 :]


def describe(signature: dict[str, str], constants: dict[Any, Any], attributes: dict[Any, Any]) -> dict[str, str]:
    """Every argument's type, with its value or what is known of it."""
    names = list(signature)
    known = {names[i]: f" = {value!r}" for (i,), value in constants.items()}
    known |= {names[i]: f" {value}" for (i,), value in attributes.items() if value}
    return {name: kind + known.get(name, "") for name, kind in signature.items()}


_TILE = Config(64, 64, 32, 4, 4)
# Units with what else `launches` is told of them: sizes and strides of 1, of 16s, of neither and beyond 32 bits.
SPECIALISED: list[tuple[Unit, dict[str, Any]]] = [
    (Unit("sm_90", 1, "channels_last", "bf16", 8, 26, 256, 128, _TILE), {}),
    (Unit("sm_90", 3, "channels_last", "bf16", 8, 52, 256, 75, _TILE), {"affine": False, "misaligned": ["y", "var"]}),
    (Unit("sm_90", 3, "NCHW", "fp16", 1, 13, 3, 1, _TILE, 2, True), {"bias": torch.float32, "norm": torch.float16}),
    (Unit("sm_90", 1, "NCHW", "fp32", 1, 1, 1, 1, _TILE), {"norm": None, "bias": torch.float32}),
    (Unit("sm_90", 1, "NCHW", "bf16", 2, 40000, 3, 64, _TILE), {}),
    (Unit("sm_90", 3, "channels_last", "tf32", 1, 13, 512, 64, replace(_TILE, split_k=4), 1, True), {}),
]

if __name__ == "__main__":
    # A call's arguments are made as for a GPU.
    calls.on_gpu = lambda tensor: True
    if sys.argv[1:] == ["specialisations"]:
        for call in specialisations():
            print(json.dumps(call))
    else:
        for line in sys.stdin:
            print(json.dumps(asdict(outcome(Unit.from_dict(json.loads(line))))), flush=True)
