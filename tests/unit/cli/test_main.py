"""The ``liquid`` command: what is known, what is not, and what never reaches the screen."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from tests.support import forked

from liquid_llm.cli.main import guard, main
from liquid_llm.cli.parse import parse
from liquid_llm.errors import StorageError


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("demo", "train", "anneal", "capture", "prepare", "inspect", "report"):
        assert shown.count(f"  {name} ") == 2


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("liquid-llm ")


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "liquid_llm", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean train?" in done.stderr


def test_errors_never_show_a_secret_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted0123456789abcdefXYZ")

    def job() -> int:
        raise StorageError("refused", where="gs://b?token=hf_planted0123456789abcdefXYZ")

    assert guard(job) == 4
    assert "planted" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_before_there_is_anything_to_save_is_answered_in_one_line(number, code, capsys):
    closed = []

    def job() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)  # the handler runs at the next chance
        finally:
            closed.append(True)
        return 0

    before = signal.getsignal(number)
    assert guard(job) == code
    assert capsys.readouterr().err == "terminated before there was anything to save: run the same command again\n"
    assert closed == [True]
    assert signal.getsignal(number) is before is signal.SIG_DFL


def test_what_nobody_foresaw_is_printed_without_secrets():
    code = """
from liquid_llm.cli.main import guard
def job():
    raise KeyError("http://me:s3cr3tPassw0rd@host/x and hf_planted0123456789abcdefXYZ")
guard(job)
"""
    done = forked.run(["-c", code])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'http://***@host/x and ***'" in done.stderr
    assert "s3cr3t" not in done.stderr


def test_a_forked_worker_of_a_job_is_ended_by_the_signal_as_before():
    """Its owner waits for that, and wants no traceback."""
    code = """
import os, signal, sys, time
from liquid_llm.cli.main import guard
def job():
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(say, b".")
        time.sleep(5)
        os._exit(7)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(guard(job))
"""
    done = forked.run(["-c", code])
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")


@pytest.mark.parametrize("command", ["inspect", "report", "demo", "store", "prepare", "study"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"liquid {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["train", "anneal", "capture", "prepare", "study", "evaluate", "export", "compare", "demo"]
    + [f"memory {job}" for job in ("train", "anneal", "capture")],
)
def test_help_begins_with_how_it_is_written_and_whole_commands_that_parse(command, capsys, tmp_path, monkeypatch):
    for name in ("run.yaml", "runs/first/provenance/options.yaml"):  # files that examples have for --config
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("max_steps: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: liquid {command} ")
    assert lines[0].endswith("[--option=value ...]")
    begin = lines.index("for example:") + 1
    assert begin < 12
    assert not any("%%" in line for line in lines)
    examples = list(itertools.takewhile(bool, lines[begin:]))
    assert examples
    assert all(one.startswith(f"  liquid {command} ") for one in examples)  # one line each, to be copied
    read: list[dict[str, object]] = []

    def parse_only(*args, **options):
        read.append(parse(*args, **options))
        raise SystemExit(0)

    for module in ("main", "study", "evaluate", "export", "compare", "memory"):
        monkeypatch.setattr(f"liquid_llm.cli.{module}.parse", parse_only)
    for example in examples:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(example)[1:])
        assert ended.value.code == 0
    assert len(read) == len(examples)


def test_short_version_and_help_of_a_command(capsys):
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("liquid-llm ")
    with pytest.raises(SystemExit):
        main(["store", "pack", "--help"])
    asked = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["help", "store", "pack"])
    assert capsys.readouterr().out == asked
    assert main(["help"]) == 0
    assert "usage: liquid COMMAND" in capsys.readouterr().out
    assert main(["help", "trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


def test_names_of_others_in_a_message_do_not_move_the_terminal(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"path": "evil\\u001b]0;x\\u0007*.jsonl", "type": "lm"}\n')
    assert main(["inspect", str(tmp_path / "m.jsonl")]) == 3
    assert "evil\\x1b]0;x\\x07" in capsys.readouterr().out
