"""Other runs in the same output, and in which few values they differ from this one.

A run that was meant to go on and begins anew differs from the one before in a value that counts: more steps, another
rate, a job's number that stands for its name. Nobody sees that of two names; so they are named with the difference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.masking import process_masker
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.provenance import FOLDER, HISTORY, mask_words

_MOST_LOOKED_AT = 60  # of a bucket's folders: a request each
_MOST_DIFFERENCES = 3
_MOST_NAMED = 3
_READERS = 8
_log = logging.getLogger(__name__)


class Sibling(NamedTuple):
    """A run beside this one: its name, and option -> its value and this run's, where they differ."""

    name: str
    differences: dict[str, tuple[Any, Any]]

    def in_words(self) -> str:
        """As a line of the log."""
        told = in_words(self.differences, "{name} {was} there, {now} here")
        what = f"differs in {told}" if told else "was asked for with the same options"
        return f"another run in this output, {self.name}, {what}: --run_id={self.name} goes on with that one"


def find_siblings(output: str, own: str, counted: Mapping[str, Any]) -> list[Sibling]:
    """The runs below ``output`` that differ from this one in at most three values, the likest first, at most three.

    What cannot be read is left out: a run does not fail for its neighbours.

    Args:
        own: the name of this run, which is none of them.
        counted: ``config_names.counted_options`` of this run.
    """
    try:
        names = [name for name in storage.list_folders(output) if name != own][:_MOST_LOOKED_AT]
    except StorageError as error:
        _log.debug("no look at other runs: %s", error)
        return []
    with ThreadPoolExecutor(_READERS, "siblings") as threads:
        kept = list(threads.map(lambda name: _counted_of(storage.join(output, name)), names))
    counted = mask_words(counted, process_masker())  # as the others are kept
    found = [Sibling(name, differences_of(one, counted)) for name, one in zip(names, kept, strict=True) if one]
    near = [one for one in found if len(one.differences) <= _MOST_DIFFERENCES]
    return sorted(near, key=lambda one: (len(one.differences), one.name))[:_MOST_NAMED]


def _counted_of(run: str) -> Mapping[str, Any] | None:
    try:
        sessions = parse_json(storage.read_small(storage.join(run, FOLDER, HISTORY)))
        counted = sessions[-1]["counted"]
    except (StorageError, ParseError, LookupError, TypeError):
        return None
    return counted if isinstance(counted, Mapping) else None


def differences_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Option -> its value before and now, of two ``counted_options``; None where it is its default."""
    sides = [_flat(json.loads(json.dumps(one, default=str))) for one in (before, now)]
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in sorted({*sides[0], *sides[1]})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(counted: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(counted.get("options") or {})
    flat.pop("sources", None)  # as it was given; below is what it comes to
    source = counted.get("source") or {}
    for type, values in (source.get("named") or {}).items():
        flat |= {f"{name} of {type}": value for name, value in values.items()}
    flat["teacher of other types"] = source.get("other_teacher")
    flat["command"] = counted.get("face")
    return {name: value for name, value in flat.items() if value is not None}


def in_words(differences: Mapping[str, tuple[Any, Any]], form: str = "{name} {was} -> {now}") -> str:
    """Differences as a part of a sentence."""
    spelled = {name: (_spell(was), _spell(now)) for name, (was, now) in differences.items()}
    return ", ".join(form.format(name=name, was=was, now=now) for name, (was, now) in spelled.items())


def _spell(value: object) -> str:
    if value is None:
        return "(default)"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
