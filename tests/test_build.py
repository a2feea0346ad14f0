"""What setup.py builds, what it says of what it cannot build, and that a bad library is a reason and never a crash."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from conftest import ROOT, build_wheel
from pointfuse.backends import cuda

PLAN = f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
# Small sources in the place of the kernels: what is tested is the build, not what it builds.
STUBS = {
    "csrc/torch_binding.cpp": "int binding;\n",
    "csrc/kernels/conv_sm80_a.cu": "int a;\n",
    "csrc/kernels/conv_sm90_b.cu": "int b;\n",
    "csrc/kernels/answer.h": "constexpr int answer = 42;\n",
    "csrc/plan_binding.cpp": """\
#include <Python.h>
#include "kernels/answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_plan", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__plan() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", answer);
  return module;
}
""",
}
# Takes nvcc's options, notes them, and makes the file that is asked for.
NVCC = """\
#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("Cuda compilation tools, release {release}, V{release}.0")
elif {fails} and "probe" in " ".join(sys.argv):
    print("error: -- unsupported GNU version! gcc versions later than 11 are not supported!", file=sys.stderr)
    sys.exit(1)
else:
    with open({log!r}, "a") as log:
        print(*sys.argv[1:], file=log)
    output = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    output.write_bytes(pathlib.Path({library!r}).read_bytes())
    output.with_name(output.name + ".d").write_text(f"{{output.name}}:")
