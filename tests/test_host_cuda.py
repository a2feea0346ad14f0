"""The emulated hardware does what the PTX documentation says: tests/host_cuda/test_atoms.cpp, test by test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

HERE = ROOT / "tests" / "host_cuda"
SOURCE = HERE / "test_atoms.cpp"
NAMES = re.findall(r"^TEST\((\w+)\)", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler (CXX, g++ or c++)")
    built = tmp_path_factory.mktemp("host_cuda") / "test_atoms"
    include = ["-I", str(HERE), "-I", str(ROOT / "csrc" / "kernels")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DPOINTFUSE_HOST_CUDA"]
    command = [*compiler.split(), *flags, *include, str(SOURCE), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.parametrize("name", NAMES)
def test_atom(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{name}: ok\n", done.stdout + done.stderr


def test_every_test_is_listed(program: Path) -> None:
    assert subprocess.check_output([program, "--list"], text=True).split() == NAMES
