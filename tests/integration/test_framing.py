"""A teacher that expects a begin token, from capture to the finished student, and what follows what was captured."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, build
from tests.support.tokenizers import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from liquid_llm.cli.main import main
from liquid_llm.data.loader import TrainingStream
from liquid_llm.data.tokens import is_held_out
from liquid_llm.data.types import MicroBatch
from liquid_llm.framing import Framing
from liquid_llm.metrics import read_metrics
from liquid_llm.models.tokenizers import encode, frame_tokenizer

pytestmark = pytest.mark.slow

END = 0
BEGIN = tiny_tokenizer().convert_tokens_to_ids("~")
SHORT: dict[str, object] = {"max_steps": 4, "eval_every": 0, "save_every": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A teacher whose tokenizer puts ``~`` before each text, as Llama's puts its begin token."""
    tiny = build(tmp_path_factory.mktemp("framing"), teacher_steps=0)
    frame_tokenizer(tiny_tokenizer(), Framing(BEGIN, END)).save_pretrained(tiny.teacher)
    return tiny


@pytest.fixture(scope="module")
def captured(tiny: Tiny) -> Tiny:
    assert main(["capture", *tiny.capture_words()]) == 0
    return tiny


def without(tiny: Tiny, **options: object) -> dict[str, object]:
    """Options that name stores of their own beside the captured ones."""
    places = {"math_logits_dir": tiny.root / "plain" / "math", "code_logits_dir": tiny.root / "plain" / "code"}
    return {**places, **options}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[MicroBatch]:
    """Every micro-batch that is trained on from now on."""
    batches: list[MicroBatch] = []
    real = TrainingStream.at

    def kept(self: TrainingStream, index: int) -> MicroBatch:
        batches.append(real(self, index))
        return batches[-1]

    monkeypatch.setattr(TrainingStream, "at", kept)
    return batches


def rows(batches: list[MicroBatch], *types: str) -> list[list[int]]:
    return [
        ids[:length]
        for batch in batches
        if batch.type in types
        for ids, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)
    ]


def coverage(run: Path) -> dict[str, float]:
    train = [row for row in read_metrics(run) if row["kind"] == "train"]
    return {type: one["kd_coverage"] for row in train for type, one in row["by_type"].items()}


def texts(tiny: Tiny, type: str) -> set[str]:
    return {json.loads(line)["text"] for line in (tiny.root / f"{type}.jsonl").read_text().splitlines()}


