"""Annealing through the real command line: metadata, context changes, several evaluation lengths, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import tiny_config
from tests.support.tiny import VOCAB_SIZE, Tiny, build, words

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"))
    rows = (tiny.root / "lm.jsonl").read_text().splitlines(keepends=True)
    (tiny.root / "texts").mkdir()
    (tiny.root / "texts" / "train.jsonl").write_text("".join(rows[:48]))
    (tiny.root / "texts" / "validation.jsonl").write_text("".join(rows[48:]))
    (tiny.root / "gpt2.json").write_text(tiny_config("gpt2", VOCAB_SIZE).to_json_string())
    return tiny


def anneal(tiny: Tiny, output: Path | str | None, **options: object) -> int:
    defaults = {
        "student": tiny.root / "gpt2.json",
        "teacher_name": tiny.teacher,
        "dataset_name": tiny.root / "texts",
        "output_gcs_uri": output,
        "data_cache": tiny.root / "tokens",
        "block_size": 32,
        "batch_size": 4,
        "train_steps": 8,
        "warmup_steps": 2,
        "log_interval": 1,
        "eval_every": 4,
        "save_every": 4,
        "eval_tokens": 1024,
    }
    return main(["anneal", *words({**defaults, **options})])


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory) -> Path:
    """A finished run at 32 tokens with schedules that reach past its end."""
    output = tmp_path_factory.mktemp("short")
    schedules = {"alpha_schedule": "0:0.7,4:0.5,20:0.3", "temp_schedule": "0:1.2,6:1.0"}
    assert anneal(tiny, output, alpha=0.7, T=1.2, eval_ctx_lens="32,64", lr_peak=2.7e-3, **schedules) == 0
    return output


def rows(run: Path, kind: str = "train") -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def metadata(run: Path, name: str = "last") -> dict:
    return json.loads((run / f"{name}.meta.json").read_text())


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


def test_a_longer_context_with_the_flag_starts_the_optimizer_afresh(tiny, short, tmp_path):
    options = {"resume_gcs_uri": short / "best.pt", "block_size": 128, "reset_optim_on_ctx_change": "true"}
    assert anneal(tiny, tmp_path, lr_peak=1e-3, grad_accum=2, eval_ctx_lens="32,128", train_steps=4, **options) == 0
    steps = rows(tmp_path)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["lr"] == pytest.approx(5e-4)
    assert steps[1]["lr"] == pytest.approx(1e-3)
    after = torch.load(tmp_path / "final.pt", weights_only=True)["student"]
    assert after["transformer.wpe.weight"].shape[0] == 128
    assert metadata(tmp_path)["block_size"] == 128


def test_a_longer_context_without_the_flag_goes_on_and_says_so(tiny, short, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", block_size=64, train_steps=10) == 0
    assert [row["step"] for row in rows(tmp_path)] == [9, 10]
    assert "optimizer and step 8 go on" in caplog.text


def test_reset_optim_starts_afresh_at_the_same_length(tiny, short, tmp_path):
    assert anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", reset_optim="true", train_steps=2) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


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


def test_rope_scale_reaches_the_model_and_the_metadata(tiny, tmp_path):
    llama = tmp_path / "llama.json"
    llama.write_text(tiny_config("llama", VOCAB_SIZE).to_json_string())
    assert anneal(tiny, tmp_path / "run", student=llama, rope_scale=2.0, train_steps=2) == 0
    saved = metadata(tmp_path / "run")
    assert (saved["rope_scale"], saved["positional_embedding"]) == (2.0, "rotary")
    assert saved["student"]["config"]["rope_parameters"]["factor"] == 2.0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"eval_ctx_lens": "32,4096"}, 2, "cannot see so long a context"),
        ({"block_size": 512}, 2, "at most 256"),
        ({"block_size": 0}, 2, "at least 2"),
        ({"dataset_name": "no/such-dataset"}, 3, "no/such-dataset"),
        ({"teacher_name": "no/such-model"}, 2, "no/such-model"),
        ({"resume_gcs_uri": "/no/such/checkpoint.pt"}, 4, "/no/such/checkpoint.pt"),
        ({"alpha_schedule": "0:0.7,0:0.5"}, 2, "duplicate step"),
    ],
)
def test_what_cannot_work_is_one_message(tiny, tmp_path, capsys, monkeypatch, options, code, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert anneal(tiny, tmp_path / "run", **options) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_evaluation_length_past_a_loaded_table_is_refused_with_the_remedy(tiny, short, tmp_path, capsys):
    code = anneal(tiny, tmp_path, resume_gcs_uri=short / "last.pt", eval_ctx_lens="32,128", train_steps=10)
    assert code == 2
    assert "at most 64" in (err := capsys.readouterr().err)
    assert "--block_size" in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
        (lambda path: _edit(path, lambda meta: meta | {"format_version": 99}), "format version"),
        (lambda path: _edit(path, lambda meta: meta | {"sha256": "0" * 64}), "sha256"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched(tiny, short, tmp_path, capsys, damage, message):
    for name in ("last.pt", "last.meta.json"):
        shutil.copy(short / name, tmp_path / name)
    damage(tmp_path / "last.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert anneal(tiny, tmp_path / "run", resume_gcs_uri=tmp_path / "last.pt", train_steps=10) == 4
    assert message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def _edit(path: Path, change) -> None:
    sidecar = path.with_name("last.meta.json")
    sidecar.write_text(json.dumps(change(json.loads(sidecar.read_text()))))


def test_weights_of_another_architecture_are_refused(tiny, tmp_path, capsys):
    from tests.support.models import tiny_model

    torch.save(tiny_model("llama", VOCAB_SIZE).state_dict(), tmp_path / "llama.pt")
    assert anneal(tiny, tmp_path / "run", resume_gcs_uri=tmp_path / "llama.pt") == 4
    assert "another architecture" in capsys.readouterr().err
