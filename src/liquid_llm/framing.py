"""What stands around a text once it is token ids (leaf); ``docs/framing.md`` says why.

begin    the token that a teacher expects before a text; None: nothing stands before it
end      the token after a text, by which a student learns to stop
framing  the two together. Where both are one token (SmolLM2: ``<|endoftext|>``), one between two documents is enough
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Framing:
    """The ids of the tokens around a text."""

    begin_id: int | None
    end_id: int

    @property
    def version(self) -> int:
        """Its number in ``versions``: 1 puts nothing before a text."""
        return 1 if self.begin_id is None else 2

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A whole text: begin, its tokens, end; neither is doubled where the text has it already."""
        if self.begin_id is None:
            return [*ids, *([] if ids[-1:] == [self.end_id] else [self.end_id])]
        inner = self.unwrap(ids)
        return [self.begin_id, *inner, self.end_id] if inner else []

    def unwrap(self, ids: Sequence[int]) -> list[int]:
        """A text's own tokens, as blocks keep them; the first framing left whatever stood there."""
        if self.begin_id is None:
            return list(ids)
        start = ids[:1] == [self.begin_id]
        stop = len(ids) - (ids[start:][-1:] == [self.end_id])
        return list(ids[start:stop])
