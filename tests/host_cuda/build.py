"""Builds the kernels for the emulator, as a Python module, with the host's C++ compiler and ninja."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = [HERE / "run_binding.cpp", *sorted(KERNELS.glob("*.cu"))]
BUILD = ROOT / "build" / "host_cuda"
NAME = "pointfuse_host_cuda"

RULES = """\
cxx = {cxx}
flags = {flags}
rule compile
  command = $cxx -x c++ -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out
"""


@functools.cache
def emulator() -> ModuleType:
    """The module of ``run_binding.cpp``, built where it is missing or older than its sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    (BUILD / "build.ninja").write_text(_ninja_file(library))
    done = subprocess.run([_program("ninja"), "-C", BUILD, library.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for the emulator:\n{done.stdout}{done.stderr}")
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ninja_file(library: Path) -> str:
    includes = [HERE, KERNELS, sysconfig.get_path("include"), Path(torch.__file__).parent / "include"]
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DPOINTFUSE_HOST_CUDA", *(f"-I{path}" for path in includes)]
    objects = {source: f"{source.stem}.o" for source in SOURCES}
    lines = [f"build {target}: compile {source}" for source, target in objects.items()]
    lines.append(f"build {library.name}: link {' '.join(objects.values())}")
    return RULES.format(cxx=os.environ.get("CXX", "c++"), flags=" ".join(flags)) + "\n".join(lines) + "\n"


def _program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise RuntimeError(f"the emulator is built with {name}, which is not on the PATH")
    return path
