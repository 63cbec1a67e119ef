"""Which plots a run gets, out of the columns it wrote.

One with nothing but zeros is left out; one whose lines are all level, or hardly leave zero, is a sentence instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from liquid_llm.report.data import RunData, Series
from liquid_llm.report.plot import Figure, Line, short_number

INK, GREY = 0, 7
_NUM_COLOURS = 6
_AT_LENGTH = re.compile(r"val_loss_(student|teacher)@(\d+)")
_GIB = 2.0**-30
_FACTORS = {
    **dict.fromkeys(("kd_coverage", "padding_share", "waited_share", "val_agreement", "val_overlap"), 100.0),
    **dict.fromkeys(("val_calibration", "val_calibration_teacher"), 100.0),
    **dict.fromkeys(("device_peak_memory_bytes", "peak_memory_bytes", "rss_bytes"), _GIB),
}

_Wanted = str | list[tuple[str, str, int]]  # a column of each type, or of each length; or label, column, look

_LOSSES: _Wanted = [
    ("training objective", "train.loss", GREY),
    ("training cross-entropy", "train.ce", INK),
    ("validation", "eval.val_loss_student", 4),
    ("teacher, validation", "eval.teacher", 5),
]
_AS_TRAINED = (
    "As it is trained with: at the scheduled temperature, before the factor T² and the weight α of the objective. "
    "Not the quantity of validation."
)
_AS_JUDGED = "KL(teacher ‖ student) at temperature 1, whatever is trained with, over positions with a signal."
_MANY_TIMES = 50  # as many steps as the first row's: then a logarithmic axis shows something

# fmt: off
_PLOTS: dict[str, list[tuple[Figure, _Wanted]]] = {
    "Losses": [
        (Figure("loss", "Loss", "nats a token", "Means over labelled positions.", noisy=True),
         _LOSSES),
        (Figure("loss-log", "Loss, early steps wide", "nats a token", "The same over a logarithmic axis.", noisy=True,
                log=True), _LOSSES),
        (Figure("loss-with-teacher", "Validation loss where the teacher was asked", "nats a token",
                "Both over the same positions: those of the types that a model is asked about."),
         [("student", "eval.val_loss_student_with_teacher", 4), ("teacher", "eval.teacher_alone", 5)]),
        (Figure("loss-by-length", "Validation loss by context length", "nats a token", "All see the same text."),
         "eval.@"),
        (Figure("ce-by-type", "Training cross-entropy by type", "nats a token", noisy=True), "train.*/ce"),
        (Figure("val-by-type", "Validation loss by type", "nats a token"), "eval.*/val_loss"),
        (Figure("teacher-by-type", "The teacher's own loss by type", "nats a token", "Of models that are asked."),
         "eval.*/val_loss_teacher"),
    ],
    "Distillation": [
        (Figure("val-kd", "Validation: KL from the teacher", "nats a position", _AS_JUDGED),
         [("validation", "eval.val_kd", 4)]),
        (Figure("val-kd-by-type", "Validation: KL from the teacher, by type", "nats a position", "At temperature 1."),
         "eval.*/val_kd"),
        (Figure("kd", "Training: divergence from the teacher", "nats a position", _AS_TRAINED, noisy=True),
         [("training", "train.kd", INK)]),
        (Figure("kd-by-type", "Training: divergence, by type", "nats a position", "Over positions with a signal.",
                noisy=True), "train.*/kd"),
        (Figure("coverage", "Positions with a teacher signal", "% of labelled", from_zero=True, noisy=True),
         "train.*/kd_coverage"),
        (Figure("l2", "Distance to the old logits", "mean squared", "Before its weight.", from_zero=True),
         [("training", "train.l2", 4)]),
    ],
    "Nearness": [
        (Figure("agreement", "Agreement with the teacher, by type", "% of positions",
                "How often both have the same likeliest token."), "eval.*/val_agreement"),
        (Figure("overlap", "Overlap with the teacher, by type", "% of the mass",
                "Sum of min(p, q): how often a drafted token would be kept."), "eval.*/val_overlap"),
        (Figure("bits", "Bits a byte, by type", "bits a byte of text"), "eval.*/val_bits_per_byte"),
        (Figure("calibration", "Expected calibration error", "% of the confidence", from_zero=True),
         [("student", "eval.val_calibration", 4), ("teacher", "eval.val_calibration_teacher", 5)]),
    ],
    "Answers": [
        (Figure("answers", "Held-out answers that are right, by type", "answers", "Of as many at each evaluation.",
                from_zero=True), "eval.*/answers_right"),
    ],
    "Schedules": [
        (Figure("alpha", "KD weight α", "", from_zero=True, small=True), [("α", "train.kd_alpha", 1)]),
        (Figure("temperature", "KD temperature T", "", from_zero=True, small=True), [("T", "train.kd_temperature", 2)]),
        (Figure("lr", "Learning rate", "", from_zero=True, small=True), [("learning rate", "train.lr", 3)]),
        (Figure("gamma", "Old-logits weight γ", "per position", from_zero=True, small=True),
         [("γ", "train.l2_gamma", 4)]),
    ],
    "Machine": [
        (Figure("throughput", "Throughput", "real tokens a second", from_zero=True, noisy=True, small=True),
         [("throughput", "train.tokens_per_second", 1)]),
        (Figure("memory", "Memory", "GiB", from_zero=True, small=True),
         [("device peak", "train.device_peak_memory_bytes", 1), ("host peak", "train.peak_memory_bytes", 2),
          ("resident", "train.rss_bytes", 3)]),
        (Figure("grad-norm", "Gradient norm", "before clipping", noisy=True, small=True),
         [("gradient norm", "train.grad_norm", INK)]),
        (Figure("waiting", "Waiting for data and signal", "% of the time", from_zero=True, noisy=True, small=True),
         [("waiting", "train.waited_share", 4)]),
        (Figure("padding", "Padding", "% of tokens", from_zero=True, noisy=True, small=True),
         [("padding", "train.padding_share", 5)]),
    ],
}
# fmt: on


_HARDLY = {"waiting": 1.0, "padding": 1.0}  # % up to which the plot would be a line at zero


@dataclass(frozen=True)
class Group:
    """What stands under a heading: plots, and sentences for what needs none."""

    figures: list[Figure]
    sentences: list[str]


def choose_figures(run: RunData) -> dict[str, Group]:
    """All that the run's rows can show, by heading and in reading order."""
    chosen = {}
    for heading, plots in _PLOTS.items():
        group = chosen[heading] = Group([], [])
        for figure, wanted in plots:
            made = _with_limit(run, replace(figure, lines=list(_lines(run, wanted))))
            if not any(line.series.finite.values.any() for line in made.lines):
                continue
            sentence = say_instead(made)
            if sentence is not None:
                group.sentences.append(sentence)
            elif not made.log or _is_long(made):
                group.figures.append(made)
    return {heading: group for heading, group in chosen.items() if group.figures or group.sentences}


