"""The machine code in the library is what the kernels' sources mean: tensor cores and TMA are used, nothing spills, and
registers are as the planner believes. Needs nvcc, and no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from planner_module import load_planner
from pointfuse.backends import cuda

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)")
FUNCTION = re.compile(r"Function\s*:?\s+(\w+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# The kernels by their mangled names: arithmetic, tile, and which of two paths; those of sm_80 also with statistics.
SM80 = re.compile(r"4sm804convI.*?(bfloat16_t|half_t|Tf32Products|FmaWarp).*?ELi(\d+)ELb([01])ELb[01]EEE")
FORWARD = re.compile(r"4sm907forwardI(?:NS_\d+)?(bfloat16_t|half_t|f).*?Li(\d+)EEE")
SM90 = re.compile(r"4sm904convI(?:NS_\d+)?(bfloat16_t|half_t|f).*?Li(\d+)ELb([01])EEE")


@dataclass
class Function:
    """One kernel for one architecture."""

    architecture: str
    name: str
    opcodes: Counter[str] = field(default_factory=Counter)
    # From the first product of sm_90's tensor cores to the last: the main loop.
    between_products: Counter[str] = field(default_factory=Counter)
    since_product: list[str] = field(default_factory=list)
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0

    def __str__(self) -> str:
        for kernel, pattern in (("sm80::conv", SM80), ("sm90::conv", SM90), ("sm90::forward", FORWARD)):
            if match := pattern.search(self.name):
                return f"{kernel}<{', '.join(match.groups())}> for {self.architecture}"
        return f"{self.name} for {self.architecture}"

    def add(self, opcode: str) -> None:
        if opcode == "HGMMA":
            if self.opcodes["HGMMA"]:
                self.between_products.update(self.since_product)
            self.since_product.clear()
        self.opcodes[opcode] += 1
        self.since_product.append(opcode)


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on the PATH, or of NVIDIA's package of that name."""
    packages = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = shutil.which(name) or next((p for folder in packages if (p := shutil.which(name, path=folder))), None)
    if path is None:
        pytest.skip(f"{name} is not installed (pip install nvidia-cuda-{name})")
    return path


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    if not cuda.LIBRARY.is_file():
        pytest.skip(f"the CUDA kernels are not built: {cuda.build_record().get('cuda', 'no build was run')}")
    found: dict[tuple[str, str], Function] = {}
    current = Function("", "")
    environment = {"PATH": str(Path(tool("nvdisasm")).parent)}
    for option in ("-sass", "-res-usage"):
        command = [tool("cuobjdump"), option, str(cuda.LIBRARY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as dump:
            assert dump.stdout is not None
            architecture = ""
            for line in dump.stdout:
                if line.startswith("arch = "):
                    architecture = line.split()[2]
                elif "Function" in line and (name := FUNCTION.search(line)):
                    current = found.setdefault((architecture, name[1]), Function(architecture, name[1]))
                elif opcode := INSTRUCTION.match(line):
                    current.add(opcode[1])
                elif usage := USAGE.search(line):
                    current.registers, current.stack, current.shared, current.local = map(int, usage.groups())
        assert dump.returncode == 0
    return list(found.values())


def kernels(functions: list[Function], pattern: re.Pattern[str], architecture: str) -> list[Function]:
    chosen = [f for f in functions if f.architecture == architecture and pattern.search(f.name)]
    assert chosen, f"no kernel for {architecture}"
    return chosen


def test_the_library_holds_each_kernel_for_its_architectures(functions: list[Function]) -> None:
    planner = load_planner()
    assert {f.architecture for f in functions} == {"sm_80", "sm_90a"}
    for architecture in ("sm_80", "sm_90a"):
        found = {SM80.search(f.name).groups() for f in kernels(functions, SM80, architecture)}  # type: ignore[union-attr]
        arithmetic, tiles, paths = ({k[i] for k in found} for i in range(3))
        assert arithmetic == {"bfloat16_t", "half_t", "Tf32Products", "FmaWarp"}
        assert tiles == set(map(str, range(planner.SM80_TILES)))
        assert len(found) == len(arithmetic) * len(tiles) * len(paths)
    found = {SM90.search(f.name).groups() for f in kernels(functions, SM90, "sm_90a")}  # type: ignore[union-attr]
    assert {k[0] for k in found} == {"bfloat16_t", "half_t", "f"}
    assert {k[1] for k in found} == set(map(str, range(planner.SM90_TILES)))


def test_ptx_is_there_for_later_gpus(functions: list[Function]) -> None:
    listed = subprocess.run([tool("cuobjdump"), "--list-ptx", str(cuda.LIBRARY)], capture_output=True, text=True)
    assert "sm_80" in listed.stdout


def test_hopper_kernels_use_wgmma_and_tma(functions: list[Function]) -> None:
    for kernel in kernels(functions, SM90, "sm_90a") + kernels(functions, FORWARD, "sm_90a"):
        assert kernel.opcodes["HGMMA"] > 0, str(kernel)
        assert kernel.opcodes["UTMALDG"] > 0, str(kernel)
        assert kernel.opcodes["UTMASTG"] > 0, str(kernel)


def test_hopper_main_loops_keep_addresses_in_uniform_registers(functions: list[Function]) -> None:
    """A divergent branch in the epilogue is enough to lose them, and each product's operands then cost a move."""
    for kernel in kernels(functions, SM90, "sm_90a") + kernels(functions, FORWARD, "sm_90a"):
        assert kernel.between_products["HGMMA"] > 0, str(kernel)
        assert kernel.between_products["R2UR"] == 0, str(kernel)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_ampere_kernels_use_tensor_cores_and_asynchronous_copies(functions: list[Function], architecture: str) -> None:
    for kernel in kernels(functions, SM80, architecture):
        strict = "FmaWarp" in kernel.name
        assert (kernel.opcodes["HMMA"] == 0) == strict, str(kernel)
        assert not strict or kernel.opcodes["FFMA"] >= 64, str(kernel)
        assert kernel.opcodes["LDGSTS"] > 0, str(kernel)


def test_no_kernel_traps_spills_or_has_local_memory(functions: list[Function]) -> None:
    """A kernel that calls what its architecture has not is compiled to a trap."""
    wrong = {}
    for kernel in functions:
        uses = {name: kernel.opcodes[name] for name in ("STL", "LDL", "BPT") if kernel.opcodes[name]}
        if uses or kernel.stack or kernel.local:
            wrong[str(kernel)] = f"{uses}, stack {kernel.stack}, local {kernel.local}"
    assert not wrong


def test_shared_memory_is_dynamic(functions: list[Function]) -> None:
    """What the planner counts is all there is, but for the 1 KB that the system takes on Hopper."""
    assert {f.shared for f in functions} <= {0, 1024}


def test_registers_are_as_the_planner_believes(functions: list[Function]) -> None:
    planner = load_planner()
    device = planner.device_by_name("h100")
    checked = 0
    for kernel in functions:
        for pattern, which in ((SM80, planner.Kernel.sm_80), (SM90, planner.Kernel.sm_90)):
            if (match := pattern.search(kernel.name)) is None:
                continue
            # The sm_80 kernel's last parameter says whether it is the path for rows of whole 16 bytes.
            general = which == planner.Kernel.sm_80 and match[3] == "0"
            plan = planner.make_plan(problem(planner, 63 if general else 64), device, which, int(match[2]), 1)
            assert plan.refusal is None, plan.refusal
            assert which == planner.Kernel.sm_90 or plan.vectorised != general
            assert kernel.registers <= planner.registers_per_thread(plan), str(kernel)
            # Registers are handed out in eights to a thread.
            rounded = -(-kernel.registers // 8) * 8
            assert rounded * plan.threads * planner.occupancy(plan, device) <= 65536, str(kernel)
            checked += 1
    assert checked == len([f for f in functions if SM80.search(f.name) or SM90.search(f.name)]) > 0


def problem(planner: Any, c_in: int) -> Any:
    """A 1x1 unit in bf16 and channels_last."""
    made = planner.Problem()
    made.batch, made.c_in, made.height, made.width, made.c_out = 8, c_in, 26, 26, 256
    made.kernel_h = made.kernel_w = made.stride_h = made.stride_w = 1
    made.dtype, made.batch_norm = planner.DType.bfloat16, True
    made.x = made.y = (26 * 26 * c_in, 1, 26 * c_in, c_in)
    made.y = (26 * 26 * 256, 1, 26 * 256, 256)
    made.weight = (c_in, 1, 1, 1)
    made.x_alignment = made.weight_alignment = made.y_alignment = made.residual_alignment = 16
    return made
