"""The words of the data side.

record: one JSON object ``{text, type?, sample_id?}``, or with ``messages``, or ``prompt`` and ``completion`` (two
strings, or two lists of messages), in place of the text; sample: its tokenised form; type: the name of a kind of text,
any that a manifest gives: it decides teacher, layout and objective; learnt: said of the tokens that a student is to
predict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE_INDEX = -100

_FROM_LABELS: Any = None
_ON_THE_DEVICE = ("input_ids", "labels", "positions", "targets", "places")  # of a micro-batch; the host reads the rest


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One manifest line: files of one type and how often to draw from them.

    Attributes:
        path: path or glob, any fsspec URL, already absolute.
        type: of its texts.
        weight: relative share of micro-batches, positive.
        where: ``file:line`` of the manifest, for messages.
        license: under which they were had, where the line says so; for the card of the student.
    """

    path: str
    type: str
    weight: float
    where: str
    license: str | None = None

    def plain(self) -> dict[str, object]:
        """What the line says, with the path as it was made absolute."""
        known: dict[str, object] = {"path": self.path, "type": self.type, "weight": self.weight}
        return known if self.license is None else {**known, "license": self.license}


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One text with its type and name.

    Attributes:
        text: the text; where there is a prompt, its completion; "" where there are messages.
        type: of the text.
        sample_id: always set: given, or a stable hash of type and ``whole``.
        prompt: what the text answers, or None.
        messages: a conversation in place of a text, each ``{"role", "content", ...}``, or None.
        prompt_messages: how many of them are the prompt, of which nothing is learnt, whoever speaks.
    """

    text: str
    type: str
    sample_id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt_messages: int = 0

    @property
    def whole(self) -> str:
        """All of it as one string, by which it is named and compared."""
        return whole_text(self.text, self.prompt, self.messages)


def whole_text(text: str, prompt: str | None, messages: tuple[Mapping[str, Any], ...] | None) -> str:
    """What a record says, whatever its form: a prompt and its completion are the text that they make together."""
    if messages is not None:
        return json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return (prompt or "") + text


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenised record.

    Attributes:
        sample_id, type: its record's.
        input_ids: [n] int32, the whole text, never truncated: windows are taken by readers.
        learnt: [n] bool, the tokens that are learnt; None where all are.
        shard: which file of the manifest it is of (``manifest.shard_name``); None where nobody has asked.
    """

    sample_id: str
    type: str
    input_ids: np.ndarray
    learnt: np.ndarray | None = None
    shard: str | None = None

    def learnt_positions(self, window: int) -> NDArray[np.bool_]:
        """Which next-token positions of the first ``window`` tokens are learnt: [min(window, n) - 1] bool."""
        rows = max(min(window, len(self.input_ids)) - 1, 0)
        return np.ones(rows, dtype=bool) if self.learnt is None else self.learnt[1 : rows + 1].astype(bool)


