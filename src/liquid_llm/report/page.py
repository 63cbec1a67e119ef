"""The report page: headline figures, plots, tables; one self-contained HTML text.

The page loads nothing: styles and script are part of it, and its content security policy forbids everything else, so
that a hostile string that slipped through could still not run or phone home.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from liquid_llm.formatting import format_bytes, format_count, format_seconds
from liquid_llm.report.charts import Group, choose_figures
from liquid_llm.report.data import RunData, Series
from liquid_llm.report.facts import (
    dig,
    is_finished,
    say_codecs,
    say_teachers,
    span_of,
    student_name,
    tokens_seen,
    total_steps,
)
from liquid_llm.report.plot import Below, Figure, draw_figure, draw_marks, short_number
from liquid_llm.report.private import hosts_of, without_places
from liquid_llm.report.sections import moment, show_checkpoints, show_result, show_samples
from liquid_llm.report.summary import ALL, summarise
from liquid_llm.report.tables import Html, card, cards, fold, matrix, pairs, table, text

Span = tuple[float, float] | Mapping[str, tuple[float, float]]

_FEW = 20  # lines of a manifest that stand open


def render_page(run: RunData) -> Html:
    """The whole HTML of a run's report; no path and no machine's name is told in it."""
    codecs, machines = say_codecs(run), _machines(run.environment)
    hosts = hosts_of(run.environment)
    run = replace(
        run,
        config=without_places(run.config, hosts),
        manifest=without_places(run.manifest, hosts),
        readiness=without_places(run.readiness, hosts),
        datasets=without_places(run.datasets, hosts),
        environment=without_places(_without_host(run.environment), hosts),
        notices=without_places(run.notices, hosts),
    )
    span = span_of(run)  # one range of steps for all plots, so that they can be read together
    seen = tokens_seen(run)
    below = None if seen is None else Below("tokens", seen)
    sections = {
        "Result": show_result(run),
        **{
            heading: draw_group(group, span, below, codecs if heading == "Distillation" else None)
            for heading, group in choose_figures(run).items()
        },
        "Samples": show_samples(run.samples),
        "Checkpoints": show_checkpoints(run),
        "Data": _data(run),
        "Configuration": _configuration(run.config),
        "Provenance": _provenance(run.environment, machines) if isinstance(run.environment, Mapping) else "",
    }
    footer = (
        "Faint lines are single rows, strong ones over them their running mean. Made from the run directory's files "
        "alone; <code>liquid report</code> makes it again, <code>liquid compare</code> lays several runs over one "
        "another. Of paths of the machine the last part is told, of machines no name: "
        "<code>provenance/</code> in the run has them."
    )
    return assemble_page(f"{text(run.name)} – run report", _header(run), sections, footer)


def _without_host(environment: Any) -> Any:
    hardware = dig(environment, "hardware")
    if not isinstance(hardware, Mapping):
        return environment
    return {**environment, "hardware": {name: one for name, one in hardware.items() if name != "host"}}


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
            draw_marks(),
            header,
            f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>',
            f"<footer>{footer}</footer>",
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def draw_plots(figures: Sequence[Figure], span: Span, below: Below | None = None) -> Html:
    """Plots side by side over the same range, or over that of what each has across."""
    columns = " three" if all(figure.small for figure in figures) else ""
    plots = [draw_figure(one, span[one.across] if isinstance(span, Mapping) else span, below) for one in figures]
    return f'<div class="plots{columns}">{"".join(plots)}</div>'


def draw_group(group: Group, span: Span, below: Below | None = None, note: str | None = None) -> Html:
    """The plots of a heading, and the sentences that stand for others."""
    plots = draw_plots(group.figures, span, below) if group.figures else ""
    notes = [*group.sentences, *([note] if note else [])]
    return plots + "".join(f'<p class="constant">{text(one)}</p>' for one in notes)


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
    environment = run.environment
    parts = []
    if is_finished(run):
        parts.append("Finished.")
    elif run.num_rows:
        parts.append(f"At step {' '.join(_steps(run))}, not finished.")
    else:
        parts.append("No step is recorded yet.")
    if student := student_name(run):
        parameters = dig(environment, "parameters")
        size = f" ({_compact(parameters)} parameters)" if isinstance(parameters, int) else ""
        parts.append(f"Student <b>{text(student)}</b>{size}.")
    teachers = [f"<b>{text(name)}</b>{f' ({text(what)})' if what else ''}" for name, what in say_teachers(run)]
    if teachers:
        parts.append(f"Taught by {' and '.join(teachers)}.")
    if started := dig(environment, "started_at"):
        machine, device = dig(environment, "hardware", "cpu"), dig(environment, "choices", "device", "value")
        where = f" on {text(machine)}" if machine else ""
        parts.append(f"Started {text(moment(started))}{where}{f', device {text(device)}' if device else ''}.")
    return " ".join(parts)


def _steps(run: RunData) -> tuple[str, str]:
    """The last step, and of how many, if known."""
    total = total_steps(run)
    return f"{span_of(run)[1]:,.0f}", f"of {total:,}" if total is not None else ""


def _tiles(run: RunData) -> list[tuple[Html, Html, Html, Html]]:
    """``(name, value, unit, extra)`` of the headline figures that the run's rows can give."""
    train, tiles = run.train, []
    seconds, trained = train.total("seconds"), train.total("tokens")
    if run.num_rows:
        steps, of = _steps(run)
        tiles.append(("Steps", steps, "", of))
    seen = train.get("tokens_seen")
    if tokens := float(seen.finite.values[-1]) if seen else trained:
        tiles.append(
            ("Tokens trained on", _compact(tokens), "", f"in {format_seconds(seconds)} of training" if seconds else "")
        )
    if loss := run.evaluation.get("val_loss_student"):
        tiles.append(("Validation loss", *_last(loss), _gap(run) or _since(loss)))
    if kl := run.evaluation.get("val_kd"):
        tiles.append(("KL from the teacher", *_last(kl), f"{_since(kl) or 'validation'}, at T = 1"))
    if trained and seconds:
        tiles.append(("Tokens a second", format_count(trained / seconds), "", "real ones, mean"))
    if coverage := train.get("kd_coverage"):
        tiles.append(("Signal coverage", f"{100 * coverage.finite.values.mean():.1f}", "%", "of positions"))
    if skipped := train.get("skipped_steps"):
        count = format_count(float(skipped.finite.values[-1]))
        tiles.append(("Steps left out", count, "", "loss or gradient not finite"))
    tiles += _memory("Peak device memory", train.get("device_peak_memory_bytes"))
    return tiles + _memory("Peak host memory", train.get("peak_memory_bytes") or train.get("rss_bytes"))


