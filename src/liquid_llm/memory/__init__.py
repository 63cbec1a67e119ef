"""Whether a job fits into a device's memory, from configurations and shapes alone.

shapes       what is asked: models without weights, micro-batches, the settings that count
counter      counts every storage alive, by what it is for
training     a training step on tensors without memory
capture      a capture batch likewise
prediction   what is answered, and the allowances on top
cache        answers kept on disk
verdict      fits or not, the changes that make it fit, and the largest batch that does
"""

from __future__ import annotations

from pathlib import Path

from liquid_llm.memory.cache import remember
from liquid_llm.memory.capture import work_out_capture
from liquid_llm.memory.free import available_bytes
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import BatchShape, CaptureShape, ModelShape, TrainingShape, most_slots
from liquid_llm.memory.training import work_out_training
from liquid_llm.memory.verdict import (
    BatchChoice,
    Option,
    Verdict,
    capture_options,
    fits,
    largest_batch,
    training_options,
)

__all__ = [
    "BatchChoice",
    "BatchShape",
    "CaptureShape",
    "MemoryPrediction",
    "ModelShape",
    "Option",
    "TrainingShape",
    "Verdict",
    "available_bytes",
    "capture_options",
    "fits",
    "largest_batch",
    "most_slots",
    "predict_capture",
    "predict_training",
    "training_options",
]


def predict_training(shape: TrainingShape, cache: Path | None = None) -> MemoryPrediction:
    """Memory of a training job: the second step's peak over its largest micro-batches, or evaluation's if that is more.

    Args:
        cache: folder for answers, or None.

    Raises:
        ModelError: a configuration that no model can be built from.
    """
    return remember(cache, "training", shape.as_plain(), lambda: work_out_training(shape))


def predict_capture(shape: CaptureShape, cache: Path | None = None) -> MemoryPrediction:
    """Memory of a capture job.

    Raises:
        ModelError: a configuration that no model can be built from.
        SignalError: a codec or an option that there is not.
    """
    return remember(cache, "capture", shape.as_plain(), lambda: work_out_capture(shape))
