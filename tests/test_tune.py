"""``pointfuse tune``: what is measured, what is kept on disk, and what "auto" makes of it; without a GPU.

Candidates run in Triton's interpreter, and a timer of the test says how long they take.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pointfuse
import pytest
import torch
from conftest import ROOT
from pointfuse import cli, doctor
from pointfuse.backends import aten, calls
from pointfuse.backends import triton as backend
from pointfuse.backends.triton import configs, reports, tables, tuning
from pointfuse.backends.triton.configs import REFERENCE_CHIPS, Config, Entry, ShapeClass
from pointfuse.backends.triton.tuning import Contender, Outcome, Problem
from torch import Tensor, nn

from benchmarks.models.yolov3 import HEADS, last_layer_stack

CPU = torch.device("cpu")
CLASS = ShapeClass.parse("1x1 channels_last half 16x16->16")
OTHER = ShapeClass.parse("3x3 NCHW fp32 64x32->32")
CONFIG = Config(64, 16, 64, 3, 4)
FAST, SLOW = Entry(CONFIG, 1.0, 2.0), Entry(CONFIG, 2.0, 1.0)
SMALL = Problem((1, 16, 3, 4), 16, (1, 1))
WIDE = Problem((2, 16, 3, 4), 24, (3, 3), padding=(1, 1), layout="NCHW")
TRIED = [CONFIG, Config(64, 32, 64, 3, 4), Config(64, 16, 128, 3, 4), Config(64, 64, 64, 3, 4)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the tables of a test lie, none at first."""
    monkeypatch.setenv("POINTFUSE_CACHE_DIR", str(tmp_path / "cache"))
    tables.forget()
    yield tmp_path / "cache"
    tables.forget()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend serves tensors of the CPU, and tunes with four candidates."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off, because there is a GPU")
    if reason := backend.triton_problem():
        pytest.skip(reason)
    monkeypatch.setattr(calls, "on_gpu", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(backend, "unusable_reason", lambda: None)
    monkeypatch.setattr(tuning, "candidates", lambda shape, chip: iter(TRIED))


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def table_of(*entries: tuple[str, Any]) -> dict[str, Any]:
    return {"format": 1, "device": "cpu", "versions": {}, "entries": dict(entries)}


def test_nothing_measured_is_an_empty_table() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.measured(CPU) == {}
    assert not tables.some_faster()
    assert not tables.some_measured()


def test_entries_come_back_as_they_were_put(folder: Path) -> None:
    tables.add(CPU, {CLASS: FAST})
    tables.add(CPU, {OTHER: SLOW})
    assert tables.measured(CPU) == {CLASS: FAST, OTHER: SLOW}
    tables.add(CPU, {CLASS: SLOW})
    assert tables.measured(CPU) == {CLASS: SLOW, OTHER: SLOW}
    data = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    assert (data["format"], data["device"]) == (1, "cpu")
    assert data["versions"].keys() == {"pointfuse", "triton", "torch"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["entries"][str(OTHER)] == SLOW.to_dict()


def test_each_kind_of_gpu_has_a_file_of_a_safe_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect.signature(torch.cuda.get_device_name).bind(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA X/{device.index} (80GB)")
    assert tables.path_of(torch.device("cuda:1")) == folder / "NVIDIA-X-1-80GB-.json"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"POINTFUSE_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/pointfuse"),
        ({"XDG_CACHE_HOME": "xdg"}, "/users/me/.cache/pointfuse"),
        ({}, "/users/me/.cache/pointfuse"),
    ],
    ids=["our own variable", "the system's", "a relative path of the system's", "none"],
)
def test_the_folder(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POINTFUSE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/users/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tables.folder() == Path(expected)


def test_a_file_is_read_once_until_it_is_forgotten(folder: Path) -> None:
    tables.add(CPU, {CLASS: FAST})
    assert list(tables.measured(CPU)) == [CLASS]
    write(folder / "cpu.json", table_of((str(OTHER), FAST.to_dict())))
    assert list(tables.measured(CPU)) == [CLASS]
    backend.loaded().forget_plans()
    assert list(tables.measured(CPU)) == [OTHER]


WRONG_FILES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "Expecting property name"),
    "cut short": (json.dumps(table_of())[:-2], "Expecting"),
    "of a later format": (table_of() | {"format": 2}, "it is no table of format 1"),
    "a list": ([], "it is no table of format 1"),
    "without entries": ({"format": 1}, "it is no table of format 1"),
    "nested too deeply": ("[" * 100_000, "it is nested too deeply"),
}


