"""Parts of the report page that are tables and words: the result, what the student says, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from liquid_llm.formatting import format_bytes, format_count, format_seconds
from liquid_llm.report.data import RunData
from liquid_llm.report.facts import value_at
from liquid_llm.report.private import without_places
from liquid_llm.report.summary import ALL, summarise
from liquid_llm.report.tables import Html, card, matrix, pairs, table, text

_MAX_SAMPLES = 6  # of one prompt
_TOLD = 60  # characters of a prompt that name its table
_OF_COST = {
    "steps": ("steps", format_count),
    "tokens": ("tokens trained on", format_count),
    "training_seconds": ("time of the training steps, without evaluation and saving", format_seconds),
    "tokens_per_second": ("tokens a second of that time", format_count),
    "peak_memory_bytes": ("peak host memory", format_bytes),
    "device_peak_memory_bytes": ("peak device memory", format_bytes),
    "seconds": ("time of everything", format_seconds),
}


def show_result(run: RunData) -> Html:
    """What the run has come to: a table by type with the teacher beside it, words, samples, cost.

    A demo and earlier releases have left a summary of another form, which is shown as it is. Where none is there, as of
    a run that is not finished, it is worked out from the rows.
    """
    summary = run.summary
    if not isinstance(summary, Mapping):
        summary = summarise(run) if run.evaluation.series else {}
    rows = _mappings(summary.get("rows"))
    by_type = [row for row in rows if "after" in row]
    figures = _by_type(run, by_type) if by_type else _as_it_is(rows)
    parts = [card("Held-out text, nats a token", figures, "wide")] if figures else []
    words = summary.get("sentences")
    if isinstance(words, list) and words:
        parts.append(card("In words", "".join(f"<p>{text(one)}</p>" for one in words), "wide"))
    samples = [row for row in _mappings(summary.get("samples")) if "student" in row]
    for prompt in dict.fromkeys(str(row.get("prompt")) for row in samples):
        said = [[row["student"], row.get("text")] for row in samples if str(row.get("prompt")) == prompt]
        parts.append(
            card(
                f"After: {prompt}",
                table(["student", "text"], said, f"what each says after {prompt[:_TOLD]}"),
                "wide samples",
            )
        )
    rest = {_of_cost(name): _shown(name, one) for name, one in summary.items() if one is not None and _is_cost(one)}
    return "".join(parts) + (card("Cost", pairs(without_places(rest))) if rest else "")


def _by_type(run: RunData, rows: list[Mapping[str, Any]]) -> Html:
    """Losses by type; perplexity and, where it was measured, bits a byte, which compares between tokenizers."""
    table_rows = []
    measured = any(name.endswith("val_bits_per_byte") for name in run.evaluation.series)
    for row in rows:
        after, closed = row.get("after"), row.get("gap_closed")
        perplexity = math.exp(min(after, 700.0)) if isinstance(after, float) else None
        cells = [row.get("type"), *(_rounded(row.get(name)) for name in ("before", "after", "teacher"))]
        cells.append(f"{100 * closed:.0f} %" if isinstance(closed, float) else None)
        cells += [_rounded(row.get("kl")), _rounded(perplexity)]
        if measured:
            prefix = "" if row.get("type") == ALL else f"{row.get('type')}/"
            for name in ("val_bits_per_byte", "val_bits_per_byte_teacher"):
                cells.append(_rounded(value_at(run.evaluation.get(prefix + name), math.inf)))
        table_rows.append(cells)
    head = [
        "type",
        "before",
        "after",
        "teacher",
        "gap to the teacher closed",
        "KL from the teacher, T = 1",
        "perplexity",
    ]
    head += ["bits a byte", "the teacher's"] if measured else []
    return table(head, table_rows, "held-out loss by type")


def _rounded(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else value


def _as_it_is(rows: list[Mapping[str, Any]]) -> Html | None:
    return matrix(
        {
            str(row.get("student", row.get("type"))): {
                k: v for k, v in row.items() if k not in ("student", "type") and not isinstance(v, Mapping)
            }
            for row in rows
        },
        "held-out loss",
    )


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [one for one in values if isinstance(one, Mapping)] if isinstance(values, list) else []


def _is_cost(value: Any) -> bool:
    return not isinstance(value, list)


def _of_cost(name: Any) -> str:
    return _OF_COST[name][0] if name in _OF_COST else str(name)


def _shown(name: Any, value: Any) -> Any:
    """A figure with its unit where it is one that is known."""
    is_figure = name in _OF_COST and isinstance(value, int | float) and not isinstance(value, bool)
    return _OF_COST[name][1](value) if is_figure and abs(value) < 1e18 else value


def show_samples(rows: list[dict[str, Any]]) -> Html:
    """What the student said to each prompt: at the first evaluation, the last ones and some between them."""
    by_prompt: dict[str, dict[int, list[Any]]] = {}
    for row in rows:
        share = row.get("repeated_4grams")
        repeated = f"{share:.0%}" if isinstance(share, int | float) else None
        by_prompt.setdefault(str(row.get("prompt")), {})[row["step"]] = [row["step"], row.get("text"), repeated]
    parts = []
    for prompt, by_step in by_prompt.items():
        said = [by_step[step] for step in sorted(by_step)]
        chosen = sorted({round(place * (len(said) - 1) / (_MAX_SAMPLES - 1)) for place in range(_MAX_SAMPLES)})
        body = table(["step", "text", "repeated 4-grams"], [said[place] for place in chosen], f"after {prompt[:_TOLD]}")
        parts.append(card(f"After: {prompt}", body, "wide samples"))
    return "".join(parts)


_OF_CHECKPOINT = {
    "step": "step",
    "tokens_seen": "tokens seen",
    "block_size": "context",
    "kd_alpha": "α",
    "kd_temperature": "T",
}


def show_checkpoints(run: RunData) -> Html:
    """The checkpoints: one of several names, which are hard links or copies of one content, is one row.

    A sidecar's ``lr`` is the run's highest and its ``best_val_loss`` the best up to there, so that both are taken from
    the rows: what they were at the checkpoint's own step.
    """
    if not run.checkpoints:
        return ""
    by_content: dict[Any, list[dict[str, Any]]] = {}
    for number, one in enumerate(run.checkpoints):
        digest = one.get("sha256")
        by_content.setdefault((one.get("step"), digest) if isinstance(digest, str) else number, []).append(one)
    rows = []
    for several in by_content.values():
        one = several[0]
        sizes = [named["size_bytes"] for named in several if named["size_bytes"] is not None]
        names = ", ".join(
            named["name"] + ("" if named["size_bytes"] is not None else " (not here)") for named in several
        )
        step = one["step"] if isinstance(one.get("step"), int) else math.nan
        rate = value_at(run.train.get("lr"), step) if step == step else None
        loss = value_at(run.evaluation.get("val_loss_student"), step, exactly=True) if step == step else None
        size = format_bytes(sizes[0]) if sizes else "not here"
        cells = [*map(one.get, _OF_CHECKPOINT), rate, _rounded(loss), size, moment(one.get("created"))]
        rows.append([names, *cells, str(one.get("sha256") or "")[:12]])
    head = ["file", *_OF_CHECKPOINT.values(), "learning rate", "validation loss", "size", "saved", "SHA-256"]
    some = any(len(several) > 1 for several in by_content.values())
    note = '<p class="none">Several names on a line are one content, kept once.</p>' if some else ""
    return f'<div class="card">{table(head, rows, "checkpoints")}{note}</div>'


def moment(value: Any) -> Any:
    """A time in ISO 8601 as people write it; anything else as it is."""
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know Z
    except (AttributeError, ValueError):
        return value
    zone = " UTC" if found.utcoffset() == timedelta(0) else found.strftime(" %z")
    return f"{found:%Y-%m-%d %H:%M}{zone}"
