"""Part 1: the tests of ``tests/gpu`` on the device, several processes at once; each is a row, with what it measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Row

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"
WORKERS = 6


class Rows:
    """A pytest plugin that records every test as it ends: a killed session keeps what was proved."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.split("::", 1)[-1].removeprefix("test_")
        if report.outcome == "failed":
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")] or ["?"]
            self._add(name, FAILED, lines[0].removeprefix("E").strip()[:160])
        elif report.outcome == "skipped":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._add(name, SKIPPED, reason.removeprefix("Skipped: "))
        else:
            self._add(name, PASSED, "; ".join(f"{key} {value}" for key, value in report.user_properties))
            return

    def _add(self, name: str, status: str, note: str) -> None:
        self._context.recorder.add(Row(self._context.part, name, status, note=note))


def run(context: Context) -> None:
    os.environ["OMP_NUM_THREADS"] = "2"
    words = [str(TESTS), "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--confcutdir={TESTS}"]
    words += [f"--basetemp={context.folder / 'pytest'}", f"--rootdir={TESTS.parents[1]}", "--tb=short"]
    if context.select:
        words += ["-k", context.select]
    if context.on_gpu and _has_xdist():
        words += ["-n", str(WORKERS), "--dist", "worksteal"]
    status = pytest.main(words, plugins=[Rows(context)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")


def _has_xdist() -> bool:
    try:
        import xdist  # noqa: F401
    except ImportError:
        return False
    return True
