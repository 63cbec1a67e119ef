"""What an evaluation found of one student, as plain values: ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from liquid_llm.evaluation.sums import TextSums

FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """One student's figures, and the sums they are made of.

    Attributes:
        student: as it was named.
        teacher: type -> the model that it is compared with; empty without any.
        measures: ``all`` and ``by_type`` at the context length ``length``, and the same ``by_length`` for others; each
            figure is ``{"value", "error"}``, the error over texts (None of a single one). See ``docs/evaluation.md``.
        texts: the sums of each text at ``length``: ``type``, ``id`` and the columns of ``sums.COLUMNS``, by which two
            students can be paired.
        answers: generated and marked ones, see ``answers``; those of the teacher are ``teacher_answers``.
        compared: of a second student and further ones the differences from the first: ``with``, its name; ``verdicts``,
            plain values of ``study.verdict.Verdict``, each with its ``type``; ``remarks``. Empty of the first.
        tasks: what lm-eval's benchmarks gave, see ``lm_eval_tasks.run_tasks``; empty where none was asked for.
        length: tokens of the context.
        about: what it was worked out from: data, arithmetic, versions.
    """

    student: str
    teacher: Mapping[str, str]
    measures: Mapping[str, Any]
    texts: Sequence[Mapping[str, Any]]
    length: int
    answers: Sequence[Mapping[str, Any]] = ()
    teacher_answers: Sequence[Mapping[str, Any]] = ()
    compared: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def summarise(found: Mapping[int, Mapping[str, TextSums]], length: int) -> dict[str, Any]:
    """The figures of all lengths; those of ``length`` first."""
    measures = _of_length(found[length])
    measures["by_length"] = {str(other): _of_length(by_type) for other, by_type in found.items()}
    return measures


def list_texts(by_type: Mapping[str, TextSums]) -> list[dict[str, Any]]:
    """The rows of each text of all types."""
    return [{"type": type, **row} for type, sums in by_type.items() for row in sums.texts()]


def _of_length(by_type: Mapping[str, TextSums]) -> dict[str, Any]:
    return {
        "all": TextSums.join(list(by_type.values())).plain(),
        "by_type": {type: sums.plain() for type, sums in by_type.items()},
    }
