"""The same command over other data, weights or options: refused where it would be another run in silence, else said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.gcs import Bucket
from tests.support.tiny import Tiny, build

from liquid_llm import storage
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two types of text, one of them learnt without a teacher."""
    made = build(tmp_path_factory.mktemp("tiny"))
    lines = [{"path": "lm.jsonl", "type": "lm", "weight": 2.0}, {"path": "code.jsonl", "type": "code", "weight": 1.0}]
    made.draw_from(*lines)
    return made


def train(tiny: Tiny, output: Path, **options: Any) -> int:
    told = {"save_every": 0, "max_steps": 3, "signal": "code=none", "warmup_steps": 1}
    return tiny.train_plainly(output, **{**told, **options})


@pytest.fixture(scope="module")
def begun(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    assert train(tiny, folder) == 0
    return folder


@pytest.fixture
def out(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "out"))


def changed(tiny: Tiny, folder: Path, change: str) -> Path:
    """The manifest and its files in a folder of their own, with one change."""
    folder.mkdir()
    for name in ("lm.jsonl", "code.jsonl", "manifest.jsonl"):
        shutil.copyfile(tiny.root / name, folder / name)
    manifest, texts = folder / "manifest.jsonl", folder / "lm.jsonl"
    if change == "a weight":
        manifest.write_text(manifest.read_text().replace("2.0", "3.0"))
    elif change == "a type":
        manifest.write_text(manifest.read_text().splitlines()[0] + "\n")
    elif change == "a text":
        texts.write_text(texts.read_text().replace('"text": "', '"text": "The ', 1))
    elif change == "fewer texts":
        texts.write_text("".join(texts.read_text().splitlines(keepends=True)[::-1][:40]))
    return manifest


@pytest.mark.parametrize("change", ["a weight", "a type", "a text", "fewer texts"])
def test_other_data_under_the_same_command_is_refused_and_may_be_accepted(
    tiny: Tiny, out: Path, tmp_path: Path, change: str, capsys: Any
) -> None:
    manifest = changed(tiny, tmp_path / "data", change)
    before = (out / "run" / "metrics.jsonl").read_bytes()
    assert train(tiny, out, dataset_manifest=manifest, max_steps=5) == 3
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert "the data of this run has changed since its checkpoint" in message
    assert ("code: gone" if change == "a type" else "lm: ") in message
    assert (out / "run" / "metrics.jsonl").read_bytes() == before
    assert train(tiny, out, dataset_manifest=manifest, max_steps=5, accept_changes="true") == 0
    assert "as --accept_changes says: " in capsys.readouterr().err
    assert read_metrics(out / "run")[-1]["step"] == 5
    assert train(tiny, out, dataset_manifest=manifest, max_steps=6) == 0  # from here on it is its own data


def test_the_same_data_elsewhere_is_the_same_run(tiny: Tiny, out: Path, tmp_path: Path) -> None:
    """Neither its place nor its cache counts, nor when its files were written."""
    manifest = changed(tiny, tmp_path / "data", "nothing")
    assert train(tiny, out, dataset_manifest=manifest, data_cache=tmp_path / "cache", max_steps=5) == 0
    assert train(tiny, tmp_path / "whole", max_steps=5) == 0
    rows = [[without_timings(row) for row in read_metrics(one / "run")][-1] for one in (out, tmp_path / "whole")]
    assert rows[0]["step"] == rows[1]["step"] == 5


@pytest.mark.parametrize("option", [{"seed": 7}, {"batch_size": 4}, {"grad_accum": 2}, {"val_fraction": 0.3}])
def test_another_order_by_option_is_refused_too(tiny: Tiny, out: Path, option: dict[str, Any], capsys: Any) -> None:
    ((name, value),) = option.items()
    assert train(tiny, out, max_steps=5, **option) == 2
    assert f"--{name} is {value} and was" in capsys.readouterr().err.rpartition("error: ")[2]


def test_a_new_beginning_may_change_what_it_likes(tiny: Tiny, out: Path, tmp_path: Path, capsys: Any) -> None:
    manifest = changed(tiny, tmp_path / "data", "a type")
    resumed = {"resume_gcs_uri": out / "run" / "last.pt", "dataset_manifest": manifest, "seed": 7, "batch_size": 4}
    assert train(tiny, tmp_path / "next", student=None, **resumed) == 0
    assert "accept_changes" not in capsys.readouterr().err


def test_a_longer_run_says_how_its_learning_rate_jumps(tiny: Tiny, out: Path, capsys: Any) -> None:
    assert train(tiny, out, max_steps=20) == 0
    said = capsys.readouterr().err
    assert "the learning rate jumps at step 3" in said
    assert "(of 20 steps now, of 3 then)" in said


