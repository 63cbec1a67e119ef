"""Every command on the device, beside the same command on the CPU; arithmetic is float32 on both.

On the pretend accelerator numbers differ by nothing but the order of sums; a GPU's own kernels round otherwise.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import Tiny, words

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.training import Trainer

CODECS: dict[str, dict[str, object]] = {
    "tail": {"codec": "tail"},
    "full": {"codec": "full"},
    "topk": {"codec": "topk", "topk": 16},
    "sampled": {"codec": "sampled", "codec_options": "draws=32,temperature=2"},
}
FLOAT32 = {"precision": "float32", "teacher_precision": "float32"}
SHORT = {
    "max_steps": 4,
    "lr": 1e-3,
    "eval_every": 2,
    "save_every": 2,
    "eval_tokens": 512,
    "seed": 3,
    "kd_temperature": 2,
    **FLOAT32,
}
LOSSES = ("loss", "ce", "kd", "l2", "grad_norm", "val_loss_student", "val_kd", "val_loss_teacher")
TOLERANCE = {"cuda": 3e-4}


def capture(tiny: Tiny, codec: str, folder: Path, device: object, **options: object) -> int:
    given = {**CODECS[codec], "device": device, "teacher_precision": "float32", **options}
    stores = {"math_logits_dir": folder / "math", "code_logits_dir": folder / "code"}
    return main(["capture", *tiny.capture_words(**stores, **given)])


@pytest.fixture(scope="session")
def store(tiny: Tiny, device: torch.device) -> dict[str, object]:
    """Signal captured on the CPU, which all runs read."""
    folder = tiny.root / "store"
    assert capture(tiny, "topk", folder, "cpu") == 0
    return {"math_logits_dir": folder / "math", "code_logits_dir": folder / "code"}


def train(tiny: Tiny, output: Path, device: object, **options: object) -> Path:
    """A run of four steps; its directory."""
    assert main(["train", *tiny.train_words(output, **{**SHORT, "device": device, **options})]) == 0
    return output / "run"


def losses(run: Path) -> dict[tuple[str, int, str], float]:
    """Every loss of a run by kind of row, step and name, those by type and length included."""
    found: dict[tuple[str, int, str], float] = {}

    def take(row: dict[str, Any], kind: str, step: int, prefix: str = "") -> None:
        for name, value in row.items():
            if isinstance(value, dict):
                take(value, kind, step, f"{prefix}{name}.")
            elif isinstance(value, float) and name.partition("@")[0] in LOSSES:
                found[kind, step, prefix + name] = value

    for row in read_metrics(run):
        take(row, row["kind"], row["step"])
    assert {kind for kind, _, _ in found} == {"train", "eval"}
    return found


def assert_same_losses(expected: Path, got: Path, device: torch.device) -> float:
    """The same losses everywhere, up to rounding; returns the largest relative difference."""
    one, other = losses(expected), losses(got)
    assert one.keys() == other.keys()
    tolerance = TOLERANCE.get(device.type, 1e-5)
    apart = {key: abs(value - other[key]) / max(abs(value), 1e-2) for key, value in one.items()}
    worst = max(apart, key=lambda key: apart[key])
    assert apart[worst] < tolerance, f"{worst}: {one[worst]} and {other[worst]}"
    return apart[worst]


NO_STORE = {"hybrid": "false", "mc_teacher_id": None, "math_logits_dir": None, "code_logits_dir": None}
RUNS: dict[str, dict[str, object]] = {
    "no teacher": {**NO_STORE, "lm_teacher_id": None, "hybrid": None},
    "online teacher": {**NO_STORE, "lm_teacher_id": "TEACHER"},
    "online and stored, L2, checkpointing, three micro-batches, several lengths": {
        "keep_old_logit_l2": 0.5,
        "keep_old_logit_l2_fade_step": 3,
        "resume_gcs_uri": "TEACHER",
        "student": None,
        "grad_checkpoint": "true",
        "grad_accum": 3,
        "eval_ctx_lens": "16,32",
    },
}


def manifest_of_texts(tiny: Tiny) -> Path:
    """The manifest without the types that want stored signal."""
    manifest = tiny.root / "texts_alone.jsonl"
    manifest.write_text("".join(line for line in tiny.manifest.read_text().splitlines(True) if '"lm"' in line))
    return manifest


@pytest.mark.parametrize("kind", RUNS)
def test_training_gives_the_losses_of_the_cpu(tiny, store, device, tmp_path, kind, record_property):
    given = {**store, **RUNS[kind]}
    given = {name: tiny.teacher if value == "TEACHER" else value for name, value in given.items()}
    if kind == "no teacher":
        given["student"] = tiny.teacher  # a shape alone has no tokenizer
        given["dataset_manifest"] = manifest_of_texts(tiny)
    expected, got = (train(tiny, tmp_path / str(one).split(":")[0], one, **given) for one in ("cpu", device))
    record_property("largest difference", f"{assert_same_losses(expected, got, device):.1e}")


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_is_captured_verified_and_trained_on(tiny, device, tmp_path, capsys, codec, record_property):
    assert capture(tiny, codec, tmp_path, device, logits_format="shards") == 0
    capsys.readouterr()
    given = [f"--teacher={tiny.teacher}", f"--manifest={tiny.manifest}", f"--data_cache={tiny.root / 'tokens'}"]
    given += ["--teacher_precision=float32", f"--device={device}", "--samples=8", "--json"]
    assert main(["store", "verify", str(tmp_path / "math"), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["looked_at"], found["agrees"]) == (8, True)
    record_property("identical of 8", found["identical"])
    stores = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    run = train(tiny, tmp_path / "run", device, max_steps=2, hybrid="false", teacher_mode="precomputed", **stores)
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    shares = [part["kd_coverage"] for row in rows for kind, part in row["by_type"].items() if kind != "lm"]
    assert all(share == 1.0 for share in shares)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_bfloat16_is_near_float32(tiny, store, device, tmp_path, record_property):
    precise = train(tiny, tmp_path / "float32", device, **store)
    coarse = train(tiny, tmp_path / "bfloat16", device, **store, precision="bfloat16", teacher_precision="bfloat16")
    one, other = losses(precise), losses(coarse)
    apart = max(abs(value - other[key]) / max(abs(value), 0.1) for key, value in one.items() if key[2] != "grad_norm")
    record_property("largest difference", f"{apart:.1e}")
    assert 0.0 < apart < 0.03


def weights_whole_and_in_two_parts(tiny: Tiny, store: Any, device: Any, folder: Path, monkeypatch: Any, **options: Any):
    """The weights at the end of a run, and of the same run stopped after two steps and gone on with."""
    given = {**SHORT, **store, "grad_accum": 2, "device": device, **options}
    given |= {"precision": "bfloat16", "teacher_precision": "bfloat16"}
    assert main(["train", *tiny.train_words(folder / "whole", **given)]) == 0
    step = Trainer.step

    def stop_after_two(trainer: Trainer) -> object:
        result = step(trainer)
        trainer.stopping = lambda: result.step == 2
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stop_after_two)
        assert main(["train", *tiny.train_words(folder / "parts", **given)]) == 75
    assert main(["train", *tiny.train_words(folder / "parts", **given)]) == 0
    return [torch.load(folder / name / "run" / "final.pt", weights_only=True)["student"] for name in ("whole", "parts")]


def test_a_deterministic_run_in_two_parts_has_the_bits_of_the_run_in_one(tiny, store, device, tmp_path, monkeypatch):
    one, other = weights_whole_and_in_two_parts(tiny, store, device, tmp_path, monkeypatch, deterministic="true")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_deterministic_it_is_near(tiny, store, card, tmp_path, monkeypatch, record_property):
    one, other = weights_whole_and_in_two_parts(tiny, store, card, tmp_path, monkeypatch)
    apart = max(float((value - other[name]).abs().max()) for name, value in one.items())
    moved = max(float(value.abs().max()) for value in one.values())
    record_property("largest difference of a weight", f"{apart:.1e}")
    assert apart < 1e-2 * moved


def test_a_dry_run_looks_at_the_device(tiny, store, device, tmp_path, capsys):
    capsys.readouterr()
    given = {**SHORT, **store, "device": device}
    assert main(["train", *tiny.train_words(tmp_path / "none", **given), "--dry_run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert math.isfinite(found["one_step"]["loss"])
    assert not (tmp_path / "none").exists()


def test_annealing_with_a_change_of_context_gives_the_losses_of_the_cpu(tiny, device, tmp_path, record_property):
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = (tiny.root / "lm.jsonl").read_text().splitlines(keepends=True)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.jsonl").write_text("".join(rows[:48]))
    (texts / "validation.jsonl").write_text("".join(rows[48:]))
    for one in ("cpu", device):
        folder = tmp_path / str(one).split(":")[0]
        common = {"teacher_name": tiny.teacher, "dataset_name": texts, "data_cache": tiny.root / "tokens", "lr": 1e-3}
        common |= {"batch_size": 4, "warmup_steps": 2, "log_interval": 1, "eval_every": 2, "save_every": 2, **FLOAT32}
        common |= {"eval_tokens": 512, "device": one}
        begun = {**common, "student": tiny.student, "block_size": 16, "train_steps": 2, "output_gcs_uri": folder / "a"}
        assert main(["anneal", *words(begun)]) == 0
        longer = {
            **common,
            "block_size": 64,
            "train_steps": 4,
            "eval_ctx_lens": "16,32",
            "output_gcs_uri": folder / "b",
        }
        longer |= {"resume_gcs_uri": folder / "a" / "last.pt", "reset_optim_on_ctx_change": "true"}
        assert main(["anneal", *words(longer)]) == 0
    there = tmp_path / str(device).split(":")[0]
    record_property("largest difference", f"{assert_same_losses(tmp_path / 'cpu' / 'b', there / 'b', device):.1e}")
