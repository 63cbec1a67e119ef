from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tests.support.checkpoints import metadata_of

from liquid_llm import versions
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.errors import CheckpointError

# DESIGN, section 3
NAMED_FIELDS = """
    format_version step tokens_seen block_size kd_alpha kd_temperature alpha_schedule temp_schedule schedule_state
    grad_accum warmup_steps lr lr_peak positional_embedding rope_scale eval_ctx_lens student tokenizer_hash sha256
"""

COUNT, NUMBER, TEXT, OBJECT = "a whole number, at least 0", "a number", "text", "an object"
# what each field takes, and values it does not
SCHEMA = {
    COUNT: ({"step", "tokens_seen", "block_size", "grad_accum", "warmup_steps", "data_position"}, [-1, 1.5, "1", None]),
    NUMBER: ({"kd_alpha", "kd_temperature", "lr"}, ["1e-4", None, []]),
    f"{NUMBER} or null": ({"lr_peak", "rope_scale", "best_val_loss"}, ["1", []]),
    TEXT: ({"positional_embedding", "tokenizer_hash", "created"}, [None, 1]),
    f"{TEXT} or null": ({"alpha_schedule", "temp_schedule", "sha256"}, [1, []]),
    OBJECT: ({"schedule_state", "student", "run"}, [None, [], "{}"]),
    "a list of whole numbers": ({"eval_ctx_lens"}, [None, 512, ["512"], [1.5], [True]]),
}


def test_every_field_the_design_names_is_written() -> None:
    assert metadata_of(1).to_dict().keys() >= set(NAMED_FIELDS.split())


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


def refusal(values: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        CheckpointMetadata.from_dict(values, "best.meta.json")
    assert "best.meta.json" in str(caught.value)
    return caught.value


def test_a_missing_field_and_a_wrong_value_are_named_with_what_is_expected() -> None:
    whole = metadata_of(1).to_dict()
    assert set.union(*(names for names, _ in SCHEMA.values())) == whole.keys() - {"format_version", "versions"}
    for expected, (names, wrong_values) in SCHEMA.items():
        for name in names:
            missing = refusal({key: value for key, value in whole.items() if key != name})
            assert f"field {name} is missing" in str(missing)
            assert missing.expected == expected
            for wrong in [True, b"x", [None], {"a"}, *wrong_values]:
                error = refusal(whole | {name: wrong})
                assert (error.got, error.expected) == (repr(wrong), expected), name
                assert f"field {name}" in str(error)


@pytest.mark.parametrize("version", [0, 3, "1", None])
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


@pytest.mark.parametrize(
    "changes",
    [{"lr": math.nan}, {"kd_alpha": math.inf}, {"run": {"a": [1.0, -math.inf]}}, {"student": {"x": torch.zeros(1)}}],
)
def test_what_could_not_have_been_written_is_refused(changes: dict[str, Any]) -> None:
    values = {**metadata_of(7).to_dict(), **changes}
    with pytest.raises(CheckpointError, match="a place: metadata holds what JSON does not"):
        CheckpointMetadata.from_dict(values, "a place")
