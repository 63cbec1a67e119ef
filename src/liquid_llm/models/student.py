"""Building the student: from a preset, from a configuration, or from a model that already has weights.

    preset    a shape by name; its vocabulary comes from the teacher's tokenizer. The number is the parameter count at a
              vocabulary of 49,152
    liquid-*  LFM2's shape: gated short convolutions, and full attention in about every third layer (Liquid AI 2025,
              arXiv:2511.23404)
    llama-*   Llama's shape (llama-135m is SmolLM2-135M's)
    gpt2-*    GPT-2's shape, with learned positions
    *-test    two narrow layers, for tests

Students have tied embeddings and no dropout: a teacher's distribution regularises enough, and a run must be repeatable.
No token is reserved for padding: a padding row's embedding would never be trained, and id 0 is a real token in most
vocabularies.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liquid_llm.device import find_not_finite
from liquid_llm.errors import ModelError
from liquid_llm.models.cut import cut_config
from liquid_llm.models.heads import check_causality, check_output_head
from liquid_llm.models.loading import (
    CANNOT_RUN,
    as_model_error,
    open_config,
    open_weights,
    quiet_transformers,
    refuse_kernels,
    require_layers,
)
from liquid_llm.models.positions import fit_positions
from liquid_llm.models.quantised import require_whole
from liquid_llm.models.sources import Source, resolve
from liquid_llm.models.spec import StudentSpec, parse_student

_HEAD_DIM = 64
# Their arithmetic asks which token pads: positions are counted from it, or it stands where something is left out.
_PADDING_COUNTS = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    *("emu3_text_model", "gemma4_text", "gemma4_unified_text", "modernbert-decoder", "prophetnet", "xlm"),
)
_DEFAULT_POSITIONS = 4096  # rotary presets; learned tables have 1024 rows like GPT-2's
_LEARNED_POSITIONS = 1024


@dataclass(frozen=True)
class Preset:
    """A student shape: the transformers model type and its settings, without anything that depends on the tokenizer."""

    model_type: str
    settings: dict[str, Any]


def _rotary(
    model_type: str, num_layers: int, hidden: int, inner: int, kv_heads: int, head_dim: int, theta: float, **more: Any
) -> Preset:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": _DEFAULT_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    return Preset(model_type, {**shape, **more})


def _liquid(layers: str, hidden: int, inner: int, kv_heads: int, head_dim: int = _HEAD_DIM) -> Preset:
    """``layers``: one letter a layer, ``c`` for a short convolution and ``A`` for full attention."""
    kinds = ["full_attention" if letter == "A" else "conv" for letter in layers]
    # intermediate_size is meant as it stands
    more = {"layer_types": kinds, "block_auto_adjust_ff_dim": False}
    return _rotary("lfm2", len(layers), hidden, inner, kv_heads, head_dim, 1_000_000.0, **more)


def _llama(num_layers: int, hidden: int, inner: int, kv_heads: int, head_dim: int = _HEAD_DIM) -> Preset:
    return _rotary("llama", num_layers, hidden, inner, kv_heads, head_dim, 100_000.0)


def _gpt2(num_layers: int, hidden: int, head_dim: int = _HEAD_DIM) -> Preset:
    shape = {"n_embd": hidden, "n_layer": num_layers, "n_head": hidden // head_dim, "n_positions": _LEARNED_POSITIONS}
    return Preset("gpt2", shape)


PRESETS: dict[str, Preset] = {
    "liquid-16m": _liquid("cAcA", 256, 768, 2),
    "liquid-40m": _liquid("ccAccAccAcAc", 384, 1024, 2),
    "liquid-130m": _liquid("ccAccAccAcAcAc", 768, 2048, 4),
    "liquid-350m": _liquid("ccAccAccAcAcAcAc", 1024, 4608, 8),
    "llama-16m": _llama(4, 256, 768, 2),
    "llama-40m": _llama(12, 384, 1024, 2),
    "llama-135m": _llama(30, 576, 1536, 3),
    "gpt2-tiny": _gpt2(4, 256),
    "gpt2-small": _gpt2(12, 768),
    "gpt2-medium": _gpt2(24, 1024),
    "liquid-test": _liquid("cA", 32, 64, 1, head_dim=16),
    "llama-test": _llama(2, 32, 64, 1, head_dim=16),
    "gpt2-test": _gpt2(2, 32, head_dim=16),
}


def build_student(
    spec: str,
    *,
    vocab_size: int,
    bos_id: int,
    eos_id: int,
    block_size: int,
    seed: int,
    token: str | None = None,
) -> Any:
    """A student in float32 and training mode, dropout off, that supports sequences of ``block_size`` tokens.

    Args:
        spec: a preset, a ``config.json`` file (both start from random weights), or a model id, folder or ``.gguf`` file
            whose weights are taken; a student that takes weights of a teacher is ``taking``'s to build.
        vocab_size: tokens of the shared tokenizer. New weights get exactly this vocabulary; a loaded model may have
            more (a padded embedding) but not fewer.
        bos_id, eos_id: kept in its configuration for generation.
        block_size: tokens in the longest sequence it will see.
        seed: of the random weights; the global generators are neither read nor moved.

    Raises:
        ModelError: an unknown spec, a model that cannot be opened or distilled, a vocabulary that is too small, or
            positions it cannot be given.
    """
    base = parse_student(spec).base
    if is_configuration(base):
        model = from_configuration(base, vocab_size, bos_id, eos_id, seed)
    else:
        model = _from_weights(base, vocab_size, bos_id, eos_id, token)
    return finish_student(model, bos_id, eos_id, block_size)


def finish_student(model: Any, bos_id: int, eos_id: int, block_size: int) -> Any:
    """Give a new student its special ids and positions, and look whether it can be distilled; raises likewise."""
    if (found := find_not_finite(dict(model.named_parameters()))) is not None:
        raise ModelError("the student's weights are not finite", got=f"NaN or infinity in {found}")
    if model.generation_config is not None:
        ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
        model.generation_config.update(**ids)
    if hasattr(model.get_input_embeddings(), "padding_idx"):
        model.get_input_embeddings().padding_idx = None  # a token like any other: no row is padded with it
    fit_positions(model, block_size)
    with as_model_error(type(model).__name__, CANNOT_RUN), quiet_transformers():
        check_causality(model)
        check_output_head(model)
    return model.train()


def is_configuration(spec: str) -> bool:
    """Whether a student is a shape without weights: a preset or a ``config.json`` file."""
    return spec in PRESETS or (spec.endswith(".json") and Path(spec).expanduser().is_file())


def student_config(spec: str, *, vocab_size: int, bos_id: int, eos_id: int, token: str | None = None) -> Any:
    """The configuration ``build_student`` builds from, before positions are fitted; no weights are read.

    Raises:
        ModelError: an unknown spec, or a configuration that cannot be read.
    """
    from transformers import AutoConfig

    asked = parse_student(spec)
    if asked.cut is not None:
        config = cut_config(open_taken_config(asked, token)[1], asked.cut, vocab_size, f"--student={spec}")
        prepare_config(config, bos_id, eos_id)
        return config
    spec = asked.base
    if not is_configuration(spec):
        config = open_config(_student_source(spec, token), spec, token)
        prepare_config(config, bos_id, eos_id)
        return config
    if spec in PRESETS:
        preset = PRESETS[spec]
        config = AutoConfig.for_model(preset.model_type, tie_word_embeddings=True, **preset.settings)
    else:
        config = file_config(spec)
    prepare_config(config, bos_id, eos_id)
    config.get_text_config(decoder=True).vocab_size = vocab_size
    return config


def open_taken_config(asked: StudentSpec, token: str | None) -> tuple[Source, Any]:
    """The model that a student takes weights of, and its configuration. Raises ``ModelError`` where there is none."""
    assert asked.teacher is not None
    source = resolve(asked.teacher, token=token)
    return source, open_config(source, asked.teacher, token)


def from_configuration(spec: str, vocab_size: int, bos_id: int, eos_id: int, seed: int) -> Any:
    """A student with random weights, of a preset or a ``config.json``; raises as ``build_student``."""
    from transformers import AutoModelForCausalLM

    config = student_config(spec, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
    with (
        as_model_error(spec, "no causal language model can be built from this configuration"),
        torch.random.fork_rng(),
        quiet_transformers(),
    ):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=None, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    return model


def config_values(config: Any) -> dict[str, Any]:
    """A configuration as plain values that JSON can hold, infinity too; ``config_file`` gives it back."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: values[name] for name in config.to_dict()}


