"""``liquid demo``: a student cut from a teacher, trained with and without it for the same time, and judged.

Nothing here is special to the demo but its sizes: capture, training and evaluation get the options a person would type.

    before      the student as it is cut from the teacher
    distilled   trained on texts and on the teacher's stored signal of them
    plain       the same on the texts alone, for as long as capture and distilled training took together
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from liquid_llm import storage
from liquid_llm.checkpoint.store import CheckpointStore
from liquid_llm.config import build_capture_config, build_run_config
from liquid_llm.demo.data import DemoData, Sizes, make_demo_data
from liquid_llm.demo.judge import BEFORE, DISTILLED, PLAIN, judge_students
from liquid_llm.demo.result import print_first, print_summary, sentences
from liquid_llm.distributed import start_engine
from liquid_llm.errors import DataError, UsageError
from liquid_llm.jobs.capture import capture_signal, exit_code
from liquid_llm.jobs.prepare import find_run_data
from liquid_llm.jobs.train import run_training
from liquid_llm.metrics import read_metrics, seconds_of
from liquid_llm.models.export import save_student
from liquid_llm.models.loading import load_tokenizer, unpack
from liquid_llm.options import TRAIN
from liquid_llm.report import build_report
from liquid_llm.runtime import process_peak_memory_bytes
from liquid_llm.terminal import setup_logging
from liquid_llm.wiring.parts import build_basis, build_parts
from liquid_llm.wiring.places import resolve_place
from liquid_llm.wiring.start import find_start

log = logging.getLogger(__name__)

TRAIN_SIZES = Sizes(lm=70, math_tool=70, code=40)
HELD_SIZES = Sizes(lm=24, math_tool=32, code=16)
STEPS = 48  # of the distilled arm, 768 tokens each
PLAIN_PACE = 1.1  # steps that training without a signal takes in the time of one with it
ALPHA, ALPHA_OF_PROBLEMS = 0.7, 0.3  # the teacher gets every second problem wrong, the answers are all right
WINDOW = 256


def run_demo(directory: str, teacher: str, student: str | None, scale: float, seed: int) -> int:
    """Run every stage; a second call goes on where the first stopped, or shows its result again.

    Raises:
        LiquidError: any problem a user can cause.
    """
    setup_logging("INFO")
    began = time.monotonic()
    base = Path(directory).resolve()
    _require_same(base, {"teacher": teacher, "student": student, "scale": scale, "seed": seed})
    log.info("1/6 teacher: %s", teacher)
    teacher_dir = str(unpack(teacher, base / "teacher", torch.bfloat16))
    log.info("2/6 data: Python's documentation, standard library and a generator of word problems")
    data = make_demo_data(
        base / "data", seed=seed, train=_scaled(TRAIN_SIZES, scale), held_out=_scaled(HELD_SIZES, scale)
    )
    log.info("3/6 capture: what the teacher says to each text, stored")
    if code := _capture(base, teacher_dir, data):
        return code
    captured = _read(base / "capture.json")
    spec = student or f"from:{teacher_dir},layers={_four_fifths(teacher_dir)}"
    before = _cut(base, spec, data, seed)
    steps = _scale(STEPS, scale)
    log.info("4/6 distilled: %d steps on the texts and the teacher's signal", steps)
    if code := _train(base, DISTILLED, before, data, steps, seed):
        return code
    runs = {name: base / "runs" / name for name in (PLAIN, DISTILLED)}
    print_first(read_metrics(runs[DISTILLED]))
    seconds = captured["seconds"] + training_seconds(runs[DISTILLED])
    plain_steps = _decide(base / "plan.json", round(PLAIN_PACE * steps * seconds / training_seconds(runs[DISTILLED])))
    log.info("5/6 plain: the same student, %d steps on the texts alone: as much time as 3/6 and 4/6", plain_steps)
    if code := _train(base, PLAIN, before, data, plain_steps, seed):
        return code
    log.info("6/6 evaluation: both, the student before and the teacher, on texts that no training has seen")
    students = {BEFORE: before, **{name: str(run) for name, run in runs.items()}}
    summary = {
        **judge_students(students, teacher_dir, data, {"block_size": WINDOW, **_tokens(base)}),
        "training_seconds": {name: training_seconds(run) for name, run in runs.items()},
        "training_steps": {DISTILLED: steps, PLAIN: plain_steps},
        "capture": captured,
        "tokens_per_second": _rate(runs[DISTILLED]),
        "peak_memory_bytes": _peak(runs, "peak_memory_bytes", process_peak_memory_bytes() or 0),
        "device_peak_memory_bytes": _peak(runs, "device_peak_memory_bytes", 0) or None,
        "seconds": time.monotonic() - began,
    }
    summary["sentences"] = sentences(summary)
    run = runs[DISTILLED]
    (run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print_summary(summary, {"run": run, "student": run / "student", "report": build_report(run)})
    return 0


def _capture(base: Path, teacher_dir: str, data: DemoData) -> int:
    """Store the signal of all types; what it took is added up in ``capture.json``, as it may go on later.

    Raises:
        DataError: all of it was stored by a call that was killed before it could say what that took.
    """
    options: dict[str, object] = {
        "mc_teacher_id": teacher_dir,
        "dataset_manifest": data.manifest,
        "sources": {type: {"teacher": f"store:{base / 'signal' / type}"} for type in data.held_out},
        **_tokens(base),
        "seq_len": WINDOW,
        "batch_size": 8,
    }
    captured = capture_signal(build_capture_config(options), "shards")
    place = base / "capture.json"
    before = _read(place) if place.exists() else {}
    names = ("written", "tokens", "positions", "bytes", "seconds")
    # A call that stored nothing only looked at what is there.
    known = {name: before.get(name, 0) + (getattr(captured, name) if captured.written else 0) for name in names}
    unknown = captured.written + captured.skipped - known["written"]  # of calls that were killed
    if unknown > 0 and not known["written"]:
        raise DataError(
            "what the capture took is not known, so plain training cannot be given as long",
            where=base / "signal",
            remedy=f"remove {base} and run the demo again",
        )
    if unknown > 0:
        log.info("capture: what %d of the samples took is not known; it is taken to be as long as the others'", unknown)
        known["seconds"] *= 1 + unknown / known["written"]
        known["written"] += unknown
    _write(place, known)
    return exit_code(captured)


def _require_same(base: Path, asked: Mapping[str, object]) -> None:
    """Raise UsageError where a demo with other options was begun in this folder: its stages would be shown as these."""
    place = base / "asked.json"
    there = _read(place) if place.exists() else asked
    changed = [name for name in asked if asked[name] != there.get(name)]
    if changed:
        raise UsageError(
            "this folder has a demo that was begun with other options",
            where=base,
            got=", ".join(f"--{name}={asked[name]}" for name in changed),
            expected=", ".join(f"--{name}={there.get(name)}" for name in changed),
            remedy="name another --dir, or remove the folder",
        )
    _write(place, asked)


def _cut(base: Path, student: str, data: DemoData, seed: int) -> str:
    """The student that both arms begin with, as a Hugging Face folder; it is made once."""
    folder = base / "before"
    if not folder.exists():
        config = build_run_config(TRAIN, _options(base, BEFORE, student, data, 1, seed))
        with CheckpointStore(resolve_place(config).run_dir, keep_last=1, log=log.warning) as store:
            start = find_start(config, resolve_place(config), store)
        engine = start_engine()
        basis = build_basis(config, start, engine)
        parts = build_parts(basis, start, find_run_data(config.data).entries, engine)
        with closing(parts.teachers.router):
            save_student(parts.built.model, parts.text.student_tokenizer(), folder)
    return str(folder)


def _train(base: Path, name: str, student: str, data: DemoData, steps: int, seed: int) -> int:
    return run_training(TRAIN, _options(base, name, student, data, steps, seed))


def _options(base: Path, name: str, student: str, data: DemoData, steps: int, seed: int) -> dict[str, object]:
    def teach(type: str) -> dict[str, Any]:
        teacher = f"store:{base / 'signal' / type}" if name == DISTILLED else "none"
        own = {"alpha": ALPHA_OF_PROBLEMS} if type == "math_tool" else {}
        return {"teacher": teacher, "layout": "windows" if type == "lm" else "samples", **own}

    return {
        "student": student,
        "mc_teacher_id": str(base / "teacher"),
        "dataset_manifest": data.manifest,
        "sources": {type: teach(type) for type in data.held_out},
        **_tokens(base),
        "output_gcs_uri": str(base / "runs"),
        "run_id": name,
        "block_size": WINDOW,
        "batch_size": 3,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 8),
        "lr": 5e-4,
        "kd_temperature": 1.0,
        "kd_alpha_start": ALPHA,
        "kd_alpha_end": ALPHA,
        "eval_every": max(1, steps // 4),  # five points: of two or three a plot shows no course
        "eval_tokens": 768,
        "save_every": max(1, steps // 2),
        "metrics_interval": max(1, steps // 30),
        "seed": seed,
    }


def training_seconds(run: Path) -> float:
    """What the steps of a run took."""
    return float(sum(seconds_of(row) or 0.0 for row in read_metrics(run) if row["kind"] == "train"))


def _rate(run: Path) -> float:
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    return float(sum(row["positions"] for row in rows) / training_seconds(run))


def _peak(runs: Mapping[str, Path], name: str, least: float) -> float:
    return max([least, *(row.get(name) or 0 for run in runs.values() for row in read_metrics(run))])


def _decide(place: Path, steps: int) -> int:
    """The steps of the plain arm, as a call before has decided: times are never the same twice."""
    if not place.exists():
        _write(place, {"plain_steps": steps})
    return int(_read(place)["plain_steps"])


def _tokens(base: Path) -> dict[str, object]:
    """Options about tokens that all stages share; a teacher that was never taught to chat is asked in ChatML."""
    template = load_tokenizer(str(base / "teacher")).chat_template
    return {"data_cache": str(base / "tokens"), **({} if template else {"chat_template": "chatml"})}


def _four_fifths(teacher_dir: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(teacher_dir).get_text_config(decoder=True)
    return max(1, int(config.num_hidden_layers) * 4 // 5)


def _scaled(sizes: Sizes, scale: float) -> Sizes:
    return Sizes(*(_scale(count, scale) for count in (sizes.lm, sizes.math_tool, sizes.code)))


def _scale(count: int, scale: float) -> int:
    return max(8, round(count * scale))


def _write(place: Path, value: object) -> None:
    storage.write_bytes(str(place), json.dumps(value).encode())


def _read(place: Path) -> Any:
    return json.loads(place.read_text(encoding="utf-8"))
