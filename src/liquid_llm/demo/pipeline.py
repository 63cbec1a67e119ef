"""``liquid demo``: teacher, data, capture, hybrid training, evaluation and report, by the same code every user runs.

Nothing here is special to the demo but its sizes: capture and training get the options a person would type.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquid_llm.config import build_capture_config, build_run_config
from liquid_llm.demo.data import make_demo_data
from liquid_llm.formatting import format_bytes, format_change, format_count, format_seconds
from liquid_llm.jobs.capture import capture_signal, exit_code
from liquid_llm.jobs.train import run_training
from liquid_llm.metrics import read_metrics
from liquid_llm.models.loading import quiet_transformers, unpack
from liquid_llm.options import TRAIN
from liquid_llm.report import build_report
from liquid_llm.runtime import process_peak_memory_bytes
from liquid_llm.terminal import print_facts, setup_logging
from liquid_llm.wiring.places import resolve_place

log = logging.getLogger(__name__)

PROMPT = "Question: A baker fills 12 trays with 7 rolls each. How many rolls is that?\nAnswer:"
NUM_CODE, NUM_MATH, NUM_LM = 90, 180, 400
STEPS = 110


def run_demo(directory: str, teacher: str, student: str, scale: float, seed: int) -> int:
    """Run every stage; a second call goes on where the first stopped, or shows its result again.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    began = time.monotonic()
    base = Path(directory).resolve()
    log.info("1/5 teacher: %s", teacher)
    teacher_dir = str(unpack(teacher, base / "teacher", torch.bfloat16))
    log.info("2/5 data: Python's documentation, standard library and a generator of word problems")
    manifest = make_demo_data(
        base / "data",
        seed=seed,
        num_lm=_scale(NUM_LM, scale),
        num_code=_scale(NUM_CODE, scale),
        num_math=_scale(NUM_MATH, scale),
    )
    log.info("3/5 capture: the teacher's signal for maths and code")
    common: dict[str, object] = {
        "mc_teacher_id": teacher_dir,
        "dataset_manifest": manifest,
        "math_logits_dir": str(base / "signal" / "math"),
        "code_logits_dir": str(base / "signal" / "code"),
        "data_cache": str(base / "tokens"),
    }
    captured = capture_signal(build_capture_config({**common, "seq_len": 256, "batch_size": 8}), "shards")
    if captured.written:
        (base / "capture.json").write_text(json.dumps(captured.as_dict(), indent=1), encoding="utf-8")
    if code := exit_code(captured):
        return code
    log.info("4/5 training and 5/5 evaluation: %s", student)
    steps = _scale(STEPS, scale)
    options = {
        **common,
        "student": student,
        "lm_teacher_id": teacher_dir,
        "output_gcs_uri": str(base / "runs"),
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
    if code := run_training(TRAIN, options):
        return code
    run_dir = resolve_place(build_run_config(TRAIN, options)).run_dir
    summary = _summary(run_dir, base, time.monotonic() - began)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print_summary(summary, {"run": run_dir, "report": build_report(run_dir)})
    return 0


def _scale(count: int, scale: float) -> int:
    return max(8, round(count * scale))


def _summary(run_dir: Path, base: Path, seconds: float) -> dict[str, Any]:
    """What ``summary.json`` holds, and the table at the end shows."""
    rows = read_metrics(run_dir)
    first, *_, last = (row["by_type"] for row in rows if row["kind"] == "eval")
    trained = [row for row in rows if row["kind"] == "train"]
    said = base / "capture.json"  # by the capture that wrote the signal: a second demo finds it written
    captured = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
    losses = [
        {
            "type": type,
            **{f"{name}_before": first[type][name] for name in ("val_loss", "val_kd")},
            **{f"{name}_after": values[name] for name in ("val_loss", "val_kd")},
        }
        for type, values in last.items()
    ]
    return {
        "rows": losses,
        "bytes_per_token": captured.get("bytes_per_token"),
        "tokens_per_second": sum(r["tokens"] for r in trained) / sum(r["seconds"] for r in trained),
        "peak_memory_bytes": max(process_peak_memory_bytes() or 0, *(r.get("peak_memory_bytes") or 0 for r in trained)),
        "device_peak_memory_bytes": max((r.get("device_peak_memory_bytes") or 0 for r in trained), default=0) or None,
        "sample": _generate(run_dir / "student", PROMPT),
        "seconds": seconds,
    }


def _generate(folder: Path, prompt: str) -> dict[str, str]:
    """What the finished student writes, greedily: read back from disk as a user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad(), quiet_transformers():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=0
        )
    return {"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}


def print_summary(summary: dict[str, Any], paths: dict[str, Path]) -> None:
    """Show what was reached on standard output: losses and KL by type, what it cost, a sample, where to look."""
    console = Console(highlight=False)
    title = "validation, nats a token: loss, and KL divergence from the teacher"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("type")
    for name in ("loss before", "after", "change", "KL before", "after", "change"):
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        cells = [Text(row["type"])]
        for name in ("val_loss", "val_kd"):
            before, after = row[f"{name}_before"], row[f"{name}_after"]
            change = format_change(before, after)
            cells += [Text(f"{before:.3f}"), Text(f"{after:.3f}"), Text(change, "green" if change[0] == "−" else "")]
        table.add_row(*cells)
    console.print(table)
    facts = {
        "stored signal": summary["bytes_per_token"] and f"{summary['bytes_per_token']:,.1f} bytes a token",
        "speed": f"{format_count(summary['tokens_per_second'])} real tokens a second",
        "peak device memory": summary["device_peak_memory_bytes"] and format_bytes(summary["device_peak_memory_bytes"]),
        "peak host memory": format_bytes(summary["peak_memory_bytes"]),
        "time": format_seconds(summary["seconds"]),
        **{name: str(path) for name, path in paths.items()},
    }
    print_facts("", [(name, text) for name, text in facts.items() if text], console)
    prompt, said = summary["sample"]["prompt"], summary["sample"]["text"].rstrip()
    text = said or " (line ends alone: so small a student has not learnt to answer in so few steps)"
    console.print(Text(f"\nsample\n{prompt}", style="dim"), Text(text), sep="")
