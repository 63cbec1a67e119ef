"""``liquid compare``: words in, exit code out."""

from __future__ import annotations

from liquid_llm.cli.parse import AS_JSON, Positional, parse
from liquid_llm.options import RUN, Option

_DESCRIPTION = (
    "Lay several runs side by side: what each has come to, in what their configurations differ, and what does not "
    "compare. Prints a table and writes one page with their curves over one another, which needs no network."
)
_RUNS = Positional("runs", "RUN", "run directories or URLs; a folder of several stands for all of them", many=True)
_WHERE = "file or URL for the page (default: compare.html here)"
_OPTIONS = (Option("output", "str", RUN, "output", None, _WHERE), AS_JSON)


def compare(words: list[str]) -> int:
    """Parse and run one ``liquid compare``; returns the exit code.

    Raises:
        LiquidError: any problem a user can cause.
    """
    given = parse(
        _OPTIONS, words, "liquid compare", _DESCRIPTION, positionals=(_RUNS,), examples=("runs/plain runs/distilled",)
    )
    page = given.get("output")
    from liquid_llm.jobs.compare import run_compare

    places = [str(one) for one in given["runs"]]  # type: ignore[attr-defined]
    return run_compare(places, None if page is None else str(page), as_json=bool(given.get("json")))
