"""Packaging of pointfuse, and the build of its two compiled parts. Metadata stands in pyproject.toml.

    pointfuse/_cuda.so    the CUDA kernels and their PyTorch operator: by nvcc, with the headers of torch and CuTe
    pointfuse/_plan.*.so  the planner for Python: by a C++ compiler, with the headers of pybind11

Each is built where this machine can build it; POINTFUSE_BUILD_CUDA=1 makes a kernel library that cannot be built an
error, 0 leaves it out. What was built, and why not the rest, goes to pointfuse/_build.json for `pointfuse doctor`.
Ninja runs the compilers: in parallel (MAX_JOBS bounds it), and only over what has changed since.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "compiled"
VARIABLE = "POINTFUSE_BUILD_CUDA"
TOOLKIT = Path("/usr/local/cuda")
OLDEST_NVCC = (12, 3)
# The library runs on every torch from this one on.
TORCH_TARGET_VERSION = "0x020a000000000000"
CUTLASS = "nvidia-cutlass==4.2.*"

# Machine code for 8.x and, as PTX, for what comes after; machine code with wgmma and TMA for Hopper. The kernels for
# sm_80 are compiled for Hopper too: they serve there what the others do not take.
SM80 = "-gencode arch=compute_80,code=[sm_80,compute_80]"
SM90 = "-gencode arch=compute_90a,code=sm_90a"


class Missing(Exception):
    """A part cannot be built here; the message says what is missing and where to get it."""


def version() -> str:
    """The one place that states the version is the package itself; reading the text avoids importing torch."""
    text = (ROOT / "python/pointfuse/_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise RuntimeError('python/pointfuse/_version.py must hold a line __version__ = "X.Y.Z"')
    return found.group(1)


def host_compiler() -> str:
    """The C++ compiler: $CXX, or the first of the usual ones."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    raise Missing(f"no C++ compiler ({named or 'c++, g++, clang++'}): install g++ 9 or later, or set CXX")


def folder_of_package(package: str, inside: str, otherwise: str) -> Path:
    """A folder of an installed package, found by path: without importing it, and through pip's build isolation.

    Isolation hides the interpreter's own packages from imports, but headers are read from where they lie.
    """
    for place in dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        if place and (Path(place) / package / inside).is_dir():
            return Path(place) / package / inside
    raise Missing(otherwise)


def find_nvcc() -> Path:
    """The CUDA compiler, of a version that can build the kernels. No GPU is needed for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(TOOLKIT / "bin" / "nvcc")
    nvcc = next((path for path in candidates if path.is_file()), None)
    needed = ".".join(map(str, OLDEST_NVCC))
    if nvcc is None:
        places = f"CUDA_HOME, CUDA_PATH, PATH, {TOOLKIT}"
        raise Missing(f"nvcc was not found ({places}): install the CUDA toolkit {needed} or later")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or tuple(map(int, found.groups())) < OLDEST_NVCC:
        has = f"is of CUDA {found[1]}.{found[2]}" if found else "does not run"
        raise Missing(f"{nvcc} {has}: the CUDA toolkit {needed} or later is needed; set CUDA_HOME to one")
    return nvcc


def check_nvcc(nvcc: list[str]) -> None:
    """Compile a line with the host's compiler: nvcc takes not every version of it."""
    probe, passed = BUILD / "probe.cu", BUILD / "probe.passed"
    probe.write_text("#include <type_traits>\n__global__ void probe() {}\n", encoding="utf-8")
    command = [*nvcc, "-std=c++17", *SM90.split(), "-c", str(probe), "-o", f"{probe}.o"]
    if passed.is_file() and passed.read_text(encoding="utf-8") == str(command):
        return
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in (done.stderr + done.stdout).splitlines() if "error" in line), "it fails")
        raise Missing(f"nvcc cannot use this host compiler ({first.strip()}): set CXX to one that it takes")
    passed.write_text(str(command), encoding="utf-8")


