"""Annealing through the real command line: schedules, metadata, several evaluation lengths, what is said and kept."""

import json

import pytest
import torch
from tests.support.annealing import anneal, anneal_words, contents, metadata, rows

from liquid_llm.cli.main import main
from liquid_llm.metrics import without_timings

pytestmark = pytest.mark.slow


def test_schedules_are_applied_before_each_step(short):
    steps = rows(short)
    assert [row["kd_alpha"] for row in steps] == [0.7] * 4 + [0.5] * 4
    assert [row["kd_temperature"] for row in steps] == [1.2] * 6 + [1.0] * 2
    assert steps[1]["lr"] == pytest.approx(2.7e-3)


def test_metadata_says_everything_and_the_file_equals_its_sidecar(short):
    for name in ("best", "last", "final", "step-00000004"):
        beside = metadata(short, name)
        inside = torch.load(short / f"{name}.pt", weights_only=True)["metadata"]
        assert {**beside, "sha256": None} == inside
    last = metadata(short)
    assert (last["alpha_schedule"], last["temp_schedule"]) == ("0:0.7,4:0.5,20:0.3", "0:1.2,6:1.0")
    assert last["schedule_state"] == {"alpha": 2, "temperature": 2}
    assert (last["block_size"], last["eval_ctx_lens"], last["lr_peak"]) == (32, [32, 64], 2.7e-3)
    assert last["positional_embedding"] == "learned"


def test_each_length_has_its_keys_beside_the_plain_ones(short):
    for row in rows(short, "eval"):
        for name in ("val_loss_student", "val_loss_teacher", "val_kd"):
            assert row[name] == row[f"{name}@32"]
            assert row[f"{name}@64"] != row[name]
    teacher = {row["val_loss_teacher@64"] for row in rows(short, "eval")}
    assert len(teacher) == 1


def test_evaluating_at_more_lengths_leaves_training_as_it_is(tiny, tmp_path):
    plain, several = tmp_path / "plain", tmp_path / "several"
    assert anneal(tiny, plain, block_size=16, train_steps=4) == 0
    assert anneal(tiny, several, block_size=16, train_steps=4, eval_ctx_lens="8,16", eval_every=1) == 0
    assert [without_timings(row) for row in rows(plain)] == [without_timings(row) for row in rows(several)]
    assert len(rows(several, "eval")) > len(rows(plain, "eval"))
    one, other = (torch.load(run / "final.pt", weights_only=True)["student"] for run in (plain, several))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_resuming_takes_schedules_and_step_from_the_metadata(tiny, short, tmp_path):
    assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", block_size=None, train_steps=24) == 0
    steps = rows(tmp_path)
    assert [row["step"] for row in steps] == list(range(9, 25))
    assert [row["kd_alpha"] for row in steps] == [0.5] * 12 + [0.3] * 4
    assert {row["kd_temperature"] for row in steps} == {1.0}
    assert metadata(tmp_path)["eval_ctx_lens"] == [32, 64]


def test_the_command_line_wins_over_metadata(tiny, short, tmp_path):
    assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", alpha=0.6, T=2.5, train_steps=10) == 0
    assert {(row["kd_alpha"], row["kd_temperature"]) for row in rows(tmp_path)} == {(0.6, 2.5)}


