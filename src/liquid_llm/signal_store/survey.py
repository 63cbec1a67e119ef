"""What a signal store holds and what each part of it costs.

position         a place in a record's window whose next token is predicted; stored where it has a row: of those learnt
                 all, or the share that capture kept (``--kd_positions``)
bytes a token    bytes on disk for each stored position, and not for each token of the texts; records that later ones
                 supersede count until they are packed
parts            where those go: the codec's own parts, what a record says about itself, names, tables, index
mass             sum of a position's stored weights and of its tail's bucket: 1, or 1 on average where ids are drawn
tail share       the part of it that is not stored id by id: one bucket, or ids drawn to stand for others
mass error       root mean square of mass - 1 over positions: the noise of what is drawn, 0 where nothing is
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.losses.signals import HEAD, WHOLE, SparseSignal
from liquid_llm.signal_store.codecs import PayloadError, StoredSignal
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.records import RecordError, difference_in_words
from liquid_llm.signal_store.store import StoreReader

_LISTED = 20
COMMON_IDS = 4096  # the first ids of a vocabulary, which are handed out by falling frequency
_DRAWN = 0.02  # a weight this far from its probability, relatively, belongs to a draw


def survey(store: StoreReader, *, samples: int, temperature: float, seed: int) -> dict[str, Any]:
    """Measure a store: sizes exactly, the rest on ``samples`` records drawn at random, decoded at ``temperature``.

    Returns:
        plain values. ``bytes``, ``files``, ``positions``, ``bytes_per_token`` and ``parts_bytes_per_token`` are of all
        that can be read, positions being stored ones; ``kd_positions`` is the share of learnt positions that capture
        kept; ``window_positions`` are all of the records' windows, ``stored_share`` of which have a row, and
        ``learnt_share`` of which are learnt (where a share was kept at most so, as each record's is rounded up; None of
        no positions); ``superseded`` counts records hidden by later ones of their samples (packing removes them),
        ``unreadable`` those in files that are cut or damaged; ``sampled`` those looked at, of which ``stale`` and
        ``corrupt``; ``examples`` says of a few of these why; ``types`` has the same by type, with ``mass``,
        ``tail_share`` and ``mass_error`` (None where nothing was decoded); ``problems`` is about the whole folder.

    Raises:
        SignalError: the codec cannot answer at this temperature.
        StorageError: the store cannot be read.
    """
    contents = store.layout.contents()
    sizes = {info.name: info.size for info in storage.list_files(store.uri)}
    parts: Counter[str] = Counter({STORE_FILE: sizes.get(STORE_FILE, 0)}) + contents.parts
    found: Counter[str] = Counter()
    examples = {name: f"unreadable: {why}" for name, why in contents.damaged.items()}
    payload_parts: Counter[str] = Counter()
    sums: defaultdict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(4))
    for name, record in store.layout.draw(samples, seed):
        if name in contents.damaged:
            continue  # its records are counted as unreadable
        found["sampled"] += 1
        if isinstance(record, RecordError):
            found["corrupt"] += 1
            examples.setdefault(name, f"corrupt: {record}")
            continue
        if (difference := record.header.identity.difference(store.identity)) is not None:
            found["stale"] += 1
            what, theirs, _ = difference_in_words(*difference)
            examples.setdefault(name, f"stale: captured with {what} {theirs}")
            continue
        rows = record.header.num_rows
        try:
            signal = store.codec.decode(record.payload, 0, rows, temperature, store.identity.vocab_size)
            payload_parts.update(store.codec.parts(record.payload, store.identity.vocab_size))
        except PayloadError as error:
            found["corrupt"] += 1
            examples.setdefault(name, f"corrupt: {error}")
            continue
        mass, tail = masses(signal)
        sums[record.header.type] += [rows, float(mass.sum()), float(tail.sum()), float((mass - 1).square().sum())]
    counts = sum(contents.types.values(), Counter())
    positions, kept = counts["positions"], store.identity.positions or 1.0
    return {
        "bytes": parts.total() + contents.unreadable_bytes,
        "files": contents.files + 1,
        "superseded": store.layout.superseded,
        "unreadable": contents.unreadable,
        "unreadable_bytes": contents.unreadable_bytes,
        **{name: found[name] for name in ("sampled", "stale", "corrupt")},
        "examples": dict(list(examples.items())[:_LISTED]),
        "problems": store.layout.problems(),
        "kd_positions": kept,
        "positions": positions,
        **_shares(counts, kept),
        "bytes_per_token": parts.total() / positions if positions else None,
        "parts_bytes_per_token": {
            name: size / positions for name, size in _split_payload(parts, payload_parts).items() if positions
        },
        "types": {type: _type_values(contents.types[type], sums[type], kept) for type in sorted(contents.types)},
    }


def masses(signal: StoredSignal) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and tail share of each position."""
    if not isinstance(signal, SparseSignal):
        return torch.ones(signal.num_positions), torch.zeros(signal.num_positions)
    return signal.weights.sum(1) + signal.tail_mass, (signal.weights * drawn_slots(signal)).sum(1) + signal.tail_mass


