"""Answers generated and marked: what a model says to held-out prompts whose reference ends in a number.

    reference   what the data answers; it can be marked where it holds ``#### n`` (GSM8K, Cobbe et al. 2021, arXiv
                2110.14168; the last one counts), or is nothing but a number
    number      digits, perhaps in groups parted by commas, with decimals, a sign and ``$``; two are equal where their
                values are: ``#### $1,200.50`` is ``1200.5``. What stands behind it (a unit, a full stop) is left alone
    question    a prompt and its reference, as token ids and as text

An answer is right where its last ``#### n`` is the reference's number; one without is wrong, whatever else it says. A
reference that is a bare number has taught no ``####``: of an answer to it without one, the last number counts.

    model, tokenizer = …; questions = pick_questions(held_out, tokenizer, count=100, seed=0)
    rows = answer_questions(model, tokenizer, questions, end_ids=end_tokens(tokenizer, framing))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from liquid_llm.data.learning import USUAL, Encoded, Encoder, Learning
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.types import Sample, TextRecord
from liquid_llm.framing import Framing
from liquid_llm.generation import generate

MAX_NEW_TOKENS = 256  # GSM8K's answers have about 130, at most some 300

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DIGITS = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?![,./:^]?[0-9])"  # not the half of a fraction, a date or a time
_SIGNS = "[-+\N{MINUS SIGN}]"
_NUMBER = rf"(?:{_SIGNS}?\$? ?|\$ ?{_SIGNS}){_DIGITS}"
_MARKED = re.compile(rf"####[ \t]*({_NUMBER})")
_ALONE = re.compile(rf"\s*({_NUMBER})\.?\s*")
# Inside a text a sign behind a digit or a bracket is a minus between two, and digits of a word are no number.
_ANYWHERE = re.compile(rf"((?:(?<![\w)]){_SIGNS})?(?:\$ ?)?(?<![\w.]){_DIGITS})(?!\w)")


@dataclass(frozen=True)
class Question:
    """A prompt whose answer can be marked.

    Attributes:
        type, id: of its sample.
        prompt_ids: what a model is asked with, the framing's beginning included.
        prompt: the same as text.
        reference: what the data answers.
    """

    type: str
    id: str
    prompt_ids: tuple[int, ...]
    prompt: str
    reference: str


# ------------------------------------------------------------------------------------------------------------- marking


def expected_number(reference: str) -> str | None:
    """The number that an answer must have, in its normal form; None where ``reference`` cannot be marked."""
    marked = _MARKED.findall(reference)
    if marked:
        return normal_form(marked[-1])
    alone = _ALONE.fullmatch(reference)
    return None if alone is None else normal_form(alone[1])


def said_number(answer: str, reference: str) -> str | None:
    """The number that ``answer`` gives, in its normal form; None where it gives none."""
    marked = _MARKED.findall(answer)
    if not marked and _MARKED.search(reference) is None:
        marked = _ANYWHERE.findall(answer)
    return normal_form(marked[-1]) if marked else None


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer has exactly the number of a reference that can be marked.

    Raises:
        ValueError: ``reference`` has no number.
    """
    expected = expected_number(reference)
    if expected is None:
        raise ValueError(f"this reference cannot be marked: {reference[:80]!r}")
    return said_number(answer, reference) == expected


def normal_form(number: str) -> str:
    """One way to write a value: ``-$1,200.50`` is ``-1200.5``, ``.50`` is ``0.5``, ``-0`` is ``0``.

    Digits are compared, never turned into a number: a model may repeat one for as long as it is let.
    """
    plain = re.sub(r"[$, +]", "", number).replace("\N{MINUS SIGN}", "-")
    whole, _, decimals = plain.lstrip("-").partition(".")
    value = (whole.lstrip("0") or "0") + f".{decimals}".rstrip("0").rstrip(".")
    return f"-{value}" if plain.startswith("-") and value != "0" else value


# ------------------------------------------------------------------------------------------------------------ choosing


def pick_questions(datasets: Iterable[TokenDataset], tokenizer: Any, *, count: int, seed: int) -> list[Question]:
    """``count`` questions out of held-out samples, or all where there are fewer; the same for the same seed.

    The samples' places are drawn by a hash of seed, type and id, so that neither their order nor others matter. A
    sample of which all is learnt (plain text, or ``--learn=all``) has no prompt.
    """
    datasets = [one for one in datasets if one.learnt is not None]
    places = [(one, index) for one in datasets for index in range(len(one))]
    found: dict[tuple[str, str], Question] = {}
    for one, index in sorted(places, key=lambda place: _rank(seed, place[0].type, place[0].sample_id(place[1]))):
        if len(found) == count:
            break
        question = read_question(one.sample(index), tokenizer, one.framing)
        if question is not None:
            found.setdefault((question.type, question.id), question)
    return list(found.values())


