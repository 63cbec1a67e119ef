"""Run directories as real runs write them, from closed formulas and seeded noise, for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from liquid_llm.provenance import write_provenance

STARTED = datetime(2026, 11, 22, 9, 30, 0, tzinfo=timezone.utc)
SHARES = {"lm": 0.5, "math_tool": 0.3, "code": 0.2}
FLOORS = {"lm": 3.3, "math_tool": 1.1, "code": 1.9}


def make_run(
    run_dir: Path,
    *,
    steps: int = 600,
    every: int = 2,
    eval_every: int = 60,
    context_lengths: Sequence[int] = (128, 256, 512),
    types: Sequence[str] = ("lm", "math_tool", "code"),
    finished: bool = True,
    with_summary: bool = True,
    with_provenance: bool = True,
    seed: int = 0,
) -> Path:
    """Write a run directory and return it.

    Args:
        run_dir: where.
        steps, every: optimizer steps, and steps between two train rows.
        eval_every: steps between evaluations, 0 for none.
        context_lengths: lengths evaluated beside the training length.
        types: types of the mixture.
        finished: whether ``final.pt`` is there.
        with_summary, with_provenance: whether those files are there.
        seed: of the noise.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    rows = [train_row(step, steps, types, noise) for step in range(every, steps + 1, every)]
    if eval_every:
        rows += [eval_row(step, steps, types, context_lengths) for step in range(0, steps + 1, eval_every)]
    rows.sort(key=lambda row: (row["step"], row["kind"] == "eval"))
    write_rows(run_dir, rows)
    write_checkpoints(run_dir, steps, finished)
    if with_provenance:
        _write_provenance(run_dir, steps, types)
    if with_summary:
        (run_dir / "summary.json").write_text(json.dumps(_summary(types)), encoding="utf-8")
    return run_dir


def write_rows(run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def _loss(kind: str, step: float, steps: int, context: int = 256) -> float:
    floor = FLOORS.get(kind, 2.5) * (1 + 0.06 * math.log2(256 / context))
    return floor + (10.8 - floor) * math.exp(-6 * (step / steps) ** 0.6)


def _kd(kind: str, step: float, steps: int) -> float:
    return 0.35 + 6.5 * math.exp(-5 * (step / steps) ** 0.55) * (1.2 if kind == "lm" else 0.9)


def train_row(step: int, steps: int, types: Sequence[str], noise: np.random.Generator) -> dict[str, Any]:
    """A ``train`` row as ``StepAccumulator`` and the loop make it."""
    by_type = {
        kind: {
            "ce": _loss(kind, step, steps) * float(noise.normal(1, 0.04)),
            "kd": _kd(kind, step, steps) * float(noise.normal(1, 0.06)),
            "tokens": int(2304 * SHARES.get(kind, 0.1)),
            "kd_coverage": 1.0 if kind == "lm" else float(noise.uniform(0.9, 1.0)),
        }
        for kind in types
    }
    total = sum(SHARES.get(kind, 0.1) for kind in types)
    ce = sum(SHARES.get(kind, 0.1) * one["ce"] for kind, one in by_type.items()) / total
    kd = sum(SHARES.get(kind, 0.1) * one["kd"] for kind, one in by_type.items()) / total
    alpha = 0.7 - 0.3 * min(1.0, step / (0.3 * steps))
    seconds = float(noise.normal(4.6, 0.35)) * (1.8 if step % 97 == 0 else 1.0)
    tokens = sum(one["tokens"] for one in by_type.values())
    warmup = max(1, steps // 10)
    lr = 2e-3 * (
        step / warmup
        if step < warmup
        else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))
    )
    return {
        "kind": "train",
        "step": step,
        "loss": alpha * 4.0 * kd * 0.5 + (1 - alpha) * ce,
        "ce": ce,
        "kd": kd,
        "l2": 0.02 * step / steps,
        "tokens": tokens,
        "kd_coverage": sum(SHARES.get(kind, 0.1) * one["kd_coverage"] for kind, one in by_type.items()) / total,
        "kd_alpha": alpha,
        "kd_temperature": 2.0,
        "l2_gamma": max(0.0, 0.1 * (1 - 2 * step / steps)),
        "lr": lr,
        "grad_norm": float(noise.lognormal(0.0, 0.35)) * (1 + 6 * math.exp(-20 * step / steps)),
        "tokens_seen": step * 2304,
        "signal_wait_seconds": abs(float(noise.normal(0.02, 0.02))),
        "peak_memory_bytes": int(2.1e9 + 5e8 * (1 - math.exp(-30 * step / steps))),
        "rss_bytes": int(1.9e9 + 2e8 * float(noise.uniform())),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding_share": abs(float(noise.normal(0.03, 0.01))),
        "by_type": by_type,
    }


