"""The report page: headline figures, plots, tables; one self-contained HTML text.

The page loads nothing: styles and script are part of it, and its content security policy forbids everything else, so
that a hostile string that slipped through could still not run or phone home.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Any

from liquid_llm.formatting import format_bytes, format_change, format_count, format_seconds
from liquid_llm.report.charts import choose_figures
from liquid_llm.report.data import RunData, Series
from liquid_llm.report.plot import Figure, draw_figure, short_number
from liquid_llm.report.tables import Html, card, cards, matrix, pairs, table, text

_MAX_SAMPLES = 6  # of one prompt


def render_page(run: RunData) -> Html:
    """The whole HTML of a run's report."""
    span = _span(run)  # one range of steps for all plots, so that they can be read together
    sections = {
        "Result": _result(run.summary),
        **{heading: draw_plots(figures, span) for heading, figures in choose_figures(run).items()},
        "Samples": _samples(run.samples),
        "Checkpoints": _checkpoints(run.checkpoints),
        "Data": _data(run),
        "Configuration": cards(run.config, "General") if isinstance(run.config, Mapping) else "",
        "Provenance": _provenance(run.environment) if isinstance(run.environment, Mapping) else "",
    }
    footer = (
        "Faint lines are single rows, strong ones over them their running mean. Made from the run directory's files "
        "alone; <code>liquid report</code> makes it again."
    )
    return assemble_page(f"{text(run.name)} – run report", _header(run), sections, footer)


def assemble_page(title: Html, header: Html, sections: Mapping[str, Html], footer: Html) -> Html:
    """A whole page, in the report's style, of ready parts; a section without contents is left out."""
    style, script = (
        files("liquid_llm.report").joinpath(name).read_text("utf-8") for name in ("style.css", "script.js")
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = {name: html for name, html in sections.items() if html}
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in sections)
    body = "".join(f'<h2 id="{name.lower()}">{name}</h2>{html}' for name, html in sections.items())
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title><style>{style}</style></head><body>",
            header,
            f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>',
            f"<footer>{footer}</footer>",
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def draw_plots(figures: Sequence[Figure], span: tuple[float, float]) -> Html:
    """Plots side by side over the same range."""
    columns = " three" if all(figure.small for figure in figures) else ""
    return f'<div class="plots{columns}">{"".join(draw_figure(figure, span) for figure in figures)}</div>'


# -------------------------------------------------------------------------------------------------------------- header


def _header(run: RunData) -> Html:
    notices = "".join(f"<li>{text(one)}</li>" for one in run.notices)
    tiles = "".join(
        f'<div><dt>{name}</dt><dd><div class="value">{value} <small>{unit}</small></div>'
        f'<div class="extra">{extra}</div></dd></div>'
        for name, value, unit, extra in _tiles(run)
    )
    return "".join(
        [
            f'<header><p class="over">liquid-llm run report</p><h1>{text(run.name)}</h1>',
            f'<p class="lead">{_lead(run)}</p>',
            f'<dl class="tiles">{tiles}</dl>' if tiles else "",
            f'<ul class="notices">{notices}</ul>' if notices else "",
            "</header>",
        ]
    )


def _lead(run: RunData) -> Html:
    """State, student, teachers, machine and start of the run, as far as they are known."""
    environment, config = run.environment, run.config
    parts = []
    if any(one["name"] == "final.pt" for one in run.checkpoints):
        parts.append("Finished.")
    elif run.num_rows:
        parts.append(f"At step {' '.join(_steps(run))}, not finished.")
    else:
        parts.append("No step is recorded yet.")
    if student := dig(config, "student", "spec"):
        parameters = dig(environment, "parameters")
        size = f" ({_compact(parameters)} parameters)" if isinstance(parameters, int) else ""
        parts.append(f"Student <b>{text(student)}</b>{size}.")
    teachers = [str(one) for one in (dig(config, "teacher", "online_id"), dig(config, "teacher", "stored_id")) if one]
    if teachers:
        parts.append(f"Taught by {' and '.join(f'<b>{text(one)}</b>' for one in dict.fromkeys(teachers))}.")
    if started := dig(environment, "started_at"):
        machine, device = dig(environment, "hardware", "cpu"), dig(environment, "choices", "device", "value")
        where = f" on {text(machine)}" if machine else ""
        parts.append(f"Started {text(_moment(started))}{where}{f', device {text(device)}' if device else ''}.")
    return " ".join(parts)


