"""Several students on the same held-out text, with one pass of the teacher for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from liquid_llm.data.types import Documents, MicroBatch
from liquid_llm.distributed import Engine, deal
from liquid_llm.evaluation.measures import PositionMeasures, compare
from liquid_llm.evaluation.sums import TextSums
from liquid_llm.passes import PassLimit
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.teacher import Prepared
from liquid_llm.training import Student

Sets = Mapping[int, Mapping[str, Sequence[MicroBatch]]]
"""Context length -> type -> micro-batches of held-out text."""


class SumsOfSets:
    """Sums by text for each length and type of ``sets``.

    Args:
        sets: all that is evaluated, of all ranks: each of them knows all texts.
        token_bytes: [vocab], the bytes that each token stands for; None: they are not counted.
    """

    def __init__(self, sets: Sets, token_bytes: Tensor | None = None) -> None:
        self._token_bytes = token_bytes
        self._numbers: dict[tuple[int, str], dict[str, int]] = {}
        self.sums: dict[int, dict[str, TextSums]] = {}
        for length, by_type in sets.items():
            for type, batches in by_type.items():
                names = dict.fromkeys(name for batch in batches for name in documents_of(batch).names)
                self._numbers[length, type] = {name: number for number, name in enumerate(names)}
                self.sums.setdefault(length, {})[type] = TextSums(list(names))

    def add(self, length: int, batch: MicroBatch, measured: PositionMeasures) -> None:
        """Add a whole batch of one length, or the measures of some rows with those rows as a batch."""
        documents = documents_of(batch)
        numbers = self._numbers[length, batch.type]
        texts = torch.tensor([numbers[name] for name in documents.names], dtype=torch.int64)[documents.numbers]
        sizes = None if self._token_bytes is None else self._token_bytes[batch.targets.cpu()]
        self.sums[length][batch.type].add(texts, measured, sizes)

    def sum_over(self, engine: Engine) -> dict[int, dict[str, TextSums]]:
        """The sums of all ranks together."""
        return {
            length: {type: sums.sum_over(engine) for type, sums in by_type.items()}
            for length, by_type in self.sums.items()
        }


def documents_of(batch: MicroBatch) -> Documents:
    """The texts of a batch; one that does not say has a text in each row."""
    if batch.documents is not None:
        return batch.documents
    names = tuple(f"row {number}" for number in range(len(batch.lengths)))
    return Documents(names, torch.arange(len(names)).repeat_interleave(batch.row_positions))


@dataclass
class Judge:
    """Measures students on fixed validation batches.

    Attributes:
        sets: what they are measured on.
        router: gives the teacher's signal, at temperature 1; a type without a teacher, or whose store holds another
            temperature alone, is measured without.
        token_bytes: as for ``SumsOfSets``.
        passes: how much of a batch is computed at a time.
        engine: the ranks among which the batches are dealt out.
        advance: told how many tokens are done.
    """

    sets: Sets
    router: TeacherRouter
    token_bytes: Tensor | None = None
    passes: PassLimit = field(default_factory=PassLimit)
    engine: Engine = field(default_factory=Engine)
    advance: Callable[[int], object] = lambda tokens: None

    def __call__(self, students: Sequence[Student]) -> list[dict[int, dict[str, TextSums]]]:
        """The sums of each student, by context length and type.

        Raises:
            DeviceError: not even one row of a batch fits into the device's memory.
        """
        found = [SumsOfSets(self.sets, self.token_bytes) for _ in students]
        training = [one.model.training for one in students]
        for one in students:
            one.model.eval()
        try:
            with torch.no_grad():
                for length, by_type in self.sets.items():
                    for batch in (one for batches in by_type.values() for one in deal(batches, self.engine)):
                        self._measure(students, found, length, batch)
                        self.advance(batch.num_tokens)
        finally:
            for one, mode in zip(students, training, strict=True):
                one.model.train(mode)
        self.engine.wait_for_all()  # which may take longer than an exchange lets a rank be behind
        return [one.sum_over(self.engine) for one in found]

    def _measure(
        self, students: Sequence[Student], found: Sequence[SumsOfSets], length: int, batch: MicroBatch
    ) -> None:
        device = students[0].device
        prepared = self.router.prepare(batch, 1.0) if self.router.answers(batch.type, 1.0) else None

        def compute(part: MicroBatch, positions: slice, given: Prepared | None) -> list[PositionMeasures]:
            here = part.to(device)
            signal = None if given is None else self.router.signal(here, given.part(positions))
            pairs = [(student.states(here), student.head) for student in students]
            return compare(pairs, here.targets, signal)

        passes = self.passes.run(
            [(batch, prepared)], compute, lambda: None, device=device, where="evaluation", consumers=lambda: ""
        )
        for number, sums in enumerate(found):
            sums.add(length, batch, PositionMeasures.join([one[number] for one in passes]))
