"""The training suite of the benchmark: right gradients before times, the memory that a step takes, the targets."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pointfuse.backends import BACKENDS, calls
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers, run, training
from benchmarks.cases import SUITES, TRAINING, Variant
from benchmarks.harness import Case, Contender, check_case
from benchmarks.models.yolov3 import HEADS, SLOPE, Head
from benchmarks.options import parse
from benchmarks.record import CaseResult, Quantiles, Result, read_cases
from benchmarks.targets import Target, training_targets
from benchmarks.timing import DTYPES, Prepared, method_for
from benchmarks.training import MAX_SHIFT, NEAR_ZERO, Step, peak_bytes, saved_bytes, training_step

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("known_ceilings")
METHOD = method_for(CPU)
TRAINERS = [name for name, contender in peers.PEERS.items() if contender.trains]
OF_A_CPU = [peers.EAGER_NCHW, peers.EAGER_CHANNELS_LAST, peers.CONVERTED, peers.RECOMPUTING]


@pytest.fixture
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 52x52 head with few channels on a small plane."""
    monkeypatch.setitem(HEADS, 52, Head(plane=6, c_in=24, f0=8, f1=16))


def unit(c_in: int = 8, c_out: int = 4, kernel_size: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(SLOPE))


def small_case(dtype: str = "fp32", **sizes: int) -> Case:
    model = unit(**sizes)
    x = torch.randn(2, model[0].in_channels, 5, 6)
    return Case(TRAINING, "small", training_step(model, x, DTYPES[dtype], seed=1), x.to(DTYPES[dtype]))


def step_of(case: Case) -> Step:
    assert case.step is not None
    return case.step


@pytest.mark.usefixtures("small_head")
def test_the_suite_has_the_units_of_the_layers_and_then_each_stack() -> None:
    variant = Variant(2, "fp32", CPU)
    names = [pending.build().name for pending in SUITES[TRAINING]((52,), variant)]
    layers = [pending.build().name for pending in SUITES["layers"]((52,), variant)]
    assert names == [*layers[:-1], "52x52 stack"]
    assert names[:3] == ["52x52 1x1 24->8", "52x52 3x3 8->16", "52x52 1x1 16->8"]
    heads_first = [pending.title for pending in SUITES[TRAINING]((13, 26), variant)]
    ends = ["training: 13x13 stack, batch 2, fp32", "training: 26x26 stack, batch 2, fp32"]
    assert heads_first[-2:] == ends


@pytest.mark.usefixtures("small_head")
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_trains_under_autocast_with_parameters_in_fp32(dtype: str) -> None:
    for pending in SUITES[TRAINING]((52,), Variant(2, dtype, CPU)):
        case = pending.build()
        step = step_of(case)
        assert all(module.training for module in step.model.modules())
        assert step.autocast == (None if DTYPES[dtype] == torch.float32 else DTYPES[dtype])
        assert not step.inplace
        assert {parameter.dtype for parameter in step.parameters()} == {torch.float32}
        y, d_x, *d_parameters = step(case.x)
        assert y.dtype == d_x.dtype == case.x.dtype == DTYPES[dtype]
        assert {gradient.dtype for gradient in d_parameters} == {torch.float32}
        for conv in step.model.modules():
            if isinstance(conv, nn.Conv2d):
                assert torch.equal(conv.weight, conv.weight.to(DTYPES[dtype]).float())


def test_activations_in_place_are_told() -> None:
    model = unit()
    model[2].inplace = True
    assert Step(model, torch.zeros(1), None).inplace


