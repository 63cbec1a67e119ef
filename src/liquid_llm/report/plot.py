"""One plot as inline SVG: axes with round numbers, lines, legend, and a sentence for those who cannot see it.

look     what a line is told apart by: a colour, and beside others a dash and a mark, for those who see no colours

Curves live in a nested ``<svg>`` that is stretched to whatever width the page has; text and line widths keep their
size, because they are placed in percent or drawn with ``vector-effect: non-scaling-stroke``. Nothing needs a script:
the page's own only reads the numbers left beside each plot to show them under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from liquid_llm.report.data import Floats, Series

_SPAN = 10_000  # the nested drawing's own units, whole numbers
_MAX_POINTS = 600  # of a line
_MIN_HALF_WINDOW = 3  # fewer rows are readable as they are
_COLOURS, _NUM_DASHES = 8, 4
_DASH = (0, 0, 1, 2, 0, 1, 2, 3)  # of each colour at first; those of one dash have other marks
_NUM_MARKS = 7  # of a line, at most; each point of an evaluation has one where there are few
MARKS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M-3-3h6v6h-6z", "M0-4l4 7h-8z", "M0-4l4 4-4 4-4-4z", "M-4 0h8M0-4v8")


@dataclass(frozen=True)
class Line:
    """One series of a plot.

    Attributes:
        series: its points, one of them finite at least.
        look: 0 is the ink colour, 1 to 6 are the palette's, 7 is grey; from 8 on they come again with other dashes.
            Of 32 looks no two have both colour and dash in common.
    """

    label: str
    series: Series
    look: int

    @property
    def style(self) -> str:
        """The classes of colour and dash."""
        return f"c{self.look % _COLOURS} d{(_DASH[self.look % _COLOURS] + self.look // _COLOURS) % _NUM_DASHES}"

    @property
    def colour(self) -> str:
        """The class of the colour alone."""
        return f"c{self.look % _COLOURS}"

    @property
    def mark(self) -> str:
        """The reference to the shape that stands on the line here and there."""
        return f"#mark-{self.look % len(MARKS)}"


@dataclass(frozen=True)
class Figure:
    """What a plot shows.

    Attributes:
        key: unique on the page, letters and dashes.
        title, caption: plain text.
        unit: what the vertical axis counts.
        lines: at least one.
        from_zero: whether the axis begins at zero.
        noisy: whether lines of many rows are drawn faint, with their running mean over them.
        small: whether a lower plot does.
        across: what the horizontal axis counts.
        log: whether that axis is logarithmic; points at 0 are then left out.
        named: whether a single line has a legend too, and a dash.
    """

    key: str
    title: str
    unit: str
    caption: str = ""
    lines: Sequence[Line] = ()
    from_zero: bool = False
    noisy: bool = False
    small: bool = False
    across: str = "step"
    log: bool = False
    named: bool = False


@dataclass(frozen=True)
class Below:
    """A second row of numbers under the horizontal axis: ``name`` counts what had been at each of its steps."""

    name: str
    series: Series


def draw_figure(figure: Figure, span: tuple[float, float], below: Below | None = None) -> str:
    """The HTML of a figure over the steps of ``span``. Titles and labels are escaped here."""
    lines = [replace(line, series=_after_zero(line.series)) for line in figure.lines] if figure.log else figure.lines
    values = np.concatenate([line.series.finite.values for line in lines])
    first = min(float(line.series.steps[0]) for line in lines)
    x = log_axis(first, span[1]) if figure.log else step_axis(*span)
    y = value_axis(float(values.min()), float(values.max()), from_zero=figure.from_zero)
    thin = [downsample(line.series) for line in lines]
    means = [smooth(line.series) if figure.noisy else None for line in lines]
    main = [one if mean is None else mean for one, mean in zip(thin, means, strict=True)]
    several = len(lines) > 1 or figure.named
    faint = [
        _path(one, f"faint {line.colour}", x, y) for one, mean, line in zip(thin, means, lines, strict=True) if mean
    ]
    strong = [
        _path(one, f"line {line.style if several else line.colour}", x, y)
        for one, line in zip(main, lines, strict=True)
    ]
    title, words = f"{figure.key}-title", f"{figure.key}-words"
    legend = "".join(f"<li>{_key(line)}{escape(line.label)}</li>" for line in lines)
    deep = below is not None and not figure.small and not figure.log and figure.across == "step"
    kind = f"{' small' if figure.small else ''}{' deep' if deep else ''}"
    return "".join(
        [
            f'<figure class="card{kind}" id="plot-{figure.key}">',
            f"<figcaption><h3>{escape(figure.title)} <small>{escape(figure.unit)}</small></h3>",
            f"<p>{escape(figure.caption)}</p>" if figure.caption else "",
            "</figcaption>",
            f'<ul class="legend">{legend}</ul>' if several else "",
            f'<svg class="plot" role="img" aria-labelledby="{title} {words}" data-plot="{figure.key}" tabindex="0">',
            f'<title id="{title}">{escape(figure.title)}</title><desc id="{words}">{escape(_sentence(figure))}</desc>',
            _grid(x, y, figure.across, below if deep else None),
            f'<svg class="curves" viewBox="0 0 {_SPAN} {_SPAN}" preserveAspectRatio="none" width="100%" height="100%">',
            *faint,
            *strong,
            "</svg>",
            *(_marks(one, line, x, y) for one, line in zip(main, lines, strict=True) if several or len(one) <= 12),
            "</svg>",
            f'<script type="application/json" id="{figure.key}-data">{_read_out(figure, lines, main, x, y)}</script>',
            "</figure>",
        ]
    )


def _after_zero(series: Series) -> Series:
    kept = series.steps > 0
    return Series(series.steps[kept], series.values[kept])


def _key(line: Line) -> str:
    """A line of the legend: a piece of the line with its mark."""
    mark = f'<use class="mark" href="{line.mark}" x="16" y="6"/>'
    piece = f'<path class="line {line.style}" d="M1 6h30"/>{mark}'
    return f'<svg class="key {line.colour}" width="32" height="12" aria-hidden="true">{piece}</svg>'


def draw_marks() -> str:
    """The shapes that the lines of a page refer to, once a page."""
    shapes = "".join(f'<path id="mark-{number}" d="{shape}"/>' for number, shape in enumerate(MARKS))
    return f'<svg class="shapes" width="0" height="0" aria-hidden="true"><defs>{shapes}</defs></svg>'


def _marks(series: Series, line: Line, x: Axis, y: Axis) -> str:
    """A mark at some points of a line, evenly chosen; beginning elsewhere for each look, so that they stand apart."""
    points = series.finite
    count = min(len(points), _NUM_MARKS)
    shift = (line.look % 4) / 4 if len(points) > 2 * _NUM_MARKS else 0.0
    places = np.linspace(0, len(points) - 1, count) if count > 1 else np.zeros(1)
    places = np.unique(np.minimum(places + shift * len(points) / _NUM_MARKS, len(points) - 1).round().astype(np.int64))
    across, up = x.position(points.steps[places]), y.position(points.values[places])
    return "".join(
        f'<use class="mark {line.colour}" href="{line.mark}" x="{_percent(right)}" y="{_percent(1 - height)}"/>'
        for right, height in zip(across.tolist(), up.tolist(), strict=True)
    )


def _grid(x: Axis, y: Axis, across: str, below: Below | None) -> str:
    parts = ['<g class="grid" aria-hidden="true">']
    for tick in y.ticks:
        at = _percent(1 - y.position(tick))
        parts.append(
            f'<line x1="0" x2="100%" y1="{at}" y2="{at}"/><text x="-8" y="{at}" dy=".35em">{label(tick)}</text>'
        )
    rows = [(across, [label(tick) for tick in x.ticks])]
    if below is not None:
        reached = np.interp(x.ticks, below.series.steps, below.series.values).tolist()
        rows.append((below.name, [compact(one) for one in reached]))
    for depth, (name, labels) in enumerate(rows):
        row = f'y="100%" dy="{1.5 + 1.4 * depth:g}em"'
        parts.append(f'<text class="name" x="-8" {row}>{escape(name)}</text>')
        for number, (tick, words) in enumerate(zip(x.ticks, labels, strict=True)):
            place = float(x.position(tick))
            if place < 0.02 and len(words) > 2:
                continue  # it would run into the name
            extra = ' class="odd"' if number % 2 else ""  # a narrow screen hides every other one
            parts.append(f'<text{extra} x="{_percent(place)}" {row} text-anchor="middle">{words}</text>')
    parts.append('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/></g>')
    return "".join(parts)


def _path(series: Series, style: str, x: Axis, y: Axis) -> str:
    data = path_data(x.position(series.steps), y.position(series.values))
    return f'<path class="{style}" d="{data}"/>'


def path_data(across: Floats, upwards: Floats) -> str:
    """SVG path data in whole relative moves; a nan breaks the line.

    Args:
        across, upwards: [n] positions, 0 to 1.
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
        elif (at_x, at_y) != pen:
            parts.append(f"l{at_x - pen[0]} {at_y - pen[1]}")
        pen = at_x, at_y
    return "".join(parts)


