"""One plot as inline SVG: grid, axes, lines, marks, legend and words for those who cannot see it.

    line    one series as drawn: a colour, a dash pattern and a mark, so that no line is told apart by colour alone
    figure  plot, legend, caption and the values behind it as a table

Curves live in a nested ``<svg>`` that is stretched to whatever width the page has; text, marks and line widths keep
their size, because they are placed in percent or drawn with ``vector-effect: non-scaling-stroke``. Nothing needs a
script: the page's own only reads the numbers left beside each plot to show them under the pointer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from liquid_llm.report.data import Floats, Series
from liquid_llm.report.series import Axis, downsample, short_number, smooth, step_axis, value_axis

_SPAN = 10_000  # the nested drawing's own units, whole numbers
_MAX_MARKED_POINTS = 40
_MAX_MARKED_POINTS_SMALL = 16
MARKS = ("dot", "square", "diamond", "triangle", "cross")
DASHES = ("solid", "dash", "dots", "dashdot", "long")


@dataclass(frozen=True)
class Line:
    """One series of a plot.

    Attributes:
        label: its name in the legend.
        series: its points.
        colour: 0 is the ink colour, 1 to 6 are the palette's, 7 is grey.
        style: index of dash pattern and mark.
        noisy: whether it is drawn faint with a smooth line over it.
        stepped: whether a value holds until the next point (schedules).
    """

    label: str
    series: Series
    colour: int
    style: int = 0
    noisy: bool = False
    stepped: bool = False


@dataclass(frozen=True)
class Figure:
    """What a plot shows.

    Attributes:
        key: unique on the page, letters and dashes.
        title, caption: plain text.
        unit: what the vertical axis counts.
        lines: at least one, each with a finite value.
        from_zero: whether the axis begins at zero.
        may_be_log: whether a logarithmic axis may be chosen.
        top: a fixed upper end of the axis (100 for shares).
        small: whether a lower plot does.
    """

    key: str
    title: str
    unit: str
    lines: Sequence[Line]
    caption: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    top: float | None = None
    small: bool = False


def draw_figure(figure: Figure, span: tuple[float, float]) -> str:
    """The HTML of a figure over the steps of ``span``. Titles and labels are escaped here."""
    values = np.concatenate([line.series.finite for line in figure.lines])
    y = value_axis(
        float(values.min()),
        float(values.max()) if figure.top is None else figure.top,
        from_zero=figure.from_zero,
        may_be_log=figure.may_be_log,
    )
    x = step_axis(*span, num_ticks=4 if figure.small else 6)
    drawn = [_drawn(line, figure.small) for line in figure.lines]
    unit = ", ".join(part for part in (figure.unit, "log scale" if y.is_log else "") if part)
    parts = [
        f'<figure class="card{" small" if figure.small else ""}" id="plot-{figure.key}">',
        f"<figcaption><h3>{escape(figure.title)} <small>{escape(unit)}</small></h3>",
        f"<p>{escape(figure.caption)}</p>" if figure.caption else "",
        "</figcaption>",
        _legend(drawn),
        _plot(figure, drawn, x, y),
        _values_table(figure),
        "</figure>",
    ]
    return "".join(parts)


def smoothing_windows(figures: Iterable[Figure]) -> list[int]:
    """The lengths, in rows, over which strong lines of these figures are means; empty where all lines are plain."""
    drawn = [_drawn(line, figure.small) for figure in figures for line in figure.lines]
    return sorted({one.window for one in drawn if one.window > 1})


@dataclass(frozen=True)
class _Drawn:
    """A line's points as they are drawn: ``main`` is what is read out, ``faint`` lies under it."""

    line: Line
    main: Series
    faint: Series | None
    window: int
    marked: bool


def _drawn(line: Line, small: bool) -> _Drawn:
    if line.noisy:
        main, window = smooth(line.series, 300)
        if window > 1:
            return _Drawn(line, main, downsample(line.series), window, False)
    most = _MAX_MARKED_POINTS_SMALL if small else _MAX_MARKED_POINTS
    return _Drawn(line, downsample(line.series), None, 1, len(line.series) <= most and not line.stepped)


