"""``compare.html``: several runs on one page, curve over curve, on a page of the report's making."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from liquid_llm.formatting import format_bytes, format_seconds
from liquid_llm.report.charts import Group, column_of, say_instead
from liquid_llm.report.compare import Run, for_page, signal_groups
from liquid_llm.report.data import Series
from liquid_llm.report.facts import tokens_seen
from liquid_llm.report.page import assemble_page, draw_group
from liquid_llm.report.plot import Figure, Line
from liquid_llm.report.summary import ALL
from liquid_llm.report.tables import Html, card, fold, table, text

_NUM_LOOKS = 32
_FEW = 8  # types that have plots of their own

# fmt: off
_TRAINING: dict[str, list[tuple[Figure, str]]] = {
    "Training": [
        (Figure("ce", "Training cross-entropy", "nats a token", "Over the texts each trains on.", noisy=True),
         "train.ce"),
        (Figure("grad-norm", "Gradient norm", "before clipping", noisy=True), "train.grad_norm"),
    ],
    "Schedules": [
        (Figure("alpha", "KD weight α", "", from_zero=True, small=True), "train.kd_alpha"),
        (Figure("temperature", "KD temperature T", "", from_zero=True, small=True), "train.kd_temperature"),
        (Figure("lr", "Learning rate", "", from_zero=True, small=True), "train.lr"),
    ],
    "Machine": [
        (Figure("throughput", "Throughput", "real tokens a second", from_zero=True, noisy=True, small=True),
         "train.tokens_per_second"),
        (Figure("device-memory", "Peak device memory", "GiB", from_zero=True, small=True),
         "train.device_peak_memory_bytes"),
        (Figure("host-memory", "Peak host memory", "GiB", from_zero=True, small=True), "train.peak_memory_bytes"),
    ],
}
# fmt: on


def render_comparison(runs: Sequence[Run], found: Mapping[str, Any]) -> Html:
    """The whole HTML of a comparison; ``found`` is what ``compare_runs`` says of the runs. It tells no path."""
    sections = {
        "Runs": _table(found),
        "Differences": _differences(runs, found),
        "Loss": _losses(runs),
        "Divergence": _divergences(runs),
        **{heading: _overlaid(runs, plots) for heading, plots in _TRAINING.items()},
    }
    remarks = [*found["remarks"], *_too_many(runs)]
    notices = "".join(f"<li>{text(one)}</li>" for one in remarks)
    items = f'<ul class="notices">{notices}</ul>' if notices else ""
    header = (
        f'<header><p class="over">liquid-llm comparison</p><h1>{len(runs)} runs side by side</h1>'
        f'<p class="lead">{", ".join(f"<b>{text(run.label)}</b>" for run in runs)}. Each has the same colour, dash and '
        f"mark in all plots.</p>{items}</header>"
    )
    footer = (
        "Faint lines are single rows, strong ones over them their running mean. Made from the runs' files alone by "
        "<code>liquid compare</code>. Differences between single runs hold the chance of seed and texts: "
        "<code>liquid evaluate A B</code> says how sure they are over texts, <code>liquid study</code> over seeds."
    )
    return assemble_page(f"{len(runs)} runs compared", header, sections, footer)


def _too_many(runs: Sequence[Run]) -> list[str]:
    if len(runs) <= _NUM_LOOKS:
        return []
    return [f"There are more than {_NUM_LOOKS} runs: from the next one on, looks come again. The read-outs tell which."]


# -------------------------------------------------------------------------------------------------------------- tables


def _table(found: Mapping[str, Any]) -> Html:
    common = found["common_step"]
    head = ["run", "step", "of", "tokens", "validation loss", "best", "at step"]
    head += [f"loss at step {common:,}"] if common is not None else []
    head += ["KL from its teacher", "gap closed", "perplexity", "bits a byte", "training", "tokens a second", "memory"]
    rows = []
    for one in found["runs"]:
        whole = one["by_type"].get(ALL, {})
        closed, seconds, peak = whole.get("gap_closed"), one["training_seconds"], one["peak_memory_bytes"]
        cells = [one["run"], one["steps"], one["of_steps"], one["tokens"], _digits(whole.get("after"))]
        cells += [_digits(one["best_loss"]), one["best_step"]]
        cells += [_digits(one["loss_at_common_step"])] if common is not None else []
        cells += [_digits(whole.get("kl")), None if closed is None else f"{100 * closed:.0f} %"]
        cells += [_digits(whole.get("perplexity")), _digits(whole.get("bits_per_byte"))]
        cells += [format_seconds(seconds) if seconds else None, one["tokens_per_second"], peak and format_bytes(peak)]
        rows.append(cells)
    kept = [place for place in range(len(head)) if any(row[place] is not None for row in rows)]
    body = table([head[place] for place in kept], [[row[place] for place in kept] for row in rows], "runs")
    return card("What they have come to, nats a token", body, "wide") + _by_type(found)


def _by_type(found: Mapping[str, Any]) -> Html:
    types = list(dict.fromkeys(type for one in found["runs"] for type in one["by_type"] if type != ALL))
    if not types:
        return ""
    rows = [
        [one["run"], *(_digits(one["by_type"].get(type, {}).get("after")) for type in types)] for one in found["runs"]
    ]
    return card("Validation loss by type, nats a token", table(["run", *types], rows, "loss by type"), "wide")


def _digits(value: Any) -> Any:
    return None if value is None else f"{value:.4g}" if value >= 1000 else f"{value:.3f}"


def _differences(runs: Sequence[Run], found: Mapping[str, Any]) -> Html:
    head = ["", *(run.label for run in runs)]

    def rows_of(name: str) -> list[list[Any]]:
        return [[key, *values] for key, values in for_page(runs, found[name]).items()]

    own, rest, machine = (rows_of(f"differ{name}") for name in ("", "_without_effect", "_in_machine"))
    first = table(head, own, "differences") if own else "<p>Nothing that changes a step.</p>"
    folded = "".join(
        fold(title, card(title, table(head, rows, title), "wide"))
        for title, rows in (("Where and how they were carried out", rest), ("Software, hardware, choices", machine))
        if rows
    )
    return card("In what their configurations differ", first, "wide") + folded


# --------------------------------------------------------------------------------------------------------------- plots


def _losses(runs: Sequence[Run]) -> Html:
    figure = Figure("loss", "Validation loss", "nats a token", "Over the held-out text of each run.")
    types = _types(runs)
    by_type = [
        (Figure(f"loss-{number}", f"Validation loss, {type}", "nats a token"), f"eval.{type}/val_loss")
        for number, type in enumerate(types)
    ]
    group = _group(runs, [(figure, "eval.val_loss_student"), *by_type])
    for key, of, across, unit in (
        ("tokens", "tokens trained on", "token", tokens_seen),
        ("seconds", "seconds of training, without evaluation and saving", "second", _seconds),
    ):
        lines = list(_over(runs, unit))
        if len(lines) > 1:
            group.figures.append(
                Figure(f"loss-{key}", "Validation loss", "nats a token", f"Over {of}.", lines, across=across)
            )
    return _draw(group)


def _divergences(runs: Sequence[Run]) -> Html:
    """KL from the teacher; in plots of their own where it is not one quantity."""
    wanted: list[tuple[Figure, str]] = []
    chosen: dict[str, list[int]] = {}
    for number, type in enumerate([None, *_types(runs)]):
        groups = signal_groups(runs, type)
        column = "eval.val_kd" if type is None else f"eval.{type}/val_kd"
        for place, (kind, numbers) in enumerate(groups.items()):
            key = f"kl-{number}-{place}"
            name = "KL from the teacher" + ("" if type is None else f", {type}")
            caption = f"At temperature 1, from {kind}."
            if len(groups) > 1:
                caption += " Does not compare with the other plots of it."
            wanted.append((Figure(key, name, "nats a position", caption), column))
            chosen[key] = numbers
    return _draw(_group(runs, wanted, chosen))


def _types(runs: Sequence[Run]) -> list[str]:
    """Those that have plots of their own: of a single type all plots are its own."""
    types = list(dict.fromkeys(type for run in runs for type in run.data.evaluation.types))
    return types if 1 < len(types) <= _FEW else []


def _overlaid(runs: Sequence[Run], plots: Sequence[tuple[Figure, str]]) -> Html:
    return _draw(_group(runs, plots))


def _group(
    runs: Sequence[Run], plots: Sequence[tuple[Figure, str]], chosen: Mapping[str, Sequence[int]] | None = None
) -> Group:
    """The plots with a line for each run that has the column, or a sentence where all lines are level and alike."""
    group = Group([], [])
    for figure, column in plots:
        numbers = range(len(runs)) if chosen is None else chosen[figure.key]
        found = {number: column_of(runs[number].data, column) for number in numbers}
        lines = [Line(runs[number].label, series, number) for number, series in found.items() if series is not None]
        if not any(line.series.finite.values.any() for line in lines):
            continue
        made = replace(figure, lines=lines, named=True)
        sentence = say_instead(made)
        if sentence is None:
            group.figures.append(made)
        else:
            group.sentences.append(sentence)
    return group


def _draw(group: Group) -> Html:
    """Those of one horizontal axis over one range."""
    if not group.figures and not group.sentences:
        return ""
    ranges: dict[str, tuple[float, float]] = {}
    for figure in group.figures:
        steps = [line.series.steps for line in figure.lines]
        low, high = ranges.get(figure.across, (math.inf, -math.inf))
        ranges[figure.across] = (min(low, *(one[0] for one in steps)), max(high, *(one[-1] for one in steps)))
    return draw_group(group, ranges)


def _over(runs: Sequence[Run], unit: Any) -> Iterator[Line]:
    """The validation loss of each run over what ``unit`` says had been spent by each step."""
    for number, run in enumerate(runs):
        loss, spent = run.data.evaluation.get("val_loss_student"), unit(run.data)
        if loss is not None and spent is not None:
            across = np.interp(loss.steps, spent.steps, spent.values)
            yield Line(run.label, Series(across, loss.values), number)


def _seconds(data: Any) -> Series | None:
    """Seconds of training by each step, from nothing at step 0."""
    seconds = data.train.get("seconds")
    if seconds is None:
        return None
    kept = seconds.finite
    return Series(np.append(0.0, kept.steps), np.append(0.0, np.cumsum(kept.values)))
