"""``liquid inspect`` says what a path holds, and refuses what is nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import stores
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.errors import UsageError
from liquid_llm.jobs.inspect import describe, inspect


def run_directory(folder: Path) -> None:
    with CheckpointStore(folder, keep_last=2) as store:
        for step in (1, 2):
            store.save(state_of(step), metadata_of(step), also_as=("last",))
    rows: list[dict[str, Any]] = [{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_shows_its_checkpoints_and_its_last_rows(tmp_path: Path) -> None:
    run_directory(tmp_path)
    found = describe(str(tmp_path))
    assert found["kind"] == "run"
    assert {name: row["step"] for name, row in found["checkpoints"].items()} == {
        "step-00000001": 1,
        "step-00000002": 2,
        "last": 2,
    }
    assert set(found["checkpoints"]["last"]) == {"step", "tokens_seen", "block_size"}
    assert found["last_train"]["loss"] == 1.0
    assert "last_eval" not in found


def test_a_checkpoint_a_store_and_a_manifest_say_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_directory(tmp_path / "run")
    stores.write(tmp_path / "store", stores.SAMPLES)
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a", "type": "code"}\n')
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"path": "[01].jsonl", "type": "code", "weight": 2.0}\n')
    assert describe(str(tmp_path / "run" / "last.pt"))["step"] == 2
    assert describe(str(tmp_path / "store"))["codec"] == stores.CODEC.name
    assert inspect(str(manifest)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["types"], found["entries"][0]["files"]) == ("manifest", {"code": 1}, 2)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="nothing to inspect"):
        describe(str(tmp_path))
