"""What stands around a text once it is token ids (leaf); ``docs/framing.md`` says why.

begin    the token that a teacher expects before a text; None: nothing stands before it
end      the token after a text, by which a student learns to stop
framing  the two together. Where both are one token (SmolLM2: ``<|endoftext|>``), one between two documents is enough
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Framing:
    """The ids of the tokens around a text."""

    begin_id: int | None
    end_id: int

    @property
    def version(self) -> int:
        """Its number in ``versions``: 1 puts nothing before a text."""
        return 1 if self.begin_id is None else 2

    @property
    def bos_id(self) -> int:
        """What a model's configuration and tokenizer name as the beginning: they have to name one."""
        return self.end_id if self.begin_id is None else self.begin_id

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A whole text: begin, its tokens, end; neither is doubled where the text has it already."""
        if self.begin_id is None:
            return [*ids, *([] if ids[-1:] == [self.end_id] else [self.end_id])]
        inner = self.unwrap(ids)
        return [self.begin_id, *inner, self.end_id] if inner else []

    def open(self, ids: Sequence[int]) -> list[int]:
        """The beginning of a text, such as a prompt that is to be gone on with: begin, not doubled, and its tokens."""
        return list(ids) if self.begin_id is None or [*ids[:1]] == [self.begin_id] else [self.begin_id, *ids]

    def unwrap(self, ids: Sequence[int]) -> list[int]:
        """A text's own tokens, as blocks keep them; the first framing left whatever stood there."""
        if self.begin_id is None:
            return list(ids)
        start = ids[:1] == [self.begin_id]
        stop = len(ids) - (ids[start:][-1:] == [self.end_id])
        return list(ids[start:stop])


@dataclass(frozen=True)
class Framings:
    """The framing of each type of a run: all end alike, and each begins as its own teacher expects.

    Attributes:
        usual: of types that ``by_type`` does not name; ``of`` names all that a run has.
    """

    usual: Framing
    by_type: Mapping[str, Framing] = field(default_factory=dict)

    def __call__(self, type: str) -> Framing:
        return self.by_type.get(type, self.usual)

    def of(self, types: Iterable[str]) -> Framings:
        """The same for the types that a run has, each by name."""
        return Framings(self.usual, {type: self(type) for type in types})

    @property
    def student(self) -> Framing:
        """What the student is said to expect: a begin token where it has seen one at all."""
        seen = self.by_type.values() or [self.usual]
        begins = [one.begin_id for one in seen if one.begin_id is not None]
        return Framing(begins[0] if begins else None, self.usual.end_id)

    def plain(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them."""
        by_type = {type: one.begin_id for type, one in self.by_type.items()}
        return {"end_id": self.usual.end_id, "begin_id": self.usual.begin_id, "begin_ids": by_type}

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> Framings:
        """Inverse of ``plain``."""
        end_id = int(values["end_id"])
        return Framings(
            Framing(values["begin_id"], end_id),
            {type: Framing(begin_id, end_id) for type, begin_id in values["begin_ids"].items()},
        )
