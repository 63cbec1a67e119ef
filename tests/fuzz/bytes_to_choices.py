"""Bytes as a row of decisions, and what decisions make of valid data.

A search changes bytes and sees which lines are reached. Where the data has checksums or a grammar, bytes of the data
itself never get past the first check: there the bytes decide how valid data is changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_DEEP: Any = None
for _ in range(300):
    _DEEP = [_DEEP]
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "\0", "\n", "\ud800", "🙂", "../../etc/passwd", "/etc/passwd", "a/b", "1e9999", "x" * 5000),
    *([], {}, [[]], [{}], {"": None}, [None], [1, "a"], {"a": [1, {"b": None}]}, [0] * 300),
]


class Choices:
    """Decisions out of bytes, in order; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)

    def below(self, limit: int) -> int:
        """A number from 0."""
        size = max(1, ((limit - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.take(size).ljust(size, b"\0"), "little") % max(1, limit)

    def one(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))


def edit_bytes(data: bytes, choices: Choices) -> bytes:
    """``data`` with a few bytes flipped, replaced, put in or taken out, or cut off."""
    kind, at = choices.below(6), choices.below(max(1, len(data)))
    size = 1 + choices.below(16)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + choices.take(size) + data[at:]
    if kind == 3:
        return data[:at] + bytes(size) + data[at + size :]
    if kind == 4 and data:
        return data[:at] + bytes([data[at] ^ 1 << choices.below(8)]) + data[at + 1 :]
    return data[:at] + choices.take(size) + data[at + size :]


def edit_value(value: Any, choices: Choices) -> Any:
    """A copy of a nested plain value with one place in it changed: another value, one gone, one new, one moved."""
    value = _copy(value)
    holder: list[Any] | dict[Any, Any] = [value]
    key: Any = 0
    while isinstance(holder[key], (list, dict)) and holder[key] and choices.below(4):
        holder = holder[key]
        key = choices.one(list(holder)) if isinstance(holder, dict) else choices.below(len(holder))
    kind, root = choices.below(8), holder[key] is value
    if kind == 0 and not root:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[choices.one([*holder, "", "x", "__class__", "\ud800"])] = holder[key]
    elif kind == 2 and isinstance(holder, list) and not root:
        holder.append(_copy(holder[key]))
    elif kind == 3 and isinstance(holder[key], str):
        holder[key] = edit_bytes(holder[key].encode("utf-8", "surrogatepass"), choices).decode("utf-8", "replace")
    elif kind == 4 and type(holder[key]) in (int, float):
        holder[key] = holder[key] + choices.one([1, -1, 0.5, 2**16, -(2**31), 2**40])
    elif kind == 5:
        holder[key] = _DEEP
    else:
        holder[key] = _copy(choices.one(HOSTILE))
    return value if not root else holder[0]


def edit_json(data: bytes, choices: Choices) -> bytes:
    """JSON with one place in it changed; nothing, where ``data`` is none any more."""
    try:
        return json.dumps(edit_value(json.loads(data), choices)).encode()
    except (ValueError, RecursionError):
        return b""


def edit_files(files: dict[str, bytes], names: Sequence[str], choices: Choices, *, one_in: int) -> None:
    """Change JSON files of these names until choices end; one time in so many as bytes, else as values."""
    while choices:
        name = choices.one(names)
        edit = edit_json if choices.below(one_in) else edit_bytes
        files[name] = edit(files[name], choices)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write contents by their names below ``folder``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, (list, tuple)) else value


def mutate_json(data: bytes, number: int) -> bytes:
    """Another JSON text, or lines of them: one value of one of them is changed."""
    draw = random.Random(number)
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        value = json.loads(lines[at])
        lines[at] = json.dumps(edit_value(value, Choices(draw.randbytes(64)))).encode()
    except (ValueError, RecursionError):
        lines[at] = edit_bytes(lines[at], Choices(draw.randbytes(32)))
    if draw.random() < 0.1:
        lines.insert(at, draw.choice(lines))
    return b"\n".join(lines)


def mutate_bytes(data: bytes, number: int) -> bytes:
    """Other bytes, some of them words that were put together from pieces of the same."""
    draw = random.Random(number)
    for _ in range(draw.randint(1, 3)):
        data = edit_bytes(data, Choices(draw.randbytes(32)))
    return data