def _read_out(figure: Figure, lines: Sequence[Line], main: list[Series], x: Axis, y: Axis) -> str:
    """What the page's script needs to name the values under the pointer."""
    shown = [
        {
            "label": line.label,
            "colour": line.colour,
            "steps": one.steps.round().astype(np.int64).tolist(),
            "values": [float(f"{value:.4g}") if value == value else None for value in one.values.tolist()],
        }
        for line, one in zip(lines, main, strict=True)
    ]
    text = json.dumps(
        {"across": figure.across, "log": x.log, "x": [x.low, x.high], "y": [y.low, y.high], "lines": shown},
        separators=(",", ":"),
        allow_nan=False,
    )
    return text.replace("<", "\\u003c")  # a label must not be able to end the script element


def _sentence(figure: Figure) -> str:
    """The plot in a sentence: where each line begins and ends, and its extremes."""
    parts = []
    for line in figure.lines:
        steps, values = line.series.finite.steps, line.series.finite.values
        points = [(values[at], steps[at]) for at in (0, -1, int(values.argmin()), int(values.argmax()))]
        first, last, lowest, highest = (
            f"{short_number(value)} at {figure.across} {step:,.0f}" for value, step in points
        )
        words = f"from {first} to {last}, lowest {lowest}, highest {highest}" if len(values) > 1 else first
        parts.append(f"{line.label}: {words}")
    return f"{'; '.join(parts)}."


