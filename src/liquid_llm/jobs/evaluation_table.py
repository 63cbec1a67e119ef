"""An evaluation for people: one line a student and type, each figure with its standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from liquid_llm.evaluation import Evaluation
from liquid_llm.jobs.difference_table import difference_table
from liquid_llm.study.results import ALL
from liquid_llm.terminal import result_console, result_table

_COLUMNS = (  # heading, figure, factor, digits
    ("loss", "ce", 1.0, 3),
    ("teacher's", "teacher_ce", 1.0, 3),
    ("bits/byte", "bits_per_byte", 1.0, 3),
    ("KL", "kl", 1.0, 3),
    ("agree %", "agreement", 100.0, 1),
    ("overlap %", "overlap", 100.0, 1),
    ("ECE %", "calibration", 100.0, 1),
    ("teacher's %", "teacher_calibration", 100.0, 1),
)
_WIDTH = 170


def print_evaluations(found: Sequence[Evaluation], console: Console | None = None) -> None:
    """Show what was found on standard output."""
    console = result_console(console, _WIDTH)
    rows = [row for one in found for row in _rows(one)]
    shown = [column for column in _COLUMNS if any(column[1] in figures for _, _, figures in rows)]
    title = "held-out text, each figure with its standard error over texts (nats a token, T=1; docs/evaluation.md)"
    table = result_table(title)
    table.add_column("student", overflow="fold")
    table.add_column("text", no_wrap=True)
    for heading in ("texts", *(column[0] for column in shown)):
        table.add_column(heading, justify="right")
    before = None
    for student, kind, figures in rows:
        if before not in (None, student):
            table.add_section()
        cells = [_estimate(figures.get(name), factor, digits) for _, name, factor, digits in shown]
        name = student if student != before else ""
        table.add_row(*map(Text, (name, kind, f"{figures['texts']:,}", *cells)))
        before = student
    console.print(table)
    for line in (line for one in found for line in (_remark(one), _answers(one)) if line):
        console.print(Text(line), soft_wrap=True)
    if any(one.compared for one in found):
        _print_differences(found, console)
    if any(one.tasks for one in found):
        _print_tasks(found, console)


def _print_differences(found: Sequence[Evaluation], console: Console) -> None:
    """How the second student and further ones differ from the first, and one sentence on each."""
    others = [one for one in found if one.compared]
    first = others[0].compared["with"]
    verdicts = [{"student": one.student, **verdict} for one in others for verdict in one.compared["verdicts"]]
    title = f"difference from {first} and its 95 % interval over texts (nats a token, T=1)"
    console.print(difference_table(title, {"student": "student", "type": "text"}, verdicts))
    for one in others:
        said = next((v for v in one.compared["verdicts"] if (v["type"], v["measure"]) == (ALL, "ce")), None)
        lines = [] if said is None else [f"{one.student} against {first}: {said['sentence']}"]
        for line in (*lines, *one.compared["remarks"]):
            console.print(Text(line), soft_wrap=True)
    chance = "what another seed would have made of the same training is not in it (liquid study)"
    console.print(Text(f"The interval is over texts, of these students as they are; {chance}."), soft_wrap=True)


def _print_tasks(found: Sequence[Evaluation], console: Console) -> None:
    """What lm-eval's benchmarks gave: one line a student, task and metric."""
    title = "lm-eval, each figure with its standard error"
    table = result_table(title)
    for heading in ("student", "task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("samples", "shots", "value"):
        table.add_column(heading, justify="right")
    for one in found:
        for task, result in one.tasks.items():
            about = (_plain(result["samples"]), _plain(result["num_fewshot"]))
            for metric, figure in result["metrics"].items():
                table.add_row(*map(Text, (one.student, task, metric, *about, _estimate(figure, 1.0, 4))))
    console.print(table)


def _plain(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _rows(one: Evaluation) -> list[tuple[str, str, Mapping[str, Any]]]:
    measures = one.measures
    rows = [(one.student, type, figures) for type, figures in measures["by_type"].items()]
    if len(rows) != 1:
        rows.append((one.student, "all", measures["all"]))
    for length, those in measures["by_length"].items():
        if int(length) != one.length:
            rows.append((one.student, f"all @{length}", those["all"]))
    return rows


def _estimate(figure: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    error = "" if figure["error"] is None else f" ±{figure['error'] * factor:.{digits}f}"
    return f"{figure['value'] * factor:.{digits}f}{error}"


def _answers(one: Evaluation) -> str:
    """How many generated answers are right, with the interval, and the teacher's beside it."""
    if "answers" not in one.measures:
        return ""
    parts = []
    teacher = one.measures.get("teacher_answers", {"by_type": {}})["by_type"]
    for type, own in one.measures["answers"]["by_type"].items():
        beside = f"; the teacher {_share(teacher[type])}" if type in teacher else ""
        parts.append(f"{type} {_share(own)}{beside}")
    return f"{one.student}: answers generated and right: {', '.join(parts)}"


def _share(count: Mapping[str, Any]) -> str:
    return f"{count['right']}/{count['total']} ({count['low']:.0%} to {count['high']:.0%})"


def _remark(one: Evaluation) -> str:
    """Where the teacher answers for some positions alone, the student's loss on these very positions."""
    every = one.measures["all"]
    if not 0 < every["teacher_positions"] < every["positions"]:
        return ""
    beside = every["ce_beside_teacher"]["value"]
    return (
        f"{one.student}: on the {every['teacher_positions']:,} of {every['positions']:,} positions that the teacher "
        f"answers whole, the student's loss is {beside:.3f} and the teacher's {every['teacher_ce']['value']:.3f}"
    )
