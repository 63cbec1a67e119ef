"""Every causal family of transformers, small: its own configuration shrunk by one rule, random weights, in a folder.

    family     a model type of transformers' mapping of causal language models
    shrink     the rule: what a configuration says of sizes and counts, by the names that configurations have for them

Whatever the rule leaves alone is the family's own default: caps, scales, norms,
routers, rotary kinds, how blocks alternate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tests.support.tiny import VOCAB_SIZE, Tiny, build
from tests.support.tokenizers import tiny_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
POSITIONS = 128
TRACEBACK = "traceback:"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_LABELS = ("id2label", "label2id")

# The first pattern that a name matches as a whole says how large it may be; 0 stands for the tokenizer's vocabulary.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(decoder_|unpadded_)?vocab_size(_per_layer_input)?", 0),
    (r"\w+_vocab(_size)?(_base)?", 64),
    (r"(max_position|max_target|max_source|max_seq|max_sequence|model_max)_\w+", POSITIONS),
    (r"n_positions|n_ctx|seq_length|context_length", POSITIONS),
    (r"sliding_window(_size)?|(local_)?attention_window\w*|attention_chunk_size|local_attention|window_size", 16),
    (r"block_size|mamba_chunk_size|max_inference_chunksize|rel_extent|\w*multiple_of", 16),
    (r"(num|n)_(hidden|decoder|encoder)?_?layers?|(decoder|encoder)_layers|num_blocks|num_layers_per_stack", 2),
    (r"\w*_(period|step|interval|pattern)|layer_group_size|global_attn_every_n_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|\w*_offset|num_kv_shared_layers", 1),
    (r"mamba_expand|expand", 1),
    (r"\w*head_?dim|v_head_dim|qk_\w*_dim|kv_channels|rotary_dim|attention_head_size|\w*d_head|d_kv|dim_head", 8),
    (r"(\w+_)?heads?(_per_layer)?|\w*n_heads?|\w*_num_heads|num_query_groups", 4),
    (r"index_topk\w*", POSITIONS),  # below it all positions are attended to
    (r"\w*experts_per_tok(en)?|\w*top_?k|moe_k|num_selected_experts", 2),
    (r"\w*shared_experts?|n_groups?|\w*ngroups|num_groups|num_expert_group|topk_group|\w*_n_groups|o_groups", 1),
    (r"\w*experts|expert_num|zero_expert_num", 4),
    (r"\w*_rank", 16),
    (r"\w*(state_size|d_state)", 8),
    (r"\w*(intermediate|ffn|feed_forward|inner|mlp)_?\w*(size|dim)(_mlp)?|n_inner|d_ff|dff|dim_ff|d_inner", 64),
    (r"mamba_d_ssm", 32),
    (r"\w*hidden_size\w*|d_model|n_embd|\w*emb\w*_(dim|size)|lru_width|prompt_mid_dim|adapter_\w*(dim|size)", 32),
    (r"image_size", 32),
)
_WHERE_NONE = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")

# What the rule cannot know: what a family's default lacks and published models have, and how counts hang together.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 16, "per_layer_config": {}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},  # recurrent, recurrent, attention
    "reformer": {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # one block's weights in two places
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [1]},
}


def families() -> tuple[str, ...]:
    """The model types of transformers' own mapping of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink(values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A configuration's values with every size and count made small, nested configurations too.

    Of the blocks stays the first of each kind that the configuration's lists tell apart, and two at least.
    """
    small = {name: _shrink_value(name, value, vocab_size) for name, value in values.items() if name not in _LABELS}
    layers = next((int(values[name]) for name in _LAYERS if isinstance(values.get(name), int)), 0)
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers > 0}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    kept = {kinds.index(kind) for kind in kinds}
    kept |= set([place for place in range(len(kinds)) if place not in kept][: max(0, 2 - len(kept))])
    for name in lists:
        small[name] = [small[name][place] for place in sorted(kept)]
    if kept:
        small |= {name: len(kept) for name in _LAYERS if name in values}
        places = {place: number for number, place in enumerate(sorted(kept))}
        for name, value in values.items():  # blocks told by their number
            if name in small and isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
                small[name] = {places[int(key)]: one for key, one in small[name].items() if int(key) in places}
    if "num_attention_heads" in values:
        same = [name for name in _KV_HEADS if values.get(name) == values["num_attention_heads"]]
        grouped = [name for name in _KV_HEADS if values.get(name) not in (None, values["num_attention_heads"])]
        small |= dict.fromkeys(same, small["num_attention_heads"])
        small |= {name: min(values[name], 2) for name in grouped}
    small |= {name: size for name, size in _WHERE_NONE.items() if name in values and values[name] is None}
    if "is_decoder" in values and not values.get("is_encoder_decoder"):
        small["is_decoder"] = True
    return small


def _shrink_value(name: str, value: Any, vocab_size: int) -> Any:
    if name in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
        return 0
    if name == "pad_token_id" and value is not None:
        return 1  # another than the end of text, as theirs are: its embedding is zero, by which Gemma 3n divides
    if isinstance(value, dict):
        return shrink(value, vocab_size)
    if isinstance(value, list):
        return [_shrink_value(name, one, vocab_size) for one in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for pattern, most in _SIZES:
        if re.fullmatch(pattern, name):
            return vocab_size if most == 0 else min(value, most)
    return min(value, vocab_size - 1) if name.endswith(("_token_id", "_index", "_token_index")) else value


def small_config(family: str, vocab_size: int) -> Any:
    """The configuration of ``family`` as it is by default, shrunk."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind.from_dict(_settle(family, shrink(kind().to_dict(), vocab_size)))


