"""Validation: token-weighted losses by type, at one or several context lengths.

Every length sees the same text, cut differently. KL to the teacher is taken at temperature 1, so that it compares
between steps whatever the schedule does. Nothing here touches the training stream. Batches are kept on the CPU, and so
is what a teacher computed for them: a GPU's memory is for training.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed import Engine, deal
from liquid_llm.evaluation.judge import Sets, SumsOfSets
from liquid_llm.evaluation.measures import PositionMeasures, compare
from liquid_llm.evaluation.sums import TextSums
from liquid_llm.losses.objective import Objective
from liquid_llm.losses.signals import Signal
from liquid_llm.passes import PassLimit
from liquid_llm.sharding import reshard
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.teacher import Prepared
from liquid_llm.training import Student

MEASURED = Objective(alpha=0.5)  # its parts are looked at one by one: the weight does not matter
CACHE_BYTES = 512 * 2**20


@dataclass
class Score:
    """Sums over positions of one type at one context length; ``shared_ce`` is the student's where the teacher's is."""

    ce: float = 0.0
    kd: float = 0.0
    teacher_ce: float = 0.0
    shared_ce: float = 0.0
    num_positions: int = 0
    num_signal: int = 0
    num_teacher: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*map(operator.add, astuple(self), astuple(other)))

    def sum_over(self, engine: Engine) -> Score:
        """The same of all ranks together."""
        ce, kd, teacher_ce, shared_ce, *counts = engine.sum(torch.tensor(astuple(self), dtype=torch.float64)).tolist()
        return Score(ce, kd, teacher_ce, shared_ce, *map(int, counts))

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
        """The online teacher's own mean cross-entropy on the positions it was asked for; None without any."""
        return self.teacher_ce / self.num_teacher if self.num_teacher else None

    @property
    def val_loss_shared(self) -> float | None:
        """The student's on those positions; None where that is ``val_loss``."""
        return self.shared_ce / self.num_teacher if 0 < self.num_teacher < self.num_positions else None


