"""What a finished run shows on standard output: loss by type beside the teacher's, a sample, where things are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquid_llm.formatting import format_bytes, format_count, format_sample, format_seconds
from liquid_llm.report.summary import next_steps
from liquid_llm.terminal import print_facts, result_table

_MOST_SAMPLES = 2  # the others are in samples.jsonl


def show_run(summary: Mapping[str, Any], run_dir: Path, shown: str) -> None:
    """Print the summary of a run.

    Args:
        shown: what the run is called by its user: a folder, or the URL it is mirrored to.
    """
    console = Console(highlight=False)
    if summary["rows"]:
        console.print(_table(summary["rows"]))
    for sentence in summary["sentences"]:
        console.print(Text(sentence), soft_wrap=True)
    for row in summary["samples"][:_MOST_SAMPLES]:
        said = format_sample(row["text"])
        console.print(Text.assemble("\n", (row["prompt"], "dim"), f"\n  {said}"), soft_wrap=True)
    rate, device, host = (
        summary[name] for name in ("tokens_per_second", "device_peak_memory_bytes", "peak_memory_bytes")
    )
    facts = {
        "training": f"{format_count(summary['steps'])} steps, {format_count(summary['tokens'])} tokens"
        + (f" in {format_seconds(summary['training_seconds'])}, {format_count(rate)} a second" if rate else ""),
        "peak device memory": device and format_bytes(device),
        "peak host memory": host and format_bytes(host),
        "run": shown,
        "student": str(run_dir / "student"),
        "report": str(run_dir / "report.html"),
        **next_steps(shlex.quote(shown)),
    }
    print_facts("", [(name, text) for name, text in facts.items() if text], console)


def _table(rows: list[Mapping[str, Any]]) -> Table:
    table = result_table("held-out text (loss and KL in nats a token)")
    table.add_column("type")
    for name in ("before", "after", "teacher", "gap closed", "KL from teacher"):
        table.add_column(name, justify="right")
    for row in rows:
        values = [_shown(row[name], ".3f") for name in ("before", "after", "teacher")]
        closed = row["gap_closed"]
        share = ">100%" if closed is not None and closed > 1 else _shown(closed, ".0%")
        table.add_row(row["type"], *values, share, _shown(row["kl"], ".3f"))
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
