"""What the demo's students are worth: held-out text, word problems answered and marked, samples, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from liquid_llm.answers import Question, answer_questions, decode, end_tokens
from liquid_llm.data.learning import Encoded, Encoder, Learning
from liquid_llm.data.records import read_records
from liquid_llm.demo.data import DemoData
from liquid_llm.evaluation import Evaluation
from liquid_llm.generation import generate, repeated_share
from liquid_llm.jobs.evaluate import evaluate_students
from liquid_llm.study.results import ALL, pair_evaluations
from liquid_llm.study.verdict import Verdict, compare
from liquid_llm.wiring.opening import open_student
from liquid_llm.wiring.templates import find_chat_template
from liquid_llm.wiring.tokenizers import TextTools

BEFORE, PLAIN, DISTILLED, TEACHER = "before", "plain", "distilled", "teacher"
CHATS = ("A baker has 3 trays with 4 rolls on each tray. How many rolls does the baker have in total?",)
TEXTS = ("The for statement is used to", "A class definition is", "An object is", "def read_lines(path):")
_SAMPLE_TOKENS, _ANSWER_TOKENS = 64, 40
_OPENINGS, _OPENING_TOKENS = (
    20,
    16,
)  # held-out texts whose beginnings are gone on with: a handful of prompts says little
_BATCH = 32
_COMPARED = {"ce", "kl", "agreement", "answers"}


def judge_students(
    students: Mapping[str, str], teacher: str, data: DemoData, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that is said of the students at the end, as plain values.

    Args:
        students: ``before``, ``plain`` and ``distilled``, each a run or a folder.
        options: of ``liquid evaluate``.

    Raises:
        LiquidError: any problem a user can cause.
    """
    records = ",".join(f"{type}={path}" for type, path in data.held_out.items())
    given = {**options, "records": records, "teacher": teacher}
    found = dict(zip(students, evaluate_students(list(students.values()), given), strict=True))
    text = _text_tools(students[DISTILLED])
    spoken = {name: speak(place, data, text) for name, place in {**students, TEACHER: teacher}.items()}
    rows = {name: {**_figures(one), **spoken[name].figures} for name, one in found.items()}
    rows[TEACHER] = {**_teacher_figures(found[DISTILLED]), **spoken[TEACHER].figures}
    answers = spoken[DISTILLED].answers, spoken[PLAIN].answers
    verdicts = compare_students(found[DISTILLED], found[PLAIN], answers)
    return {
        "rows": [{"student": name, **row} for name, row in rows.items()],
        "verdicts": [one.as_dict() for one in verdicts],
        "samples": [{"student": name, **row} for name, one in spoken.items() for row in one.samples],
        "answers": [{"student": name, **row} for name, one in spoken.items() for row in one.answers],
    }


def _text_tools(run: str) -> TextTools:
    """The tokenizer of a run as its student was trained with it, chat template included."""
    text = open_student(run).text
    assert text is not None  # it is a run
    return replace(text, learning=Learning(chat_template=find_chat_template(None, text.tokenizer)))


@dataclass(frozen=True)
class Speech:
    """What one model says: marked answers, what it goes on with after fixed prompts, and how much it repeats itself.

    ``repeated`` has the share of repeated 4-grams of each continuation, of the prompts and of held-out texts' openings.
    """

    answers: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    repeated: Sequence[float]

    @property
    def figures(self) -> dict[str, float]:
        """Answers that are right, of how many, and the mean share of repeated 4-grams, of how many continuations."""
        return {
            "answers_right": sum(row["right"] for row in self.answers),
            "answers": len(self.answers),
            "repeated_4grams": float(np.mean(self.repeated)),
            "continuations": len(self.repeated),
        }


def speak(place: str, data: DemoData, text: TextTools) -> Speech:
    """Let a model answer the questions and go on with prompts and openings; raises as ``open_student``."""
    model = open_student(place).model
    framing = text.framings.student
    ends = end_tokens(text.tokenizer, framing, text.learning)
    told: dict[str, Any] = {"end_ids": ends, "batch_size": _BATCH}
    records = list(read_records(data.questions, "math_tool"))
    prompts = _encode([_ask(one.prompt or "", text) for one in records], text)
    asked = [
        Question(one.type, one.sample_id, tuple(ids), one.prompt or "", one.text)
        for one, ids in zip(records, prompts, strict=True)
    ]
    answers = answer_questions(model, text.tokenizer, asked, max_new_tokens=_ANSWER_TOKENS, **told)
    prompts = _encode([*(_ask(one, text) for one in CHATS), *TEXTS], text)
    said = generate(model, [*prompts, *_openings(data, text)], max_new_tokens=_SAMPLE_TOKENS, **told)
    repeated = [repeated_share(ids) for ids in said]
    samples = [
        {"prompt": prompt, "text": decode(text.tokenizer, ids), "repeated_4grams": share}
        for prompt, ids, share in zip([*CHATS, *TEXTS], said, repeated, strict=False)  # the openings come after them
    ]
    return Speech(answers, samples, repeated)


def _openings(data: DemoData, text: TextTools) -> list[list[int]]:
    """How the first held-out texts begin, in tokens."""
    texts = [one.text for one in islice(read_records(data.held_out["lm"], "lm"), _OPENINGS)]
    return [ids[:_OPENING_TOKENS] for ids in _encode(texts, text)]


def _ask(question: str, text: TextTools) -> str:
    """A question as the chat template puts it to a model."""
    return Encoder(text.tokenizer, text.learning).ask([{"role": "user", "content": question}])


def _encode(prompts: Sequence[str], text: TextTools) -> list[list[int]]:
    encoded = Encoder(text.tokenizer, text.learning).encode([[(prompt, False)] for prompt in prompts])
    return [text.framings.student.open(one.input_ids) for one in encoded if isinstance(one, Encoded)]


def compare_students(
    arm: Evaluation, baseline: Evaluation, answers: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
) -> list[Verdict]:
    """Cross-entropy, KL and agreement of two students on the same texts, and their answers to the same questions.

    Raises:
        DataError: they were evaluated on different texts.
    """
    first, second = ({"texts": one.texts, "answers": rows} for one, rows in zip((arm, baseline), answers, strict=True))
    paired = pair_evaluations([(first, second)], f"{arm.student} and {baseline.student}", [])
    return [compare(*sums, measure) for type, measure, sums in paired if type == ALL and measure.key in _COMPARED]


def _figures(one: Evaluation) -> dict[str, Any]:
    every = one.measures["all"]
    by_type = {type: {key: row[key]["value"] for key in ("ce", "kl")} for type, row in one.measures["by_type"].items()}
    return {**{key: every[key]["value"] for key in ("ce", "kl", "agreement")}, "by_type": by_type}


def _teacher_figures(one: Evaluation) -> dict[str, Any]:
    by_type = {type: {"ce": row["teacher_ce"]["value"], "kl": 0.0} for type, row in one.measures["by_type"].items()}
    return {"ce": one.measures["all"]["teacher_ce"]["value"], "kl": 0.0, "agreement": 1.0, "by_type": by_type}