def eval_row(step: int, steps: int, types: Sequence[str], context_lengths: Sequence[int]) -> dict[str, Any]:
    """An ``eval`` row as the evaluator makes it."""
    losses = {kind: _loss(kind, step, steps) + 0.08 for kind in types}
    mean = sum(losses.values()) / len(losses)
    row: dict[str, Any] = {
        "kind": "eval",
        "step": step,
        "val_loss_student": mean,
        "val_ppl_student": math.exp(mean),
        "val_kd": sum(_kd(kind, step, steps) * 1.05 for kind in types) / len(types),
        "val_loss_teacher": 2.41,
        "by_type": {
            kind: {"val_loss": losses[kind], "val_kd": _kd(kind, step, steps) * 1.05, "positions": 2048}
            for kind in types
        },
        "eval_seconds": 7.5,
    }
    for length in context_lengths:
        row[f"val_loss_student@{length}"] = sum(_loss(kind, step, steps, length) for kind in types) / len(types)
        row[f"val_loss_teacher@{length}"] = 2.41 * (1 + 0.03 * math.log2(256 / length))
    return row


def write_checkpoints(run_dir: Path, steps: int, finished: bool) -> None:
    """Sidecars as the checkpoint store writes them, beside small data files."""
    marks = [(f"step-{steps // 2:08d}", steps // 2), ("best", steps - 60), ("last", steps)]
    if finished:
        marks.append(("final", steps))
    for name, step in marks:
        data = f"{name} at {step}".encode() * 4096
        (run_dir / f"{name}.pt").write_bytes(data)
        metadata = {
            "format_version": 1,
            "step": step,
            "tokens_seen": step * 2304,
            "block_size": 256,
            "kd_alpha": 0.4,
            "kd_temperature": 2.0,
            "lr": 2.1e-4,
            "best_val_loss": 2.3478912,
            "created": (STARTED + timedelta(seconds=5 * step)).isoformat(timespec="seconds"),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        (run_dir / f"{name}.meta.json").write_text(json.dumps(metadata), encoding="utf-8")


def _write_provenance(run_dir: Path, steps: int, types: Sequence[str]) -> None:
    write_provenance(
        run_dir,
        config={
            "face": "train",
            "seed": 1234,
            "dry_run": False,
            "student": {"spec": "liquid-16m", "resume_uri": None, "rope_scale": None, "precision": "auto"},
            "teacher": {"online_id": "/demo/teacher", "stored_id": "/demo/teacher", "hybrid": True, "mode": "online"},
            "data": {"batch_size": 3, "block_size": 256, "manifest": "/demo/data/manifest.jsonl", "val_fraction": 0.05},
            "objective": {"temperature": 2.0, "alpha_start": 0.7, "alpha_end": 0.4, "anneal_share": 0.3},
            "optimizer": {"steps": steps, "lr": 2e-3, "warmup_steps": steps // 10, "betas": [0.9, 0.95]},
            "evaluation": {"every_steps": 60, "context_lengths": [128, 256, 512], "max_tokens": 2048},
            "output": {"uri": "/demo/runs", "save_every_steps": steps // 2, "keep_last": 3},
        },
        manifest=[
            {"path": f"/demo/data/{kind}-*.jsonl", "type": kind, "weight": SHARES.get(kind, 0.1)} for kind in types
        ],
        readiness={
            "types": {
                kind: {
                    "train_samples": 570,
                    "train_tokens": 104_201,
                    "validation_samples": 30,
                    "validation_tokens": 5_480,
                }
                for kind in types
            },
            "signal": {kind: {"found": 220, "missing": 0, "stale": 0} for kind in types if kind != "lm"},
        },
        datasets={"name": None, "config": None},
        choices={
            "device": {"value": "cpu", "reason": "torch sees no GPU"},
            "student_dtype": {"value": "float32", "reason": "this CPU has no AMX: float32 is the faster"},
            "attention": {"value": "sdpa", "reason": "no CUDA device for FlashAttention"},
        },
        extra={"parameters": 15_812_352, "start": {"kind": "fresh", "source": None, "step": 0}},
        argv=[
            "liquid",
            "train",
            "--student=liquid-16m",
            "--dataset_manifest=/demo/data/manifest.jsonl",
            "--max_steps=600",
        ],
        environ={"OMP_NUM_THREADS": "2"},
        now=STARTED,
    )


def _summary(types: Sequence[str]) -> dict[str, Any]:
    return {
        "rows": [
            {
                "type": kind,
                "val_loss_before": 10.81,
                "val_loss_after": FLOORS.get(kind, 2.5) + 0.1,
                "val_kd_before": 7.9,
                "val_kd_after": 0.41,
            }
            for kind in types
        ],
        "bytes_per_token": 98_312.4,
        "tokens_per_second": 498.2,
        "peak_memory_bytes": 2_600_000_000,
        "seconds": 301.0,
        "sample": {
            "prompt": "Question: A baker fills 12 trays with 7 rolls each. How many rolls is that?\nAnswer:",
            "text": " There are 12*7=<<12*7=84>>84 rolls.\n#### 84",
        },
    }
