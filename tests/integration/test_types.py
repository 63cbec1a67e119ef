"""Types of text beyond the reference's three: captured, trained, evaluated under the name that a manifest gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny import QUICK, Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics

pytestmark = pytest.mark.slow

ORDER = ["lm", "code", "chat-2", "notes"]
"""Of metrics and provenance: the reference's types, then the others as the manifest first names them."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``math_tool`` is called ``chat-2``, and short pieces of plain text are ``notes``; both come before ``lm``."""
    tiny = build(tmp_path_factory.mktemp("tiny"))
    rows = [json.loads(line) for line in (tiny.root / "math_tool.jsonl").read_text().splitlines()]
    (tiny.root / "chat.jsonl").write_text("".join(json.dumps({**row, "type": "chat-2"}) + "\n" for row in rows))
    rows = [json.loads(line) for line in (tiny.root / "lm.jsonl").read_text().splitlines()]
    (tiny.root / "notes.jsonl").write_text("".join(json.dumps({"text": row["text"][:99]}) + "\n" for row in rows))
    lines = [("chat.jsonl", "chat-2"), ("notes.jsonl", "notes"), ("lm.jsonl", "lm"), ("code.jsonl", "code")]
    entries = [{"path": path, "type": type} for path, type in lines]
    tiny.manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tiny


def config(tmp_path: Path, tiny: Tiny, **sources: object) -> list[str]:
    """A configuration file that names the sources; gives the words that name it."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"sources": sources}))
    return [f"--config={file}"]


def test_any_type_is_captured_trained_and_evaluated_as_its_source_says(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = f"store:{tiny.root / 'signal' / 'chat'}"
    store = config(tmp_path, tiny, **{"chat-2": {"teacher": chat}, "notes": {"teacher": "none"}})
    assert main(["capture", *tiny.capture_words(**QUICK), *store]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written == sum(len((tiny.root / name).read_text().splitlines()) for name in ("chat.jsonl", "code.jsonl"))

    taught = config(tmp_path, tiny, **{"chat-2": {"teacher": chat}, "notes": {"teacher": "none", "layout": "blocks"}})
    words = tiny.train_words(tmp_path / "out", max_steps=24, eval_every=12, metrics_interval=1)
    assert main(["train", *words, *taught]) == 0
    run = tmp_path / "out" / "run"
    rows = read_metrics(run)
    for row in rows:
        assert list(row["by_type"]) == [type for type in ORDER if type in row["by_type"]]
    trained = [row["by_type"] for row in rows if row["kind"] == "train"]
    assert {type for row in trained for type in row} == set(ORDER)
    for row in trained:
        assert (row.get("notes") or {"kd": None})["kd"] is None  # nobody teaches it
        assert all(row[type]["kd"] is not None for type in row if type != "notes")
        assert row.get("notes", {"tokens": 0})["tokens"] % 128 == 0  # full blocks: 2 of 64 tokens
    evaluated = [row["by_type"] for row in rows if row["kind"] == "eval"][-1]
    assert list(evaluated) == ORDER
    readiness = json.loads((run / "provenance" / "data_readiness.json").read_text())
    assert list(readiness["types"]) == ORDER


def test_a_type_without_a_named_signal_is_refused_with_what_to_say(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capture", *tiny.capture_words(**QUICK)]) == 2
    assert "the manifest has chat-2 samples but --signal chat-2=URI is not given" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text('{"path": "not-there.jsonl", "type": "chat-2"}')  # no file of it is opened
    assert main(["train", *tiny.train_words(tmp_path / "out", dataset_manifest=tmp_path / "m.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "the manifest has chat-2 samples but nothing names their signal" in said
    assert "--signal chat-2=none" in said
