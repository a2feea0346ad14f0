"""Every configuration that the Triton backend ships compiles well for its GPUs: it uses tensor cores, loads as planned,
and does not spill. That takes Triton's own compiler, and no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pointfuse.backends import calls
from pointfuse.backends.triton import compilation, configs, training
from pointfuse.backends.triton.configs import Config
from triton_compiler import CHIPS, Kernel, Outcome, Unit

HERE = Path(__file__).parent
DTYPES = {"half": "bf16", "tf32": "tf32", "fp32": "fp32"}
PRODUCTS = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
# Bytes a thread: with a residual as well, a tile of 128 sums a thread spills on its way out, after its products.
SPILLED_BY_RESIDUAL = 240


def shipped() -> Iterator[Unit]:
    """Every entry of the tables for a call of its class; the largest tiles for others as well."""
    for family in configs.FAMILIES:
        for shape, entry in configs.shipped(family).items():
            kernel, channels = (3 if shape.taps == 9 else 1), (shape.c_in, shape.c_out)
            half, channels_last = shape.products == "half", shape.layout == "channels_last"
            plane = 13 if shape.pixels <= 2048 else 52
            batch = shape.pixels // plane**2
            unit = Unit(family, kernel, shape.layout, DTYPES[shape.products], batch, plane, *channels, entry.config)
            # An entry with several parts serves calls with too few steps for them, too.
            whole = replace(unit, config=replace(entry.config, split_k=1))
            yield whole if kernel == 1 else unit
            if half and channels_last:
                yield unit if kernel == 1 else whole
            if shape.pixels < 32768:
                continue
            if not channels_last if kernel == 1 else channels_last and CHIPS[family].descriptors:
                # Rows that are not of whole 16 bytes; a plane that no box of pixels covers well.
                yield replace(unit, plane=13)
            if channels_last if kernel == 3 else half:
                yield replace(unit, finished=True)
            if half and channels_last:
                yield replace(unit, dtype="fp16") if kernel == 1 else replace(unit, stride=2)
            if channels_last and CHIPS[family].descriptors:
                yield replace(unit, descriptors=False)


def smaller() -> Iterator[Unit]:
    """The largest tile of Ampere's table for GPUs of its family with less shared memory."""
    for name in ("sm_89", "sm_120"):
        for shape, entry in configs.shipped("sm_80").items():
            if str(shape).startswith("3x3 channels_last half 32768"):
                config = entry.config.fitted(shape, CHIPS[name])
                yield Unit(name, 3, shape.layout, "bf16", 8, 52, shape.c_in, shape.c_out, config)


def flattened() -> Iterator[Unit]:
    """The largest tiles that are shipped, as tuning tries them for programs that walk over several."""
    for unit in SHIPPED:
        walks = (
            unit.layout == "channels_last" and unit.plane == 52 and unit.descriptors and CHIPS[unit.chip].descriptors
        )
        if walks and unit.stride == 1:
            yield replace(unit, config=replace(unit.config, flatten=True))


def edges() -> Iterator[Unit]:
    """Configurations at the edges of what ``Config.refusal`` calls spilling, on both sides of each."""
    ragged, strided = dict(c_in=500, c_out=500, finished=True), dict(c_in=500, kernel=3, stride=2)
    for chip, layout, dtype, call, *sizes in (
        ("sm_80", "channels_last", "bf16", {}, (64, 256, 64, 3, 8), (128, 256, 64, 3, 8)),
        ("sm_80", "channels_last", "fp32", strided, (64, 64, 16, 3, 4), (64, 128, 16, 3, 4)),
        ("sm_80", "NCHW", "bf16", strided, (128, 32, 32, 3, 4), (128, 32, 64, 3, 4)),
        ("sm_80", "NCHW", "tf32", ragged, (64, 64, 16, 3, 4), (64, 64, 32, 3, 4)),
        ("sm_90", "channels_last", "bf16", {}, (256, 128, 64, 3, 8), (128, 256, 64, 3, 4)),
        ("sm_90", "channels_last", "fp32", {}, (64, 128, 32, 3, 4), (128, 128, 32, 3, 4)),
        ("sm_90", "NCHW", "bf16", {}, (64, 128, 64, 3, 8), (128, 128, 64, 3, 4)),
        ("sm_90", "NCHW", "tf32", ragged, (64, 64, 16, 3, 4), (64, 64, 32, 3, 4)),
        ("sm_90", "NCHW", "fp32", {}, (128, 64, 32, 3, 8), (128, 64, 32, 3, 4)),
        ("sm_100", "channels_last", "bf16", {}, (64, 256, 64, 3, 4), (128, 256, 64, 3, 4)),
        ("sm_100", "NCHW", "fp32", {}, (128, 64, 32, 3, 8), (128, 64, 32, 3, 4)),
    ):
        for size in sizes:
            plane = 13 if layout == "NCHW" else 52
            yield replace(Unit(chip, 1, layout, dtype, 8, plane, 512, 512, Config(*size)), **call)


