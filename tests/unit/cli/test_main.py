"""The ``liquid`` command: what is known, what is not, and what never reaches the screen."""

import subprocess
import sys

import pytest

from liquid_llm.cli.main import guard, main
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


@pytest.mark.parametrize("command", ["inspect", "report", "demo", "store", "prepare", "study"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"liquid {command}" in capsys.readouterr().out
