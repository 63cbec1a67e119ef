"""The option names of the three faces are a contract: removing or renaming one is a failing test."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from liquid_llm.cli.main import main
from liquid_llm.config import build_run_config
from liquid_llm.options import EVERY, TRAIN, options_of
from stage1_hybrid import cli

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


@pytest.mark.parametrize(
    ("words", "file", "expected"),
    [([], "seed: 7", 2.0), (["--kd_temperature=3"], "seed: 7", 3.0), ([], "kd_temperature: 1.5", 1.5)],
)
def test_the_reference_keeps_the_default_it_has_always_had(words, file, expected, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("liquid_llm.jobs.train.run_training", lambda face, options, **_: given.append(options) or 0)
    config = tmp_path / "run.yaml"
    config.write_text(file)
    assert cli.main(["--dataset_manifest=m.jsonl", f"--config={config}", *words]) == 0
    assert main(["train", "--dataset_manifest=m.jsonl", f"--config={config}", *words]) == 0
    reference, ours = (build_run_config(TRAIN, options) for options in given)
    assert reference.objective.temperature == expected
    assert reference.given["kd_temperature"] == expected, "provenance says it, so that liquid train repeats the run"
    assert ours.objective.temperature == (1.0 if expected == 2 else expected)
    for face, value in ((cli.main, "2.0"), (lambda words: main(["train", *words]), "1.0")):
        with pytest.raises(SystemExit):
            face(["--help"])
        assert f"KD temperature [{value}]" in capsys.readouterr().out
