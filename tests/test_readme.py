"""What the README shows is true: its code runs, and its table of figures is in the results that it names."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == torch.Size([2, 32, 13, 13])
    assert "1 units" in capsys.readouterr().out


def test_every_figure_of_the_table_is_in_the_results() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    named = [p for p in paths if p.relative_to(ROOT).as_posix() in README]
    assert named, "the README names no result file"
    cases = [case for p in named for case in json.loads(p.read_text(encoding="utf-8"))["cases"]]
    rows = re.findall(r"^\| (.+?), batch (\d+), (\w+) \|(.+)\|$", README, re.MULTILINE)
    assert len(rows) >= 4
    header = next(line for line in README.splitlines() if line.startswith("| ") and "eager NCHW" in line)
    contenders = [cell.strip() for cell in header.strip("|").split("|")][1:]
    for name, batch, dtype, cells in rows:
        (case,) = [c for c in cases if (c["name"], c["batch"], c["dtype"]) == (name, int(batch), dtype)]
        results = {r["contender"]: r for r in case["results"]}
        for contender, cell in zip(contenders, cells.split("|"), strict=True):
            result = results[contender]
            expected = f"{result['ms']['p50']:.1f} ms ({result['speedup']['eager channels_last']:.2f}x)"
            assert cell.strip().strip("*") == expected, (name, batch, dtype, contender)


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / script).is_file(), script
