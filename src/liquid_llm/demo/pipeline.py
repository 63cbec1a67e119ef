"""``liquid demo``: teacher, data, capture, hybrid training, evaluation and report, by the same code every user runs.

Nothing here is special to the demo but its sizes: capture and training get the options a person would type.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from liquid_llm.config import build_capture_config, build_run_config
from liquid_llm.demo.data import make_demo_data
from liquid_llm.errors import UsageError
from liquid_llm.jobs.capture import capture_signal
from liquid_llm.jobs.train import run_training
from liquid_llm.metrics import read_metrics
from liquid_llm.models.loading import quiet_transformers, unpack
from liquid_llm.options import TRAIN
from liquid_llm.report import build_report
from liquid_llm.runtime import process_peak_memory_bytes
from liquid_llm.terminal import print_summary, setup_logging
from liquid_llm.wiring.places import resolve_place

log = logging.getLogger(__name__)

PROMPT = "Question: A baker fills 12 trays with 7 rolls each. How many rolls is that?\nAnswer:"
NUM_CODE, NUM_MATH, NUM_LM = 90, 180, 400
STEPS = 110


def run_demo(directory: str, teacher: str, student: str, scale: float, seed: int) -> int:
    """Run every stage; a second call goes on where the first stopped, or shows its result again.

    Args:
        directory: where the teacher, data, signal and run go.
        teacher: model id of the teacher.
        student: preset of the student.
        scale: size of data and training against the usual.
        seed: of data, initial weights and order.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    if not scale > 0:
        raise UsageError("must be positive", where="--scale", got=scale)
    began = time.monotonic()
    base = Path(directory).resolve()
    log.info("1/5 teacher: %s", teacher)
    teacher_dir = str(unpack(teacher, base / "teacher", torch.bfloat16))
    log.info("2/5 data: Python's documentation, standard library and a generator of word problems")
    manifest = make_demo_data(
        base / "data",
        seed=seed,
        num_lm=_scaled(NUM_LM, scale),
        num_code=_scaled(NUM_CODE, scale),
        num_math=_scaled(NUM_MATH, scale),
    )
    log.info("3/5 capture: the teacher's signal for maths and code")
    capture_options = _capture_options(base, teacher_dir, str(manifest))
    capture_signal(build_capture_config(capture_options))
    log.info("4/5 training and 5/5 evaluation: %s", student)
    options = _train_options(base, teacher_dir, str(manifest), student, _scaled(STEPS, scale), seed)
    code = run_training(TRAIN, options)
    if code:
        return code
    run_dir = resolve_place(build_run_config(TRAIN, options)).run_dir
    summary = _summary(run_dir, base, time.monotonic() - began)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print_summary(summary, run_dir=run_dir, report=build_report(run_dir))
    return 0


def _scaled(count: int, scale: float) -> int:
    return max(8, round(count * scale))


def _capture_options(base: Path, teacher: str, manifest: str) -> dict[str, object]:
    return {
        "mc_teacher_id": teacher,
        "dataset_manifest": manifest,
        "math_logits_dir": str(base / "signal" / "math"),
        "code_logits_dir": str(base / "signal" / "code"),
        "seq_len": 256,
        "batch_size": 8,
        "data_cache": str(base / "tokens"),
    }


def _train_options(base: Path, teacher: str, manifest: str, student: str, steps: int, seed: int) -> dict[str, object]:
    return {
        "student": student,
        "lm_teacher_id": teacher,
        "mc_teacher_id": teacher,
        "math_logits_dir": str(base / "signal" / "math"),
        "code_logits_dir": str(base / "signal" / "code"),
        "dataset_manifest": manifest,
        "output_gcs_uri": str(base / "runs"),
        "data_cache": str(base / "tokens"),
        "block_size": 256,
        "batch_size": 3,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 10),
        "lr": 2e-3,
        "eval_every": 0,
        "eval_tokens": 2048,
        "save_every": max(1, steps // 2),
        "metrics_interval": max(1, steps // 30),
        "seed": seed,
    }


def _summary(run_dir: Path, base: Path, seconds: float) -> dict[str, Any]:
    rows = read_metrics(run_dir)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    trained = [row for row in rows if row["kind"] == "train"]
    before, after = evaluations[0]["by_type"], evaluations[-1]["by_type"]
    stored = sorted((base / "signal").glob("*/*.pt"))
    return {
        "rows": [_row(kind, before[kind], after[kind]) for kind in before],
        "bytes_per_token": _stored_bytes_per_token(run_dir, stored),
        "tokens_per_second": sum(r["tokens"] for r in trained) / sum(r["seconds"] for r in trained),
        "peak_memory_bytes": max(process_peak_memory_bytes() or 0, *(r.get("peak_memory_bytes") or 0 for r in trained)),
        "device_peak_memory_bytes": max((r.get("device_peak_memory_bytes") or 0 for r in trained), default=0) or None,
        "sample": _generate(run_dir / "student", PROMPT),
        "seconds": seconds,
    }


def _row(kind: str, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    return {
        "type": kind,
        "val_loss_before": before["val_loss"],
        "val_loss_after": after["val_loss"],
        "val_kd_before": before["val_kd"],
        "val_kd_after": after["val_kd"],
    }


def _stored_bytes_per_token(run_dir: Path, stored: list[Path]) -> float:
    from liquid_llm.signal_store.store import read_header

    tokens = sum(read_header(path).num_tokens for path in stored)
    return sum(path.stat().st_size for path in stored) / tokens


def _generate(folder: Path, prompt: str) -> dict[str, str]:
    """What the finished student writes, greedily: read back from disk as a user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), quiet_transformers():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=0
        )
    return {"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}
