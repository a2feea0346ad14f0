"""Differential fuzzing: any unit, by any way in, against PyTorch in float64.

A ``Case`` is one unit as plain data, and everything that is random about its tensors comes from its seed. ``run_case``
runs it three times, by pointfuse, by PyTorch in the same dtype and by PyTorch in float64, and raises ``Failure`` where
pointfuse breaks a promise: the accuracy rule, exact small integers, NaN and infinity, PyTorch's errors, shapes, strides
and dtypes, operands that stay as they are, and memory beside them.

The accuracy rule is that of ``yardstick.py``: twice PyTorch's own error, plus 1e-6. Of a tensor of few elements that
error is a matter of luck, often zero. Where the rule fails on one draw, PyTorch's error is therefore taken as the
largest over ``DRAWS`` neighbours: the same case with operands that differ by a few roundings. Large tensors gain
nothing by it, since theirs hardly varies. Folding rounds each weight once, to its dtype, which PyTorch's composition
never does, and of a frozen unit the shift where oneDNN does not take it in fp32: a folded unit is besides allowed half
an ulp of each, ``eps / 2 * max(conv(|x|, |scale * weight|) + |shift|)``. Float64 is held to 1e-12 of PyTorch's, since
both round, enlarged as batch statistics enlarge the input's rounding. Infinity counts as the least value that is
rounded to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pointfuse
import torch
from canaries import Canaries, Overrun
from hypothesis import strategies as st
from pointfuse import training
from pointfuse.backends import BACKENDS, aten, calls, cuda
from pointfuse.modules import activation_module
from pointfuse.problem import ACTIVATIONS, RESIDUAL_ORDERS
from torch import Tensor, nn
from torch.nn import functional as F
from units_for_tests import BARE_LAYOUTS as LAYOUTS

REGRESSIONS = Path(__file__).resolve().parent / "regressions"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
EMULATED = ("cuda-h100", "cuda-a100", "triton-interpreter")
DRAWS = 64
MAX_FOUND = 10
_CHUNK = 200
_SEEDS_APART = 1_000_003
# With a variance of 4 less this the reciprocal deviation is 1/2, exactly, in every dtype.
INTEGER_EPS = 0.25


# Of a batch norm, which a frozen model no longer has.
_NORMS_OWN_ERROR = "mixed dtype"


class Failure(AssertionError):
    """pointfuse broke a promise."""


@dataclass(frozen=True)
class Case:
    """One unit, how it is called, and how its tensors lie. The defaults are the plainest unit."""

    backend: str = "aten"  # or "aten-gpu", "cuda-gpu", "triton-gpu", or one of EMULATED
    entry: str = "function"  # function, module, converted, frozen
    mode: str = "inference"  # inference, gradients (by running statistics), training, recompute
    dtype: str = "fp32"
    autocast: str | None = None
    batch: int = 1
    c_in: int = 1  # of each group, as c_out
    c_out: int = 1
    groups: int = 1
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    x_layout: str = "NCHW"
    weight_layout: str = "NCHW"
    bias: bool = False
    norm: str | None = None  # affine, plain, gamma (and no beta), beta (and no gamma)
    norm_dtype: str = "same"  # or fp32
    tracked: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str = "identity"
    slope: float = 0.1
    residual: str | None = None  # add_act, act_add
    residual_shape: str = "full"  # or channels, plane, one
    residual_layout: str = "NCHW"
    data: str = "normal"  # integers, special, large, tiny, far
    pack: bool = True
    memory_format: str = "channels_last"  # of a frozen model
    example: bool = False  # freezing is given one
    seed: int = 0

    @property
    def folds(self) -> bool:
        return self.entry == "frozen" or (self.mode == "inference" and self.norm is not None)

    @property
    def trains(self) -> bool:
        return self.mode in ("training", "recompute")

    @property
    def normalises_by_batch(self) -> bool:
        return self.norm is not None and (self.trains or not self.tracked)

    @property
    def integral(self) -> bool:
        """Whether every sum is one that the dtype holds: results are exact then, whatever the order of summation."""
        exact_norm = self.norm is None or (self.eps == INTEGER_EPS and self.tracked and not self.trains)
        plain = self.dtype in ("fp32", "fp64") and self.autocast is None
        activation = (
            self.slope in (0.0, 0.5, -2.0, 1.0) if self.activation == "leaky_relu" else self.activation != "silu"
        )
        return self.data == "integers" and plain and exact_norm and activation


@dataclass(frozen=True)
class Verdict:
    """How a case that passed did: whether a fused path ran, and what decided."""

    fused: bool
    raised: bool  # PyTorch raises, and so does pointfuse
    by_neighbours: bool
    by_fold: bool
    unsteady: bool = False  # PyTorch's own answer changes from run to run


def save(case: Case, failure: str, folder: Path = REGRESSIONS) -> Path:
    """Write a failing case to a file that ``tests/test_fuzz.py`` runs from then on."""
    fields = dataclasses.asdict(case)
    name = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{case.backend}-{case.entry}-{case.mode}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"failure": failure, "case": fields}, indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> Case:
    """The case of a file. Raises ``TypeError`` if its fields are not those of a case."""
    fields = json.loads(path.read_text(encoding="utf-8"))["case"]
    return Case(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def native_backends() -> list[str]:
    """What this machine runs without an emulator."""
    on_gpu = [f"{name}-gpu" for name in ("cuda", "triton") if not BACKENDS[name].unusable_reason()]
    return ["aten", *(["aten-gpu", *on_gpu] if torch.cuda.is_available() else [])]


def missing(backend: str) -> str | None:
    """Why a backend by its name here cannot run on this machine, or ``None``."""
    if backend in ("aten", *(EMULATED if not torch.cuda.is_available() else EMULATED[:2])):
        return BACKENDS["triton"].triton_problem() if backend == "triton-interpreter" else None
    if backend in ("aten-gpu", "cuda-gpu", "triton-gpu"):
        if not torch.cuda.is_available():
            return "torch.cuda.is_available() is false"
        return BACKENDS[backend.split("-")[0]].unusable_reason()
    if backend == "triton-interpreter":
        return "Triton's interpreter is for machines without a GPU"
    return f"there is no such backend; the names are aten, aten-gpu, cuda-gpu, triton-gpu, {', '.join(EMULATED)}"


_SELDOM = st.sampled_from((False,) * 15 + (True,))


@st.composite
def cases(draw: Callable[..., Any], backend: str) -> Case:
    """Cases for a backend; simpler ones first. Some are wrong calls: PyTorch's errors are a promise too."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    emulated = backend in EMULATED
    kernels = not backend.startswith("aten")
    entry = one_of("function", "module", "converted", "frozen")
    mode = "inference" if entry == "frozen" else one_of("inference", "inference", "gradients", "training")
    if mode == "training" and entry != "function" and draw(st.booleans()):
        mode = "recompute"
    dtype = one_of("fp32", "bf16", "fp16", *([] if kernels else ["fp64"]))
    kernel = one_of((1, 1), (1, 1), (3, 3), (3, 3), (1, 1), (3, 3), (5, 5), (1, 3), (2, 2))
    groups = one_of(1, 1, 1, 1, 1, 2, 3)
    channels = [1, 2, 3, 5, 7, 8, 13, 16, 24, 31, 32] + ([40, 75] if emulated else [64, 75, 255])
    c_in, c_out = one_of(*channels), one_of(*channels)
    sides = st.integers(1, 7) if emulated or c_in * c_out > 1024 else st.integers(1, 13)
    norm = one_of("affine", "affine", "plain", None, "gamma", "beta")
    data = one_of("normal", "normal", "integers", "special", "far", "large", "tiny")
    if mode != "inference" and data in ("large", "tiny"):
        data = "normal"
    residual = one_of(None, None, *RESIDUAL_ORDERS)
    layouts = [*LAYOUTS, "expanded batch", "expanded plane"]
    stride = one_of((1, 1), (1, 1), (2, 2), (2, 1), (3, 3))
    # A plane smaller than the kernel, and "same" with a stride, are errors: a few of them will do.
    half = (kernel[0] // 2, kernel[1] // 2)
    paddings = [half, half, (0, 0), (1, 1), (0, 2), "valid", *(["same"] if stride == (1, 1) or draw(_SELDOM) else [])]
    height, width = draw(sides), draw(sides)
    if not draw(_SELDOM):
        height, width = max(height, kernel[0]), max(width, kernel[1])
    case = Case(
        backend=backend, entry=entry, mode=mode, dtype=dtype,
        autocast=one_of(None, None, None, None, None, "bf16", "fp16"),
        batch=one_of(1, 2, 3, 1, 2, 0), c_in=c_in, c_out=c_out, groups=groups, height=height, width=width,
        kernel=kernel, stride=stride, padding=one_of(*paddings),
        dilation=one_of((1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (2, 2)),
        x_layout=one_of(*layouts), weight_layout=one_of("NCHW", "channels_last"), bias=draw(st.booleans()), norm=norm,
        norm_dtype=one_of("same", "fp32"), tracked=norm is None or one_of(True, True, True, False),
        momentum=one_of(0.1, 0.3, 1.0, 0.0) if entry == "function" else one_of(0.1, 0.3, None),
        eps=INTEGER_EPS if data == "integers" else one_of(1e-5, 1e-3, 0.5),
        activation=one_of(*ACTIVATIONS), slope=one_of(0.1, 0.5, 0.0, 1.0, -2.0), residual=residual,
        residual_shape=one_of("full", "full", "full", "channels", "plane", "one") if residual else "full",
        residual_layout=one_of(*layouts) if residual else "NCHW", data=data,
        seed=draw(st.integers(0, 2**31 - 1)),
    )  # fmt: skip
    if kernel == (1, 1):
        # Which for 1x1 means nothing, and crashes PyTorch's own convolution in bf16 (2.13, a channels_last weight).
        case = dataclasses.replace(case, dilation=(1, 1))
    if entry == "frozen":
        frozen = dict(pack=not kernels and draw(st.booleans()), memory_format=one_of("channels_last", "NCHW"))
        case = dataclasses.replace(case, **frozen, example=one_of(False, False, True))
    return case


@dataclass
class Found:
    """A failing case, as small as it could be made."""

    case: Case
    failure: str


def fuzz(backend: str, count: int, seed: int, note: Callable[[Case, Verdict | None], None]) -> list[Found]:
    """Run so many cases on a backend, and tell ``note`` of each; ``None`` is the verdict of one that failed.

    Hypothesis draws a chunk at a time, since within one it varies what it has drawn before, and would end at a failure.
    Runs by which it shrinks a failure are not counted. Ends early at ``MAX_FOUND`` failures.
    """
    found: list[Found] = []
    done = chunk = 0
    while done < count and len(found) < MAX_FOUND:
        counted, failing = _chunk(backend, min(_CHUNK, count - done), seed * _SEEDS_APART + chunk, note)
        # The last that failed is the smallest: hypothesis shows it once more.
        found += failing[-1:]
        done += counted
        chunk += 1
    return found


def _chunk(
    backend: str, count: int, seed: int, note: Callable[[Case, Verdict | None], None]
) -> tuple[int, list[Found]]:
    """How many cases ran, which is ``count`` unless one failed, and every run that failed, the shrunk ones too."""
    done, failing = 0, []

    def run(case: Case) -> None:
        nonlocal done
        shrinking = bool(failing)
        verdict = None
        try:
            verdict = run_case(case)
        except Exception as failure:
            failing.append(Found(case, str(failure) if isinstance(failure, Failure) else _said(failure)))
            raise
        finally:
            if not shrinking:
                done += 1
                note(case, verdict)

    drawn = hypothesis.settings(
        max_examples=count, database=None, deadline=None, derandomize=False, report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    try:
        hypothesis.seed(seed)(drawn(hypothesis.given(cases(backend))(run)))()
    except Exception:
        if not failing:
            raise
    return done, failing


@contextlib.contextmanager
def machine(backend: str) -> Iterator[None]:
    """The backend of that name serves what it can."""
    name, _, device = backend.partition("-")
    with contextlib.ExitStack() as stack:
        if backend in EMULATED:
            if name == "cuda":
                from host_ops import host_ops

                host_ops().pointfuse_emulate(device.encode())
            stack.enter_context(mock.patch.object(calls, "on_gpu", lambda tensor: tensor.is_cpu))
            stack.enter_context(mock.patch.object(BACKENDS[name], "unusable_reason", return_value=None))
            # The CPU, with which they are compared, does not round to TF32.
            stack.enter_context(mock.patch.object(calls, "tf32_allowed", return_value=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(pointfuse.use_backend(name))
        yield


def run_case(case: Case) -> Verdict:
    """Run a case on its backend. Raises :class:`Failure`."""
    ours, fused = _ours(case)
    plain, exact = _plain(case, 0), _exact(case, 0)
    if isinstance(plain, Exception):
        if case.entry == "frozen" and str(plain).startswith(_NORMS_OWN_ERROR):
            return Verdict(fused, True, False, False)
        if not isinstance(ours, Exception):
            raise Failure(f"PyTorch raises {_said(plain)}, and pointfuse nothing")
        if type(ours) is not type(plain):
            raise Failure(f"PyTorch raises {_said(plain)}, and pointfuse {_said(ours)}") from ours
        return Verdict(fused, True, False, False)
    if isinstance(ours, Exception):
        raise Failure(f"pointfuse raises {_said(ours)}") from ours
    if isinstance(exact, Exception):
        raise Failure(f"PyTorch raises in float64 alone: {_said(exact)}")
    if ours.keys() != plain.keys():
        raise Failure(f"results are {sorted(ours)}, and PyTorch's {sorted(plain)}")
    decided = []
    for name in ours:
        try:
            decided.append(_compare(case, name, ours[name], plain[name], exact[name], _least(case, name, exact)))
        except Failure:
            if _unsteady(case, name):
                return Verdict(fused, False, False, False, unsteady=True)
            raise
    return Verdict(fused, False, "neighbours" in decided, "fold" in decided)


Results = dict[str, Tensor]


def _least(case: Case, name: str, exact: Results) -> float:
    """How large a result is to count at the least, where batch statistics make it of terms that cancel.

    What is normalised has a deviation of one: where all of a channel is the same, what is left is rounding of that.
    The bias is taken away again: its gradient is rounding of terms as large as the weight's.
    """
    if not case.normalises_by_batch:
        return 0.0
    values = _values(case, 0)
    terms = {
        "y": values.get("gamma", torch.ones(1)),
        "d_bn.weight": values.get("grad_out", torch.zeros(1, 1, 1, 1)).abs().sum((0, 2, 3)),
        "d_conv.bias": exact.get("d_conv.weight", torch.zeros(1)),
    }.get(name)
    return 0.0 if terms is None or not terms.numel() else terms.abs().nan_to_num(0, 0).max().item()


def _enlargement(case: Case) -> float:
    """How many times as large as of numbers about one roundings are, where batch statistics normalise the input."""
    values = _values(case, 0)
    if not case.normalises_by_batch or not values["x"].numel():
        return 1.0
    y = _conv(case, values["x"], values["weight"], values.get("bias")).transpose(0, 1).flatten(1)
    var = y.var(1, correction=0).min().nan_to_num(1, 1).item() if y.numel() else 1.0
    return max(1.0, values["x"].abs().nan_to_num(0, 0).max().item()) * max(1.0, (var + case.eps) ** -0.5)


def _compare(case: Case, name: str, ours: Tensor, plain: Tensor, exact: Tensor, least: float) -> str:
    """What the comparison went by; values are ``least`` large at the least. Raises :class:`Failure`."""
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        raise Failure(f"{name} is {ours.dtype} of {tuple(ours.shape)}, PyTorch's {plain.dtype} of {tuple(plain.shape)}")
    if name == "y" and case.entry != "frozen" and _steps(ours) != _steps(plain):
        raise Failure(f"{name} has strides {ours.stride()}, PyTorch's {plain.stride()}")
    if not ours.dtype.is_floating_point or ours.numel() == 0:
        if not torch.equal(ours, plain):
            raise Failure(f"{name} is {ours.tolist()}, PyTorch's {plain.tolist()}")
        return "equality"
    if case.integral and name not in ("running_mean", "running_var"):
        wrong = (ours.double() != exact).nonzero()
        if len(wrong):
            at = wrong[0].tolist()
            raise Failure(f"{name}{at} of small integers is {ours[tuple(at)]}, exactly {exact[tuple(at)]}")
        return "equality"
    # NaN and infinity are to be PyTorch's; what overflows in PyTorch's dtype alone may be that or right.
    special = (ours == plain) | (ours.isnan() & plain.isnan())
    judged = exact.isfinite() & ~(special & ~plain.isfinite())
    if not (judged | special).all():
        at = tuple((~(judged | special)).nonzero()[0].tolist())
        raise Failure(
            f"{name}{list(at)} is {ours[at].item()}, PyTorch's {plain[at].item()}, in float64 {exact[at].item()}"
        )
    if not judged.any():
        return "equality"

    scale = max(exact[judged].abs().max().item(), least)
    floor = 1e-6 * (scale or 1.0) + (1e-12 * _enlargement(case) if ours.dtype == torch.float64 else 0.0)
    # What is rounded to infinity is at least so large.
    finfo = torch.finfo(ours.dtype)
    edge = finfo.max * (1 + finfo.eps / 4)
    gap = (ours.double().clamp(-edge, edge) - exact)[judged].abs().nan_to_num(math.inf).max().item()
    own = _own_error(plain, exact, judged)
    if gap <= 2 * own + floor:
        return "rule"
    for draw in range(1, DRAWS + 1):
        if gap > 100 * (2 * own + floor) and (draw > 8 or not math.isfinite(gap)):
            break  # no neighbour will differ so much
        near, near_exact = _plain(case, draw), _exact(case, draw)
        if not isinstance(near, Exception) and not isinstance(near_exact, Exception):
            own = max(own, _own_error(near[name], near_exact[name], judged))
            if gap <= 2 * own + floor:
                return "neighbours"
    if case.folds and name == "y" and gap <= 2 * own + floor + _fold_rounding(case):
        return "fold"
    raise Failure(f"{name} is {gap:.3g} off at a largest magnitude of {scale:.3g}; PyTorch's own error is {own:.3g}")


def _unsteady(case: Case, name: str) -> bool:
    """Whether PyTorch's own answer changes from run to run.

    PyTorch 2.13's grouped convolutions in bf16 on a CPU read memory that was never written, one time in ten.
    """
    runs = [_plain(case, 0) for _ in range(DRAWS)]
    answers = {run[name].contiguous().view(torch.uint8).numpy().tobytes() for run in runs if isinstance(run, dict)}
    return len(answers) > 1


def _own_error(plain: Tensor, exact: Tensor, judged: Tensor) -> float:
    """How far PyTorch is off where its dtype does not overflow."""
    errors = (plain.double() - exact)[judged & plain.isfinite() & exact.isfinite()]
    return errors.abs().max().item() if errors.numel() else 0.0


def _steps(t: Tensor) -> list[int]:
    """Strides where they mean something."""
    return [] if t.numel() == 0 else [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]


def _fold_rounding(case: Case) -> float:
    """What rounding each folded weight, and the shift of a frozen unit, by half an ulp may change in an output."""
    values = _values(case, 0)
    scale = torch.ones(case.c_out * case.groups, dtype=torch.float64)
    if case.norm is not None:
        scale = scale / (values["var"] + case.eps).sqrt() * values.get("gamma", torch.ones(())).abs()
    z = _conv(case, values["x"].nan_to_num(0, 0, 0).abs(), values["weight"].abs() * _column(scale).transpose(0, 1))
    if case.entry == "frozen":
        shift = values.get("bias", torch.zeros(())) - values.get("mean", torch.zeros(()))
        z = z + _column(shift.abs() * scale + values.get("beta", torch.zeros(())).abs())
    unit = max(torch.finfo(DTYPES[name]).eps for name in (case.dtype, case.autocast) if name is not None)
    slope = max(1.0, abs(case.slope) if case.activation == "leaky_relu" else 1.1)
    return unit / 2 * z.max().item() * slope


def _conv(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation, case.groups)


# What the operands are.


@functools.lru_cache(maxsize=4)
def _values(case: Case, draw: int) -> Results:
    """Every operand in float64, rounded to its dtype; ``draw`` counts the case's neighbours, itself being 0.

    They are kept, and not to be written to.
    """
    generator = torch.Generator().manual_seed(case.seed)
    c_out, fan_in = case.c_out * case.groups, case.c_in * case.kernel[0] * case.kernel[1]
    x_shape = (case.batch, case.c_in * case.groups, case.height, case.width)
    weight_shape = (c_out, case.c_in, *case.kernel)

    def numbers(*shape: int) -> Tensor:
        if case.data == "integers":
            return torch.randint(-3, 4, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = dict(x=numbers(*x_shape), weight=numbers(*weight_shape))
    if case.data != "integers":
        made["weight"] /= fan_in**0.5
    if case.bias:
        made["bias"] = numbers(c_out)
    if case.norm is not None:
        made["mean"], spread = numbers(c_out), torch.rand(c_out, generator=generator, dtype=torch.float64) + 0.5
        made["var"] = torch.full_like(spread, 4 - INTEGER_EPS) if case.data == "integers" else spread
        if case.norm in ("affine", "gamma"):
            signs = torch.randint(0, 2, (c_out,), generator=generator).double() * 2 - 1
            made["gamma"] = signs if case.data == "integers" else signs * (spread.flip(0) + 0.1)
        if case.norm in ("affine", "beta"):
            made["beta"] = numbers(c_out)
    with contextlib.suppress(RuntimeError):
        y_shape = _conv(case, made["x"].to("meta"), made["weight"].to("meta")).shape
        if case.residual is not None:
            forms = {"full": y_shape, "channels": (c_out, 1, 1), "plane": y_shape[2:], "one": (1, c_out, *y_shape[2:])}
            made["residual"] = numbers(*forms[case.residual_shape])
        made["grad_out"] = numbers(*y_shape)
    if case.residual is not None and "residual" not in made:
        made["residual"] = numbers(1, c_out, 1, 1)
    _roughen(case, made, generator)
    if draw:
        jitter = torch.Generator().manual_seed(case.seed + draw)
        step = 4 * torch.finfo(DTYPES[case.autocast or case.dtype]).eps
        for t in made.values():
            t *= 1 + step * torch.randn(t.shape, generator=jitter, dtype=torch.float64)
    return {name: _fill(case, name, t.to(_dtype_of(case, name)).double()) for name, t in made.items()}


def _fill(case: Case, name: str, t: Tensor) -> Tensor:
    """The values that an expanded operand can have."""
    layout = {"x": case.x_layout, "residual": case.residual_layout}.get(name, "")
    if layout == "expanded batch" and t.dim() == 4:
        return t[:1].expand_as(t)
    return t[..., :1, :1].expand_as(t) if layout == "expanded plane" and t.dim() == 4 else t


def _roughen(case: Case, made: Results, generator: torch.Generator) -> None:
    """Turn normal data into the case's."""
    x, half = made["x"], case.dtype == "fp16" or case.autocast == "fp16"
    if case.data == "far":
        x += 30
    if case.data == "large":
        x *= 2e4 if half else 1e30
    if case.data == "tiny":
        x *= 1e-6 if half else 1e-40
    if case.data == "special" and x.numel():
        nan, inf = float("nan"), float("inf")
        for value in (nan, inf, -inf, 0.0)[: 1 + int(torch.randint(0, 4, (), generator=generator))]:
            x.view(-1)[int(torch.randint(0, x.numel(), (), generator=generator))] = value


def _dtype_of(case: Case, name: str) -> torch.dtype:
    if name in ("mean", "var", "gamma", "beta") and case.norm_dtype == "fp32" and case.dtype != "fp64":
        return torch.float32
    return DTYPES[case.dtype]


def _gradient(case: Case, values: Results, z: Tensor) -> Tensor:
    """The output's gradient, zero where rounding would decide on which side of a kink the activation is."""
    grad_out = values["grad_out"]
    if case.activation in ("silu", "identity") or case.integral:
        return grad_out
    magnitude = z.abs() + _magnitude(case, values)
    unit = torch.finfo(DTYPES[case.autocast or case.dtype]).eps
    kinks = [0.0, 6.0] if case.activation == "relu6" else [0.0]
    sure = torch.stack([(z - kink).abs() > 16 * unit * magnitude for kink in kinks]).all(0)
    return torch.where(sure, grad_out, 0)


def _magnitude(case: Case, values: Results) -> Tensor:
    """How large what is summed up to the activation's argument is."""
    y = _conv(case, values["x"].abs(), values["weight"].abs())
    if "bias" in values:
        y = y + _column(values["bias"].abs())
    if case.norm is None:
        return y
    var, mean = values["var"], values["mean"]
    if case.trains or not case.tracked:
        exact = _conv(case, values["x"], values["weight"], values.get("bias"))
        if exact.numel() == 0:
            return exact
        var, mean = exact.var((0, 2, 3), correction=0), exact.mean((0, 2, 3))
    scale = (var + case.eps).rsqrt() * values.get("gamma", torch.ones(())).abs()
    return (y + _column(mean.abs())) * _column(scale) + _column(values.get("beta", torch.zeros(1)).abs())


def _column(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)


# How it is run.


class _Unit(nn.Module):
    """The plain unit: three modules and a residual."""

    def __init__(self, conv: nn.Module, bn: nn.Module | None, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, act


class _Bare(_Unit):
    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.act(z if self.bn is None else self.bn(z))


class _AddAct(_Unit):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        z = self.conv(x)
        z = z if self.bn is None else self.bn(z)
        return self.act(z + residual)


class _ActAdd(_Unit):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        z = self.conv(x)
        return self.act(z if self.bn is None else self.bn(z)) + residual


_UNITS = {None: _Bare, "add_act": _AddAct, "act_add": _ActAdd}


def _plain(case: Case, draw: int) -> Results | Exception:
    values = _values(case, draw)
    return _attempt(case, values, lambda model: model, DTYPES[case.dtype], None)


def _exact(case: Case, draw: int) -> Results | Exception:
    return _attempt(case, _values(case, draw), lambda model: model, None, None)


def _ours(case: Case) -> tuple[Results | Exception, bool]:
    """pointfuse's results, and whether a fused path ran. Every allocation lies amid canaries."""
    canaries = Canaries()
    with machine(case.backend), _watched() as ran:
        results = _attempt(case, _values(case, 0), lambda model: _fused(case, model), DTYPES[case.dtype], canaries)
    return results, bool(ran)


def _attempt(
    case: Case,
    values: Results,
    wrap: Callable[[nn.Module], Callable[..., Tensor]],
    dtype: torch.dtype | None,
    canaries: Canaries | None,
) -> Results | Exception:
    """The results of a unit of these operands, or what it raised; ``dtype=None`` runs all of it in float64."""
    device = "cuda" if case.backend.endswith("-gpu") else "cpu"

    def placed(name: str) -> Tensor | None:
        if name not in values:
            return None
        t = values[name].to(device, torch.float64 if dtype is None else _dtype_of(case, name))
        layout = {"x": case.x_layout, "weight": case.weight_layout, "residual": case.residual_layout}.get(name, "NCHW")
        t = _laid_out(t, layout)
        return t if canaries is None else canaries.guard(t)

    operands = {name: placed(name) for name in values}
    x, residual = operands["x"], operands.get("residual")
    assert x is not None
    model = _model(case, operands, device)
    records = case.mode != "inference"
    leaves = {"x": x, "residual": residual, **dict(model.named_parameters())}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_(records)
    given = {**{name: t for name, t in leaves.items() if t is not None}, **dict(model.named_buffers())}
    before = {name: _bits(t).clone() for name, t in given.items()}
    autocast = torch.autocast(device, DTYPES[case.autocast]) if case.autocast and dtype else contextlib.nullcontext()
    try:
        with canaries or contextlib.nullcontext():
            runs = wrap(model)
            with autocast, torch.set_grad_enabled(records):
                y = runs(x) if residual is None else runs(x, residual)
            if records:
                z = _argument(case, values)
                grad_out = _gradient(case, values, z).to(device, y.dtype)
                y.backward(grad_out if canaries is None else canaries.guard(grad_out))
    except Overrun as overrun:
        raise Failure(str(overrun)) from overrun
    except Exception as error:
        return error
    may_change = set(dict(model.named_buffers())) if case.trains else set()
    changed = [n for n, t in given.items() if n not in may_change and not torch.equal(_bits(t), before[n])]
    if changed:
        raise Failure(f"{', '.join(changed)} changed")
    results = {"y": y.detach()}
    if records:
        results |= {f"d_{n}": t.grad for n, t in leaves.items() if t is not None and t.grad is not None}
    if case.trains and case.norm is not None and case.tracked:
        counted = case.entry != "function"
        results |= {n: t for n, t in model.named_buffers() if counted or not n.endswith("tracked")}
    return {name: t.cpu() for name, t in results.items()}


def _model(case: Case, operands: dict[str, Tensor | None], device: str) -> nn.Module:
    """The plain unit around these operands."""
    with torch.device("meta"):
        conv = nn.Conv2d(
            case.c_in * case.groups, case.c_out * case.groups, case.kernel, case.stride, (0, 0), case.dilation,
            case.groups, case.bias,
        )  # fmt: skip
        bn = None
        if case.norm is not None:
            affine, channels = case.norm != "plain", case.c_out * case.groups
            bn = nn.BatchNorm2d(channels, case.eps, case.momentum, affine, case.tracked)
    conv.padding = case.padding  # type: ignore[assignment]  # nn.Conv2d's own error for "same" comes too early
    conv.weight = nn.Parameter(operands["weight"], requires_grad=False)  # type: ignore[arg-type]
    if case.bias:
        conv.bias = nn.Parameter(operands["bias"], requires_grad=False)  # type: ignore[arg-type]
    if bn is not None:
        for own, name in (("weight", "gamma"), ("bias", "beta")):
            t = operands.get(name)
            setattr(bn, own, None if t is None else nn.Parameter(t, requires_grad=False))
        if case.tracked:
            bn.running_mean, bn.running_var = operands["mean"], operands["var"]
            bn.num_batches_tracked = torch.tensor(3, device=device)
    model = _UNITS[case.residual](conv, bn, activation_module(case.activation, case.slope))
    return model.train(case.trains)


def _fused(case: Case, model: nn.Module) -> Callable[..., Tensor]:
    """The unit by pointfuse, by the case's way in."""
    if case.entry == "converted":
        return pointfuse.convert(model, recompute=case.mode == "recompute")
    conv, bn, act = model.conv, model.bn, model.act
    order = case.residual or "add_act"
    if case.entry == "module":
        return pointfuse.ConvBNAct2d.from_modules(conv, bn, act, order, case.mode == "recompute")
    if case.entry == "frozen":
        memory_format = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format
        return pointfuse.freeze(model, pack=case.pack, memory_format=memory_format)
    statistics = (None, None) if bn is None else (bn.running_mean, bn.running_var)
    affine = (None, None) if bn is None else (bn.weight, bn.bias)

    own_statistics = bn is not None and (case.trains or not case.tracked)

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return pointfuse.conv_bn_act(
            x, conv.weight, conv.bias, *statistics, *affine, training=own_statistics,
            momentum=case.momentum, eps=case.eps, activation=case.activation, negative_slope=case.slope,
            stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups, residual=residual,
            residual_order=order,
        )  # fmt: skip

    return call


def _argument(case: Case, values: Results) -> Tensor:
    """What the activation is given, in float64."""
    z = _conv(case, values["x"], values["weight"], values.get("bias"))
    if case.norm is not None:
        own = case.trains or not case.tracked
        statistics = (None, None) if own else (values["mean"], values["var"])
        z = F.batch_norm(z, *statistics, values.get("gamma"), values.get("beta"), own, 0.0, case.eps)
    return z + values["residual"] if case.residual == "add_act" else z


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "expanded batch" and t.dim() == 4 and len(t):
        return t[:1].clone().expand_as(t)
    if layout == "expanded plane" and t.dim() == 4:
        return t[..., :1, :1].clone().expand_as(t)
    if t.dim() != 4 or layout not in LAYOUTS:
        return t.clone(memory_format=torch.contiguous_format)
    return LAYOUTS[layout](*t.shape, dtype=t.dtype, device=t.device).copy_(t)


def _bits(t: Tensor) -> Tensor:
    """A tensor of integers that is equal where every bit is."""
    t = t.detach()
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Grows whenever a fused path runs."""
    ran: list[str] = []

    def counted(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)  # or Refused, and PyTorch's operators run
            ran.append(name)
            return result

        return mock.patch.object(owner, name, call)

    paths: list[tuple[Any, str]] = [(aten, "onednn_conv"), (training, "conv_bn_act"), (cuda, "call")]
    if not BACKENDS["triton"].triton_problem():
        from pointfuse.backends.triton import launching

        paths.append((launching, "_partials"))  # which every launch asks for
    with contextlib.ExitStack() as stack:
        for owner, name in paths:
            stack.enter_context(counted(owner, name))
        yield ran


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})"
