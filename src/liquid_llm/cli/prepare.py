"""``liquid prepare``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import parse
from liquid_llm.options import PREPARE

DESCRIPTION = "Stream raw datasets into shards a manifest can name; what is complete is left as it is."


def prepare(words: list[str]) -> int:
    """Parse and run one ``liquid prepare``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    given = parse(PREPARE, words, "liquid prepare", DESCRIPTION)
    from liquid_llm.jobs.prepare import run_prepare

    return run_prepare(given)
