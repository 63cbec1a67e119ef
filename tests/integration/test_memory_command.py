"""``liquid memory``, ``--grad_checkpoint=auto``, ``--batch_size=auto`` and ``--dry_run``, by real commands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import readme
from tests.support.annealing import anneal, as_of, make_world, metadata, rows
from tests.support.memory import LLAMA_3B, preset
from tests.support.tiny import Tiny

from liquid_llm.cli.main import main
from liquid_llm.metrics import without_timings
from liquid_llm.wiring import fitting

GIB = 2**30
MIB = 2**20
STEPS = {"train_steps": 4, "eval_every": 0, "save_every": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_world(tmp_path_factory.mktemp("memory"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A configuration and nothing else: no weights, no tokenizer."""
    path = tmp_path / "teacher.json"
    shape = preset("llama-test", 4096, hidden_size=64)
    path.write_text(json.dumps(dict(shape.config)))
    return path


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main(["memory", *map(str, words)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


# ------------------------------------------------------------------------------------------------------- the command


def test_a_job_is_asked_about_before_there_is_data_weights_or_a_gpu(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--student=liquid-test", f"--lm-teacher-id={teacher}", "--keep-old-logit-l2=0.1")
    code, found, err = ask(capsys, *words, "--math-logits-dir=gs://nowhere/math", "--block-size=128")
    assert code == 0
    assert found["verdict"]["fits"] is True
    assert found["measured"] is False
    assert found["choices"]["grad_checkpoint"]["value"] == "false"
    assert sum(found["prediction"]["consumers"].values()) == found["prediction"]["peak_bytes"]
    assert found["prediction"]["consumers"]["reference student"] > 0
    if not torch.cuda.is_available():
        assert found["available"] == {"kind": "cuda", "bytes": 22 * GIB, "origin": found["available"]["origin"]}
        assert "L4" in err
    for words_of_table in ("not measured", "peak, forward and loss", "loss buffers", "allowances", "yes, it fits"):
        assert words_of_table in err


def test_the_buffers_of_further_measures_are_counted(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a small student with a head as large as others' they are more than a step takes."""
    words = ("train", "--student=llama-test", f"--lm-teacher-id={teacher}", "--block-size=128")
    _, without, _ = ask(capsys, *words)
    _, found, err = ask(capsys, *words, "--eval-measures")
    assert without["prediction"]["peak_stage"] != found["prediction"]["peak_stage"] == "evaluation"
    assert found["prediction"]["peak_bytes"] > 1.05 * without["prediction"]["peak_bytes"]
    assert "peak, evaluation" in err


def test_the_readmes_command_says_that_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tmp_path / "teacher"  # what the hub would give
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(dict(LLAMA_3B.config)))
    words = shlex.split(readme.command("liquid memory", lm_teacher_id=teacher))
    code, found, _ = ask(capsys, *words[2:])
    assert code == 0
    assert found["prediction"]["peak_bytes"] / GIB == pytest.approx(15.10, rel=0.03)
    assert found["choices"]["loss_chunk_mib"]["value"] == "1024"
    assert found["choices"]["grad_checkpoint"]["value"] == "true"


def test_the_page_on_scaling_has_the_figures_of_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's second column; a parameter takes 4 bytes of gradient and twice as many of moments."""
    page = (readme.REPOSITORY / "docs" / "scaling.md").read_text()
    (command,) = [text for text in readme.commands(page) if text.startswith("liquid memory")]
    teacher = tmp_path / "config.json"
    teacher.write_text(json.dumps(dict(LLAMA_3B.config)))
    words = shlex.split(command.replace("meta-llama/Llama-3.2-3B", str(teacher)))
    _, found, _ = ask(capsys, *words[2:])
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    said = {row[0]: row[2] for row in rows if len(row) == 4}
    consumers = {name: size / GIB for name, size in found["prediction"]["consumers"].items()}
    weights = consumers["student weights"]
    expected = {
        "its weights": weights,
        "its gradients": weights,
        "its moments": 2 * weights,
        "the teacher's weights": consumers["teacher weights"],
        "activations": consumers["activations"],
        "buffers of the loss, the teacher's signal": consumers["loss buffers"] + consumers["teacher signal"],
        "at most at one time, with allowances": found["prediction"]["needed_bytes"] / GIB,
    }
    for name, value in expected.items():
        assert float(said[name]) == pytest.approx(value, rel=0.005), name
    assert float(said["parameters of the student"].removesuffix("M")) == pytest.approx(weights * GIB / 4e6, rel=0.005)


def test_models_that_are_dealt_out_are_divided_by_the_processes(
    teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "--student=llama-16m", f"--lm-teacher-id={teacher}", "--block-size=128", "--shard=full")
    code, _, err = ask(capsys, *words)
    assert code == 2
    assert "--shard=full: one process has nobody to share a model with" in err
    _, two, err = ask(capsys, *words, "--ranks=2", "--teacher_shard=full")
    assert "one of 2 processes" in err
    monkeypatch.setenv("WORLD_SIZE", "8")
    _, eight, _ = ask(capsys, *words, "--teacher_shard=full")
    for consumer in ("student weights", "optimizer moments"):
        parts = [found["prediction"]["consumers"][consumer] for found in (two, eight)]
        assert parts[0] == pytest.approx(4 * parts[1], rel=0.02)
    assert eight["prediction"]["needed_bytes"] < two["prediction"]["needed_bytes"]
    automatic = ("--batch_size=auto", f"--tokens_per_step={8 * 4 * 128}", "--gpu_memory=8GiB")
    code, found, _ = ask(capsys, *words, *automatic)
    assert (code, found["choices"]["batch_size"]["value"], found["choices"]["grad_accum"]["value"]) == (0, "4", "8")


def test_what_does_not_fit_ends_with_6_and_says_what_makes_it(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("anneal", "--student=llama-16m", f"--teacher_name={teacher}", "--grad_checkpoint=false")
    code, found, err = ask(capsys, *words, "--gpu_memory=600MiB")
    assert code == 6
    assert found["available"]["origin"] == "--gpu_memory"
    options = found["verdict"]["options"]
    assert options
    assert all(one["needed_bytes"] <= 600 * MIB for one in options)
    assert f"with {options[0]['change']} it does" in err
    for one in options:  # each does what it says
        changed = [word for word in words if word != "--grad_checkpoint=false"]
        if "grad_checkpoint" not in one["change"]:
            changed.append("--grad_checkpoint=false")
        code, again, _ = ask(capsys, *changed, *one["change"].split(), "--gpu_memory=600MiB")
        assert code == 0
        assert again["prediction"]["needed_bytes"] == one["needed_bytes"]
    code, found, err = ask(capsys, *words, "--gpu_memory=1MiB")
    assert code == 6
    assert found["verdict"]["options"] == []
    assert f"most is taken by {found['verdict']['largest']}" in err


def test_capture_is_asked_about_too(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, err = ask(capsys, "capture", f"--mc_teacher_id={teacher}", "--seq_len=64", "--gpu_memory=2GB")
    assert code == 0
    assert found["available"]["bytes"] == 2 * 10**9
    assert "measured on" in err  # the encoder is
    small, _, _ = ask(capsys, "capture", f"--mc_teacher_id={teacher}", "--codec=topk", "--gpu_memory=1MiB")
    assert small == 6


def test_the_batch_is_chosen_for_a_card_that_is_not_here(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("anneal", "--student=llama-16m", f"--teacher_name={teacher}", "--batch_size=auto")
    words = (*words, "--block_size=128", "--tokens_per_step=8192")
    sizes = []
    for memory in ("400MiB", "600MiB", "8GiB"):
        code, found, _ = ask(capsys, *words, f"--gpu_memory={memory}")
        assert code == 0
        choice = {name: one["value"] for name, one in found["choices"].items()}
        assert int(choice["batch_size"]) * int(choice["grad_accum"]) * 128 == 8192
        sizes.append(int(choice["batch_size"]))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 64


def test_a_student_is_a_model_a_checkpoint_or_a_folder(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert anneal(tiny, tmp_path / "run", **STEPS) == 0
    capsys.readouterr()
    peaks = []
    for words in (
        [f"--resume_gcs_uri={tmp_path / 'run' / 'last.pt'}"],
        [f"--resume_gcs_uri={tmp_path / 'run' / 'student'}"],
        [f"--student={tmp_path / 'run' / 'student'}"],
        [f"--student={tiny.root / 'gpt2.json'}"],
    ):
        code, found, _ = ask(
            capsys, "anneal", *words, f"--teacher_name={tiny.teacher}", "--block_size=32", "--gpu_memory=1"
        )
        assert code == 0
        peaks.append(found["prediction"]["peak_bytes"])
    assert max(peaks) <= 1.01 * min(peaks)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Did you mean train"),
        ([], "one of anneal, train, capture"),
        (["train", "--gpu_memory=lots"], "22GiB, 24GB or"),
        (["train", "--gpu_memory=22528"], "22528MiB"),
        (["train", "--gpu_memory=0"], "more than 0"),
        (["train", "--gpu_memry=1"], "Did you mean --gpu_memory"),
        (["anneal", "--student=llama-test"], "how large the vocabulary is"),
        (["anneal", "--student=no-such", "--teacher_name=/no/such"], "/no/such"),
        (["anneal", "--batch_size=auto"], "needs --tokens_per_step, which says how many tokens"),
        (["anneal", "--tokens_per_step=4096", "--batch_size=2"], "goes with --batch_size=auto: leave it out"),
        (["anneal", "--resume_gcs_uri=gs://b/x.zip", "--gpu_memory=1"], "--student"),
        (["capture"], "--mc_teacher_id is missing"),
    ],
)
def test_what_cannot_be_asked_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, err = ask(capsys, *words)
    assert code == 2
    assert message in err
    assert not found


def test_a_gpu_may_be_named_where_none_is(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--student=llama-test", f"--lm_teacher_id={teacher}", "--block_size=64"]
    _, unnamed, _ = ask(capsys, *words)
    for device in ("cuda", "cuda:3"):
        code, named, _ = ask(capsys, *words, f"--device={device}")
        assert code == 0
        assert named["prediction"] == unnamed["prediction"]


def test_a_teacher_counts_however_it_is_named(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--student=llama-test", "--block_size=64", "--gpu_memory=8GiB"]
    _, without, _ = ask(capsys, *words, f"--student={teacher}")
    code, named, _ = ask(capsys, *words, f"--lm_teacher_id={teacher}")
    assert code == 0
    for signal in (f"lm=online:{teacher}", f"essays=online:{teacher}"):
        assert ask(capsys, *words, f"--signal={signal}")[1]["prediction"] == named["prediction"]
    assert named["prediction"]["peak_bytes"] > without["prediction"]["peak_bytes"]
    _, stored, _ = ask(capsys, "capture", f"--mc_teacher_id={teacher}", "--signal=essays=anywhere", "--gpu_memory=8GiB")
    assert stored["prediction"]["peak_bytes"] > 0


def test_a_micro_batch_beyond_reason_is_refused_at_once(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--student=llama-test", f"--lm_teacher_id={teacher}", "--batch_size=100000", "--block_size=512"]
    code, _, err = ask(capsys, *words)
    assert code == 2
    assert "51,200,000 tokens" in err


def test_a_resumed_folder_that_is_damaged_is_refused_in_words(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("not json")
    code, _, err = ask(capsys, "train", f"--lm_teacher_id={teacher}", f"--resume_gcs_uri={tmp_path}")
    assert code == 2
    assert "no configuration of a student" in err


def test_help_of_a_job_has_its_options_and_the_memory() -> None:
    for face in ("train", "anneal", "capture"):
        done = subprocess.run(
            [sys.executable, "-m", "liquid_llm", "memory", face, "--help"], capture_output=True, text=True, check=True
        )
        assert "--gpu_memory" in done.stdout
        assert "--teacher_precision" in done.stdout


# ------------------------------------------------------------------------------------------------- choices of a run


def cards(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda device, held=0: nbytes)


def test_a_run_decides_its_batch_keeps_it_and_goes_on_with_it_on_another_card(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**STEPS, "batch_size": "auto", "tokens_per_step": 8 * 32}
    whole, half = tmp_path / "whole", tmp_path / "half"
    cards(monkeypatch, 4 * MIB)
    assert anneal(tiny, whole, **options) == 0
    decided = metadata(whole)["run"]["decided"]
    assert decided["batch_size"] * decided["grad_accum"] == 8
    assert decided["batch_size"] < 8
    assert metadata(whole)["grad_accum"] == decided["grad_accum"]
    assert {row["tokens"] for row in rows(whole)} == {8 * 32}

    as_of(whole, 2, half)
    cards(monkeypatch, 64 * GIB)  # where all eight would fit at once
    assert anneal(tiny, half, **options) == 0
    assert metadata(half)["run"]["decided"] == decided
    assert "as the run began" in caplog.text
    assert [without_timings(row) for row in rows(half)] == [without_timings(row) for row in rows(whole)]
    final = [torch.load(run / "final.pt", weights_only=True)["student"] for run in (whole, half)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_checkpointing_is_taken_where_it_is_needed_and_changes_no_loss(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deep = json.loads((tiny.root / "llama.json").read_text())
    student = tmp_path / "deep.json"
    student.write_text(json.dumps({**deep, "num_hidden_layers": 6}))
    losses = []
    for memory, expected in ((64 * GIB, False), (3 * MIB, True)):
        cards(monkeypatch, memory)
        run = tmp_path / str(memory)
        assert anneal(tiny, run, student=student, **STEPS) == 0
        assert metadata(run)["run"]["decided"] == {"grad_checkpoint": expected}
        losses.append([row["loss"] for row in rows(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "grad_checkpoint true" in caplog.text


def test_one_line_says_whether_a_run_fits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for memory, words in ((64 * GIB, "yes, it fits"), (MIB, "no, it does not fit")):
        caplog.clear()
        cards(monkeypatch, memory)
        assert anneal(tiny, tmp_path / str(memory), **{**STEPS, "train_steps": 1}) == 0
        lines = [record.message for record in caplog.records if record.message.startswith("memory:")]
        assert len(lines) == 1
        assert words in lines[0]
        assert "4 x 32 tokens, online teacher" in lines[0]


# ------------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_says_the_same_as_a_table_and_as_json(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"train_steps": 1000, "dry_run": "true", "price_per_hour": 3600, "eval_every": 100, "save_every": 500}
    assert anneal(tiny, tmp_path / "run", **options) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    timed, remaining = found["timed_step"], found["time_to_the_end"]
    assert timed["tokens"] == 4 * 32
    assert (remaining["steps"], remaining["evaluations"], remaining["saves"]) == (1000, 11, 2)
    assert remaining["training_seconds"] == pytest.approx(1000 * timed["seconds"])
    assert remaining["evaluation_seconds"] == pytest.approx(11 * found["evaluation_seconds"])
    assert found["cost"]["whole_run"] == pytest.approx(remaining["seconds"])  # a unit a second
    assert found["memory"]["verdict"]["fits"] is True
    assert found["device_peak_memory_bytes"] is None  # the CPU's own tensors are not counted apart
    for words in (
        "dry run",
        "first step",
        "yes, it fits",
        "worked out, not measured",
        "to the end",
        "cost",
        "1,000 steps",
    ):
        assert words in err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_on_an_accelerator_measures_beside_what_it_predicts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: Any
) -> None:
    options = {"dry_run": "true", "device": accelerator.device.type, "precision": "float32"}
    assert anneal(tiny, tmp_path / "run", **options) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["device_peak_memory_bytes"] > 0
    assert "predicted" in err
    assert found["memory"]["device"] == accelerator.device.type
    assert found["memory"]["available_bytes"] <= accelerator.memory.total


def test_a_dry_run_goes_on_from_the_checkpoint_that_the_run_would_go_on_from(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**STEPS, "batch_size": "auto", "tokens_per_step": 128, "block_size": 32}
    cards(monkeypatch, GIB)
    assert anneal(tiny, tmp_path / "run", **given) == 0
    capsys.readouterr()
    cards(monkeypatch, 20 * GIB)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    assert anneal(tiny, tmp_path / "run", **{**given, "train_steps": 6}, dry_run=True) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert found["starts_from"]["kind"] == "continue"
    assert found["starts_from"]["step"] == 4
    assert found["choices"]["batch_size"]["reason"] == "as the run began"
    assert found["time_to_the_end"]["steps"] == 2
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_the_price_goes_with_a_dry_run_alone(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anneal(tiny, tmp_path / "run", price_per_hour=1) == 2
    assert "--dry_run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
