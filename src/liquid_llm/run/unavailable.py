"""Options that parse but whose work is not built yet: used with effect they are refused, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from liquid_llm.errors import UsageError

_Effect = Callable[[object], bool]

# option -> whether a value asks for something that does not exist yet
_NOT_YET: dict[str, _Effect] = {
    "logits_format": lambda value: value == "shards",
}


def refuse_unavailable(given: Mapping[str, object]) -> None:
    """Raise for every given option whose work is not available yet.

    Raises:
        UsageError: names them all.
    """
    names = [name for name, value in given.items() if name in _NOT_YET and _NOT_YET[name](value)]
    if names:
        listed = ", ".join(f"--{name}={given[name]}" for name in names)
        raise UsageError("not available yet", where=listed, remedy="leave it out")
