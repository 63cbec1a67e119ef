"""``liquid models``: the student presets, as a table or JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from liquid_llm.formatting import format_count
from liquid_llm.models.student import PRESETS, student_config
from liquid_llm.terminal import result_console, result_table


def show_presets(vocab_size: int, *, as_json: bool = False) -> int:
    """Print name, family, shape and parameters of each preset; returns the exit code.

    Args:
        vocab_size: rows of the embedding, which are most of a small model.
    """
    presets = [_describe(name, vocab_size) for name in PRESETS]
    if as_json:
        print(json.dumps({"vocab_size": vocab_size, "presets": presets}, indent=2))
        return 0
    table = result_table(f"Students from random weights, with {vocab_size:,} tokens")
    for column in ("preset", "family", "layers", "width", "heads", "positions", "parameters", "without embeddings"):
        table.add_column(column, justify="left" if column in ("preset", "family") else "right")
    for one in presets:
        counts = (format_count(one[key]) for key in ("parameters", "parameters_without_embeddings"))
        shape = (str(one[key]) for key in ("layers", "width", "heads", "positions"))
        table.add_row(one["name"], one["family"], *shape, *counts)
    console = result_console(None, 100)
    console.print(table)
    console.print("Beside these --student takes a Hugging Face id or folder, a config.json, or from:TEACHER,layers=N.")
    return 0


def _describe(name: str, vocab_size: int) -> dict[str, Any]:
    config = student_config(name, vocab_size=vocab_size, bos_id=0, eos_id=0)
    with torch.device("meta"):  # shapes alone
        model = AutoModelForCausalLM.from_config(config)
    total = sum(one.numel() for one in model.parameters())
    embeddings = {id(one.weight): one.weight.numel() for one in _embeddings(model)}
    return {
        "name": name,
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "positions": config.max_position_embeddings,
        "parameters": total,
        "parameters_without_embeddings": total - sum(embeddings.values()),
    }


def _embeddings(model: Any) -> list[Any]:
    return [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
