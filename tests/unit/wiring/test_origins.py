"""A model folder given to start from is the student that it is as ``--student``: one loader, whatever is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import tiny_model

from liquid_llm.errors import CheckpointError, LiquidError, ModelError
from liquid_llm.models.student import build_student
from liquid_llm.wiring.origins import open_origin
from liquid_llm.wiring.students import load_weights

VOCAB_SIZE = 64
Weights = dict[str, torch.Tensor]


def model_folder(folder: Path, change: Callable[[Weights], Weights], kind: str = "llama", **config: Any) -> Path:
    """A saved model whose weights were changed behind its back."""
    model = tiny_model(kind, VOCAB_SIZE, seed=5, **config)
    model.save_pretrained(folder)
    changed = change(load_file(folder / "model.safetensors"))
    save_file({name: one.contiguous() for name, one in changed.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_student(folder: Path) -> Any:
    return build_student(str(folder), vocab_size=VOCAB_SIZE, bos_id=1, eos_id=0, block_size=16, seed=0)


def without_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.removeprefix(prefix): one for name, one in weights.items()}


USABLE: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any]]] = {
    "as saved": (dict, {}),
    "a head of its own": (dict, {"tie_word_embeddings": False}),
    "a head beside a tied embedding": (
        lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * 2},
        {"tie_word_embeddings": True},
    ),
    "the head alone": (
        lambda weights: {name.replace("model.embed_tokens", "lm_head"): one for name, one in weights.items()},
        {"tie_word_embeddings": True},
    ),
    "the names of a model without a head": (without_prefix("model."), {"tie_word_embeddings": True}),
    "GPT-2's first names": (without_prefix("transformer."), {"kind": "gpt2"}),
    "something that is no weight": (lambda weights: {**weights, "more.weight": torch.ones(3)}, {}),
    "bfloat16": (lambda weights: {name: one.bfloat16() for name, one in weights.items()}, {}),
}


@pytest.mark.parametrize("what", USABLE)
def test_a_folder_to_resume_from_is_the_student_that_it_is_by_name(tmp_path: Path, what: str) -> None:
    change, config = USABLE[what]
    folder = model_folder(tmp_path / "m", change, **config)
    expected = as_student(folder).state_dict()
    origin = open_origin(str(folder))
    assert origin.state_dict.keys() == expected.keys()
    assert not [name for name, one in expected.items() if not torch.equal(one, origin.state_dict[name])]


def test_a_head_that_differs_is_kept_and_no_configuration_ties_it_again(tmp_path: Path, caplog: Any) -> None:
    change, config = USABLE["a head beside a tied embedding"]
    folder = model_folder(tmp_path / "m", change, **config)
    model, origin = as_student(folder), open_origin(str(folder))
    assert "its head is not its embedding" in caplog.text
    assert origin.config is not None
    for tied in (origin.config["tie_word_embeddings"], model.config.tie_word_embeddings):
        assert tied is False
    model.save_pretrained(tmp_path / "again")
    head = as_student(tmp_path / "again").get_output_embeddings().weight
    assert torch.equal(head, load_file(folder / "model.safetensors")["lm_head.weight"])


UNUSABLE: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "no head, and it is not the embedding": (
        lambda weights: {name: one for name, one in weights.items() if name != "lm_head.weight"},
        {"tie_word_embeddings": False},
        "no lm_head.weight. An output head is not made up",
    ),
    "no norms": (lambda weights: {name: one for name, one in weights.items() if "norm" not in name}, {}, "no model."),
    "another width": (
        lambda weights: {name: one[:-1] if "norm" in name else one for name, one in weights.items()},
        {},
        "shape",
    ),
    "a NaN": (lambda weights: {name: one * torch.nan for name, one in weights.items()}, {}, "not finite"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_missing_or_no_number_is_refused_in_the_same_words(tmp_path: Path, what: str) -> None:
    change, config, words = UNUSABLE[what]
    folder = model_folder(tmp_path / "m", change, **config)

    def resume() -> None:
        origin = open_origin(str(folder))
        load_weights(tiny_model("llama", VOCAB_SIZE, **config), origin.state_dict, origin.description)

    for begin, kind in ((lambda: as_student(folder), ModelError), (resume, CheckpointError)):
        with pytest.raises(LiquidError, match=words) as raised:
            begin()
        assert type(raised.value) is kind


def test_a_checkpoint_with_two_values_for_what_the_model_has_once_is_refused() -> None:
    model = tiny_model("llama", VOCAB_SIZE, tie_word_embeddings=True)
    weights = model.state_dict()
    load_weights(model, weights, "x")
    with pytest.raises(CheckpointError, match=r"two values; got lm_head\.weight is not model\.embed_tokens\.weight"):
        load_weights(model, {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, "x")
