"""The shape of a student that is cut out of a teacher: it follows from the teacher's configuration alone.

block, channel, neuron, head    see ``importance``
axis                            what one dimension of a weight counts: channels, neurons, rows of heads
kept                            the indices of an axis that stay, in their order
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liquid_llm.errors import ModelError
from liquid_llm.models.loading import as_model_error, quiet_transformers
from liquid_llm.models.spec import Cut

# What the dimensions of a weight count. In LFM2 a convolution has channels of its own, as many as there are hidden.
VOCAB, HIDDEN, MLP, QUERY, KV, CONV, CONV3 = ("vocabulary", "hidden", "mlp", "query", "kv", "conv", "conv3")
LINEAR: dict[str, tuple[str, ...]] = {  # the part's name in its block -> what its rows and its columns count
    "self_attn.q_proj": (QUERY, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERY),
    "self_attn.out_proj": (HIDDEN, QUERY),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
    "feed_forward.w1": (MLP, HIDDEN),
    "feed_forward.w3": (MLP, HIDDEN),
    "feed_forward.w2": (HIDDEN, MLP),
    "conv.in_proj": (CONV3, HIDDEN),
    "conv.conv": (CONV,),
    "conv.out_proj": (HIDDEN, CONV),
}
_NORMS = (  # over hidden channels
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("operator_norm", "ffn_norm"),
)
_HEAD_NORMS = ["self_attn.q_norm", "self_attn.k_norm", "self_attn.q_layernorm", "self_attn.k_layernorm"]
FINAL_NORMS = ("norm", "embedding_norm")
GEMMA = ("gemma", "gemma2", "gemma3_text")  # norms multiply by 1 + weight; the embedding by the root of the width
TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "lfm2", *GEMMA)
"""The architectures, as transformers names them, that a student can be cut out of."""

_PER_LAYER = ("layer_types", "no_rope_layers")  # lists in configurations, one entry a block


@dataclass(frozen=True)
class Sizes:
    """What a model has of each."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


def spread_layers(num_layers: int, wanted: int) -> tuple[int, ...]:
    """``wanted`` of the blocks 0 to ``num_layers`` - 1, evenly spaced, the first and the last among them."""
    if wanted == 1:
        return (0,)
    return tuple(round(place * (num_layers - 1) / (wanted - 1)) for place in range(wanted))


def cut_config(config: Any, cut: Cut, vocab_size: int, where: str, layers: Sequence[int] | None = None) -> Any:
    """The configuration of a student cut out of a model with ``config``.

    Args:
        vocab_size: tokens that stay.
        where: who asks for it, for messages.
        layers: the blocks that stay; None: those named, else evenly spaced ones, which stand for those that importance
            is going to choose.

    Raises:
        ModelError: another architecture, or more asked for than there is.
    """
    from transformers import AutoConfig

    text = config.get_text_config(decoder=True)
    sizes = read_sizes(config, where)
    kept = layers if layers is not None else name_layers(cut, sizes, where)
    values = copy.deepcopy(text.to_dict())
    values |= {"num_hidden_layers": len(kept), "vocab_size": vocab_size, "architectures": None}
    for name in _PER_LAYER:
        if values.get(name) is not None:
            values[name] = [values[name][layer] for layer in kept]
    if values.get("full_attn_idxs") is not None:
        values["full_attn_idxs"] = [new for new, old in enumerate(kept) if old in values["full_attn_idxs"]]
    if values.get("max_window_layers") is not None:
        values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in kept)
    values |= _cut_width(cut, sizes, where, text.model_type)
    if "layer_types" in values and set(values["layer_types"] or ["full_attention"]) == {"conv"}:
        raise ModelError("no block with attention would stay", where=where, got=f"layers {_join(kept)}")
    kind = values.pop("model_type")
    with as_model_error(where, "no such student can be built"), quiet_transformers():
        return AutoConfig.for_model(kind, **values)


