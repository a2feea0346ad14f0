"""What README.md and docs/ show is true: their code runs and prints what they say, their links lead somewhere, their
commands exist, and the README's figures are in the results that it names.

A block marked ``python`` is run; one marked ``text`` right behind it is what it prints.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pointfuse
import pytest
from conftest import ROOT

from benchmarks.models import table

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK_ENDS = "\x1e"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def as_script(markdown: str) -> str:
    """The python blocks of a page, each on the lines where it stands, with a mark printed after each."""
    lines, inside = [], False
    for line in markdown.splitlines():
        if inside and line == "```":
            inside = False
            lines.append(f"print({BLOCK_ENDS!r}, end='')")
        else:
            lines.append(line if inside else "")
            inside = inside or line == "```python"
    return "\n".join(lines)


def expected_outputs(markdown: str) -> list[str | None]:
    """For each python block what it is to print, or ``None`` where the page does not say."""
    pattern = r"^```python\n.*?^```\n(?:\n*^```text\n(.*?)^```$)?"
    return [match.group(1) for match in re.finditer(pattern, markdown, re.DOTALL | re.MULTILINE)]


@each_page
def test_every_python_block_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    markdown = page.read_text(encoding="utf-8")
    expected = expected_outputs(markdown)
    if not expected:
        return
    script = tmp_path / f"{page.stem}.py"
    script.write_text(as_script(markdown), encoding="utf-8")
    # A process of its own, since the pages change what holds for a whole process.
    choices = ("POINTFUSE_BACKEND", "POINTFUSE_STRICT", "POINTFUSE_PRINT_PLAN", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in choices}
    environment |= {"PYTHONPATH": str(Path(pointfuse.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(BLOCK_ENDS)[:-1]
    assert len(printed) == len(expected)
    for actual, said in zip(printed, expected, strict=True):
        if said is not None:
            assert actual == said


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"\b((?:benchmarks|examples)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_the_pages_hold_what_this_file_looks_for() -> None:
    """What is not found cannot be wrong."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    assert sum(said is not None for text in texts.values() for said in expected_outputs(text)) >= 10
    assert "make test" in texts["README.md"]
    assert "(docs/quickstart.md)" in texts["README.md"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+)", README.read_text(encoding="utf-8")))
    assert linked == {page.name for page in PAGES if page.parent == ROOT / "docs"}


def test_the_table_of_models_is_what_plan_finds() -> None:
    for package in ("timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    page = table.PAGE.read_text(encoding="utf-8")
    shown = page.partition(table.BEGIN)[2].partition(table.END)[0].strip()
    made = table.table().strip()
    if shown.splitlines()[-1] != made.splitlines()[-1]:
        pytest.skip(f"the table has {shown.splitlines()[-1]}")
    assert shown == made


def test_every_reason_to_leave_a_convolution_alone_is_shown() -> None:
    page = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    package = ROOT / "python" / "pointfuse"
    files = [package / "modules.py", *(package / "convert" / f"{n}.py" for n in ("matching", "sequences", "tracing"))]
    reasons = {reason for file in files for reason in reasons_in(ast.parse(file.read_text(encoding="utf-8")))}
    assert len(reasons) >= 20
    # Only convolutions are asked.
    assert {reason for reason in reasons if reason not in page} == {", not an nn.Conv2d"}


def reasons_in(tree: ast.Module) -> Iterator[str]:
    """Of each message of ``Untraceable``, and of each reason that a function returns, the longest fixed part."""
    functions = ("_match", "_take_normalisation", "_why_not", "_what_follows", "norm_refusal", "conv_refusal")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Untraceable":
            yield longest_text(node.args[0])
        elif isinstance(node, ast.FunctionDef) and node.name in functions:
            returned = [value for n in ast.walk(node) if isinstance(n, ast.Return) for value in alternatives(n.value)]
            yield from filter(None, map(longest_text, returned))


def alternatives(value: ast.expr | None) -> list[ast.expr]:
    if isinstance(value, ast.IfExp):
        return [value.body, value.orelse]
    return [] if value is None else [value]


def longest_text(message: ast.expr) -> str:
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    texts = [p.value.strip(": ") for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return max(texts, key=len, default="")


def test_every_figure_of_the_table_is_in_the_results() -> None:
    readme = README.read_text(encoding="utf-8")
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    named = [p for p in paths if p.relative_to(ROOT).as_posix() in readme]
    assert named, "the README names no result file"
    cases = [case for p in named for case in json.loads(p.read_text(encoding="utf-8"))["cases"]]
    rows = re.findall(r"^\| (.+?), batch (\d+), (\w+) \|(.+)\|$", readme, re.MULTILINE)
    assert len(rows) >= 4
    header = next(line for line in readme.splitlines() if line.startswith("| ") and "eager NCHW" in line)
    contenders = [cell.strip() for cell in header.strip("|").split("|")][1:]
    for name, batch, dtype, cells in rows:
        # Of a case measured twice the newest counts.
        alike = [c for c in cases if (c["name"], c["batch"], c["dtype"]) == (name, int(batch), dtype)]
        results = {r["contender"]: r for r in alike[-1]["results"]}
        for contender, cell in zip(contenders, cells.split("|"), strict=True):
            result = results[contender]
            expected = f"{result['ms']['p50']:.1f} ms ({result['speedup']['eager channels_last']:.2f}x)"
            assert cell.strip().strip("*") == expected, (name, batch, dtype, contender)
