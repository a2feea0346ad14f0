"""The training example: it learns as PyTorch alone does, on one process and on two, and survives what ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pointfuse
import pytest
import torch
from conftest import ROOT
from pointfuse import training

sys.path.insert(0, str(ROOT / "examples"))

import train_yolo_head as example

SCRIPT = ROOT / "examples" / "train_yolo_head.py"
SMALL = ("--device", "cpu", "--size", "32", "--width", "8", "--batch", "4")
# Two of these are one of SMALL.
HALF = ("--device", "cpu", "--size", "32", "--width", "8", "--batch", "2", "--sync-bn", "--lr", "0.0001")
# On one thread each: layers this small gain nothing from more, and lose much where other processes run.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TIMEOUT = 120


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(tmp_path: Path, *options: Any) -> list[float]:
    """The losses of a run in this process, of which only the last ones where it resumes."""
    path = tmp_path / "losses.json"
    assert example.main([*SMALL, "--json", str(path), *map(str, options)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))["losses"]


def torchrun(script: Path, *options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *HALF]
    return subprocess.run(
        [*map(str, (*command, *options))], capture_output=True, text=True, env=ENVIRONMENT, timeout=TIMEOUT
    )


def largest_relative_difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def test_every_convolution_is_one_that_pointfuse_fuses() -> None:
    plan = pointfuse.plan(example.make_model(8).train(), torch.randn(2, 3, 32, 32))
    assert [unit.kernel_size for unit in plan.units if unit.bn] == [(3, 3)] * 3 + [(1, 1), (3, 3)] * 3
    assert [(skipped.name, skipped.reason) for skipped in plan.skipped] == [
        ("9", "nothing follows that could be fused")
    ]


@pytest.mark.parametrize(
    ("dtype", "lr", "within"),
    [
        pytest.param(torch.float64, 0.005, 1e-9, id="float64 at the default rate"),
        # LeakyReLU's slope jumps at 0. In fp32 an element that rounding takes to its other side makes another gradient,
        # and at greater rates that grows, between two runs of PyTorch alone too, to 1e-2 within 200 steps.
        pytest.param(torch.float32, 1e-5, 1e-4, id="float32 at a small rate"),
    ],
)
def test_200_steps_lose_what_eager_steps_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lr: float, within: float
) -> None:
    calls = []
    fused = training.conv_bn_act
    monkeypatch.setattr(training, "conv_bn_act", lambda *args, **kwargs: calls.append(0) or fused(*args, **kwargs))
    torch.set_default_dtype(dtype)
    try:
        expected = losses(tmp_path, "--steps", 200, "--lr", lr, "--eager")
        assert not calls
        found = losses(tmp_path, "--steps", 200, "--lr", lr)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(calls) == 9 * 200
    assert largest_relative_difference(found, expected) <= within


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--amp", "bf16"), id="bf16"),
        pytest.param(("--amp", "fp16"), id="fp16 with a scaler"),
        pytest.param(("--recompute",), id="recomputing"),
        pytest.param(("--accumulate", "2"), id="two batches to a step"),
        pytest.param(("--sync-bn",), id="synchronised batch norm of one process"),
        pytest.param(("--eager", "--amp", "bf16"), id="eager in bf16"),
    ],
)
def test_the_loss_falls(tmp_path: Path, options: tuple[str, ...]) -> None:
    found = losses(tmp_path, "--steps", 60, *options)
    assert sum(found[-10:]) < 0.85 * sum(found[:10])


def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    first = losses(tmp_path, "--steps", 5)
    assert losses(tmp_path, "--steps", 5) == first
    assert losses(tmp_path, "--steps", 5, "--seed", 1) != first


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, amp: str) -> None:
    saving = ("--amp", amp, "--checkpoint", tmp_path / "head.pt")
    expected = losses(tmp_path, "--steps", 12, "--amp", amp)
    assert losses(tmp_path, "--steps", 7, *saving) == expected[:7]
    assert losses(tmp_path, "--steps", 12, *saving, "--resume") == expected[7:]
    assert losses(tmp_path, "--steps", 12, *saving, "--resume") == []


def test_a_checkpoint_of_a_converted_model_is_one_of_an_eager_model(tmp_path: Path) -> None:
    saving = ("--lr", 1e-4, "--checkpoint", tmp_path / "head.pt")
    expected = losses(tmp_path, "--lr", 1e-4, "--steps", 6, "--eager")
    losses(tmp_path, "--steps", 3, *saving)
    assert (
        largest_relative_difference(losses(tmp_path, "--steps", 6, *saving, "--eager", "--resume"), expected[3:]) < 1e-5
    )


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path: Path) -> None:
    checkpoint = tmp_path / "head.pt"
    options = [*SMALL, "--eager", "--steps", "1000000", "--save-every", "1", "--checkpoint", str(checkpoint)]
    with subprocess.Popen(
        [sys.executable, SCRIPT, *options], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        wait_for(checkpoint, process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert f"interrupted after step {done}; saved in {checkpoint}; the same command with --resume goes on" in said
    expected = losses(tmp_path, "--eager", "--steps", done + 2)
    saving = ("--steps", done + 2, "--checkpoint", checkpoint)
    assert losses(tmp_path, "--eager", *saving, "--resume") == expected[done:]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < end, f"no {path.name} after {TIMEOUT} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two processes with half of SMALL's batch each."""
    path = tmp_path_factory.mktemp("two") / "losses.json"
    done = torchrun(SCRIPT, "--steps", 12, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))["losses"]


