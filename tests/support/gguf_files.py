"""Writing a tiny Llama model as the GGUF file llama.cpp's own converter would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(path: Path, model: Any, tokenizer: Any) -> Path:
    """Write a Llama ``model`` (tied embeddings, float32) with its byte-level BPE ``tokenizer`` to ``path``."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)

    def add(name: str, key: str, heads: int | None = None) -> None:
        weight = state[key].float().numpy()
        writer.add_tensor(name, _interleave(weight, heads) if heads else weight)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        add(theirs + "attn_q.weight", ours + "self_attn.q_proj.weight", config.num_attention_heads)
        add(theirs + "attn_k.weight", ours + "self_attn.k_proj.weight", config.num_key_value_heads)
        add(theirs + "attn_v.weight", ours + "self_attn.v_proj.weight")
        add(theirs + "attn_output.weight", ours + "self_attn.o_proj.weight")
        add(theirs + "attn_norm.weight", ours + "input_layernorm.weight")
        add(theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight")
        for part in ("gate", "up", "down"):
            add(f"{theirs}ffn_{part}.weight", f"{ours}mlp.{part}_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers rows half a head apart."""
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    import json

    import gguf

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token == "<|endoftext|>" else normal for token in tokens])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
