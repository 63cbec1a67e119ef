"""What a study found, from its files alone: on the terminal, in ``study.json``, ``study.html`` and ``study.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquid_llm import storage
from liquid_llm.errors import UsageError
from liquid_llm.formatting import format_seconds
from liquid_llm.jobs.difference_table import difference_table
from liquid_llm.study.folder import PAGE, PLAN, RESULT, TABLES, StudyFolder
from liquid_llm.study.page import render_study
from liquid_llm.study.results import summarise
from liquid_llm.terminal import as_markdown, print_facts, result_console, result_table, setup_logging

_WIDTH = 150


def is_study(folder: str) -> bool:
    """Whether this is a study's folder."""
    return not storage.is_remote(folder) and (storage.local_path(folder) / PLAN).is_file()


def open_folder(folder: str) -> StudyFolder:
    """A study's folder, there or not yet.

    Raises:
        UsageError: it is on no file system.
    """
    if storage.is_remote(folder):
        raise UsageError(
            "a study's folder must be on a file system: its runs are claimed by locks",
            where="--study_dir",
            got=folder,
            remedy="name a local or shared folder, and copy it when the study is finished",
        )
    return StudyFolder(storage.local_path(folder))


def show_study(folder: str) -> int:
    """Make ``study.json``, ``study.html`` and ``study.md`` again, and print the verdict; the exit code.

    Raises:
        LiquidError: the folder is no study's, or its files cannot be used.
    """
    setup_logging("INFO")
    place = open_folder(folder)
    result = summarise(place)
    place.write(RESULT, result)
    page = place.root / PAGE
    storage.write_bytes(str(page), render_study(place.root.resolve().name, result).encode("utf-8", errors="replace"))
    tables = place.root / TABLES
    storage.write_bytes(str(tables), as_text(result).encode())
    print_study(result, {"result": place.root / RESULT, "page": page, "tables": tables})
    return 0


def as_text(result: Mapping[str, Any]) -> str:
    """Verdict and tables as Markdown, to be put into a page of one's own."""
    sentences = "".join(f"- {one}\n" for one in (*result["sentences"], *result["remarks"]))
    tables = [_reached(result), _differences(result), _costs(result)]
    return "\n".join([sentences, *map(as_markdown, tables), f"Comparisons: {_say_comparisons(result)}.\n"])


def print_study(result: Mapping[str, Any], paths: Mapping[str, Path], console: Console | None = None) -> None:
    """Show the arms' costs, the differences and the verdict in words on standard output."""
    console = result_console(console, _WIDTH)
    console.print(_costs(result))
    if result["verdicts"]:
        console.print(_reached(result))
        console.print(_differences(result))
    for sentence in result["sentences"]:
        console.print(Text(sentence))
    facts = [("comparisons", _say_comparisons(result)), *(("note", one) for one in result["remarks"])]
    print_facts("", [*facts, *((name, str(path)) for name, path in paths.items())], console)


def _say_comparisons(result: Mapping[str, Any]) -> str:
    return (
        f"{result['comparisons']}, each with an interval of its own that nothing is corrected for: with no effect at "
        f"all, about {result['by_chance']:g} of them would be called better by chance"
    )


def _costs(result: Mapping[str, Any]) -> Table:
    table = _table(f"arms; the baseline is {result['baseline']}; seeds {', '.join(map(str, result['seeds']))}", "arm")
    for name in ("steps", "s a step", "training", "capture, its share", "baseline steps in as long"):
        table.add_column(name, justify="right")
    for arm in result["arms"]:
        pace, same = arm["seconds_per_step"], arm["baseline_steps_at_seconds"]
        table.add_row(
            Text(arm["name"]),
            f"{arm['steps']:,}",
            "–" if pace is None else f"{pace:.3g}",
            "–" if pace is None else format_seconds(pace * arm["steps"]),
            format_seconds(arm["capture_seconds"]) if arm["capture_seconds"] else "–",
            "–" if same is None else f"{same:,}",
        )
    return table


def _reached(result: Mapping[str, Any]) -> Table:
    """What the arms' students are worth, and their teacher: means over the seeds."""
    steps = {arm["name"]: arm["steps"] for arm in result["arms"]}
    runs = [run for run in result["runs"] if run["all"] and run["steps"] == steps[run["arm"]]]
    types = list(dict.fromkeys(type for run in runs for type in run["by_type"]))
    table = _table("what the arms reached, held-out text, means over seeds (nats a token; T=1)", "arm")
    names = ["cross-entropy", *(types if len(types) > 1 else []), "KL", "agree %", "right answers %"]
    for name in names:
        table.add_column(name, justify="right")
    by_arm = {arm: [_reached_by(run) for run in runs if run["arm"] == arm] for arm in steps}
    for arm, rows in {**by_arm, "teacher": [_reached_by(run, "teacher_ce") for run in runs[:1]]}.items():
        table.add_row(Text(arm), *(_mean(rows, name, 3 if "%" not in name else 1) for name in names))
    return table


def _reached_by(run: Mapping[str, Any], loss: str = "ce") -> dict[str, float | None]:
    """Column -> a run's figure; with ``teacher_ce`` its teacher's, which has cross-entropies alone."""
    found = {type: row.get(loss) for type, row in run["by_type"].items()} | {"cross-entropy": run["all"].get(loss)}
    if loss == "ce":
        agreement = run["all"].get("agreement")
        found |= {"KL": run["all"].get("kl"), "agree %": None if agreement is None else 100 * agreement}
        found["right answers %"] = 100 * run["right"] / run["answers"] if run.get("answers") else None
    return found


def _mean(rows: Sequence[Mapping[str, float | None]], name: str, digits: int) -> str:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return f"{sum(values) / len(values):.{digits}f}" if values else "–"


def _differences(result: Mapping[str, Any]) -> Table:
    title = "difference from the baseline and its 95 % interval, held-out text (nats a token; T=1)"
    return difference_table(title, {"arm": "arm", "at": "at equal", "type": "text"}, result["verdicts"])


def _table(title: str, first: str) -> Table:
    table = result_table(title)
    table.add_column(first)
    return table