def read_questions(
    records: Iterable[TextRecord], tokenizer: Any, framing: Framing, learning: Learning = USUAL
) -> Iterator[Question]:
    """The questions among ``records``, in order: those with a prompt, or messages, and a reference with a number.

    Raises:
        LearningError: a conversation that cannot be written out; its template is ``learning``'s.
    """
    encoder = Encoder(tokenizer, Learning(chat_template=learning.chat_template))
    for record in records:
        (encoded,) = encoder.encode([encoder.pieces(record)])
        if not isinstance(encoded, Encoded):
            raise encoded
        if encoded.learnt is not None:
            ids, learnt = np.array(encoded.input_ids, np.int32), np.array(encoded.learnt, bool)
            question = read_question(Sample(record.sample_id, record.type, ids, learnt), tokenizer, framing)
            if question is not None:
                yield question


def read_question(sample: Sample, tokenizer: Any, framing: Framing) -> Question | None:
    """A sample's last learnt run of tokens as a reference, and what comes before it as the prompt.

    These are the very ids that the sample is learnt with: of a conversation all up to where the assistant's last turn
    opens, as the chat template wrote it. None where it has no prompt, or no reference that can be marked.
    """
    if sample.learnt is None or not sample.learnt.any():
        return None
    learnt = np.flatnonzero(sample.learnt)
    gaps = np.flatnonzero(np.diff(learnt) > 1)
    start, stop = int(learnt[gaps[-1] + 1] if len(gaps) else learnt[0]), int(learnt[-1]) + 1
    ids = sample.input_ids.tolist()
    prompt_ids = framing.open(ids[:start])
    inner = prompt_ids[framing.begin_id is not None :]
    behind = ids[start : stop - 1] if ids[stop - 1] == framing.end_id else ids[start:stop]
    reference = decode(tokenizer, behind)
    if not inner or expected_number(reference) is None:
        return None
    prompt = decode(tokenizer, inner, skip_special_tokens=False)
    return Question(sample.type, sample.sample_id, tuple(prompt_ids), prompt, reference)


def end_tokens(tokenizer: Any, framing: Framing, learning: Learning = USUAL) -> tuple[int, ...]:
    """Where an answer ends: the framing's end, the tokenizer's own, the end of a turn of the chat template."""
    turn = None if learning.chat_template is None else Encoder(tokenizer, learning).end_of_turn()
    ends = (framing.end_id, tokenizer.eos_token_id, turn)
    return tuple(dict.fromkeys(one for one in ends if one is not None))


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Token ids as text, blanks as they are."""
    told = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **told))


def _rank(seed: int, type: str, sample_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{type}\0{sample_id}".encode(), digest_size=16).digest()


# ----------------------------------------------------------------------------------------------------------- answering


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    alike: bool = False,
) -> list[dict[str, Any]]:
    """A model's greedy answers, marked; see ``generate`` for the arguments and errors.

    Returns:
        In the order of ``questions``, plain values: ``type``, ``id``, ``prompt`` (text), ``expected`` (the reference's
        number), ``answer`` (text), ``said`` (the answer's number, or None) and ``right``.
    """
    prompts = [one.prompt_ids for one in questions]
    told: dict[str, Any] = {"end_ids": end_ids, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    texts = [decode(tokenizer, ids) for ids in generate(model, prompts, dtype=dtype, alike=alike, **told)]
    return [mark(question, text) for question, text in zip(questions, texts, strict=True)]


def mark(question: Question, answer: str) -> dict[str, Any]:
    """The row of one answer; see ``answer_questions``."""
    expected, said = expected_number(question.reference), said_number(answer, question.reference)
    about = {"type": question.type, "id": question.id, "prompt": question.prompt}
    return {**about, "expected": expected, "answer": answer, "said": said, "right": said == expected}


def count_right(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many answers of each type are right: ``{type: {"answers_right": …, "answers": …}}``."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        count = counts.setdefault(row["type"], {"answers_right": 0, "answers": 0})
        count["answers_right"] += bool(row["right"])
        count["answers"] += 1
    return counts
