"""Validation: token-weighted losses by type, at one or several context lengths.

Every length sees the same text, cut differently. KL to the teacher is taken at temperature 1, so that it compares
between steps whatever the schedule does. Nothing here touches the training stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from liquid_llm.data.types import MicroBatch
from liquid_llm.losses.fused import fused_loss
from liquid_llm.losses.signals import DenseSignal, Signal
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.training import StepValues, Student, labelled_rows

PLAIN = StepValues(kd_alpha=0.5, kd_temperature=1.0, l2_gamma=0.0, lr=0.0)
CACHE_BYTES = 512 * 2**20


@dataclass
class Score:
    """Sums over positions of one type at one context length."""

    ce: float = 0.0
    kd: float = 0.0
    teacher_ce: float = 0.0
    num_positions: int = 0
    num_signal: int = 0
    num_teacher: int = 0

    def __iadd__(self, other: Score) -> Score:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def val_loss(self) -> float:
        """Mean cross-entropy, nats a token."""
        return self.ce / self.num_positions

    @property
    def val_kd(self) -> float | None:
        """Mean KL(teacher || student) at temperature 1 over positions with a signal; None without any."""
        return self.kd / self.num_signal if self.num_signal else None

    @property
    def val_loss_teacher(self) -> float | None:
        """The online teacher's own mean cross-entropy on the same positions; None without an online teacher."""
        return self.teacher_ce / self.num_teacher if self.num_teacher else None


@dataclass
class Evaluator:
    """Scores a student on fixed validation batches.

    Attributes:
        sets: context length -> type -> micro-batches.
        block_size: the training length, whose figures carry no ``@length``.
        router: gives the teacher's signal; None evaluates the student alone.
    """

    sets: Mapping[int, Mapping[str, Sequence[MicroBatch]]]
    block_size: int
    context_lengths: Sequence[int]
    router: TeacherRouter | None
    _online: dict[int, DenseSignal] = field(default_factory=dict)
    _teacher_ce: dict[int, float] = field(default_factory=dict)
    _cached_bytes: int = 0

    def __call__(self, student: Student) -> dict[str, object]:
        """The ``eval`` row of ``metrics.jsonl``, without its step."""
        training = student.model.training
        student.model.eval()
        try:
            with torch.no_grad():
                scores = {length: self._score_length(student, length) for length in self.sets}
        finally:
            student.model.train(training)
        row = self._summary(scores[self.block_size], "")
        row["by_type"] = {
            kind: _without_none({"val_loss": one.val_loss, "val_kd": one.val_kd, "positions": one.num_positions})
            for kind, one in scores[self.block_size].items()
        }
        for length in self.context_lengths:
            row.update(self._summary(scores[length], f"@{length}"))
        return row

    def _score_length(self, student: Student, length: int) -> dict[str, Score]:
        scores = {}
        for kind, batches in self.sets[length].items():
            total = Score()
            for batch in batches:
                total += self._score_batch(student, batch)
            scores[kind] = total
        return scores

    def _score_batch(self, student: Student, batch: MicroBatch) -> Score:
        signal = self._signal(batch)
        output = student.loss(batch, signal, PLAIN)
        score = Score(float(output.ce), float(output.kd), 0.0, output.num_positions, output.num_signal, 0)
        if isinstance(signal, DenseSignal):
            score.teacher_ce = self._teacher_loss(batch, signal)
            score.num_teacher = output.num_positions
        return score

    def _signal(self, batch: MicroBatch) -> Signal | None:
        if self.router is None or not self.router.answers(batch.type, PLAIN.kd_temperature):
            return None
        if id(batch) in self._online:
            return self._online[id(batch)]
        signal = self.router.signal(batch, self.router.prepare(batch, PLAIN.kd_temperature))
        if isinstance(signal, DenseSignal):
            # The batches live as long as the evaluator, so their identity is a safe key.
            size = signal.hidden.numel() * signal.hidden.element_size()
            if self._cached_bytes + size <= CACHE_BYTES:
                self._online[id(batch)] = signal
                self._cached_bytes += size
        return signal

    def _teacher_loss(self, batch: MicroBatch, signal: DenseSignal) -> float:
        if id(batch) not in self._teacher_ce:
            labels = batch.labels.reshape(-1)[labelled_rows(batch)]
            self._teacher_ce[id(batch)] = float(fused_loss(signal.hidden, signal.head, labels).ce)
        return self._teacher_ce[id(batch)]

    def _summary(self, scores: Mapping[str, Score], suffix: str) -> dict[str, object]:
        total = Score()
        for one in scores.values():
            total += one
        return _without_none(
            {
                f"val_loss_student{suffix}": total.val_loss,
                f"val_ppl_student{suffix}": math.exp(min(total.val_loss, 700.0)),
                f"val_kd{suffix}": total.val_kd,
                f"val_loss_teacher{suffix}": total.val_loss_teacher,
            }
        )


def _without_none(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if value is not None}