def _percent(share: float | Floats) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


# ---------------------------------------------------------------------------------------------------------- points


def downsample(series: Series, max_points: int = _MAX_POINTS) -> Series:
    """A series of at most ``max_points`` points that keeps its first and last point and each bucket's extremes."""
    count = len(series)
    if count <= max_points:
        return series
    width = -(-count // ((max_points - 2) // 2))
    grid = np.full((-(-count // width), width), np.nan)
    grid.flat[:count] = series.values
    offsets = np.arange(len(grid)) * width
    low = np.where(np.isnan(grid), np.inf, grid).argmin(axis=1) + offsets
    high = np.where(np.isnan(grid), -np.inf, grid).argmax(axis=1) + offsets
    # In a bucket without a number both are its first element, a nan: the gap stays a gap.
    keep = np.unique(np.concatenate([[0, count - 1], low, high]))
    return Series(series.steps[keep], series.values[keep])


def smooth(series: Series, max_points: int = _MAX_POINTS // 2) -> Series | None:
    """The centred mean over a twentieth of the rows or less; None for a series that is readable as it is."""
    count = len(series)
    half = min(count // 40, 50 + count // 200)
    if half < _MIN_HALF_WINDOW:
        return None
    finite = np.isfinite(series.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # The window shrinks evenly towards both ends, so that it stays centred, but not to a single noisy row.
    index = np.unique(np.linspace(0, count - 1, min(count, max_points)).round().astype(np.int64))
    reach = np.clip(np.minimum(index, count - 1 - index), half // 3, half)
    begin, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Series(series.steps[index], (sums[end] - sums[begin]) / (counts[end] - counts[begin]))


# ------------------------------------------------------------------------------------------------------------ axes


@dataclass(frozen=True)
class Axis:
    """A range of values, low < high, and round values inside it; a logarithmic one begins above 0."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def position(self, values: Floats | float) -> Floats:
        """Where values lie on the axis, 0 at ``low`` and 1 at ``high``."""
        if self.log:
            return np.asarray(np.log(np.asarray(values) / self.low) / math.log(self.high / self.low))
        return np.asarray((values - self.low) / (self.high - self.low))


def value_axis(low: float, high: float, *, from_zero: bool = False) -> Axis:
    """The axis that shows ``low`` to ``high`` with a little room."""
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room * (low != 0), high + room
    room = 0.05 * (high - low)
    return _axis(low if low == 0 and from_zero else low - room, high if high == 0 else high + room, 5)


def step_axis(low: float, high: float) -> Axis:
    """The axis of optimizer steps: whole numbers, no room at the sides."""
    if high <= low:
        low, high = low - 1, high + 1
    return _axis(low, high, 5, least=1.0)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis of steps, ``low`` > 0, with powers of ten, and 2 and 5 times these where they are few."""
    high = max(high, low * 2)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(low, high, tuple(one for one in ticks if low * (1 - 1e-9) <= one <= high * (1 + 1e-9)), log=True)


def _axis(low: float, high: float, num_ticks: int, least: float = 0.0) -> Axis:
    step = max(least, nice_step((high - low) / num_ticks))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(index * step for index in range(first, last + 1)))


def nice_step(rough: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten not below ``rough``."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next((m * scale for m in (1.0, 2.0, 2.5, 5.0) if m * scale >= rough * (1 - 1e-9)), 10.0 * scale)


def label(tick: float) -> str:
    """A round number as short as it goes: ``0``, ``2.5``, ``40k``, ``1.5M``, ``2e−4``."""
    size, letter = next((one for one in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if abs(tick) >= one[0]), (1.0, ""))
    if tick and abs(tick) < 1e-3:
        digits, exponent = f"{tick:.8e}".split("e")
        return f"{float(digits):.9g}e{int(exponent)}".replace("-", "−")
    return f"{tick / min(size, 1e3 if letter == 'k' else size):.9g}{letter}".replace("-", "−")


def compact(value: float) -> str:
    """A count in three digits: ``950``, ``38.5k``, ``1.38M``, ``2.1G``."""
    size, letter = next(
        (one for one in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= one[0] * 0.9995), (1.0, "")
    )
    return f"{value / size:.3g}{letter}"


def short_number(value: float) -> str:
    """Four significant digits: ``2.346``, ``12,346``, ``1.235e−7``."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}".replace("-", "−")
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if decimals else text).replace("-", "−")
