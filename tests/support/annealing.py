"""Annealing small enough for seconds, by the real command line: learned positions, 32 tokens of context."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.models import tiny_config
from tests.support.tiny import VOCAB_SIZE, Tiny, build, words

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics

SCHEDULES = {"alpha_schedule": "0:0.7,4:0.5,20:0.3", "temp_schedule": "0:1.2,6:1.0"}


def make_world(root: Path) -> Tiny:
    """Teacher, texts in two splits and configurations of students (``gpt2.json``, ``llama.json``)."""
    tiny = build(root, teacher_steps=150)
    rows = (root / "lm.jsonl").read_text().splitlines(keepends=True)
    (root / "texts").mkdir()
    (root / "texts" / "train.jsonl").write_text("".join(rows[:48]))
    (root / "texts" / "validation.jsonl").write_text("".join(rows[48:]))
    for name in ("gpt2", "llama"):
        (root / f"{name}.json").write_text(tiny_config(name, VOCAB_SIZE).to_json_string())
    return tiny


def anneal(tiny: Tiny, output: Path | str | None, **options: object) -> int:
    """Run ``liquid anneal``; an option of None is left out. Returns the exit code."""
    return main(["anneal", *anneal_words(tiny, output, **options)])


def anneal_words(tiny: Tiny, output: Path | str | None, **options: object) -> list[str]:
    """Eight steps at 32 tokens, unless ``options`` say otherwise."""
    defaults = {
        "student": None if "resume_gcs_uri" in options else tiny.root / "gpt2.json",
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
    return words({**defaults, **options})


def short_run(tiny: Tiny, output: Path, **options: object) -> Path:
    """A finished run with schedules that reach past its end."""
    given = {"alpha": 0.7, "T": 1.2, "eval_ctx_lens": "32,64", "lr_peak": 2.7e-3, **SCHEDULES}
    assert anneal(tiny, output, **{**given, **options}) == 0
    return output


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def metadata(run: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"{name}.meta.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, byte for byte."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_of(run: Path, step: int, target: Path) -> Path:
    """A copy of ``run`` as if it had been killed after the snapshot of ``step``."""
    target.mkdir()
    for suffix in (".pt", ".meta.json"):
        shutil.copy(run / f"step-{step:08d}{suffix}", target)
    shutil.copy(run / "metrics.jsonl", target)
    return target