def test_another_teacher_another_optimizer_and_fewer_steps_are_said(tiny: Tiny, out: Path, capsys: Any) -> None:
    """The run goes on: its texts are as they were. What it already has is not done again."""
    assert train(tiny, out, max_steps=4) == 0
    assert "changes its course" not in capsys.readouterr().err
    assert train(tiny, out, max_steps=5, signal=f"code=online:{tiny.teacher}", weight_decay=0.3, grad_clip=0.5) == 0
    said = capsys.readouterr().err
    for words in (
        "what teaches code is teacher (revision ",
        "--weight_decay is 0.3, and was 0.1",
        "--grad_clip is 0.5",
    ):
        assert words in said
    shutil.rmtree(out / "run" / "student")
    assert train(tiny, out, max_steps=2) == 0
    assert "step 5 is behind the 2 steps asked for" in capsys.readouterr().err
    assert read_metrics(out / "run")[-1]["step"] == 5


def test_the_weights_that_a_run_stays_near_must_be_those_it_began_with(
    tiny: Tiny, begun: Path, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base.pt"
    shutil.copyfile(begun / "run" / "last.pt", base)
    near = {"resume_gcs_uri": base, "keep_old_logit_l2": 0.5, "keep_old_logit_l2_fade_step": 9, "student": None}
    assert train(tiny, tmp_path / "out", **near) == 0
    assert train(tiny, tmp_path / "out", **{**near, "max_steps": 4}) == 0
    shutil.copyfile(tmp_path / "out" / "run" / "last.pt", base)
    capsys.readouterr()
    assert train(tiny, tmp_path / "out", **{**near, "max_steps": 5}) == 2
    assert "--resume_gcs_uri holds other weights" in capsys.readouterr().err


def test_other_options_of_a_continued_run_are_said_and_kept(
    tiny: Tiny, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny, out) == 0
    said = capsys.readouterr().err
    assert "already at step 3 of 3: nothing to do. To train it longer give --max_steps=MORE" in said
    assert train(tiny, out, max_steps=4, lr=2e-2) == 0
    said = capsys.readouterr().err
    assert "this run goes on from step 3" in said
    assert "since its last session this run has other options: lr 0.01 -> 0.02, max_steps 3 -> 4" in said
    first, second = json.loads((out / "run" / "provenance" / "history.json").read_text())
    assert (first["step"], first["options"]["max_steps"], first["changed"]) == (0, 3, {})
    assert (second["step"], second["options"]["lr"]) == (3, 2e-2)
    assert second["changed"] == {"lr": [0.01, 0.02], "max_steps": [3, 4]}
    log = (out / "run" / "log.txt").read_text()
    assert log.count("---- process") == 2, "one that has nothing to do leaves no word"
    assert "WARNING since its last session" in log


def test_a_run_that_begins_beside_others_names_what_differs_and_a_dry_run_looks_where_it_would(
    tiny: Tiny, tmp_path: Path, gcs: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    there = f"{gcs.uri}/many"
    assert train(tiny, there, local_workdir=tmp_path / "a") == 0  # type: ignore[arg-type]
    sent = storage.read_bytes(f"{there}/run/log.txt")
    assert sent == next((tmp_path / "a").glob("*/log.txt")).read_bytes(), "the log is mirrored whole"
    assert b"INFO finished at step 3" in sent
    asked = {"local_workdir": tmp_path / "b", "dry_run": "true", "data_cache": tmp_path / "other", "max_steps": 4}
    capsys.readouterr()
    assert train(tiny, there, **asked) == 0  # type: ignore[arg-type]
    found = json.loads(capsys.readouterr().out)
    assert found["place"]["would_continue"]["step"] == found["starts_from"]["step"] == 3
    assert found["starts_from"]["source"].startswith(f"{there}/run/")
    assert train(tiny, there, run_id=None, **asked) == 0  # type: ignore[arg-type]
    found, said = json.loads((told := capsys.readouterr()).out), told.err
    assert found["place"]["would_continue"] is None
    (beside,) = found["siblings"]
    assert beside.startswith("another run in this output, run, differs in max_steps 3 there, 4 here: --run_id=run")
    assert beside in said
    assert "--warmup_steps" not in said


def test_what_a_run_lacks_is_warned_of_once_before_its_first_step(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = {"val_fraction": 0.01, "warmup_steps": None, "lm_teacher_id": None, "dry_run": "true"}
    assert train(tiny, tmp_path / "out", **lacking, signal=f"code=online:{tiny.teacher}") == 0
    said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    for words in (
        "lm: no teacher is named (--lm_teacher_id=MODEL or --signal lm=...): plain cross-entropy",
        "--warmup_steps=100 (by default) reaches past the 3 steps of this run",
        "text is held out",
    ):
        assert sum(words in one for one in said) == 1, (words, said)
