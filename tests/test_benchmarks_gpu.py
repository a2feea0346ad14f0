"""The benchmark on a GPU, without one: graphs, cold and warm caches, the floor, the targets, cuDNN's graphs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fake_cuda import POOL, FakeCuda
from rich.console import Console
from torch import Tensor, nn

from benchmarks import cudnn_graph, peers, roofline, run, summary, timing
from benchmarks.cases import SUITES, PendingCase, Variant
from benchmarks.harness import Case, Contender, Limits, check_case, time_case
from benchmarks.models.yolov3 import HEADS, last_layer_stack, stack_input
from benchmarks.options import parse
from benchmarks.record import CaseResult, Quantiles, Result, read_cases, report, write_json
from benchmarks.roofline import H100_DATASHEET, Ceilings, Work, convolution_work, floor_seconds, measure_ceilings
from benchmarks.runner import Job, run_jobs
from benchmarks.tables import case_table, ceilings_line
from benchmarks.targets import Target, best_other, targets
from benchmarks.timing import ColdTimer, CudaStage, Flush, HostTimer, Method, Prepared, Timer, WarmTimer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("known_ceilings")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def small_case() -> Case:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    return Case("layers", "small 1x1 8->4", nn.Conv2d(8, 4, 1).eval(), x)


def gpu_method(cuda: FakeCuda, l2: Sequence[str] = ("cold", "warm"), graphs: bool = True) -> Method:
    """As `method_for` gives for a GPU, with a flush that is logged."""

    def flush() -> None:
        cuda.launch(90e-6, lambda: None, "flush")

    timers: dict[str, Timer] = {"cold": ColdTimer(flush), "warm": WarmTimer()}
    return Method(CudaStage(3 if "cold" in l2 else 1, "warm" in l2, graphs), tuple(timers[s] for s in l2), graphs)


def time_all(contenders: Sequence[Contender], method: Method, limits: Limits | None = None) -> list[CaseResult]:
    checked = check_case(small_case(), contenders, method)
    return [time_case(checked, [], limits or Limits(rounds=4), timer) for timer in method.timers]


def medians_us(case: CaseResult) -> list[float]:
    return [result.ms.p50 * 1e3 for result in case.results if result.ms is not None]


def test_each_contender_is_captured_after_a_warm_up_on_the_capturing_stream(cuda: FakeCuda) -> None:
    check_case(small_case(), [cuda.contender("a", 1e-5)], gpu_method(cuda, l2=("cold",)))
    once = ["side waits for main", *["a on side"] * 3, "capture on side", "main waits for side"]
    assert cuda.log == [*once * 3, "a on main"]
    assert cuda.stream == "main"


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_cold_and_warm_are_the_time_of_one_call(cuda: FakeCuda, graphs: bool) -> None:
    contenders = [cuda.contender("fast", 4e-6), cuda.contender("slow", 3e-3)]
    cold, warm = time_all(contenders, gpu_method(cuda, graphs=graphs))
    assert (cold.l2, warm.l2) == ("cold", "warm")
    assert cold.graphs is warm.graphs is graphs
    assert medians_us(cold) == pytest.approx([4, 3000])
    assert medians_us(warm) == pytest.approx([4, 3000])
    assert cold.title == f"layers: small 1x1 8->4, batch 2, fp32, cold L2, {'' if graphs else 'no '}CUDA graphs"


def test_a_warm_timing_is_of_as_many_calls_as_events_can_tell(cuda: FakeCuda) -> None:
    stage = CudaStage(inputs=1, warm=True, graphs=True)
    x = torch.randn(1, 8, 3, 3)
    calls = []
    for seconds in (4.1e-6, 45e-6, 1e-3, 0.0):
        prepared = cuda.contender("a", seconds).build(nn.Identity(), x)
        staged = stage(prepared)
        cuda.log.clear()
        staged.often()
        assert cuda.log == ["a on main"] * staged.calls
        calls.append(staged.calls)
    assert calls == [49, 5, 1, 100]


def test_cold_flushes_before_each_timing_and_rotates_the_inputs(cuda: FakeCuda) -> None:
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        cuda.launch(1e-6, lambda: seen.append(y.copy_(x).clone()), "kernel")
        return y

    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    method = gpu_method(cuda, l2=("cold",))
    staged = method.stage(Prepared(run, x))
    cuda.log.clear()
    seen.clear()
    for _ in range(4):
        method.timers[0].time(staged)
    assert cuda.log == ["flush on main", "kernel on main"] * 4
    rows = [tensor[0, 0, :, 0].tolist() for tensor in seen]
    assert rows == [[0, 3, 6], [6, 0, 3], [3, 6, 0], [0, 3, 6]]


def test_rotated_inputs_keep_their_layout_and_share_no_memory() -> None:
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    turns = timing._rotated(x, 3)
    assert turns[0] is x
    assert len({turn.data_ptr() for turn in turns}) == 3
    assert all(turn.stride() == x.stride() for turn in turns)


def test_a_contender_that_cannot_be_captured_says_why_and_harms_no_other(cuda: FakeCuda) -> None:
    def waits(model: nn.Module, x: Tensor) -> Prepared:
        def run(x: Tensor) -> Tensor:
            torch.cuda.synchronize()
            return model(x)

        return Prepared(run, x)

    contenders = [cuda.contender("before", 1e-5), Contender("waiting", waits), cuda.contender("after", 1e-5)]
    for result in time_all(contenders, gpu_method(cuda)):
        before, waiting, after = result.results
        assert (before.status, after.status) == ("ok", "ok")
        assert (waiting.status, waiting.ms) == ("failed", None)
        # What the contender did, not what ending its broken capture said.
        reason = "NotCapturable: RuntimeError: CUDA error: operation not permitted when stream is capturing"
        assert waiting.reason == reason
    assert cuda.stream == "main"
    assert cuda.ended == [(0, POOL)]


def test_an_error_before_the_capture_is_the_contenders_own(cuda: FakeCuda) -> None:
    def build(model: nn.Module, x: Tensor) -> Prepared:
        def run(x: Tensor) -> Tensor:
            raise ValueError("no kernel for this")

        return Prepared(run, x)

    (verdict,) = check_case(small_case(), [Contender("broken", build)], gpu_method(cuda)).verdicts
    assert verdict.reason == "ValueError: no kernel for this"
    assert cuda.stream == "main"


def test_a_graph_that_does_not_write_its_output_is_wrong(cuda: FakeCuda) -> None:
    def build(model: nn.Module, x: Tensor) -> Prepared:
        # The kernel goes past the capture, as on a stream of its own: the answer is there, but no replay gives it.
        return Prepared(lambda x: model(x), x)

    (verdict,) = check_case(small_case(), [Contender("elsewhere", build)], gpu_method(cuda)).verdicts
    assert (verdict.status, verdict.error is not None and math.isnan(verdict.error)) == ("wrong", True)


def test_a_replay_gives_all_outputs(cuda: FakeCuda) -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        ys = torch.empty_like(x), torch.empty_like(x)
        cuda.launch(1e-6, lambda: [y.copy_(x * k) for k, y in enumerate(ys, 1)])
        return ys

    x = torch.randn(1, 2, 3, 3)
    first, second = CudaStage(inputs=1, warm=False, graphs=True)(Prepared(run, x)).once()
    assert torch.equal(first, x)
    assert torch.equal(second, 2 * x)


def test_contenders_run_in_their_context_and_its_cost_is_not_timed(cuda: FakeCuda) -> None:
    inside = False

    @contextlib.contextmanager
    def context() -> Any:
        nonlocal inside
        inside = True
        cuda.seconds += 1
        yield
        inside = False

    contender = cuda.contender("strict", 1e-5, context=context)

    def build(model: nn.Module, x: Tensor) -> Prepared:
        prepared = contender.build(model, x)

        def run(x: Tensor) -> Any:
            assert inside
            return prepared.run(x)

        return replace(prepared, run=run)

    for graphs in (True, False):
        for case in time_all([replace(contender, build=build)], gpu_method(cuda, graphs=graphs)):
            assert medians_us(case) == pytest.approx([10])
    assert not inside


def test_the_flush_writes_twice_the_cache_and_long_enough(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    for least, expected in ((1 << 8, 2 << 10), (1 << 14, 1 << 14)):
        monkeypatch.setattr(timing, "MIN_FLUSH_BYTES", least)
        flush = Flush(CPU)
        flush()
        buffer = flush._buffer
        assert buffer is not None
        assert buffer.nbytes == expected
        buffer.fill_(1)
        flush()
        assert flush._buffer is buffer
        assert not buffer.any()


def test_the_methods_of_the_devices() -> None:
    cuda = torch.device("cuda")
    method = timing.method_for(cuda, ("warm", "cold"), graphs=False)
    assert ([timer.l2 for timer in method.timers], method.graphs) == (["warm", "cold"], False)
    assert isinstance(method.stage, CudaStage)
    assert method.stage == CudaStage(inputs=3, warm=True, graphs=False)
    assert timing.method_for(cuda, ("warm",)).stage == CudaStage(inputs=1, warm=True, graphs=True)
    assert [timer.l2 for timer in timing.method_for(CPU).timers] == [None]
    assert (timing.overhead_method(cuda).graphs, timing.overhead_method(CPU).graphs) == (False, None)


def test_the_hosts_time_is_a_median_of_calls_with_no_wait_between() -> None:
    now = 0.0
    log: list[str] = []
    durations = iter([5e-6, 7e-6, 100e-6, 6e-6, 8e-6])

    def once() -> Tensor:
        nonlocal now
        log.append("call")
        now += next(durations)
        return torch.empty(0)

    def synchronize() -> None:
        nonlocal now
        log.append("wait")
        now += 1

    timer = HostTimer(synchronize, calls=5, clock=lambda: now)
    assert timer.time(timing.Staged(once, once)) == pytest.approx(7e-6)
    assert log == ["wait", *["call"] * 5, "wait"]


@pytest.mark.parametrize(
    ("head", "gflop", "floors"),
    [(13, 5.40, (10.6, 44.6, 352)), (26, 5.58, (6.5, 49.8, 396)), (52, 5.76, (7.8, 61.9, 495))],
)
def test_floors_at_the_data_sheets_rates(head: int, gflop: float, floors: tuple[float, ...]) -> None:
    stack = last_layer_stack(head, num_classes=80).bfloat16()
    for batch, expected in zip((1, 8, 64), floors, strict=True):
        work = convolution_work(stack, stack_input(head).bfloat16().expand(batch, -1, -1, -1))
        assert len(work) == 7
        assert sum(layer.flops for layer in work) / batch == pytest.approx(gflop * 1e9, rel=1e-3)
        assert floor_seconds(work, H100_DATASHEET, "bf16") * 1e6 == pytest.approx(expected, rel=7e-3)


def test_the_work_of_one_layer() -> None:
    conv = nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2).half()
    x = torch.empty(2, 8, 7, 9).half()
    # Output 4x5; each of its values is a sum over 4 input channels and 9 taps.
    elements = 2 * 8 * 63 + 4 * 4 * 9 + 2 * 4 * 20
    assert convolution_work(conv, x) == (Work(flops=2 * (2 * 4 * 20) * 36, bytes=2 * elements),)
    assert convolution_work(nn.Sequential(conv, nn.Conv2d(4, 8, 1).half(), conv), x)[0::2] != ()
    assert not conv._forward_hooks


def test_a_layer_is_bound_by_what_takes_longer() -> None:
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second={"fp16": 100.0})
    work = [Work(flops=500, bytes=10), Work(flops=100, bytes=30)]
    assert floor_seconds(work, ceilings, "fp16") == pytest.approx(5 + 3)


def test_the_ceilings_are_measured_on_random_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(roofline, "MATRIX_SIDE", {"cpu": 32})
    matmul = torch.backends.cuda.matmul
    allowed: list[bool] = []
    # Ten copies, one of them disturbed. Of fp32 sides of 4, 8 and 16 are tried, and the next would take too long.
    trials = [0.001, 0.01, 0.3]
    seconds = iter([*[1e-6] * 9, 1.0, *[1e-3] * 3, *[2e-6] * 10, *trials, *[4e-6] * 10, *[1e-3] * 3, *[1e-6] * 10])

    def timed(call: Callable[[], Any]) -> float:
        call()
        return next(seconds)

    product = torch.matmul

    def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        assert a.unique().numel() > 12
        allowed.append(matmul.allow_tf32)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "matmul", multiply)
    ceilings = measure_ceilings(CPU, ("bf16", "fp32", "tf32"), timed)
    assert ceilings.bytes_per_second == pytest.approx(2 * 1024 / 1e-6)
    rates = {"bf16": 2 * 32**3 / 2e-6, "fp32": 2 * 16**3 / 4e-6, "tf32": 2 * 32**3 / 1e-6}
    assert ceilings.flops_per_second == pytest.approx(rates)
    warmup = roofline.WARMUP + roofline.REPEATS
    assert allowed == [False] * (2 * warmup + 6) + [True] * (warmup + 3)
    assert not matmul.allow_tf32
    line = "ceilings measured: copy 3.01 TB/s; matrix product bf16 798 TFLOP/s, fp32 400 TFLOP/s"
    assert ceilings_line(Ceilings(3.0149e12, {"bf16": 797.6e12, "fp32": 400e12})) == line


def gpu_jobs(cuda: FakeCuda) -> list[Job]:
    contenders = (cuda.contender("eager", 20e-6), cuda.contender(peers.CUDA_FROZEN, 10e-6))
    return [Job(PendingCase("small", small_case), contenders, gpu_method(cuda), Limits(rounds=2))]


def test_results_carry_floor_and_work_and_are_read_back(cuda: FakeCuda, tmp_path: Path) -> None:
    results: list[CaseResult] = []
    ceilings = Ceilings(bytes_per_second=1e9, flops_per_second={"fp32": 1e9})
    assert run_jobs(gpu_jobs(cuda), [], Console(quiet=True), results.append, ceilings=ceilings).complete
    flops, size = 2 * (2 * 4 * 9) * 8, 4 * (2 * 8 * 9 + 8 * 4 + 2 * 4 * 9)
    for result, l2 in zip(results, ("cold", "warm"), strict=True):
        assert (result.l2, result.graphs, result.flops, result.bytes) == (l2, True, flops, size)
        assert result.floor_us == pytest.approx(max(flops, size) / 1e3)
    write_json(tmp_path / "r.json", report(results, CPU, {}, complete=True, ceilings=ceilings))
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["ceilings"] == {"bytes_per_second": 1e9, "flops_per_second": {"fp32": 1e9}}
    assert read_cases(tmp_path / "r.json") == results


def test_without_ceilings_there_is_no_floor(cuda: FakeCuda) -> None:
    results: list[CaseResult] = []
    run_jobs(gpu_jobs(cuda), [], Console(quiet=True), results.append)
    assert [(result.floor_us, result.flops) for result in results] == [(None, None)] * 2


def rows(table: Any, width: int = 120) -> list[list[str]]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def made_case(
    us: dict[str, float], suite: str = "layers", name: str = "13x13 1x1 8->4", batch: int = 1, **changes: Any
) -> CaseResult:
    """A case with these medians in microseconds, bf16, cold, as graphs, and a floor of 2 us."""
    results = tuple(Result(c, "ok", None, (1e-3,), 1e-2, Quantiles(*[m / 1e3] * 3), 5) for c, m in us.items())
    case = CaseResult(suite, name, batch, "bf16", (batch, 8, 13, 13), results, complete=True, l2="cold", graphs=True)
    return replace(case, **{"floor_us": 2.0, **changes})


def test_a_table_of_short_times_is_in_microseconds_and_over_the_floor() -> None:
    lines = rows(case_table(made_case({"eager channels_last": 12.5, peers.CUDA_FROZEN: 3.0}), ["eager channels_last"]))
    assert lines[0] == ["layers:", "13x13", "1x1", "8->4,", "batch", "1,", "bf16,", "cold", "L2,", "CUDA", "graphs"]
    assert [cell for line in lines[1:4] for cell in line if cell == "us"] == ["us", "us", "us"]
    assert ["pointfuse", "cuda", "3.00", "3.00", "3.00", "1.50", "-", "1.0e-03"] in lines
    assert ["floor:", "2.0", "us", "at", "the", "ceilings", "measured", "in", "this", "run"] in lines
    lines = rows(case_table(made_case({"eager channels_last": 1500.0}, floor_us=None), []))
    assert ["eager", "channels_last", "1.50", "1.50", "1.50", "1.0e-03"] in lines


OURS = peers.CUDA_FROZEN
KERNELS = [peers.CUDA_LIVE, peers.CUDA_FROZEN, peers.TRITON_LIVE, peers.TRITON_FROZEN]


def targets_of(*cases: CaseResult) -> dict[str, Target]:
    return {target.what: target for target in targets(cases)}


def test_without_results_every_target_is_open() -> None:
    assert {(target.measured, target.met) for target in targets([])} == {(None, None)}
    limits = [target.limit for target in targets([])]
    assert limits == [
        *("at most 1.5", "at most 4 us", "at least 1.0", "at least 1.3", "at least 0.98"),
        *("at most 45 us", "at most 90 us", "at most 600 us", "at most 10 us"),
        *("at most 1.8", "at least 1.0"),
    ]


def test_targets_take_the_worst_case() -> None:
    found = targets_of(
        made_case({"eager": 6.0, OURS: 2.9}, batch=64),
        made_case({"eager": 6.0, OURS: 3.1}, name="26x26 1x1 8->4", batch=64),
        # Neither a 3x3 nor a warm cache counts there.
        made_case({"eager": 60.0, OURS: 50.0}, name="26x26 3x3 8->4", batch=64),
        made_case({"eager": 60.0, OURS: 50.0}, batch=64, l2="warm"),
    )
    target = found["1x1 layers, batch 64, cold: time over floor"]
    assert (target.measured, target.met) == ("1.55 (26x26 1x1 8->4, batch 64, the worst of 2)", False)


def test_targets_of_layers_compare_with_the_best_other() -> None:
    found = targets_of(
        made_case({"eager": 9.0, "cuDNN graph": 4.0, "pointfuse frozen": 1.0, OURS: 2.0}),
        made_case({"eager": 1.0, OURS: 1.0}, batch=8),
    )
    worst = found["layers, cold: best contender's time over ours"]
    assert (worst.measured, worst.met) == ("1.00 (13x13 1x1 8->4, batch 8, the worst of 2)", True)
    mean = found["the same, geometric mean"]
    assert (mean.measured, mean.met) == ("1.41 (of 2)", True)


def test_a_layer_that_ours_did_not_run_misses_the_target() -> None:
    ok = made_case({"eager": 9.0, OURS: 2.0})
    failed = made_case({"eager": 9.0}, name="13x13 3x3 8->4")
    failed = replace(failed, results=(*failed.results, Result(OURS, "failed", "no kernel")))
    found = targets_of(ok, failed)
    for what in ("layers, cold: best contender's time over ours", "the same, geometric mean"):
        assert (found[what].measured, found[what].met) == ("none for 13x13 3x3 8->4, batch 1", False)


def test_targets_of_the_stack_and_of_a_call() -> None:
    found = targets_of(
        made_case({OURS: 44.0}, suite="stack", name="13x13"),
        made_case({OURS: 91.0}, suite="stack", name="13x13", batch=8),
        made_case({OURS: 1.0}, suite="stack", name="26x26", batch=64),
        made_case({OURS: 500.0}, suite="stack", name="13x13", batch=64, complete=False),
        made_case({OURS: 500.0}, suite="stack", name="13x13", batch=64, graphs=False),
        made_case({OURS: 500.0}, suite="stack", name="13x13", batch=64, dtype="fp16"),
        made_case({OURS: 9.5}, suite="overhead", l2=None, graphs=False, floor_us=None),
        made_case({OURS: 3.5}, l2="warm"),
    )
    measured = {what: (target.measured, target.met) for what, target in found.items() if target.measured}
    assert measured == {
        "1x1 layers, batch 1, warm: time": ("3.50 us", True),
        "13x13 stack, batch 1, cold: time": ("44.00 us", True),
        "13x13 stack, batch 8, cold: time": ("91.00 us", False),
        "a call, until it has launched": ("9.50 us", True),
    }


def test_targets_of_triton_compare_stacks_with_the_autotuned() -> None:
    triton, autotuned = peers.TRITON_FROZEN, peers.COMPILED_AUTOTUNED
    found = targets_of(
        made_case({triton: 3.8, OURS: 1.0}, batch=64),
        made_case({triton: 10.0, autotuned: 12.0, "eager": 8.0}, suite="stack", name="13x13", batch=64),
        made_case({triton: 10.0, autotuned: 9.0}, suite="stack", name="26x26", batch=64),
        made_case({triton: 10.0, autotuned: 1.0}, suite="stack", name="26x26", batch=8),
    )
    floor = found["Triton, 1x1 layers, batch 64, cold: time over floor"]
    assert (floor.measured, floor.met) == ("1.90", False)
    stacks = found["Triton, stacks, batch 64, cold: max-autotune's time over ours"]
    assert (stacks.measured, stacks.met) == ("0.90 (26x26, batch 64, the worst of 2)", False)


def test_of_a_case_measured_twice_the_last_counts() -> None:
    found = targets_of(
        made_case({OURS: 44.0}, suite="stack", name="13x13"), made_case({OURS: 46.0}, suite="stack", name="13x13")
    )
    assert found["13x13 stack, batch 1, cold: time"].measured == "46.00 us"


def test_the_best_other_is_none_of_ours() -> None:
    best = best_other(made_case({"eager": 9.0, "pointfuse converted": 1.0, "cuDNN graph": 4.0}))
    assert best is not None
    assert best.contender == "cuDNN graph"
    assert best_other(made_case({OURS: 1.0})) is None


def test_the_summary_reads_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        made_case({"eager": 9.0, OURS: 2.0}),
        made_case({OURS: 44.0}, suite="stack", name="13x13"),
        made_case({"eager": 9.0}, suite="overhead", l2=None, graphs=False, floor_us=None),
    ]
    for index, case in enumerate(cases):
        write_json(tmp_path / f"{index}.json", report([case], CPU, {}, complete=True))
    assert summary.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "layers 13x13 1x1 8->4, 1, bf16, cold 2.00 2.00 1.00 4.50 eager" in lines
    assert "stack 13x13, 1, bf16, cold 2.00 44.00 22.00 - -" in lines
    assert "overhead 13x13 1x1 8->4, 1, bf16 - - - - eager" in lines
    assert any("13x13 stack, batch 1, cold: time" in line and line.endswith("44.00 us yes") for line in lines)


@pytest.mark.parametrize("content", ["text", "[]", '{"cases": [{}]}', '{"cases": 1}'])
def test_the_summary_refuses_what_is_no_result(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"^summary: .*x\.json is not a file of results"):
        summary.main([str(path)])


def test_published_results_are_readable() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        assert all(case.results for case in read_cases(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--l2", "cold"], "--l2: a CPU's caches are not controlled; leave it out, or run on a CUDA device"),
        (["--l2", "hot"], "--l2: 'hot' is not among the accepted: cold, warm"),
        (["--graphs", "on"], "--graphs: CUDA graphs need a CUDA device; accepted here: off"),
        (["--graphs", "yes"], "--graphs: invalid choice: 'yes'"),
        (["--contenders", "cuDNN,pointfuse cuda"], "--contenders: none of them runs on cpu"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", *argv])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_cpu_lists_no_contender_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = {peers.COMPILED_AUTOTUNED, peers.CUDNN_GRAPH, *KERNELS}
    assert {name for name, contender in peers.PEERS.items() if contender.devices == ("cuda",)} == on_gpu
    options = parse(["--device", "cpu"])
    assert {contender.name for contender in options.contenders} == set(peers.PEERS) - on_gpu
    assert (options.graphs, options.l2) == (None, None)
    of_a_cpu = {method.timers for method in (timing.method_for(CPU), timing.overhead_method(CPU))}
    assert {job.method.timers for job in run._jobs(options)} == of_a_cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = parse(["--suite", "layers,overhead", "--head", "52", "--batch", "1,8"])
    on_cpu = {name for name, contender in peers.PEERS.items() if contender.devices == ("cpu",)}
    assert {contender.name for contender in options.contenders} == set(peers.PEERS) - on_cpu
    assert (options.device.type, options.graphs, options.l2) == ("cuda", True, ("cold", "warm"))
    jobs = run._jobs(options)
    # The overhead once: it has no batch.
    assert [len(job.method.timers) for job in jobs] == [2] * 8 + [1]
    assert [job.method.graphs for job in jobs] == [True] * 8 + [False]
    options = parse(["--graphs", "off", "--l2", "warm"])
    assert (options.graphs, options.l2) == (False, ("warm",))


def test_the_overhead_of_a_call_is_measured_on_a_cpu_too(tmp_path: Path) -> None:
    argv = [
        "--suite",
        "overhead",
        "--quick",
        "--no-report",
        "--contenders",
        "eager channels_last,pointfuse",
        "--device",
        "cpu",
    ]
    assert run.main([*argv, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    (case,) = read_cases(path)
    assert (case.name, case.l2, case.graphs, case.floor_us) == ("4x4 1x1 64->64", None, None, None)
    assert [result.contender for result in case.results] == ["eager channels_last", peers.CONVERTED, peers.FROZEN]
    assert all(result.ms is not None and 0 < result.ms.p50 < 100 for result in case.results)


@torch.no_grad()
def test_a_contender_of_our_kernels_runs_no_convolution_of_pytorchs() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), torch.randn(1, 8, 4, 4)
    peers.refuse_convolutions(model, x, allowed=2)
    with pytest.raises(RuntimeError, match="2 convolutions ran as aten::convolution, 1 may"):
        peers.refuse_convolutions(model, x, allowed=1)


@pytest.mark.parametrize("name", KERNELS)
def test_a_backend_that_cannot_run_is_a_reason(name: str) -> None:
    contender = replace(peers.PEERS[name], devices=("cpu",))
    (verdict,) = check_case(small_case(), [contender], timing.method_for(CPU)).verdicts
    assert verdict.status == "failed"
    assert verdict.reason is not None
    assert f"{name.split()[1]} backend cannot run here" in verdict.reason


class FakeCudnn(ModuleType):
    """What is used of nvidia-cudnn-frontend: builds graphs, and computes them with PyTorch."""

    def __init__(self) -> None:
        super().__init__("cudnn")
        self.data_type = SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32")
        self.heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")
        self.graphs: list[FakeCudnnGraph] = []

    def create_handle(self) -> str:
        return "handle"

    def set_stream(self, handle: str, stream: int) -> None:
        assert (handle, stream) == ("handle", 5)

    def pygraph(self, **kwargs: Any) -> FakeCudnnGraph:
        assert kwargs["compute_data_type"] == kwargs["intermediate_data_type"] == "fp32"
        self.graphs.append(FakeCudnnGraph())
        return self.graphs[-1]


class FakeCudnnGraph:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.tensors: list[SimpleNamespace] = []
        self.compute: Callable[[dict[int, Tensor]], Tensor] | None = None

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Any:
        assert stride == [dim[1] * dim[2] * dim[3], 1, dim[1] * dim[3], dim[1]]
        self.tensors.append(SimpleNamespace(name=name, dim=dim, of=lambda values: values[name].float()))
        return _hashable(self.tensors[-1])

    def conv_fprop(self, image: Any, weight: Any, **geometry: Any) -> Any:
        return SimpleNamespace(of=lambda values: F.conv2d(image.of(values), weight.of(values), **geometry))

    def bias(self, input: Any, bias: Any) -> Any:
        return SimpleNamespace(of=lambda values: input.of(values) + bias.of(values))

    def leaky_relu(self, input: Any, negative_slope: float) -> Any:
        def of(values: dict[str, Tensor]) -> Tensor:
            return F.leaky_relu(input.of(values), negative_slope)

        y = _hashable(SimpleNamespace(name="y", of=of))
        for setter in ("set_output", "set_dim", "set_stride", "set_data_type"):
            setattr(y, setter, partial(setattr, y, setter.removeprefix("set_")))
        return y

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.steps.append(name)

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, values: dict[Any, Tensor], workspace: Tensor, handle: str) -> None:
        assert handle == "handle"
        assert workspace.dtype == torch.uint8
        by_name = {tensor.name: value for tensor, value in values.items()}
        (y,) = [tensor for tensor in values if tensor.name == "y"]
        assert y.output is True
        assert tuple(y.dim) == tuple(by_name["y"].shape)
        assert by_name["y"].is_contiguous(memory_format=torch.channels_last)
        by_name["y"].copy_(y.of(by_name))


class _Named(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def _hashable(tensor: SimpleNamespace) -> _Named:
    return _Named(**vars(tensor))


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    fake = FakeCudnn()
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    return fake


def build_sequence() -> list[str]:
    return ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]


def test_units_run_as_cudnn_graphs_with_the_right_answer(cudnn: FakeCudnn) -> None:
    (pending,) = SUITES["stack"]((52,), Variant(1, "bf16", CPU))
    contender = replace(peers.PEERS[peers.CUDNN_GRAPH], devices=("cpu",))
    (verdict,) = check_case(pending.build(), [contender], timing.method_for(CPU)).verdicts
    assert (verdict.status, verdict.reason) == ("ok", None)
    assert [graph.steps for graph in cudnn.graphs] == [build_sequence()] * 6


@torch.no_grad()
def test_a_cudnn_graph_is_built_once_for_a_shape(cudnn: FakeCudnn) -> None:
    conv, bn = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
    model = nn.Sequential(conv, bn, nn.LeakyReLU(0.3)).eval().half()
    nn.init.uniform_(bn.running_var, 0.5, 2)
    expected = model.float()
    sizes = [(1, 8, 7, 9), (1, 8, 7, 9), (2, 8, 5, 5)]
    inputs = [torch.randn(size).half() for size in sizes]
    answers = [expected(x.float()) for x in inputs]
    cudnn_graph.fuse_units(model.half())
    for x, answer in zip(inputs, answers, strict=True):
        assert (model(x).float() - answer).abs().max() < 1e-2
    assert len(cudnn.graphs) == 2


def test_units_that_cudnn_cannot_take_stay_as_they_are(cudnn: FakeCudnn) -> None:
    def unit(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.BatchNorm2d(c_out), nn.LeakyReLU())

    model = nn.Sequential(unit(3, 8), unit(8, 12), unit(8, 16), nn.Conv2d(8, 8, 1)).eval().bfloat16()
    cudnn_graph.fuse_units(model)
    assert [type(child[0]).__name__ for child in list(model)[:3]] == ["Conv2d", "Conv2d", "CudnnUnit"]
    with pytest.raises(ValueError, match="no convolution with a batch norm and a LeakyReLU behind it"):
        cudnn_graph.fuse_units(nn.Sequential(nn.Conv2d(8, 8, 1)).half())
    with pytest.raises(ValueError, match=r"written for bf16 and fp16, not torch\.float32"):
        cudnn_graph.fuse_units(unit(8, 8))


def test_without_cudnn_frontend_the_contender_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(ImportError, match="cudnn"):
        cudnn_graph.fuse_units(nn.Sequential(nn.Conv2d(8, 8, 1)).half())


def test_the_autotuned_contender_brings_no_graphs_of_its_own() -> None:
    options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert options["max_autotune"]
    assert not options.get("triton.cudagraphs", False)
    assert set(options) | {"freezing"} <= set(torch._inductor.list_options())


def cells(name: str, of_batches: Sequence[Sequence[Work]]) -> tuple[str, ...]:
    """A row of the notes' table: FLOPs an image, then bytes and floor at batch 1, 8 and 64."""
    gflop = sum(one.flops for one in of_batches[0]) / 1e9
    sizes = " / ".join(f"{sum(one.bytes for one in work) / 1e6:.1f}" for work in of_batches)
    floors = " / ".join(f"{floor_seconds(work, H100_DATASHEET, 'bf16') * 1e6:.1f}" for work in of_batches)
    return name, f"{gflop:.3f}", sizes, floors


