"""Which teacher answers for a micro-batch: a table from type to teacher. A type that is not in it has no signal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from liquid_llm.data.types import MicroBatch, Samples
from liquid_llm.errors import DataError, SignalError
from liquid_llm.losses.signals import Signal
from liquid_llm.teachers.teacher import Coverage, Prepared, Teacher

log = logging.getLogger(__name__)


class TeacherRouter(Mapping[str, Teacher]):
    """The teachers of a run by type; one teacher may stand for several."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self._teachers = dict(teachers)

    def __getitem__(self, type: str) -> Teacher:
        return self._teachers[type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._teachers)

    def __len__(self) -> int:
        return len(self._teachers)

    def prepare(self, batch: MicroBatch, temperature: float) -> Prepared | None:
        """As ``Teacher.prepare``; None too where no teacher answers for the type."""
        teacher = self.get(batch.type)
        return None if teacher is None else teacher.prepare(batch, temperature)

    def signal(self, batch: MicroBatch, prepared: Prepared | None) -> Signal | None:
        """As ``Teacher.signal``; None where nothing was prepared."""
        return None if prepared is None else self[batch.type].signal(batch, prepared)

    def answers(self, type: str, temperature: float) -> bool:
        """Whether the type has a teacher that can be asked at ``temperature``: a store of draws holds one alone."""
        teacher = self.get(type)
        return teacher is not None and teacher.temperature_range[0] <= temperature <= teacher.temperature_range[1]

    def check_temperature(self, type: str, temperature: float) -> None:
        """Raise SignalError where the teacher of ``type`` cannot be asked at ``temperature``."""
        if type in self and not self.answers(type, temperature):
            lowest, highest = self[type].temperature_range
            raise SignalError(
                f"the teacher of {type} cannot answer at this temperature",
                got=f"{temperature:g}",
                expected=f"{lowest:.3g}" if lowest == highest else f"{lowest:.3g} to {highest:.3g}",
                remedy="give such a --kd_temperature"
                + (", or --divergence=decoupled_topk:k=K, which asks a teacher at 1" if lowest <= 1 <= highest else "")
                + ", or capture stored signal with codec 'tail' or 'full'",
            )

    def coverage(self, datasets: Mapping[str, Sequence[Samples]], window: int) -> dict[str, Coverage]:
        """What the teachers have for the data of a run, before its first step; those that answer for any text left out.

        Args:
            datasets: type -> its datasets.
            window: tokens of the longest window.

        Raises:
            DataError: no teacher that has only some samples has one of this run.
        """
        found = {}
        for type, those in datasets.items():
            row = self[type].coverage(those, window) if type in self and any(map(len, those)) else None
            if row is not None:
                found[type] = row
        if found and not any(row.usable for row in found.values()):
            raise DataError(
                "no sample of this run has usable stored signal",
                where=", ".join(sorted({row.where for row in found.values()})),
                got="; ".join(f"{type}: {row.samples} samples, {row.problem}" for type, row in found.items()),
                remedy="; ".join(dict.fromkeys(row.remedy for row in found.values())),
            )
        for type, row in found.items():
            if not row.usable:
                said = "%s: no sample has usable stored signal (%s): plain cross-entropy; to mend it, %s"
                log.warning(said, type, row.problem, row.remedy)
        return found

    def close(self) -> None:
        """Close each teacher once."""
        for teacher in dict.fromkeys(self.values()):
            teacher.close()
