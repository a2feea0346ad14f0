"""The machine code of training's passes reads and writes whole vectors; tests/test_sass.py holds that nothing spills.
Needs nvcc, and no GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from pointfuse.backends import cuda
from test_sass import FUNCTION, tool

# A pass by its mangled name: what it does, the dtype, numbers in a vector, and whether of channels_last.
KERNEL = re.compile(
    r"pass_overINS0_\d+(Normalise|Sums|Gradients)KernelI(?:NS_\d+)?(bfloat16_t|half_t|f)E?Li(\d+)ELb([01])"
)
ACCESS = re.compile(r"\s(LDG|STG)\.E(?:\.[EL]\w+)*(?:\.(U16|64|128))?[ .]")
BYTES = {"U16": 2, "": 4, "64": 8, "128": 16}


class Kernel(NamedTuple):
    operation: str
    dtype: str
    vector: int
    channels_last: bool

    @property
    def vector_bytes(self) -> int:
        return self.vector * (4 if self.dtype == "f" else 2)


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def accesses(request: pytest.FixtureRequest) -> dict[Kernel, Counter[tuple[str, int]]]:
    """How many loads and stores of so many bytes each kernel has."""
    if not cuda.LIBRARY.is_file():
        pytest.skip(f"the CUDA kernels are not built: {cuda.build_record().get('cuda', 'no build was run')}")
    found: dict[Kernel, Counter[tuple[str, int]]] = defaultdict(Counter)
    command = [tool("cuobjdump"), "-sass", "-arch", request.param, str(cuda.LIBRARY)]
    environment = {"PATH": str(Path(tool("nvdisasm")).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as dump:
        assert dump.stdout is not None
        current = None
        for line in dump.stdout:
            if "Function" in line and FUNCTION.search(line):
                name = KERNEL.search(line)
                current = Kernel(name[1], name[2], int(name[3]), name[4] == "1") if name else None
            elif current and (access := ACCESS.search(line)):
                found[current][access[1], BYTES[access[2] or ""]] += 1
    assert dump.returncode == 0
    return found


def test_every_dtype_has_kernels_of_whole_vectors_for_both_layouts(
    accesses: dict[Kernel, Counter[tuple[str, int]]],
) -> None:
    for operation in ("Normalise", "Sums", "Gradients"):
        for dtype, full in (("f", 4), ("half_t", 8), ("bfloat16_t", 8)):
            for channels_last in (False, True):
                assert Kernel(operation, dtype, full, channels_last) in accesses
                assert Kernel(operation, dtype, 1, channels_last) in accesses


def test_tensors_are_read_and_written_in_vectors_alone(accesses: dict[Kernel, Counter[tuple[str, int]]]) -> None:
    """For each of five activations two vectors at a time: y, residual and grad_out in; out, or dy and d_residual."""
    for kernel, counts in accesses.items():
        if kernel.vector == 1:
            continue
        loads, stores = counts["LDG", kernel.vector_bytes], counts["STG", kernel.vector_bytes]
        tensors = {"Normalise": (2, 1), "Sums": (3, 0), "Gradients": (3, 2)}[kernel.operation]
        # The identity's backward needs neither y nor the residual for dz.
        assert loads >= 2 * (4 * tensors[0] + 1), kernel
        assert stores == 2 * 5 * tensors[1], kernel
        assert all(size <= 4 or size == kernel.vector_bytes for _, size in counts), kernel