SHIPPED = list(dict.fromkeys([*shipped(), *smaller()]))
FLATTENED = list(flattened())
EDGES = list(edges())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs ``triton_compiler.py`` and gives back what it says, of each line of its input if there is any."""
    if util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        # A third of the compiler's time, for the same code.
        "TRITON_DISABLE_LINE_INFO": "1",
        # What is to become Triton's default.
        "TRITON_DEFAULT_FP_FUSION": "0",
    }

    def run(*arguments: str, lines: list[str] | None = None) -> list[Any]:
        command = [sys.executable, str(HERE / "triton_compiler.py"), *arguments]
        done = subprocess.run(command, input="\n".join(lines or []), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def compiled(compiler: Any) -> dict[Unit, Outcome]:
    """Every unit of these tests, compiled by two processes at a time."""
    units = [*SHIPPED, *FLATTENED, *EDGES]
    lines = [json.dumps(asdict(unit)) for unit in units]
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda i: compiler(lines=lines[i::2]), range(2)))
    return {
        unit: Outcome(**(data | {"kernels": [Kernel(**kernel) for kernel in data["kernels"]]}))
        for i, half in enumerate(halves)
        for unit, data in zip(units[i::2], half, strict=True)
    }


@pytest.mark.parametrize("unit", SHIPPED, ids=str)
def test_a_shipped_configuration_is_valid_and_does_not_spill(unit: Unit, compiled: dict[Unit, Outcome]) -> None:
    assert unit.config.refusal(unit_shape(unit), CHIPS[unit.chip]) is None
    for kernel in compiled[unit].kernels:
        assert kernel.local <= (SPILLED_BY_RESIDUAL if unit.finished else 0), kernel
        assert kernel.registers <= 255
        assert not {"LDL", "STL"} & kernel.loop.keys(), kernel


@pytest.mark.parametrize("unit", [*SHIPPED, *FLATTENED], ids=str)
def test_shared_memory_is_at_most_what_the_configuration_claims(unit: Unit, compiled: dict[Unit, Outcome]) -> None:
    outcome = compiled[unit]
    taken = max(kernel.shared for kernel in outcome.kernels)
    assert 0 < taken <= outcome.shared_claimed <= CHIPS[unit.chip].shared_bytes


@pytest.mark.parametrize("unit", SHIPPED, ids=str)
def test_products_run_on_tensor_cores_and_operands_come_as_planned(unit: Unit, compiled: dict[Unit, Outcome]) -> None:
    outcome = compiled[unit]
    kernel = outcome.kernels[0]
    assert kernel.opcodes[PRODUCTS[unit.chip]] > 0
    assert kernel.loop[PRODUCTS[unit.chip]] > 0
    assert ("UTMALDG" in kernel.opcodes) == bool(outcome.described)
    assert not outcome.described or CHIPS[unit.chip].descriptors
    if unit.layout == "channels_last" and set(outcome.described) != {"x", "weight"}:
        # Copies to shared memory that no thread waits for.
        assert kernel.opcodes["LDGSTS"] > 0
    if unit.dtype in ("bf16", "fp16") and unit.chip == "sm_90":
        # Both operands come from shared memory, not through registers.
        assert "LDSM" not in kernel.loop


def test_products_are_rounded_with_what_they_are_added_to(compiled: dict[Unit, Outcome]) -> None:
    assert {kernel.name: kernel.fused for outcome in compiled.values() for kernel in outcome.kernels} == {
        "pointfuse_conv_bn_act": True,
        "pointfuse_finish_split": True,
    }


def test_the_other_kernels_of_training_are_compiled_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := compilation.backend.triton_problem():
        pytest.skip(reason)
    monkeypatch.setattr(training.backend, "unusable_reason", lambda: None)
    kernel = mock.MagicMock()
    training._launch(kernel, 3, torch.device("cpu"), "y", 5)
    kernel.__getitem__.assert_called_once_with((3, 1, 1))
    kernel.__getitem__.return_value.assert_called_once_with("y", 5, num_warps=4, enable_fp_fusion=True)


@pytest.mark.parametrize("unit", [u for u in SHIPPED if u.layout == "channels_last"], ids=str)
def test_channels_last_is_stored_16_bytes_at_a_time(unit: Unit, compiled: dict[Unit, Outcome]) -> None:
    kernel, *finish = compiled[unit].kernels
    assert set(kernel.stores) == {"128"}
    # There are fewer elements to a thread.
    assert all(set(k.stores) <= {"64", "128"} for k in finish)


def test_the_tables_cover_what_they_ought_to(compiled: dict[Unit, Outcome]) -> None:
    """Without these the tests above would hold for want of cases."""
    for chip in configs.FAMILIES:
        outcomes = {unit: outcome for unit, outcome in compiled.items() if unit.chip == chip}
        assert any(o.parts > 1 and len(o.kernels) == 2 for o in outcomes.values())
        for kernel in (1, 3):
            described = {tuple(o.described) for u, o in outcomes.items() if u.kernel == kernel and u in SHIPPED}
            assert described == ({()} if chip == "sm_80" else {(), ("weight",), ("x", "weight")})


@pytest.mark.parametrize("unit", EDGES, ids=str)
def test_what_is_refused_as_spilling_spills_and_no_more(unit: Unit, compiled: dict[Unit, Outcome]) -> None:
    refusal = unit.config.refusal(unit_shape(unit), CHIPS[unit.chip])
    assert refusal is None or "spill" in refusal
    assert (compiled[unit].kernels[0].local > 0) == (refusal is not None)


def test_edges_have_both_sides() -> None:
    refused = [unit.config.refusal(unit_shape(unit), CHIPS[unit.chip]) is not None for unit in EDGES]
    assert refused == [False, True] * (len(EDGES) // 2)


@pytest.fixture(scope="module")
def specialised(compiler: Any) -> list[dict[str, Any]]:
    """What kernels are compiled for, by ``compilation.py`` and by Triton's launcher."""
    return compiler("specialisations")


