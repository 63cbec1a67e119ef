"""The option names of the three faces are a contract: removing or renaming one is a failing test."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from liquid_llm.options import EVERY, options_of

FROZEN = Path(__file__).parent / "frozen_options.txt"
MODULES = {
    "anneal": "trainer.entrypoint",
    "train": "stage1_hybrid.cli",
    "capture": "stage1_hybrid.precompute_hybrid_logits",
}


def frozen() -> dict[str, list[str]]:
    faces: dict[str, list[str]] = {}
    for line in FROZEN.read_text().splitlines():
        face, _, name = line.partition(" ")
        faces.setdefault(face, []).append(name)
    return faces


@pytest.mark.parametrize("face", EVERY)
def test_no_option_disappears_and_new_ones_are_written_down(face):
    now = sorted(option.name for option in options_of(face))
    assert now == sorted(frozen()[face]), f"options of {face} changed: edit {FROZEN.name} only to add"


def processor_seconds():
    """Of the processes started so far: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("face", EVERY)
def test_help_names_every_option_at_once(face):
    begun = processor_seconds()
    done = subprocess.run([sys.executable, "-m", MODULES[face], "--help"], capture_output=True, text=True, check=True)
    help_seconds = processor_seconds() - begun
    begun = processor_seconds()
    subprocess.run([sys.executable, "-c", "import argparse, yaml"], check=True)
    bare_seconds = processor_seconds() - begun
    for option in options_of(face):
        assert f"--{option.name}" in done.stdout
    # No absolute time: help costs little more than starting Python, far less than importing torch would.
    assert help_seconds < 5 * bare_seconds + 0.2


@pytest.mark.parametrize("face", EVERY)
def test_a_wrong_option_exits_2_without_a_traceback(face):
    done = subprocess.run(
        [sys.executable, "-m", MODULES[face], "--no-such"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown option --no_such" in done.stderr
    assert "Traceback" not in done.stderr