def _settle(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """With what the rule cannot know, in the configuration itself and in the text's where it is nested."""
    for name, value in values.items():
        if isinstance(value, dict) and value.get("model_type") in SETTINGS:
            values[name] = _settle(value["model_type"], value)
    return {**values, **SETTINGS.get(family, {})}


def small_model(family: str, vocab_size: int, seed: int = 0) -> Any:
    """A model of ``family``, float32, as transformers' own mapping builds it; the global generators stay."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(small_config(family, vocab_size), dtype=torch.float32).eval()


def make_world(root: Path) -> Tiny:
    """Texts of one type and a llama, for a family that is student or teacher alone."""
    tiny = build(root, teacher_steps=1)
    tiny.draw_from({"path": "lm.jsonl", "type": "lm", "weight": 1.0})
    return tiny


def save_family(family: str, folder: Path, rows: int = VOCAB_SIZE) -> Path:
    """A small model of ``family`` with the tests' tokenizer, as a folder that people download has them.

    Args:
        rows: of its embedding, where that is longer than the tokenizer.
    """
    small_model(family, rows).save_pretrained(folder)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return folder


def train_step(tiny: Tiny, output: Path, *, student: Path, teacher: Path, **options: object) -> str:
    """One step of ``liquid train`` with models from folders; returns "" or the error that ended it."""
    said = StringIO()
    given = {"student": student, "lm_teacher_id": teacher, "max_steps": 1, "warmup_steps": 0, "block_size": 32}
    given |= {"eval_tokens": 64, "save_every": 0}
    try:
        with redirect_stderr(said):
            code = tiny.train_plainly(output, **{**given, **options})
    except Exception as error:  # noqa: BLE001 - what is shown as a traceback is a finding too
        return f"{TRACEBACK} {type(error).__name__}: {error}"
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    return "" if code == 0 else (lines[-1] if lines else f"exit code {code}")


@dataclass(frozen=True)
class Outcome:
    """What one step with a family said: "" where it was taken."""

    as_student: str
    as_teacher: str


def try_family(family: str, tiny: Tiny, folder: Path) -> Outcome:
    """A small model of ``family`` from a folder: one step as student and teacher at once, else as each alone."""
    try:
        model = save_family(family, folder / "model")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises for what it cannot build
        said = f"transformers builds none: {type(error).__name__}: {error}"
        return Outcome(said, said)
    if train_step(tiny, folder / "both", student=model, teacher=model) == "":
        return Outcome("", "")
    as_student = train_step(tiny, folder / "student", student=model, teacher=tiny.teacher)
    return Outcome(as_student, train_step(tiny, folder / "teacher", student=tiny.teacher, teacher=model))


def read_exceptions(page: Path = PAGE) -> dict[str, tuple[bool, bool, str]]:
    """What the page says: family -> whether it can be student, whether teacher, and words of what is said instead."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    told = [row for row in rows if len(row) == 5 and row[0].startswith("`")]
    return {row[0].strip("`"): (row[1] == "yes", row[2] == "yes", row[4].strip("`")) for row in told}