def vocabulary_in(values: Mapping[str, Any]) -> int | None:
    """The vocabulary of a configuration's values, which may be that of the text nested in it; None without one."""
    nested = values.get("text_config")
    found = values.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, Mapping) else None)
    return None if found is None else int(found)


@contextmanager
def config_file(values: Mapping[str, Any]) -> Iterator[str]:
    """A ``config.json`` with these values, for as long as it is entered: a student's configuration is read from one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(dict(values)), encoding="utf-8")
        yield str(path)


def file_config(spec: str) -> Any:
    """The transformers configuration in a ``config.json`` file. Raises ``ModelError`` where it holds none."""
    from transformers import AutoConfig

    with as_model_error(spec, "not a transformers configuration"), quiet_transformers():
        config = AutoConfig.from_pretrained(Path(spec).expanduser(), trust_remote_code=False)
        refuse_kernels(config, spec)
        require_layers(config, spec)
        return config


def _student_source(spec: str, token: str | None) -> Source:
    try:
        return resolve(spec, token=token)
    except ModelError as error:
        if "/" in spec or spec.startswith("package:"):
            raise
        raise ModelError(
            "no such student",
            got=repr(spec),
            expected=f"a preset ({', '.join(name for name in PRESETS if not name.endswith('-test'))}), a config.json "
            f"file, or a model; as a model: {error}",
        ) from error


def _from_weights(spec: str, vocab_size: int, bos_id: int, eos_id: int, token: str | None) -> Any:
    source = _student_source(spec, token)
    config = open_config(source, spec, token)
    require_whole(config, spec)
    prepare_config(config, bos_id, eos_id)
    model = open_weights(source, spec, dtype=torch.float32, device="cpu", attention="sdpa", token=token, config=config)
    prepare_config(model.config, bos_id, eos_id)
    available = model.get_output_embeddings().weight.shape[0]
    if available < vocab_size:
        raise ModelError(
            "the student's vocabulary is smaller than the teacher's tokenizer",
            where=spec,
            got=available,
            expected=f"at least {vocab_size}",
            remedy="take a student of the teacher's family, or a preset",
        )
    return model


def prepare_config(config: Any, bos_id: int, eos_id: int) -> None:
    """Dropout off, the tokenizer's special ids, and no token for padding where the family does without one.

    Where the configuration was read is forgotten: a checkpoint and an exported student name no folder of this machine.
    """
    config.name_or_path = ""
    text = config.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(text, name, 0.0)
    text.bos_token_id, text.eos_token_id = bos_id, eos_id
    if text.model_type not in _PADDING_COUNTS:
        text.pad_token_id = None


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        ModelError: the architecture does not support it.
    """
    try:
        # Re-entrant checkpointing loses gradients when no input requires one.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # its name in earlier versions of transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            "this architecture does not support gradient checkpointing",
            where=type(model).__name__,
            remedy="leave --grad_checkpoint out",
        ) from error
