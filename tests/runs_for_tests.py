"""A run with everything in it, as a GPU's would be, with figures made up for the tests of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import SCHEMA, CaseResult, Conditions, Quantiles, Result, Run, Skipped, write_json
from benchmarks.roofline import Ceilings

EAGER, COMPILED, FREEZING = "eager channels_last", "torch.compile", "torch.compile freezing"
CONVERTED, RECOMPUTE, FROZEN = "pointfuse converted", "pointfuse recompute", "pointfuse frozen"
CUDA, TRITON = "pointfuse cuda", "pointfuse triton"
EVIL = "<script>alert('x')</script> & \"quotes\""
CEILINGS = Ceilings(bytes_per_second=3e12, flops_per_second={"bf16": 7e14})


def timed(contender: str, ms: float, spread: float = 0.04, error: float = 1e-3, **more: object) -> Result:
    quantiles = Quantiles(ms * (1 - spread / 2), ms, ms * (1 + spread / 2))
    return Result(contender, "ok", errors=(error,), tolerance=1e-2, ms=quantiles, rounds=50, **more)  # type: ignore[arg-type]


def case(
    suite: str, name: str, results: Sequence[Result], batch: int = 1, dtype: str = "bf16", **more: object
) -> CaseResult:
    """A case in which every contender's speedup is over eager in channels_last."""
    base = next((r.ms.p50 for r in results if r.contender == EAGER and r.ms), None)
    over = [
        Result(**{**vars(r), "speedup": {EAGER: base / r.ms.p50} if r.ms and base else {}}) for r in results
    ]  # fmt: skip
    return CaseResult(suite, name, batch, dtype, (batch, 64, 13, 13), tuple(over), **{"complete": True, **more})  # type: ignore[arg-type]


def gpu_run(complete: bool = False) -> Run:
    skipped = (Skipped("network: YOLOv3", EVIL),)
    return Run(
        commit="0123456789abcdef", dirty=True, date="2026-11-22T09:00:00+00:00",
        machine={"cpu": "a CPU", "cores": 16, "threads": 16, "system": "Linux"}, device="NVIDIA H100 80GB HBM3",
        versions={"python": "3.11.7", "torch": "2.13.0+cu130", "pointfuse": "0.1.0", "cuda": "13.0", "triton": None},
        settings={
            "argv": ["--suite", "layers,scaling,training", "--dtype", "bf16"], "graphs": True, "graphs_of_steps": False,
            "l2": ["cold", "warm"],
        },
        ceilings=CEILINGS, complete=complete, cases=tuple(_cases()),
        ceilings_after=Ceilings(2.7e12, {"bf16": 6.9e14}), skipped=skipped, left=0 if complete else 7,
    )  # fmt: skip


def cpu_run(*cases: CaseResult, threads: int = 2, date: str = "2026-11-21T09:00:00+00:00") -> Run:
    return Run(
        commit="fedcba9876543210", dirty=False, date=date, device="a CPU",
        machine={"cpu": "a CPU", "cores": 4, "threads": threads, "system": "Linux"},
        versions={"torch": "2.13.0", "onednn": "3.12.0"}, settings={"argv": ["--suite", "stack"]},
        ceilings=None, complete=True, cases=cases,
    )  # fmt: skip


def write(run: Run, path: Path) -> Path:
    write_json(path, {"schema": SCHEMA, **asdict(run)})
    return path


def _cases() -> Iterator[CaseResult]:
    state = dict(before=Conditions(1755, 41, 120.5), after=Conditions(1980, 55, 340.0), graphs=True)
    for l2, slow in (("cold", 1.0), ("warm", 0.8)):
        for index, channels in enumerate((128, 256, 512)):
            ours = (
                Result(CUDA, "wrong", EVIL, (0.5,), 0.01) if (index, l2) == (2, "warm") else timed(CUDA, 0.012 * slow)
            )
            results = [
                timed(EAGER, 0.036 * slow * (index + 1)), timed(FREEZING, 0.011 * slow * (index + 1)), ours,
                Result(TRITON, "failed", EVIL) if index == 0 else timed(TRITON, 0.014 * slow, error=2.5e-4),
            ]  # fmt: skip
            yield case(
                "layers", f"13x13 1x1 {2 * channels}->{channels}", results, 8, l2=l2, flops=10**9 * (index + 1) ** 2,
                bytes=10**7 * (index + 1), floor_us=6.0 * slow, drift=1.01 + 0.1 * index, disturbance=0.0, **state,
            )  # fmt: skip
    yield from _curves(state)
    for name, size in (("13x13 1x1 1024->512", 10**7), ("13x13 stack", 8 * 10**7)):
        kept = dict(zip((EAGER, COMPILED, CONVERTED, RECOMPUTE), (1.0, 0.9, 0.6, 0.3), strict=True))
        results = [
            timed(contender, 1 + share, saved_bytes=int(size * share), peak_bytes=int(size * (share + 0.2)))
            for contender, share in kept.items()
        ]
        yield case("training", name, results, 8, l2="cold", graphs=False, autocast=True, inplace=False)
    cut = [timed(EAGER, 0.02), Result(CUDA, "interrupted")]
    yield case("overhead", "4x4 1x1 64->64", cut, complete=False, disturbance=0.31)


def _curves(state: dict[str, object]) -> Iterator[CaseResult]:
    for axis, sizes in (("batch", (1, 4, 16, 64)), ("plane", (13, 26, 52)), ("channels", (64, 256, 1024))):
        for at in sizes:
            plane, channels = at if axis == "plane" else 26, at if axis == "channels" else 256
            cost = at / sizes[0]
            results = [timed(EAGER, 0.03 * cost), timed(FREEZING, 0.02 * cost), timed(CUDA, 0.008 + 0.01 * cost)]
            yield case(
                "scaling", f"{plane}x{plane} 1x1 {channels}->{channels}", results, at if axis == "batch" else 8,
                axis=axis, at=at, l2="cold", flops=int(1e9 * cost), bytes=int(1e7 * cost), floor_us=9 * cost, **state,
            )  # fmt: skip
