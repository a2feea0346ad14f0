"""The kernels of a training step compile well for the GPUs they are for: they do not spill, and load and store 16 bytes
at a time. That takes Triton's own compiler, and no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import util
from pathlib import Path

import pytest
from pointfuse.backends.triton import configs
from training_compiler import Case
from triton_compiler import PRODUCTS, Kernel

# Bytes a thread: statistics of 128 sums a thread need as much, once a tile, outside the loop over its products.
SPILLED_BY_STATISTICS = 32


def steps() -> Iterator[Case]:
    """Training steps of the YOLOv3 heads' layers."""
    for chip in configs.FAMILIES:
        yield Case(chip, 1, "channels_last", "bf16", 8, 52, 256, 128)
    # The largest tile; a residual; 40 channels, of which 8 are 16 bytes; planes of whole 16 bytes.
    yield Case("sm_90", 3, "channels_last", "bf16", 64, 52, 128, 256)
    yield Case("sm_100", 3, "channels_last", "bf16", 64, 52, 128, 256)
    yield Case("sm_80", 3, "channels_last", "fp16", 8, 13, 512, 1024, finished=True)
    yield Case("sm_90", 1, "channels_last", "bf16", 8, 13, 24, 40)
    yield Case("sm_100", 1, "NCHW", "bf16", 8, 52, 256, 128, finished=True)


STEPS = list(steps())
Step = dict[str, tuple[Kernel, dict[str, int]]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Step]:
    """The kernels of each training step by their names, with the widths of their loads."""
    if util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        # A third of the compiler's time, for the same code.
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("training_compiler.py"))]
    lines = "\n".join(json.dumps(asdict(case)) for case in STEPS)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {
        case: {
            kernel["name"].removeprefix("pointfuse_"): (Kernel(**kernel), loads) for kernel, loads in json.loads(line)
        }
        for case, line in zip(STEPS, done.stdout.splitlines(), strict=True)
    }


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_training_step_does_not_spill(case: Case, compiled: dict[Case, Step]) -> None:
    step = compiled[case]
    assert {"conv_bn_act", "normalise", "sums", "gradients"} <= step.keys()
    for name, (kernel, _) in step.items():
        assert kernel.local <= (SPILLED_BY_STATISTICS if name == "conv_bn_act" else 0), kernel
        assert not {"LDL", "STL"} & kernel.loop.keys(), kernel
    assert any(step["conv_bn_act"][0].loop.get(opcode, 0) > 0 for opcode in PRODUCTS)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_training_step_loads_and_stores_16_bytes_at_a_time(case: Case, compiled: dict[Case, Step]) -> None:
    """As often as its tensors of the output's shape need for 16 elements a thread."""
    residual = 1 if case.finished else 0
    for name, read, written in (("normalise", 1, 1), ("sums", 2, 0), ("gradients", 2, 1 + residual)):
        kernel, loads = compiled[case][name]
        assert loads["128"] >= 2 * (read + residual), name
        assert kernel.stores.get("128", 0) == 2 * written, name
        assert "8" not in loads, name
        # Those of numbers of the channels.
        assert loads.get("16", 0) <= 3, name
