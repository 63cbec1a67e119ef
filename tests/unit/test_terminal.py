"""What a person sees: rates that can be trusted, plain lines without a terminal, secrets hidden, results on stdout."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from liquid_llm.terminal import (
    RateMeter,
    Stage,
    as_markdown,
    brief,
    print_facts,
    result_table,
    setup_logging,
    stderr_console,
)
from liquid_llm.verbosity import CHATTY, ask, one_command


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, highlight=False, width=80), text


def terminal_console(width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, highlight=False, width=width, force_terminal=True), text


# ------------------------------------------------------------------------------------------------------------ progress


@given(st.floats(0.01, 1e4), st.integers(2, 300), st.floats(0.01, 20.0))
def test_a_steady_pace_is_measured_exactly(amount: float, count: int, seconds: float) -> None:
    clock = Clock()
    meter = RateMeter(clock)
    for _ in range(count):
        clock.now += seconds
        meter.add(amount)
    assert meter.rate() == pytest.approx(amount / seconds, rel=0.05)


def test_the_rate_follows_a_change_of_pace_and_a_stall() -> None:
    clock = Clock()
    meter = RateMeter(clock, window_seconds=30.0)
    assert meter.rate() is None
    for _ in range(1000):
        clock.now += 1.0
        meter.add(100.0)
    for _ in range(40):
        clock.now += 1.0
        meter.add(10.0)
    assert meter.rate() == pytest.approx(10.0, rel=0.05)
    clock.now += 300.0
    assert meter.rate() < 2.0


def test_memory_of_a_meter_is_bounded() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    for _ in range(100_000):
        clock.now += 0.001
        meter.add(1.0)
    assert len(meter._points) < 300
    assert meter.rate() == pytest.approx(1000.0, rel=0.05)


def test_without_a_terminal_a_line_appears_now_and_then() -> None:
    clock = Clock()
    console, text = plain_console()
    with Stage("capture", unit="samples", total=400, console=console, clock=clock, line_seconds=10.0) as stage:
        stage.note("code")
        for _ in range(100):
            clock.now += 0.5
            stage.advance(2)
    lines = text.getvalue().splitlines()
    assert len(lines) == 6  # one every ten of fifty seconds, and the end
    assert lines[0] == "capture: 40/400 (10%), 4 samples/s, 1 min 30 s left, 10 s elapsed, code"
    assert lines[-1] == "capture: 200 samples in 50 s, 4 samples/s"
    assert "\x1b" not in text.getvalue()


def test_an_unknown_total_has_no_share_and_no_time_left() -> None:
    clock = Clock()
    console, _ = plain_console()
    with Stage("tokenise", unit="tokens", console=console, clock=clock) as stage:
        assert stage.status() == "tokenise: 0 tokens, 0.0 s elapsed"
        clock.now += 2
        stage.advance(3000)
        assert stage.status() == "tokenise: 3,000 tokens, 1,500 tokens/s, 2.0 s elapsed"


def test_what_was_done_before_does_not_count_for_the_rate() -> None:
    clock = Clock()
    console, text = plain_console()
    with Stage("train", unit="steps", total=1000, done=900, console=console, clock=clock) as stage:
        clock.now += 10
        stage.advance(50)
        assert stage.status() == "train: 950/1,000 (95%), 5 steps/s, 10 s left, 10 s elapsed"
    assert text.getvalue() == "train: 950 steps in 10 s, 5 steps/s\n"


def test_more_than_the_total_does_not_confuse_it() -> None:
    clock = Clock()
    with Stage("x", unit="y", total=10, console=plain_console()[0], clock=clock) as stage:
        clock.now += 1
        stage.advance(20)
        assert stage.status() == "x: 20/10 (100%), 20 y/s, 1.0 s elapsed"


def test_an_exception_passes_and_is_named() -> None:
    console, text = plain_console()

    def fails() -> None:
        with Stage("x", unit="y", console=console, clock=Clock()) as stage:
            stage.advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert text.getvalue() == "x: 1 y in 0.0 s (stopped: ZeroDivisionError)\n"


@pytest.mark.parametrize("width", [30, 80, 200])
def test_on_a_terminal_the_line_is_live_and_fits(width: int) -> None:
    console, text = terminal_console(width)
    clock = Clock()
    with Stage("[red]capture", unit="tokens", total=100_000, console=console, clock=clock) as stage:
        clock.now += 1
        stage.advance(5000)
        stage.note("[bold]" * 50)
        assert stage._progress is not None
        stage._progress.refresh()
    written = text.getvalue()
    assert "\x1b[" in written
    assert "red" in written  # names are text, not markup
    if width >= 80:
        assert "5,000/100,000 (5%), 5,000 tokens/s, 19 s left" in written.replace("\x1b[0m", "")
    assert "\x1b[?25h" in written  # the cursor is back
    shown = [line for chunk in written.split("\r") for line in chunk.split("\n") if "elapsed" in line or "…" in line]
    assert all(len(strip_escapes(line)) <= width for line in shown)


def strip_escapes(line: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)


class YieldingAmount(float):
    """A one whose addition lets other threads run in the middle."""

    def __radd__(self, other: float) -> float:
        time.sleep(0)
        return float(other) + 1.0


def test_threads_may_advance_together() -> None:
    console, _ = plain_console()
    with Stage("x", unit="y", console=console) as stage:
        threads = [
            threading.Thread(target=lambda: [stage.advance(YieldingAmount(1)) for _ in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stage.done == 2000


# ------------------------------------------------------------------------------------------------------------- logging


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("liquid_llm")
    handlers, level = root.handlers[:], package.level
    chatty = {name: logging.getLogger(name).level for name in CHATTY}
    yield
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)
    root.handlers[:] = handlers
    package.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_log_lines_go_to_stderr_once_short_and_masked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    setup_logging("INFO")
    setup_logging("INFO")
    log = logging.getLogger("liquid_llm.somewhere")
    log.info("teacher %s with a-very-secret-value and [bold]hf_abcdefghijkl[/]", "gpt2")
    log.debug("not shown")
    logging.getLogger("other").info("not shown either")
    logging.getLogger("other").warning("shown")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO teacher gpt2 with *** and [bold]***[/]")
    assert lines[1].endswith("WARNING shown")


@pytest.mark.usefixtures("restored_logging")
def test_long_lines_are_not_wrapped_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("DEBUG")
    logging.getLogger("liquid_llm.x").debug("word " * 100)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("restored_logging")
def test_on_a_terminal_log_lines_are_text_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = terminal_console()
    monkeypatch.setattr("liquid_llm.terminal.stderr_console", lambda: console)
    setup_logging("INFO")
    logging.getLogger("liquid_llm.x").info("[red]%s[/nonsense]", "hf_abcdefghijkl")
    assert "[red]***[/nonsense]" in strip_escapes(text.getvalue())


def on_a_terminal(code: str) -> str:
    """What a process shows on a terminal of its own, 160 columns wide."""
    master, slave = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=slave, stdout=slave, stdin=slave, env=environ)
    os.close(slave)
    shown = bytearray()
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    assert child.wait() == 0, bytes(shown)
    return shown.decode()


def test_on_a_real_terminal_words_have_no_colour_of_their_own() -> None:
    """Numbers, paths, JSON and words such as GET had four colours, which took them to pieces."""
    said = '--student=liquid-16m 181,567 "GET" {"step": 5, "a": null} /tmp/x'
    shown = on_a_terminal(
        "import logging; from liquid_llm.terminal import brief, setup_logging\n"
        f"setup_logging(); log = logging.getLogger('liquid_llm.x'); log.info({said!r})\n"
        "log.info('all of it: %s', 1234, extra=brief('in brief')); log.info('never shown', extra=brief(''))"
    )
    assert said in shown.replace("\r\n", "")
    assert "in brief" in shown
    assert "all of it" not in shown
    assert "never shown" not in shown


@pytest.mark.usefixtures("restored_logging")
def test_off_a_terminal_a_brief_line_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    log = logging.getLogger("liquid_llm.x")
    log.info("all of it: %s", 1234, extra=brief("in brief"))
    log.info("metadata", extra=brief(""))
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == ["INFO all of it: 1234", "INFO metadata"]


@pytest.mark.usefixtures("restored_logging")
def test_what_is_asked_for_is_shown_and_a_later_rank_says_no_more_than_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown(asked: str | None, level: str = "INFO", most: str = "DEBUG") -> str:
        with one_command():
            if asked is not None:
                ask(asked)
            setup_logging(level, most=most)
            log = logging.getLogger("liquid_llm.x")
            for name in ("debug", "info", "warning", "error"):
                getattr(log, name)(name)
            with Stage("stage", unit="y") as stage:
                stage.advance()
            print_facts("facts", [])
        return "".join(line.split()[-1][0] for line in capsys.readouterr().err.splitlines())

    stage = "y"  # its line ends with "... y/s"
    assert shown(None) == f"iwe{stage}f"
    assert shown("debug") == f"diwe{stage}f"
    assert shown("info", "WARNING") == f"iwe{stage}f"
    assert shown("warning") == "we"
    assert shown("error") == "e"
    assert shown("debug", most="WARNING") == "wef"


@pytest.mark.usefixtures("restored_logging")
def test_what_packages_say_of_themselves_when_they_are_imported_is_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchao's lines of kernels that it lacks, and torch's of torchao, which torch itself writes to standard error."""
    for level, shown in (("INFO", 1), ("DEBUG", 3), ("WARNING", 1)):
        setup_logging(level)
        for name in ("torchao", "torchao.quantization"):
            logging.getLogger(name).warning("failed to load a library")
        logging.getLogger("other").warning("it matters")
        assert len(capsys.readouterr().err.splitlines()) == shown, level
        assert logging.getLogger("torch.utils._pytree").isEnabledFor(logging.WARNING) == (level == "DEBUG")
        assert logging.getLogger("torch.utils._pytree").isEnabledFor(logging.ERROR)