def _last(series: Series) -> tuple[Html, Html]:
    return short_number(float(series.finite.values[-1])), "nats"


def _since(series: Series) -> Html:
    values = series.finite.values
    return f"from {short_number(float(values[0]))}" if len(values) > 1 else ""


def _gap(run: RunData) -> Html:
    """How near the loss has come to the teacher's: that is the floor, not zero."""
    whole = next((row for row in summarise(run)["rows"] if row["type"] == ALL), None)
    closed = None if whole is None else whole["gap_closed"]
    return "" if closed is None else f"{closed:.0%} of the gap to the teacher closed"


def _memory(name: str, peak: Series | None) -> list[tuple[Html, Html, Html, Html]]:
    return [] if peak is None else [(name, *format_bytes(float(peak.finite.values.max())).split(" "), "")]  # type: ignore[list-item]


def _compact(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------------ sections


def _configuration(config: Any) -> Html:
    return fold("Every value the run was made with", cards(config, "General")) if isinstance(config, Mapping) else ""


def _data(run: RunData) -> Html:
    parts = []
    if run.manifest:
        lines = [line if isinstance(line, Mapping) else {"path": line} for line in run.manifest]
        rows = [[one.get("path"), one.get("type"), one.get("weight")] for one in lines]
        body = table(["path", "type", "weight"], rows, "manifest")
        parts.append(card("Manifest", body if len(rows) <= _FEW else fold(f"{len(rows):,} lines", body), "wide"))
    readiness = run.readiness if isinstance(run.readiness, Mapping) else {}
    titles = {"types": "Samples and tokens", "signal": "Stored signal"}
    for name, value in readiness.items():
        title = titles.get(name, name)
        parts.append(card(title, matrix(value, str(title)) or pairs({name: value}), "wide"))
    if isinstance(run.datasets, Mapping) and any(value is not None for value in run.datasets.values()):
        parts.append(card("Named datasets", pairs(run.datasets), "wide"))
    return "".join(parts)


def _provenance(environment: Mapping[str, Any], hosts: Sequence[str]) -> Html:
    rest = dict(environment)
    command, earlier, choices = rest.pop("command", None), rest.pop("earlier_sessions", None), rest.pop("choices", None)
    parts, folded = [], []
    if isinstance(command, list):
        parts.append(card("Command", f"<pre>{text(shlex.join(map(str, command)))}</pre>", "wide"))
    if isinstance(choices, Mapping) and choices:
        rows = [[name, dig(one, "value"), dig(one, "reason")] for name, one in choices.items()]
        body = table(["what", "choice", "reason"], rows, "choices made automatically")
        folded.append(card("Choices made automatically", body, "wide"))
    if isinstance(earlier, list) and earlier:
        sessions = [
            [moment(dig(one, "started_at")), host, dig(one, "git", "commit")]
            for one, host in zip(earlier, hosts, strict=True)
        ]
        body = table(["started", "machine", "commit"], sessions, "earlier sessions")
        parts.append(card("Earlier sessions of this run", body, "wide"))
    folded.append(cards(rest, "Session"))
    return "".join([*parts, fold("Choices, software, machine, models", "".join(folded))])


def _machines(environment: Any) -> list[str]:
    """For each earlier session a letter for its machine, the same for the same one; its name is told nowhere."""
    earlier = dig(environment, "earlier_sessions")
    names = [str(dig(one, "hardware", "host")) for one in (earlier if isinstance(earlier, list) else [])]
    names.append(str(dig(environment, "hardware", "host")))
    order = list(dict.fromkeys(names))
    return [f"{'' if name != names[-1] else 'this one, '}{order.index(name) + 1}" for name in names[:-1]]
