"""The Triton operator in graphs: what tracers, compilers and exporters see of it.

They see it whole in Triton's interpreter and in exported programs, and its kernels in compiled graphs. Those need
Triton's compiler, and are looked at by `triton_tracer.py` in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pointfuse
import pytest
import torch
import triton_tracer
from pointfuse.backends import BACKENDS, FallbackWarning, calls
from pointfuse.backends.triton.configs import REFERENCE_CHIPS, Config
from pointfuse.backends.triton.planning import Plan, plan
from pointfuse.problem import Activation, BatchNorm, Geometry
from torch import Tensor, nn
from torch.nn import functional as F
from triton_tracer import SPLIT, TILE, Case

if reason := BACKENDS["triton"].triton_problem():
    pytest.skip(reason, allow_module_level=True)

from pointfuse.backends.triton import launching

if not launching.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

DEVICE = "cpu" if launching.INTERPRETED else "cuda"
OPERATOR = "pointfuse._conv_bn_act_triton.default"
NORM = ("mean", "var", "gamma", "beta")


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are made where the kernels run, and the backend serves them."""
    if DEVICE == "cpu":
        monkeypatch.setattr(calls, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(BACKENDS["triton"], "unusable_reason", lambda: None)


def whole(*shape: int) -> Tensor:
    """Small integers, of which sums are exact."""
    return torch.randint(-3, 4, shape, device=DEVICE).float()


OPERANDS: dict[str, Callable[[], dict[str, Any]]] = {
    "NCHW": lambda: dict(x=whole(2, 8, 5, 6)),
    "channels_last": lambda: dict(x=whole(2, 8, 5, 6).to(memory_format=torch.channels_last)),
    "permuted": lambda: dict(x=whole(8, 6, 5, 2).permute(3, 0, 2, 1)),
    "sliced": lambda: dict(x=whole(2, 11, 5, 9)[:, 3:, :, 2:8]),
    "an empty batch": lambda: dict(x=whole(0, 8, 5, 6)),
    "3x3 with a residual": lambda: dict(x=whole(2, 8, 5, 6), kernel=3, residual=whole(2, 12, 5, 6)),
    "bias alone": lambda: dict(x=whole(1, 8, 5, 6), norm=False, bias=whole(12)),
}


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_the_operator_keeps_the_rules_of_operators(operands: Callable[[], dict[str, Any]]) -> None:
    def arguments(
        x: Tensor, kernel: int = 1, norm: bool = True, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> calls.Arguments:
        weight, statistics = whole(12, 8, kernel, kernel), torch.rand(4, 12, device=DEVICE) + 0.5
        bn = BatchNorm(*statistics, False, 0.0, 1e-5) if norm else None
        geometry = Geometry((1, 1), (kernel // 2, kernel // 2))
        return calls.arguments(x, weight, bias, bn, Activation("silu"), geometry, residual)

    with torch.no_grad():
        results = torch.library.opcheck(torch.ops.pointfuse._conv_bn_act_triton.default, arguments(**operands()))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


PLANNED = {
    "1x1 in NCHW": (1, torch.contiguous_format, TILE),
    "1x1 in channels_last": (1, torch.channels_last, TILE),
    "3x3 in NCHW": (3, torch.contiguous_format, TILE),
    "3x3 in channels_last": (3, torch.channels_last, TILE),
    "split sum": (3, torch.channels_last, SPLIT),
}


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dims", [(0,), (0, 2, 3)], ids=["any batch", "any batch, rows and columns"])
@pytest.mark.parametrize(("kernel", "layout", "tile"), PLANNED.values(), ids=PLANNED)
def test_a_plan_for_any_size_is_right_for_every_size(
    kernel: int, layout: torch.memory_format, tile: Config, dims: tuple[int, ...], chip: str
) -> None:
    example, weight = whole(2, 32, 6, 7).to(memory_format=layout), whole(24, 32, kernel, kernel)
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2))
    config = calls.arguments(example, weight, None, None, Activation("relu"), geometry)[8]
    made, symbols = plan_of_symbols(example, weight, config, dims, chip, tile)
    assert (made.config.split_k > 1) == (tile == SPLIT)
    for size in ((5, 32, 11, 3), (2, 32, 2, 20)):
        x = whole(*(size[i] if i in dims else example.shape[i] for i in range(4))).to(memory_format=layout)
        y = calls.empty_output(x, weight, config)
        known = at(made, {symbol: x.shape[i] for i, symbol in symbols.items()})
        residual = torch.empty_like(y).copy_(whole(*y.shape))
        y = launching.Launch(known, weight, y)((x, weight, *[None] * 5, residual), 0.0, 0.0)
        assert torch.equal(y, (F.conv2d(x.double(), weight.double(), padding=kernel // 2) + residual).relu().float())


def plan_of_symbols(
    example: Tensor, weight: Tensor, config: int, dims: tuple[int, ...], chip: str, tile: Config
) -> tuple[Plan, dict[int, Any]]:
    """A plan that is traced for an input some of whose sizes are symbols, and these by their dimension."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shapes = ShapeEnv()
    kinds = [DimDynamic.DYNAMIC if i in dims else DimDynamic.STATIC for i in range(4)]
    with FakeTensorMode(shape_env=shapes) as mode:
        x = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
        fixed = mode.from_tensor(weight, static_shapes=True)
        packed = fixed.contiguous(memory_format=torch.channels_last)
        y = calls.empty_output(x, fixed, config)
        made = plan(
            x, packed, y, y, config, REFERENCE_CHIPS[chip], {},
            aligned=(True, True), interpreted=launching.INTERPRETED, tile=tile,
        )  # fmt: skip
    assert not shapes.guards
    return made, {i: x.shape[i].node.expr for i in dims}


def at(made: Plan, sizes: dict[Any, int]) -> Plan:
    """A plan with its symbols replaced."""
    assert {type(constant) for constant in made.constants.values()} <= {int, bool, str}

    def number(value: Any) -> int:
        return value if type(value) is int else int(value.node.expr.xreplace(sizes))

    return replace(
        made,
        grid=number(made.grid),
        finish_grid=number(made.finish_grid),
        partials=number(made.partials),
        integers={name: number(value) for name, value in made.integers.items()},
    )


@pytest.mark.parametrize("strict", [False, True], ids=["traced by fake tensors", "traced by Dynamo"])
def test_exported_programs_keep_the_operator_whole(strict: bool) -> None:
    program, x, expected = exported(strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OPERATOR) == 2
    assert not any("conv2d" in target for target in targets)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), expected)


def test_exported_programs_run_where_the_backends_were_asked_for(tmp_path: Path) -> None:
    program, x, expected = exported(strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, expected), tmp_path / "call.pt")
    run(
        """
        import pointfuse, torch
        pointfuse.backends()
        program = torch.export.load("program.pt2").module()
        x, expected = torch.load("call.pt")
        with torch.no_grad():
            torch.testing.assert_close(program(x), expected)
            torch.testing.assert_close(program(x.repeat(3, 1, 1, 1)), expected.repeat(3, 1, 1, 1))
        """,
        tmp_path,
    )


def exported(strict: bool) -> tuple[Any, Tensor, Tensor]:
    """A program for any batch, of two units, with an input and its output."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    frozen, x = pointfuse.freeze(model.to(DEVICE), pack=False), torch.randn(2, 8, 6, 6, device=DEVICE)
    with torch.no_grad(), pointfuse.use_backend("triton", strict=True):
        batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
        return torch.export.export(frozen, (x,), dynamic_shapes=batch, strict=strict), x, frozen(x)


FORMS = {"converted": pointfuse.convert, "frozen": lambda model: pointfuse.freeze(model, pack=False)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_traced_script_holds_pytorchs_operators_and_that_is_said(
    form: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pointfuse.backends"], "_announced", set())
    model, x = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU()).eval().to(DEVICE), whole(2, 8, 5, 6)
    with torch.no_grad():
        with pointfuse.use_backend("triton"), pytest.warns(FallbackWarning, match="graph|trace"):
            script = torch.jit.trace(form(model), x)
        torch.testing.assert_close(script(x.repeat(3, 1, 1, 1)), model(x.repeat(3, 1, 1, 1)))
        with (
            pointfuse.use_backend("triton", strict=True),
            pytest.raises(RuntimeError, match="does not serve this call"),
        ):
            torch.jit.trace(form(model), x)


def test_the_backend_may_be_asked_for_by_a_graph_first(tmp_path: Path) -> None:
    run(
        f"""
        import functools, torch, torch._dynamo.testing
        from pointfuse.backends import calls, triton
        from pointfuse.functional import conv_bn_act

        if {DEVICE == "cpu"}:
            calls.on_gpu = lambda tensor: True
            # As it answers where there is a GPU.
            triton.unusable_reason = functools.cache(lambda: triton.triton_problem())
        compiler = torch._dynamo.testing.CompileCounterWithBackend("eager")
        unit = lambda x, weight: conv_bn_act(x, weight, activation="relu")
        compiled = torch.compile(unit, backend=compiler, fullgraph=True)
        with torch.no_grad():
            for _ in range(3):
                x, weight = torch.randn(2, 8, 5, 5, device="{DEVICE}"), torch.randn(8, 8, 1, 1, device="{DEVICE}")
                torch.testing.assert_close(compiled(x, weight), unit(x, weight))
        (graph,) = compiler.graphs
        assert any("_conv_bn_act_triton" in str(node) for node in graph.graph.nodes), graph
        """,
        tmp_path,
        {"POINTFUSE_BACKEND": "triton", "POINTFUSE_STRICT": "1"},
    )


def run(code: str, folder: Path, environment: dict[str, str] | None = None) -> None:
    """Python in a process that knows of nothing yet."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]


TRACED = {
    "1x1": Case(),
    "3x3 in NCHW": Case(kernel=3, layout="NCHW", residual=True),
    "fp32 without batch norm": Case(dtype="fp32", norm=False, activation="silu"),
    "split sum": Case(kernel=3, split=True),
}
BATCHES = ((2, 14, 14), (3, 14, 14), (64, 14, 14))
SIZES = ((2, 14, 14), (3, 9, 11), (20, 2, 6))
ANY_SIZE = {
    "1x1 of any batch": Case(sizes=BATCHES, dynamic=(0,)),
    "1x1 in NCHW of any size": Case(sizes=SIZES, dynamic=(0, 2, 3), layout="NCHW", residual=True),
    "3x3 of any size": Case(sizes=SIZES, dynamic=(0, 2, 3), kernel=3),
    "split sum of any batch": Case(sizes=BATCHES, dynamic=(0,), kernel=3, split=True, residual=True),
}
EMITTED = {
    "1x1 of any batch": Case(dynamic=(0,), emit=True),
    "3x3 in NCHW of batch 1": Case(sizes=((1, 14, 14),), kernel=3, layout="NCHW", emit=True),
    "one pixel": Case(sizes=((1, 1, 1),), residual=True, emit=True),
    "one channel": Case(sizes=((1, 5, 5),), kernel=3, c_in=1, dtype="fp32", emit=True),
    "split sum": Case(kernel=3, split=True, emit=True),
}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case | None], dict[str, Any]]:
    """What came of a case, and of the operator's registration for ``None``."""
    cases = [*TRACED.values(), *ANY_SIZE.values(), *EMITTED.values()]
    caches = {name: str(tmp_path_factory.mktemp("cache")) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, triton_tracer.__file__],
        input="".join(json.dumps(asdict(case)) + "\n" for case in cases),
        env=os.environ | caches | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases) + 1, done.stderr[-5000:]
    found = dict(zip([None, *cases], map(json.loads, lines), strict=True))

    def outcome(case: Case | None) -> dict[str, Any]:
        assert not found[case].get("error"), found[case]["error"]
        return found[case]

    return outcome


def test_torch_knows_the_operator_by_its_kernels(traced: Callable[..., dict[str, Any]]) -> None:
    assert traced(None)["kernels"] == ["conv_bn_act", "finish_split"]


def test_eager_calls_of_the_operator_are_not_traced(traced: Callable[..., dict[str, Any]]) -> None:
    assert traced(None)["eager"]


@pytest.mark.parametrize("case", TRACED.values(), ids=TRACED)
def test_compiled_graphs_hold_the_kernels(case: Case, traced: Callable[..., dict[str, Any]]) -> None:
    absent = {"bias", "parts", *(() if case.norm else NORM), *(() if case.residual else ("residual",))}
    (launches,) = traced(case)["graphs"]
    assert launches[0] == {
        "name": "conv_bn_act",
        "written": ["partials" if case.split else "y"],
        "absent": sorted(absent if case.split else absent | {"partials"}),
        "constants": {"ACTIVATION": case.activation, "PRECISION": "tf32"},
        "options": [{"num_warps": TILE.warps, "num_stages": TILE.stages}],
        "symbolic": False,
    }
    assert [(launch["name"], launch["written"]) for launch in launches[1:]] == [("finish_split", ["y"])] * case.split


@pytest.mark.parametrize("case", ANY_SIZE.values(), ids=ANY_SIZE)
def test_one_graph_serves_every_size(case: Case, traced: Callable[..., dict[str, Any]]) -> None:
    outcome = traced(case)
    (launches,) = outcome["graphs"]
    assert [launch["symbolic"] for launch in launches] == [True] * (1 + case.split)
    # The residual has the input's sizes, and that is all that is asked of them.
    demands = [demand for guard in outcome["guards"] for demand in guard.split(" & ")]
    assert len(demands) == len(case.dynamic) * case.residual
    assert all(re.fullmatch(r"Eq\(s\d+, s\d+\)", demand) for demand in demands)
    assert [shown for shown, _ in outcome["strides"]] == [pytorchs for _, pytorchs in outcome["strides"]]
    assert len(outcome["strides"]) == 3


@pytest.mark.parametrize("case", EMITTED.values(), ids=EMITTED)
def test_inductor_runs_our_kernels_and_no_others(case: Case, traced: Callable[..., dict[str, Any]]) -> None:
    outcome = traced(case)
    emitted = {kernel["name"]: kernel for kernel in outcome["emitted"]}
    assert list(emitted) == ["conv_bn_act", "finish_split"][: 1 + case.split]
    assert len(outcome["allocations"]) == 1 + case.split
    for kernel in emitted.values():
        assert not kernel["error"]
        # The numbers that Python passes are rounded, and nothing is computed in fp64.
        assert set(kernel["doubles"]) <= {"tt.func", "arith.truncf"}
        # Memory from Triton's allocator is what other threads do not have, and AOTInductor before torch 2.12.
        assert kernel["scratch"] == 0