def test_kernels_are_specialised_as_tritons_launcher_does(specialised: list[dict[str, Any]]) -> None:
    for call in specialised:
        ours, launchers = call["described"]
        assert ours == launchers, call["call"]
    described = [call["described"][0] for call in specialised]
    # Of each kind there is one: a constant, a multiple of 16, neither, more than 32 bits, nothing, not aligned.
    assert described[0]["x_c"] == "constexpr = 1"
    assert described[0]["c_in"] == "i32 [['tt.divisibility', 16]]"
    assert described[0]["batch"] == "i32"
    assert described[1]["c_out"] == "i32"
    assert described[1]["gamma"] == "constexpr = None"
    assert described[1]["y"] == "*bf16"
    assert described[2]["var"] == "*fp16 [['tt.divisibility', 16]]"
    assert described[4]["x_n"] == "i64 [['tt.divisibility', 16]]"
    assert {call["call"].split(":")[0] for call in specialised} == {"conv_bn_act", "finish_split", "compiled"}


def test_a_launch_finds_what_was_compiled_before(specialised: list[dict[str, Any]]) -> None:
    if tuple(int(part) for part in metadata.version("triton").split(".")[:2]) < (3, 7):
        pytest.skip("Triton 3.6 notes attributes of constants too")
    for call in specialised:
        ours, launchers = call["hashes"]
        assert ours == launchers, call["call"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")
def test_the_interpreter_compiles_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: True)
    assert util.find_spec("triton") is None or compilation.refusal() is not None
    with pytest.raises(RuntimeError, match=re.escape("TRITON_INTERPRET=1") + "|Triton is not installed"):
        compilation.compile_plan(SHIPPED[0].plan(), torch.bfloat16, (8, 0))


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Triton is not installed: pip install 'triton>=3.6'"
    monkeypatch.setattr(compilation.backend, "triton_problem", lambda: reason)
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: True)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        compilation.launches(SHIPPED[0].plan(), torch.bfloat16)


def unit_shape(unit: Unit) -> configs.ShapeClass:
    """The class of a unit's call."""
    products = {"tf32": "tf32", "fp32": "fp32"}.get(unit.dtype, "half")
    pixels = unit.batch * (-(-unit.plane // unit.stride)) ** 2
    return configs.ShapeClass.of(f"{unit.kernel}x{unit.kernel}", unit.layout, products, pixels, unit.c_out, unit.c_in)
