"""Weights dealt out among ranks: what each holds, and that nothing is lost on the way there and back."""

from pathlib import Path

import pytest
from tests.support.dealt_out import KINDS
from tests.support.models import tiny_model
from tests.support.processes import run
from torch import nn

from liquid_llm.config import build_run_config
from liquid_llm.errors import ModelError, UsageError
from liquid_llm.models.heads import blocks_of
from liquid_llm.wiring.sharding import require_processes


@pytest.mark.slow
def test_each_rank_holds_its_part_and_together_they_hold_the_model(tmp_path: Path) -> None:
    run("tests.support.dealt_out", KINDS, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_layers_of_a_model(kind: str) -> None:
    model = tiny_model(kind, 64)
    assert len(blocks_of(model)) == model.config.num_hidden_layers
    inside = sum(one.numel() for block in blocks_of(model) for one in block.parameters())
    every = sum(one.numel() for one in model.parameters())
    assert every / 4 < inside < every


def test_a_model_whose_blocks_share_a_weight_is_refused() -> None:
    model = tiny_model("llama", 64)
    first, second = blocks_of(model)[:2]
    second.mlp = first.mlp
    with pytest.raises(ModelError, match="do not lie in blocks of their own"):
        blocks_of(model)


def test_a_model_without_blocks_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Linear(2, 2)
            self.config = type("Config", (), {"name_or_path": ""})()

    with pytest.raises(ModelError, match="do not lie in blocks of their own"):
        blocks_of(Flat())


def test_what_cannot_be_is_refused_in_words() -> None:
    data = {"dataset_manifest": "m.jsonl", "lm_teacher_id": "t", "shard": "full"}
    with pytest.raises(UsageError, match="one process has nobody to share a model with"):
        require_processes(build_run_config("train", data), 1)
    require_processes(build_run_config("train", data), 2)
    require_processes(build_run_config("train", {**data, "shard": "none"}), 1)
    with pytest.raises(UsageError, match="--teacher_shard=full: one process has nobody"):
        require_processes(build_run_config("train", {**data, "shard": "none", "teacher_shard": "full"}), 1)
    with pytest.raises(UsageError, match="--teacher_shard=full: no online teacher is asked"):
        build_run_config("train", {"dataset_manifest": "m.jsonl", "teacher_shard": "full"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher_shard": "full", "teacher_stream": True}, "--teacher_stream: with --teacher_shard=full"),
        ({"shard": "full", "compile": True}, "--compile=true: with --shard=full"),
    ],
)
def test_what_does_not_go_with_dealing_out_is_refused_before_anything_is_read(given, words) -> None:
    asked = {"dataset_manifest": "m.jsonl", "lm_teacher_id": "t", **given}
    with pytest.raises(UsageError, match=words):
        build_run_config("train", asked)
    for left_out in given:
        build_run_config("train", {name: value for name, value in asked.items() if name != left_out})