def quoted(path: Path | str) -> str:
    """A path in a command of a ninja file, which a shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def ninja_path(path: Path | str) -> str:
    """A path for a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class Part:
    """One compiled part: its file in the package, and its piece of the ninja file."""

    def __init__(self, name: str, file: str) -> None:
        self.name = name
        self.file = file
        self.lines: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, rule: str, output: str, inputs: list[Path | str], **variables: str) -> str:
        self.lines.append(f"build {ninja_path(output)}: {rule} {' '.join(map(ninja_path, inputs))}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output


def plan_part(compiler: str) -> Part:
    """``pointfuse._plan``, of this Python."""
    part = Part("plan", f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise Missing("Python.h was not found: install Python's headers (python3-dev)")
    pybind11 = folder_of_package("pybind11", "include", "pybind11 was not found: pip install 'pybind11>=2.13'")
    flags = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -isystem {quoted(python)} -isystem {quoted(pybind11)}"
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    part.rule("cxx", f"{compiler} -MMD -MF $out.d {flags} -c $in -o $out", depfile=True)
    part.rule("link_plan", f"{compiler} {link} $in -o $out")
    compiled = part.edge("cxx", "plan_binding.o", [SOURCES / "plan_binding.cpp"])
    part.edge("link_plan", part.file, [compiled])
    return part


def cuda_part(compiler: str) -> Part:
    """``pointfuse/_cuda.so``, of any Python and any torch."""
    if sys.platform != "linux":
        raise Missing("the CUDA kernels are built on Linux only")
    part = Part("cuda", "_cuda.so")
    nvcc = find_nvcc()
    torch = folder_of_package("torch", "include", "torch's headers were not found: install torch>=2.10 first").parent
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise Missing(f"the torch in {torch.parent} has no stable ABI: torch>=2.10 is needed")
    cute = folder_of_package(
        "cutlass_library", "source/include", f"CuTe's headers were not found: pip install --no-deps '{CUTLASS}'"
    )
    host = ["-ccbin", compiler] if os.environ.get("CXX") else []
    check_nvcc([str(nvcc), *host])

    flags = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
    includes = f"-isystem {quoted(cute)} -isystem {quoted(torch / 'include')}"
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    compile_with = " ".join(map(quoted, [nvcc, *host]))
    part.rule("nvcc", f"{compile_with} -MMD -MF $out.d {flags} {includes} $more -c $in -o $out", depfile=True)
    # libtorch.so brings libtorch_cuda where torch has it. cudart stays inside, so that torch may have another one.
    libraries = f"-L{quoted(torch / 'lib')} -Xlinker --no-as-needed -ltorch -ltorch_cpu -Xlinker --exclude-libs,ALL"
    part.rule("link_cuda", f"{compile_with} -shared --no-device-link -cudart static $in -o $out {libraries}")
    objects = [
        part.edge("nvcc", f"{path.stem}.o", [path], more=SM90 if "sm90" in path.stem else f"{SM80} {SM90}")
        for path in sorted((SOURCES / "kernels").glob("*.cu"))
    ]
    binding = SOURCES / "torch_binding.cpp"
    objects.append(part.edge("nvcc", "torch_binding.o", [binding], more=f"-x cu {SM90} {target}"))
    part.edge("link_cuda", part.file, list(objects))
    return part


class NinjaBuild(build_ext):
    """Builds what can be built, and puts it into the package."""

    def run(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        parts, record = self._parts()
        for name, said in record.items():
            print(f"pointfuse: {name}: {said}", flush=True)
        if parts:
            self._compile(parts)
        package = ROOT / "python" / "pointfuse" if self.inplace else Path(self.build_lib) / "pointfuse"
        package.mkdir(parents=True, exist_ok=True)
        self.installed = [package / part.file for part in parts]
        for part, target in zip(parts, self.installed, strict=True):
            put(BUILD / part.file, target)
        for stale in {"_cuda.so", f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"} - {p.file for p in parts}:
            (package / stale).unlink(missing_ok=True)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _parts(self) -> tuple[list[Part], dict[str, str]]:
        """What can be built, and what is to be said of each part."""
        wanted = os.environ.get(VARIABLE) or "auto"
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"pointfuse: {VARIABLE}={wanted}: it must be auto, 0 or 1")
        parts, record = [], {}
        for name, make in (("plan", plan_part), ("cuda", cuda_part)):
            if name == "cuda" and wanted == "0":
                record[name] = f"left out by {VARIABLE}=0"
                continue
            try:
                self._ninja()
                parts.append(make(host_compiler()))
                record[name] = "built"
            except Missing as missing:
                if name == "cuda" and wanted == "1":
                    raise SystemExit(
                        f"pointfuse: {VARIABLE}=1, and the CUDA kernels cannot be built: {missing}"
                    ) from None
                record[name] = f"not built: {missing}"
        return parts, record

    def _ninja(self) -> str:
        """The ninja program: on the PATH, or the one of the package of that name."""
        path = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if path is None:
            raise Missing("ninja was not found: pip install ninja")
        return path

    def _compile(self, parts: list[Part]) -> None:
        lines = [line for part in parts for line in part.lines]
        lines.append(f"default {' '.join(part.file for part in parts)}")
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        began = time.time()
        done = subprocess.run(
            [self._ninja(), "-C", BUILD, "-j", jobs], env={**os.environ, "NINJA_STATUS": "[%f/%t, %es] "}, check=False
        )
        if done.returncode:
            raise SystemExit(
                f"pointfuse: a compiled part failed to build; {VARIABLE}=0 leaves the CUDA kernels out, and what was "
                "compiled is kept for the next try"
            )
        if steps := steps_since(began):
            slowest = ", ".join(f"{name} {seconds:.0f} s" for seconds, name in steps[:3])
            print(f"pointfuse: built in {time.time() - began:.0f} s; slowest: {slowest}", flush=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "installed", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def steps_since(began: float) -> list[tuple[float, str]]:
    """Seconds and outputs of what ninja has run since a time, slowest first, from its log."""
    steps = []
    for line in (BUILD / ".ninja_log").read_text(encoding="utf-8").splitlines()[1:]:
        start, end, modified, output, _ = line.split("\t")
        if int(modified) / 1e9 >= began - 1:
            steps.append(((int(end) - int(start)) / 1e3, output))
    return sorted(steps, reverse=True)


def put(built: Path, target: Path) -> None:
    """Copy what has changed, by renaming: a process that has the old file loaded keeps it."""
    if target.is_file() and target.stat().st_mtime_ns == built.stat().st_mtime_ns:
        return
    beside = target.with_name(target.name + ".new")
    shutil.copy2(built, beside)
    beside.replace(target)


setup(
    version=version(),
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={"pointfuse": ["py.typed", "*.pyi", "backends/triton/table.json"]},
    ext_modules=[
        Extension("pointfuse._plan", ["csrc/plan_binding.cpp"]),
        Extension("pointfuse._cuda", ["csrc/torch_binding.cpp"]),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
