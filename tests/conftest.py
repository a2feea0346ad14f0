"""What every test shares: seeds, NaN-filled uninitialised memory, and the skip policy.

Skip policy: a test may be skipped for hardware or an optional package that is absent, with that as its reason, and for
nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from pointfuse.backends import aten, aten_training

if not torch.cuda.is_available():
    # Triton then runs kernels on the CPU, in Python. It reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it runs in the background. Processes that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is not installed

settings.register_profile(
    "pointfuse", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("pointfuse")


def build_wheel(source: Path, into: Path, environment: Mapping[str, str]) -> Path:
    """The wheel of a source tree, built with the packages that are installed."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", into]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], env=environment, check=True)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was tuned on this machine would change what "auto" takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTFUSE_CACHE_DIR", str(tmp_path_factory.mktemp("tables")))
        yield


def fuse_small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse, fold and pack whatever the size: from where it pays is a matter of speed, and would make tests slow."""
    for name in ("_ONEDNN_MIN_INPUT", "_FOLD_MIN_OUTPUTS", "_FOLD_MIN_OUTPUTS_PER_WEIGHT", "_PACK_MIN_MACS"):
        monkeypatch.setattr(aten, name, 0)
    for name in ("MIN_MACS_PER_THREAD", "MIN_MACS_PER_OUTPUT", "MIN_MACS_PER_OUTPUT_IN_HALF"):
        monkeypatch.setattr(aten_training, name, 0)


@pytest.fixture(autouse=True)
def _small_units_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_small_units(monkeypatch)


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Fix the seed and fill uninitialised memory with NaN, so that an element never written shows."""
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of a machine that a benchmark need not measure: that takes seconds."""
    from benchmarks import run
    from benchmarks.roofline import Ceilings

    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: Ceilings(1e10, dict.fromkeys(dtypes, 1e12)))
