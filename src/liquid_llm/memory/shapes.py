"""What decides how much memory a job takes, as plain values: configurations and the shapes of what is computed.

A shape has everything the model of memory needs, and nothing else, so that equal shapes have one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from liquid_llm.losses.plan import CHUNK_BYTES
from liquid_llm.losses.rows.choice import EAGER
from liquid_llm.models.lora import LoraSpec
from liquid_llm.models.quantised import counted_as
from liquid_llm.runtime import torch_dtype

SignalKind = Literal["none", "dense", "sparse", "logits"]

# Of a configuration: where it was read from, and by which release. The same model elsewhere takes as much.
_OF_ITS_FILE = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        config: a transformers configuration as ``to_dict`` gives it; ``model_type`` names the architecture.
        dtype: name of the weights' dtype.
        quantisation: what is done to them (``int8``), or None.
    """

    config: Mapping[str, Any]
    dtype: str = "float32"
    quantisation: str | None = None

    def __post_init__(self) -> None:
        kept = {name: value for name, value in self.config.items() if name not in _OF_ITS_FILE}
        object.__setattr__(self, "config", kept)

    @staticmethod
    def of(config: Any, dtype: str | torch.dtype = "float32", quantisation: str | None = None) -> ModelShape:
        """That of a transformers configuration."""
        name = str(dtype).removeprefix("torch.")
        torch_dtype(name)
        narrow = quantisation or counted_as(config)
        return ModelShape({**config.to_dict(), "model_type": config.model_type}, name, narrow)


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: [rows, time] padded tokens of which all but the last of each row are labelled.

    Attributes:
        signal: what the teacher says on it: hidden states of an online teacher (``dense``), ids of a store
            (``sparse``), a store's logits (``logits``), or nothing.
        slots: ids a position of a sparse signal.
        documents: its rows join documents that are kept apart.
        divergence: what the KD term measures, where the signal is of whole distributions; some need more buffers.
    """

    rows: int
    time: int
    signal: SignalKind = "none"
    slots: int = 0
    documents: bool = False
    divergence: str = "forward_kl"

    @property
    def tokens(self) -> int:
        return self.rows * self.time

    def __str__(self) -> str:
        words = {
            "none": "no teacher signal",
            "dense": "online teacher",
            "sparse": f"stored signal of {self.slots} ids",
            "logits": "stored logits",
        }
        return f"{self.rows} x {self.time} tokens, {words[self.signal]}"


@dataclass(frozen=True)
class TrainingShape:
    """A training job.

    Attributes:
        student: its weights, gradients and moments are float32.
        compute_dtype: of the student's matrix products.
        vocab_size: tokens of the shared tokenizer; the teacher's head is cut to them.
        batches: the micro-batches that can be largest, at least one.
        evaluations: validation batches that can be largest.
        teacher: the online teacher, or None.
        teacher_pass_tokens: most padded tokens of one of its passes, or None.
        teacher_elsewhere: ranks of its own hold it, and its output head alone is here.
        teacher_beside: its passes are made on a stream of their own, whose memory nothing else uses.
        reference: a frozen copy of the student is there for the keep-old-logits term.
        grad_checkpoint: activations are recomputed in the backward pass.
        accumulates: a step has several micro-batches, so that gradients exist while a loss is computed.
        temperature: of the KD term; at 1 the loss needs a buffer less.
        ranks: processes among which models are dealt out; of one each has the whole.
        student_dealt_out, teacher_dealt_out: which of them are, the reference student with the student.
        lora: the adapter that is trained, or None where all of the student is; its reference is then the student.
        optimizer: its kind; decides what moments there are.
        measures: evaluation gives agreement, overlap and calibration too, which forms logits of its own.
        device: ``cpu``, or the kind of accelerator; decides how the loss goes about it.
        chunk_bytes: of a chunk's logits on an accelerator.
        loss_rows: the form of row arithmetic that the device has; see ``losses.rows``.
    """

    student: ModelShape
    compute_dtype: str
    vocab_size: int
    batches: tuple[BatchShape, ...]
    evaluations: tuple[BatchShape, ...] = ()
    teacher: ModelShape | None = None
    teacher_pass_tokens: int | None = None
    teacher_elsewhere: bool = False
    teacher_beside: bool = False
    reference: bool = False
    grad_checkpoint: bool = False
    accumulates: bool = False
    temperature: float = 2.0
    ranks: int = 1
    student_dealt_out: bool = False
    teacher_dealt_out: bool = False
    lora: LoraSpec | None = None
    optimizer: str = "adamw"
    measures: bool = False
    device: str = "cuda"
    chunk_bytes: int = CHUNK_BYTES[-1]
    loss_rows: str = EAGER

    def with_rows(self, most: int, rows: int) -> TrainingShape:
        """The same with micro-batches of ``rows`` where they had ``most``: all are cut or grow in proportion."""

        def scale(batch: BatchShape) -> BatchShape:
            return replace(batch, rows=max(1, -(-batch.rows * rows // most)))

        return replace(self, batches=tuple(map(scale, self.batches)), evaluations=tuple(map(scale, self.evaluations)))


@dataclass(frozen=True)
class CaptureShape:
    """A capture job.

    Attributes:
        rows, time: the largest batch, in padded tokens.
        vocab_size: tokens of its tokenizer; the head is cut to them.
        codec, options: how positions are encoded.
    """

    teacher: ModelShape
    rows: int
    time: int
    vocab_size: int
    codec: str = "tail"
    options: Mapping[str, int | float | str] = field(default_factory=dict)
    device: str = "cuda"
