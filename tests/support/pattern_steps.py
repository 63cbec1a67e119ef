"""Counts the steps a regular expression takes: a small backtracking matcher that works as ``re`` does.

It knows what the project's patterns use, and raises ``KeyError`` at anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

try:
    from re import _compiler as compiler  # type: ignore[attr-defined]
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_compile as compiler
    import sre_parse as parser

Next = Callable[[int], int | None]


class StepCounter:
    """``finditer`` of one pattern, and ``steps``: how many characters were compared so far."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.steps = pattern, 0
        self._tree = list(parser.parse(pattern.pattern, pattern.flags))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The spans that ``finditer`` would find."""
        found, at = [], 0
        while at <= len(text):
            end = self._items(self._tree, 0, text, at, lambda end: end)
            if end is not None and end > at:
                found.append((at, end))
            at = max(at + 1, end or 0)
        return found

    def _items(self, items: list[Any], index: int, text: str, at: int, then: Next) -> int | None:
        if index == len(items):
            return then(at)
        name, value = str(items[index][0]), items[index][1]

        def rest(end: int) -> int | None:
            return self._items(items, index + 1, text, end, then)

        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(name == "MAX_REPEAT", *value, text, at, rest)
        if name == "SUBPATTERN":
            return self._items(list(value[3]), 0, text, at, rest)
        if name == "BRANCH":
            ends = (self._items(list(one), 0, text, at, rest) for one in value[1])
            return next((end for end in ends if end is not None), None)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, inside = value
            start = at if direction > 0 else at - inside.getwidth()[0]
            held = start >= 0 and self._items(list(inside), 0, text, start, lambda end: end) is not None
            return rest(at) if held is (name == "ASSERT") else None
        if name == "AT":
            return rest(at) if self._at(str(value), text, at) else None
        return rest(at + 1) if self._one(items[index], text, at) else None

    def _repeat(self, greedy: bool, least: int, most: Any, inside: Any, text: str, at: int, rest: Next) -> int | None:
        single = len(inside) == 1 and str(inside[0][0]) in ("IN", "LITERAL", "NOT_LITERAL", "ANY")
        if not single and (least, int(most)) == (0, 1):  # an optional group, tried in all its lengths
            end = self._items(list(inside), 0, text, at, rest)
            return rest(at) if end is None else end
        ends = [at]  # where each further repetition ends
        limit = min(int(most), len(text) + 1)

        def more() -> bool:
            if len(ends) > limit:
                return False
            if single:
                end = ends[-1] + 1 if self._one(inside[0], text, ends[-1]) else None
            else:
                end = self._items(list(inside), 0, text, ends[-1], lambda found: found)
            if end is not None and end > ends[-1]:
                ends.append(end)
                return True
            return False

        while (greedy or len(ends) <= least) and more():
            pass
        while len(ends) > least:
            end = rest(ends[-1])
            if end is not None:
                return end
            if greedy:
                ends.pop()
            elif not more():
                return None
        return None

    def _one(self, item: Any, text: str, at: int) -> bool:
        self.steps += 1
        if at >= len(text):
            return False
        return _compiled(str(item), self.pattern.flags, item).match(text, at, at + 1) is not None

    def _at(self, where: str, text: str, at: int) -> bool:
        self.steps += 1
        edges = {
            "AT_BOUNDARY": r"\b",
            "AT_END_STRING": r"\Z",
            "AT_END": r"$",
            "AT_BEGINNING": r"^",
            "AT_BEGINNING_STRING": r"\A",
        }
        return re.compile(edges[where]).match(text, at) is not None


_COMPILED: dict[tuple[str, int], re.Pattern[str]] = {}


def _compiled(key: str, flags: int, item: Any) -> re.Pattern[str]:
    """The pattern of one character, made of its parsed form."""
    if (key, flags) not in _COMPILED:
        state = parser.State()
        state.str, state.flags = "", flags
        _COMPILED[key, flags] = compiler.compile(parser.SubPattern(state, [item]), flags)
    return _COMPILED[key, flags]
