"""``liquid inspect`` says what anything of ours holds, to people and to programs, and refuses all else."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.support import runs, stores
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.cli.main import main
from liquid_llm.errors import CheckpointError, UsageError
from liquid_llm.jobs.inspect import describe, inspect
from liquid_llm.jobs.inspect_shown import show


def run_directory(folder: Path) -> None:
    with CheckpointStore(folder, keep_last=2) as store:
        for step in (1, 2):
            store.save(state_of(step), metadata_of(step), also_as=("last",))
    rows: list[dict[str, Any]] = [{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)]
    rows.append({"kind": "eval", "step": 2, "val_loss_student": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')


def test_a_run_shows_its_checkpoints_with_their_losses_and_its_last_rows(tmp_path: Path) -> None:
    run_directory(tmp_path)
    found = describe(str(tmp_path))
    assert (found["kind"], found["step"], found["val_loss"], found["finished"]) == ("run", 2, 2.5, False)
    assert {name: (row["step"], row["val_loss"]) for name, row in found["checkpoints"].items()} == {
        "step-00000001": (1, None),
        "step-00000002": (2, 2.5),
        "last": (2, 2.5),
    }
    assert all(row["bytes"] > 0 for row in found["checkpoints"].values())
    assert found["last_train"]["loss"] == 1.0
    assert found["last_eval"]["val_loss_student"] == 2.5


def records(count: int, type: str) -> bytes:
    return b"".join(json.dumps({"text": f"text {n}", "type": type}).encode() + b"\n" for n in range(count))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, below one folder."""
    root = tmp_path_factory.mktemp("everything")
    run_directory(root / "runs" / "one")
    shutil.copytree(root / "runs" / "one", root / "runs" / "two")
    runs.make_run(root / "runs" / "three", steps=20)
    stores.write(root / "signal" / "code", stores.SAMPLES, layout="shards")
    (root / "data").mkdir()
    (root / "data" / "a.jsonl").write_bytes(records(3, "code"))
    (root / "data" / "b.jsonl.gz").write_bytes(gzip.compress(records(2, "lm")))
    entries = [{"path": "data/a.jsonl", "type": "code", "weight": 2.0}, {"path": "data/b*", "type": "lm"}]
    (root / "manifest.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    return root


def test_a_manifest_says_how_many_records_there_are(everything: Path) -> None:
    found = describe(str(everything / "manifest.jsonl"))
    assert found["kind"] == "manifest"
    assert [(row["files"], row["records"], row["characters"]) for row in found["entries"]] == [(1, 3, 18), (1, 2, 12)]
    assert found["types"]["code"]["records"] == 3
    assert found["types"]["lm"]["bytes"] == (everything / "data" / "b.jsonl.gz").stat().st_size


def test_an_entry_that_capture_would_refuse_is_named_and_ends_with_the_code_of_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "m.jsonl").write_text('{"path": "raw.jsonl", "type": "math_tool"}\n{"path": "no*", "type": "lm"}\n')
    assert inspect(str(tmp_path / "m.jsonl"), as_json=True) == 3
    raw, nothing = json.loads(capsys.readouterr().out)["entries"]
    assert "liquid prepare makes them of raw data" in raw["problem"]
    assert "matches no file" in nothing["problem"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runs/one", "run"),
        ("runs/one/last.pt", "checkpoint"),
        ("runs/one/last.meta.json", "checkpoint"),
        ("runs/one/metrics.jsonl", "rows"),
        ("runs/three", "run"),
        ("runs/three/provenance", "provenance"),
        ("runs/three/summary.json", "summary"),
        ("signal/code", "store"),
        ("signal/code/store.json", "store"),
        ("signal/code/shard-*", "shard"),
        ("data/a.jsonl", "records"),
        ("data/b.jsonl.gz", "records"),
        ("manifest.jsonl", "manifest"),
        ("runs", "folder"),
        (".", "folder"),
    ],
)
def test_everything_is_told_to_people_and_to_programs(
    everything: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = everything.glob(name) if name != "." else [everything]
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{kind}: {path}\n")
    assert "{" not in said, "of people's words none is JSON"
    assert main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == kind


def test_a_folder_names_what_lies_in_it_and_nothing_of_what_lies_in_that(everything: Path) -> None:
    held = describe(str(everything))["holds"]
    assert {name: one["kind"] for name, one in held.items()} == {
        "runs/one": "run",
        "runs/two": "run",
        "runs/three": "run",
        "signal/code": "store",
    }
    assert held["runs/one"]["val_loss"] == 2.5


def test_records_of_two_types_and_tokens_where_a_tokenizer_is_named(everything: Path, tmp_path: Path) -> None:
    from tests.support.tokenizers import tiny_tokenizer

    tiny_tokenizer(512).save_pretrained(tmp_path)
    found = describe(str(everything / "data" / "b.jsonl.gz"), str(tmp_path))
    assert (found["type"], found["records"], found["first"]["text"]) == ("lm", 2, "text 0")
    assert found["tokens"] >= 2
    assert describe(str(everything / "manifest.jsonl"), str(tmp_path))["types"]["lm"]["tokens"] == found["tokens"]


def test_a_model_is_described_without_its_weights_being_read(tmp_path: Path) -> None:
    from tests.support.models import tiny_model

    model = tiny_model("llama", 64)
    model.save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert (found["kind"], found["architecture"], found["weights"]) == ("model", "LlamaForCausalLM", "F32")
    assert found["parameters"] == sum(one.numel() for one in model.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert describe(str(tmp_path))["parameters"] is None


def test_a_pipe_that_is_closed_ends_quietly(everything: Path) -> None:
    words = [sys.executable, "-m", "liquid_llm", "inspect", str(everything)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""
    assert child.returncode == 0


@pytest.mark.parametrize("name", ["", "notes.txt", "nothing.json", "nothing/here"])
def test_something_else_is_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"nothing to inspect|nothing here|no file that can be"):
        describe(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="no sidecar"):
        describe(str(tmp_path / "bare.pt"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(["rows", "sentences", "bytes", "a_b", "\x1b[2J"]), JSON))
def test_whatever_a_file_holds_can_be_shown_and_moves_no_terminal(values: dict[str, Any]) -> None:
    import io

    out = io.StringIO()
    show({"kind": "summary", **values}, "somewhere", Console(file=out, highlight=False))
    assert out.getvalue().startswith("summary: somewhere\n")
    assert "\x1b" not in out.getvalue()
