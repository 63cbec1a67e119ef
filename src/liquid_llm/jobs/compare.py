"""``liquid compare``: several runs side by side, as a short table here and as one page with their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquid_llm import storage
from liquid_llm.config_names import without_effect
from liquid_llm.formatting import format_count
from liquid_llm.masking import process_masker
from liquid_llm.report.compare import compare_runs, for_page, read_runs
from liquid_llm.report.compare_page import render_comparison
from liquid_llm.report.summary import ALL
from liquid_llm.terminal import print_facts, result_console, result_table

PAGE = "compare.html"
_WIDTH = 150
_MOST_DIFFERENCES, _MOST_RUNS = 12, 8  # in the table here; the page has all


def run_compare(places: Sequence[str], page: str | None, *, as_json: bool) -> int:
    """Compare the runs at some paths and URLs, write the page, print the table; the exit code.

    Args:
        page: where the page goes, a path or URL; None: ``compare.html`` in the working directory.
        as_json: print one JSON object instead of the table.

    Raises:
        UsageError: a place holds no run, or there are fewer than two.
        StorageError: a run cannot be read, or the page not written.
    """
    runs = read_runs(places)
    found = compare_runs(runs, without_effect())
    page = page or PAGE
    storage.write_bytes(page, render_comparison(runs, found).encode("utf-8", errors="replace"))
    if as_json:
        print(json.dumps(process_masker().urls({**found, "page": page}), indent=2))
        return 0
    console = result_console(None, _WIDTH)
    console.print(_table(found))
    differ = for_page(runs, found["differ"])
    if differ and len(runs) <= _MOST_RUNS:
        console.print(_differences(found, differ))
    for sentence in found["remarks"]:
        console.print(Text(sentence), soft_wrap=True)
    _print_where(console, found, differ, page)
    return 0


def _table(found: Mapping[str, Any]) -> Table:
    common = found["common_step"]
    table = result_table("runs (held-out text, nats a token; KL from each one's own teacher, at T = 1)")
    table.add_column("run", overflow="fold")
    head = ["step", "of", "loss", "best", "at step", *([] if common is None else [f"at {format_count(common)}"])]
    for name in (*head, "KL", "gap closed", "tokens", "tokens/s"):
        table.add_column(name, justify="right")
    for one in found["runs"]:
        whole = one["by_type"].get(ALL, {})
        cells = [_count(one["steps"]), _count(one["of_steps"]), _loss(whole.get("after")), _loss(one["best_loss"])]
        cells += [_count(one["best_step"]), *([] if common is None else [_loss(one["loss_at_common_step"])])]
        closed = whole.get("gap_closed")
        cells += [_loss(whole.get("kl")), "-" if closed is None else f"{closed:.0%}", _count(one["tokens"])]
        table.add_row(*map(Text, (one["run"], *cells, _count(one["tokens_per_second"]))))
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "-" if value is None else format_count(value)


def _differences(found: Mapping[str, Any], differ: Mapping[str, Sequence[Any]]) -> Table:
    table = result_table("in what their configurations differ")
    table.add_column("value")
    for one in found["runs"]:
        table.add_column(Text(one["run"]), overflow="fold")
    for name, values in list(differ.items())[:_MOST_DIFFERENCES]:
        table.add_row(Text(name), *(Text("-" if value is None else str(value)) for value in values))
    return table


def _print_where(console: Console, found: Mapping[str, Any], differ: Mapping[str, Any], page: str) -> None:
    facts = []
    if not differ:
        facts.append(("configurations", "they differ in nothing that changes a step"))
    elif len(found["runs"]) > _MOST_RUNS:
        facts.append(("configurations", f"they differ in {len(differ)} values, which the page lists"))
    elif len(differ) > _MOST_DIFFERENCES:
        facts.append(("configurations", f"{len(differ) - _MOST_DIFFERENCES} more values differ, which the page lists"))
    print_facts("", [*facts, ("page", page)], console)
