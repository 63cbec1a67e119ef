"""``lm`` text as one long run of tokens, cut into blocks.

stream: the documents of a dataset (or of a split of it) in their order on disk, each followed by the end-of-text token;
block ``b``: tokens ``b * block_size`` up to ``(b + 1) * block_size`` of the stream.

The stream is never built: an index of document ends (8 bytes a document) finds the tokens in the memory map.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from liquid_llm.data.tokens import TokenDataset


class TokenStream:
    """Random access to the end-of-text joined stream of ``dataset``.

    Args:
        dataset: documents of type ``lm``, whole or a split.
        eos_id: the end-of-text token put after every document.
    """

    def __init__(self, dataset: TokenDataset, eos_id: int) -> None:
        self._dataset = dataset
        self._eos_id = eos_id
        self._ends = np.cumsum(dataset.lengths + 1)

    def __len__(self) -> int:
        """Tokens in the stream, end-of-text tokens included."""
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens ``start`` to ``start + count`` of the stream, fewer at its end: [count] int64."""
        positions = np.arange(start, min(start + count, len(self)), dtype=np.int64)
        document = np.searchsorted(self._ends, positions, side="right")
        # counted from the end-of-text token backwards, so that position 0 of a document needs no start column
        to_end = self._ends[document] - 1 - positions
        is_eos = to_end == 0
        source = self._dataset.starts[document] + self._dataset.lengths[document] - to_end
        source[is_eos] = 0
        tokens: NDArray[np.int64] = self._dataset.tokens[source].astype(np.int64)
        tokens[is_eos] = self._eos_id
        return tokens
