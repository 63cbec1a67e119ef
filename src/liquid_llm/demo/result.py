"""What the demo shows: a first result while it runs, and at its end a small table, samples and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquid_llm.demo.judge import BEFORE, DISTILLED, PLAIN, TEACHER
from liquid_llm.formatting import format_bytes, format_count, format_sample, format_seconds
from liquid_llm.terminal import print_facts, result_table

_EQUAL = 0.1  # times that differ by less are called equal
_SHOWN_PROMPTS = 3  # the others are in the files


def print_first(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show how far the distilled student has come, from the metrics of its run; the plain one is still to train."""
    evaluated = [row for row in rows if row["kind"] == "eval"]
    trained = [row for row in rows if row["kind"] == "train"]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        types = [
            f"{type} {first['by_type'][type]['val_loss']:.2f} to {values['val_loss']:.2f}"
            for type, values in last["by_type"].items()
        ]
        loss = f"loss {first['val_loss_student']:.2f} to {last['val_loss_student']:.2f} ({', '.join(types)})"
        kl = f"; KL from the teacher {first['val_kd']:.2f} to {last['val_kd']:.2f}" if "val_kd" in last else ""
        told = f"before to after: {loss}{kl}"
    else:  # of few texts by chance none is held out, which depends on their names
        told = f"first steps to last, on the texts it trains on: loss {trained[0]['ce']:.2f} to {trained[-1]['ce']:.2f}"
    Console(highlight=False).print(Text(f"first result, distilled, {told} nats a token"), soft_wrap=True)


def print_summary(summary: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
    """Show on standard output what was reached: students side by side, the verdict, what each says, what it cost."""
    console = Console(highlight=False)
    console.print(_table(summary))
    for sentence in summary["sentences"]:
        console.print(Text(sentence), soft_wrap=True)
    prompts = dict.fromkeys(row["prompt"] for row in summary["samples"])
    for prompt in list(prompts)[:_SHOWN_PROMPTS]:
        console.print(Text(f"\n{prompt}", "dim"), soft_wrap=True)
        for row in summary["samples"]:
            if row["prompt"] == prompt:
                console.print(Text(f"  {row['student']:<9}  {format_sample(row['text'])}"), soft_wrap=True)
    captured = summary["capture"]
    facts = {
        "stored signal": f"{captured['bytes'] / captured['positions']:,.1f} bytes a token",
        "speed": f"{format_count(summary['tokens_per_second'])} real tokens a second (distilled)",
        "peak device memory": summary["device_peak_memory_bytes"] and format_bytes(summary["device_peak_memory_bytes"]),
        "peak host memory": format_bytes(summary["peak_memory_bytes"]),
        "time": format_seconds(summary["seconds"]),
        **{name: str(path) for name, path in paths.items()},
    }
    print_facts("", [(name, text) for name, text in facts.items() if text], console)


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """The verdict, how equal the time was, and what was gained, one sentence each."""
    rows = {row["student"]: row for row in summary["rows"]}
    spent = {name: format_seconds(value) for name, value in summary["training_seconds"].items()}
    verdicts = summary["verdicts"]
    steps, capture = summary["training_steps"], format_seconds(summary["capture"]["seconds"])
    lost = rows[BEFORE]["ce"] - rows[TEACHER]["ce"]
    won = {name: rows[BEFORE]["ce"] - rows[name]["ce"] for name in (DISTILLED, PLAIN)}
    share = summary["training_seconds"][PLAIN] / (
        summary["training_seconds"][DISTILLED] + summary["capture"]["seconds"]
    )
    time = "equal time" if abs(share - 1) <= _EQUAL else f"{share:.0%} of its time"  # the pace is a guess beforehand
    briefs = "; ".join(one["brief"] for one in verdicts)
    seed = "One seed: these 95 % intervals hold the choice of texts alone."
    found = [f"Verdict on distilled against plain training in {time}: {briefs}. {seed}"]
    found.append(
        f"Time: plain {spent[PLAIN]} for {steps[PLAIN]} steps; distilled {spent[DISTILLED]} for "
        f"{steps[DISTILLED]} steps and {capture} for the teacher's signal, which a second run would find stored."
    )
    if lost > 0:
        found.append(
            f"Gain: of the loss that the cut brought, distilling took back {won[DISTILLED] / lost:.0%} "
            f"and plain training {won[PLAIN] / lost:.0%}."
        )
    return found


def _table(summary: Mapping[str, Any]) -> Table:
    title = "held-out text and word problems, seen in no training (loss and KL in nats a token)"
    table = result_table(title)
    table.add_column("student")
    for name in ("loss", "KL from teacher", "agrees", "right answers", "repeats"):
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        table.add_row(
            Text(row["student"], "bold" if row["student"] == DISTILLED else ""),
            f"{row['ce']:.3f}",
            f"{row['kl']:.3f}",
            f"{row['agreement']:.0%}",
            f"{row['answers_right']} of {row['answers']}",
            f"{row['repeated_4grams']:.0%}",
        )
    return table
