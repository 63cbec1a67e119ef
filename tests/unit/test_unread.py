"""Commands whose output nobody reads, or whose output has no room."""

import os
import subprocess
import sys

import pytest

from liquid_llm.cli.main import guard
from liquid_llm.errors import StorageError
from liquid_llm.unread import go_on_unread


def run(words: list[str], *, closed: str) -> subprocess.CompletedProcess[str]:
    """The command with a stream (``stdout``, ``stderr`` or both) that leads into a pipe nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if name in closed else subprocess.PIPE for name in ("stdout", "stderr")}
    try:
        return subprocess.run([sys.executable, "-m", "liquid_llm", *words], text=True, timeout=120, **streams)
    finally:
        os.close(writer)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]])
def test_a_result_that_nobody_reads_is_no_error(words):
    done = run(words, closed="stdout")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_reads_keeps_its_exit_code():
    assert run(["trian"], closed="stdout stderr").returncode == 2


def test_a_job_goes_on_when_its_reader_leaves(capfd):
    """Both streams lead into one pipe whose reader leaves midway; what the job does then is done."""
    code = """
import os, sys
from liquid_llm.cli.main import guard
def job():
    print("first", flush=True)
    sys.stdin.readline()  # the reader has left
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("x" * 100_000, file=sys.stderr)
    os.write(int(sys.argv[1]), b"done")
    return 5
sys.exit(guard(job))
"""
    told, tell = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tell)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[tell],
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(120) == 5
    os.close(tell)
    assert os.read(told, 10) == b"done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_result_that_has_no_room_is_an_error_in_words_and_a_log_without_room_is_none():
    code = """
import sys
from liquid_llm.cli.main import guard
sys.exit(guard(lambda: print("result") or 0))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == 4
        assert done.stderr == (
            "error: standard output: it could not be written; got No space left on device. Write it elsewhere.\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code.replace('"result"', '"line", file=sys.stderr, flush=True')],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=120,
        )
        assert done.returncode == 0


def test_streams_are_what_they_were_afterwards(capsys):
    before = sys.stdout, sys.stderr

    def job() -> int:
        with go_on_unread():
            print("inner")
        print("outer")
        raise StorageError("refused")

    assert guard(job) == 4
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("inner\nouter\n", "error: refused.\n")
