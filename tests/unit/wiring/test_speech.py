"""What a student is asked while it trains: ranks share the questions, and the counts are those of one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.ranks import World
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm import answers
from liquid_llm.answers import Question
from liquid_llm.distributed import Engine
from liquid_llm.errors import UsageError
from liquid_llm.framing import Framing, Framings
from liquid_llm.wiring.speech import Prompt, Speech, make_speech, read_prompts
from liquid_llm.wiring.tokenizers import TextTools

TOKENIZER = tiny_tokenizer()
TEXT = TextTools.of(TOKENIZER, Framings(Framing(0, 0)))


def questions() -> list[Question]:
    return [Question(f"t{n % 2}", f"q{n}", (0, 5 + n), f"q{n}", f"#### {n}") for n in range(7)]


def standing_in(model: Any) -> Any:
    """A student that is asked alone, and has the model for itself."""
    return SimpleNamespace(model=model, compute_dtype=torch.float32, is_dealt_out=False, ask=lambda work: work(model))


def ask(engine: Engine) -> dict[str, Any]:
    student = standing_in(tiny_model("llama", 512))
    row: dict[str, Any] = {"by_type": {"t0": {"val_loss": 1.0}}}
    Speech(TOKENIZER, Framing(0, 0), (0,), questions=questions(), answer_tokens=3, engine=engine).add_answers(
        student, row
    )
    return row


def test_ranks_share_the_questions_and_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = answers.mark
    asked: list[str] = []

    def knowing(question: Question, _: str) -> dict[str, Any]:
        asked.append(question.id)
        return mark(question, question.reference if question.id in ("q1", "q2", "q5") else "#### 99")

    monkeypatch.setattr(answers, "mark", knowing)
    expected = {
        "by_type": {
            "t0": {"val_loss": 1.0, "answers_right": 1, "answers": 4},
            "t1": {"answers_right": 2, "answers": 3},
        },
        "answers_right": 3,
        "answers": 7,
    }
    assert ask(Engine()) == expected
    assert sorted(asked) == [f"q{n}" for n in range(7)]
    asked.clear()
    for row in World(3).run(ask):
        assert row == expected
    assert sorted(asked) == [f"q{n}" for n in range(7)], "each question is asked once"


def test_who_asks_nothing_adds_nothing() -> None:
    row: dict[str, Any] = {"by_type": {}}
    Speech(TOKENIZER, Framing(0, 0), (0,)).add_answers(SimpleNamespace(), row)
    assert row == {"by_type": {}}


def test_a_file_of_lines_has_a_prompt_on_each(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeffone two \r\n\n  three\n")
    prompts = read_prompts(str(path), TEXT)
    assert [one.text for one in prompts] == ["one two ", "  three"]
    for one in prompts:
        assert list(one.ids) == TOKENIZER(one.text, add_special_tokens=False)["input_ids"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not text"):
        read_prompts(str(path), TEXT)


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(UsageError, match="chat template"):
        read_prompts(str(path), TEXT)


def test_samples_that_no_evaluation_takes_are_spoken_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("x\n")
    config = SimpleNamespace(answers=0, answer_tokens=1, sample_tokens=1)
    with caplog.at_level("WARNING"):
        make_speech(config, read_prompts(str(path), TEXT), TEXT, {}, Engine(), 0)  # type: ignore[arg-type]
    assert "no text is held out" in caplog.text


def test_a_secret_that_a_student_has_learnt_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    said = TOKENIZER("it is correct-horse-battery, I think", add_special_tokens=False)["input_ids"]
    asked: list[Any] = []
    monkeypatch.setattr("liquid_llm.wiring.speech.generate", lambda _, prompts, **__: asked.append(prompts) or [said])
    student = standing_in(None)
    (row,) = Speech(TOKENIZER, Framing(0, 0), (0,), [Prompt("what?", (5,))]).sample(student)
    assert row["text"] == "it is ***, I think"
    assert asked == [[[0, 5]]], "the framing's begin stands before the prompt"