# --------------------------------------------------------------------------------------------------------------- plot


def _plot(figure: Figure, drawn: list[_Drawn], x: Axis, y: Axis) -> str:
    title, words = f"{figure.key}-title", f"{figure.key}-words"
    faint = [_path(one.faint, one.line, x, y, "faint") for one in drawn if one.faint is not None]
    strong = [_path(one.main, one.line, x, y, "line") for one in drawn]
    marks = [_marks(one, x, y) for one in drawn]
    return "".join(
        [
            f'<svg class="plot" role="img" aria-labelledby="{title} {words}" data-plot="{figure.key}" tabindex="0">',
            f'<title id="{title}">{escape(figure.title)}</title>',
            f'<desc id="{words}">{escape(_words(figure))}</desc>',
            _grid(x, y),
            f'<svg class="curves" viewBox="0 0 {_SPAN} {_SPAN}" preserveAspectRatio="none" width="100%" height="100%">',
            *faint,
            *strong,
            "</svg>",
            *marks,
            "</svg>",
            f'<script type="application/json" id="{figure.key}-data">{_read_out(drawn, x, y)}</script>',
        ]
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = ['<g class="grid" aria-hidden="true">']
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = _percent(1 - _one(y, tick))
        parts.append(
            f'<line x1="0" x2="100%" y1="{at}" y2="{at}"/><text x="-8" y="{at}" dy=".35em">{escape(label)}</text>'
        )
    for index, (tick, label) in enumerate(zip(x.ticks, x.labels, strict=True)):
        at = _percent(_one(x, tick))
        extra = ' class="odd"' if index % 2 else ""  # a narrow screen hides every other one
        parts.append(f'<text{extra} x="{at}" y="100%" dy="1.5em" text-anchor="middle">{escape(label)}</text>')
    parts.append('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/></g>')
    return "".join(parts)


def _path(series: Series, line: Line, x: Axis, y: Axis, kind: str) -> str:
    data = path_data(x.place(series.steps), y.place(series.values), stepped=line.stepped)
    if len(series) == 2 and not line.stepped:
        kind = "faint"  # what lies between two points is unknown: the marks speak
    dash = "" if kind == "faint" else f" {DASHES[line.style % len(DASHES)]}"
    return f'<path class="{kind} c{line.colour}{dash}" d="{data}"/>'


def path_data(across: Floats, upwards: Floats, *, stepped: bool = False) -> str:
    """SVG path data in whole relative moves; a nan breaks the line.

    Args:
        across, upwards: [n] positions, 0 to 1.
        stepped: whether each height holds until the next point.
    """
    finite = np.isfinite(across) & np.isfinite(upwards)
    right = np.where(finite, across * _SPAN, 0.0).round().astype(np.int64).tolist()
    down = np.where(finite, (1.0 - upwards) * _SPAN, 0.0).round().astype(np.int64).tolist()
    parts: list[str] = []
    pen: tuple[int, int] | None = None
    for here, at_x, at_y in zip(finite.tolist(), right, down, strict=True):
        if not here:
            pen = None
            continue
        if pen is None:
            parts.append(f"M{at_x} {at_y}h0")  # h0: a point with no neighbours is still drawn, by its round cap
        elif stepped:
            parts.append(f"h{at_x - pen[0]}v{at_y - pen[1]}")
        elif (at_x, at_y) != pen:
            parts.append(f"l{at_x - pen[0]} {at_y - pen[1]}")
        pen = (at_x, at_y)
    return "".join(parts)


def _marks(drawn: _Drawn, x: Axis, y: Axis) -> str:
    """Marks on the points of a line with few; marks tell lines apart where dashes of short lines cannot."""
    series = drawn.main
    if not drawn.marked:
        return ""
    name, colour = MARKS[drawn.line.style % len(MARKS)], drawn.line.colour
    places = zip(x.place(series.steps).tolist(), y.place(series.values).tolist(), strict=True)
    uses = [f'<use href="#mark-{name}" x="{_percent(a)}" y="{_percent(1 - b)}"/>' for a, b in places if b == b]
    return f'<g class="marks c{colour}" aria-hidden="true">{"".join(uses)}</g>'


def mark_symbols() -> str:
    """The definitions that marks refer to; once a page."""
    shapes = {
        "dot": '<circle r="3.5"/>',
        "square": '<rect x="-3.2" y="-3.2" width="6.4" height="6.4"/>',
        "diamond": '<path d="M0-4.6 4.6 0 0 4.6-4.6 0z"/>',
        "triangle": '<path d="M0-4.4 4.2 3.2-4.2 3.2z"/>',
        "cross": '<path d="M-3.4-3.4 3.4 3.4M3.4-3.4-3.4 3.4" stroke="currentColor" stroke-width="2"/>',
    }
    defs = "".join(f'<g id="mark-{name}">{shape}</g>' for name, shape in shapes.items())
    return f'<svg width="0" height="0" class="defs" aria-hidden="true"><defs>{defs}</defs></svg>'


def _read_out(drawn: list[_Drawn], x: Axis, y: Axis) -> str:
    """What the page's script needs to name the values under the pointer."""
    lines = [
        {
            "label": one.line.label,
            "colour": one.line.colour,
            "steps": [int(step) for step in one.main.steps],
            "values": [_rounded(value) for value in one.main.values.tolist()],
        }
        for one in drawn
    ]
    text = json.dumps(
        {"x": [x.low, x.high], "y": [y.low, y.high], "log": y.is_log, "lines": lines},
        separators=(",", ":"),
        allow_nan=False,
    )
    return text.replace("<", "\\u003c")  # a label must not be able to end the script element


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if value == value else None


# --------------------------------------------------------------------------------------------------------------- words


def _legend(drawn: Sequence[_Drawn]) -> str:
    if len(drawn) < 2:
        return ""
    items = []
    for one in drawn:
        line = one.line
        dash, mark = DASHES[line.style % len(DASHES)], MARKS[line.style % len(MARKS)]
        sample = f'<path class="line c{line.colour} {dash}" d="M1 6h26"/>'
        use = f'<g class="marks c{line.colour}"><use href="#mark-{mark}" x="14" y="6"/></g>' if one.marked else ""
        key = f'<svg class="key" width="28" height="12" viewBox="0 0 28 12" aria-hidden="true">{sample}{use}</svg>'
        items.append(f"<li>{key}{escape(line.label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _words(figure: Figure) -> str:
    """The plot in sentences."""
    return " ".join(_sentence(line) for line in figure.lines)


def _sentence(line: Line) -> str:
    steps, values = _finite_points(line.series)
    if len(values) == 1:
        return f"{line.label}: {short_number(values[0])} at step {steps[0]:,.0f}."
    low, high = int(values.argmin()), int(values.argmax())
    return (
        f"{line.label}: from {short_number(values[0])} at step {steps[0]:,.0f} to {short_number(values[-1])} at step "
        f"{steps[-1]:,.0f}, lowest {short_number(values[low])} at step {steps[low]:,.0f}, highest "
        f"{short_number(values[high])} at step {steps[high]:,.0f}."
    )


def _finite_points(series: Series) -> tuple[Floats, Floats]:
    finite = np.isfinite(series.values)
    return series.steps[finite], series.values[finite]


def _values_table(figure: Figure) -> str:
    cells: list[Callable[[Floats], float]] = [lambda v: v[0], lambda v: v[-1], np.min, np.median, np.max]
    rows = []
    for line in figure.lines:
        _, values = _finite_points(line.series)
        numbers = "".join(f"<td>{escape(short_number(float(cell(values))))}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(line.label)}</th>{numbers}<td>{len(values):,}</td></tr>')
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("", "first", "last", "lowest", "median", "highest", "rows")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details><summary>Values</summary><div class="scroll">{table}</div></details>'


def _one(axis: Axis, value: float) -> float:
    return float(axis.place(np.array([value]))[0])


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