@dataclass
class Evaluator:
    """Scores a student on fixed validation batches.

    Attributes:
        sets: context length -> type -> micro-batches.
        block_size: the training length, whose figures carry no ``@length``.
        router: gives the teacher's signal; an empty one evaluates the student alone.
        passes: how much of a batch is scored at a time; evaluation has its own limit, as it needs less than training.
        consumers: says what takes most of the device's memory, for the message that it does not suffice.
        engine: the ranks among which the batches are dealt out.
        measures: whether agreement, overlap, calibration and bits a byte are in the row too.
        alike: whether every rank scores as many batches as every other, as they compute together: some twice.
        cache_bytes: how much of what a teacher has computed is kept for the next evaluation.
        token_bytes: [vocab], the bytes that each token stands for, for bits a byte.
    """

    sets: Sets
    block_size: int
    context_lengths: Sequence[int]
    router: TeacherRouter
    passes: PassLimit = field(default_factory=PassLimit)
    consumers: Callable[[], str] = lambda: ""
    engine: Engine = field(default_factory=Engine)
    measures: bool = False
    token_bytes: Tensor | None = None
    alike: bool = False
    cache_bytes: int = CACHE_BYTES
    _kept: dict[tuple[int, int, int], Signal] = field(default_factory=dict)
    _teacher_ce: dict[tuple[int, int, int], float | None] = field(default_factory=dict)
    _cached_bytes: int = 0

    def __call__(self, student: Student) -> dict[str, Any]:
        """The ``eval`` row of ``metrics.jsonl``, without its step.

        Raises:
            DeviceError: not even one row of a batch fits into the device's memory.
        """
        own = {
            length: {type: deal(batches, self.engine) for type, batches in by_type.items()}
            for length, by_type in self.sets.items()
        }
        sums = SumsOfSets(self.sets, self.token_bytes) if self.measures else None
        scores = {
            length: {type: score.sum_over(self.engine) for type, score in by_type.items()}
            for length, by_type in self._score(student, own, sums, alike=self.alike).items()
        }
        row = _summarise(scores[self.block_size], "")
        row["by_type"] = {
            type: _without_none(
                {
                    "val_loss": one.val_loss,
                    "val_kd": one.val_kd,
                    "val_loss_teacher": one.val_loss_teacher,
                    "positions": one.num_positions,
                }
            )
            for type, one in scores[self.block_size].items()
        }
        self._name_codecs(row)
        for length in self.context_lengths:
            row.update(_summarise(scores[length], f"@{length}"))
        if sums is not None:
            self._add_measures(row, sums.sum_over(self.engine))
        return row

    def _name_codecs(self, row: dict[str, Any]) -> None:
        """Say of each KL from the teacher how the teacher's signal came here: those of two codecs do not compare."""
        told = {type: self.router[type].told_by for type, one in row["by_type"].items() if "val_kd" in one}
        for type, codec in told.items():
            row["by_type"][type]["val_kd_codec"] = codec
        if told:
            row["val_kd_codec"] = "+".join(sorted(set(told.values())))

    def _add_measures(self, row: dict[str, Any], found: Mapping[int, Mapping[str, TextSums]]) -> None:
        """Put the further measures into a row: of all types, at each length, and by type."""
        row.update(_measures(TextSums.join(list(found[self.block_size].values())), ""))
        for type, sums in found[self.block_size].items():
            row["by_type"][type].update(_measures(sums, ""))
        for length in self.context_lengths:
            row.update(_measures(TextSums.join(list(found[length].values())), f"@{length}"))

    def probe(self, student: Student) -> None:
        """Score the largest batch of each type and length, so that what evaluation lacks is found out at once.

        Raises:
            LiquidError: whatever an evaluation would have ended with, hours later.
        """
        largest = {
            length: {type: [max(batches, key=lambda one: one.padded_tokens)] for type, batches in by_type.items()}
            for length, by_type in self.sets.items()
        }
        self._score(student, largest, SumsOfSets(largest, self.token_bytes) if self.measures else None)

    def _score(
        self, student: Student, sets: Sets, sums: SumsOfSets | None, *, alike: bool = False
    ) -> dict[int, dict[str, Score]]:
        """The sums of each length and type, without dropout or gradients; the further measures go to ``sums``."""
        training = student.model.training
        student.model.eval()
        try:
            with torch.no_grad():
                return {
                    length: {
                        type: sum(
                            (self._score_batch(student, length, one, sums) for one in batches),
                            self._keep_up(student, length, type, len(batches)) if alike else Score(),
                        )
                        for type, batches in by_type.items()
                    }
                    for length, by_type in sets.items()
                }
        finally:
            student.model.train(training)
            if student.is_dealt_out:
                reshard(student)

    def _keep_up(self, student: Student, length: int, type: str, num_own: int) -> Score:
        """Compute a batch more where other ranks have one more to score; it counts there alone."""
        batches = self.sets[length][type]
        if num_own < -(-len(batches) // self.engine.world_size):
            self._score_batch(student, length, batches[0], None)
        return Score()

    def _score_batch(self, student: Student, length: int, batch: MicroBatch, sums: SumsOfSets | None) -> Score:
        """Score a batch in as many passes as its memory asks for."""
        passes = self.passes.run(
            [(batch, Prepared() if self._is_kept(batch) else self._prepare(batch))],
            lambda part, positions, prepared: self._score_part(student, batch, part, positions, prepared),
            lambda: self._forget(batch),
            device=student.device,
            where="evaluation",
            consumers=self.consumers,
        )
        if sums is not None:
            sums.add(length, batch, PositionMeasures.join([measured for _, measured in passes if measured is not None]))
        return sum((score for score, _ in passes), Score())

    def _is_kept(self, batch: MicroBatch) -> bool:
        """Whether the signal of each of its passes is kept: the teacher need not be asked."""
        return all((id(batch), rows.start, rows.stop) in self._kept for _, rows in self.passes.parts(batch))

    def _forget(self, batch: MicroBatch) -> None:
        """Give up what was kept of a batch: its passes will not come again."""
        for key in [one for one in self._kept if one[0] == id(batch)]:
            self._cached_bytes -= self._kept.pop(key).nbytes

    def _score_part(
        self, student: Student, batch: MicroBatch, part: MicroBatch, positions: slice, prepared: Prepared | None
    ) -> tuple[Score, PositionMeasures | None]:
        # The batches live as long as the evaluator, so their identity is a safe key.
        key = (id(batch), positions.start, positions.stop)
        part = part.to(student.device)
        signal = self._signal(key, part, None if prepared is None else prepared.part(positions))
        measured = None
        if self.measures:
            hidden = student.states(part)
            output = student.loss(hidden, part, signal, MEASURED)
            (measured,) = compare([(hidden, student.head)], part.targets, signal)
        else:
            output = student(part, signal, MEASURED)
        score = Score(float(output.ce), float(output.kd), 0.0, 0.0, output.num_positions, output.num_signal, 0)
        teacher_ce = None if signal is None else self._teacher_loss(key, part, signal)
        if teacher_ce is not None:
            score.teacher_ce, score.shared_ce, score.num_teacher = teacher_ce, score.ce, output.num_positions
        return score, measured

    def _prepare(self, batch: MicroBatch) -> Prepared | None:
        """What the teacher's answer for a batch is made from; None where it is not asked."""
        if not self.router.answers(batch.type, MEASURED.temperature):
            return None
        return self.router.prepare(batch, MEASURED.temperature)

    def _signal(self, key: tuple[int, int, int], part: MicroBatch, prepared: Prepared | None) -> Signal | None:
        if prepared is None:
            return None
        if key in self._kept:
            return self._kept[key].to(part.input_ids.device)
        signal = self.router.signal(part, prepared)
        if signal is None or (prepared.signal is not None and not self.router[part.type].dear):
            return signal
        # It was computed just now, which is dear, and will be the same the next time.
        if self._cached_bytes + signal.nbytes <= self.cache_bytes:
            self._kept[key] = signal.to(torch.device("cpu"))
            self._cached_bytes += signal.nbytes
        return signal

    def _teacher_loss(self, key: tuple[int, int, int], part: MicroBatch, signal: Signal) -> float | None:
        if key not in self._teacher_ce:
            self._teacher_ce[key] = self.router[part.type].own_loss(part, signal)
        return self._teacher_ce[key]


def _summarise(scores: Mapping[str, Score], suffix: str) -> dict[str, object]:
    """The figures of one length over all types, their names with ``suffix``."""
    total = sum(scores.values(), Score())
    return _without_none(
        {
            f"val_loss_student{suffix}": total.val_loss,
            f"val_ppl_student{suffix}": math.exp(min(total.val_loss, 700.0)),
            f"val_kd{suffix}": total.val_kd,
            f"val_loss_teacher{suffix}": total.val_loss_teacher,
            f"val_loss_student_with_teacher{suffix}": total.val_loss_shared,
        }
    )


_FURTHER = {
    "agreement": "val_agreement",
    "overlap": "val_overlap",
    "calibration": "val_calibration",
    "teacher_calibration": "val_calibration_teacher",
    "bits_per_byte": "val_bits_per_byte",
    "teacher_bits_per_byte": "val_bits_per_byte_teacher",
}


def _measures(sums: TextSums, suffix: str) -> dict[str, float]:
    """The further measures of some texts, by the names that rows have for them."""
    found = sums.estimates()
    return {f"{key}{suffix}": found[name].value for name, key in _FURTHER.items() if name in found}


def _without_none(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if value is not None}
