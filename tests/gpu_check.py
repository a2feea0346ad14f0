"""Whether pointfuse is right on this machine's GPU: `make gpu-check`, or `python tests/gpu_check.py`.

Tests, compute-sanitizer, determinism, leaks, graphs, streams and a short benchmark, each within a time limit, and in
the end one table. Exit codes: 0 all passed, 1 something failed, 2 nothing could be checked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError:
    sys.exit(f"gpu_check.py: {sys.executable} lacks rich: pip install rich pytest hypothesis numpy")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "out" / "gpu-check"
SCHEMA = 1
EXIT_PASSED, EXIT_FAILED, EXIT_NOTHING, EXIT_INTERRUPTED = 0, 1, 2, 130
# Before the first part, and for the processes of a part to end that were killed.
DESCRIBE_SECONDS, PROGRAM_SECONDS, KILL_SECONDS = 25.0, 2.0, 1.0
_POLL_SECONDS = 0.1
_WIDTH = 120


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes:
        name: by which `--only` chooses it.
        seconds: it is stopped after so long, and has failed then.
        says: what it checks.
        tests: files of tests, relative to the repository; with `keyword`, those of them that pytest's `-k` takes.
        processes: among which the tests are divided, as far as there are cores.
        tool: of compute-sanitizer, under which the tests run.
        command: arguments of this Python instead of tests; `{folder}` is where it may write.
    """

    name: str
    seconds: float
    says: str
    tests: tuple[str, ...] = ()
    keyword: str = ""
    processes: int = 1
    tool: str = ""
    command: tuple[str, ...] = ()


KERNEL_TESTS = (
    "tests/test_cuda_kernels.py",
    "tests/test_cuda_kernels_sm90.py",
    "tests/test_cuda_backend.py",
    "tests/test_kernel_backends.py",
    "tests/test_triton_kernels.py",
    "tests/test_tune.py",
    "tests/test_cuda_statistics.py",
    "tests/test_cuda_training.py",
    "tests/test_cuda_forward.py",
    "tests/test_triton_training.py",
)
GPU_TESTS, LEAK_TESTS = ("tests/test_gpu.py",), ("tests/test_leaks.py",)
NATIVE = "not emulator and not h100 and not a100"
LEAKS = "runs_out or (test_leaks and cuda and not aten and not shapes)"
BENCHMARK = (
    "benchmarks/run.py",
    *("--quick", "--device", "cuda", "--minutes", "1.4", "--no-report", "--output", "{folder}/benchmark"),
)


def _sanitizer(tool: str, says: str) -> Part:
    return Part(tool, 90, f"compute-sanitizer: {says}", GPU_TESTS, "reduced", tool=tool)


# Parts of a row run at the same time, and rows one after another: the rows' longest limits are less than 9 minutes
# together. What measures time or the whole GPU's memory, or takes all of it, has a row of its own. The kernels in the
# emulator, and what PyTorch's own operators do, are `make test`'s.
STAGES: tuple[tuple[Part, ...], ...] = (
    (Part("kernels", 140, "the kernels' tests, natively", KERNEL_TESTS, NATIVE, processes=12),),
    (
        Part("gpu", 90, "devices, sizes, compilers", GPU_TESTS, "not graph and not stream and not runs_out", 3),
        Part("determinism", 90, "1,000 calls give the same bits", ("tests/test_determinism.py",), "cuda", 4),
        Part("graphs", 90, "captured once, replayed with other inputs", GPU_TESTS, "graph and not stream"),
        Part("streams", 90, "several streams at once", GPU_TESTS, "stream"),
        Part("shapes", 90, "10,000 shapes fill no cache", LEAK_TESTS, "shapes and cuda and not aten", 4),
    ),
    (
        _sanitizer("memcheck", "accesses out of bounds"),
        _sanitizer("racecheck", "races in shared memory"),
        _sanitizer("synccheck", "barriers"),
        _sanitizer("initcheck", "memory read before it is written"),
    ),
    (
        Part("leaks", 60, "10,000 calls leave nothing; memory that runs out", (*LEAK_TESTS, *GPU_TESTS), LEAKS),
    ),
    (Part("benchmark", 110, "a short one: every contender's answer", command=BENCHMARK),),
)  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Outcome:
    """What became of a part: "passed", "failed", "out of time", "skipped", "interrupted" or "not run"."""

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    passed: int | None = None
    failed: int | None = None
    skipped: int | None = None
    # Why something failed or was skipped, a line each.
    reasons: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.outcome in ("failed", "out of time")


