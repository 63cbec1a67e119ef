"""Small models of every architecture that a student is cut out of, four blocks each, with weights that matter."""

from __future__ import annotations

from typing import Any

import torch

VOCAB, PADDED = 90, 100

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": PADDED,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_SLIDING = {"head_dim": 8, "sliding_window": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {**_SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_SLIDING, "sliding_window_pattern": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_bias": True},
}


def cut_teacher(name: str, *, tied: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A model of ``SHAPES``; its embedding is padded from ``VOCAB`` to ``PADDED``. The generators stay as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_COMMON, **SHAPES[name], "tie_word_embeddings": tied, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for part, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in part else 0.0, 0.2)
    return model


def some_text(rows: int = 3, time: int = 20, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences with their labels, the last of each unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, time + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, -1] = -100
    return list(zip(ids[:, :-1], labels, strict=True))