def test_teacher_and_student_see_the_begin_token_from_store_to_export(
    captured: Tiny, tmp_path: Path, seen: list[MicroBatch], capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((captured.root / "signal" / "math" / "store.json").read_text())
    assert (about["begin_id"], about["end_id"], about["versions"]["framing"]) == (BEGIN, END, 2)
    assert main(["train", *captured.train_words(tmp_path, **SHORT)]) == 0
    said = capsys.readouterr().err
    assert f"texts of math_tool: '~' ({BEGIN}) before each, '<|endoftext|>' (0) behind (as the texts of" in said
    run = tmp_path / "run"
    assert set(coverage(run).values()) == {1.0}

    tokenizer = tiny_tokenizer()
    types = ("math_tool", "code")
    known = [[BEGIN, *encode(tokenizer, text), END][:64] for type in types for text in texts(captured, type)]
    whole, blocks = rows(seen, *types), rows(seen, "lm")
    assert whole
    assert blocks
    assert all(row in known for row in whole)
    assert all(after == BEGIN for row in blocks for before, after in pairwise(row) if before == END)

    student = run / "student"
    opened, model = AutoTokenizer.from_pretrained(student), AutoModelForCausalLM.from_pretrained(student)
    assert opened("some text").input_ids == [BEGIN, *encode(tokenizer, "some text")]
    for said_by in (model.config, model.generation_config, opened):
        assert (said_by.bos_token_id, said_by.eos_token_id) == (BEGIN, END)
    kept = json.loads((run / "final.meta.json").read_text())
    same = dict.fromkeys(("lm", "math_tool", "code"), BEGIN)
    assert kept["run"]["framing"] == {"begin_id": BEGIN, "end_id": END, "begin_ids": same}

    for words, code, message in (
        ({"begin_token": "never"}, 2, "--begin_token=never: the run goes on from a checkpoint"),
        ({}, 0, "(as the checkpoint has it)"),
    ):
        assert main(["train", *captured.train_words(tmp_path, **{**SHORT, "max_steps": 5, **words})]) == code
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "around"), [("always", 2), ("never", 1)])
def test_the_first_token_of_a_text_has_a_row_where_something_begins_it(
    tiny: Tiny, tmp_path: Path, mode: str, around: int, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    capsys.readouterr()
    assert main(["capture", *tiny.capture_words(**places, begin_token=mode, seq_len=100)]) == 0
    found = json.loads(capsys.readouterr().out)
    lengths = [len(encode(tiny_tokenizer(), text)) for type in ("math_tool", "code") for text in texts(tiny, type)]
    assert found["positions"] == sum(min(length + around, 100) - 1 for length in lengths)
    assert min(lengths) + around < 100 < max(lengths)  # some are whole and some are cut


def test_auto_follows_what_was_captured_without(
    tiny: Tiny, tmp_path: Path, seen: list[MicroBatch], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capture", *tiny.capture_words(**without(tiny, begin_token="never"))]) == 0
    capsys.readouterr()
    assert main(["capture", *tiny.capture_words(**without(tiny))]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0  # all is there already
    assert main(["train", *tiny.train_words(tmp_path, **without(tiny, **SHORT))]) == 0
    said = capsys.readouterr().err
    assert "texts of math_tool: nothing before each, '<|endoftext|>' (0) behind (as the texts of" in said
    assert f"texts of lm: '~' ({BEGIN}) before each" in said  # another teacher, which expects it
    assert set(coverage(tmp_path / "run").values()) == {1.0}
    assert all(row[0] != BEGIN for row in rows(seen, "math_tool", "code"))
    words = ["--teacher", str(tiny.teacher), "--manifest", str(tiny.manifest), "--samples=8"]
    assert main(["store", "verify", str(tiny.root / "plain" / "math"), *words]) == 0


@pytest.mark.parametrize("command", ["capture", "train"])
def test_another_framing_than_the_stores_is_refused(
    captured: Tiny, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, Any] = {
        "capture": captured.capture_words(begin_token="never"),
        "train": captured.train_words(tmp_path, **SHORT, begin_token="never"),
    }
    assert main([command, *words[command]]) == 3
    said = capsys.readouterr().err
    assert "the texts of this store are framed otherwise than --begin_token=never asks for" in said
    assert f"got '~' ({BEGIN}) before each" in said
    assert "Traceback" not in said


def test_without_a_begin_token_the_first_token_is_the_texts_own(
    tiny: Tiny, tmp_path: Path, seen: list[MicroBatch]
) -> None:
    words = {**SHORT, "hybrid": False, "math_logits_dir": None, "code_logits_dir": None, "begin_token": "never"}
    assert main(["train", *tiny.train_words(tmp_path, **words)]) == 0
    assert not [row for row in rows(seen, "lm", "math_tool", "code") if BEGIN in row]
    opened = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert opened("some text").input_ids == encode(tiny_tokenizer(), "some text")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config
    assert (config.bos_token_id, config.eos_token_id) == (END, END)


@pytest.mark.parametrize(("mode", "front"), [("auto", [BEGIN]), ("never", [])])
def test_the_teachers_loss_is_that_of_a_plain_pass_over_the_same_ids(
    tiny: Tiny, tmp_path: Path, mode: str, front: list[int]
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    line = {"path": str(tiny.root / "math_tool.jsonl"), "type": "math_tool", "weight": 1}
    manifest.write_text(json.dumps(line) + "\n")
    words: dict[str, Any] = {"dataset_manifest": manifest, "hybrid": False, "math_logits_dir": None, "max_steps": 1}
    words |= {"code_logits_dir": None, "begin_token": mode, "teacher_precision": "float32", "eval_tokens": 10**6}
    assert main(["train", *tiny.train_words(tmp_path, **words)]) == 0
    row = next(row for row in read_metrics(tmp_path / "run") if row["kind"] == "eval")

    teacher = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32).eval()
    losses = []
    for text in (tiny.root / "math_tool.jsonl").read_text().splitlines():
        record = json.loads(text)
        if is_held_out(record["sample_id"], 0.2):
            ids = torch.tensor([[*front, *encode(tiny_tokenizer(), record["text"]), END][:64]])
            with torch.no_grad():
                losses += cross_entropy(teacher(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert row["by_type"]["math_tool"]["positions"] == len(losses)
    assert row["val_loss_teacher"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_an_annealing_run_is_framed_and_what_goes_on_from_it_is_framed_alike(
    tiny: Tiny, tmp_path: Path, seen: list[MicroBatch], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A named dataset; then its checkpoint under another output: the step goes on there, and the framing with it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text((tiny.root / "lm.jsonl").read_text())
    words = [
        "anneal",
        f"--student={tiny.student}",
        f"--teacher_name={tiny.teacher}",
        f"--data_cache={tmp_path / 'tokens'}",
    ]
    words += [f"--dataset_name={tmp_path / 'text'}", "--block_size=64", "--batch_size=2", "--warmup_steps=1"]
    words += ["--eval_every=0", "--save_every=0", "--eval_tokens=128"]
    for mode, begun in (("auto", True), ("never", False)):
        run, further = tmp_path / mode, tmp_path / f"{mode}-further"
        assert main([*words, "--train_steps=2", f"--output_gcs_uri={run}", f"--begin_token={mode}"]) == 0
        resumed = [*words, "--train_steps=3", f"--output_gcs_uri={further}", f"--resume_gcs_uri={run / 'last.pt'}"]
        assert main(resumed) == 0
        assert "(as the checkpoint has it)" in capsys.readouterr().err
        after_end = [b for row in rows(seen, "lm") for a, b in pairwise(row) if a == END]
        assert after_end
        assert {token == BEGIN for token in after_end} == {begun}
        seen.clear()
    restarted = [*resumed, "--reset_optim", f"--output_gcs_uri={tmp_path / 'afresh'}"]
    assert main([word for word in restarted if word != f"--output_gcs_uri={further}"]) == 0
    assert BEGIN in [token for row in rows(seen, "lm") for token in row]  # weights alone: a new run, framed anew