def test_two_processes_lose_what_one_loses_with_the_whole_batch(tmp_path: Path, uninterrupted: list[float]) -> None:
    expected = losses(tmp_path, "--steps", 5, "--lr", 0.0001)
    assert largest_relative_difference(uninterrupted[:5], expected) < 1e-5


def test_a_killed_worker_ends_the_job_and_the_checkpoint_goes_on(tmp_path: Path, uninterrupted: list[float]) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport train_yolo_head as example\n"
        "take = example.Trainer.step\n"
        "def step(self, step, stop):\n"
        "    if (step, self.place.rank) == (7, 1):\n"
        f"        open({str(tmp_path / 'killed')!r}, 'w').write(str(time.time()))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return take(self, step, stop)\n"
        "example.Trainer.step = step\n"
        "sys.exit(example.main())\n",
        encoding="utf-8",
    )
    saving = ("--steps", 12, "--save-every", 5, "--checkpoint", tmp_path / "head.pt", "--json", tmp_path / "losses")
    killed = torchrun(script, *saving)
    ended = time.time()
    assert killed.returncode != 0
    assert (tmp_path / "killed").exists(), killed.stderr
    assert ended - float((tmp_path / "killed").read_text(encoding="utf-8")) < 30
    assert "SIGKILL" in killed.stderr or "-9" in killed.stderr, killed.stderr
    assert not (tmp_path / "losses").exists()
    resumed = torchrun(SCRIPT, *saving, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 5" in resumed.stdout
    assert json.loads((tmp_path / "losses").read_text(encoding="utf-8"))["losses"] == uninterrupted[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param("--steps 0", "--steps: must be a whole number of at least 1, got '0'", id="no steps"),
        pytest.param("--batch two", "--batch: must be a whole number of at least 1, got 'two'", id="batch in words"),
        pytest.param("--lr -1", "--lr: must be a number above 0, got '-1'", id="negative rate"),
        pytest.param("--lr nan", "--lr: must be a number above 0, got 'nan'", id="rate that is no number"),
        pytest.param("--seed -1", "--seed: must be a whole number from 0 to 2^32 - 1, got '-1'", id="negative seed"),
        pytest.param("--size 60", "--size must be a multiple of 8, got 60", id="odd size"),
        pytest.param("--width 7", "--width must be even, got 7", id="odd width"),
        pytest.param("--amp fp8", "--amp: invalid choice: 'fp8'", id="unknown precision"),
        pytest.param("--resume", "--resume needs --checkpoint", id="resume from nothing"),
        pytest.param("--checkpoint nowhere/head.pt", "there is no folder 'nowhere'", id="no folder"),
        pytest.param("--json .", "'.' is a folder", id="folder for a file"),
        pytest.param("--eager --recompute", "which --eager leaves out", id="recompute without pointfuse"),
        pytest.param("--eager --sync-bn --device cpu", "does not run on a CPU", id="PyTorch's SyncBatchNorm on a CPU"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        example.main(options.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        example.main(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "head.pt"

    def refusal(*options: str) -> str:
        with pytest.raises(SystemExit) as raised:
            example.main([*SMALL, "--steps", "1", "--checkpoint", str(path), "--resume", *options])
        return str(raised.value.code)

    assert refusal() == f"there is no checkpoint {path} to go on from: leave out --resume to start anew"
    path.write_text("not a checkpoint", encoding="utf-8")
    assert refusal().startswith(f"{path} cannot be read as a checkpoint: ")
    torch.save(torch.zeros(3), path)
    assert refusal().startswith(f"{path} holds a Tensor; a checkpoint of this script has model, optimizer, ")
    torch.save({"epoch": 3, "weights": 4}, path)
    assert refusal().startswith(f"{path} holds the entries epoch, weights; a checkpoint of this script has ")
    path.unlink()
    losses(tmp_path, "--steps", 1, "--checkpoint", path)
    said = refusal("--width", "16")
    assert said.startswith(f"{path} is a checkpoint of another model than --width 16:\n")
    assert "0.0.weight: [4, 3, 3, 3] in the file, [8, 3, 3, 3] in this model" in said


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ("--checkpoint", tmp_path / "head.pt")
    expected = losses(tmp_path, "--steps", 5)
    losses(tmp_path, "--steps", 3, *saving)

    def fill_the_disk(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            losses(tmp_path, "--steps", 4, *saving, "--resume")
    assert losses(tmp_path, "--steps", 5, *saving, "--resume") == expected[3:]


def test_a_loss_that_is_no_number_ends_the_training_before_it_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "head.pt"
    with pytest.raises(SystemExit, match=r"the loss of step \d+ is (nan|inf): try a smaller --lr than 1e\+20"):
        losses(tmp_path, "--lr", 1e20, "--checkpoint", path, "--save-every", 1000)
    assert not path.exists()


def test_boxes_are_where_the_shapes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "NOISE", 0.0)
    seen = set()
    for index in range(40):
        image, shapes = example.draw(0, index, 96)
        assert torch.equal(example.draw(0, index, 96)[0], image)
        if len(shapes) == 1:
            ((kind, x, y, side),) = shapes
            seen.add(example.CLASSES[kind])
            rows, columns = (image != 0.5).all(0).nonzero().T
            drawn = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            box = [x - side / 2, y - side / 2, x + side / 2, y + side / 2]
            assert drawn == pytest.approx(box, abs=2)
    assert seen == set(example.CLASSES)


def test_targets_are_the_shapes_again() -> None:
    shapes = [(2, 13.0, 42.5, 12.0), (0, 60.25, 8.0, 30.0)]
    targets = example.encode(shapes, 64)
    found = []
    for anchor, row, column in targets[:, 4].nonzero().tolist():
        x, y, w, h, _, kind = targets[anchor, :, row, column].tolist()
        assert w == h
        side = example.ANCHORS[anchor] * 64 * torch.tensor(w).exp().item()
        found.append((int(kind), (column + x) * 8, (row + y) * 8, side))
    assert found == [pytest.approx(shape, rel=1e-5) for shape in shapes]


def test_the_loss_is_the_mean_of_its_shares_and_zero_where_all_is_said() -> None:
    targets = example.make_batch(0, range(4), 32)[1].double()
    maps = torch.randn(4, 24, 4, 4, dtype=torch.float64)
    whole = example.yolo_loss(maps, targets)
    shares = [example.yolo_loss(maps[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(shares).item() / 2, rel=1e-12)
    sure = 100.0
    kinds = torch.nn.functional.one_hot(targets[:, :, 5].long(), 3).movedim(-1, 2)
    said = [targets[:, :, 0:2].logit(), targets[:, :, 2:4], sure * (2 * targets[:, :, 4:5] - 1), sure * (2 * kinds - 1)]
    assert example.yolo_loss(torch.cat(said, 2).flatten(1, 2), targets).item() == pytest.approx(0, abs=1e-5)