def _join(layers: Sequence[int]) -> str:
    return "+".join(map(str, layers))


def name_layers(cut: Cut, sizes: Sizes, where: str) -> tuple[int, ...]:
    if cut.layers is None:
        return tuple(range(sizes.layers))
    if isinstance(cut.layers, int):
        if cut.layers > sizes.layers:
            raise _too_many("layers", cut.layers, sizes.layers, where)
        return spread_layers(sizes.layers, cut.layers)
    if cut.layers[-1] >= sizes.layers:
        raise ModelError(
            "the model has no such layer", where=where, got=cut.layers[-1], expected=f"0 to {sizes.layers - 1}"
        )
    return cut.layers


def _too_many(key: str, asked: int, there: int, where: str) -> ModelError:
    return ModelError(
        f"{key}: more is asked for than the model has", where=where, got=asked, expected=f"at most {there}"
    )


def _cut_width(cut: Cut, sizes: Sizes, where: str, model_type: str) -> dict[str, Any]:
    """The values that change in a configuration where channels, neurons or heads go."""
    if (cut.width, cut.mlp, cut.kv_heads) == (None, None, None):
        return {}
    width = cut.width or sizes.width
    share = width / sizes.width
    mlp = cut.mlp or (sizes.mlp if width == sizes.width else max(8, 8 * round(sizes.mlp * share / 8)))
    kv_heads = cut.kv_heads or max(1, round(sizes.kv_heads * share))
    for key, asked, there in (("width", width, sizes.width), ("mlp", mlp, sizes.mlp)):
        if asked > there:
            raise _too_many(key, asked, there, where)
    if kv_heads > sizes.kv_heads:
        raise _too_many("kv_heads", kv_heads, sizes.kv_heads, where)
    adjusted = {"block_auto_adjust_ff_dim": False} if model_type == "lfm2" else {}  # intermediate_size as it stands
    return adjusted | {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": sizes.heads // sizes.kv_heads * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": sizes.head_dim,
    }


def read_sizes(config: Any, where: str) -> Sizes:
    text = config.get_text_config(decoder=True)
    if text.model_type not in TYPES:
        raise ModelError(
            "a student cannot be cut out of this architecture",
            where=where,
            got=text.model_type,
            expected=", ".join(TYPES),
        )
    body = without_weights(text, where).get_decoder()
    weights = {name: tuple(value.shape) for name, value in body.named_parameters()}
    unknown = [name for name in weights if axes_of(name) is None]
    if unknown:
        raise ModelError("a student cannot be cut out of a model with this weight", where=where, got=unknown[0])
    up = next(name for name in weights if name.endswith(("mlp.up_proj.weight", "feed_forward.w3.weight")))
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        text.num_hidden_layers, text.hidden_size, weights[up][0], heads, text.num_key_value_heads, int(head_dim)
    )


def without_weights(config: Any, where: str) -> Any:
    """A float32 model of this configuration whose parameters have no values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with (
        as_model_error(where, "no causal language model can be built from this configuration"),
        torch.random.fork_rng(devices=[]),
        quiet_transformers(),
        init_empty_weights(include_buffers=False),
    ):
        return AutoModelForCausalLM.from_config(config, attn_implementation=None, dtype=torch.float32)


def axes_of(name: str) -> tuple[str, ...] | None:
    """What the dimensions of a weight of the body count, as far as they are cut; None for an unknown weight."""
    part, _, kind = name.rpartition(".")
    if part == "embed_tokens":
        return (VOCAB, HIDDEN)
    if part in FINAL_NORMS:
        return (HIDDEN,)
    inside = part.split(".", 2)[2] if part.startswith("layers.") else part
    if inside in LINEAR:
        return LINEAR[inside] if kind == "weight" else LINEAR[inside][:1]
    if inside in _NORMS:
        return (HIDDEN,)
    return () if inside in _HEAD_NORMS else None
