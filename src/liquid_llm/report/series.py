"""From a series to what a plot can show: fewer points, a smooth line, axes with round numbers.

downsampling   at most a few hundred points, with every bucket's minimum and maximum among them: no spike is lost
smoothing      the centred mean over a window of rows
axis           a range, its ticks, and the map from values to 0..1 (upwards)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from liquid_llm.report.data import Floats, Series

MAX_POINTS = 600
_LOG_RATIO = 15.0
_MIN_HALF_WINDOW = 3  # fewer rows are readable as they are


def downsample(series: Series, max_points: int = MAX_POINTS) -> Series:
    """A series of at most ``max_points`` points that keeps its first and last point and each bucket's extremes."""
    count = len(series)
    if count <= max_points:
        return series
    num_buckets = (max_points - 2) // 2
    width = -(-count // num_buckets)
    rows = -(-count // width)
    padded = np.full(rows * width, np.nan)
    padded[:count] = series.values
    grid = padded.reshape(rows, width)
    offsets = np.arange(rows) * width
    low = np.where(np.isnan(grid), np.inf, grid).argmin(axis=1) + offsets
    high = np.where(np.isnan(grid), -np.inf, grid).argmax(axis=1) + offsets
    # In a bucket without a number both are its first element, a nan: the gap stays a gap.
    keep = np.unique(np.concatenate([[0, count - 1], low, high]))
    return Series(series.steps[keep], series.values[keep])


def smooth(series: Series, max_points: int = MAX_POINTS) -> tuple[Series, int]:
    """The centred mean over a twentieth of the rows or less, and the window's length: 1 for a series left as it is."""
    count = len(series)
    half = min(count // 40, 50 + count // 200)
    if half < _MIN_HALF_WINDOW:
        return series, 1
    finite = np.isfinite(series.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # The window shrinks evenly towards both ends, so that it stays centred, but not to a single noisy row.
    index = np.arange(count)
    reach = np.clip(np.minimum(index, index[::-1]), half // 3, half)
    begin, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    if count <= max_points:
        return Series(series.steps, means), 2 * half + 1
    keep = np.unique(np.linspace(0, count - 1, max_points).round().astype(np.int64))
    return Series(series.steps[keep], means[keep]), 2 * half + 1


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic.

    Attributes:
        low, high: the values at 0 and 1; low < high.
        ticks: round values inside the range.
        labels: a text for each tick.
        is_log: whether equal distances are equal ratios.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    is_log: bool = False

    def place(self, values: Floats) -> Floats:
        """Where values lie on the axis, 0 at ``low`` and 1 at ``high``."""
        if self.is_log:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray((np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low)))
        return (values - self.low) / (self.high - self.low)


def value_axis(low: float, high: float, *, from_zero: bool = False, may_be_log: bool = False) -> Axis:
    """The axis that shows ``low`` to ``high`` with a little room; logarithmic where allowed and the ratio is large."""
    if may_be_log and low > 0 and high / low > _LOG_RATIO:
        return _log_axis(low, high)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        room = abs(high) * 0.1 or 1.0
        low, high = (0.0, high or 1.0) if from_zero and high >= 0 else (low - room, high + room)
    room = 0.05 * (high - low)
    top = high + room if high != 0 else high
    bottom = low if from_zero and low == 0 else low - room
    step = nice_step((top - bottom) / 5)
    ticks = _multiples(step, bottom, top)
    return Axis(bottom, top, ticks, tuple(tick_label(tick, step) for tick in ticks))


def step_axis(low: float, high: float, num_ticks: int = 6) -> Axis:
    """The axis of optimizer steps: whole numbers, no room at the sides."""
    if high <= low:
        low, high = low - 1, high + 1
    step = max(1.0, nice_step((high - low) / num_ticks))
    ticks = _multiples(step, low, high)
    return Axis(low, high, ticks, tuple(tick_label(tick, step) for tick in ticks))


def _log_axis(low: float, high: float) -> Axis:
    low, high = low / 1.15, high * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    per_decade: tuple[int, ...] = (1, 2, 5) if len(decades) <= 4 else (1,)
    stride = max(1, len(decades) // 7)
    ticks = [m * 10.0**d for d in decades if d % stride == 0 for m in per_decade]
    shown = tuple(tick for tick in ticks if low <= tick <= high)
    return Axis(low, high, shown, tuple(tick_label(tick, tick) for tick in shown), is_log=True)


def nice_step(rough: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten not below ``rough``."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next((m * scale for m in (1.0, 2.0, 2.5, 5.0) if m * scale >= rough * (1 - 1e-9)), 10.0 * scale)


def _multiples(step: float, low: float, high: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def tick_label(value: float, step: float) -> str:
    """A tick as short as the distance to its neighbours allows: ``0``, ``2.5``, ``40k``, ``1.5M``, ``2e-4``."""
    if value == 0:
        return "0"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and abs(value) >= 1e4:
            return f"{_trimmed(value / size, step / size)}{letter}"
    if abs(value) < 1e-3 or (abs(step) < 1e-3 and abs(value) < 1e-2):
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        scale = 10.0**exponent
        return f"{_trimmed(value / scale, step / scale)}e{exponent}".replace("-", "−")
    return _trimmed(value, step).replace("-", "−")


def _trimmed(value: float, step: float) -> str:
    decimals = max(0, min(12, math.ceil(-math.log10(abs(step)) - 1e-9)))
    # a step of 2.5 needs one decimal more than a step of 2
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def short_number(value: float) -> str:
    """Four significant digits for tables and read-outs."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{min(decimals, 6)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        digits, exponent = f"{value:.3e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")
