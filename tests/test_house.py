"""The rules of the house: which way imports run, what the package loads, what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, build_wheel

PACKAGE = ROOT / "python" / "pointfuse"
# Every module may import from those before it, and from its own package.
ORDER = [
    "_version",
    "problem",
    "reference",
    "backends",
    "_plan",
    "plans",
    "training",
    "ops",
    "functional",
    "folded",
    "modules",
    "convert",
    "doctor",
    "cli",
]


def imported(path: Path) -> set[str]:
    """What a file imports of pointfuse, each by its whole name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n for n in names if n.startswith("pointfuse.")}
    return found


def imports(path: Path) -> set[str]:
    """The parts of pointfuse that a file imports: `modules` for `pointfuse.modules`."""
    return {name.split(".")[1] for name in imported(path)}


def package_files() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py") or p.parent != PACKAGE]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(own) + (path.parent != PACKAGE)])
    assert imports(path) <= allowed, f"{own} may import {sorted(allowed)} only"


def test_no_backend_imports_another() -> None:
    """They share ``calls.py`` alone; a package's files may import each other, and one for training its backend's."""
    folder = PACKAGE / "backends"
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own != "__init__":
            within = {name.split(".")[2] for name in imported(path) if name.startswith("pointfuse.backends.")}
            shared = set() if own == "calls" else {"calls"}
            assert within <= {own, own.removesuffix("_training")} | shared, path


def test_kernels_are_free_of_torch() -> None:
    kernels = ROOT / "csrc" / "kernels"
    for path in kernels.rglob("*") if kernels.is_dir() else ():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|Python|pybind11)', line), f"{path}: {line}"


def test_importing_loads_no_gpu_library_and_nothing_optional() -> None:
    code = (
        "import sys, pointfuse\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "bad = {'triton', 'matplotlib', 'rich', 'PIL', 'pointfuse.cli', 'pointfuse.doctor'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "python")


def test_public_names_are_documented() -> None:
    import pointfuse

    for name in pointfuse.__all__:
        if name != "__version__":
            assert (getattr(pointfuse, name).__doc__ or "").strip(), name


def test_the_repository_speaks_of_the_project_alone() -> None:
    """No path of a machine, and no address of a package registry, stands in a tracked file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(home|root|work|tmp)/[a-z]|https?://[^\s]*(pypi|debian|npmjs)")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".h", ".cu", ".cuh", ".cpp") and path != Path(__file__):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not pattern.search(line), f"{name}:{number}: {line.strip()[:120]}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "_build.json")
    for folder in ("python", "csrc", "docs", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def uncompiled() -> dict[str, str]:
    """An environment in which nothing is compiled; test_build.py holds the wheel with compiled parts."""
    return {**os.environ, "POINTFUSE_BUILD_CUDA": "0", "CXX": "no-compiler"}


@pytest.fixture(scope="module")
def wheel(source: Path, uncompiled: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), uncompiled)


def test_the_wheel_holds_the_package_and_no_test_or_benchmark(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"pointfuse/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py*") if p.suffix != ".pyc"}
    expected |= {"pointfuse/py.typed", "pointfuse/_build.json", "pointfuse/backends/triton/table.json"}
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == expected
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "\nVersion: 0.1.0\n" in metadata


def test_the_sdist_builds_the_same_package(source: Path, uncompiled: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("build")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
        env=uncompiled,
    )
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    for folder in ("csrc", "docs"):
        assert {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.*")} <= names
    assert {f"python/pointfuse/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py")} <= names


def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel]
    subprocess.run(command, check=True)
    code = f"import pointfuse, sys; assert pointfuse.__file__.startswith({str(tmp_path)!r}), pointfuse.__file__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
