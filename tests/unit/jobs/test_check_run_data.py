"""What options say wrongly of the data is said before models are read; what a preparation writes may be missing.

That what is wrong with the data itself comes behind the options: tests/integration/test_bad_input.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from liquid_llm.cli.main import main
from liquid_llm.config import build_run_config
from liquid_llm.jobs.prepare import check_run_data
from liquid_llm.options import TRAIN


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("manifest", "code", "words"),
    [
        (None, 4, "manifest.jsonl: not found"),
        ('{"path": "a.jsonl", "type": "other"}', 2, "--signal other=online:MODEL"),
    ],
)
def test_a_slip_in_what_options_say_of_the_data_is_said_before_any_model_is_looked_for(
    manifest, code, words, dry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.jsonl").write_text(manifest + "\n")
    given = {
        "dataset_manifest": tmp_path / "manifest.jsonl",
        "signal": f"mine=online:{tmp_path / 'no-teacher'}",  # said only where the data has been looked at first
        "output_dir": tmp_path / "runs",
        "max_steps": 1,
        "device": "cpu",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in given.items()), *dry]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "no-teacher" not in said.partition("error: ")[2]


def test_what_a_preparation_writes_may_not_be_there_yet(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    config = build_run_config(TRAIN, {"dataset_manifest": str(manifest), "max_steps": 1}).data
    (tmp_path / "datasets.yaml").write_text("one: {type: lm, in: raw/*.txt, out: made/one, manifest: manifest.jsonl}\n")
    check_run_data(config)
    manifest.write_text('{"path": "made/one/one-*.jsonl", "type": "lm"}\n')
    check_run_data(config)
