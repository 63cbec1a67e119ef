"""Numbers that are not finite: what a step makes of the weights is looked at before it becomes a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = build(tmp_path_factory.mktemp("tiny"))
    made.manifest.write_text(json.dumps({"path": "lm.jsonl", "type": "lm"}) + "\n")
    return made


def train(tiny: Tiny, output: Path, **options: Any) -> int:
    unused = dict.fromkeys(("mc_teacher_id", "math_logits_dir", "code_logits_dir"))
    return main(["train", *tiny.train_words(output, **{**unused, "eval_every": 0, "device": "cpu", **options})])


def checkpoints(run: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: torch.load(path, weights_only=True) for path in run.glob("*.pt")}


def test_weights_that_a_step_made_useless_are_never_saved(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    # A step whose loss and gradient are fine, and whose learning rate is not: its weights are of no use.
    bad = {"lr": "3e38", "warmup_steps": 4, "save_every": 1, "keep_last": 1, "max_steps": 8}
    assert train(tiny, tmp_path, **bad) == 5
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert "NaN or infinity in student." in message
    assert "not saved" in message
    found = checkpoints(tmp_path / "run")
    assert all(value.isfinite().all() for one in found.values() for value in one["student"].values())


def test_a_checkpoint_that_is_no_use_already_is_refused_by_name(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    assert train(tiny, tmp_path, max_steps=1) == 0
    state = torch.load(tmp_path / "run" / "final.pt", weights_only=True)["student"]
    name = next(iter(state))
    state[name].view(-1)[3] = torch.nan
    torch.save(state, tmp_path / "poisoned.pt")
    assert train(tiny, tmp_path / "next", resume_gcs_uri=tmp_path / "poisoned.pt", max_steps=1) == 4
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert "poisoned.pt" in message
    assert f"NaN or infinity in {name}" in message