def test_a_checkpoint_past_the_end_ends_at_once(tiny, short, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert anneal(tiny, tmp_path / "new", resume_gcs_uri=short / "last.pt", train_steps=8) == 0
    assert "already at step 8 of 8" in caplog.text
    assert not list((tmp_path / "new").glob("*.pt"))


def test_no_steps_reads_merges_and_writes_nothing(tiny, short, tmp_path, caplog):
    with caplog.at_level("INFO"):
        code = anneal(
            tiny, "gs://dummy", resume_gcs_uri=short / "last.pt", train_steps=0, local_workdir=tmp_path, alpha=0.6
        )
    assert code == 0
    assert "checkpoint metadata" in caplog.text
    assert not list(tmp_path.rglob("*.pt"))


def test_without_schedules_and_metadata_alpha_is_a_half_and_the_temperature_one(tiny, tmp_path):
    assert anneal(tiny, tmp_path, train_steps=2, teacher_name=None, student=tiny.teacher) == 0
    assert {(row["kd_alpha"], row["kd_temperature"]) for row in rows(tmp_path)} == {(0.5, 1.0)}
    assert {row["kd_coverage"] for row in rows(tmp_path)} == {0.0}, "no teacher: plain cross-entropy"
    assert not [key for row in rows(tmp_path, "eval") for key in row if "teacher" in key]


def test_schedule_entries_past_the_end_are_allowed_and_said(tiny, tmp_path, caplog):
    assert anneal(tiny, tmp_path, train_steps=2, alpha_schedule="0:0.7,1:0.6,2:0.5,9:0.1", eval_every=0) == 0
    assert "--alpha_schedule has entries that are never reached with --train_steps=2: 2:0.5, 9:0.1" in caplog.text
    assert [row["kd_alpha"] for row in rows(tmp_path)] == [0.7, 0.6]


def test_time_snapshots_are_named_by_their_second_and_complete(tiny, tmp_path):
    assert anneal(tiny, tmp_path, save_every=0, eval_every=0, save_every_minutes=1e-6, keep_last=2) == 0
    timed = list(tmp_path.glob("time-*.pt"))
    assert 1 <= len(timed) <= 2
    for path in timed:
        beside = metadata(tmp_path, path.stem)
        second = beside["created"].replace("-", "").replace(":", "")[:15]
        assert path.stem == f"time-{second}Z"
        assert torch.load(path, weights_only=True)["metadata"] == beside | {"sha256": None}


def test_a_short_run_has_a_row_of_its_last_step_whatever_the_interval(tiny, tmp_path):
    assert anneal(tiny, tmp_path, train_steps=5, log_interval=3, eval_every=0, grad_accum=2) == 0
    assert [(row["step"], row["tokens"]) for row in rows(tmp_path)] == [(3, 3 * 2 * 4 * 32), (5, 2 * 2 * 4 * 32)]


def test_a_file_gives_options_and_the_command_line_wins(tiny, tmp_path, capsys):
    given = dict(word.removeprefix("--").split("=", 1) for word in anneal_words(tiny, tmp_path / "run"))
    lines = [f"{name}: {value}\n" for name, value in {**given, "train-steps": 3, "alpha": 0.25}.items()]
    (tmp_path / "options.yaml").write_text("".join(line for line in lines if not line.startswith("train_steps")))
    assert main(["anneal", f"--config={tmp_path / 'options.yaml'}", "--alpha=0.75", "--eval-every=0"]) == 0
    assert [row["kd_alpha"] for row in rows(tmp_path / "run")] == [0.75] * 3
    (tmp_path / "wrong.yaml").write_text("alpha: 0.5\nalpha_shedule: 0:0.5\n")
    assert main(["anneal", f"--config={tmp_path / 'wrong.yaml'}"]) == 2
    assert "unknown option --alpha_shedule" in (err := capsys.readouterr().err)
    assert "Did you mean --alpha_schedule?" in err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tiny, short, tmp_path, gcs, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = contents(short)
    options = {"resume_gcs_uri": short / "last.pt", "train_steps": 12, "dry_run": "true", "block_size": 64}
    for output in (short, tmp_path / "new", f"{gcs.uri}/run"):
        assert anneal(tiny, output, **options) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["starts_from"]["step"] == 8
        assert [row["kd_alpha"] for row in found["schedules"]] == [0.5] * 3
        assert found["one_step"]["kd_coverage"] == 1.0
        assert (found["place"]["would_continue"] is not None) == (output == short)
    assert contents(short) == before
    assert not (tmp_path / "new").exists()
    assert not contents(tmp_path)
    bucket = gcs.server.root / gcs.name
    assert not [path for path in bucket.rglob("*") if path.is_file()]
