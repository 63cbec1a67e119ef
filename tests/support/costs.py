"""What each test costs: processor time, its processes' included. Of a busy machine's wall time nothing follows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import servers

# Of one test and the fixtures that it is the first to ask for. Twice what the dearest takes on a busy machine: what
# comes here has grown by more than chance, and `make soak` is for it. It is said, and no test fails for it: a slower
# machine is no mistake.
LIMIT_SECONDS = 60
SHOWN = 10
_NAME = "processor seconds"
_BEGUN = pytest.StashKey[float]()


def spent() -> float:
    """Seconds of the processor that this process, its children that have ended, and those of its servers have taken."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system + sum(map(_of_server, servers.pids()))


def _of_server(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # it is gone, or the system has no such file
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Costs:
    """A plugin: the dearest tests stand at the end of what pytest says, and those beyond the limit are named."""

    def __init__(self) -> None:
        self.of_tests: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        item.stash[_BEGUN] = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        item.user_properties.append((_NAME, spent() - item.stash[_BEGUN]))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.of_tests[report.nodeid] = float(dict(report.user_properties).get(_NAME, 0.0))  # type: ignore[arg-type]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        dearest = sorted(self.of_tests.items(), key=lambda one: -one[1])[:SHOWN]
        if len(self.of_tests) <= SHOWN:
            return
        total = sum(self.of_tests.values())
        terminalreporter.write_line(f"{total:.0f} s of the processor in {len(self.of_tests)} tests; the dearest:")
        for name, seconds in dearest:
            too_dear = seconds > LIMIT_SECONDS
            said = f"  more than {LIMIT_SECONDS} s: make it smaller, or mark it soak" if too_dear else ""
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}{said}", yellow=too_dear)
