"""What annealing cannot do is one message and an exit code, and the run directory is left as it was, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal, contents, rows
from tests.support.models import tiny_model
from tests.support.tiny import VOCAB_SIZE
from tests.support.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncated(folder: Path) -> None:
    data = folder / "last.pt"
    data.write_bytes(data.read_bytes()[:-1000])


def truncated_alone(folder: Path) -> None:
    truncated(folder)
    (folder / "last.meta.json").unlink()


def of_another_format(folder: Path) -> None:
    content = torch.load(folder / "last.pt", weights_only=True)
    content["metadata"]["format_version"] = 99
    torch.save(content, folder / "last.pt")
    (folder / "last.meta.json").unlink()


def of_another_architecture(folder: Path) -> None:
    torch.save(tiny_model("llama", VOCAB_SIZE).state_dict(), folder / "last.pt")
    (folder / "last.meta.json").unlink()


def of_a_smaller_vocabulary(folder: Path) -> None:
    model = tiny_model("gpt2", 300)
    torch.save({"student": model.state_dict(), "config": model.config.to_dict()}, folder / "last.pt")
    (folder / "last.meta.json").unlink()


def bare_of_a_larger_vocabulary(folder: Path) -> None:
    torch.save(tiny_model("gpt2", 600).state_dict(), folder / "last.pt")
    (folder / "last.meta.json").unlink()


CHECKPOINTS = [
    (truncated, 4, ["last.pt", "truncated"]),
    (truncated_alone, 4, ["last.pt", "truncated"]),
    (of_another_format, 4, ["format version", "99", "expected 1"]),
    (lambda folder: edited(folder / "last.meta.json", format_version=99), 4, ["last.meta.json", "format version"]),
    (lambda folder: edited(folder / "last.meta.json", sha256="0" * 64), 4, ["last.pt", "sha256", "000000000000"]),
    (lambda folder: edited(folder / "last.meta.json", step=7), 4, ["last.pt", "other metadata"]),
    (lambda folder: edited(folder / "last.meta.json", step="seven"), 4, ["field step", "'seven'"]),
    (lambda folder: (folder / "last.meta.json").write_text("{"), 4, ["last.meta.json", "no JSON"]),
    (of_another_architecture, 4, ["last.pt", "another architecture", "--student"]),
    (of_a_smaller_vocabulary, 4, ["smaller vocabulary", "300", f"at least {VOCAB_SIZE}"]),
    (bare_of_a_larger_vocabulary, 4, ["architecture or vocabulary", "(600, 32) instead of"]),
    (lambda folder: (folder / "last.pt").unlink(), 4, ["last.pt", "no checkpoint here", "--resume_gcs_uri"]),
]


@pytest.mark.parametrize(("damage", "code", "parts"), CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(tiny, short, tmp_path, capsys, damage, code, parts):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    shutil.copytree(short, run)
    for name in ("last.pt", "last.meta.json"):
        shutil.copy(short / name, source / name)
    damage(source)
    before = contents(tmp_path)
    student = {} if damage is of_a_smaller_vocabulary else {"student": tiny.root / "gpt2.json"}
    options = {"resume_gcs_uri": source / "last.pt", "restart": "true", "train_steps": 12, **student}
    assert anneal(tiny, run, **options) == code
    assert_refused(capsys, parts)
    assert contents(tmp_path) == before


OPTIONS = [
    ({"block_size": 0}, 2, ["--block_size", "got 0", "at least 2"]),
    ({"block_size": 512}, 2, ["--block_size=512", "teacher", "at most 256"]),
    ({"eval_ctx_lens": "32,4096"}, 2, ["--eval_ctx_lens", "4096", "at most 64", "--block_size"]),
    ({"eval_ctx_lens": "32,128"}, 2, ["--eval_ctx_lens", "got 128", "at most 64", "--block_size"]),
    ({"eval_ctx_lens": "32,"}, 2, ["--eval_ctx_lens", "whole numbers"]),
    ({"dataset_name": "/no/such/folder"}, 3, ["/no/such/folder", "no such dataset"]),
    ({"teacher_name": "no/such-model"}, 2, ["no/such-model"]),
    ({"resume_gcs_uri": "gs://no-such-bucket/best.pt"}, 4, ["gs://no-such-bucket/best.pt"]),
    ({"rope_scale": 2.0}, 2, ["rope_scale", "learned positions"]),
    ({"alpha_schedule": "0:0.7,0:0.5"}, 2, ["--alpha_schedule entry '0:0.5'", "duplicate"]),
    ({"alpha_schedule": "4:0.7,0:0.5"}, 2, ["--alpha_schedule entry '0:0.5'", "out of order"]),
    ({"alpha_schedule": "0:0.7,,4:0.5"}, 2, ["--alpha_schedule entry ''", "empty"]),
    ({"alpha_schedule": "0:-0.7"}, 2, ["--alpha_schedule entry '0:-0.7'", "negative"]),
    ({"temp_schedule": "0:hot"}, 2, ["--temp_schedule entry '0:hot'", "not a number"]),
    (
        {"alpha_schedule": "1:2", "temp_schedule": "0:0", "alpha": 3},
        2,
        ["3 problems", "'1:2'", "'0:0'", "--alpha must"],
    ),
    ({"hf_token_file": "/no/such/token"}, 2, ["--hf_token_file=/no/such/token"]),
    ({"student": "llama.json"}, 4, ["another architecture", "leave it out"]),
]


@pytest.mark.parametrize(("options", "code", "parts"), OPTIONS)
@pytest.mark.parametrize("restart", ["true", "false"])
def test_options_that_cannot_work(tiny, short, tmp_path, gcs, capsys, options, code, parts, restart):
    """Over a run that is there already: continued with more steps, or restarted."""
    if restart == "false" and "resume_gcs_uri" in options:
        pytest.skip("a run that is continued needs no other checkpoint")
    run = tmp_path / "run"
    shutil.copytree(short, run)
    before = contents(tmp_path)
    options = {name: tiny.root / value if name == "student" else value for name, value in options.items()}
    given = {"train_steps": 12, "restart": restart, "resume_gcs_uri": short / "last.pt", **options}
    assert anneal(tiny, run, **given) == code
    assert_refused(capsys, parts)
    assert contents(tmp_path) == before


def test_a_teacher_with_another_tokenizer_than_the_checkpoints(tiny, short, tmp_path, capsys):
    other, run = tmp_path / "other", tmp_path / "run"
    tiny_model("llama", 400, max_position_embeddings=256).save_pretrained(other)
    tiny_tokenizer(400).save_pretrained(other)
    shutil.copytree(short, run)
    before = contents(run)
    assert anneal(tiny, run, resume_gcs_uri=None, student=None, teacher_name=other, train_steps=12) == 2
    assert_refused(capsys, ["another tokenizer", str(other)])
    assert contents(run) == before


def test_without_a_teacher_a_preset_has_no_tokenizer(tiny, tmp_path, capsys):
    assert anneal(tiny, tmp_path / "run", teacher_name=None, student="gpt2-test") == 2
    assert_refused(capsys, ["--student=gpt2-test", "which tokenizer", "--teacher_name"])


def test_a_folder_that_was_not_there_gets_no_checkpoint(tiny, tmp_path, capsys):
    assert anneal(tiny, tmp_path / "run", block_size=512) == 2
    assert_refused(capsys, ["at most 256"])
    assert not contents(tmp_path)


def test_a_restart_that_works_sets_the_old_checkpoints_aside(tiny, short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    before = contents(run)
    assert anneal(tiny, run, resume_gcs_uri=run / "last.pt", restart="true", reset_optim="true", train_steps=2) == 0
    (aside,) = run.glob("before-restart-*")
    for name in ("best", "last", "final", "step-00000008"):
        assert (aside / f"{name}.pt").read_bytes() == before[f"{name}.pt"]
    assert [row["step"] for row in rows(run)] == [1, 2]


def assert_refused(capsys, parts: list[str]) -> None:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    message = err[err.rindex("error: ") :]
    for part in parts:
        assert part in message, message
    assert ".." not in message.replace("…", "").replace("...", "").replace("/..", "")