def test_the_floors_in_the_notes_are_those_of_the_code() -> None:
    notes = (ROOT / "benchmarks" / "TUNING.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+x\d+ .+?) \| ([\d.]+) \| (.+?) \| (.+?) \|$", notes, re.MULTILINE)
    layers, stacks = {}, []
    for head in HEADS:
        stack = last_layer_stack(head).bfloat16()
        x = stack_input(head).bfloat16()
        work = [convolution_work(stack, x.expand(batch, -1, -1, -1)) for batch in (1, 8, 64)]
        convs = [module for module in stack.modules() if isinstance(module, nn.Conv2d)]
        for conv, *of_batches in zip(convs, *work, strict=True):
            size = "x".join(map(str, conv.kernel_size))
            name = f"{head}x{head} {size} {conv.in_channels}->{conv.out_channels}"
            layers[name] = cells(name, [(one,) for one in of_batches])
        stacks.append(cells(f"{head}x{head} stack", work))
    expected = [*layers.values(), *stacks]
    assert found == expected


def test_the_notes_have_a_row_for_each_target() -> None:
    notes = (ROOT / "benchmarks" / "TUNING.md").read_text(encoding="utf-8")
    section = notes.partition("## Targets")[2].partition("## Versions")[0]
    rows = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    numbers = [re.search(r"[\d.]+", row) for row in rows]
    limits = [re.search(r"[\d.]+", target.limit) for target in targets([])]
    assert [n and n[0] for n in numbers] == [n and n[0] for n in limits]
