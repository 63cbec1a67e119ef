"""The end of a model, read without the rest of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import CAUSAL, tiny_model

from liquid_llm.errors import ModelError
from liquid_llm.models.final_part import open_final_part
from liquid_llm.models.heads import blocks_of, hidden_states, output_head


def saved(folder: Path, name: str, **words: Any) -> Any:
    model = tiny_model(name).eval()
    model.save_pretrained(folder, **words)
    return model


def last_states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last block ends with, and what the head takes."""
    kept: list[torch.Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(
        lambda _module, _given, made: kept.append(made[0] if isinstance(made, tuple) else made)
    )
    with torch.no_grad():
        hidden = hidden_states(model, ids)
    hook.remove()
    return kept[0], hidden


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "opt"])
def test_norm_and_head_are_the_models(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, name)
    ids = torch.randint(0, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    states, hidden = last_states(model, ids)
    end = open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")
    torch.testing.assert_close(end.head_input(states), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.head.logits(hidden), output_head(model).logits(hidden), rtol=1e-5, atol=1e-5)


def test_norm_and_head_are_of_one_dtype(tmp_path: Path) -> None:
    """GPUs have no layer norm of 16-bit numbers by weights of 32 bits, whatever dtype the files are in."""
    saved(tmp_path, "gpt2")
    end = open_final_part(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert {one.dtype for one in (*end.norm.parameters(), end.head.weight)} == {torch.bfloat16}
    assert end.head_input(torch.zeros(1, 2, end.hidden_size)).dtype == torch.bfloat16


def test_another_kind_of_end_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "opt")
    with pytest.raises(ModelError, match="does not end with blocks, one norm and a head"):
        open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")


def test_of_shards_only_those_with_the_end_are_opened(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", max_shard_size="20KB")
    names = {file.name: file for file in tmp_path.glob("model-*.safetensors")}
    assert len(names) > 3
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {listed["model.norm.weight"], listed.get("lm_head.weight") or listed["model.embed_tokens.weight"]}
    assert 0 < len(needed) < len(names)
    for name in names.keys() - needed:
        names[name].unlink()
    end = open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")
    assert torch.equal(end.head.weight, model.get_output_embeddings().weight)
    assert end.num_layers == len(blocks_of(model))
    names[needed.pop()].unlink()
    with pytest.raises(ModelError, match="a file with weights is missing"):
        open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")


def test_what_is_no_safetensors_is_said(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="the weights cannot be read"):
        open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors files"):
        open_final_part(str(tmp_path), dtype=torch.float32, device="cpu")