class Running:
    """A part under way: its processes, each the head of a group of its own, and the files that they write."""

    def __init__(self, part: Part, seconds: float, folder: Path) -> None:
        self.part, self.seconds, self.folder = part, seconds, folder
        self.began = time.monotonic()
        shares = 1 if not part.tests else max(1, min(part.processes, os.cpu_count() or 1))
        self.files = [folder / f"{part.name}-{i}" for i in range(shares)]
        for file in self.files:
            file.with_suffix(".jsonl").unlink(missing_ok=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for i, file in enumerate(self.files):
                self.processes.append(self._start(file, f"{i}/{shares}"))
        except BaseException:
            self.kill()
            raise

    def _start(self, file: Path, share: str) -> subprocess.Popen[bytes]:
        command, environment = _command(self.part, file, share), _environment(self.part)
        with file.with_suffix(".log").open("wb") as log:
            # A session of its own: Ctrl-C reaches this script alone, which kills the whole group.
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def over(self) -> bool:
        return all(process.poll() is not None for process in self.processes) or self.elapsed >= self.seconds

    def kill(self) -> None:
        """End what is still running; a process that hangs in the driver is left behind."""
        living = [process for process in self.processes if process.poll() is None]
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        end = time.monotonic() + KILL_SECONDS
        for process in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))

    def outcome(self, cut_short: str = "") -> Outcome:
        """What it came to; `cut_short` is the outcome of one that did not end by itself."""
        seconds = self.elapsed
        codes = [process.poll() for process in self.processes]
        if not cut_short and None in codes:
            cut_short = "out of time"
        self.kill()
        found = Outcome(self.part.name, cut_short, round(seconds, 1), self.seconds)
        if self.part.tests:
            self._read_tests(found)
        else:
            _read_benchmark(found, self.folder / "benchmark")
        good = (None, 0, _NO_TESTS) if self.part.tests else (None, 0)
        bad = [(file, code) for file, code in zip(self.files, codes, strict=True) if code not in good]
        for file, code in bad if not found.failed else ():
            found.reasons.append(f"exit code {code}: {_last_line(file.with_suffix('.log'))}")
        if not cut_short:
            found.outcome = self._verdict(found, bool(bad))
        return found

    def _verdict(self, found: Outcome, bad: bool) -> str:
        if bad or found.failed:
            return "failed"
        if self.part.tests and not found.passed:
            if not found.skipped:
                found.reasons.append("no test was found")
                return "failed"
            return "skipped"
        return "passed"

    def _read_tests(self, found: Outcome) -> None:
        lines = [line for file in self.files for line in _lines(file.with_suffix(".jsonl"))]
        tests = {line["test"]: line for line in sorted((li for li in lines if "test" in li), key=_severity)}
        counts = Counter(test["outcome"] for test in tests.values())
        found.passed, found.failed, found.skipped = counts["passed"], counts["failed"], counts["skipped"]
        failures = [f"{_short(name)}: {t['reason']}" for name, t in tests.items() if t["outcome"] == "failed"]
        found.reasons += failures[:_MOST_REASONS]
        if len(failures) > _MOST_REASONS:
            found.reasons.append(f"and {len(failures) - _MOST_REASONS} more")
        skips = Counter(test["reason"] for test in tests.values() if test["outcome"] == "skipped")
        found.reasons += [f"{count} skipped: {reason}" for reason, count in skips.most_common()]
        begun = [line["began"] for line in lines if "began" in line]
        unfinished = [_short(name) for name in begun if name not in tests]
        if unfinished and found.outcome:
            found.reasons.insert(0, f"in {', '.join(unfinished[:_MOST_REASONS])}")


