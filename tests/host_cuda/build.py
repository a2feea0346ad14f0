"""Builds the kernels for tests, as a Python module: for the emulator with the host's compiler, for a GPU with nvcc.

Both have ``run``; see ``run_binding.cpp``. The tensors are the CPU's for the emulator, and the GPU's for a GPU.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = [HERE / "run_binding.cpp", HERE / "training_binding.cpp", *sorted(KERNELS.glob("*.cu"))]
BUILD = ROOT / "build" / "host_cuda"

RULES = """\
compiler = {compiler}
flags = {flags}
rule compile
  command = $compiler {language} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $compiler -shared $in -o $out
"""


@functools.cache
def emulator() -> ModuleType:
    """The kernels in the emulator, built where missing or older than their sources; skips without a compiler."""
    flags = [f"-I{HERE}", "-DPOINTFUSE_HOST_CUDA", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    return _module("pointfuse_host_cuda", BUILD, _program(os.environ.get("CXX", "c++")), flags, "-x c++")


@functools.cache
def gpu() -> ModuleType:
    """The kernels on the GPU; skips without nvcc or CuTe's headers."""
    cute = next((p for folder in sys.path if (p := Path(folder) / "cutlass_library/source/include").is_dir()), None)
    if cute is None:
        pytest.skip("CuTe's headers (nvidia-cutlass) are not installed")
    major, minor = torch.cuda.get_device_capability()
    target = "90a" if (major, minor) == (9, 0) else "80"
    flags = ["-O3", f"-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-isystem {cute}"]
    return _module("pointfuse_on_gpu", BUILD.with_name("on_gpu"), _program("nvcc"), flags, "-x cu")


def _module(name: str, folder: Path, compiler: str, flags: list[str], language: str) -> ModuleType:
    folder.mkdir(parents=True, exist_ok=True)
    library = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [KERNELS, sysconfig.get_path("include"), Path(torch.__file__).parent / "include"]
    flags = ["-std=c++17", f"-DPOINTFUSE_TEST_MODULE={name}", *(f"-I{path}" for path in includes), *flags]
    lines = [RULES.format(compiler=compiler, language=language, flags=" ".join(flags))]
    lines += [f"build {source.stem}.o: compile {source}" for source in SOURCES]
    lines += [f"build {library}: link {' '.join(f'{source.stem}.o' for source in SOURCES)}", ""]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be building
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [_program("ninja"), "-C", folder, library]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for tests:\n{done.stdout}{done.stderr}")
    spec = importlib.util.spec_from_file_location(name, folder / library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        pytest.skip(f"{name} is needed to build the kernels for tests, and is not on the PATH")
    return path


def main() -> None:
    """Build what the native tests need, so that it takes none of their time."""
    said = "there is no GPU"
    if torch.cuda.is_available():
        try:
            gpu()
            said = "built"
        except pytest.skip.Exception as reason:
            said = str(reason)
    print(f"the kernels' native tests: {said}")


if __name__ == "__main__":
    main()
