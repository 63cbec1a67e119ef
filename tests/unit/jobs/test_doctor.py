"""``liquid doctor`` finds each damage in whatever the project writes, names it, and changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support import stores
from tests.support.checkpoints import metadata_of, state_of
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.cli.main import main
from liquid_llm.errors import UsageError
from liquid_llm.jobs.doctor import examine

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "lost": Path.unlink,
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with CheckpointStore(folder, keep_last=2) as store:
        for step in (1, 2):
            store.save(state_of(step), metadata_of(step))
    rows = [{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "provenance").mkdir()
    (folder / "provenance" / "options.yaml").write_text("lr: 1\n")
    return folder


def test_a_whole_run_is_whole_and_its_parts_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    assert main(["doctor", str(run)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["whole"]) == ("run", True)
    names = [part["name"] for part in said["parts"]]
    assert names == ["step-00000001.pt", "step-00000002.pt", "metrics.jsonl", "provenance/options.yaml"]
    assert contents(run) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["step-00000002.pt", "step-00000002.meta.json"])
def test_each_damage_to_a_checkpoint_is_named_and_inspect_goes_on(
    run: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](run / name)
    before = contents(run)
    assert main(["doctor", str(run)]) == 4
    (bad,) = (part for part in json.loads(capsys.readouterr().out)["parts"] if "problem" in part)
    assert bad["name"] == "step-00000002.pt"
    assert bad["remedy"]
    assert main(["doctor", str(run / "step-00000002.pt")]) == 4
    assert main(["inspect", str(run)]) == 0
    assert main(["inspect", str(run / "step-00000002.pt")]) in (0, 4)
    assert "Traceback" not in capsys.readouterr().err
    assert contents(run) == before


def test_rows_and_provenance_are_read_line_by_line(run: Path) -> None:
    """A torn last line is what every kill leaves, and no damage."""
    rows, options = run / "metrics.jsonl", run / "provenance" / "options.yaml"
    rows.write_bytes(rows.read_bytes() + b'{"kind": "tr')
    assert examine(str(run)).whole
    for broken in (b"a: [1", b"[" * 3000, b"\0\0"):
        rows.write_bytes(b'{"kind"\n' + rows.read_bytes())
        options.write_bytes(broken)
        bad = [part.name for part in examine(str(run)).parts if part.problem]
        assert bad == ["metrics.jsonl", "provenance/options.yaml"]


@pytest.mark.parametrize(
    ("every", "steps", "problem"), [(1, [1], "the rows end at step 1"), (1, [], "it holds no rows")]
)
def test_rows_that_a_checkpoint_had_before_it_must_be_there(
    run: Path, every: int, steps: list[int], problem: str
) -> None:
    rows = run / "metrics.jsonl"
    rows.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in steps))
    config = run / "provenance" / "config.json"
    config.write_text(json.dumps({"output": {"metrics_every_steps": every}}))
    (bad,) = (part for part in examine(str(run)).parts if part.problem)
    assert bad.name == "metrics.jsonl"
    assert str(bad.problem).startswith(problem)
    config.write_text(json.dumps({"output": {"metrics_every_steps": 2}}))
    rows.write_text('{"kind": "train", "step": 2}\n')
    assert examine(str(run)).whole
    config.write_text(json.dumps({"output": {"metrics_every_steps": 3}}))  # none is due yet but the first evaluation
    rows.write_text('{"kind": "eval", "step": 0}\n')
    assert examine(str(run)).whole


def test_a_secret_in_the_url_of_a_manifest_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "nonsense://user:S3CR3T@host/a.jsonl?sig=S3CR3T", "type": "lm"}\n')
    for command in ("inspect", "doctor"):
        assert main([command, str(manifest)]) != 0
        said = "".join(capsys.readouterr())
        assert "S3CR3T" not in said
        assert "host/a.jsonl" in said


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "deep"])
def test_a_damaged_evaluation_is_named(run: Path, damage: str) -> None:
    (run / "evaluation.json").write_text('{"student": {"loss": 3.0}}')
    assert examine(str(run)).whole
    DAMAGES[damage](run / "evaluation.json")
    (bad,) = (part for part in examine(str(run)).parts if part.problem)
    assert (bad.name, bad.remedy) == ("evaluation.json", "liquid evaluate writes it again")


def test_a_run_that_has_not_come_to_its_first_checkpoint_lacks_no_rows(run: Path) -> None:
    for path in (*run.glob("*.pt"), *run.glob("*.meta.json")):
        path.unlink()
    (run / "metrics.jsonl").write_text("")
    (run / "provenance" / "config.json").write_text(json.dumps({"output": {"metrics_every_steps": 1}}))
    assert examine(str(run)).whole


def test_a_folder_in_the_place_of_a_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "provenance/options.yaml", "step-00000002.meta.json"):
        kept = (run / name).rename(run.parent / "kept")
        (run / name).mkdir()
        (run / name / "file").touch()
        (bad,) = (part for part in examine(str(run)).parts if part.problem)
        assert bad.name == name.replace(".meta.json", ".pt")
        assert main(["inspect", str(run)]) in (0, 4)
        assert main(["report", str(run)]) in (0, 4)
        shutil.rmtree(run / name)
        kept.rename(run / name)
    assert "Traceback" not in capsys.readouterr().err


def test_lost_rows_are_named_and_checkpoints_alone_have_none(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert [part.name for part in examine(str(run)).parts if part.problem] == ["metrics.jsonl"]
    shutil.rmtree(run / "provenance")
    assert examine(str(run)).whole


def test_a_student_whose_tokenizer_is_damaged_is_not_whole(run: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(run / "student")
    tiny_tokenizer().save_pretrained(run / "student")
    shutil.copy(run / "student" / "tokenizer.json", tmp_path)
    assert examine(str(run)).whole
    for damage in ("cut", "empty", "deep"):
        shutil.copy(tmp_path / "tokenizer.json", run / "student")
        DAMAGES[damage](run / "student" / "tokenizer.json")
        (bad,) = (part for part in examine(str(run)).parts if part.problem)
        assert "tokenizer" in str(bad.problem)


def test_weights_that_are_no_numbers_are_no_whole_checkpoint(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=2) as store:
        info = store.save({"student": {"w": torch.tensor([1.0, torch.inf])}}, metadata_of(1))
    (part,) = examine(str(info.path)).parts
    assert part.problem == "NaN or infinity in w"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_says_what_of_it_is_damaged(tmp_path: Path, damage: str) -> None:
    stores.write(tmp_path / "s", stores.SAMPLES)
    assert examine(str(tmp_path / "s")).whole
    before = contents(tmp_path / "s")
    for name in before:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(tmp_path / "s", tmp_path / "t")
        DAMAGES[damage](tmp_path / "t" / name)
        found = examine(str(tmp_path / "t"))
        assert found.kind == "store"
        # An index only spares reading the headers of the shards: without it the store is as whole.
        assert found.whole == (damage == "lost" and name == "index.safetensors"), (name, found)


def test_a_manifest_is_read_to_the_end_of_its_last_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "m.jsonl").write_text('{"path": "a.jsonl", "type": "lm"}\n{"path": "no-*.jsonl", "type": "code"}\n')
    whole, missing = examine(str(tmp_path / "m.jsonl")).parts
    assert (whole.found, whole.problem) == ("2 lm records", None)
    assert "no file" in str(missing.problem)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 5000 + "\n")
    assert "a.jsonl:2" in str(examine(str(tmp_path / "m.jsonl")).parts[0].problem)


def prepared(folder: Path) -> Path:
    (folder / "raw.jsonl").write_text("".join(json.dumps({"text": f"word {n}"}) + "\n" for n in range(5)))
    (folder / "datasets.yaml").write_text("words: {type: lm, in: raw.jsonl, out: out}\n")
    assert main(["prepare", f"--datasets_yaml={folder / 'datasets.yaml'}"]) == 0
    return folder / "out"


def test_prepared_data_is_compared_with_its_markers(tmp_path: Path) -> None:
    out = prepared(tmp_path)
    found = examine(str(out))
    assert (found.kind, found.whole) == ("prepared data", True)
    shard = next(path for path in out.glob("*.jsonl*"))
    whole, marker = shard.read_bytes(), out / "_prepared" / "words" / "complete.json"
    for damage in ("cut", "lost", "empty"):
        DAMAGES[damage](shard)
        assert not examine(str(out)).whole
        shard.write_bytes(whole)
    text = marker.read_text()
    for broken in ("[" * 5000, "{}", text.replace('"shards": [', '"shards": [3, '), text[:50]):
        marker.write_text(broken)
        assert not examine(str(out)).whole
        assert main(["prepare", f"--datasets_yaml={tmp_path / 'datasets.yaml'}"]) == 0  # made again, not a traceback
        assert examine(str(out)).whole


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="nothing to examine"):
        examine(str(tmp_path))
