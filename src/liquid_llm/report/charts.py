"""Which plots a run gets, out of the columns it wrote. A plot without a single value is left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from liquid_llm.report.data import Columns, RunData, Series
from liquid_llm.report.svg import Figure, Line

INK, GREY = 0, 7
WHOLE = 4  # what is validated over all types; 1 to 3 belong to the types
_TYPE_COLOURS = {"lm": 1, "math_tool": 2, "code": 3}
_NUM_COLOURS = 6
_AT_LENGTH = re.compile(r"^val_loss_(student|teacher)@(\d+)$")


@dataclass(frozen=True)
class Group:
    """Plots that belong together under one heading."""

    title: str
    figures: list[Figure]


def choose_figures(run: RunData) -> list[Group]:
    """All plots the run's rows can fill, in reading order."""
    train, evaluation = run.train, run.evaluation
    present = [*train.types, *evaluation.types]
    types = list(dict.fromkeys([*(kind for kind in _TYPE_COLOURS if kind in present), *present]))
    groups = [
        Group("Losses", _losses(train, evaluation, types)),
        Group("Distillation", _distillation(train, evaluation, types)),
        Group("Schedules", _schedules(train)),
        Group("Machine", _machine(train)),
    ]
    return [Group(one.title, one.figures) for one in groups if one.figures]


def _losses(train: Columns, evaluation: Columns, types: list[str]) -> list[Figure]:
    figures = [
        _figure(
            Figure("loss", "Loss", "nats a token", [], "Mean over labelled positions; evaluation is token-weighted."),
            may_be_log=True,
            lines=[
                _line("training objective", train.get("loss"), GREY, 2, noisy=True),
                _line("training cross-entropy", train.get("ce"), INK, 0, noisy=True),
                _line("validation", evaluation.get("val_loss_student"), WHOLE, 0),
                _line("teacher, validation", evaluation.get("val_loss_teacher"), GREY, 1),
            ],
        ),
        _figure(
            Figure(
                "loss-by-length",
                "Validation loss by context length",
                "nats a token",
                [],
                "Every length sees the same text.",
            ),
            lines=_lines_by_length(evaluation),
        ),
        _figure(
            Figure("ce-by-type", "Training cross-entropy by type", "nats a token", []),
            may_be_log=True,
            lines=_lines_by_type(train, types, "ce", noisy=True),
        ),
        _figure(
            Figure("val-by-type", "Validation loss by type", "nats a token", []),
            may_be_log=True,
            lines=_lines_by_type(evaluation, types, "val_loss"),
        ),
    ]
    return [one for one in figures if one is not None]


def _distillation(train: Columns, evaluation: Columns, types: list[str]) -> list[Figure]:
    figures = [
        _figure(
            Figure(
                "kd",
                "KL divergence from the teacher",
                "nats a position",
                [],
                "Training at the scheduled temperature, validation at 1.",
            ),
            may_be_log=True,
            lines=[
                _line("training", train.get("kd"), INK, 0, noisy=True),
                _line("validation", evaluation.get("val_kd"), WHOLE, 0),
            ],
        ),
        _figure(
            Figure("kd-by-type", "Training KL by type", "nats a position", [], "Over positions with a teacher signal."),
            may_be_log=True,
            lines=_lines_by_type(train, types, "kd", noisy=True),
        ),
        _figure(
            Figure("val-kd-by-type", "Validation KL by type", "nats a position", [], "At temperature 1."),
            may_be_log=True,
            lines=_lines_by_type(evaluation, types, "val_kd"),
        ),
        _figure(
            Figure(
                "coverage",
                "Positions with a teacher signal",
                "%",
                [],
                "Share of labelled positions.",
                from_zero=True,
                top=100.0,
            ),
            lines=[
                _line("all", _scaled(train.get("kd_coverage"), 100), INK, 0, noisy=True),
                *_lines_by_type(train, types, "kd_coverage", noisy=True, scale=100.0),
            ],
        ),
        _figure(
            Figure(
                "l2",
                "Distance to the old logits",
                "mean squared",
                [],
                "The keep-old-logits term before its weight.",
                from_zero=True,
            ),
            lines=[_line("training", _unless_zero(train.get("l2")), 4, 0, noisy=True)],
        ),
    ]
    return [one for one in figures if one is not None]


