"""The report page: headline figures, plots, tables; one self-contained HTML text.

The page loads nothing: styles and script are part of it, and its content security policy forbids everything else, so
that a hostile string that slipped through could still not run or phone home.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Any

import numpy as np

from liquid_llm.formatting import format_bytes, format_change, format_count, format_seconds
from liquid_llm.report.charts import choose_figures
from liquid_llm.report.data import RunData, Series
from liquid_llm.report.series import short_number
from liquid_llm.report.svg import Figure, draw_figure, mark_symbols, smoothing_windows
from liquid_llm.report.tables import Cell, card, matrix, number, pairs, table, text


def render_page(run: RunData) -> str:
    """The whole HTML of a run's report."""
    style, script = _resource("style.css"), _resource("script.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [one for one in _sections(run) if one[2]]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(f'<h2 id="{key}">{title}</h2>{html}' for key, title, html in sections)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(run.name)} – run report</title><style>{style}</style></head><body>",
            mark_symbols(),
            _header(run),
            f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>',
            "<footer>Made from the run directory's files alone; <code>liquid report</code> makes it again.</footer>",
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _resource(name: str) -> str:
    return files("liquid_llm.report").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _sections(run: RunData) -> list[tuple[str, str, str]]:
    """``(anchor, title, HTML)``; empty ones are left out by the caller."""
    span = _span(run)  # one range of steps for all plots, so that they can be read together
    plots = [(group.title.lower(), group.title, _plots(group.figures, span)) for group in choose_figures(run)]
    return [
        ("result", "Result", _result(run.summary)),
        *plots,
        ("checkpoints", "Checkpoints", _checkpoints(run.checkpoints)),
        ("data", "Data", _data(run)),
        ("configuration", "Configuration", _configuration(run.config)),
        ("provenance", "Provenance", _provenance(run.environment)),
    ]


def _plots(figures: list[Figure], span: tuple[float, float]) -> str:
    windows = smoothing_windows(figures)
    hint = ""
    if windows:
        rows = " or ".join(str(one) for one in windows)
        hint = f'<p class="hint">Faint lines are single rows, strong ones the centred mean over {rows} rows.</p>'
    columns = ""
    if all(figure.small for figure in figures):
        columns = " four" if len(figures) in (4, 7, 8) else " three"
    return f'{hint}<div class="plots{columns}">{"".join(draw_figure(figure, span) for figure in figures)}</div>'


# -------------------------------------------------------------------------------------------------------------- header


def _header(run: RunData) -> str:
    notices = "".join(f"<li>{text(one)}</li>" for one in run.notices)
    tiles = "".join(
        f'<div><dt>{text(name)}</dt><dd><div class="value">{value}</div><div class="extra">{extra}</div></dd></div>'
        for name, value, extra in _tiles(run)
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


def _lead(run: RunData) -> str:
    """State, student, teachers, machine and start of the run, as far as they are known."""
    environment, config = run.environment, run.config
    parts = [_state(run)]
    student = dig(config, "student", "spec")
    if student:
        parameters = dig(environment, "parameters")
        size = f" ({_compact(parameters)} parameters)" if isinstance(parameters, int) else ""
        parts.append(f"Student <b>{text(student)}</b>{size}.")
    teachers = [one for one in (dig(config, "teacher", "online_id"), dig(config, "teacher", "stored_id")) if one]
    if teachers:
        names = " and ".join(f"<b>{text(one)}</b>" for one in dict.fromkeys(map(str, teachers)))
        parts.append(f"Taught by {names}.")
    machine = [dig(environment, "hardware", "cpu"), dig(environment, "choices", "device", "value")]
    started = dig(environment, "started_at")
    if started:
        where = f" on {text(machine[0])}" if machine[0] else ""
        parts.append(f"Started {_moment(started)}{where}{f', device {text(machine[1])}' if machine[1] else ''}.")
    return " ".join(parts)


def _state(run: RunData) -> str:
    last, total = _span(run)[1], dig(run.config, "optimizer", "steps")
    if any(one["name"] == "final.pt" for one in run.checkpoints):
        return "Finished."
    if not run.num_rows:
        return "No step is recorded yet."
    return f"At step {last:,.0f}{f' of {total:,}' if isinstance(total, int) else ''}, not finished."


def _span(run: RunData) -> tuple[float, float]:
    """The first and the last step of any row."""
    every = [one.steps for columns in (run.train, run.evaluation) for one in columns.series.values()]
    return float(min((one[0] for one in every), default=0)), float(max((one[-1] for one in every), default=0))


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """``(name, value HTML, extra HTML)`` of the headline figures that the run's rows can give."""
    train, tiles = run.train, []
    last, total = _span(run)[1], dig(run.config, "optimizer", "steps")
    if run.num_rows:
        tiles.append(("Steps", f"{last:,.0f}", f"of {total:,}" if isinstance(total, int) else ""))
    seen = train.get("tokens_seen")
    tokens = float(seen.finite[-1]) if seen else _total(train.get("tokens"))
    if tokens:
        seconds = _total(train.get("seconds"))
        tiles.append(("Tokens trained on", _compact(tokens), f"in {format_seconds(seconds)}" if seconds else ""))
    tiles += _change_tile("Validation loss", run.evaluation.get("val_loss_student"), "nats")
    tiles += _change_tile("KL to the teacher", run.evaluation.get("val_kd"), "nats")
    rate = _rate(train.get("tokens"), train.get("seconds"), train.get("tokens_per_second"))
    if rate:
        tiles.append(("Tokens a second", format_count(rate), "real ones, mean"))
    coverage = train.get("kd_coverage")
    if coverage is not None:
        tiles.append(("Signal coverage", f"{100 * coverage.finite.mean():.1f} <small>%</small>", "of positions"))
    for name, peak in (
        ("Peak device memory", train.get("device_peak_memory_bytes")),
        ("Peak host memory", train.get("peak_memory_bytes") or train.get("rss_bytes")),
    ):
        if peak is not None:
            size, unit = format_bytes(float(peak.finite.max())).split(" ")
            tiles.append((name, f"{size} <small>{unit}</small>", ""))
    return tiles


def _change_tile(name: str, series: Series | None, unit: str) -> list[tuple[str, str, str]]:
    if series is None:
        return []
    first, last = float(series.finite[0]), float(series.finite[-1])
    extra = f"{_change(first, last)} from {short_number(first)}" if series.finite.size > 1 else ""
    return [(name, f"{short_number(last)} <small>{unit}</small>", extra)]


def _change(before: Any, after: Any) -> str:
    """The relative change, coloured: down is good for every figure here."""
    known = all(isinstance(one, int | float) for one in (before, after))
    words = format_change(before, after) if known else "–"
    kind = "good" if words.startswith("−") else "bad" if words.startswith("+") and not words.startswith("+0.0 ") else ""
    return f'<span class="{kind}">{words}</span>' if kind else words


def _total(series: Series | None) -> float:
    return float(series.finite.sum()) if series is not None else 0.0


def _rate(tokens: Series | None, seconds: Series | None, rates: Series | None) -> float | None:
    spent = _total(seconds)
    if tokens is not None and spent > 0:
        return _total(tokens) / spent
    return float(np.median(rates.finite)) if rates is not None else None


def _compact(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------------ sections


def _result(summary: Any) -> str:
    if not isinstance(summary, Mapping):
        return ""
    parts = []
    rows = [row for row in summary.get("rows") or [] if isinstance(row, Mapping)]
    if rows:
        head: list[Cell] = [
            "type",
            *((text(name), "n") for name in ("loss before", "after", "change", "KL before", "after", "change")),
        ]
        parts.append(card("Validation, nats a token", table(head, map(_result_row, rows)), "card wide"))
    facts = {
        "Stored signal, bytes a token": summary.get("bytes_per_token"),
        "Real tokens a second": summary.get("tokens_per_second"),
        "Peak device memory": _formatted(format_bytes, summary.get("device_peak_memory_bytes")),
        "Peak host memory": _formatted(format_bytes, summary.get("peak_memory_bytes")),
        "Time": _formatted(format_seconds, summary.get("seconds")),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    boxes = [card("Cost", pairs(known))] if known else []
    sample = summary.get("sample")
    if isinstance(sample, Mapping):
        prompt, said = text(sample.get("prompt")), text(sample.get("text"))
        body = f'<pre class="sample"><span class="prompt">{prompt}</span>{said}</pre>'
        boxes.append(card("Sample, written by the finished student", body))
    return "".join([*parts, f'<div class="pair">{"".join(boxes)}</div>' if boxes else ""])


def _result_row(row: Mapping[str, Any]) -> list[Cell]:
    cells: list[Cell] = [text(row.get("type"))]
    for name in ("val_loss", "val_kd"):
        before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
        cells += [(_decimals(before), "n"), (_decimals(after), "n"), (_change(before, after), "n")]
    return cells


def _decimals(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else text(value)


def _formatted(how: Any, value: Any) -> str | None:
    return how(value) if isinstance(value, int | float) else None


def _checkpoints(checkpoints: list[dict[str, Any]]) -> str:
    if not checkpoints:
        return ""
    names = (
        "file",
        "step",
        "tokens seen",
        "context",
        "α",
        "T",
        "learning rate",
        "best loss",
        "size",
        "saved",
        "SHA-256",
    )
    head: list[Cell] = [text(name) if name in ("file", "saved", "SHA-256") else (text(name), "n") for name in names]
    return f'<div class="card">{table(head, map(_checkpoint_row, checkpoints))}</div>'


def _checkpoint_row(one: Mapping[str, Any]) -> list[Cell]:
    counts = [number(one.get(key)) for key in ("step", "tokens_seen", "block_size", "kd_alpha", "kd_temperature")]
    size = one.get("size_bytes")
    digest = text(str(one["sha256"])[:12]) if one.get("sha256") else text(None)
    return [
        f'<span class="mono">{text(one["name"])}</span>',
        *counts,
        (_short(one.get("lr")), "n"),
        (_decimals(one.get("best_val_loss")), "n"),
        (text("not here") if size is None else text(format_bytes(size)), "n"),
        _moment(one.get("created")),
        f'<span class="mono">{digest}</span>',
    ]


def _data(run: RunData) -> str:
    parts = []
    if run.manifest:
        lines = [line if isinstance(line, Mapping) else {"path": line} for line in run.manifest]
        rows = [[text(one.get("path")), text(one.get("type")), number(one.get("weight"))] for one in lines]
        parts.append(card("Manifest", table(["path", "type", ("weight", "n")], rows), "card wide"))
    readiness = run.readiness if isinstance(run.readiness, Mapping) else {}
    grids = {str(name): matrix(value) for name, value in readiness.items()}
    titles = {"types": "Samples and tokens", "signal": "Stored signal"}
    parts += [card(titles.get(name, name), grid, "card wide") for name, grid in grids.items() if grid]
    rest = {name: value for name, value in readiness.items() if not grids[str(name)]}
    boxes = [card("Readiness", pairs(rest))] if any(True for _ in rest) else []
    if isinstance(run.datasets, Mapping) and any(value is not None for value in run.datasets.values()):
        boxes.append(card("Named datasets", pairs(run.datasets)))
    return "".join([*parts, f'<div class="tables">{"".join(boxes)}</div>' if boxes else ""])


def _configuration(config: Any) -> str:
    if not isinstance(config, Mapping):
        return ""
    plain = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    boxes = [card("General", pairs(plain))] if plain else []
    boxes += [card(_title(name), pairs(value)) for name, value in config.items() if isinstance(value, Mapping)]
    return f'<div class="tables">{"".join(boxes)}</div>'


def _provenance(environment: Any) -> str:
    if not isinstance(environment, Mapping):
        return ""
    rest = dict(environment)
    command, earlier, choices = rest.pop("command", None), rest.pop("earlier_sessions", None), rest.pop("choices", None)
    parts = []
    if isinstance(command, list):
        parts.append(card("Command", f"<pre>{text(shlex.join(map(str, command)))}</pre>", "card wide"))
    if isinstance(choices, Mapping) and choices:
        rows = [[text(name), text(dig(one, "value")), text(dig(one, "reason"))] for name, one in choices.items()]
        parts.append(card("Choices made automatically", table(["what", "choice", "reason"], rows), "card wide"))
    if isinstance(earlier, list) and earlier:
        sessions = [
            [_moment(dig(one, "started_at")), text(dig(one, "hardware", "host")), text(dig(one, "git", "commit"))]
            for one in earlier
        ]
        parts.append(card("Earlier sessions of this run", table(["started", "host", "commit"], sessions), "card wide"))
    plain = {name: value for name, value in rest.items() if not isinstance(value, Mapping)}
    boxes = [card("Session", pairs(plain))] if plain else []
    boxes += [card(_title(name), pairs(value)) for name, value in rest.items() if isinstance(value, Mapping) and value]
    return "".join([*parts, f'<div class="tables">{"".join(boxes)}</div>'])


def _short(value: Any) -> str:
    return short_number(float(value)) if isinstance(value, int | float) else text(value)


def _moment(value: Any) -> str:
    """A time in ISO 8601 as people write it; anything else as it is."""
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 does not know Z
    except (AttributeError, ValueError):
        return text(value)
    zone = " UTC" if moment.utcoffset() == timedelta(0) else moment.strftime(" %z")
    return f'<time datetime="{text(value)}">{moment:%Y-%m-%d %H:%M}{zone}</time>'


def _title(name: object) -> str:
    words = str(name).replace("_", " ")
    return words[:1].upper() + words[1:]


def dig(value: Any, *names: str) -> Any:
    """A nested value, or None where any level is missing or no mapping."""
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
