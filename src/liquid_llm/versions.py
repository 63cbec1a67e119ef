"""Versions of what must not change under a live run, store or cache (leaf).

    order      which samples a micro-batch holds
    framing    how a text becomes tokens: what stands before it, between two and behind
    numerics   how losses and gradients are worked out

What a release writes carries the versions it was written with; where nothing is said, each is 1. An older version is
known by its row in ``CHANGES``: what is written with it goes on, and the run says what is different now. A newer one is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ORDER = 4
FRAMING = 2
NUMERICS = 2

CURRENT: Mapping[str, int] = {"order": ORDER, "framing": FRAMING, "numerics": NUMERICS}
FIRST: Mapping[str, int] = dict.fromkeys(CURRENT, 1)


@dataclass(frozen=True)
class Change:
    """What one version changed.

    Attributes:
        name: ``order``, ``framing`` or ``numerics``.
        version: the first that has it.
        what: the change, as a clause.
        before: what keeps the old behaviour, as a clause: an option, or the last release that has it.
        bfloat16_only: whether a run in float32 is the same as before.
        kept: whether a run begun before goes on in the old way, and so nothing of it changes; its checkpoints go on
            saying the old number.
    """

    name: str
    version: int
    what: str
    before: str
    bfloat16_only: bool = False
    kept: bool = False


CHANGES = (
    Change(
        "order",
        2,
        "several ranks draw the type of a micro-batch for as many in a row as there are ranks (it was drawn for each)",
        "a run of one process, and what was begun with release 0.1.0, still draws it for each",
        kept=True,
    ),
    Change(
        "order",
        3,
        "texts of a type may be shuffled a few data files at a time (--order=shards; by itself where their signal is a "
        "store of units behind a URL)",
        "--order=whole, and whatever was begun without it, shuffles them as a whole",
        kept=True,
    ),
    Change(
        "order",
        4,
        "where texts are shuffled a few data files at a time, blocks of joined texts end with their data file (they "
        "went on into the next one)",
        "--order=whole, and whatever was begun before, still joins the texts of all files",
        kept=True,
    ),
    Change(
        "numerics",
        2,
        "with bfloat16 products logits are float32 (they were rounded to bfloat16 before the softmax), and the head of "
        "the student multiplies bfloat16 numbers (it multiplied float32 ones)",
        "release 0.1.0 still rounds, and --precision=float32 --teacher_precision=float32 never did",
        bfloat16_only=True,
    ),
    Change(
        "framing",
        2,
        "a text begins with the token that its teacher expects before one (it began with its own first token)",
        "what was begun or captured without goes on so, and --begin_token=never leaves it out",
    ),
)


def read_versions(values: object) -> dict[str, int]:
    """The versions in a file's ``versions`` field; 1 for each that it does not name, None being no field at all.

    Raises:
        ValueError: it is not an object of names and whole numbers from 1.
    """
    if values is None:
        return dict(FIRST)
    right = isinstance(values, Mapping) and all(
        isinstance(name, str) and isinstance(version, int) and not isinstance(version, bool) and version >= 1
        for name, version in values.items()
    )
    if not right:
        raise ValueError("versions are whole numbers from 1 under their names")
    assert isinstance(values, Mapping)
    return {**FIRST, **values}


def find_newer(versions: Mapping[str, int]) -> str | None:
    """What this release does not know of ``versions``, in words: ``order 3 (known: at most 1)``; None if nothing.

    A name that is not known yet stands for something that all releases so far did alike: version 1 of it is theirs.
    """
    newer = [
        f"{name} {version} (known: at most {CURRENT.get(name, 1)})"
        for name, version in sorted(versions.items())
        if version > CURRENT.get(name, 1)
    ]
    return ", ".join(newer) or None


def changes_since(
    versions: Mapping[str, int], *, bfloat16: bool = True, changes: Iterable[Change] = CHANGES
) -> list[Change]:
    """What has changed since ``versions`` for a run in bfloat16 or not that goes on, the oldest change first."""
    return [
        change
        for change in sorted(changes, key=lambda one: one.version)
        if change.version > versions.get(change.name, 1) and (bfloat16 or not change.bfloat16_only) and not change.kept
    ]