@pytest.mark.parametrize(("content", "reason"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_is_not_right_is_as_good_as_none(content: Any, reason: str, folder: Path) -> None:
    path = folder / "cpu.json"
    write(path, content)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=f"{path} cannot be used \\({reason}.*`pointfuse tune` makes it anew"):
        assert tables.measured(CPU) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.measured(CPU) == {}
        assert not tables.some_faster()
        tables.add(CPU, {CLASS: FAST})
        assert tables.measured(CPU) == {CLASS: FAST}
    assert Path(f"{path}.corrupt").read_bytes() == before


def test_bytes_that_are_no_text_and_a_folder_are_no_table(folder: Path) -> None:
    folder.mkdir()
    path = folder / "cpu.json"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert tables.measured(CPU) == {}
    path.unlink()
    path.mkdir()
    tables.forget()
    with pytest.warns(UserWarning, match="cannot be used .*Is a directory"):
        assert tables.measured(CPU) == {}


WRONG_ENTRIES: dict[str, tuple[str, Any]] = {
    "no class": ("5x5 channels_last half 16x16->16", FAST.to_dict()),
    "no entry": (str(OTHER), [1, 2]),
    "a size that is no number": (str(OTHER), FAST.to_dict() | {"stages": "many"}),
    "a size without end": (str(OTHER), FAST.to_dict() | {"stages": float("inf")}),
    "a size too many": (str(OTHER), FAST.to_dict() | {"clusters": 2}),
}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
def test_an_entry_that_is_not_right_costs_no_other(wrong: tuple[str, Any], folder: Path) -> None:
    write(folder / "cpu.json", table_of(wrong, (str(CLASS), FAST.to_dict())))
    with pytest.warns(UserWarning, match="cpu.json cannot be used in part .*`pointfuse tune` makes it anew"):
        assert tables.measured(CPU) == {CLASS: FAST}
    tables.add(CPU, {OTHER: FAST})
    assert tables.measured(CPU) == {CLASS: FAST, OTHER: FAST}


def test_what_was_written_since_a_table_was_read_stays(folder: Path) -> None:
    assert tables.measured(CPU) == {}
    write(folder / "cpu.json", table_of((str(OTHER), SLOW.to_dict())))
    tables.add(CPU, {CLASS: FAST})
    assert tables.measured(CPU) == {CLASS: FAST, OTHER: SLOW}


def test_processes_that_tune_at_once_lose_nothing(folder: Path) -> None:
    code = (
        "import sys, torch\n"
        "from pointfuse.backends.triton import tables\n"
        "from pointfuse.backends.triton.configs import Config, Entry, ShapeClass\n"
        "for i in range(20):\n"
        "    shape = ShapeClass.of('1x1', 'NCHW', 'half', 1 << i, int(sys.argv[1]), 16)\n"
        "    tables.add(torch.device('cpu'), {shape: Entry(Config(64, 16, 64, 3, 4), i, 1.0)})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, channels]) for channels in ("16", "32", "64")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tables.measured(CPU)
    assert Counter(shape.c_out for shape in found) == {16: 20, 32: 20, 64: 20}
    assert all(entry.us == shape.pixels.bit_length() - 1 for shape, entry in found.items())
    assert sorted(p.name for p in folder.iterdir()) == ["cpu.json", "cpu.json.lock"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.add(CPU, {CLASS: FAST})

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        message = f"cannot be kept in {folder / 'cpu.json'} .*No space left on device.*: set POINTFUSE_CACHE_DIR to a"
        with pytest.raises(tables.Unwritable, match=message):
            tables.add(CPU, {OTHER: FAST})
    assert tables.measured(CPU) == {CLASS: FAST}
    assert sorted(p.name for p in folder.iterdir()) == ["cpu.json", "cpu.json.lock"]


def test_a_folder_that_cannot_be_made_is_an_error_of_writing_alone(folder: Path) -> None:
    folder.write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.measured(CPU) == {}
        assert not tables.some_faster()
    with pytest.raises(tables.Unwritable, match=r"FileExistsError.*set POINTFUSE_CACHE_DIR"):
        tables.add(CPU, {CLASS: FAST})


@pytest.mark.parametrize("layout", tuning.FORMATS)
@pytest.mark.parametrize("batch", [1, 8])
def test_by_default_the_convolutions_of_yolov3s_heads_are_tuned(batch: int, layout: str) -> None:
    found = set()
    for head in HEADS:
        shape = (batch, HEADS[head].c_in, head, head)
        for _, c in doctor.convolutions(last_layer_stack(head, num_classes=80), shape):
            found.add((c.input_shape, c.c_out, c.kernel_size, c.geometry.stride, c.geometry.padding, c.activation))
    problems = list(tuning.yolov3([batch], ["bf16"], layout))
    assert {(p.input_shape, p.c_out, p.kernel, p.stride, p.padding, p.activation) for p in problems} == found
    assert {(p.dtype, p.layout) for p in problems} == {("bf16", layout)}


@pytest.mark.parametrize(
    "problem",
    [
        SMALL,
        WIDE,
        Problem((1, 16, 5, 4), 16, (3, 3), (2, 1), (1, 1), "tf32"),
        Problem((2, 1, 3, 3), 16, (1, 1), (1, 1), (2, 2), "fp32", "NCHW"),
    ],
    ids=["1x1", "3x3", "stride", "one channel"],
)
def test_a_problem_is_of_the_class_that_its_call_gets(problem: Problem, interpreter: None) -> None:
    launching = backend.loaded()
    launching.forget_plans()
    x, weight, bias = problem.tensors(CPU)
    assert (x.dtype, x.shape) == (tuning.DTYPES[problem.dtype][0], problem.input_shape)
    assert weight.is_contiguous(memory_format=tuning.FORMATS[problem.layout])
    activation = pointfuse.problem.Activation(problem.activation)
    with tuning._products(problem):
        backend.conv_bn_act(x, weight, bias, None, activation, problem.geometry)
    (launch,) = launching._launches.values()
    assert launch.plan.shape == problem.shape_class


def test_problems_of_one_class_are_tuned_once() -> None:
    like = Problem((1, 15, 4, 4), 16, (1, 1), dtype="fp16")
    assert tuning.distinct([SMALL, like, WIDE]) == {SMALL.shape_class: SMALL, WIDE.shape_class: WIDE}


def by_pixels(contender: Contender) -> float:
    """Smaller tiles are faster; PyTorch's operators take 20 us."""
    return 20.0 if contender.config is None else contender.config.block_pixels + contender.config.block_k / 1000


def tune(*problems: Problem, timer: Callable[[Contender], float] = by_pixels, **options: Any) -> list[Outcome]:
    return tuning.tune(problems, CPU, aten=aten.conv_bn_act, timer=timer, **options)


def test_the_fastest_configuration_is_kept_with_its_time_and_atens(interpreter: None) -> None:
    (outcome,) = tune(SMALL)
    assert outcome == Outcome(SMALL.shape_class, Entry(CONFIG, 16.064, 20.0), True, 4, Counter())
    assert tables.measured(CPU) == {SMALL.shape_class: outcome.entry}
    (outcome,) = tune(WIDE, timer=lambda c: 1.0 if c.config is None else 100 - by_pixels(c))
    assert outcome.entry == Entry(TRIED[3], 35.936, 1.0)
    assert not outcome.entry.faster_than_aten
    assert tables.measured(CPU).keys() == {SMALL.shape_class, WIDE.shape_class}


@pytest.mark.parametrize("dtype", tuning.DTYPES)
@pytest.mark.parametrize("layout", tuning.FORMATS)
def test_candidates_of_every_dtype_and_layout_are_right(dtype: str, layout: str, interpreter: None) -> None:
    settings = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark
    (outcome,) = tune(Problem((2, 16, 3, 4), 24, (3, 3), (1, 1), (1, 1), dtype, layout, "silu"))
    assert (outcome.tried, outcome.skipped) == (4, {})
    assert outcome.shape.products == {"fp32": "fp32", "tf32": "tf32"}.get(dtype, "half")
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark) == settings


def test_configurations_that_make_one_plan_are_timed_once(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split = [Config(64, 16, 64, 3, 4, parts) for parts in (1, 2, 4)]  # of one step
    monkeypatch.setattr(tuning, "candidates", lambda shape, chip: iter(split))
    (outcome,) = tune(SMALL)
    assert outcome.tried == 1
    assert outcome.entry is not None
    assert outcome.entry.config.split_k == 1


def test_what_fails_or_is_wrong_is_skipped_and_counted(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes nothing, into memory that holds the right answer; one raises; one is off by little."""
    launching = backend.loaded()
    write = launching.Launch.write

    def spoiled(launch: Any, y: Tensor, *rest: Any) -> None:
        tile = launch.plan.config
        if tile.block_k == 128:
            raise RuntimeError("out of resource: shared memory\nand more")
        if tile.block_pixels != 32:
            write(launch, y, *rest)
        if tile.block_pixels == 64:
            y[-1, -1, -1, -1] += 0.1

    monkeypatch.setattr(launching.Launch, "write", spoiled)
    (outcome,) = tune(SMALL, timer=lambda contender: -by_pixels(contender))
    assert outcome.entry == Entry(CONFIG, -16.064, -20.0)
    assert outcome.tried == 1
    raised, wrong = sorted(outcome.skipped.items())
    assert raised == ("RuntimeError: out of resource: shared memory", 1)
    assert wrong[0].startswith("its error against float64 is above ")
    assert wrong[1] == 2


def test_a_class_in_which_nothing_runs_gets_no_entry_and_others_theirs(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(launch: Any, *rest: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(backend.loaded().Launch, "write", fail)
        (outcome,) = tune(SMALL)
    assert (outcome.entry, outcome.tried) == (None, 0)
    assert outcome.skipped == {"OutOfMemoryError: CUDA out of memory": 4}
    too_large = lambda *unit: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))  # noqa: E731
    (outcome,) = tuning.tune([SMALL], CPU, aten=too_large, timer=by_pixels)
    assert (outcome.entry, outcome.skipped) == (None, {"OutOfMemoryError: no memory": 1})
    assert tables.measured(CPU) == {}
    assert [o.entry is not None for o in tune(SMALL, WIDE)] == [True, True]


def test_candidates_take_turns_and_the_faster_half_goes_on(interpreter: None) -> None:
    order: list[Config | None] = []
    tune(SMALL, timer=lambda contender: order.append(contender.config) or by_pixels(contender))
    first, second, last = order[:20], order[20:40], order[40:]
    assert all(Counter(first[i : i + 4]) == Counter(TRIED) for i in range(0, 20, 4))
    assert [first[i] for i in range(0, 16, 4)] == TRIED
    assert Counter(second) == {CONFIG: 10, TRIED[2]: 10}
    assert Counter(last) == {CONFIG: 100, None: 100}
    assert last[:4] == [CONFIG, None, None, CONFIG]


def test_pytorchs_operators_run_by_cudnns_fastest_algorithm(interpreter: None) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def plain(x: Tensor, *rest: Any) -> Tensor:
        seen.append((x.dtype, torch.backends.cudnn.benchmark))
        return aten.conv_bn_act(x, *rest)

    timer = lambda contender: contender.run() is None or 1.0  # noqa: E731
    tuning.tune([SMALL], CPU, aten=plain, timer=timer)
    assert set(seen) == {(torch.float64, False), (torch.bfloat16, True)}


def test_progress_goes_from_nothing_to_all_and_names_the_class(interpreter: None) -> None:
    told: list[tuple[float, int, str]] = []
    tables.add(CPU, {SMALL.shape_class: FAST})
    third = Problem((1, 16, 3, 4), 16, (1, 1), layout="NCHW")
    tune(SMALL, WIDE, third, progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0.0, 2.0)
    assert {step[1] for step in told} == {2}
    assert list(dict.fromkeys(step[2] for step in told)) == [str(WIDE.shape_class), str(third.shape_class)]


class Interrupting:
    """Times as `by_pixels`, until the second class."""

    def __init__(self) -> None:
        self.left = 4 * 5 + 2 * 10 + 2 * 100

    def __call__(self, contender: Contender) -> float:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return by_pixels(contender)


def test_an_interrupt_loses_the_class_in_hand_and_the_next_run_goes_on(interpreter: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(SMALL, WIDE, timer=Interrupting())
    assert list(tables.measured(CPU)) == [SMALL.shape_class]
    first, second = tune(SMALL, WIDE, timer=lambda contender: 7.0)
    assert first == Outcome(SMALL.shape_class, Entry(CONFIG, 16.064, 20.0), measured=False)
    assert (second.measured, second.entry) == (True, Entry(CONFIG, 7.0, 7.0))
    assert not any(outcome.measured for outcome in tune(SMALL, WIDE, timer=Interrupting()))
    again = tune(SMALL, WIDE, timer=lambda contender: 9.0, again=True)
    assert [(o.measured, o.entry) for o in again] == [(True, Entry(CONFIG, 9.0, 9.0))] * 2


def test_calls_are_planned_anew_afterwards(interpreter: None) -> None:
    """By the entry of their class, also where tuning was interrupted."""
    launching = backend.loaded()
    x, weight, bias = SMALL.tensors(CPU)
    unit = (x, weight, bias, None, pointfuse.problem.IDENTITY, SMALL.geometry)

    def planned() -> Config:
        backend.conv_bn_act(*unit)
        (launch,) = launching._launches.values()
        return launch.plan.config

    launching.forget_plans()
    assert planned() != TRIED[3]
    tune(SMALL, timer=lambda c: -by_pixels(c))
    assert planned() == TRIED[3]
    with pytest.raises(KeyboardInterrupt):
        tune(SMALL, WIDE, timer=Interrupting(), again=True)
    assert planned() == CONFIG


def test_nothing_is_measured_where_it_could_not_be_kept(folder: Path, interpreter: None) -> None:
    folder.write_text("a file")
    with pytest.raises(tables.Unwritable):
        tune(SMALL, timer=lambda contender: pytest.fail("it was measured"))


def test_tuning_refuses_to_run_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="which the capture of a CUDA graph forbids: tune before it"):
        tuning.tune([SMALL], torch.device("cuda"), aten=aten.conv_bn_act)


def test_tuning_says_why_the_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "unusable_reason", lambda: "there is no GPU")
    with pytest.raises(RuntimeError, match="the triton backend cannot run here: there is no GPU"):
        tune(SMALL)


class FakeEvents:
    """Events on a device whose clock goes on by what is launched, and a host that takes 30 us for a launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flush_us: float, call_us: float) -> None:
        self.host = self.device = 0.0
        self.flush_us, self.call_us = flush_us, call_us
        self.flushes = 0
        signature = inspect.signature(torch.cuda.Event.__new__)

        def event(**options: Any) -> Any:
            signature.bind(torch.cuda.Event, **options)
            assert options == {"enable_timing": True}
            made = SimpleNamespace(at=0.0)
            made.record = lambda: setattr(made, "at", self.device)
            made.query = lambda: made.at <= self.host
            made.synchronize = lambda: setattr(self, "host", max(self.host, made.at))
            made.elapsed_time = lambda end: (end.at - made.at) / 1e3
            return made

        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20))
        monkeypatch.setattr(tuning, "_MIN_FLUSH_BYTES", 1 << 10)
        monkeypatch.setattr(Tensor, "zero_", lambda buffer: self.flush(buffer))

    def flush(self, buffer: Tensor) -> None:
        assert buffer.numel() * buffer.element_size() == 2 << 20
        self.flushes += 1
        self.device = max(self.host, self.device) + self.flush_us

    def call(self) -> Tensor:
        self.host += 30.0
        self.device = max(self.host, self.device) + self.call_us
        return torch.empty(0)


@pytest.mark.parametrize(("flush_us", "flushes"), [(100.0, 1), (12.0, 1 + 2 + 4)], ids=["a quick host", "a slow host"])
def test_only_the_gpus_time_is_taken(flush_us: float, flushes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEvents(monkeypatch, flush_us, call_us=5.0)
    timer = tuning.GpuTimer(CPU)
    assert timer(Contender(None, fake.call)) == pytest.approx(5.0)
    assert fake.flushes == flushes
    assert timer(Contender(None, fake.call)) == pytest.approx(5.0)


def test_a_host_that_is_always_late_is_timed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEvents(monkeypatch, flush_us=0.0, call_us=5.0)
    assert tuning.GpuTimer(CPU)(Contender(None, fake.call)) == pytest.approx(35.0)
    assert fake.flushes == 1 + 2 + 4 + 8 + 16


def test_what_does_not_compile_is_skipped_and_counted() -> None:
    def fail() -> None:
        raise ValueError("no such layout\nand more")

    contenders = [Contender(None, lambda: torch.empty(0), work) for work in (fail, lambda: None, fail)]
    skipped: Counter[str] = Counter()
    told: list[float] = []
    assert tuning._compiled(contenders, skipped, told.append) == [contenders[1]]
    assert skipped == {"ValueError: no such layout": 2}
    assert told == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_a_kernel_that_breaks_the_gpu_ends_tuning_and_is_named(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def wait(device: torch.device) -> None:
        runs.append(device)
        if len(runs) > 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(tuning, "_wait", wait)
    message = "Config\\(block_channels=64, block_pixels=32.* ended all use of the GPU.*illegal memory access was"
    with pytest.raises(tuning.GpuLost, match=message):
        tune(SMALL, WIDE)
    assert list(tables.measured(CPU)) == [SMALL.shape_class]


def test_this_machines_gpu_can_be_tuned() -> None:
    if reason := backend.unusable_reason():
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    (outcome,) = tuning.tune([SMALL], device, aten=aten.conv_bn_act)
    assert outcome.entry is not None, outcome.skipped
    assert outcome.tried > sum(outcome.skipped.values())
    for us in (outcome.entry.us, outcome.entry.aten_us):
        assert us is not None
        assert 0.5 < us < 10_000
    assert tables.measured(device) == {SMALL.shape_class: outcome.entry}
    capture = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream())
    with capture, pytest.raises(RuntimeError, match="which the capture of a CUDA graph forbids"):
        tuning.tune([SMALL], device, aten=aten.conv_bn_act)


def test_calls_of_torch_cuda_fit_their_signatures() -> None:
    """Those that need a GPU, and that no fake of these tests holds against what it stands in for."""
    device = torch.device("cuda", 0)
    for function, arguments in (
        (torch.cuda.synchronize, (device,)),
        (torch.cuda.get_device_properties, (device,)),
        (torch.cuda.current_device, ()),
        (torch.cuda.is_current_stream_capturing, ()),
        (torch.cuda.device, (device,)),
        (torch.cuda.Event.query, ("self",)),
        (torch.cuda.Event.record, ("self",)),
        (torch.cuda.Event.synchronize, ("self",)),
        (torch.cuda.Event.elapsed_time, ("self", "end")),
    ):
        inspect.signature(function).bind(*arguments)


COMPILES = """
import os, sys, torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from pointfuse.backends import aten, calls, triton as backend
from pointfuse.backends.triton import tuning
from pointfuse.backends.triton.configs import Config

target = GPUTarget("cuda", 90, 32)
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target))
launched, compiled = [], []

def handles(kernel):
    kernel._run, kernel.function = lambda *a: launched.append(kernel), 0

CompiledKernel._init_handles = handles
triton.knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(len(launched))
calls.on_gpu = lambda tensor: True
backend.unusable_reason = lambda: None
tuning._error = lambda actual, exact: 0.0
tuning.candidates = lambda shape, chip: iter([Config(64, 16, 64, 3, 4), Config(64, 16, 64, 3, 4, 2)])
timer = lambda contender: contender.config is None or contender.run() is None or contender.config.split_k
(outcome,) = tuning.tune(
    [tuning.Problem((1, 2048, 4, 4), 64, (1, 1))], torch.device("cpu"), aten=aten.conv_bn_act, timer=timer)
print(outcome.tried, dict(outcome.skipped), compiled, len({kernel.hash for kernel in launched}), len(launched) > 100)
print({kernel.metadata.enable_fp_fusion for kernel in launched})
"""


def test_what_is_compiled_in_threads_is_what_is_launched(tmp_path: Path) -> None:
    """By Triton's own compiler, for Hopper: two configurations, of which one has a second kernel, each once.

    Whatever Triton does of its own accord, a product is rounded with what it is added to.
    """
    if reason := backend.triton_problem():
        pytest.skip(reason)
    triton = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRITON_DEFAULT_FP_FUSION": "0"}
    environment = {**os.environ, **triton}
    command = [sys.executable, "-c", COMPILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == ["2 {} [0, 0, 0] 3 True", "{True}"], done.stderr


@pytest.fixture
def command(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pointfuse tune` finds a GPU, which is the interpreter, and two classes."""
    monkeypatch.setattr(cli, "_gpu", lambda: CPU)
    monkeypatch.setattr(tuning, "GpuTimer", lambda device: by_pixels)
    monkeypatch.setattr(tuning, "yolov3", lambda batches, dtypes, layout: iter([SMALL, WIDE]))


def test_the_command_measures_and_prints(command: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "configuration", "us", "ATen", "us", "times", "as", "fast", "skipped"]
    assert lines[1].split() == [*str(SMALL.shape_class).split(), "64x16x64,", "3", "stages,", "4", "warps",
                                "16.1", "20.0", "1.25", "0"]  # fmt: skip
    assert lines[-2].startswith("2 of 2 shape classes measured now; 2 faster than PyTorch's own operators")
    assert lines[-1] == f"kept in {folder / 'cpu.json'}"
    assert cli.main(["tune", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["device"], data["table"]) == ("cpu", str(folder / "cpu.json"))
    assert data["classes"][0] == {
        "class": str(SMALL.shape_class), "measured_now": False, "tried": 0, "skipped": {},
        **Entry(CONFIG, 16.064, 20.0).to_dict(),
    }  # fmt: skip
    assert cli.main(["tune", "--again"]) == 0
    assert "2 of 2 shape classes measured now" in capsys.readouterr().out


def test_an_interrupted_command_says_what_is_kept(
    command: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "GpuTimer", lambda device: Interrupting())
    assert cli.main(["tune"]) == 130
    expected = f"pointfuse: interrupted; 1 of 2 shape classes are kept in {folder / 'cpu.json'}, and the same command"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
    monkeypatch.setattr(tuning, "GpuTimer", lambda device: by_pixels)
    assert cli.main(["tune"]) == 0
    assert "1 of 2 shape classes measured now" in capsys.readouterr().out


def test_a_command_in_which_a_class_gets_nothing_fails(
    command: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(launch: Any, *rest: Any) -> None:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(backend.loaded().Launch, "write", fail)
    assert cli.main(["tune"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "none ran" in lines[1]
    assert "skipped 8: RuntimeError: out of resource" in lines


def test_a_broken_gpu_exits_with_1(
    command: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*arguments: Any, **options: Any) -> None:
        raise tuning.GpuLost("a kernel ended it")

    monkeypatch.setattr(tuning, "tune", lose)
    assert cli.main(["tune"]) == 1
    assert "pointfuse: a kernel ended it; 0 of 2 shape classes are kept in " in capsys.readouterr().err


def test_a_table_that_cannot_be_written_exits_with_2(
    command: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file")
    assert cli.main(["tune"]) == 2
    assert "set POINTFUSE_CACHE_DIR to a folder that can be written" in capsys.readouterr().err


def test_without_rich_the_command_says_what_to_install(
    command: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["tune"]) == 2
    assert "pip install 'pointfuse[triton]'" in capsys.readouterr().err


def test_without_a_gpu_the_command_gives_the_backends_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "unusable_reason", lambda: "there is none")
    assert cli.main(["tune"]) == 2
    said = "pointfuse: there is nothing to tune here: the triton backend cannot run: there is none\n"
    assert capsys.readouterr().err == said


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(device: torch.device) -> None:
        assert device == torch.device("cuda:1")
        raise pointfuse.problem.Refused("its GPU has compute capability 7.5, the kernels need 8.0")

    monkeypatch.setattr(backend, "unusable_reason", lambda: None)
    monkeypatch.setattr(backend, "loaded", lambda: SimpleNamespace(chip_of=refuse))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cli.main(["tune"]) == 2
    assert "its GPU has compute capability 7.5" in capsys.readouterr().err


class Tiny(nn.Module):
    """Three convolutions that the kernels serve, two of them alike, and two that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, padding="same"), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.reflected = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.reflected(self.depthwise(self.body(self.stem(x))))


class Grouped(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, groups=2)


def test_a_models_own_convolutions_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    model = [f"{__name__}:Tiny", "--input", "1x3x32x32", "--device", "sm_80"]
    assert cli.main(["tune", *model, "--list", "--batch", "1,4", "--dtype", "bf16,fp16,tf32", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device"] == "sm_80"
    assert [row["class"] for row in data["classes"]] == [
        f"3x3 channels_last {products} {pixels}x{channels}->64"
        for pixels in (256, 1024)
        for products in ("half", "tf32")
        for channels in (4, 64)
    ]
    for row in data["classes"]:
        shape = ShapeClass.parse(row["class"])
        chip = REFERENCE_CHIPS["sm_80"]
        assert row["candidates"] == len(list(configs.candidates(shape, chip)))
        assert row["source"] == "shipped for the nearest"
        assert row.items() >= Entry(configs.choose(shape, chip, {})).to_dict().items()
    assert cli.main(["tune", *model, "--list", "--layout", "NCHW"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["3x3", "NCHW", "half", "256x4->64"], ["3x3", "NCHW", "half", "256x64->64"]
    ]  # fmt: skip
    assert lines[-1].startswith("2 shape classes, ")
    assert lines[-1].endswith(" candidates, on sm_80")


def test_the_default_list_is_of_thirty_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "unusable_reason", lambda: "there is no GPU")
    assert cli.main(["tune", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("30 shape classes, ")
    shapes = tuning.distinct(tuning.yolov3([1, 8, 64], ["bf16"], "channels_last"))
    for line, shape in zip(lines[1:], shapes, strict=False):
        assert line.startswith(f"{shape} ")
        assert ("shipped for the nearest" in line) == (shape not in configs.shipped("sm_90"))


def test_the_list_shows_what_was_measured_here(command: None, capsys: pytest.CaptureFixture[str]) -> None:
    tables.add(CPU, {SMALL.shape_class: FAST})
    assert cli.main(["tune", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-9:] == ["64x16x64,", "3", "stages,", "4", "warps", "measured", "here", "1.0", "2.0"]
    assert lines[-1].endswith(" candidates, on cpu")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "sm_80"], "--device goes with --list"),
        (["--input", "1x3x8x8"], "--input goes with MODEL"),
        ([f"{__name__}:Grouped", "--input", "1x4x8x8"], "Grouped has no convolution that the kernels serve"),
        ([f"{__name__}:Tiny", "--input", "1x4x8x8"], "Tiny cannot run on an input that has a shape alone, 1x4x8x8: "),
        (["nothing"], "MODEL is 'nothing'; it must be pkg.module:callable"),
    ],
)
def test_what_cannot_be_tuned_says_why(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "bf16,fp8"], "'fp8' is no dtype; the names are bf16, fp16, fp32, tf32"),
        (["--batch", "1,0"], "'0' is no count; write a number from 1"),
        (["--list", "--device", "h100"], "invalid choice: 'h100'"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune", *argv])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_table_of_nothing_measured_says_so() -> None:
    report = reports.Tuned("cpu", Path("x.json"), (Outcome(CLASS, Entry(CONFIG), measured=False),))
    assert report.complete
    assert str(report).splitlines()[1].split()[-4:] == ["-", "-", "-", "-"]
