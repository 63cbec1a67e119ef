"""The student of a run: built or loaded, fitted to the context length, checked against the tokenizer."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liquid_llm.config import RunConfig
from liquid_llm.errors import CheckpointError, UsageError
from liquid_llm.models.positions import fit_positions, max_positions, positional_embedding
from liquid_llm.models.student import build_student, enable_gradient_checkpointing
from liquid_llm.run.inputs import TextTools
from liquid_llm.run.starting import Start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltStudent:
    """A student ready to train.

    Attributes:
        model: float32 parameters, dropout off.
        positional_embedding: ``learned``, ``rotary`` or ``none``.
        description: plain values a checkpoint keeps to build it again.
    """

    model: nn.Module
    positional_embedding: str
    description: dict[str, Any]


def make_student(
    config: RunConfig, start: Start, text: TextTools, device: torch.device, token: str | None
) -> BuiltStudent:
    """Build the student a run starts from.

    Raises:
        CheckpointError: the weights are of another architecture or vocabulary.
        ModelError: the architecture's head is not one the loss understands.
        UsageError: an evaluation length past what the student supports.
    """
    model = _build(config, start, text, token)
    if start.weights is not None:
        load_weights(model, start.weights, start.source)
    trained = start.metadata.student.get("trained_positions") if start.metadata is not None else None
    longest = max(config.data.block_size, config.data.seq_len)
    log.info("%s", fit_positions(model, longest, config.student.rope_scale, trained_positions=trained))
    _require_positions(model, config.evaluation.context_lengths)
    if config.student.grad_checkpoint:
        enable_gradient_checkpointing(model)
    model.to(device)
    kind = positional_embedding(model)
    trained = longest if start.kind == "fresh" else max(longest, trained or max_positions(model) or longest)
    description = {"spec": config.student.spec, "config": model.config.to_dict(), "trained_positions": trained}
    return BuiltStudent(model, kind, description)


def _build(config: RunConfig, start: Start, text: TextTools, token: str | None) -> Any:
    """The architecture: the checkpoint's own where it says, else ``--student`` with the tokenizer's vocabulary."""
    longest = max(config.data.block_size, *config.evaluation.context_lengths, 0)
    with tempfile.TemporaryDirectory() as folder:
        spec, vocab_size = config.student.spec, text.vocab_size
        if start.student_config is not None:
            spec = str(Path(folder) / "config.json")
            Path(spec).write_text(json.dumps(start.student_config), encoding="utf-8")
            vocab_size = int(start.student_config.get("vocab_size", vocab_size))
        if vocab_size < text.vocab_size:
            raise CheckpointError(
                "the weights are of a smaller vocabulary than the tokenizer's",
                where=start.source,
                got=vocab_size,
                expected=f"at least {text.vocab_size}",
                remedy="use the tokenizer the student was trained with",
            )
        bos_id = text.tokenizer.bos_token_id
        return build_student(
            spec,
            vocab_size=vocab_size,
            bos_id=text.eos_id if bos_id is None else bos_id,
            eos_id=text.eos_id,
            block_size=_table_rows(start) or (2 if start.student_config is not None else longest),
            seed=config.seed,
            token=token,
        )


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict; nothing but tied weights may be absent, nothing may be left over.

    Raises:
        CheckpointError: names or shapes differ; the message says which.
    """
    expected = model.state_dict()
    tied = {
        name for name, value in expected.items() if any(value is other for n, other in expected.items() if n != name)
    }
    missing = [name for name in expected if name not in weights and name not in tied and "lm_head" not in name]
    unknown = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or unknown or shapes:
        parts = [f"{len(missing)} missing ({missing[0]})"] if missing else []
        parts += [f"{len(unknown)} unknown ({unknown[0]})"] if unknown else []
        parts += [f"{len(shapes)} of another shape ({shapes[0]})"] if shapes else []
        raise CheckpointError(
            "the weights are of another architecture or vocabulary",
            where=source,
            got=", ".join(parts),
            expected=f"those of {type(model).__name__}",
            remedy="give the --student they were trained as",
        )
    model.load_state_dict(dict(weights), strict=False)


def _table_rows(start: Start) -> int | None:
    """Rows of a learned position table among weights that came without a configuration."""
    names = [name for name in start.weights or {} if name.endswith(("wpe.weight", "embed_positions.weight"))]
    return int((start.weights or {})[names[0]].shape[0]) if names else None


def _require_positions(model: nn.Module, lengths: tuple[int, ...]) -> None:
    limit = max_positions(model)
    beyond = [length for length in lengths if limit is not None and length > limit]
    if beyond:
        raise UsageError(
            "the student has no positions that far",
            where=f"--eval_ctx_lens={','.join(map(str, lengths))}",
            got=max(beyond),
            expected=f"at most {limit}",
            remedy="leave the longer lengths out, or train with a larger --block_size, which grows the table",
        )
