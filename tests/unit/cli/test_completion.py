"""What a shell offers for a half-typed ``liquid`` command, and a real bash by what ``liquid completion`` prints."""

import os
import shutil
import subprocess
import sys

import pytest

from liquid_llm.cli.completion import SHELLS
from liquid_llm.cli.main import main


def offered(line: str, folder) -> set[str]:
    """What the command itself says, asked as argcomplete's shell code asks it."""
    answer = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    done = subprocess.run([sys.executable, "-m", "liquid_llm"], env=environment, capture_output=True, text=True)
    assert done.stdout == ""
    return {word.strip() for word in answer.read_text().split("\n")} - {""} if answer.exists() else set()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("liquid ev", {"evaluate"}),
        ("liquid store ve", {"verify"}),
        ("liquid store verify --temperatu", {"--temperatures"}),
        ("liquid train --dry", {"--dry_run"}),
        ("liquid train --precision f", {"float32"}),
        ("liquid memory cap", {"capture"}),
        ("liquid memory capture --gpu", {"--gpu_memory"}),
        ("liquid help pre", {"prepare"}),
        ("liquid nonsense --", set()),
    ],
)
def test_what_may_follow(line, expected, tmp_path):
    assert offered(line, tmp_path) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_what_liquid_completion_has_set_up(tmp_path):
    liquid = tmp_path / "liquid"
    liquid.write_text(f'#!/bin/sh\nexec {sys.executable} -m liquid_llm "$@"\n')
    liquid.chmod(0o755)
    script = """
eval "$(liquid completion bash)"
COMP_LINE="liquid train --learn" COMP_POINT=20 COMP_WORDS=(liquid train --learn) COMP_CWORD=2 COMP_TYPE=9
_python_argcomplete liquid
printf '%s|' "${COMPREPLY[@]}"
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.replace(" ", "") == "--learn|", done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_its_code(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "liquid" in capsys.readouterr().out


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "unknown shell" in capsys.readouterr().err