def _span(run: RunData) -> tuple[float, float]:
    """The first and the last step of any row."""
    every = [one.steps for columns in (run.train, run.evaluation) for one in columns.series.values()]
    return float(min((one[0] for one in every), default=0)), float(max((one[-1] for one in every), default=0))


def _steps(run: RunData) -> tuple[str, str]:
    """The last step, and of how many, if known."""
    total = dig(run.config, "optimizer", "steps")
    return f"{_span(run)[1]:,.0f}", f"of {total:,}" if isinstance(total, int) else ""


def _tiles(run: RunData) -> list[tuple[Html, Html, Html, Html]]:
    """``(name, value, unit, extra)`` of the headline figures that the run's rows can give."""
    train, tiles = run.train, []
    seconds, trained = train.total("seconds"), train.total("tokens")
    if run.num_rows:
        steps, of = _steps(run)
        tiles.append(("Steps", steps, "", of))
    seen = train.get("tokens_seen")
    if tokens := float(seen.finite.values[-1]) if seen else trained:
        tiles.append(("Tokens trained on", _compact(tokens), "", f"in {format_seconds(seconds)}" if seconds else ""))
    for name, series in (
        ("Validation loss", run.evaluation.get("val_loss_student")),
        ("Divergence from teacher", run.evaluation.get("val_kd")),
    ):
        if series is not None:
            first, last = float(series.finite.values[0]), float(series.finite.values[-1])
            extra = f"{format_change(first, last)} from {short_number(first)}" if len(series.finite) > 1 else ""
            tiles.append((name, short_number(last), "nats", extra))
    if trained and seconds:
        tiles.append(("Tokens a second", format_count(trained / seconds), "", "real ones, mean"))
    if coverage := train.get("kd_coverage"):
        tiles.append(("Signal coverage", f"{100 * coverage.finite.values.mean():.1f}", "%", "of positions"))
    if skipped := train.get("skipped_steps"):
        count = format_count(float(skipped.finite.values[-1]))
        tiles.append(("Steps left out", count, "", "loss or gradient not finite"))
    tiles += _memory("Peak device memory", train.get("device_peak_memory_bytes"))
    return tiles + _memory("Peak host memory", train.get("peak_memory_bytes") or train.get("rss_bytes"))


def _memory(name: str, peak: Series | None) -> list[tuple[Html, Html, Html, Html]]:
    return [] if peak is None else [(name, *format_bytes(float(peak.finite.values.max())).split(" "), "")]  # type: ignore[list-item]


