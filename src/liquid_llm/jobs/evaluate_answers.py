"""The part of an evaluation that generates: held-out prompts answered greedily by each student and the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from liquid_llm.answers import Question, answer_questions, count_right, end_tokens, pick_questions
from liquid_llm.distributed import Engine, deal
from liquid_llm.errors import UsageError
from liquid_llm.models.loading import load_tokenizer
from liquid_llm.terminal import Stage
from liquid_llm.wiring.inputs import Inputs
from liquid_llm.wiring.judging import Judgement

log = logging.getLogger(__name__)

USUAL_ANSWERS = 20
_SEED = 0
_AT_ONCE = 16

Rows = list[dict[str, Any]]


def choose_questions(inputs: Inputs, tokenizer: Any, count: int | None) -> list[Question]:
    """The held-out prompts that all models answer.

    Args:
        count: how many; None: ``USUAL_ANSWERS``, or as many as there are. 0: none.

    Raises:
        UsageError: some are asked for, and no held-out text has a prompt and an answer that can be marked.
    """
    wanted = USUAL_ANSWERS if count is None else count
    datasets = [one for those in inputs.validation.values() for one in those]
    questions = pick_questions(datasets, tokenizer, count=wanted, seed=_SEED) if wanted else []
    if count and not questions:
        raise UsageError(
            "no held-out text has an answer that can be marked",
            where=f"--answers={count}",
            expected="records with a prompt and a completion, or messages, that hold #### n or are a number",
            remedy="leave --answers out, or name other texts",
        )
    return questions


def answer_all(
    on: Judgement,
    models: Sequence[Any],
    dtype: torch.dtype,
    questions: Sequence[Question],
    max_new_tokens: int,
    token: str | None,
    *,
    engine: Engine,
) -> tuple[list[Rows], Rows]:
    """The marked answers of each model, and those of the online teachers to the questions of their types.

    All answer the same questions, and end where the framing, the tokenizer, a turn of the chat template or the
    teacher's own end token ends a text.

    Args:
        token: of the Hugging Face hub, for a teacher that is gated.
        engine: the processes that answer, each some batches of prompts; all know all answers.
    """
    if not questions:
        return [[] for _ in models], []
    ends = _ends(on, questions, token)
    by_teacher: dict[Any, list[Question]] = {}
    for question in questions:
        teacher = on.teachers.router.get(question.type)
        if teacher is not None and teacher.model is not None:
            by_teacher.setdefault(teacher.model, []).append(question)
    own = None if dtype == torch.float32 else dtype
    asked = [(model, questions, own) for model in models]
    asked += [(model, those, None) for model, those in by_teacher.items()]
    # The batches are those of one process, whatever their number: a row's answer may depend on what is beside it.
    batches = [
        (number, model, those[start : start + _AT_ONCE], products)
        for number, (model, those, products) in enumerate(asked)
        for start in range(0, len(those), _AT_ONCE)
    ]
    mine = deal(batches, engine)
    with Stage("answer", unit="prompts", total=sum(len(some) for _, _, some, _ in mine)) as stage:
        found: list[tuple[int, Rows]] = []
        for number, model, some, products in mine:
            told = {"end_ids": ends, "max_new_tokens": max_new_tokens, "dtype": products, "batch_size": _AT_ONCE}
            found.append((number, answer_questions(model, on.text.tokenizer, some, **told)))  # type: ignore[arg-type]
            stage.advance(len(some))
    dealt = engine.collect(found)
    rows: list[Rows] = [[] for _ in asked]
    for place in range(len(batches)):
        number, some_rows = dealt[place % engine.world_size][place // engine.world_size]
        rows[number] += some_rows
    return rows[: len(models)], [row for those in rows[len(models) :] for row in those]


def _ends(on: Judgement, questions: Sequence[Question], token: str | None) -> list[int]:
    """The tokens that end an answer, the same for students and teachers."""
    tokenizer, found = on.text.tokenizer, dict[int, None]()
    for type in dict.fromkeys(question.type for question in questions):
        found |= dict.fromkeys(end_tokens(tokenizer, on.text.framings(type), on.text.learning))
        online = on.config.source(type).online
        end = None if online is None else load_tokenizer(online, token=token).eos_token_id
        found |= {} if end is None else {int(end): None}
    return list(found)


def tally(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many answers are right, of all and by type, with Wilson's interval of 95 %."""
    counts = {type: (one["answers_right"], one["answers"]) for type, one in count_right(rows).items()}
    right, total = (sum(one[place] for one in counts.values()) for place in (0, 1))
    return {
        "all": _with_interval(right, total),
        "by_type": {type: _with_interval(*one) for type, one in counts.items()},
    }


def _with_interval(right: int, total: int) -> dict[str, float]:
    low, high = wilson_interval(right, total)
    return {"right": right, "total": total, "low": low, "high": high}


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927; it holds near 0 and 1 too, where a normal one does not)."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