def say_instead(figure: Figure) -> str | None:
    """A sentence that says as much as the plot would; None where there is something to see."""
    if any(len(line.series) < 2 or len(line.series.finite) < len(line.series) for line in figure.lines):
        return None
    most = _HARDLY.get(figure.key)
    if most is not None and all(abs(line.series.values).max() < most for line in figure.lines):
        return f"{figure.title}: below {most:g} {figure.unit} in every row."
    values = [line.series.values for line in figure.lines]
    if any(one.max() - one.min() > 1e-6 * abs(one).max() for one in values):
        return None
    shown = [f"{short_number(float(one[-1]))} {figure.unit}".strip() for one in values]
    names = [line.label for line in figure.lines]
    if len(names) == 1:
        words = shown[0] if names[0] in figure.title.lower() or len(names[0]) < 2 else f"{names[0]} {shown[0]}"
    elif len(set(shown)) == 1:
        words = f"{shown[0]} ({', '.join(names)})"
    else:
        words = ", ".join(f"{name} {value}" for name, value in zip(names, shown, strict=True))
    return f"{figure.title}: {words} at every step."


def _is_long(figure: Figure) -> bool:
    """Whether a logarithmic axis shows something that the other does not."""
    steps = np.unique(np.concatenate([line.series.steps for line in figure.lines]))
    steps = steps[steps > 0]
    return len(steps) >= 20 and float(steps[-1]) >= _MANY_TIMES * float(steps[0])