def _schedules(train: Columns) -> list[Figure]:
    wanted = [
        ("alpha", "KD weight α", "share", "kd_alpha", 1),
        ("temperature", "KD temperature", "T", "kd_temperature", 2),
        ("lr", "Learning rate", "", "lr", 3),
    ]
    figures = [
        _figure(
            Figure(key, title, unit, [], from_zero=True, small=True),
            lines=[_line(title, train.get(column), colour, 0, stepped=column != "lr")],
        )
        for key, title, unit, column, colour in wanted
    ]
    gamma = _line("γ", _unless_zero(train.get("l2_gamma")), 4, 0)
    figures.append(
        _figure(Figure("gamma", "Old-logits weight γ", "per position", [], from_zero=True, small=True), lines=[gamma])
    )
    return [one for one in figures if one is not None]


def _machine(train: Columns) -> list[Figure]:
    def one(key: str, title: str, unit: str, series: Series | None, colour: int) -> Figure | None:
        line = _line(title, series, colour, 0, noisy=True)
        return _figure(Figure(key, title, unit, [], from_zero=True, small=True), lines=[line])

    peak, resident = train.get("peak_memory_bytes"), train.get("rss_bytes")
    figures = [
        one("throughput", "Throughput", "real tokens a second", train.get("tokens_per_second"), 1),
        _figure(
            Figure("memory", "Memory", "GiB", [], from_zero=True, small=True),
            lines=[
                _line("device peak", _scaled(train.get("device_peak_memory_bytes"), 2.0**-30), 1, 0),
                _line("host peak", _scaled(peak, 2.0**-30), 2, 0),
                _line("resident", _scaled(resident, 2.0**-30), 1, 1, noisy=True),
            ],
        ),
        _figure(
            Figure("grad-norm", "Gradient norm", "before clipping", [], small=True),
            may_be_log=True,
            lines=[_line("gradient norm", train.get("grad_norm"), INK, 0, noisy=True)],
        ),
        one("waiting", "Waiting for data and signal", "% of the time", _share_waited(train), 4),
        one("padding", "Padding", "% of tokens", _scaled(train.get("padding_share"), 100.0), 5),
    ]
    return [figure for figure in figures if figure is not None]


# --------------------------------------------------------------------------------------------------------------- lines


def _line(
    label: str, series: Series | None, colour: int, style: int, *, noisy: bool = False, stepped: bool = False
) -> Line | None:
    return None if series is None else Line(label, series, colour, style, noisy, stepped)


def _figure(figure: Figure, *, lines: list[Line | None] | list[Line], may_be_log: bool = False) -> Figure | None:
    present = [line for line in lines if line is not None]
    return replace(figure, lines=present, may_be_log=may_be_log) if present else None


def _lines_by_type(
    columns: Columns, types: list[str], name: str, *, noisy: bool = False, scale: float = 1.0
) -> list[Line]:
    lines = []
    for index, kind in enumerate(types):
        series = _scaled(columns.get(f"{kind}/{name}"), scale)
        if series is not None:
            colour = _TYPE_COLOURS.get(kind, 1 + (3 + index) % _NUM_COLOURS)
            lines.append(Line(kind, series, colour, _style_of(kind, index), noisy))
    return lines


def _style_of(kind: str, index: int) -> int:
    return _TYPE_COLOURS[kind] - 1 if kind in _TYPE_COLOURS else index


def _lines_by_length(evaluation: Columns) -> list[Line]:
    found = [(int(match[2]), match[1]) for match in map(_AT_LENGTH.match, evaluation.series) if match]
    lengths = sorted({length for length, _ in found})
    lines = []
    for who in ("student", "teacher"):
        for index, length in enumerate(lengths):
            series = evaluation.get(f"val_loss_{who}@{length}")
            if series is not None:
                colour = 1 + (3 + index) % _NUM_COLOURS if who == "student" else GREY
                lines.append(Line(f"{who}, {length:,} tokens", series, colour, index))
    return lines


def _scaled(series: Series | None, factor: float) -> Series | None:
    return None if series is None else Series(series.steps, series.values * factor)


def _unless_zero(series: Series | None) -> Series | None:
    return None if series is None or not series.finite.any() else series


def _share_waited(train: Columns) -> Series | None:
    waited, seconds = train.get("signal_wait_seconds"), train.get("seconds")
    if waited is None or seconds is None:
        return None
    steps, here, there = np.intersect1d(waited.steps, seconds.steps, return_indices=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = 100.0 * waited.values[here] / seconds.values[there]
    share[~np.isfinite(share)] = np.nan
    return Series(steps, share) if np.isfinite(share).any() else None
