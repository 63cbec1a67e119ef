"""The words of the data side.

record: one JSON object ``{text, type?, sample_id?}``; sample: its tokenised form; type: decides the route to a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

TYPES = ("lm", "math_tool", "code")
STORED_TYPES = ("math_tool", "code")  # scored beforehand in a hybrid run
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One manifest line: files of one type and how often to draw from them.

    Attributes:
        path: path or glob, any fsspec URL, already absolute.
        type: one of ``TYPES``.
        weight: relative share of micro-batches, positive.
        where: ``file:line`` of the manifest, for messages.
    """

    path: str
    type: str
    weight: float
    where: str


@dataclass(frozen=True, slots=True)
class Record:
    """One text with its route and name. ``sample_id`` is always set: given, or a stable hash of type and text."""

    text: str
    type: str
    sample_id: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenised record. ``input_ids`` [n] int32 is the whole text, never truncated: windows are taken by readers."""

    sample_id: str
    type: str
    input_ids: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees: one type, right-padded.

    No attention mask is needed: padding is on the right and every model here is causal, so it cannot reach a real
    position.

    Attributes:
        type: one of ``TYPES``.
        input_ids: [batch, time] int64, padded with 0.
        labels: [batch, time] int64, **already shifted**: ``labels[b, t]`` is the token after ``input_ids[b, t]``;
            ``IGNORE_INDEX`` at each row's last real token and at padding.
        lengths: [batch] int64, real tokens in each row.
        samples: the untruncated samples behind the rows of a maths or code batch, in row order; empty for ``lm``.
    """

    type: str
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    samples: tuple[Sample, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its token ids and labels on ``device``; lengths stay where they are read, on the CPU."""
        if self.input_ids.device == device:
            return self
        ids, labels = self.input_ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return replace(self, input_ids=ids, labels=labels)

    @property
    def num_positions(self) -> int:
        """Labelled positions: a row of n tokens has n - 1."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Real (not padded) tokens."""
        return int(self.lengths.sum())