@pytest.mark.usefixtures("restored_logging")
def test_a_standard_error_that_was_closed_and_replaced_breaks_no_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning of the storage retries once raised "I/O operation on closed file" into an upload."""
    setup_logging("INFO")
    log = logging.getLogger("liquid_llm.x")
    for _ in range(2):
        stream = io.TextIOWrapper(io.BytesIO(), write_through=True)
        monkeypatch.setattr("sys.stderr", stream)
        log.warning("503")
        assert stream.buffer.getvalue().endswith(b"WARNING 503\n")  # type: ignore[attr-defined]
        stream.close()


def test_there_is_one_console_for_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert stderr_console() is stderr_console()
    stderr_console().print("x")
    assert capsys.readouterr() == ("", "x\n")


def test_facts_stand_in_columns_as_text_and_paths_are_not_wrapped() -> None:
    console, text = plain_console()
    print_facts("[b]size", [("run", "/a" * 100), ("a long name", "[red]3")], console)
    assert text.getvalue() == f"[b]size\nrun          {'/a' * 100}\na long name  [red]3\n"


def test_a_table_as_markdown_keeps_its_sides_and_takes_no_bar_for_an_end() -> None:
    table = result_table("a [b]title[/b]")
    table.add_column("arm")
    table.add_column("loss", justify="right")
    table.add_row(Text("a|b", "bold"), "1.5")
    table.add_row(Text("[red]c"), Text("2"))
    assert as_markdown(table) == ("a [b]title[/b]\n\n| arm | loss |\n|---|---:|\n| a\\|b | 1.5 |\n| [red]c | 2 |\n")
