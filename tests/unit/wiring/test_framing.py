"""What decides how the texts of a job are framed, in which order, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.support.tokenizers import tokenizers_of_all_kinds

from liquid_llm.checkpoint.resume import ResumeSource
from liquid_llm.config import Sources
from liquid_llm.errors import SignalError, UsageError
from liquid_llm.framing import Framing, Framings
from liquid_llm.models.tokenizers import begin_token_id, end_of_text_id, first_end_of_text_id
from liquid_llm.signal_store.description import read_store_file, write_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.sources import SourceConfig
from liquid_llm.wiring.framing import Speaker, choose_framings, framing_to_record, recorded_framing
from liquid_llm.wiring.start import Start

KINDS = tokenizers_of_all_kinds()
LLAMA, INSTRUCT, GPT2 = (Speaker(kind, KINDS[kind]) for kind in ("llama3", "llama3-instruct", "gpt2"))
END = end_of_text_id(LLAMA.tokenizer)
BEGIN = begin_token_id(LLAMA.tokenizer)
TURN = INSTRUCT.tokenizer.eos_token_id
WITH, WITHOUT = Framing(BEGIN, END), Framing(None, END)


def store(folder: Path, framing: Framing | None) -> str:
    """A store as capture begins one; None: as a release did that said nothing of framing."""
    around = (None, None) if framing is None else (framing.begin_id, framing.end_id)
    write_store_file(str(folder), SignalIdentity("t", "r", "h", 512, "tail", 1, {}, *around), "pt")
    return str(folder)


def sources(**teachers: str) -> Sources:
    return Sources({type: SourceConfig(spec) for type, spec in teachers.items()})


def choose(mode: str = "auto", own: Speaker = LLAMA, recorded: Framings | None = None, **teachers: str) -> Framings:
    speakers = {"base": LLAMA, "instruct": INSTRUCT, "gpt2": GPT2}
    asked = {spec.partition(":")[2] for spec in teachers.values()}
    return choose_framings(mode, sources(**teachers), {m: s for m, s in speakers.items() if m in asked}, own, recorded)


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_as_its_teachers_tokenizer_says_else_with_the_end_of_text(kind: str, mode: str) -> None:
    own = Speaker(kind, KINDS[kind])
    found, end = begin_token_id(own.tokenizer), end_of_text_id(own.tokenizer)
    assert choose(mode, own) == Framings(Framing(end if found is None else found, end))
    assert choose("never", own) == Framings(Framing(None, end))


def test_siblings_of_one_run_share_the_end_of_documents(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = choose(own=INSTRUCT, lm="online:base", math_tool="online:instruct")
    assert chosen("lm") == chosen("math_tool") == chosen("anything") == WITH
    assert "'<|begin_of_text|>' (512) before each, '<|end_of_text|>' (0) behind" in caplog.text
    assert "the tokenizer of llama3 puts it there" in caplog.text


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_store_from_before_framing_was_said_serves_runs_without_a_begin(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = store(tmp_path, None)
    with caplog.at_level(logging.INFO):
        chosen = choose(mode, lm="online:base", math_tool=f"store:{old}")
    assert chosen("math_tool") == WITHOUT
    assert chosen("lm") == (WITH if mode == "auto" else WITHOUT)
    assert chosen.student == chosen("lm")
    assert (
        f"texts of math_tool: nothing before each, '<|end_of_text|>' (0) behind (as the texts of {old}" in caplog.text
    )


@pytest.mark.parametrize("framing", [WITH, WITHOUT, Framing(BEGIN, TURN)])
def test_auto_follows_a_store_and_its_end_is_that_of_all(tmp_path: Path, framing: Framing) -> None:
    chosen = choose(lm="online:base", math_tool=f"store:{store(tmp_path, framing)}", code="none")
    assert chosen("math_tool") == framing
    assert chosen("lm") == chosen("code") == chosen("other") == Framing(BEGIN, framing.end_id)


def test_an_old_store_of_an_instruct_teacher_keeps_the_end_it_was_captured_with(tmp_path: Path) -> None:
    assert first_end_of_text_id(INSTRUCT.tokenizer) == TURN
    assert choose(own=INSTRUCT, math_tool=f"store:{store(tmp_path, None)}")("math_tool") == Framing(None, TURN)


@pytest.mark.parametrize(("mode", "framing"), [("always", WITHOUT), ("always", None), ("never", WITH)])
def test_a_store_of_another_framing_than_asked_for_is_refused(
    tmp_path: Path, mode: str, framing: Framing | None
) -> None:
    with pytest.raises(SignalError) as caught:
        choose(mode, math_tool=f"store:{store(tmp_path, framing)}")
    said = str(caught.value)
    assert f"{tmp_path}: the texts of this store are framed otherwise than --begin_token={mode} asks for" in said
    assert "nothing before each" in said
    assert "'<|begin_of_text|>' (512) before each" in said
    assert "eave --begin_token out" in said


def test_stores_that_end_their_texts_differently_are_refused(tmp_path: Path) -> None:
    maths, code = store(tmp_path / "maths", WITH), store(tmp_path / "code", Framing(BEGIN, TURN))
    with pytest.raises(SignalError) as caught:
        choose(math_tool=f"store:{maths}", code=f"store:{code}")
    assert f"'<|end_of_text|>' (0) in {maths}" in str(caught.value)
    assert f"'<|eot_id|>' ({TURN}) in {code}" in str(caught.value)


def test_stores_that_begin_their_texts_differently_serve_one_run(tmp_path: Path) -> None:
    maths, code = store(tmp_path / "maths", WITH), store(tmp_path / "code", None)
    chosen = choose(math_tool=f"store:{maths}", code=f"store:{code}")
    assert (chosen("math_tool"), chosen("code"), chosen.student) == (WITH, WITHOUT, WITH)


def test_a_store_that_is_not_there_yet_is_captured_as_its_teacher_expects(tmp_path: Path) -> None:
    there, new = store(tmp_path / "there", None), str(tmp_path / "new")
    chosen = choose(math_tool=f"store:{new}", code=f"store:{there}")
    assert (chosen("math_tool"), chosen("code")) == (WITH, WITHOUT)
    assert framing_to_record(new, chosen("math_tool")) == WITH
    assert framing_to_record(there, chosen("code")) is None  # it goes on without a word, as it was begun
    assert read_store_file(there).identity.framing is None


# ---------------------------------------------------------------------------------------------------- what goes on


class Metadata:
    def __init__(self, **run: object) -> None:
        self.run = run


def goes_on(**run: object) -> Start:
    return Start("continue", ResumeSource({}, "checkpoint", metadata=Metadata(**run), state={}))  # type: ignore[arg-type]


@pytest.mark.parametrize("framings", [Framings(WITH, {"code": WITHOUT}), Framings(WITHOUT, {"lm": WITHOUT})])
def test_what_goes_on_is_framed_as_its_checkpoint_says(framings: Framings) -> None:
    recorded = recorded_framing(goes_on(framing=framings.plain()), sources(), LLAMA.tokenizer)
    assert recorded == framings
    chosen = choose(recorded=recorded, lm="online:base", code="online:base")
    assert all(chosen(type) == framings(type) for type in ("lm", "code", "other"))


def test_a_checkpoint_from_before_framing_was_said_goes_on_without_a_begin(tmp_path: Path) -> None:
    named = {"lm": "online:instruct", "math_tool": f"store:{store(tmp_path, None)}"}
    recorded = recorded_framing(goes_on(), sources(**named), INSTRUCT.tokenizer)
    assert choose(own=INSTRUCT, recorded=recorded, **named) == Framings(
        Framing(None, TURN), dict.fromkeys(named, Framing(None, TURN))
    )


def test_a_start_that_does_not_go_on_records_nothing() -> None:
    weights = ResumeSource({}, "weights", metadata=Metadata(framing=Framings(WITHOUT).plain()))  # type: ignore[arg-type]
    assert recorded_framing(Start("resume", weights), sources(), LLAMA.tokenizer) is None


@pytest.mark.parametrize(("mode", "framing"), [("always", WITHOUT), ("never", WITH)])
def test_a_run_that_goes_on_is_not_framed_anew(mode: str, framing: Framing) -> None:
    with pytest.raises(UsageError, match=rf"--begin_token={mode}: the run goes on from a checkpoint"):
        choose(mode, recorded=Framings(framing))


def test_a_store_captured_anew_under_a_run_that_goes_on_is_refused(tmp_path: Path) -> None:
    named = {"math_tool": f"store:{store(tmp_path, WITH)}"}
    for run in ({}, {"framing": Framings(WITHOUT, {"math_tool": WITHOUT}).plain()}):
        recorded = recorded_framing(goes_on(**run), sources(**named), LLAMA.tokenizer)
        with pytest.raises(SignalError, match="framed otherwise than the run's checkpoint has"):
            choose(recorded=recorded, **named)
