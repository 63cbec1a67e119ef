from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from tests.support.checkpoints import metadata_of

from liquid_llm import versions
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.errors import CheckpointError

# DESIGN, section 3
NAMED_FIELDS = [
    "format_version",
    "step",
    "tokens_seen",
    "block_size",
    "kd_alpha",
    "kd_temperature",
    "alpha_schedule",
    "temp_schedule",
    "schedule_state",
    "grad_accum",
    "warmup_steps",
    "lr",
    "lr_peak",
    "positional_embedding",
    "rope_scale",
    "eval_ctx_lens",
    "student",
    "tokenizer_hash",
    "sha256",
]


def test_every_field_the_design_names_is_written() -> None:
    assert set(NAMED_FIELDS) <= set(metadata_of(1).to_dict())


def test_json_round_trip_keeps_every_bit() -> None:
    written = metadata_of(7, lr=1 / 3, kd_alpha=0.1 + 0.2, best_val_loss=math.pi, sha256="00ff")
    text = json.dumps(written.to_dict())
    read = CheckpointMetadata.from_dict(json.loads(text), "here")
    assert read.to_dict() == written.to_dict()
    assert read.lr == written.lr
    assert read.eval_ctx_lens == (512, 1024)


def test_dictionary_in_the_file_equals_the_one_in_json() -> None:
    values = metadata_of(3, student={"config": {"id2label": {0: "a"}, "layer_types": ("conv", "full")}}).to_dict()
    assert json.loads(json.dumps(values)) == values


def test_no_validation_yet_is_null_not_infinity() -> None:
    assert metadata_of(1, best_val_loss=math.inf).to_dict()["best_val_loss"] is None


def test_a_value_json_cannot_hold_is_refused_when_writing() -> None:
    with pytest.raises(ValueError, match="JSON"):
        metadata_of(1, run={"loss": math.nan}).to_dict()


def test_unknown_fields_are_left_out() -> None:
    values = metadata_of(1).to_dict() | {"added_later": 1}
    assert CheckpointMetadata.from_dict(values, "here") == CheckpointMetadata.from_dict(
        metadata_of(1).to_dict(), "here"
    )


@pytest.mark.parametrize("name", sorted({one.name for one in dataclasses.fields(CheckpointMetadata)} - {"versions"}))
def test_each_missing_field_is_named(name: str) -> None:
    values = metadata_of(1).to_dict()
    del values[name]
    with pytest.raises(CheckpointError, match=rf"best\.meta\.json.*{name}"):
        CheckpointMetadata.from_dict(values, "best.meta.json")


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(CheckpointMetadata)])
@pytest.mark.parametrize("wrong", [True, b"x", [None], {"a"}])
def test_each_wrong_type_is_refused_with_field_and_value(name: str, wrong: Any) -> None:
    values = metadata_of(1).to_dict() | {name: wrong}
    with pytest.raises(CheckpointError, match=name) as caught:
        CheckpointMetadata.from_dict(values, "best.meta.json")
    assert repr(wrong) in str(caught.value)
    assert caught.value.expected is not None


@pytest.mark.parametrize(("name", "wrong"), [("step", -1), ("step", 1.5), ("lr", "1e-4"), ("student", [])])
def test_values_of_the_wrong_kind(name: str, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=name):
        CheckpointMetadata.from_dict(metadata_of(1).to_dict() | {name: wrong}, "x")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_says_what_to_do(version: Any) -> None:
    with pytest.raises(CheckpointError, match="another format version") as caught:
        CheckpointMetadata.from_dict(metadata_of(1).to_dict() | {"format_version": version}, "best.pt")
    assert repr(version) in str(caught.value)
    assert "release" in str(caught.value)


def test_versions_are_written_and_without_them_each_is_the_first() -> None:
    values = metadata_of(1).to_dict()
    assert values["versions"] == versions.CURRENT
    del values["versions"]
    assert CheckpointMetadata.from_dict(values, "here").versions == versions.FIRST


@pytest.mark.parametrize("wrong", [{"order": 0}, {"order": "1"}, {"order": True}, {"order": 1.5}, [1], "1"])
def test_versions_are_whole_numbers_from_1(wrong: Any) -> None:
    with pytest.raises(CheckpointError, match="field versions"):
        CheckpointMetadata.from_dict(metadata_of(1).to_dict() | {"versions": wrong}, "x")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_something_else_than_an_object(values: Any) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint metadata"):
        CheckpointMetadata.from_dict(values, "x")
