"""The Makefile's set-up: done once, done again when it must be, and never taken for done when it was not.

pip is replaced by ``true`` or ``false``, so these tests say nothing about what is installed; CI's clean clone does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.readme import REPOSITORY

STAMP = Path(".venv") / ".installed"
OUTER = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "TORCH_INDEX", "ARGS", "WORKERS")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files the set-up reads, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    (folder / ".venv").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def set_up(folder: Path, *, pip: str = "true", python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in OUTER}
    argv = ["make", str(STAMP), f"PIP={pip}", f"PYTHON={python}"]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def was_done(result: subprocess.CompletedProcess[str]) -> bool:
    assert result.returncode == 0, result.stderr
    return "Setting up .venv" in result.stdout


def test_set_up_happens_once(clone: Path) -> None:
    assert was_done(set_up(clone))
    assert not was_done(set_up(clone))


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(clone: Path, name: str) -> None:
    assert was_done(set_up(clone))
    later = (clone / STAMP).stat().st_mtime + 5
    os.utime(clone / name, (later, later))
    assert was_done(set_up(clone))


def test_a_moved_clone_is_set_up_again(clone: Path) -> None:
    assert was_done(set_up(clone))
    moved = clone.rename(clone.with_name("elsewhere"))
    assert was_done(set_up(moved))


def test_a_failed_set_up_is_not_taken_for_done(clone: Path) -> None:
    assert was_done(set_up(clone))
    os.utime(clone / STAMP, (0, 0))
    failing = clone.parent / "pip"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    failing.chmod(0o755)
    assert set_up(clone, pip=str(failing)).returncode != 0
    assert not (clone / STAMP).exists()
    assert was_done(set_up(clone))


def test_an_old_python_is_refused(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = set_up(clone, python=str(old))
    assert result.returncode != 0
    assert "Python 3.8.2 is too old: 3.10 or newer is needed" in result.stderr


def test_a_missing_python_is_named(clone: Path) -> None:
    result = set_up(clone, python="python-that-is-not-there")
    assert result.returncode != 0
    assert "'python-that-is-not-there' is not there" in result.stderr


def test_a_python_without_venv_is_told_what_to_install(clone: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    bare.chmod(0o755)
    result = set_up(clone, python=str(bare))
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr


def test_make_alone_lists_the_targets(clone: Path) -> None:
    # the make of `make test` around us would have this one say where it enters and leaves
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=clone, capture_output=True, text=True, timeout=60, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    targets = "help demo docs test check bench gpu soak mutants fuzz format clean"
    assert listed == set(targets.split())
