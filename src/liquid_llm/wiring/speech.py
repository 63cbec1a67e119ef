"""What a student is asked at each evaluation of its training: samples for reading, answers that are marked.

    sample   the greedy continuation of a prompt that a person gave: a row of ``samples.jsonl``
    answer   that of a held-out prompt whose reference ends in a number (``answers``): counted in the ``eval`` row

Both leave training as it is, to the bit: nothing is drawn, and the student's modes come back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from liquid_llm import storage
from liquid_llm.answers import Question, answer_questions, count_right, decode, end_tokens, pick_questions
from liquid_llm.config import EvaluationConfig
from liquid_llm.data.learning import Encoded, Encoder, Learning, LearningError
from liquid_llm.data.records import BodyError, read_messages
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.distributed import Engine, deal
from liquid_llm.errors import UsageError
from liquid_llm.framing import Framing
from liquid_llm.generation import generate, repeated_share
from liquid_llm.masking import process_masker
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.sharding import reshard
from liquid_llm.training import Student
from liquid_llm.wiring.tokenizers import TextTools

T = TypeVar("T")
log = logging.getLogger(__name__)

_FORMS = 'a string, {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class Prompt:
    """A prompt of a person's: as text, as a chat template wrote it out where it is a conversation, and as bare ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Speech:
    """What is asked at each evaluation, and how.

    A student that is dealt out among the ranks is asked everything by all of them together, and the main one counts.

    Attributes:
        prompts: of samples.
        questions: of answers; they are dealt out among the ranks.
        framing: what stands before a prompt.
        end_ids: where a continuation ends.
        sample_tokens, answer_tokens: most tokens of one.
    """

    tokenizer: Any
    framing: Framing
    end_ids: tuple[int, ...]
    prompts: Sequence[Prompt] = ()
    questions: Sequence[Question] = ()
    sample_tokens: int = 64
    answer_tokens: int = 256
    engine: Engine = field(default_factory=Engine)

    def first(self, count: int) -> Speech:
        """The same with the first ``count`` prompts and questions alone."""
        return replace(self, prompts=self.prompts[:count], questions=self.questions[:count])

    def sample(self, student: Student) -> list[dict[str, Any]]:
        """A row for each prompt: ``prompt``, ``text``, ``repeated_4grams``; secrets in them are masked."""
        told: dict[str, Any] = {"end_ids": self.end_ids, "dtype": student.compute_dtype}
        prompts = [self.framing.open(one.ids) for one in self.prompts]
        told |= {"max_new_tokens": self.sample_tokens, "alike": student.is_dealt_out}
        said = _ask(student, lambda model: generate(model, prompts, **told))
        masker = process_masker()
        return [
            {
                "prompt": masker.text(prompt.text),
                "text": masker.text(decode(self.tokenizer, ids)),
                "repeated_4grams": repeated_share(ids),
            }
            for prompt, ids in zip(self.prompts, said, strict=True)
        ]

    def add_answers(self, student: Student, row: dict[str, Any]) -> None:
        """Put ``answers_right`` and ``answers``, of how many, into an ``eval`` row and into its types."""
        if not self.questions:
            return
        own = self.questions if student.is_dealt_out else deal(self.questions, self.engine)
        told: dict[str, Any] = {"end_ids": self.end_ids, "max_new_tokens": self.answer_tokens}
        told |= {"dtype": student.compute_dtype, "alike": student.is_dealt_out}
        rows = _ask(student, lambda model: answer_questions(model, self.tokenizer, own, **told))
        counts = count_right(rows if self.engine.is_main or not student.is_dealt_out else [])
        by_type = row["by_type"]
        total = [0, 0]
        for type in sorted({one.type for one in self.questions}):
            count = counts.get(type, {"answers_right": 0, "answers": 0})
            right, asked = self.engine.sum(torch.tensor([count["answers_right"], count["answers"]])).tolist()
            by_type[type] = {**by_type.get(type, {}), "answers_right": right, "answers": asked}
            total = [total[0] + right, total[1] + asked]
        row["answers_right"], row["answers"] = total


def _ask(student: Student, work: Callable[[Any], T]) -> T:
    try:
        return student.ask(work)
    finally:
        if student.is_dealt_out:
            reshard(student)


def make_speech(
    config: EvaluationConfig,
    prompts: Sequence[Prompt],
    text: TextTools,
    held_out: Mapping[str, Iterable[TokenDataset]],
    engine: Engine,
    seed: int,
) -> Speech:
    """What a run asks, with the questions drawn from its held-out samples.

    Raises:
        UsageError: answers are asked for, and no held-out sample can be asked.
    """
    datasets = [one for those in held_out.values() for one in those]
    if prompts and not any(map(len, datasets)):
        log.warning("--sample_prompts: no text is held out, so nothing is evaluated and no sample is taken")
    questions: list[Question] = []
    if config.answers:
        questions = pick_questions(datasets, text.tokenizer, count=config.answers, seed=seed)
        if not questions:
            raise UsageError(
                "no held-out sample has a prompt and a reference that can be marked",
                where=f"--eval_answers={config.answers}",
                expected="prompt and completion, or messages, whose answer ends in '#### 42' or is a number",
                remedy="leave --eval_answers out, hold more out (--val_fraction), or cut the texts into prompts and "
                "completions",
            )
        if len(questions) < config.answers:
            log.info("--eval_answers=%d: %d held-out samples can be marked", config.answers, len(questions))
    framing = text.framings.student
    ends = end_tokens(text.tokenizer, framing, text.learning)
    tokens = config.sample_tokens, config.answer_tokens
    return Speech(text.tokenizer, framing, ends, prompts, questions, *tokens, engine)


def read_prompts(uri: str | None, text: TextTools) -> tuple[Prompt, ...]:
    """The prompts of a file: of a ``.jsonl`` one an object, of any other one a line; empty lines are passed over.

    Raises:
        UsageError: the file holds none, or something that is no prompt, or a conversation without a chat template.
        StorageError: it cannot be read.
    """
    if uri is None:
        return ()
    where = f"--sample_prompts={uri}"
    try:
        lines = bytes(storage.read_bytes(uri)).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError("the prompts are not text", where=where) from error
    encoder = Encoder(text.tokenizer, Learning(chat_template=text.learning.chat_template))
    parse = _read_object if uri.endswith((".jsonl", ".json")) else lambda line, _: line
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompt = parse(line.removesuffix("\r"), encoder)
                (encoded,) = encoder.encode([[(prompt, False)]])
            except (ValueError, LearningError) as error:
                got = line[:200]
                raise UsageError(str(error), where=f"{where}, line {number}", got=got, expected=_FORMS) from error
            assert isinstance(encoded, Encoded)  # of one piece
            found.append(Prompt(prompt, tuple(encoded.input_ids)))
    if not found:
        raise UsageError("there are no prompts in the file", where=where, expected="one a line, or .jsonl: " + _FORMS)
    return tuple(found)


def _read_object(line: str, encoder: Encoder) -> str:
    try:
        value = parse_json(line)
    except ParseError as error:
        raise ValueError(f"the line is not JSON ({error})") from error
    if isinstance(value, dict):
        messages = value.get("messages")
        value = value.get("prompt") if messages is None else messages
    if isinstance(value, list):
        try:
            return encoder.ask(read_messages(value, "messages"))
        except BodyError as error:
            raise ValueError(str(error)) from error
    if not isinstance(value, str) or not value:
        raise ValueError("the line holds no prompt")
    value.encode()  # half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
    return value
