"""`make gpu-check`: what its table, its file and its exit code say of parts that pass, fail, are skipped or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from conftest import ROOT
from gpu_check import GPU_TESTS, LEAK_TESTS, STAGES, Part

MACHINE = {
    "problem": "",
    "device": "NVIDIA Stub",
    "driver": "580.1",
    "commit": "abc123",
    "dirty": False,
    "versions": {"python": "3.11", "cuda": "13.0", "torch": "2.13", "triton": None},
    "backends": {
        "cuda": {"usable": True, "reason": ""},
        "triton": {"usable": False, "reason": "Triton is not installed"},
    },
}
FILES = {
    "passing": "def test_one(): pass\ndef test_two(): pass\n",
    "failing": "def test_right(): pass\ndef test_wrong(): assert 1 == 2, 'one is not two'\n",
    "broken": "import there_is_no_such_module\n",
    "skipped": """
        import pytest
        @pytest.mark.parametrize("i", [1, 2])
        def test_two_gpus(i): pytest.skip("there are no two GPUs")
    """,
    "partly": "import pytest\ndef test_one(): pass\ndef test_other(): pytest.skip('there are no two GPUs')\n",
    "hanging": "import time\ndef test_quick(): pass\ndef test_hangs(): time.sleep(600)\n",
    "teardown": """
        import pytest
        @pytest.fixture
        def late():
            yield
            raise RuntimeError("too late")
        def test_one(late): pass
    """,
    "dying": "import os\ndef test_dies(): os._exit(7)\n",
}


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Part]:
    """A part for each of the files, that passes, fails, and so on."""
    found = {}
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, source in FILES.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(textwrap.dedent(source))
        found[name] = Part(name, 60, "", (str(path),))
    return found


def check(stages: Any, tmp_path: Path, *arguments: str, machine: dict[str, Any] = MACHINE) -> tuple[int, dict]:
    """The exit code, and what `--json` wrote."""
    path = tmp_path / "outcome.json"
    given = ["--folder", str(tmp_path / "logs"), "--json", str(path), *arguments]
    code = gpu_check.main(given, stages, lambda: machine)
    return code, json.loads(path.read_text()) if path.exists() else {}


def outcomes(content: dict) -> dict[str, str]:
    return {part["name"]: part["outcome"] for part in content["parts"]}


def test_all_parts_pass(parts: dict[str, Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = check([[parts["passing"], parts["partly"]], [parts["skipped"]]], tmp_path)
    assert code == 0
    assert content["outcome"] == "passed"
    assert outcomes(content) == {"passing": "passed", "partly": "passed", "skipped": "skipped"}
    passing, partly, skipped = content["parts"]
    assert (passing["passed"], passing["failed"], passing["skipped"], passing["reasons"]) == (2, 0, 0, [])
    assert (partly["passed"], partly["skipped"], partly["reasons"]) == (1, 1, ["1 skipped: there are no two GPUs"])
    assert (skipped["passed"], skipped["reasons"]) == (0, ["2 skipped: there are no two GPUs"])
    assert all(0 < part["seconds"] < 60 == part["limit"] for part in content["parts"])
    said = capsys.readouterr().out
    assert re.search(r"partly\W+passed\W+1 passed, 1 skipped\W+\d+\W+60\W+1 skipped: there are no two GPUs", said)
    assert "device: NVIDIA Stub, driver 580.1\n" in said
    assert "versions: python 3.11, cuda 13.0, torch 2.13\n" in said
    assert "commit: abc123\n" in said
    assert "backend cuda: usable\nbackend triton: not usable: Triton is not installed\ngpu-check: passed" in said


@pytest.mark.parametrize(
    ("name", "counts", "reason"),
    [
        ("failing", (1, 1, 0), "test_failing.py::test_wrong: AssertionError: one is not two"),
        ("broken", (0, 1, 0), "No module named 'there_is_no_such_module'"),
        ("teardown", (0, 1, 0), "test_teardown.py::test_one: RuntimeError: too late"),
        ("dying", (0, 0, 0), "exit code 7: "),
    ],
)
def test_a_part_fails_and_the_others_go_on(
    name: str, counts: tuple[int, ...], reason: str, parts: dict[str, Part], tmp_path: Path
) -> None:
    code, content = check([[parts[name]], [parts["passing"]]], tmp_path)
    assert code == 1
    assert content["outcome"] == "failed"
    assert outcomes(content) == {name: "failed", "passing": "passed"}
    part = content["parts"][0]
    assert (part["passed"], part["failed"], part["skipped"]) == counts
    assert reason in " ".join(part["reasons"])


def test_no_test_at_all_is_a_failure(parts: dict[str, Part], tmp_path: Path) -> None:
    nothing = Part("nothing", 60, "", parts["passing"].tests, "no_such_test")
    code, content = check([[nothing]], tmp_path)
    assert code == 1
    assert content["parts"][0]["reasons"] == ["no test was found"]


def test_a_part_that_hangs_is_out_of_time_and_says_in_which_test(parts: dict[str, Part], tmp_path: Path) -> None:
    hanging = Part("hanging", 6, "", parts["hanging"].tests)
    began = time.monotonic()
    code, content = check([[hanging, parts["passing"]]], tmp_path)
    assert code == 1
    assert time.monotonic() - began < 30
    assert outcomes(content) == {"hanging": "out of time", "passing": "passed"}
    part = content["parts"][0]
    assert part["passed"] == 1
    assert part["reasons"] == ["in test_hanging.py::test_hangs"]
    assert part["limit"] == 6 <= part["seconds"] < 12


def test_the_processes_of_a_part_share_its_tests(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    both = Part("both", 60, "", (*parts["passing"].tests, *parts["partly"].tests), processes=8)
    code, content = check([[both]], tmp_path)
    assert code == 0
    assert (content["parts"][0]["passed"], content["parts"][0]["skipped"]) == (3, 1)
    assert len(list((tmp_path / "logs").glob("both-*.jsonl"))) == 3


def test_ctrl_c_shows_what_ran_so_far(parts: dict[str, Part], tmp_path: Path) -> None:
    """The tests that were running are killed with it."""
    script = tmp_path / "interrupted.py"
    path, pid = tmp_path / "outcome.json", tmp_path / "pid"
    hanging = (
        f"import os, pathlib, time\ndef test_hangs():\n    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
    )
    (tmp_path / "test_hanging.py").write_text(hanging + "    time.sleep(600)\n")
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport gpu_check\nfrom gpu_check import Part\n"
        f"stages = [[{parts['passing']!r}], [{parts['hanging']!r}], [{parts['skipped']!r}]]\n"
        f"arguments = ['--folder', {str(tmp_path / 'logs')!r}, '--json', {str(path)!r}]\n"
        f"sys.exit(gpu_check.main(arguments, stages, lambda: {MACHINE!r}))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None, "the run has ended"
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    content = json.loads(path.read_text())
    assert content["outcome"] == "interrupted"
    assert outcomes(content) == {"passing": "passed", "hanging": "interrupted", "skipped": "not run"}
    assert content["parts"][1]["reasons"] == ["in test_hanging.py::test_hangs"]
    assert re.search(r"skipped\W+not run", said)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_without_a_gpu_each_backends_reason_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {**MACHINE, "problem": "there is no GPU on which a backend can run"}
    code, content = check(STAGES, tmp_path, machine=machine)
    assert (code, content) == (2, {})
    said = capsys.readouterr().out
    assert said.startswith("gpu-check: there is no GPU on which a backend can run\nbackend cuda: usable\n")
    assert "backend triton: not usable: Triton is not installed\n" in said


def test_this_machine_is_described() -> None:
    machine = gpu_check.describe_machine()
    import pointfuse
    import torch

    assert machine["versions"]["torch"] == torch.__version__
    assert {n: b["usable"] for n, b in machine["backends"].items()} == {
        n: status.usable for n, status in pointfuse.backends().items()
    }
    assert bool(machine["problem"]) == (not any(machine["backends"][n]["usable"] for n in ("cuda", "triton")))


def test_an_interpreter_that_cannot_import_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem = gpu_check.describe_machine()["problem"]
    assert problem == "pointfuse cannot be imported: ImportError: libcudart.so.13: cannot open"


# Under compute-sanitizer


def stub_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int) -> Path:
    """Runs what it is given, notes how it was called, and reports an error where `exit_code` is one."""
    program, called = folder / "stub-sanitizer", folder / "called"
    program.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {called}\n'
        'while [ "$1" != "-m" ]; do last=$1; shift; done\n'
        f'"$last" "$@" || exit $?\necho "========= ERROR SUMMARY: 1 error"\nexit {exit_code}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(program))
    return called


@pytest.mark.parametrize(("exit_code", "outcome"), [(0, "passed"), (9, "failed")])
def test_tests_run_under_a_tool(
    exit_code: int, outcome: str, parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = stub_sanitizer(tmp_path, monkeypatch, exit_code)
    tools = [Part(tool, 60, "", parts["passing"].tests, "one", tool=tool) for tool in ("memcheck", "initcheck")]
    code, content = check([tools], tmp_path)
    assert code == (1 if exit_code else 0)
    assert outcomes(content) == {"memcheck": outcome, "initcheck": outcome}
    assert [part["passed"] for part in content["parts"]] == [1, 1]
    if exit_code:
        assert content["parts"][0]["reasons"] == ["exit code 9: ========= ERROR SUMMARY: 1 error"]
    calls = sorted(called.read_text().splitlines())
    assert calls[0].startswith(f"1 --tool initcheck --error-exitcode 9 {sys.executable} -m pytest")
    assert calls[1].startswith(f"1 --tool memcheck --error-exitcode 9 --kernel-name kns=pointfuse {sys.executable} -m")


def test_without_compute_sanitizer_its_parts_are_skipped(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPUTE_SANITIZER", "no-such-sanitizer")
    reason = "there is no no-such-sanitizer on the PATH; it comes with the CUDA toolkit"
    tool = Part("memcheck", 60, "", parts["passing"].tests, tool="memcheck")
    code, content = check([[tool], [parts["passing"]]], tmp_path)
    assert code == 0
    assert outcomes(content) == {"memcheck": "skipped", "passing": "passed"}
    assert content["parts"][0]["reasons"] == [reason]
    code, content = check([[tool]], tmp_path)
    assert (code, content["outcome"]) == (2, "nothing checked")


# Commands


@pytest.mark.parametrize(
    ("status", "code", "outcome"), [("ok", 0, "passed"), ("wrong", 1, "failed")], ids=["right answers", "a wrong one"]
)
def test_the_benchmarks_answers_are_counted(status: str, code: int, outcome: str, tmp_path: Path) -> None:
    absent = {"contender": "cuDNN graph", "status": "failed", "reason": "there is no nvidia-cudnn-frontend"}
    ours = {"contender": "pointfuse", "status": status, "reason": "NaN" if status == "wrong" else None}
    content = {"cases": [{"results": [ours, absent]}] * 3}
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1], 'stub'); folder.mkdir(parents=True)\n"
        f"(folder / 'one.json').write_text({json.dumps(content)!r})\nsys.exit({code})\n"
    )
    found, written = check([[Part("bench", 60, "", command=(str(script), "{folder}/benchmark"))]], tmp_path)
    assert found == code
    (part,) = written["parts"]
    assert part["outcome"] == outcome
    assert part["skipped"] == 3
    assert "3 cases: cuDNN graph: there is no nvidia-cudnn-frontend" in part["reasons"]
    if status == "wrong":
        assert part["failed"] == 3
        assert "3 cases: pointfuse: NaN" in part["reasons"]


def test_a_command_that_fails_shows_its_last_line(tmp_path: Path) -> None:
    part = Part("command", 60, "", command=("-c", "import sys; sys.exit('no CUDA device here')"))
    code, content = check([[part]], tmp_path)
    assert code == 1
    assert content["parts"][0]["reasons"] == ["exit code 1: no CUDA device here"]


# The parts of the real thing


def test_it_is_over_within_nine_minutes_whatever_happens() -> None:
    assert gpu_check.longest() <= 540
    names = [part.name for stage in STAGES for part in stage]
    assert len(names) == len(set(names))


def test_every_file_is_there_and_every_test_is_asked_for() -> None:
    """What one part leaves out another one takes."""
    for name in {file for stage in STAGES for part in stage for file in (*part.tests, *part.command[:1])}:
        assert (ROOT / name).is_file(), name
    keywords = {part.name: part.keyword for stage in STAGES for part in stage}
    assert keywords["gpu"] == "not graph and not stream and not runs_out"
    assert keywords["graphs"] == "graph and not stream"
    assert keywords["streams"] == "stream"
    assert keywords["leaks"].startswith("runs_out or ")
    for tool in gpu_check.SANITIZERS:
        assert keywords[tool] == "reduced"


# With the places of this machine, which end in -cpu where it has no GPU.
LEAKS_HERE = gpu_check.LEAKS.replace("cuda and not aten", "cpu")
COLLECTIONS = [
    (GPU_TESTS, "graph and not stream", 10),
    (GPU_TESTS, "stream", 5),
    (GPU_TESTS, "runs_out", 1),
    (GPU_TESTS, "reduced", 24),
    (LEAK_TESTS, LEAKS_HERE, 5),
    (LEAK_TESTS, "shapes", 5),
]


def test_keywords_choose_tests() -> None:
    code = """
        import contextlib, io, json, sys, pytest
        for tests, keyword, least in json.loads(sys.argv[1]):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert pytest.main(["--collect-only", "-q", "-k", keyword, *tests]) == 0
            print(sum("::" in line for line in said.getvalue().splitlines()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(COLLECTIONS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counts = list(map(int, done.stdout.split()))
    assert len(counts) == len(COLLECTIONS)
    assert all(count >= least for count, (_, _, least) in zip(counts, COLLECTIONS, strict=True)), counts


# The command


def test_the_parts_are_listed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    said = capsys.readouterr().out
    for part in (part for stage in STAGES for part in stage):
        assert re.search(rf"{part.name}\W+{part.seconds:g}\W+{re.escape(part.says)}", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only memcheck,speed", "argument --only: 'speed' is no part; the parts are kernels, gpu, determinism,"),
        ("--seconds 0", "argument --seconds: '0' is not a number of seconds above 0"),
        ("--seconds soon", "argument --seconds: 'soon' is not a number of seconds above 0"),
        ("--json nowhere/outcome.json", "argument --json: 'nowhere/outcome.json' is a folder, or in none"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu_check.main(arguments.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_some_parts_with_another_limit(parts: dict[str, Part], tmp_path: Path) -> None:
    stages = [[parts["passing"], parts["hanging"]], [parts["skipped"]]]
    code, content = check(stages, tmp_path, "--only", "skipped,passing", "--seconds", "50")
    assert code == 0
    assert [(part["name"], part["limit"]) for part in content["parts"]] == [("passing", 50), ("skipped", 50)]


def test_what_native_tests_need_is_built_where_there_is_a_gpu() -> None:
    command = [sys.executable, "tests/host_cuda/build.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "the kernels' native tests: there is no GPU\n"


@pytest.mark.parametrize("target", ["gpu-check", "sanitize"])
def test_make_runs_it_with_the_interpreters_own_packages(target: str) -> None:
    command = ["make", "-n", target, "VENV=", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(
        rf"^PYTHONPATH=python\S* {re.escape(sys.executable)} tests/gpu_check.py", done.stdout, re.MULTILINE
    )
    assert " pytest hypothesis rich" in done.stdout
