"""Whether a job fits into a device's memory, from configurations and shapes alone.

shapes       what is asked: models without weights, micro-batches, the settings that count
counter      counts every storage alive, by what it is for
training     a training step on tensors without memory
capture      a capture batch likewise
prediction   what is answered, and the allowances on top
verdict      fits or not, the changes that make it fit, and the largest batch that does
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TypeVar

from liquid_llm.errors import ModelError
from liquid_llm.memory.capture import work_out_capture
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import CaptureShape, TrainingShape
from liquid_llm.memory.training import work_out_training

S = TypeVar("S", TrainingShape, CaptureShape)

# An evaluation's further measures go through all chunks of logits, so that time grows with them.
MOST_TOKENS = 2**21
_ANSWERS: dict[str, MemoryPrediction] = {}


def predict_training(shape: TrainingShape) -> MemoryPrediction:
    """Memory of a training job: the second step's peak over its largest micro-batches, or evaluation's if that is more.

    Raises:
        ModelError: a configuration that no model can be built from, or a micro-batch of more than ``MOST_TOKENS``.
    """
    _require_some_size(one.rows * one.time for one in (*shape.batches, *shape.evaluations))
    return _remember(shape, work_out_training)


def predict_capture(shape: CaptureShape) -> MemoryPrediction:
    """Memory of a capture job.

    Raises:
        ModelError: a configuration that no model can be built from, or a batch of more than ``MOST_TOKENS``.
        SignalError: a codec or an option that there is not.
    """
    _require_some_size([shape.rows * shape.time])
    return _remember(shape, work_out_capture)


def _remember(shape: S, answer: Callable[[S], MemoryPrediction]) -> MemoryPrediction:
    """``answer(shape)``, worked out once in a process: whoever chooses a batch asks for some shapes again."""
    question = json.dumps([type(shape).__name__, asdict(shape)], sort_keys=True, default=str)
    if question not in _ANSWERS:
        _ANSWERS[question] = answer(shape)
    return _ANSWERS[question]


def _require_some_size(tokens: Iterable[int]) -> None:
    most = max(tokens, default=0)
    if most > MOST_TOKENS:
        raise ModelError(
            "the memory of so large a micro-batch is not worked out",
            got=f"{most:,} tokens",
            expected=f"at most {MOST_TOKENS:,}",
            remedy="use a smaller --batch_size or --block_size",
        )
