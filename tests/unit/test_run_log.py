"""The log file of a run: every line with its moment, over restarts, without secrets; a bad disk stops nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from liquid_llm.checkpoint import store, upload
from liquid_llm.errors import StorageError
from liquid_llm.run_log import LOG_FILE, RunLog
from liquid_llm.terminal import brief, setup_logging
from liquid_llm.verbosity import ask, one_command

log = logging.getLogger("liquid_llm.somewhere")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Nothing is shown, and all of it is in the file."""
    root, package = logging.getLogger(), logging.getLogger("liquid_llm")
    handlers, level = root.handlers[:], package.level
    with one_command():
        ask("error")
        setup_logging()
        yield
    root.handlers[:] = handlers
    package.setLevel(level)


def lines(run_dir: Path) -> list[str]:
    return (run_dir / LOG_FILE).read_text(encoding="utf-8").splitlines()


def test_lines_have_their_moment_and_restarts_are_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    for number in range(2):
        with RunLog() as run_log:
            log.info("before %d", number)
            run_log.open(tmp_path, ["liquid", "train", "--hf_token=hf_abcdefghijkl", "a b"])
            log.info("in full, a-very-secret-value", extra=brief(""))
            log.debug("never")
            logging.getLogger("other").info("never")
            logging.getLogger("other").warning("of others\x1b[2J")
        log.info("after the end")
    said = lines(tmp_path)
    assert len(said) == 8
    assert said[:4] != said[4:]
    for begin, number in ((0, 0), (4, 1)):
        head, before, full, others = said[begin : begin + 4]
        assert re.fullmatch(r"---- process \d+ on .+: liquid train '?--hf_token=\*+'? 'a b'", head)
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO before {number}", before)
        assert full.endswith("INFO in full, ***")
        assert others.endswith("WARNING of others\\x1b[2J")
    assert "hf_abcdefghijkl" not in "".join(said)
    assert capsys.readouterr() == ("", ""), "what is shown is another matter"


def test_what_ends_a_run_is_its_last_line_and_the_file_is_whole_before_it_is_sent(tmp_path: Path) -> None:
    seen: list[str] = []

    def work(error: BaseException) -> None:
        with RunLog() as run_log:
            run_log.open(tmp_path)
            try:
                with run_log.ending():
                    log.info("at work")
                    raise error
            finally:
                seen.append(lines(tmp_path)[-1])
                log.info("the mirror is sent")

    with pytest.raises(StorageError):
        work(StorageError("the disk is full", where="x"))
    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError("y"))
    assert [one.partition(" ")[2] for one in seen] == ["ERROR x: the disk is full.", "ERROR ZeroDivisionError: y"]
    assert lines(tmp_path)[-1] == seen[-1]


def test_a_run_that_has_no_folder_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog():
        log.info("refused")
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LOG_FILE).mkdir()
    with RunLog() as run_log:
        run_log.open(tmp_path)
        log.info("on it goes")
    assert sum("the run goes on without a log" in message for message in caplog.messages) == 1
    assert caplog.messages[-1] == "on it goes"


def test_the_file_is_mirrored_and_fetched_with_the_run() -> None:
    assert LOG_FILE in upload.WATCHED
    assert LOG_FILE in store.GOING_ON
