"""What a training step asks of a teacher, whatever it is: a model in memory, a store of signal, a server.

    spec      how a teacher is named: ``KIND:REST``, where KIND is in ``registry.TEACHERS`` (``online:MODEL``,
              ``store:URI``), or ``none``
    maker     what the registry holds: ``(REST, TeacherSetup) -> Teacher``
    prepare   what can be done ahead of need and in any thread: reading, decoding, asking a server
    signal    one row for each labelled position of a micro-batch, formed right before its loss, on its device
    coverage  how much of a run's data a teacher that cannot answer for any text has something for

A new teacher is a file with a subclass of ``Teacher`` and a maker, and a line in the registry.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liquid_llm.data.types import MicroBatch, Samples
from liquid_llm.losses.signals import WHOLE, Signal
from liquid_llm.runtime import Choice, choose_attention


@dataclass(frozen=True)
class TeacherSetup:
    """What a run tells the maker of any of its teachers.

    Attributes:
        tokenizer, tokenizer_hash: teacher and student see the same ids; a teacher of another tokenizer is refused.
        vocab_size: entries of that tokenizer; the padding of a teacher's embedding beyond them is cut off.
        context: tokens of the longest row that the teacher will see.
        device: where the student is.
        precision: ``--teacher_precision``.
        attention: chooses a model's attention for a device and the name of a dtype.
        token: of Hugging Face.
        stored_id: the teacher whose signal a store must hold; None takes any.
        strict: ``--hybrid_strict``.
        deterministic: the same bits every time on a GPU too.
        quantise: what is done to a model's weights (``int8``), or None.
        dealt_out: a model is going to be dealt out among the ranks (``Teacher.deal_out``); until then the host has it.
        cache: folder for what is fetched.
    """

    tokenizer: Any
    tokenizer_hash: str
    vocab_size: int
    context: int
    device: torch.device
    cache: Path
    precision: str = "auto"
    attention: Callable[[torch.device, str], Choice] = lambda device, dtype: choose_attention(device, dtype=dtype)
    token: str | None = field(default=None, repr=False)
    stored_id: str | None = None
    strict: bool = False
    deterministic: bool = False
    dealt_out: bool = False
    quantise: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made of a micro-batch: its signal on the CPU, or None where ``signal`` is to compute it."""

    signal: Signal | None = None

    def pinned(self, device: torch.device) -> Prepared:
        """The same in memory from which a copy to ``device`` runs beside the computation; to be done ahead of need."""
        return self if self.signal is None or device.type == "cpu" else replace(self, signal=self.signal.pinned())

    def part(self, positions: slice) -> Prepared:
        """What was prepared for some of the micro-batch's labelled positions."""
        return self if self.signal is None else replace(self, signal=self.signal.part(positions))


@dataclass(frozen=True)
class Coverage:
    """What a teacher has for the samples of one type of a run's data.

    Attributes:
        where: the records, for messages.
        samples: in the data.
        listed: of which the teacher has a record of that name.
        checked: records that were looked at.
        statuses: how many of those checked are usable, missing, stale or corrupt.
        examples: status -> the first sample that is not usable, and why.
        remedies: status -> what would help that sample.
    """

    where: str
    samples: int
    listed: int
    checked: int
    statuses: Mapping[str, int]
    examples: Mapping[str, str]
    remedies: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Of those checked."""
        return self.statuses.get("usable", 0)

    @property
    def problem(self) -> str:
        """What was wrong with the first one that was not usable, or ""."""
        return "none has a record" if not self.listed else next(iter(self.examples.values()), "")

    @property
    def remedy(self) -> str:
        """What would help that one."""
        return next(iter(self.remedies.values()), "name the store that was captured of this manifest, or capture it")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for provenance."""
        names = ("samples", "listed", "checked", "usable", "problem")
        return {name: getattr(self, name) for name in names}


class Teacher(ABC):
    """Answers for the micro-batches of one or several types. What is not abstract has an answer that suits most.

    Attributes:
        temperature_range: lowest and highest temperature it can be asked at.
        model: what it holds on the device, or None.
        most_ids: the most ids a position of its signal has; 0 for whole logits, None for hidden states and a head.
        form: what its signal tells of a position, a key of ``losses.signals.FORMS``.
        choices: what was chosen for it, each with its reason.
        told_by: how its signal came here: ``online``, the codec of a store, or ``held_out:`` and the codec of samples
            that are stored for evaluation. A KL from the teacher by one codec does not compare with one by another;
            those online, by ``full`` and held out do.
    """

    dear: bool = False
    temperature_range: tuple[float, float] = (0.0, math.inf)
    model: nn.Module | None = None
    most_ids: int | None = None
    form: str = WHOLE
    choices: Mapping[str, Choice] = {}
    told_by: str = "online"

    @abstractmethod
    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared | None:
        """What ``signal`` needs for ``batch``; None where the teacher says nothing about it.

        Raises:
            SignalError: it cannot answer at this temperature or for such a batch.
            StorageError: what it reads cannot be read.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the teacher is, as plain values for provenance."""

    def signal(self, batch: MicroBatch, prepared: Prepared) -> Signal | None:
        """One row for each labelled position of ``batch``, row-major, on the batch's device.

        Args:
            batch: the one that was prepared, or some rows of it with their part of ``prepared``.
        """
        return None if prepared.signal is None else prepared.signal.to(batch.input_ids.device)

    def own_loss(self, batch: MicroBatch, signal: Signal) -> float | None:
        """The teacher's own summed cross-entropy on ``batch``, nats; None where its signal does not tell."""
        return None

    def coverage(self, datasets: Sequence[Samples], window: int, *, every: bool = False) -> Coverage | None:
        """What the teacher has for the samples of one type; None where it answers for any text.

        Args:
            window: tokens of the longest window.
            every: look at each sample, however long that takes.
        """
        return None

    def deal_out(self, device: torch.device) -> None:  # noqa: B027 (most hold no model)
        """Deal the model that it holds out among the ranks, on ``device`` of each; all of them call this."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what it holds; it is not asked again."""
