"""What a run has come to, from its files: loss by type beside the teacher's, in words, what it said, what it took.

before, after  held-out cross-entropy at the first and at the last evaluation, nats a token
teacher        the teacher's own on the same positions
gap closed     (before - after) / (before - teacher): 1 is a student as good as its teacher
kl             mean KL(teacher || student) at temperature 1 over held-out positions with a signal, nats
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liquid_llm.formatting import format_count
from liquid_llm.report.data import Columns, RunData, Series, read_run
from liquid_llm.report.runs import SUMMARY_FILE
from liquid_llm.storage import write_bytes

ALL = "all"


def write_summary(run_dir: str | Path) -> dict[str, Any]:
    """Write ``summary.json`` into a run directory and return what it says.

    Raises:
        UsageError: the directory is none, or no run's.
        StorageError: it cannot be written.
    """
    found = summarise(read_run(run_dir))
    write_bytes(str(Path(run_dir) / SUMMARY_FILE), json.dumps(found, indent=1).encode())
    return found


def summarise(run: RunData) -> dict[str, Any]:
    """``rows``, a mapping for all and one a type; ``sentences``; ``samples`` of the last evaluation; and the cost."""
    every = run.evaluation
    rows = [_row(ALL, every.get("val_loss_student"), _shared(every), _of(every, "", "val_loss_teacher", "val_kd"))]
    for type in every.types:
        loss = every.get(f"{type}/val_loss")
        rows.append(_row(type, loss, loss, _of(every, f"{type}/", "val_loss_teacher", "val_kd")))
    rows = [row for row in rows if row["after"] is not None]
    said = [row for row in run.samples if isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)]
    last = max((row["step"] for row in said), default=None)
    train = run.train
    tokens, seconds = train.total("tokens"), train.total("seconds")
    peaks = {name: train.get(name) for name in ("peak_memory_bytes", "device_peak_memory_bytes")}
    return {
        "rows": rows,
        "sentences": _sentences(run, rows),
        "samples": [row for row in said if row["step"] == last],
        "steps": _last_step(run),
        "tokens": int(tokens),
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        **{name: None if one is None else int(one.finite.values.max()) for name, one in peaks.items()},
    }


def _row(type: str, loss: Series | None, shared: Series | None, teacher: tuple[float | None, float | None]) -> Any:
    """``shared``: the student's loss on the positions that the teacher was asked for."""
    own, kl = teacher
    before, after = _ends(loss)
    first, last = _ends(shared)
    closed = None
    if own is not None and first is not None and last is not None and first > own:
        closed = (first - last) / (first - own)
    return {"type": type, "before": before, "after": after, "teacher": own, "gap_closed": closed, "kl": kl}


def _shared(every: Columns) -> Series | None:
    return every.get("val_loss_student_with_teacher") or every.get("val_loss_student")


def _ends(series: Series | None) -> tuple[float | None, float | None]:
    """The first and the last finite value; no first where there is one alone."""
    if series is None:
        return None, None
    values = series.finite.values
    return (float(values[0]) if len(values) > 1 else None), float(values[-1])


def _of(every: Columns, prefix: str, *names: str) -> Any:
    return tuple(_ends(every.get(prefix + name))[1] for name in names)


def _last_step(run: RunData) -> int:
    steps = [one.steps[-1] for columns in (run.train, run.evaluation) for one in columns.series.values()]
    return int(max(steps, default=0))


def _sentences(run: RunData, rows: list[dict[str, Any]]) -> list[str]:
    found = []
    whole = next((row for row in rows if row["type"] == ALL), None)
    if whole is None:
        found.append("Nothing is held out, so nothing is known of how good the student is: give --val_fraction.")
    elif whole["before"] is not None:
        words = f"Held-out loss went from {whole['before']:.3f} to {whole['after']:.3f} nats a token"
        closed = whole["gap_closed"]
        if closed is not None:
            way = f"{closed:.0%} of the way to" if closed < 1 else "past"
            words += f": {way} the teacher, which has {whole['teacher']:.3f} where it was asked"
        found.append(f"{words}.")
    lacking = [type for type in run.train.types if type not in run.evaluation.types]
    if whole is not None and lacking:
        found.append(f"No validation samples of type {', '.join(lacking)}: it is trained on and not judged.")
    loss = run.evaluation.get("val_loss_student")
    if loss is not None and len(loss.finite) > 1:
        best = int(loss.finite.values.argmin())
        if best < len(loss.finite) - 1:
            step, value = loss.finite.steps[best], loss.finite.values[best]
            kept = "best.pt has those weights, student/ the last ones" if step > 0 else "training has made it worse"
            found.append(f"The lowest loss was {value:.3f}, at step {format_count(float(step))}: {kept}.")
    return found


def next_steps(run: str) -> dict[str, str]:
    """What people do with a finished run: purpose -> command."""
    return {
        "how sure is that": f"liquid evaluate {run}",
        "take the best": f"liquid export {run} FOLDER",
    }
