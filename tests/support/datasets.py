"""Tokenised datasets from plain lists of token ids, for tests that need no text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from liquid_llm.data.token_writer import TokenWriter
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.framing import Framing

UNFRAMED = Framing(None, 0)  # nothing before a text, token 0 between two


def token_dataset(
    samples: Sequence[Sequence[int]],
    type: str = "lm",
    sample_ids: Sequence[str] | None = None,
    layout: str = "",
    framing: Framing = UNFRAMED,
    learnt: Sequence[Sequence[bool] | None] | None = None,
) -> TokenDataset:
    """A dataset of ``samples``, each of two tokens or more, named ``s0``, ``s1``, … unless ``sample_ids`` is given.

    ``learnt``: which of their tokens are learnt, None: all.
    """
    names = [f"s{number}" for number in range(len(samples))] if sample_ids is None else list(sample_ids)
    with tempfile.TemporaryDirectory() as folder:  # the maps stay valid when the names are gone
        with TokenWriter(Path(folder), type, "<u4", str, framing.version, layout) as writer:
            writer.add(names, samples, range(len(samples)), learnt)
            meta = writer.finish()
        return TokenDataset(Path(folder), meta, framing)
