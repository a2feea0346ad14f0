"""The operators' library over emulated kernels: ``torch_binding.cpp`` on tensors of the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import torch
from conftest import ROOT
from host_cuda.build import BUILD, KERNELS, emulator

BINDING = ROOT / "csrc" / "torch_binding.cpp"
LIBRARY = BUILD / "pointfuse_host_ops.so"


@functools.cache
def host_ops() -> ctypes.CDLL:
    """The library, built where it is missing or older than its sources, and loaded: the operator works on the CPU."""
    emulator()
    objects = [BUILD / f"{source.stem}.o" for source in sorted(KERNELS.glob("*.cu"))]
    sources = [*objects, *(ROOT / "csrc").glob("*.*"), *KERNELS.glob("*.h"), *(ROOT / "tests/host_cuda").glob("*.h")]
    if not LIBRARY.is_file() or LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        _build(objects)
    torch.ops.load_library(str(LIBRARY))
    return ctypes.CDLL(str(LIBRARY))


def _build(objects: list[Path]) -> None:
    torch_home = Path(torch.__file__).parent
    command = [os.environ.get("CXX", "c++"), "-shared", "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
    command += ["-Wall", "-Werror", "-DPOINTFUSE_HOST_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{ROOT / 'tests/host_cuda'}", f"-I{KERNELS}", "-isystem", str(torch_home / "include")]
    command += ["-include", str(ROOT / "tests/host_cuda/host_allocate.h")]
    command += [str(BINDING), *map(str, objects), "-o", f"{LIBRARY}.new"]
    command += [f"-L{torch_home / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    os.replace(f"{LIBRARY}.new", LIBRARY)  # another test run may have it loaded
