"""The planner's module for tests: the installed one, or one built here from the sources."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

SOURCES = [ROOT / "csrc" / "plan_binding.cpp", *sorted((ROOT / "csrc" / "kernels").glob("*.h"))]
NAME = "pointfuse._plan"


def load_planner() -> ModuleType:
    """``pointfuse._plan``, no older than the sources. Skips the test where it is absent and nothing can build it."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    installed = importlib.util.find_spec(NAME)
    if installed is not None and installed.origin is not None and _is_new(Path(installed.origin)):
        return importlib.import_module(NAME)
    spec = importlib.util.spec_from_file_location(NAME, _build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def _is_new(built: Path) -> bool:
    return built.stat().st_mtime >= max(source.stat().st_mtime for source in SOURCES)


def _build() -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    python = Path(sysconfig.get_paths()["include"])
    if compiler is None or not (python / "Python.h").is_file():
        reason = "pointfuse._plan is not built, and there is no C++ compiler or no Python.h to build it"
        pytest.skip(reason, allow_module_level=True)
    pybind11 = importlib.util.find_spec("pybind11")
    found = None if pybind11 is None or pybind11.origin is None else Path(pybind11.origin).parent / "include"
    # torch carries pybind11's headers.
    include = found or Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-isystem", str(include), "-isystem", str(python), str(SOURCES[0])]
    key = hashlib.sha256(" ".join(command).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    target = ROOT / "build" / "test-planner" / key.hexdigest()[:16] / f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)  # an interrupted build leaves no module
    return target