def test_a_step_gives_output_and_gradients_and_each_call_begins_anew() -> None:
    case = small_case()
    step = step_of(case)
    x = case.x.clone().requires_grad_()
    y = copy.deepcopy(step.model)(x)
    expected = [y, *torch.autograd.grad(y, [x], step.upstream)]
    with torch.no_grad():
        first, second = step(case.x), step(case.x)
    assert len(first) == 2 + len(list(step.parameters()))
    for tensors in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(tensors[:2], expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(tensor.requires_grad for tensor in first)
    assert all(parameter.grad is None for parameter in step.parameters())
    assert case.x.grad is None
    assert not case.x.requires_grad


def test_the_float64_run_stays_float64_under_autocast() -> None:
    case = small_case("bf16")
    for tensor in copy.deepcopy(case.model).double()(case.x.double()):
        assert tensor.dtype == torch.float64
        assert not torch.equal(tensor, tensor.bfloat16().double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_contenders_of_a_cpu_are_right(dtype: str, kernel_size: int) -> None:
    case = small_case(dtype, kernel_size=kernel_size)
    for verdict in check_case(case, [peers.PEERS[name] for name in OF_A_CPU], METHOD).verdicts:
        assert (verdict.status, verdict.reason) == ("ok", None)
        assert len(verdict.errors) == 5


class FakeInPlaceABN(nn.BatchNorm2d):
    """What is used of inplace_abn: its arguments, and what it computes, by PyTorch's operators."""

    def __init__(self, num_features: int, eps: float, momentum: float, activation_param: float) -> None:
        super().__init__(num_features, eps, momentum)
        self.activation, self.activation_param = "leaky_relu", activation_param

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.abs() + self.eps
        z = F.batch_norm(
            x, self.running_mean, self.running_var, weight, self.bias, self.training, self.momentum, self.eps
        )
        return F.leaky_relu(z, self.activation_param)


def test_inplace_abn_computes_the_same_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = peers.PEERS[peers.INPLACE_ABN]
    monkeypatch.setitem(sys.modules, "inplace_abn", None)
    case = small_case()
    (verdict,) = check_case(case, [contender], METHOD).verdicts
    assert verdict.status == "failed"
    assert "inplace_abn" in str(verdict.reason)

    monkeypatch.setitem(sys.modules, "inplace_abn", SimpleNamespace(InPlaceABN=FakeInPlaceABN))
    (verdict,) = check_case(case, [contender], METHOD).verdicts
    assert (verdict.status, verdict.reason) == ("ok", None)
    with torch.no_grad():
        made = contender.build(case.model, case.x).run
    assert isinstance(made, Step)
    assert [type(module) for module in made.model] == [nn.Conv2d, FakeInPlaceABN, nn.Identity]
    assert made.model[1].training
    assert made.model[1].activation_param == SLOPE
    without = Step(nn.Sequential(nn.Conv2d(8, 4, 1)), torch.zeros(1), None)
    with pytest.raises(ValueError, match="no batch norm with a LeakyReLU"):
        contender.build(without, case.x)


@pytest.mark.parametrize("name", [peers.COMPILED, peers.COMPILED_CONVERTED])
def test_torch_compile_trains_a_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The same path without a compiler, which takes its time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = peers.PEERS[name]
    case = small_case()
    checked = check_case(case, [compiled], METHOD)
    assert [verdict.status for verdict in checked.verdicts] == ["ok"]
    with torch.no_grad():
        step = compiled.build(case.model, case.x).run
    assert isinstance(step, Step)
    assert isinstance(step.model, torch._dynamo.eval_frame.OptimizedModule)
    assert not isinstance(step_of(case).model, torch._dynamo.eval_frame.OptimizedModule)


def test_in_channels_last_all_of_a_step_is_so() -> None:
    case = small_case(kernel_size=3)
    with torch.no_grad():
        prepared = peers.PEERS[peers.EAGER_CHANNELS_LAST].build(case.model, case.x)
    step = prepared.run
    assert isinstance(step, Step)
    tensors = (prepared.x, step.get_buffer("upstream"), step.get_parameter("model.0.weight"), *step(prepared.x)[:3])
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
    assert not any(tensor.is_contiguous() for tensor in tensors)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is too large by a hundredth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


class Unfaithful(nn.Module):
    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


def unfaithful(change: Callable[[Tensor], Tensor]) -> Contender:
    def build(model: nn.Module, x: Tensor) -> Prepared:
        step = copy.deepcopy(model)
        assert isinstance(step, Step)
        step.model = Unfaithful(step.model, change)
        return Prepared(step, x)

    return Contender("unfaithful", build, trains=True)


def test_wrong_gradients_of_a_right_output_are_caught() -> None:
    (verdict,) = check_case(small_case(), [unfaithful(Scaled.apply)], METHOD).verdicts
    assert verdict.status == "wrong"
    assert verdict.tolerance is not None
    assert verdict.errors[0] < verdict.tolerance
    assert verdict.errors[1:] == pytest.approx([0.01] * 4, rel=0.01)
    assert verdict.saved_bytes is None


def test_a_single_wrong_gradient_is_caught() -> None:
    class Scaling(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            assert self.weight is not None
            return F.batch_norm(x, None, None, Scaled.apply(self.weight), self.bias, True, 0.1, self.eps)

    def build(model: nn.Module, x: Tensor) -> Prepared:
        step = copy.deepcopy(model)
        step.get_submodule("model.1").__class__ = Scaling
        return Prepared(step, x)

    (verdict,) = check_case(small_case(), [Contender("scaling", build)], METHOD).verdicts
    assert verdict.status == "wrong"
    assert verdict.tolerance is not None
    assert [error > verdict.tolerance for error in verdict.errors] == [False, False, False, True, False]


def test_a_gradient_that_is_not_computed_is_a_reason() -> None:
    (verdict,) = check_case(small_case(), [unfaithful(lambda y: y.detach().requires_grad_())], METHOD).verdicts
    assert (verdict.status, verdict.reason) == ("failed", "RuntimeError: 4 of 4 gradients were not computed")


def test_a_fused_contender_may_convolve_gradients_with_pytorch() -> None:
    case = small_case()
    step = step_of(case)
    with pytest.raises(RuntimeError, match="1 convolutions ran as aten::convolution, 0 may"):
        peers.refuse_convolutions(step, case.x, allowed=0)
    peers.refuse_convolutions(step, case.x, allowed=1)


@pytest.mark.skipif(bool(BACKENDS["triton"].triton_problem()), reason=str(BACKENDS["triton"].triton_problem()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_triton_kernels_train_alone(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
        monkeypatch.setattr(BACKENDS["triton"], "unusable_reason", lambda: None)
    case = small_case(dtype, c_in=16, c_out=16)
    case = replace(case, model=case.model.to(device), x=case.x.to(device))
    contender = replace(peers.PEERS[peers.TRITON_LIVE], devices=(device,))
    (verdict,) = check_case(case, [contender], METHOD).verdicts
    assert (verdict.status, verdict.reason) == ("ok", None)


# Memory


@pytest.mark.parametrize(("c_in", "c_out"), [(8, 4), (4, 4), (4, 8)])
def test_the_bytes_that_a_unit_saves_are_exact(c_in: int, c_out: int) -> None:
    case = small_case(c_in=c_in, c_out=c_out)
    given, made, statistics = 4 * 2 * c_in * 30, 4 * 2 * c_out * 30, 2 * 4 * c_out
    found = {}
    for name in OF_A_CPU:
        (verdict,) = check_case(case, [peers.PEERS[name]], METHOD).verdicts
        found[name] = verdict.saved_bytes
        assert verdict.peak_bytes is None
    # The input, the convolution's output, and batch norm's.
    assert found == {
        peers.EAGER_NCHW: given + 2 * made + statistics,
        peers.EAGER_CHANNELS_LAST: given + 2 * made + statistics,
        peers.CONVERTED: given + made + statistics,
        peers.RECOMPUTING: given + statistics,
    }


def test_autocasts_copies_of_weights_count() -> None:
    case = small_case("bf16")
    elements = 2 * 8 * 30 + 2 * (2 * 4 * 30) + 8 * 4
    assert saved_bytes(step_of(case), case.x) == 2 * elements + 2 * 4 * 4


def test_what_is_saved_twice_counts_once() -> None:
    # What an activation in place gives is its own input and the next convolution's.
    model, x = nn.Sequential(unit(4, 4), unit(4, 4)), torch.randn(2, 4, 5, 6)
    step = training_step(model, x, torch.float32, seed=1)
    tensor, statistics = 4 * x.numel(), 2 * 2 * 4 * 4
    assert saved_bytes(step, x) == 6 * tensor + statistics
    model[0][2].inplace = True
    assert saved_bytes(step, x) == 5 * tensor + statistics


def test_the_peak_is_what_a_step_takes_beyond_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    taken = {"now": 100, "peak": 900}

    def reset(device: object) -> None:
        taken["peak"] = taken["now"]

    def call(x: Any) -> None:
        log.append("step")
        taken["peak"] += 50

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: taken["peak"])
    x: Any = SimpleNamespace(is_cuda=True, device="cuda")
    assert peak_bytes(call, x) == 50
    assert log == ["wait", "step", "wait"]


# Kinks


def stack_of_three() -> nn.Sequential:
    return nn.Sequential(*itertools.chain(*(unit(c, 8) for c in (8, 8, 8))))


def test_no_value_is_next_to_a_kink_and_no_shift_moves_far() -> None:
    model = stack_of_three()
    x = torch.randn(4, 8, 20, 20)

    def nearest() -> float:
        seen: list[float] = []
        z = x
        with torch.no_grad():
            for module in copy.deepcopy(model):
                z = module(z)
                if isinstance(module, nn.BatchNorm2d):
                    seen.append(float(z.abs().min()))
        return min(seen)

    before = [module.bias.clone() for module in model if isinstance(module, nn.BatchNorm2d)]
    near = nearest()
    training.keep_off_kinks(model, x)
    after = [module.bias for module in model if isinstance(module, nn.BatchNorm2d)]
    # 1,600 values a channel: the widest gap among those near zero is about 10 / (0.4 * 1600) wide.
    assert near < 1e-4 < 2e-3 < nearest()
    moved = torch.cat([(a - b).detach().abs() for a, b in zip(after, before, strict=True)])
    assert 0 < float(moved.max()) <= MAX_SHIFT
    assert not model[1]._forward_hooks


def test_channels_without_values_near_zero_are_left_alone() -> None:
    model = unit(4, 4)
    model[1].bias.data.copy_(torch.tensor([9.0, -9.0, 9.0, 0.0]))
    training.keep_off_kinks(model, torch.randn(2, 4, 9, 9))
    assert model[1].bias[:3].tolist() == [9.0, -9.0, 9.0]
    assert model[1].bias[3] != 0


def test_upstream_is_zero_next_to_the_last_kink_and_random_elsewhere() -> None:
    model = unit()
    x = torch.randn(2, 8, 30, 30)
    step = training_step(model, x, torch.float32, seed=1)
    with torch.no_grad():
        z = step.model[1](step.model[0](x))
    upstream = step.get_buffer("upstream")
    assert torch.equal(upstream == 0, z.abs() < NEAR_ZERO)
    assert 0.02 < float((upstream == 0).float().mean()) < 0.08
    assert float(upstream[upstream != 0].std()) == pytest.approx(1, rel=0.1)


# Runs


def file_of(folder: Path) -> list[CaseResult]:
    (path,) = folder.rglob("*.json")
    return read_cases(path)


QUICK = ["--head", "52", "--batch", "2", "--quick", "--no-report", "--device", "cpu"]


@pytest.mark.usefixtures("small_head")
def test_the_suite_runs_with_another_and_saves_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "--suite", "layers,training", "--dtype", "bf16", "--contenders", "eager,pointfuse"]
    assert run.main([*argv, "--output", str(tmp_path)]) == 0
    cases = file_of(tmp_path)
    assert [case.suite for case in cases] == ["layers"] * 4 + ["training"] * 4
    for case in cases:
        trains = case.suite == TRAINING
        assert (case.autocast, case.inplace) == ((True, False) if trains else (None, None))
        names = [result.contender for result in case.results]
        assert names == (OF_A_CPU if trains else [*OF_A_CPU[:3], peers.FROZEN])
        assert all(result.status == "ok" and result.ms is not None for result in case.results)
        assert all((result.saved_bytes is not None) == trains for result in case.results)
    out = capsys.readouterr().out
    assert "training: 52x52 1x1 24->8, batch 2, bf16, autocast" in out
    assert re.search(r"training on a CPU: the faster eager's time over ours +at least 0.97", out)
    headings = out[out.index("training: 52x52 stack, batch 2, bf16") :]
    assert "saved" in headings
    assert "peak" not in headings


@pytest.mark.usefixtures("small_head")
def test_a_wrong_gradient_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(unfaithful(Scaled.apply), name=peers.EAGER_NCHW)
    monkeypatch.setitem(peers.PEERS, peers.EAGER_NCHW, wrong)
    assert run.main([*QUICK, "--suite", "training", "--contenders", "eager", "--output", str(tmp_path)]) == 1
    cases = file_of(tmp_path)
    assert {case.results[0].status for case in cases} == {"wrong"}
    assert {(case.dtype, case.autocast) for case in cases} == {("fp32", False)}


def test_each_suite_has_the_contenders_that_are_for_it() -> None:
    compiled, kernels = [peers.COMPILED, peers.COMPILED_AUTOTUNED], [peers.CUDA_LIVE, peers.TRITON_LIVE]
    others = [*compiled, peers.INPLACE_ABN]
    assert [*OF_A_CPU[:2], *others, *OF_A_CPU[2:], peers.COMPILED_CONVERTED, *kernels] == TRAINERS
    options = parse(["--suite", "stack,training", "--device", "cpu", "--head", "13", "--quick"])
    stack, *steps = run._jobs(options)
    assert peers.RECOMPUTING not in [contender.name for contender in stack.contenders]
    assert peers.FROZEN in [contender.name for contender in stack.contenders]
    for job in steps:
        names = [*OF_A_CPU[:2], peers.COMPILED, peers.INPLACE_ABN, *OF_A_CPU[2:], peers.COMPILED_CONVERTED]
        assert [c.name for c in job.contenders] == names


@pytest.mark.parametrize(("suite", "contender"), [("training", "frozen"), ("stack,layers", "recompute")])
def test_contenders_that_are_not_for_a_suite_are_refused(
    suite: str, contender: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--suite", suite, "--contenders", contender])
    message = f"argument --contenders: none of them is for the suite {suite.partition(',')[0]}"
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "inference", "steps"),
    [([], True, False), (["--graphs", "on"], True, True), (["--graphs", "off"], False, False)],
    ids=["default", "on", "off"],
)
def test_on_a_gpu_steps_run_cold_and_warm_and_as_graphs_if_asked(
    given: list[str], inference: bool, steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    jobs = run._jobs(parse(["--suite", "stack,training", "--head", "52", "--batch", "1", *given]))
    assert [job.method.graphs for job in jobs] == [inference, *[steps] * 4]
    assert {tuple(timer.l2 for timer in job.method.timers) for job in jobs} == {("cold", "warm")}
    of_a_gpu = [name for name in TRAINERS if name != peers.COMPILED_CONVERTED]
    assert [contender.name for contender in jobs[-1].contenders] == of_a_gpu


@pytest.mark.parametrize("name", [peers.CUDA_LIVE, peers.TRITON_LIVE])
def test_a_backend_that_cannot_train_here_is_a_reason(name: str) -> None:
    (verdict,) = check_case(small_case(), [replace(peers.PEERS[name], devices=("cpu",))], METHOD).verdicts
    assert verdict.status == "failed"
    assert verdict.reason is not None
    assert f"{name.split()[1]} backend cannot run here" in verdict.reason


# Targets


def made_case(us: dict[str, float], name: str = "13x13 1x1 8->4", batch: int = 64, **changes: Any) -> CaseResult:
    """A step with these medians in microseconds, on a GPU, bf16 under autocast, cold."""
    results = tuple(Result(c, "ok", None, (1e-3,), 1e-2, Quantiles(*[m / 1e3] * 3), 5) for c, m in us.items())
    case = CaseResult(TRAINING, name, batch, "bf16", (batch, 8, 13, 13), results, complete=True)
    return replace(case, **{"l2": "cold", "graphs": False, "autocast": True, "inplace": False, **changes})


def targets_of(*cases: CaseResult) -> dict[str, tuple[str | None, bool | None]]:
    found: list[Target] = training_targets(cases)
    return {target.what.removeprefix("training, "): (target.measured, target.met) for target in found}


def test_without_results_every_target_of_training_is_open() -> None:
    assert {(target.measured, target.met) for target in training_targets([])} == {(None, None)}
    limits = [target.limit for target in training_targets([])]
    assert limits == [
        *("at least 1.6", "at least 1.15", "at least 1.25"),
        *("at most 0.67", "at most 0.34", "at least 0.97"),
    ]


def test_targets_of_steps_on_a_gpu() -> None:
    eager, compiled, ours = peers.EAGER_CHANNELS_LAST, peers.COMPILED, peers.CUDA_LIVE
    found = targets_of(
        made_case({eager: 18.0, compiled: 11.0, ours: 10.0}),
        made_case({eager: 17.0, compiled: 12.0, ours: 10.0}, name="26x26 1x1 8->4"),
        made_case({eager: 13.0, ours: 10.0}, name="13x13 stack"),
        # None of these count.
        made_case({eager: 1.0, compiled: 1.0, ours: 10.0}, name="13x13 3x3 8->4"),
        made_case({eager: 1.0, compiled: 1.0, ours: 10.0}, batch=8),
        made_case({eager: 1.0, compiled: 1.0, ours: 10.0}, l2="warm"),
        made_case({eager: 1.0, compiled: 1.0, ours: 10.0}, dtype="fp16"),
        made_case({eager: 1.0, compiled: 1.0, ours: 10.0}, suite="layers"),
        made_case({eager: 1.0, peers.CONVERTED: 10.0}, name="52x52 1x1 8->4"),
    )
    assert {what: figures for what, figures in found.items() if figures[0]} == {
        "1x1 units, batch 64, cold: eager's time over ours": ("1.70 (26x26 1x1 8->4, batch 64, the worst of 2)", True),
        "1x1 units, batch 64, cold: torch.compile's time over ours": (
            "1.10 (13x13 1x1 8->4, batch 64, the worst of 2)",
            False,
        ),
        "13x13 stack, batch 64, cold: eager's time over ours": ("1.30", True),
    }


def test_the_target_of_a_cpu_is_over_the_faster_eager_in_every_dtype() -> None:
    on_cpu = partial(made_case, l2=None, graphs=None, batch=8)
    found = targets_of(
        on_cpu({peers.EAGER_NCHW: 9.9, peers.EAGER_CHANNELS_LAST: 12.0, peers.CONVERTED: 10.0}, dtype="fp32"),
        on_cpu({peers.EAGER_NCHW: 12.0, peers.EAGER_CHANNELS_LAST: 9.6, peers.CONVERTED: 10.0}),
    )
    expected = ("0.96 (13x13 1x1 8->4, batch 8, the worst of 2)", False)
    assert found["training on a CPU: the faster eager's time over ours"] == expected


def test_targets_of_memory_are_beyond_the_input() -> None:
    def saving(case: CaseResult, saved: dict[str, int]) -> CaseResult:
        given = 4 * math.prod(case.input_shape)
        results = (replace(r, saved_bytes=given + saved[r.contender]) for r in case.results)
        return replace(case, results=tuple(results), dtype="fp32", autocast=False)

    names = (peers.EAGER_CHANNELS_LAST, peers.CONVERTED, peers.RECOMPUTING)
    saved = dict(zip(names, (300, 200, 105), strict=True))
    on_cpu = made_case(dict.fromkeys(names, 1.0), name="26x26 stack", l2=None, graphs=None)
    found = targets_of(saving(on_cpu, saved), saving(replace(on_cpu, batch=1), dict.fromkeys(names, 300)))
    assert found["fp32 stacks from batch 8: saved over eager's"] == ("0.67", True)
    assert found["fp32 stacks from batch 8, recomputing: saved over eager's"] == ("0.35", False)
    # On a GPU the default is the kernels': "auto" leaves units to PyTorch there.
    names = (*names, peers.CUDA_LIVE)
    on_gpu = made_case(dict.fromkeys(names, 1.0), name="26x26 stack")
    found = targets_of(saving(on_gpu, {**saved, peers.CONVERTED: 300, peers.CUDA_LIVE: 150}))
    assert found["fp32 stacks from batch 8: saved over eager's"] == ("0.50", True)