def _compact(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------------ sections


def _result(summary: Any) -> Html:
    """What a demo says it reached: its rows by student (by type, of earlier releases), its words, samples, the rest."""
    if not isinstance(summary, Mapping):
        return ""
    rows = _mappings(summary.get("rows"))
    figures = matrix(
        {
            str(row.get("student", row.get("type"))): {
                k: v for k, v in row.items() if k not in ("student", "type") and not isinstance(v, Mapping)
            }
            for row in rows
        }
    )
    parts = [card("Held-out text, nats a token", figures, "wide")] if figures else []
    words = summary.get("sentences")
    if isinstance(words, list):
        parts.append(card("In words", "".join(f"<p>{text(one)}</p>" for one in words), "wide"))
    samples = [row for row in _mappings(summary.get("samples")) if "student" in row]
    for prompt in dict.fromkeys(str(row.get("prompt")) for row in samples):
        said = [[row["student"], row.get("text")] for row in samples if str(row.get("prompt")) == prompt]
        parts.append(card(f"After: {prompt}", table(["student", "text"], said), "wide samples"))
    rest = {name: one for name, one in summary.items() if one is not None and not isinstance(one, list)}
    return "".join(parts) + card("Cost", pairs(rest))


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [one for one in values if isinstance(one, Mapping)] if isinstance(values, list) else []


def _samples(rows: list[dict[str, Any]]) -> Html:
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
        body = table(["step", "text", "repeated 4-grams"], [said[place] for place in chosen])
        parts.append(card(f"After: {prompt}", body, "wide samples"))
    return "".join(parts)


_CHECKPOINT_COLUMNS = {
    "step": "step",
    "tokens_seen": "tokens seen",
    "block_size": "context",
    "kd_alpha": "α",
    "kd_temperature": "T",
    "lr": "learning rate",
    "best_val_loss": "best loss",
}


def _checkpoints(checkpoints: list[dict[str, Any]]) -> Html:
    if not checkpoints:
        return ""
    rows = []
    for one in checkpoints:
        size = "not here" if one["size_bytes"] is None else format_bytes(one["size_bytes"])
        digest = str(one.get("sha256") or "")[:12]
        rows.append([one["name"], *map(one.get, _CHECKPOINT_COLUMNS), size, _moment(one.get("created")), digest])
    head = ["file", *_CHECKPOINT_COLUMNS.values(), "size", "saved", "SHA-256"]
    return f'<div class="card">{table(head, rows)}</div>'


def _data(run: RunData) -> Html:
    parts = []
    if run.manifest:
        lines = [line if isinstance(line, Mapping) else {"path": line} for line in run.manifest]
        rows = [[one.get("path"), one.get("type"), one.get("weight")] for one in lines]
        parts.append(card("Manifest", table(["path", "type", "weight"], rows), "wide"))
    readiness = run.readiness if isinstance(run.readiness, Mapping) else {}
    titles = {"types": "Samples and tokens", "signal": "Stored signal"}
    for name, value in readiness.items():
        parts.append(card(titles.get(name, name), matrix(value) or pairs({name: value}), "wide"))
    if isinstance(run.datasets, Mapping) and any(value is not None for value in run.datasets.values()):
        parts.append(card("Named datasets", pairs(run.datasets), "wide"))
    return "".join(parts)


def _provenance(environment: Mapping[str, Any]) -> Html:
    rest = dict(environment)
    command, earlier, choices = rest.pop("command", None), rest.pop("earlier_sessions", None), rest.pop("choices", None)
    parts = []
    if isinstance(command, list):
        parts.append(card("Command", f"<pre>{text(shlex.join(map(str, command)))}</pre>", "wide"))
    if isinstance(choices, Mapping) and choices:
        rows = [[name, dig(one, "value"), dig(one, "reason")] for name, one in choices.items()]
        parts.append(card("Choices made automatically", table(["what", "choice", "reason"], rows), "wide"))
    if isinstance(earlier, list) and earlier:
        sessions = [
            [_moment(dig(one, "started_at")), dig(one, "hardware", "host"), dig(one, "git", "commit")]
            for one in earlier
        ]
        parts.append(card("Earlier sessions of this run", table(["started", "host", "commit"], sessions), "wide"))
    return "".join([*parts, cards(rest, "Session")])


def _moment(value: Any) -> Any:
    """A time in ISO 8601 as people write it; anything else as it is."""
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know Z
    except (AttributeError, ValueError):
        return value
    zone = " UTC" if moment.utcoffset() == timedelta(0) else moment.strftime(" %z")
    return f"{moment:%Y-%m-%d %H:%M}{zone}"


def dig(value: Any, *names: str) -> Any:
    """A nested value, or None where any level is missing or no mapping."""
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
