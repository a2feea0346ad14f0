"""A plugin of pytest that writes a line of JSON as each test begins and ends, and takes one share of the tests.

So that much is known also of a run that has to be killed. `tests/gpu_check.py` reads the lines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, required=True, help="the file to write to")
    parser.addoption("--share", default="0/1", help="0/4 for every fourth test from the first on")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Lines(config.getoption("--lines")), "gpu_report_lines")


# Last: after `-k` has taken its choice.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = items[share::shares]


class _Lines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(began=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome, reason=_reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome, reason=_reason(report))

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return (str(crash.message).strip() or "no message").splitlines()[0]
    # Of a file that cannot be imported: a traceback, whose last line says why.
    return (str(report.longrepr).strip() or "no message").splitlines()[-1].removeprefix("E").strip()
