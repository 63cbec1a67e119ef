"""Samples whose signal is stored nearly whole as well, so that evaluation measures the same whatever the codec.

held out   the samples that training holds out and evaluation takes first, which follows from their ids alone
judging    of a store: the store in it (``held_out/``) that has them, in a codec of its own

A unit (``units``) has those that evaluation would take first were there no other text: whatever the others hold, those
that it takes of all text are among them.

A codec of few draws or of the likeliest ids says of a KL from the teacher what that codec can see of it. Of these
samples all stores say the same, so that the figures of two runs compare though their stores are in two codecs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from liquid_llm import storage
from liquid_llm.capture.job import CaptureSummary
from liquid_llm.data.tokens import TokenDataset, first_held_out
from liquid_llm.formatting import format_bytes, format_count
from liquid_llm.framing import Framing
from liquid_llm.identity import ModelIdentity
from liquid_llm.signal_store.codecs import Codec, get_codec
from liquid_llm.signal_store.description import HELD_OUT
from liquid_llm.signal_store.store import StoreWriter
from liquid_llm.signal_store.units import UnitsLayout

log = logging.getLogger(__name__)

SHARE = 0.05  # what training holds out where nobody says otherwise
_CODEC, _DRAWS = "tail", {"draws_t1": 1024.0, "draws_t2": 1.0, "draws_t4": 1.0}  # evaluation asks at T=1 alone


def held_out_codec() -> Codec:
    """How these records are kept: docs/decisions/0029 has what it costs and how near it comes."""
    return get_codec(_CODEC, options=_DRAWS)


def choose_held_out(
    datasets: Mapping[str, Sequence[TokenDataset]], share: float, max_tokens: int
) -> dict[str, list[TokenDataset]]:
    """Type -> the samples that evaluation takes first of its datasets; types that have none are left out.

    Args:
        share: of each dataset that is held out; 1 where all of it is.
        max_tokens: of a type, shared among its datasets as evaluation does.
    """
    chosen = {
        type: [first_held_out(one, share, max_tokens // len(parts)) for one in parts]
        for type, parts in datasets.items()
    }
    return {type: kept for type, parts in chosen.items() if (kept := [one for one in parts if len(one)])}


def open_held_out(
    folders: Mapping[str, str],
    framings: Mapping[str, Framing | None],
    teacher: ModelIdentity,
    vocab_size: int,
    unit: str | None = None,
) -> dict[str, StoreWriter]:
    """Type -> a writer of the store in its store.

    Args:
        folders, framings: type -> its store, and how its texts are framed there.
        unit: whose records are written, where the stores are of units: then each of these is one too.

    Raises:
        SignalError, StorageError: as ``StoreWriter``.
    """
    layout = "shards" if unit is None else UnitsLayout.name
    make = partial(
        StoreWriter, teacher=teacher, codec=held_out_codec(), vocab_size=vocab_size, layout=layout, unit=unit
    )
    return {type: make(storage.join(folder, HELD_OUT), framing=framings[type]) for type, folder in folders.items()}


def say_held_out(summary: CaptureSummary, writers: Mapping[str, StoreWriter]) -> None:
    """Log what was stored for evaluation."""
    if summary.written:
        log.info(
            "%s: %s held-out samples are stored nearly whole too, for evaluation (codec %s: %s, %s bytes a position)",
            ", ".join(writers),
            format_count(summary.written),
            held_out_codec().name,
            format_bytes(summary.bytes),
            format_count(summary.bytes_per_token or 0.0),
        )