@dataclass(frozen=True, slots=True)
class Documents:
    """Which text each labelled position of a micro-batch belongs to, where that is asked for: that of its label.

    Attributes:
        names: sample ids of the texts; of windows, those of their documents.
        numbers: [labelled] int64, which of ``names`` each position's text is; always on the CPU.
    """

    names: tuple[str, ...]
    numbers: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees: one type, right-padded.

    No attention mask is needed: padding is on the right and every model here is causal, so it cannot reach a real
    position. What the host must know of a batch is worked out when it is made, on the CPU: a device is never waited
    for to learn how many positions are labelled, or where.

    Attributes:
        type: of its texts.
        input_ids: [batch, time] int64, padded with 0.
        labels: [batch, time] int64, **already shifted**: ``labels[b, t]`` is the token after ``input_ids[b, t]``;
            ``IGNORE_INDEX`` at each row's last real token, at padding and where that token is not learnt.
        lengths: [batch] int64, real tokens in each row; always on the CPU.
        samples: the untruncated samples behind the rows, in row order, where whole samples make them; empty for blocks.
        positions: [labelled] int64, places of the labelled positions in the flattened [batch * time] grid, row-major.
        targets: [labelled] int64, their labels.
        row_positions: [batch] int64, labelled positions of each row; always on the CPU.
        places: [batch, time] int64, of each token in its document, where models keep the documents of a block apart;
            None where a row is one sequence to them.
    """

    type: str
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    samples: tuple[Sample, ...] = ()
    positions: Tensor = _FROM_LABELS
    targets: Tensor = _FROM_LABELS
    row_positions: Tensor = _FROM_LABELS
    places: Tensor | None = None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        if self.positions is not _FROM_LABELS:
            return
        labelled = self.labels != IGNORE_INDEX
        positions = labelled.reshape(-1).nonzero().squeeze(1)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "targets", self.labels.reshape(-1)[positions])
        object.__setattr__(self, "row_positions", labelled.sum(dim=1).cpu())

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with what a model reads on ``device``; what the host reads stays on the CPU."""
        if self.input_ids.device == device:
            return self
        return self._with(lambda tensor: to_device(tensor, device))

    def pinned(self, device: torch.device) -> MicroBatch:
        """The same in memory from which a copy to ``device`` runs beside the computation; to be done ahead of need."""
        if device.type == "cpu":
            return self
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same with ``change`` made to what goes to the device."""
        found = {name: getattr(self, name) for name in _ON_THE_DEVICE}
        changed: dict[str, Any] = {name: change(one) for name, one in found.items() if one is not None}
        return replace(self, **changed)

    def rows(self, start: int, stop: int) -> tuple[MicroBatch, slice]:
        """Rows ``start`` to ``stop`` as a batch of their own; which of this batch's labelled positions they have."""
        if start == 0 and stop >= len(self.lengths):  # all of it: nothing is looked at, nothing copied
            return self, slice(0, self.num_positions)
        ends = [0, *self.row_positions.cumsum(0).tolist()]
        held = slice(ends[start], ends[min(stop, len(ends) - 1)])
        part = MicroBatch(
            self.type,
            self.input_ids[start:stop],
            self.labels[start:stop],
            self.lengths[start:stop],
            self.samples[start:stop],
            self.positions[held] - start * self.input_ids.shape[1],
            self.targets[held],
            self.row_positions[start:stop],
            None if self.places is None else self.places[start:stop],
            None if self.documents is None else replace(self.documents, numbers=self.documents.numbers[held]),
        )
        return part, held

    @property
    def num_positions(self) -> int:
        """Labelled positions: a row of n tokens, all of them learnt, has n - 1."""
        return self.positions.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real (not padded) tokens."""
        return int(self.lengths.sum())

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt. In a row that is learnt from end to end all count, the first one too."""
        whole = self.row_positions == self.lengths - 1
        return int(torch.where(whole, self.lengths, self.row_positions).sum())

    @property
    def padded_tokens(self) -> int:
        """Tokens that a model computes, padding included."""
        return self.input_ids.numel()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to an accelerator from pinned memory, so that the copy runs beside the computation."""
    if device.type != "cpu" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Samples(Protocol):
    """Tokenised samples by index."""

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str: ...

    def sample(self, index: int) -> Sample: ...


class SampleSource(Samples, Protocol):
    """Samples whose lengths are all known, such as ``TokenDataset``.

    Attributes:
        lengths: [samples] int64, tokens of each.
    """

    @property
    def lengths(self) -> NDArray[np.int64]: ...


@runtime_checkable
class ShardedSource(Samples, Protocol):
    """Samples that can say how many are of each data file, in the order of these.

    Attributes:
        shards: names of the files.
        counts: [shards] int64, samples of each file; None where nobody has asked.
    """

    @property
    def shards(self) -> Sequence[str]: ...

    @property
    def counts(self) -> NDArray[np.int64] | None: ...
