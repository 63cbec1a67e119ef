"""Runs in one output are told apart by what differs in their options, and what a run was is kept session by session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.gcs import Bucket

from liquid_llm import storage
from liquid_llm.config import build_run_config
from liquid_llm.config_names import counted_options
from liquid_llm.options import TRAIN
from liquid_llm.provenance import HISTORY, add_to_history
from liquid_llm.wiring.siblings import differences_of, find_siblings, in_words


def counted(**given: Any) -> dict[str, Any]:
    return counted_options(build_run_config(TRAIN, {"dataset_manifest": "m.jsonl", "lm_teacher_id": "t", **given}))


def begin(run: str | Path, options: dict[str, Any], step: int = 0, start: str = "fresh") -> Any:
    return add_to_history(run, step=step, start=start, options={}, counted=options, changed=differences_of)


def test_what_differs_is_named_and_nothing_else() -> None:
    one = counted(lr=0.001, betas=(0.9, 0.95))
    assert differences_of(one, one) == {}
    assert differences_of(json.loads(json.dumps(one)), one) == {}, "as it is kept and as it is"
    other = counted(lr=0.002, max_steps=40, lm_teacher_id="u", num_workers=7, data_cache="elsewhere")
    found = differences_of(one, other)
    assert found.pop("teacher of lm") == ("online:t", "online:u")
    assert found == {"lr": (0.001, 0.002), "max_steps": (None, 40)}
    assert in_words(found) == "lr 0.001 -> 0.002, max_steps (default) -> 40"


VALUES = st.dictionaries(st.sampled_from(["lr", "seed", "learn"]), st.integers() | st.text() | st.lists(st.integers()))


@given(VALUES, VALUES)
def test_differences_are_those_of_either_side(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = differences_of({"options": one}, {"options": other})
    assert {name: pair[::-1] for name, pair in found.items()} == differences_of({"options": other}, {"options": one})
    assert set(found) == {name for name in {*one, *other} if one.get(name) != other.get(name)}


def test_siblings_are_named_the_likest_first_wherever_the_output_is(tmp_path: Path, gcs: Bucket) -> None:
    runs = {"a": {"max_steps": 30}, "b": {"max_steps": 30, "lr": 1e-3, "seed": 2}, "same": {}, "own": {}}
    runs["far"] = {"max_steps": 9, "lr": 1e-3, "seed": 3, "weight_decay": 0.3}
    for output in (str(tmp_path / "out"), f"{gcs.uri}/out"):
        for name, given_there in runs.items():
            begin(storage.join(output, name), counted(**given_there))
        storage.write_bytes(storage.join(output, "torn", "provenance", HISTORY), b'[{"coun')
        storage.write_bytes(storage.join(output, "empty", "provenance", HISTORY), b"[]")
        storage.write_bytes(storage.join(output, "notes.txt"), b"")
        assert storage.list_folders(output) == ["a", "b", "empty", "far", "own", "same", "torn"]
        found = find_siblings(output, "own", counted())
        assert [one.name for one in found] == ["same", "a", "b"]
        assert "same, was asked for with the same options: --run_id=same goes on" in found[0].in_words()
        assert "differs in max_steps 30 there, (default) here" in found[1].in_words()
    assert find_siblings(str(tmp_path / "nowhere"), "own", counted()) == []
    assert storage.list_folders(f"{gcs.uri}/nowhere") == []


def test_the_history_has_each_session_and_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    first = counted(lr=0.001, resume_gcs_uri="gs://x/a-very-secret-value")
    assert begin(tmp_path, first) == {}
    assert begin(tmp_path, first, 5, "continue") == {}, "a secret that is hidden is no change"
    assert begin(tmp_path, {**first, "options": {**first["options"], "lr": 0.002}}, 9, "continue") == {
        "lr": (0.001, 0.002)
    }
    text = (tmp_path / "provenance" / HISTORY).read_text()
    assert "a-very-secret-value" not in text
    kept = json.loads(text)
    assert [(one["step"], one["start"], one["changed"]) for one in kept] == [
        (0, "fresh", {}),
        (5, "continue", {}),
        (9, "continue", {"lr": [0.001, 0.002]}),
    ]
    assert all(one["started_at"].endswith("+00:00") for one in kept)


def test_a_history_that_cannot_be_read_is_left_out_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path, counted())
    (tmp_path / "provenance" / HISTORY).write_text("[{")
    assert begin(tmp_path, counted()) == {}
    assert "the history so far is unreadable" in caplog.text
    assert len(json.loads((tmp_path / "provenance" / HISTORY).read_text())) == 1
