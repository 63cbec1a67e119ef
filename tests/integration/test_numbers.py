"""Numbers that are not finite: what a step makes of the weights is looked at before it becomes a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = build(tmp_path_factory.mktemp("tiny"))
    made.draw_from({"path": "lm.jsonl", "type": "lm"})
    return made


def train(tiny: Tiny, output: Path, **options: Any) -> int:
    return tiny.train_plainly(output, **{"device": "cpu", **options})


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


@pytest.fixture(scope="module")
def poisoned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher that has no number for one token, and texts of which a third hold it."""
    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    head = model.get_output_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("@", add_special_tokens=False)["input_ids"][-1]] = torch.nan
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = [json.loads(line) for line in (tiny.root / "lm.jsonl").read_text().splitlines()]
    for number in range(0, 60, 3):
        rows[number] |= {"text": "@ " + rows[number]["text"], "sample_id": f"poison-{number}"}
    (folder / "lm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.jsonl").write_text(json.dumps({"path": "lm.jsonl", "type": "lm"}) + "\n")
    return {"lm_teacher_id": folder / "teacher", "dataset_manifest": folder / "manifest.jsonl"}


def test_a_text_that_gives_no_number_is_named(
    tiny: Tiny, poisoned: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    assert train(tiny, tmp_path, **poisoned, max_steps=30) == 5
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert "lm samples " in message
    assert "poison-" in message
    assert "--skip_bad_steps" in message
    found = checkpoints(tmp_path / "run")
    assert all(value.isfinite().all() for one in found.values() for value in one["student"].values())


def test_bad_steps_are_left_out_counted_and_kept_count_of(
    tiny: Tiny, poisoned: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """In one go, or stopped and continued: the same steps, the same weights, the same count."""
    told = {**poisoned, "skip_bad_steps": 4, "save_every": 4}
    assert train(tiny, tmp_path / "whole", **told, max_steps=16) == 0
    said = capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "whole" / "run") if row["kind"] == "train"]
    skipped = set(range(1, 17)) - {row["step"] for row in rows}
    assert len(skipped) == said.count("the step is left out") > 0
    for row in rows:  # a step that is left out has no row of its own
        assert row.get("skipped_steps", 0) == sum(step < row["step"] for step in skipped)
    assert "poison-" in said
    assert f"{len(skipped)} of 16 steps were left out" in said
    whole = checkpoints(tmp_path / "whole" / "run")
    assert all(value.isfinite().all() for one in whole.values() for value in one["student"].values())
    run = shutil.copytree(tmp_path / "whole", tmp_path / "cut") / "run"
    for path in [*run.glob("*-00000016.*"), *run.glob("last.*"), *run.glob("final.*")]:
        path.unlink()
    shutil.rmtree(run / "student")
    assert train(tiny, tmp_path / "cut", **told, max_steps=16) == 0
    again = checkpoints(run)
    assert all(torch.equal(value, again["final"]["student"][name]) for name, value in whole["final"]["student"].items())
    theirs = [without_timings(row) for row in rows]
    assert [without_timings(row) for row in read_metrics(run) if row["kind"] == "train"] == theirs