def drawn_slots(signal: SparseSignal) -> torch.Tensor:
    """Which slots [positions, K] hold a draw."""
    return (signal.weights - signal.log_probs.exp()).abs() > _DRAWN * signal.weights


class DrawnVariance(NamedTuple):
    """The variance of a learnt position's stored weights, summed over ids, and the part of rare ids in it."""

    total: float = 0.0
    rare: float = 0.0

    @classmethod
    def of(cls, signal: SparseSignal) -> DrawnVariance:
        """That of all positions of a signal, summed.

        An id that is kept i times on average, with a weight of q / i each, has a variance of q^2 / i; the squared
        weights of what was kept sum up to that on average. So it is for codec ``tail``; codec ``sampled`` is not looked
        into.
        """
        squares = signal.weights.square() * drawn_slots(signal)
        return cls(float(squares.sum()), float(squares[signal.ids >= COMMON_IDS].sum()))


def drawn_variance(store: StoreReader, type: str, *, samples: int, temperature: float) -> DrawnVariance:
    """What the draws of some records of ``type`` leave open.

    Returns:
        The mean of learnt positions: 0 for no draws; one that the store has no row for counts as none.

    Raises:
        SignalError: the codec cannot answer at this temperature.
        StorageError: the store cannot be read.
    """
    if store.codec.form in (WHOLE, HEAD):
        return DrawnVariance()
    found: list[DrawnVariance] = []
    rows = 0
    for _, record in store.layout.draw(8 * samples, seed=0):
        if len(found) == samples:
            break
        if isinstance(record, RecordError) or record.header.type != type:
            continue
        here = record.header.num_rows
        try:
            signal = store.codec.decode(record.payload, 0, here, temperature, store.identity.vocab_size)
        except PayloadError:
            continue
        if not isinstance(signal, SparseSignal):
            return DrawnVariance()
        found.append(DrawnVariance.of(signal))
        rows += here
    share = (store.identity.positions or 1.0) / max(rows, 1)
    return DrawnVariance(*(share * sum(parts) for parts in zip(*found, strict=True)))


def _shares(counts: Counter[str], kept: float) -> dict[str, Any]:
    """How many positions the windows have, and the shares of them that are stored and learnt."""
    positions = counts["tokens"] - counts["records"]
    stored = counts["positions"] / positions if positions else None
    learnt = None if stored is None else min(1.0, stored / kept)
    return {"window_positions": positions, "stored_share": stored, "learnt_share": learnt}


def _type_values(counts: Counter[str], sums: NDArray[np.float64], kept: float) -> dict[str, Any]:
    positions, decoded = counts["positions"], int(sums[0])
    mass, tail_share, square = (sums[1:] / decoded).tolist() if decoded else (None, None, None)
    return {
        "records": counts["records"],
        "positions": positions,
        **_shares(counts, kept),
        "payload_bytes_per_token": counts["payload_bytes"] / positions if positions else None,
        "sampled_positions": decoded,
        "mass": mass,
        "tail_share": tail_share,
        "mass_error": None if square is None else square**0.5,
    }


def _split_payload(parts: Counter[str], payload_parts: Counter[str]) -> dict[str, float]:
    """The part "payload" replaced by the codec's parts, in the proportions seen."""
    seen = payload_parts.total()
    if not seen:
        return dict(parts)
    payload = {f"payload: {name}": parts["payload"] * size / seen for name, size in payload_parts.items()}
    return {**payload, **{name: size for name, size in parts.items() if name != "payload"}}
