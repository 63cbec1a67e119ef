"""``lm`` text as one long run of tokens, cut into blocks.

stream: the documents of a dataset (or of a split of it) in their order on disk, each framed: begin, text, end. Where
begin and end are one token, one stands between two documents, as in pre-training, and one before the first;
block ``b``: tokens ``b * block_size`` up to ``(b + 1) * block_size`` of the stream. What is behind the last full block
is not used;
span: a run of a stream.

A dataset is all files of a manifest entry, or, where files are read one by one (``many_files``), one of them: its
blocks end with it.

The stream is never built: an index of document ends (8 bytes a document) finds the tokens in the memory map. A begin
token of its own is never learnt: only the end of another document could predict it. Where not all is learnt, the token
behind a document is if the document's last token is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.tokens import TokenDataset

_TOKENS_AT_ONCE = 1 << 22


class TokenStream:
    """Random access to the joined stream of ``dataset``.

    Args:
        dataset: documents, whole or a split, and their framing.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset
        begin_id, end_id = dataset.framing.begin_id, dataset.framing.end_id
        around = 1 if begin_id in (None, end_id) else 2
        self._ends = np.cumsum(dataset.lengths + around) + (begin_id == end_id)  # one before the first document

    def document_name(self, number: int) -> str:
        """The sample id of a document."""
        return self._dataset.sample_id(number)

    def __len__(self) -> int:
        """Tokens in the stream, framing included."""
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens ``start`` to ``start + count`` of the stream, fewer at its end: [count] int64."""
        source, is_end, is_begin = self._sources(start, count)
        tokens: NDArray[np.int64] = self._dataset.tokens[source].astype(np.int64)
        tokens[is_end] = self._dataset.framing.end_id
        if self._dataset.framing.begin_id is not None:
            tokens[is_begin] = self._dataset.framing.begin_id
        return tokens

    def read_learnt(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which of the tokens that ``read`` gives are learnt: [count] bool; None where all tokens are."""
        framing, learnt = self._dataset.framing, self._dataset.learnt
        if learnt is None and framing.begin_id in (None, framing.end_id):
            return None
        source, _, is_begin = self._sources(start, count)
        return ~is_begin if learnt is None else learnt[source].astype(bool) & ~is_begin

    def learnt_blocks(self, block_size: int) -> NDArray[np.int64]:
        """The numbers of the full blocks in which something is learnt, ascending."""
        num_blocks = len(self) // block_size
        if self._dataset.learnt is None:
            return np.arange(num_blocks)
        held = np.zeros(num_blocks, dtype=bool)
        step = max(1, _TOKENS_AT_ONCE // block_size)
        for first in range(0, num_blocks, step):
            last = min(first + step, num_blocks)
            learnt = self.read_learnt(first * block_size, (last - first) * block_size)
            assert learnt is not None
            # nothing predicts a block's first token
            held[first:last] = learnt.reshape(-1, block_size)[:, 1:].any(axis=1)
        return np.flatnonzero(held)

    def _sources(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Where each token lies in the memory map, and which are of the framing: ends, begins.

        The place of these is that of the token next to them in their document.
        """
        positions = np.arange(start, min(start + count, len(self)), dtype=np.int64)
        document = np.searchsorted(self._ends, positions, side="right")
        # counted from the end token backwards, so that position 0 of a document needs no start column
        to_end = self._ends[document] - 1 - positions
        lengths = self._dataset.lengths[document]
        ends = self._dataset.starts[document] + lengths
        is_end, is_begin = to_end == 0, to_end > lengths
        return ends - np.clip(to_end, 1, lengths), is_end, is_begin

    def documents(self, start: int, count: int) -> NDArray[np.int64]:
        """The document of each token that ``read`` gives: [count]. A token between two of them is of the one before."""
        positions = np.arange(start, min(start + count, len(self)), dtype=np.int64)
        return np.searchsorted(self._ends, positions, side="right")

    def borders(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where the documents of the tokens that ``read`` gives begin and end.

        Where one token is end and begin, it is asked for by the document before and begins the one behind.

        Returns:
            places: [count] each token's place in its document, counted from the first of it that is read.
            ends: [count] whether a token ends a document and begins none: it says nothing about what follows.
        """
        framing = self._dataset.framing
        shared = framing.begin_id == framing.end_id
        firsts = np.concatenate(([0], self._ends - shared))
        positions = np.arange(start, min(start + count, len(self)), dtype=np.int64)
        document = np.searchsorted(firsts, positions, side="right") - 1
        ends = np.zeros(len(positions), dtype=bool) if shared else positions + 1 == firsts[document + 1]
        return positions - np.maximum(firsts[document], start), ends


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` tokens of a stream from ``start`` on; see its methods of these names."""

    stream: TokenStream
    start: int
    count: int

    def read(self) -> NDArray[np.int64]:
        return self.stream.read(self.start, self.count)

    def read_learnt(self) -> NDArray[np.bool_] | None:
        return self.stream.read_learnt(self.start, self.count)

    def borders(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return self.stream.borders(self.start, self.count)

    def document_names(self) -> list[str]:
        """The sample ids of its documents, in their order."""
        numbers = self.stream.documents(self.start, self.count).tolist()
        return [self.stream.document_name(one) for one in dict.fromkeys(numbers)]


class Blocks:
    """The full blocks of a dataset in which something is learnt, by number.

    Attributes:
        full: all full blocks.
        tokens: of the stream.
        behind: those behind the last full block.
    """

    def __init__(self, dataset: TokenDataset, block_size: int) -> None:
        self._stream, self._block_size = TokenStream(dataset), block_size
        self._numbers = self._stream.learnt_blocks(block_size)
        self.tokens = len(self._stream)
        self.full, self.behind = divmod(self.tokens, block_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def span(self, number: int) -> Span:
        return Span(self._stream, int(self._numbers[number]) * self._block_size, self._block_size)