"""


def load_setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without its running."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    spec = importlib.util.spec_from_file_location("pointfuse_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checkout:
    """A copy of the sources with stubs for kernels, and a compiler environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.package = self.root / "python" / "pointfuse"
        self.log = folder / "nvcc.log"
        self.root.mkdir()
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.egg-info")
        shutil.copytree(ROOT / "python", self.root / "python", ignore=ignored)
        for name, text in STUBS.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        self.environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
        self.environment["POINTFUSE_BUILD_CUDA"] = "0"

    def use_nvcc(self, release: str, fails: bool = False) -> None:
        """A toolkit of this release, and headers where those of CuTe would be."""
        home, headers = self.root.parent / f"cuda {release}", self.root.parent / "site"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (headers / "cutlass_library/source/include").mkdir(parents=True, exist_ok=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            NVCC.format(python=sys.executable, release=release, fails=fails, log=str(self.log), library=a_library())
        )
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        self.environment |= {"CUDA_HOME": str(home), "PYTHONPATH": str(headers), "POINTFUSE_BUILD_CUDA": "auto"}

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(
            command, cwd=self.root, env=self.environment | environment, capture_output=True, text=True, check=False
        )

    def record(self) -> dict[str, str]:
        return json.loads((self.package / "_build.json").read_text())

    def python(self, code: str) -> str:
        environment = self.environment | {"PYTHONPATH": str(self.root / "python")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def a_library() -> str:
    """Some shared library of this machine that is not ours."""
    import _ctypes

    return _ctypes.__file__


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    return Checkout(tmp_path)


def test_the_planner_is_built_in_place_and_only_when_something_changed(checkout: Checkout) -> None:
    done = checkout.build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pointfuse: plan: built\npointfuse: cuda: left out by POINTFUSE_BUILD_CUDA=0\n" in done.stdout
    assert re.search(r"pointfuse: built in \d+ s; slowest: plan_binding.o \d+ s", done.stdout)
    assert checkout.record() == {"plan": "built", "cuda": "left out by POINTFUSE_BUILD_CUDA=0"}
    assert checkout.python("import pointfuse._plan as p; print(p.answer)") == "42"

    before = (checkout.package / PLAN).stat()
    assert "no work to do" in checkout.build().stdout
    assert (checkout.package / PLAN).stat() == before

    (checkout.root / "csrc/kernels/answer.h").write_text("constexpr int answer = 43;\n")
    assert "no work to do" not in checkout.build().stdout
    assert checkout.python("import pointfuse._plan as p; print(p.answer)") == "43"


def test_an_interrupted_build_leaves_nothing_and_can_be_resumed(checkout: Checkout, tmp_path: Path) -> None:
    slow = tmp_path / "slow-c++"
    slow.write_text(f'#!/bin/sh\n[ -e {tmp_path}/go ] || {{ touch {tmp_path}/waits; sleep 60; }}\nexec c++ "$@"\n')
    slow.chmod(0o755)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = checkout.environment | {"CXX": str(slow)}
    with subprocess.Popen(command, cwd=checkout.root, env=environment, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as build:  # fmt: skip
        while build.poll() is None and not (tmp_path / "waits").exists():
            time.sleep(0.05)
        os.killpg(build.pid, signal.SIGINT)
        output = build.communicate()[0].decode()
    assert build.returncode != 0, output
    assert not list(checkout.package.glob("*.so*"))
    (tmp_path / "go").touch()
    assert checkout.build(CXX=str(slow)).returncode == 0
    assert checkout.python("import pointfuse._plan as p; print(p.answer)") == "42"


def test_kernels_are_compiled_for_their_architectures(checkout: Checkout) -> None:
    checkout.use_nvcc("13.0")
    done = checkout.build(POINTFUSE_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.record() == {"plan": "built", "cuda": "built"}
    assert (checkout.package / "_cuda.so").is_file()
    calls = {re.search(r"-o (\S+)", line)[1]: line for line in checkout.log.read_text().splitlines()}  # type: ignore[index]
    sm80, sm90 = "arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"
    assert sm80 in calls["conv_sm80_a.o"]
    assert sm90 in calls["conv_sm80_a.o"]
    assert sm80 not in calls["conv_sm90_b.o"]
    assert sm90 in calls["conv_sm90_b.o"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in calls["torch_binding.o"]
    link = calls["_cuda.so"]
    assert "-cudart static" in link
    assert "torch_python" not in link
    assert "no work to do" in checkout.build(POINTFUSE_BUILD_CUDA="1").stdout


UNUSABLE = {
    "too old": (dict(release="11.8"), "is of CUDA 11.8: the CUDA toolkit 12.3 or later is needed; set CUDA_HOME"),
    "host compiler": (
        dict(release="12.4", fails=True),
        r"nvcc cannot use this host compiler \(error: -- unsupported GNU version!.+\): set CXX to one that it takes",
    ),
}


@pytest.mark.parametrize(("nvcc", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_nvcc_is_named(checkout: Checkout, nvcc: dict[str, Any], message: str) -> None:
    checkout.use_nvcc(**nvcc)
    done = checkout.build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(message, checkout.record()["cuda"])
    said = checkout.python("import pointfuse; print(pointfuse.backends()['cuda'].reason)")
    assert re.search(f"its kernels are not built: not built: .*{message}", said)
    done = checkout.build(POINTFUSE_BUILD_CUDA="1")
    assert done.returncode == 1
    assert re.search(
        f"pointfuse: POINTFUSE_BUILD_CUDA=1, and the CUDA kernels cannot be built: .*{message}", done.stderr
    )


def test_a_wrong_value_of_the_variable_is_an_error(checkout: Checkout) -> None:
    done = checkout.build(POINTFUSE_BUILD_CUDA="yes")
    assert done.returncode == 1
    assert "POINTFUSE_BUILD_CUDA=yes: it must be auto, 0 or 1" in done.stderr


def test_without_a_compiler_everything_in_python_works(checkout: Checkout) -> None:
    (checkout.package / PLAN).write_text("of an earlier build")
    done = checkout.build(CXX="no-such-compiler", POINTFUSE_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    missing = "not built: no C++ compiler (no-such-compiler): install g++ 9 or later, or set CXX"
    assert checkout.record() == {"plan": missing, "cuda": missing}
    assert not (checkout.package / PLAN).exists()
    said = checkout.python("from pointfuse import cli; cli.main(['doctor'])")
    assert "backend aten           usable; sanity check passed" in said
    assert f"CUDA kernels           {missing}" in said
    assert f"planner                {missing}" in said


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py on a machine with no program in reach."""
    build = load_setup(monkeypatch)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "TOOLKIT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return build


def test_missing_programs_are_named(bare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(bare.Missing, match=r"nvcc was not found \(CUDA_HOME, CUDA_PATH, PATH, .+\): install the CUDA"):
        bare.find_nvcc()
    with pytest.raises(bare.Missing, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\): install g\+\+"):
        bare.host_compiler()
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(bare.Missing, match="ninja was not found: pip install ninja"):
        bare.NinjaBuild._ninja(None)


@pytest.mark.parametrize(
    ("package", "part", "message"),
    [
        ("torch", "cuda_part", "torch's headers were not found: install torch>=2.10 first"),
        (
            "cutlass_library",
            "cuda_part",
            "CuTe's headers were not found: pip install --no-deps 'nvidia-cutlass==4.2.*'",
        ),
        ("pybind11", "plan_part", "pybind11 was not found: pip install 'pybind11>=2.13'"),
    ],
)
def test_missing_headers_are_named(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, part: str, message: str
) -> None:
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "include/torch/csrc/stable/library.h").touch()

    def folder(name: str, inside: str, otherwise: str) -> Path:
        if name == package:
            raise bare.Missing(otherwise)
        return tmp_path / "include"

    monkeypatch.setattr(bare, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(bare, "check_nvcc", lambda nvcc: None)
    monkeypatch.setattr(bare, "folder_of_package", folder)
    with pytest.raises(bare.Missing, match=re.escape(message)):
        getattr(bare, part)("c++")


def test_headers_of_python_or_of_a_new_enough_torch_may_be_missing(
    bare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bare, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(bare, "folder_of_package", lambda *args: tmp_path / "include")
    with pytest.raises(bare.Missing, match=r"has no stable ABI: torch>=2\.10 is needed"):
        bare.cuda_part("c++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(bare.Missing, match=r"Python\.h was not found: install Python's headers"):
        bare.plan_part("c++")


def test_headers_are_found_through_build_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip hides the interpreter's packages from an isolated build, but their folder is where it was."""
    build = load_setup(monkeypatch)
    (tmp_path / "torch/include").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert build.folder_of_package("torch", "include", "") == tmp_path / "torch/include"


def test_the_wheel_and_the_sdist_hold_what_they_should(checkout: Checkout, tmp_path: Path) -> None:
    checkout.use_nvcc("13.0")
    wheel = build_wheel(checkout.root, tmp_path, checkout.environment)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"pointfuse/{name}" for name in ("_cuda.so", PLAN, "_build.json", "py.typed")} <= names
    assert not [name for name in names if name.endswith((".cu", ".cpp", ".h", ".d", ".new"))]
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name

    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, checkout.root], env=checkout.environment, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert STUBS.keys() <= names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".o"))]


BROKEN = {
    "absent": (None, "its kernels are not built"),
    "empty": (lambda data: b"", "is damaged: build it again with `pip install"),
    "cut short": (lambda data: data[:-1], "is damaged"),
    "half": (lambda data: data[: len(data) // 2], "is damaged"),
    "header alone": (lambda data: data[:64], "is damaged"),
    "text": (lambda data: b"not a library at all" * 10, "is damaged"),
    "32 bit": (lambda data: data[:4] + b"\x01" + data[5:], "is damaged"),
    "another machine": (lambda data: data[:18] + struct.pack("<H", 0xF3) + data[20:], "cannot be loaded"),
    "not ours": (lambda data: data, "cannot be loaded .*pointfuse_interface.*: build it again"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files on Linux only")
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_bad_library_is_a_reason_and_never_a_crash(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "_cuda.so"
    if change is not None:
        path.write_bytes(change(Path(a_library()).read_bytes()))
    code = (
        "import pathlib, sys, pointfuse\n"
        "from pointfuse.backends import cuda\n"
        "cuda.LIBRARY = pathlib.Path(sys.argv[1])\n"
        "print(pointfuse.backends()['cuda'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(f"usable=False, reason=.*{message}", done.stdout), done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    if not cuda.LIBRARY.is_file():
        pytest.skip(f"the CUDA kernels are not built: {cuda.build_record().get('cuda', 'no build was run')}")
    return cuda.LIBRARY


def symbols(library: Path, *options: str) -> list[list[str]]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", "-D", *options, library], capture_output=True, text=True, check=True)
    return [line.split() for line in listed.stdout.splitlines()]


def test_the_library_depends_on_torchs_stable_interface_alone(library: Path) -> None:
    undefined = {line[-1]: line[-2] for line in symbols(library, "--undefined-only")}
    foreign = [name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon", "__cxa"))]
    assert foreign
    for name in foreign:
        assert re.match(r"(aoti_)?torch_[a-z0-9_]+$", name), name
    assert undefined["aoti_torch_get_current_cuda_stream"] == "w"
    cuda_only = [n for n in foreign if "cuda" in n and undefined[n] != "w" and n != "aoti_torch_device_type_cuda"]
    assert not cuda_only


def test_the_library_exports_no_cuda_runtime(library: Path) -> None:
    """Another one lives in the same process, torch's."""
    exported = {line[-1] for line in symbols(library, "--defined-only")}
    assert {"pointfuse_interface", "pointfuse_unusable_reason"} <= exported
    assert not [name for name in exported if name.startswith("cuda") or name.startswith("__cuda")]


def test_the_library_loads_and_implements_the_operator(library: Path) -> None:
    assert cuda.library_problem(library) is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("pointfuse::_conv_bn_act_cuda", "CUDA")
    assert cuda.unusable_reason() is None or "build" in cuda.unusable_reason() or "no NVIDIA" in cuda.unusable_reason()  # type: ignore[operator]


def test_the_interface_numbers_agree() -> None:
    source = (ROOT / "csrc" / "torch_binding.cpp").read_text(encoding="utf-8")
    assert re.search(r"pointfuse_interface\(\) \{ return (\d+); \}", source)[1] == str(cuda.INTERFACE)  # type: ignore[index]