def _read_benchmark(found: Outcome, folder: Path) -> None:
    """Count the contenders of each case whose answers were right, wrong, or not to be had, and say why."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/*.json")]
    if not contents:
        return
    results = [result for content in contents for case in content["cases"] for result in case["results"]]
    counts = Counter(result["status"] for result in results)
    found.passed, found.failed, found.skipped = counts["ok"], counts["wrong"], counts["failed"]
    reasons = Counter(f"{r['contender']}: {r['reason']}" for r in results if r["status"] in ("wrong", "failed"))
    reasons += Counter(entry["reason"] for content in contents for entry in content.get("skipped", ()))
    found.reasons += [f"{count} cases: {reason}" for reason, count in reasons.most_common()]


_NO_TESTS = 5  # pytest's exit code; a share may have none
_MOST_REASONS = 4


def main(
    argv: Sequence[str] | None = None,
    stages: Sequence[Sequence[Part]] = STAGES,
    describe: Callable[[], dict[str, Any]] | None = None,
) -> int:
    """Run the parts that the arguments ask for.

    Args:
        argv: the command's arguments.
        stages: parts that run together, stage after stage.
        describe: what tells of this machine; see :func:`describe_machine`.

    Returns:
        The exit code: 0 all passed, 1 something failed, 2 nothing could be checked, 130 after Ctrl-C.
    """
    options = _parse(argv, stages)
    console = _console()
    if options.list:
        console.print(_listing(stages))
        return EXIT_PASSED
    missing = [name for name in ("pytest", "hypothesis", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}")
        return EXIT_NOTHING
    # As Ctrl-C: what runs in groups of its own would be left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        machine = (describe or describe_machine)()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if machine["problem"]:
        console.print(f"gpu-check: {machine['problem']}", markup=False, soft_wrap=True)
        _print_backends(machine, console)
        return EXIT_NOTHING
    chosen = [[part for part in stage if part.name in options.only] for stage in stages]
    outcomes = run([stage for stage in chosen if stage], options.seconds, options.folder, console)
    console.print(_table(outcomes))
    _print_machine(machine, console)
    code = _exit_code(outcomes)
    if options.json:
        _write_json(options.json, outcomes, machine, code)
    said = {EXIT_PASSED: "passed", EXIT_FAILED: "failed", EXIT_NOTHING: "nothing could be checked"}
    console.print(f"gpu-check: {said.get(code, 'interrupted')}; logs are in {options.folder}", soft_wrap=True)
    return code


def run(stages: Sequence[Sequence[Part]], seconds: float | None, folder: Path, console: Console) -> list[Outcome]:
    """Run stage after stage; after Ctrl-C, what ran so far."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "benchmark", ignore_errors=True)
    outcomes: list[Outcome] = []
    running: list[Running] = []
    try:
        for stage in stages:
            for part in stage:
                reason = _why_not(part)
                if reason:
                    outcomes.append(Outcome(part.name, "skipped", reasons=[reason]))
                else:
                    running.append(Running(part, seconds or part.seconds, folder))
            with console.status(f"running {', '.join(r.part.name for r in running)}"):
                while running:
                    for ended in [r for r in running if r.over()]:
                        outcomes.append(ended.outcome())
                        running.remove(ended)
                        _say(ended, outcomes[-1], console)
                    time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        outcomes += [r.outcome("interrupted") for r in running]
    finally:
        for r in running:
            r.kill()
    ran = {outcome.name: outcome for outcome in outcomes}
    parts = [part for stage in stages for part in stage]
    return [ran.get(part.name, Outcome(part.name, "not run", limit=part.seconds)) for part in parts]


def longest(stages: Sequence[Sequence[Part]] = STAGES) -> float:
    """The seconds after which everything is over, whatever happens."""
    before = DESCRIBE_SECONDS + 3 * PROGRAM_SECONDS
    return before + sum(max(part.seconds for part in stage) + len(stage) * KILL_SECONDS for stage in stages)


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions, commit and backends; `problem` says why nothing can be checked.

    In a process of its own: a driver that hangs would hang this one too.
    """
    command = [sys.executable, "-c", _DESCRIBE]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=DESCRIBE_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"torch did not answer within {DESCRIBE_SECONDS:g} s", "backends": {}}
    except subprocess.CalledProcessError as error:
        return {"problem": f"pointfuse cannot be imported: {error.stderr.strip().splitlines()[-1]}", "backends": {}}
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    kernels = [b for name, b in machine["backends"].items() if name != "aten"]
    machine["problem"] = "" if any(b["usable"] for b in kernels) else "there is no GPU on which a backend can run"
    machine["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    machine["commit"] = _first_line("git", "rev-parse", "HEAD")
    machine["dirty"] = bool(_first_line("git", "status", "--porcelain"))
    return machine


_DESCRIBE = """
import importlib.metadata as m, json, platform
from dataclasses import asdict
import pointfuse, torch
try:
    triton = m.version("triton")
except m.PackageNotFoundError:
    triton = None
on = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if on else None,
    "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, "torch": torch.__version__,
                 "triton": triton, "cudnn": torch.backends.cudnn.version(), "pointfuse": pointfuse.__version__},
    "backends": {name: asdict(status) for name, status in pointfuse.backends().items()},
}))
"""


def _command(part: Part, file: Path, share: str) -> list[str]:
    if part.command:
        return [sys.executable, *(argument.replace("{folder}", str(file.parent)) for argument in part.command)]
    sanitizer = []
    if part.tool:
        sanitizer = [_sanitizer_program(), "--tool", part.tool, "--error-exitcode", "9"]
        # initcheck has to see torch's kernels too, which write what ours read.
        sanitizer += [] if part.tool == "initcheck" else ["--kernel-name", "kns=pointfuse"]
    pytest = [sys.executable, "-m", "pytest", "--quiet", "--tb=short", "-p", "gpu_report", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", "--lines", str(file.with_suffix(".jsonl")), "--share", share]
    return [*sanitizer, *pytest, *(["-k", part.keyword] if part.keyword else []), *part.tests]


def _environment(part: Part | None = None) -> dict[str, str]:
    """That of this process, in which Python finds pointfuse of this tree and the plugin of pytest."""
    paths = [str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if part is not None and part.tool:
        # Without the caching allocator each tensor's end is the end of an allocation.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def _sanitizer_program() -> str:
    return os.environ.get("COMPUTE_SANITIZER", "compute-sanitizer")


def _why_not(part: Part) -> str:
    if part.tool and shutil.which(_sanitizer_program()) is None:
        return f"there is no {_sanitizer_program()} on the PATH; it comes with the CUDA toolkit"
    return ""


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    found = {outcome.outcome for outcome in outcomes}
    if found & {"interrupted", "not run"}:
        return EXIT_INTERRUPTED
    if any(outcome.wrong for outcome in outcomes):
        return EXIT_FAILED
    return EXIT_PASSED if "passed" in found else EXIT_NOTHING


def _lines(path: Path) -> list[dict[str, Any]]:
    """What the plugin wrote; a killed process may have left half a line."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _severity(line: dict[str, Any]) -> int:
    """A test that passed and whose teardown failed has two lines: the worse one is to be the last."""
    return ("passed", "skipped", "failed").index(line["outcome"])


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    return console


_COLOURS = {"passed": "green", "failed": "red", "out of time": "red", "interrupted": "yellow", "skipped": "yellow"}


def _say(ended: Running, outcome: Outcome, console: Console) -> None:
    console.print(f"{outcome.name}: {outcome.outcome} after {outcome.seconds:.0f} s", highlight=False)
    if outcome.wrong:
        for file in ended.files:
            tail = file.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            console.print("\n".join(tail), markup=False, highlight=False, soft_wrap=True)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("part", "outcome", "tests", "seconds", "of", "why", title="gpu-check")
    for o in outcomes:
        colour = _COLOURS.get(o.outcome, "default")
        tests = "" if o.passed is None else f"{o.passed} passed"
        tests += "".join(f", {n} {word}" for n, word in ((o.failed, "failed"), (o.skipped, "skipped")) if n)
        row = (f"[{colour}]{o.outcome}[/]", tests, f"{o.seconds:.0f}", f"{o.limit:g}" if o.limit else "")
        table.add_row(o.name, *row, escape("\n".join(o.reasons)))
    return table


def _listing(stages: Sequence[Sequence[Part]]) -> Table:
    title = f"over after {longest(stages):.0f} s at most; parts between two lines run together"
    table = Table("part", "seconds", "what it checks", title=title)
    for stage in stages:
        for part in stage:
            table.add_row(part.name, f"{part.seconds:g}", part.says)
        table.add_section()
    return table


def _print_machine(machine: dict[str, Any], console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    changed = " with changes" if machine["dirty"] else ""
    lines = [
        f"device: {machine['device']}, driver {machine['driver'] or 'unknown'}",
        f"versions: {versions}",
        f"commit: {machine['commit'] or 'unknown'}{changed}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    _print_backends(machine, console)


def _print_backends(machine: dict[str, Any], console: Console) -> None:
    for name, backend in machine["backends"].items():
        state = "usable" if backend["usable"] else f"not usable: {backend['reason']}"
        console.print(f"backend {name}: {state}", markup=False, highlight=False, soft_wrap=True)


def _write_json(path: Path, outcomes: Sequence[Outcome], machine: dict[str, Any], code: int) -> None:
    word = {EXIT_PASSED: "passed", EXIT_FAILED: "failed", EXIT_NOTHING: "nothing checked"}.get(code, "interrupted")
    kept = {key: value for key, value in machine.items() if key != "problem"}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"schema": SCHEMA, "date": date, "outcome": word, **kept, "parts": [asdict(o) for o in outcomes]}
    # The file may be committed, and paths of a machine have no place there.
    text = json.dumps(content, indent=1).replace(str(ROOT), ".")
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _parse(argv: Sequence[str] | None, stages: Sequence[Sequence[Part]]) -> argparse.Namespace:
    names = tuple(part.name for stage in stages for part in stage)

    def some(text: str) -> tuple[str, ...]:
        chosen = tuple(item.strip() for item in text.split(","))
        unknown = [item for item in chosen if item not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; the parts are {', '.join(names)}")
        return chosen

    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--only", type=some, default=names, metavar="PART,...", help="run these parts alone")
    parser.add_argument("--list", action="store_true", help="list the parts and their limits; needs no GPU")
    parser.add_argument("--seconds", type=_seconds, help="the limit of each part, in the place of its own")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the outcome there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for logs (default out/gpu-check)")
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in none: name a file in a folder that is there")
    return path


if __name__ == "__main__":
    sys.exit(main())
