"""What ``options.yaml`` says of a job whose command said less: the same framing, and places known from everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tokenizers import tokenizers_of_all_kinds

from liquid_llm.config import Sources
from liquid_llm.framing import Framing, Framings
from liquid_llm.models.tokenizers import begin_token_id, end_of_text_id
from liquid_llm.signal_store.description import write_store_file
from liquid_llm.signal_store.records import SignalIdentity
from liquid_llm.sources import SourceConfig
from liquid_llm.wiring.framing import Speaker, choose_framings
from liquid_llm.wiring.repeat import begin_choice, options_to_repeat

OWN = Speaker("llama3", tokenizers_of_all_kinds()["llama3"])
BEGIN, END = begin_token_id(OWN.tokenizer), end_of_text_id(OWN.tokenizer)
BEGINS = {"old": None, "never": None, "own": BEGIN, "end": END}  # store -> what it begins texts with
ORIGINS = {"fresh": None, "an old run": Framings(Framing(None, END), dict.fromkeys(("lm", "code"), Framing(None, END)))}


def sources(folder: Path, **stores: str) -> Sources:
    """Each type's store, and any other text taught by another teacher; empty: a type that is named and has no store."""
    for name in filter(None, stores.values()):
        around = (None, None) if name == "old" else (BEGINS[name], END)
        write_store_file(str(folder / name), SignalIdentity("t", "r", "h", 512, "tail", 1, {}, *around), "pt")
    specs = {type: f"store:{folder / name}" if name else "online:llama3" for type, name in stores.items()}
    return Sources({type: SourceConfig(spec) for type, spec in specs.items()}, "online:llama3")


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    ("stores", "said"),
    [
        ({}, "always"),
        ({"math_tool": "own", "lm": ""}, "always"),
        ({"math_tool": "old"}, None),
        ({"math_tool": "old", "code": "never"}, None),
        ({"math_tool": "end"}, None),
        ({"math_tool": "own", "code": "old"}, None),
    ],
)
def test_a_run_again_frames_all_texts_as_it_did(
    stores: dict[str, str], said: str | None, origin: str, tmp_path: Path
) -> None:
    """Afresh, and over the directory where it ran; so does what goes on from a run of before texts had a begin."""
    source, recorded = sources(tmp_path, **stores), ORIGINS[origin]
    if recorded is not None:
        stores = {type: name for type, name in stores.items() if BEGINS.get(name) is None}
        source, said = sources(tmp_path, **stores), "never"
    chosen = choose_framings("auto", source, {"llama3": OWN}, OWN, recorded)
    written = {name: choice.value for name, choice in begin_choice(chosen).items()}
    assert written == ({} if said is None else {"begin_token": said})
    mode = written.get("begin_token", "auto")
    for known in (None, chosen):
        assert choose_framings(mode, source, {"llama3": OWN}, OWN, known) == chosen


@pytest.mark.parametrize(("name", "said"), [("old", "never"), ("own", "always"), ("end", None)])
def test_a_capture_that_went_on_with_a_store_says_how_that_is_framed(
    name: str, said: str | None, tmp_path: Path
) -> None:
    """Into another folder, ``auto`` would frame otherwise than an old store; that nothing else is read is no matter."""
    chosen = choose_framings("auto", sources(tmp_path, math_tool=name, code=""), {}, OWN)
    assert [choice.value for choice in begin_choice(chosen, ["math_tool"]).values()] == ([said] if said else [])


def test_a_chat_template_is_a_file_a_word_or_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chat.jinja", "chatml"):
        Path(name).write_text("{{ messages }}")
    for given, kept in {
        "chat.jinja": str(tmp_path / "chat.jinja"),
        "chatml": "chatml",
        "org/model": "org/model",
    }.items():
        assert options_to_repeat({"chat_template": given}, {}) == {"chat_template": kept}
