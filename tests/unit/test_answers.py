"""What is a question, what it is asked with, and when its answer is right."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer, tokenizer_with

from liquid_llm.answers import (
    answer_questions,
    count_right,
    decode,
    end_tokens,
    expected_number,
    is_right,
    mark,
    normal_form,
    pick_questions,
    read_questions,
    said_number,
)
from liquid_llm.data.learning import CHATML, Encoder, Learning
from liquid_llm.data.tokens import TokenDataset, build_token_dataset, is_held_out, split
from liquid_llm.data.types import TextRecord
from liquid_llm.framing import Framing
from liquid_llm.generation import generate
from liquid_llm.models.tokenizers import tokenizer_hash

CENTS = st.integers(-(10**9), 10**9)
# Words as models write them; none has a digit or a mark of its own.
WORDS = st.text(st.sampled_from("abc xyz,.:;!?()=*+-$\n"), max_size=30)


def write(cents: int, draw) -> str:
    """A value as people write it: signs, groups, ``$``, more or fewer decimals."""
    whole, rest = divmod(abs(cents), 100)
    digits = f"{whole:,}" if draw(st.booleans()) else "0" * draw(st.integers(0, 2)) + str(whole)
    decimals = draw(st.sampled_from([f".{rest:02d}", f".{rest:02d}00"] + ([] if rest else ["", ".0"])))
    sign = draw(st.sampled_from("-−")) if cents < 0 else draw(st.sampled_from(["", "+"]))
    money = draw(st.sampled_from(["", "$"]))
    number = f"{digits}{decimals}"
    return f"{money}{sign}{number}" if draw(st.booleans()) else f"{sign}{money}{number}"


@given(st.data(), CENTS, CENTS, WORDS, WORDS)
def test_an_answer_is_right_where_its_last_marked_number_has_the_references_value(data, value, other, before, behind):
    reference = f"{before}\n#### {write(value, data.draw)}"
    unit = data.draw(st.sampled_from(["", " dollars", ".", "\nQuestion: what", " 7", "%", ", 3"]))
    answer = f"#### {write(other, data.draw)}\n{behind}\n####{data.draw(st.sampled_from(['', ' ']))}"
    answer += write(value, data.draw) + unit
    assert is_right(answer, reference)
    assert Fraction(expected_number(reference)) == Fraction(value, 100)
    if other != value:
        assert not is_right(f"{answer}\n#### {write(other, data.draw)}", reference)


@given(st.data(), CENTS, WORDS)
def test_an_answer_without_a_marked_number_is_wrong(data, value, words):
    number = write(value, data.draw)
    for answer in (words, f"{words} {number}", f"### {number}", f"####\n{number}", f"#### it is {number}", ""):
        assert said_number(answer, f"#### {number}") is None
        assert not is_right(answer, f"so {number} it is\n#### {number}")


@given(st.data(), CENTS, CENTS, WORDS)
def test_to_a_bare_number_the_last_number_counts(data, value, other, words):
    assume(value != other)
    number = write(value, data.draw)
    for reference in (number, f" {number}.\n"):
        assert Fraction(expected_number(reference)) == Fraction(value, 100)
        assert is_right(f"{words} {write(other, data.draw)} and {number} {words}", reference)
        assert not is_right(f"{words} {number} and {write(other, data.draw)} {words}", reference)
        assert is_right(f"#### {number} {words} {write(other, data.draw)}", reference), "a mark is meant"
        assert not is_right(words, reference)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", "3"),
        ("10-3=7", "7"),
        ("it is -7", "-7"),
        ("(2)-1", "1"),
        ("= -$3.50.", "-3.5"),
        ("costs $1,234,567.00 now", "1234567"),
        ("in 3 weeks x2", "3"),
        ("at 10:30", "30"),
        ("a1 b", None),
        ("v1.2.3", None),
        ("none", None),
    ],
)
def test_the_last_number_of_plain_words(text, number):
    assert said_number(text, "5") == number


def test_what_cannot_be_marked_is_no_reference():
    for reference in ("", "no number", "I have 5", "5 apples", "#### none", "1/2", "#### 1/2", "#### 1,23,4", "5 6"):
        assert expected_number(reference) is None, reference
        with pytest.raises(ValueError, match="cannot be marked"):
            is_right("#### 5", reference)


def test_a_model_that_repeats_a_digit_is_marked_like_any_other():
    assert not is_right("#### 1" + "9" * 100_000, "#### 19")
    assert is_right("#### 0005.000", "#### 5")
    assert normal_form("-0.00") == "0"


# ------------------------------------------------------------------------------------------------------------ choosing


BEGIN, END = 0, 0
FRAMING = Framing(BEGIN, END)


def problem(number: int) -> TextRecord:
    return TextRecord(
        f" {number}+1=<<{number}+1={number + 1}>>\n#### {number + 1}", "maths", f"p{number}", f"Q{number}?"
    )


def test_a_prompt_is_the_very_ids_that_a_sample_is_learnt_with(tmp_path):
    tokenizer = tiny_tokenizer()
    records = [problem(1), TextRecord("Q: 5\n#### 5", "maths", "whole"), TextRecord(" word", "maths", "none", "Q?")]
    records += [TextRecord("#### 3", "maths", "no prompt", "")]
    (question,) = read_questions(records, tokenizer, FRAMING)
    assert (question.type, question.id, question.prompt) == ("maths", "p1", "Q1?")
    assert question.reference == records[0].text
    (encoded,) = Encoder(tokenizer, Learning()).encode([Encoder(tokenizer, Learning()).pieces(records[0])])
    asked = [BEGIN, *(one for one, learnt in zip(*encoded, strict=True) if not learnt)]
    assert list(question.prompt_ids) == asked
    assert FRAMING.wrap(encoded.input_ids)[: len(asked)] == asked
    (bare,) = read_questions(records, tokenizer, Framing(None, END))
    assert list(bare.prompt_ids) == asked[1:]


def test_a_conversation_is_asked_for_its_last_turn_through_the_template():
    tokenizer = tokenizer_with(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|endoftext|>")
    turns = [
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "#### 2"),
        ("user", "2+2?"),
        ("assistant", "#### 4"),
    ]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    record = TextRecord("", "chat", "c", messages=messages)
    learning = Learning(chat_template=CHATML)
    (question,) = read_questions([record], tokenizer, FRAMING, learning)
    asked = tokenizer.apply_chat_template(
        list(messages[:-1]), chat_template=CHATML, add_generation_prompt=True, tokenize=False
    )
    assert question.prompt == asked
    assert asked.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert expected_number(question.reference) == "4"
    assert "im_end" not in question.reference
    assert end_tokens(tokenizer, FRAMING, learning) == (END, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert end_tokens(tokenizer, FRAMING) == (END,)
    unanswered = TextRecord("", "chat", "u", messages=messages[:-1])
    assert [one.prompt for one in read_questions([unanswered], tokenizer, FRAMING, learning)] == [
        tokenizer.apply_chat_template(
            list(messages[:2]), chat_template=CHATML, add_generation_prompt=True, tokenize=False
        )
    ], "the last thing that the assistant says"


def held_out(folder: Path, records: list[TextRecord], layout: str = "samples", type: str = "maths") -> TokenDataset:
    rows = [{"prompt": one.prompt, "completion": one.text, "sample_id": one.sample_id} for one in records]
    path = folder / "part.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    hashed = tokenizer_hash(tokenizer)
    made = build_token_dataset([str(path)], type, tokenizer, hashed, folder / "c", framing=FRAMING, layout=layout)
    return split(made, 0.5)[1]


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_questions_are_drawn_by_the_seed_alone(tmp_path, layout):
    tokenizer = tiny_tokenizer()
    records = [problem(number) for number in range(40)] + [TextRecord(" no", "maths", "n", "Q?")]
    data = held_out(tmp_path, records, layout)
    every = pick_questions([data], tokenizer, count=100, seed=0)
    told = {record.sample_id: record for record in records if is_held_out(record.sample_id, 0.5)}
    assert {one.id for one in every} == told.keys() - {"n"}
    asked = {one.id: one for one in read_questions(told.values(), tokenizer, FRAMING)}
    assert {one.id: one for one in every} == asked, "tokens that are kept ask what the records ask"
    few = pick_questions([data], tokenizer, count=5, seed=0)
    assert few == every[:5]
    backwards = data.subset(np.arange(len(data))[::-1])
    assert pick_questions([backwards, data], tokenizer, count=5, seed=0) == few, "neither order nor twice matters"
    assert {one.id for one in pick_questions([data], tokenizer, count=5, seed=1)} != {one.id for one in few}


def test_two_types_may_use_the_same_names(tmp_path):
    records = [problem(number) for number in range(10)]
    both = [held_out(tmp_path, records, type=type) for type in ("maths", "other")]
    found = pick_questions(both, tiny_tokenizer(), count=100, seed=0)
    names = {record.sample_id for record in records if is_held_out(record.sample_id, 0.5)}
    assert {(one.type, one.id) for one in found} == {(type, name) for type in ("maths", "other") for name in names}


def test_plain_text_asks_nothing(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Q: 5\\n#### 5"}\n')
    tokenizer = tiny_tokenizer()
    text = build_token_dataset([str(tmp_path / "t.jsonl")], "lm", tokenizer, "h", tmp_path / "c", framing=FRAMING)
    assert pick_questions([text], tokenizer, count=3, seed=0) == []


# ----------------------------------------------------------------------------------------------------------- answering


def test_answers_are_what_the_model_generates_marked():
    tokenizer, model = tiny_tokenizer(), tiny_model("lfm2", 512, seed=3)
    questions = list(read_questions([problem(number) for number in range(5)], tokenizer, FRAMING))
    rows = answer_questions(model, tokenizer, questions, end_ids=[END], max_new_tokens=7, batch_size=2)
    said = generate(model, [one.prompt_ids for one in questions], end_ids=[END], max_new_tokens=7)
    assert [row["answer"] for row in rows] == [decode(tokenizer, ids) for ids in said]
    assert [row["prompt"] for row in rows] == [f"Q{number}?" for number in range(5)]
    assert [row["expected"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert not any(row["right"] for row in rows)
    json.dumps(rows)


def test_right_answers_are_counted_by_type():
    tokenizer = tiny_tokenizer()
    questions = list(read_questions([problem(1), problem(2)], tokenizer, FRAMING))
    rows = [mark(one, text) for one, text in zip(questions, ["so\n#### 2", "#### 2"], strict=True)]
    assert [row["right"] for row in rows] == [True, False]
    assert [row["said"] for row in rows] == ["2", "2"]
    assert count_right([*rows, {"type": "other", "right": True}]) == {
        "maths": {"answers_right": 1, "answers": 2},
        "other": {"answers_right": 1, "answers": 1},
    }
