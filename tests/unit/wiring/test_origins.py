"""A model folder given to start from is the student that it is as ``--student``: one loader, whatever is in it."""

from __future__ import annotations

import json
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
    "float8 without a scale": (
        lambda weights: {name: one.to(torch.float8_e4m3fn) for name, one in weights.items()},
        {},
    ),
    "the names of a wrapper": (lambda weights: {f"_orig_mod.module.{name}": one for name, one in weights.items()}, {}),
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


def in_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for place in sorted(set(places.values())):
        mine = {name: one.contiguous() for name, one in weights.items() if places[name] == place}
        save_file(mine, folder / place, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def as_torch_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("store", [in_shards, as_torch_file])
def test_other_files_hold_the_same_student(tmp_path: Path, store: Callable[[Path], None]) -> None:
    folder = model_folder(tmp_path / "m", dict)
    expected = as_student(folder).state_dict()
    store(folder)
    for found in (as_student(folder).state_dict(), open_origin(str(folder)).state_dict):
        assert not [name for name, one in expected.items() if not torch.equal(one, found[name])]


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_a_bad_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def with_an_empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def as_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def in_whole_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: one.to(torch.int8) for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def in_8_bits_with_scales(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    small = {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    save_file({**weights, **small}, folder / "model.safetensors", {"format": "pt"})


FOLDERS: dict[Callable[[Path], None], str] = {
    without_a_shard: r"named by the index are missing; got model-00002-of-00002\.safetensors\. Copy the folder again",
    with_a_bad_index: r"index\.json: this index of shards cannot be read",
    with_an_empty_file: r"model\.safetensors: this file is truncated, damaged or not safetensors; got 0 bytes",
    without_weights: "no weights in this folder; got config.json.*Copy the folder again",
    as_adapter: r"an adapter \(PEFT\) and no model; got adapter_config.json.*merge_and_unload",
    in_whole_numbers: "embed_tokens.weight: the weights are quantised, and config.json does not say how; got I8",
    in_8_bits_with_scales: "up_proj.weight: the weights are quantised, and config.json does not say how; got F8_E4M3",
}


@pytest.mark.parametrize("change", FOLDERS)
def test_a_folder_that_is_no_model_is_refused_in_one_way(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = model_folder(tmp_path / "m", dict)
    change(folder)
    said = []
    for begin, kind in ((as_student, ModelError), (lambda path: open_origin(str(path)), CheckpointError)):
        with pytest.raises(LiquidError, match=FOLDERS[change]) as raised:
            begin(folder)
        assert type(raised.value) is kind
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_gguf_file_is_a_student_and_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for place in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"a model and no checkpoint\. Name it as --student=\S+/model\.gguf"):
            open_origin(str(place))
