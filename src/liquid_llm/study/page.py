"""``study.html``: the verdict and the curves of all arms, on a page of the report's making."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from liquid_llm.formatting import format_seconds
from liquid_llm.report.data import Series
from liquid_llm.report.page import assemble_page, draw_plots
from liquid_llm.report.plot import Figure, Line
from liquid_llm.report.tables import Html, card, pairs, table, text
from liquid_llm.study.verdict import MEASURES

_LOSS, _KL = "Validation loss", "KL from the teacher"
_CAPTION = "Means over the seeds."
_WITH_CAPTURE = "Training alone, the median step's seconds; a line begins after its arm's share of the captures."


def render_study(name: str, result: Mapping[str, Any]) -> Html:
    """The whole HTML of a study's page; ``result`` is what ``study.json`` holds."""
    types = dict.fromkeys(type for rows in result["curves"].values() for row in rows for type in row["by_type"])
    by_type = [
        Figure(f"loss-{number}", f"{_LOSS}, {type}", "nats a token", _CAPTION, lines)
        for number, type in enumerate(types if len(types) > 1 else ())
        if (lines := list(_lines(result, "val_loss", type)))
    ]
    curves = [
        Figure("loss", _LOSS, "nats a token", _CAPTION, list(_lines(result, "val_loss_student"))),
        Figure("kl", _KL, "nats a token", _CAPTION, list(_lines(result, "val_kd"))),
    ]
    seconds = [
        Figure(
            "loss-seconds",
            _LOSS,
            "nats a token",
            _WITH_CAPTURE,
            list(_lines(result, "val_loss_student", by="seconds")),
            across="second",
        ),
        Figure(
            "kl-seconds",
            _KL,
            "nats a token",
            _WITH_CAPTURE,
            list(_lines(result, "val_kd", by="seconds")),
            across="second",
        ),
    ]
    sections = {
        "Verdict": _verdict(result),
        "Differences": _differences(result),
        "Steps": _draw([*curves, *by_type]),
        "Seconds": _draw(seconds),
        "Arms": _arms(result),
        "Runs": _runs(result),
    }
    lead = (
        f"{len(result['arms'])} arms, seeds {', '.join(map(str, result['seeds']))}; the others are compared with "
        f"<b>{text(result['baseline'])}</b>."
    )
    header = (
        f'<header><p class="over">liquid-llm study</p><h1>{text(name)}</h1><p class="lead">{lead}</p>'
        f"{_notices(result['remarks'])}</header>"
    )
    footer = "Made from the study's files alone; <code>liquid study FOLDER</code> makes it again."
    return assemble_page(f"{text(name)} – study", header, sections, footer)


def _notices(remarks: Sequence[str]) -> Html:
    items = "".join(f"<li>{text(one)}</li>" for one in remarks)
    return f'<ul class="notices">{items}</ul>' if items else ""


def _draw(figures: Sequence[Figure]) -> Html:
    figures = [one for one in figures if one.lines]
    if not figures:
        return ""
    steps = [line.series.steps for figure in figures for line in figure.lines]
    return draw_plots(figures, (float(min(one[0] for one in steps)), float(max(one[-1] for one in steps))))


def _lines(result: Mapping[str, Any], name: str, type: str | None = None, by: str = "step") -> Iterator[Line]:
    """A line for each arm that has the figure at any step."""
    for number, arm in enumerate(result["arms"]):
        rows = result["curves"][arm["name"]]
        found = [(row["step"], (row if type is None else row["by_type"].get(type, {})).get(name)) for row in rows]
        points = [(step, value) for step, value in found if value is not None]
        pace = arm["seconds_per_step"]
        if not points or (by == "seconds" and pace is None):
            continue
        steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        across = steps if by == "step" else steps * pace + arm["capture_seconds"]
        yield Line(arm["name"], Series(across, values), number)  # the baseline in ink


def _verdict(result: Mapping[str, Any]) -> Html:
    items = "".join(f"<li>{text(one)}</li>" for one in result["sentences"])
    counted = (
        f"{result['comparisons']} comparisons were made, each with a 95 % interval of its own that is corrected for "
        f"nothing: with no effect at all, about {result['by_chance']:g} of them would be called better by chance."
    )
    return f'<section class="card wide"><ul>{items}</ul><p>{text(counted)}</p></section>'


def _differences(result: Mapping[str, Any]) -> Html:
    rows = []
    for one in result["verdicts"]:
        measure = MEASURES[one["measure"]]
        digits = 4 if measure.scale == 1 else 1
        figures = [one[key] for key in ("baseline_value", "value", "difference", "low", "high")]
        shown = [
            "not known" if value is None else f"{value * measure.scale:.{digits}f}".replace("-", "−")
            for value in figures
        ]
        needed = one["seeds_needed"] and f"{one['seeds_needed']} seeds"
        needed = needed or (one["texts_needed"] and f"{one['texts_needed']:,} texts")
        at = f"{one['at']} (baseline: {one['baseline_steps']:,} steps)"
        word = "worse" if one["worse"] else one["word"]
        rows.append([one["arm"], at, one["type"], f"{measure.title}, {measure.unit}", *shown, word, needed])
    head = [
        "arm",
        "at equal",
        "text",
        "measure",
        "baseline",
        "arm",
        "difference",
        "low",
        "high",
        "verdict",
        "would tell",
    ]
    return card("Arm minus baseline, with 95 % intervals", table(head, rows), "wide") if rows else ""


def _arms(result: Mapping[str, Any]) -> Html:
    rows = [
        [
            arm["name"],
            arm["steps"],
            arm["seconds_per_step"],
            None if arm["seconds"] is None else format_seconds(arm["seconds"]),
            format_seconds(arm["capture_seconds"]) if arm["capture_seconds"] else None,
            arm["baseline_steps_at_seconds"],
        ]
        for arm in result["arms"]
    ]
    head = ["arm", "steps", "seconds a step", "all seconds", "captures, its share", "baseline steps in as long"]
    options = "".join(card(arm["name"], pairs(arm["options"])) for arm in result["arms"] if arm["options"])
    return card("What they cost", table(head, rows), "wide") + f'<div class="tables">{options}</div>'


def _runs(result: Mapping[str, Any]) -> Html:
    names = dict.fromkeys(
        key for run in result["runs"] for key in (*run["all"], *(["right"] if "right" in run else []))
    )
    rows = [
        [run["arm"], run["seed"], run["steps"], run["tokens"], *(run["all"].get(name, run.get(name)) for name in names)]
        for run in result["runs"]
    ]
    head = ["arm", "seed", "steps", "tokens", *(name.replace("_", " ") for name in names)]
    return card("Every student, all held-out text", table(head, rows), "wide") if rows else ""