def _with_limit(run: RunData, figure: Figure) -> Figure:
    """Gradient norms with the line above which they are clipped, or with the word that none came near it."""
    part = run.config.get("optimizer") if isinstance(run.config, Mapping) else None
    clip = part.get("grad_clip") if isinstance(part, Mapping) else None
    if figure.key != "grad-norm" or not figure.lines or not isinstance(clip, int | float) or not 0 < clip < 1e300:
        return figure
    norm = figure.lines[0].series
    if float(norm.finite.values.max()) < clip / 3:
        return replace(figure, caption=f"All far below {clip:g}, above which they are clipped.")
    ends = norm.steps[[0, -1]]
    return replace(figure, lines=[*figure.lines, Line(f"clipped above {clip:g}", Series(ends, np.full(2, clip)), GREY)])


def _lines(run: RunData, wanted: _Wanted) -> Iterator[Line]:
    if isinstance(wanted, list):
        columns = wanted
    elif wanted == "eval.@":
        columns = _by_length(run)
    else:
        types = dict.fromkeys([*run.train.types, *run.evaluation.types])
        columns = [(type, wanted.replace("*", type), _look(number)) for number, type in enumerate(types)]
    for label, column, look in columns:
        series = column_of(run, column)
        if series is not None:
            yield Line(label, series, look)


def _look(number: int) -> int:
    """Of the number-th of many lines: the palette's colours, then the same with other dashes."""
    return 1 + number % _NUM_COLOURS + 8 * (number // _NUM_COLOURS)


def _by_length(run: RunData) -> list[tuple[str, str, int]]:
    found = [match for match in map(_AT_LENGTH.fullmatch, run.evaluation.series) if match]
    if _teacher(run) is None:
        found = [match for match in found if match[1] != "teacher"]
    return [
        (f"{match[1]}, {int(match[2]):,} tokens", f"eval.{match[0]}", _look(number))
        for number, match in enumerate(sorted(found, key=lambda match: (match[1], int(match[2]))))
    ]


def column_of(run: RunData, column: str) -> Series | None:
    """The series of ``train.NAME`` or ``eval.NAME``, in the unit of its plot; None where it has no finite value."""
    rows, _, name = column.partition(".")
    columns = run.train if rows == "train" else run.evaluation
    series = _MADE[name](run) if name in _MADE else columns.get(name)
    factor = _FACTORS.get(name.rpartition("/")[2], 1.0)
    return None if series is None else Series(series.steps, series.values * factor)


def _teacher(run: RunData) -> Series | None:
    """The teacher's loss where it is over all positions of the student's; else the two are no pair."""
    types = run.evaluation.types
    every = all(f"{type}/val_loss_teacher" in run.evaluation.series for type in types)
    return run.evaluation.get("val_loss_teacher") if every or len(types) < 2 else None


def _teacher_alone(run: RunData) -> Series | None:
    shared = "val_loss_student_with_teacher" in run.evaluation.series
    return run.evaluation.get("val_loss_teacher") if shared else None


def _waited_share(run: RunData) -> Series | None:
    waited, seconds = run.train.get("signal_wait_seconds"), run.train.get("seconds")
    if waited is None or seconds is None:
        return None
    steps, here, there = np.intersect1d(waited.steps, seconds.steps, return_indices=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = waited.values[here] / seconds.values[there]
    share[~np.isfinite(share)] = np.nan
    return Series(steps, share) if len(Series(steps, share).finite) else None


_MADE = {"waited_share": _waited_share, "teacher": _teacher, "teacher_alone": _teacher_alone}
