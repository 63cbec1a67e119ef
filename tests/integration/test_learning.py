"""Prompts, conversations and texts through the real commands: captured, trained, evaluated, verified, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.annealing import anneal
from tests.support.tiny import Tiny, build
from transformers import AutoTokenizer

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics

pytestmark = pytest.mark.slow

QUIET = {
    "block_size": 192,
    "max_steps": 6,
    "eval_every": 3,
    "save_every": 3,
    "metrics_interval": 1,
    "lm_teacher_id": None,
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(text: str, at: str) -> tuple[str, str]:
    place = text.index(at) + len(at)
    return text[:place], text[place:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Maths are prompts with completions and one prompt too long for a window; code is mixed with conversations."""
    tiny = build(tmp_path_factory.mktemp("tiny"))
    for kind in ("math_tool", "code"):
        rows = [json.loads(line) for line in (tiny.root / f"{kind}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            text = row.pop("text")
            prompt, completion = cut(text, "\nAnswer:" if "\nAnswer:" in text else "\n")
            if kind == "math_tool":
                row |= {"prompt": prompt, "completion": completion}
            elif number % 2:
                said = (("user", prompt.strip()), ("assistant", completion.strip()))
                row |= {"messages": [{"role": role, "content": words} for role, words in said]}
            else:
                row["text"] = text
        if kind == "math_tool":
            rows.append({"prompt": "why? " * 200, "completion": "because", "sample_id": "too long"})
        write(tiny.root / f"{kind}.jsonl", rows)
    entries = [{"path": f"{kind}.jsonl", "type": kind, "weight": 1.0} for kind in ("math_tool", "code")]
    write(tiny.manifest, entries)
    return tiny


@pytest.fixture(scope="module")
def captured(tiny: Tiny) -> dict[str, Any]:
    """What capture says; the stores hold the learnt positions of both types."""
    words = tiny.capture_words(codec="full", chat_template="chatml", seq_len=192)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert main(["capture", *words]) == 0
    found: dict[str, Any] = json.loads(said[-1])
    return found


def rows_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def readiness(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "provenance" / "data_readiness.json").read_text())["types"]
    return found


def test_a_run_from_the_store_is_that_of_the_teacher_asked_online(
    tiny: Tiny, captured: dict[str, Any], tmp_path: Path
) -> None:
    """Hybrid face, all three forms: every loss, to what 16 bits keep; nothing is stored of a prompt."""
    assert captured["failed"] == 0
    assert captured["written"] == 80, "the sample that is all prompt in its window is left out"
    assert captured["positions"] < captured["tokens"] - captured["written"]
    given = {**QUIET, "chat_template": "chatml", "seed": 3}
    assert main(["train", *tiny.train_words(tmp_path / "stored", **given)]) == 0
    online = {"hybrid": False, "math_logits_dir": None, "code_logits_dir": None, "mc_teacher_id": None}
    words = tiny.train_words(tmp_path / "online", **{**given, **online, "lm_teacher_id": tiny.teacher})
    assert main(["train", *words]) == 0
    stored, asked = (rows_of(tmp_path / name / "run") for name in ("stored", "online"))
    assert len(stored) == len(asked) == 6
    for one, other in zip(stored, asked, strict=True):
        assert one["kd_coverage"] == other["kd_coverage"] == 1.0
        assert (one["tokens"], one["positions"]) == (other["tokens"], other["positions"])
        # the first step starts from the same weights; what 16 bits leave out then adds up
        bound = 7e-6 if one["step"] == 1 else 2e-4
        for name in ("loss", "ce", "kd", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=bound), name
    counts = [row["by_type"]["math_tool"] for row in stored if "math_tool" in row["by_type"]]
    assert counts
    assert all(0 < one["tokens"] < one["positions"] for one in counts)
    assert readiness(tmp_path / "stored" / "run")["math_tool"]["left_out_nothing_learnt"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "stored" / "run" / "student").chat_template is not None
    evaluated, again = (rows_of(tmp_path / name / "run", "eval")[-1] for name in ("stored", "online"))
    assert evaluated["val_kd"] == pytest.approx(again["val_kd"], rel=2e-4)


@pytest.mark.parametrize(("kept", "words"), [(1.0, "all of them stored"), (0.3, "of these 30.0% (--kd_positions), ro")])
def test_capture_announces_and_stats_show_what_is_learnt_and_kept_of_the_windows(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: float, words: str
) -> None:
    """Where prompts are not learnt: the codec's size is chosen by the rows there will be, to the last one."""
    given = {"math_logits_dir": tmp_path, "code_logits_dir": tmp_path, "chat_template": "chatml", "kd_positions": kept}
    capsys.readouterr()
    assert main(["capture", *tiny.capture_words(**given, codec="topk", seq_len=100)]) == 0
    out, said = capsys.readouterr()
    captured = json.loads(out)
    assert f"for the {captured['positions']:,} positions it will hold" in said
    windows = captured["tokens"] - captured["written"]
    assert main(["store", "stats", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["positions"], found["window_positions"]) == (captured["positions"], windows)
    assert found["kd_positions"] == kept
    assert found["stored_share"] == captured["positions"] / windows
    assert found["learnt_share"] == found["stored_share"] / kept < 0.6
    assert main(["store", "stats", str(tmp_path)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_store_says_what_its_teacher_says_and_is_stale_where_more_is_learnt(
    tiny: Tiny, captured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tiny.root / "signal" / "math"
    words = [
        f"--teacher={tiny.teacher}",
        f"--manifest={tiny.manifest}",
        f"--data-cache={tiny.root / 'tokens'}",
        "--json",
    ]
    capsys.readouterr()
    assert main(["store", "verify", str(store), *words, "--chat_template=chatml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["agrees"], found["usable"]) == (True, found["looked_at"])
    assert main(["store", "verify", str(store), *words, "--learn=all", "--chat_template=chatml"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["stale"] == found["looked_at"] > 0
    assert main(["store", "stats", str(store), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["positions"] < captured["positions"]
    assert stats["types"]["math_tool"]["sampled_positions"] == stats["positions"]
    given = {**QUIET, "chat_template": "chatml", "learn": "all"}
    assert main(["train", *tiny.train_words(tmp_path / "all", **given)]) == 0
    said = capsys.readouterr().err
    assert "math_tool: no sample has usable stored signal" in said
    assert "captured for other positions than are learnt" in said


def test_all_that_is_there_is_learnt_where_that_is_asked_for(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by a run that goes on and has learnt completions so far, which is told so."""
    given = {**QUIET, "hybrid": False, "math_logits_dir": None, "code_logits_dir": None, "max_steps": 3}
    given |= {"mc_teacher_id": None, "lm_teacher_id": tiny.teacher, "chat_template": "chatml"}
    assert main(["train", *tiny.train_words(tmp_path, **given)]) == 0
    given |= {"max_steps": 6, "learn": "all"}
    said = "another --learn or chat template than the run had so far"
    assert said not in caplog.text
    assert main(["train", *tiny.train_words(tmp_path, **given)]) == 3, "other texts are learnt"
    given |= {"accept_changes": True}
    assert main(["train", *tiny.train_words(tmp_path, **given)]) == 0
    assert said in caplog.text
    whole = [row["tokens"] == row["positions"] for row in rows_of(tmp_path / "run")]
    assert not all(whole[:3])
    assert all(whole[3:])
    assert "left_out_nothing_learnt" in readiness(tmp_path / "run")["math_tool"]


def test_conversations_without_a_template_are_refused_where_they_are(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny.train_words(tmp_path, **QUIET)]) == 3
    said = capsys.readouterr().err
    assert "code.jsonl:2: there is no chat template to write messages out with. Name one: --chat_template" in said


@pytest.mark.parametrize("form", ["messages", "cut messages", "prompt", "text"])
def test_a_named_dataset_of_each_form_is_annealed_on(tiny: Tiny, tmp_path: Path, form: str) -> None:
    """The other face, in blocks: labels run through them, and a chat template is exported only after chat."""
    texts = [json.loads(line)["text"] for line in (tiny.root / "lm.jsonl").read_text().splitlines()]
    made = [(text[:30], text[30:60]) for text in texts]  # short, so that a block has several
    rows: dict[str, list[dict[str, Any]]] = {
        "messages": [
            {"messages": [{"role": "user", "content": p.strip()}, {"role": "assistant", "content": c}]} for p, c in made
        ],
        "cut messages": [
            {
                "prompt": [{"role": "user", "content": p.strip()}],
                "completion": [{"role": "assistant", "content": c}],
            }
            for p, c in made
        ],
        "prompt": [{"prompt": p, "completion": c} for p, c in made],
        "text": [{"text": p + c} for p, c in made],
    }
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", rows[form][:48])
    write(tmp_path / "data" / "validation.jsonl", rows[form][48:])
    student = tiny.root / "student.json"
    options = {"dataset_name": tmp_path / "data", "student": student, "chat_template": "chatml", "train_steps": 4}
    assert anneal(tiny, tmp_path / "run", **options) == 0
    steps = rows_of(tmp_path / "run")
    assert len(steps) == 4
    assert all(row["positions"] == 4 * 32 and row["kd_coverage"] == 1.0 for row in steps)
    learnt = sum(row["tokens"] for row in steps) / sum(row["positions"] for row in steps)
    assert learnt == 1 if form == "text" else 0.2 < learnt < 0.8
    assert all(row["val_loss_student"] > 0 for row in rows_of(tmp_path / "run", "eval"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert (tokenizer.chat_template is not None) == ("messages" in form)


def test_word_problems_and_functions_are_prepared_as_prompts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then trained on: the answer alone is learnt, and ``--learn=all`` learns the very tokens of before."""
    (tmp_path / "raw").mkdir()
    questions = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(24)]
    write(tmp_path / "raw" / "gsm8k.jsonl", questions)
    functions = [{"prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in range(24)]
    write(tmp_path / "raw" / "human.jsonl", functions)
    catalog = {
        name: {"type": type, "in": f"raw/{name}.jsonl", "out": f"out/{name}", "manifest": "manifest.jsonl"}
        for name, type in (("gsm8k", "math_tool"), ("human", "code"))
    }
    (tmp_path / "datasets.yaml").write_text(json.dumps(catalog))
    assert main(["prepare", f"--datasets_yaml={tmp_path / 'datasets.yaml'}"]) == 0
    capsys.readouterr()
    files = sorted((tmp_path / "out").glob("*/*.jsonl"))
    shards = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert {tuple(row) for row in shards} == {("prompt", "completion", "type", "sample_id")}
    given = {**QUIET, "hybrid": False, "math_logits_dir": None, "code_logits_dir": None, "mc_teacher_id": None}
    given |= {"lm_teacher_id": tiny.teacher, "dataset_manifest": tmp_path / "manifest.jsonl", "val_fraction": 0}
    assert main(["train", *tiny.train_words(tmp_path / "completion", **given)]) == 0
    assert all(row["tokens"] < row["positions"] for row in rows_of(tmp_path / "completion" / "run"))
    assert main(["train", *tiny.train_words(tmp_path / "all", **given, learn="all")]) == 0
    # the same texts as an earlier release prepared them: name and all, and so the same order and the same losses
    (tmp_path / "datasets.yaml").unlink()
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write(path, [{"text": row.pop("prompt") + row.pop("completion"), **row} for row in rows])
    assert main(["train", *tiny.train_words(tmp_path / "before", **given)]) == 0
    names = ("step", "loss", "ce", "kd", "tokens", "positions", "grad_norm")
    before, now = (
        [{name: row[name] for name in names} for row in rows_of(tmp_path / run / "run")] for run in ("before", "all")
    )
    assert before == now
