"""A store as a program reads it: records by sample id, decoded to tensors, to arrays, to rows of a table.

Training reads with ``store.StoreReader``, which checks each record against the sample it is used for. Here nobody has
the sample: a record is what it says it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import LogitsSignal
from liquid_llm.signal_store import store as stores
from liquid_llm.signal_store.codecs import PayloadError, StoredSignal
from liquid_llm.signal_store.records import Record, RecordError, RecordHeader
from liquid_llm.signal_store.store import COPY_OR_CAPTURE, StoreReader

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StoredRecord:
    """What a store holds of one sample.

    Attributes:
        sample_id: the sample's name: its own, or a hash of its type and text.
        type: of its text.
        num_tokens: tokens that the teacher was shown, from the text's start.
        positions: [rows] int64, the next-token positions that have a row, ascending: row ``i`` says what the teacher
            expects after token ``positions[i]``.
        nbytes: of the payload.
    """

    sample_id: str
    type: str
    num_tokens: int
    positions: NDArray[np.int64]
    nbytes: int
    _record: Record
    _store: StoreReader

    def signal(self, temperature: float = 1.0) -> StoredSignal:
        """The teacher's distributions, as ``losses.fused_loss`` takes them; one row for each of ``positions``.

        Args:
            temperature: what the teacher's logits are divided by. A ``SparseSignal`` holds at this one alone; a
                ``LogitsSignal`` (codec ``full``) is the logits themselves, whatever it is.

        Raises:
            SignalError: the codec cannot answer at this temperature, or the record is damaged.
        """
        vocabulary, codec = self._store.identity.vocab_size, self._store.codec
        try:
            return codec.decode(self._record.payload, 0, len(self.positions), temperature, vocabulary)
        except PayloadError as error:
            raise _damaged(self._store.uri, self.sample_id, error) from None

    def arrays(self, temperature: float = 1.0) -> dict[str, NDArray[Any]]:
        """The same as NumPy arrays, each id once a row.

        Returns:
            ``positions`` [rows]; and of codec ``full`` ``log_probs`` [rows, vocab] float32; of any other ``ids``,
            ``weights`` (an unbiased estimate of the probability), ``log_probs`` (those of drawn ids coarsely rounded)
            and ``exact`` (bool, whether the id was kept and not drawn), [rows, K], and ``tail_mass`` [rows], the mass
            of all other ids where the codec lumps it. An unused slot has weight 0.

        Raises:
            SignalError: as ``signal``.
        """
        signal = self.signal(temperature).merge_repeats()
        if isinstance(signal, LogitsSignal):
            log_probs = torch.log_softmax(signal.rows.float() / temperature, dim=-1)
            return {"positions": self.positions, "log_probs": log_probs.numpy()}
        found = {name: getattr(signal, name).numpy() for name in ("ids", "weights", "log_probs", "tail_mass")}
        num_exact = np.zeros(len(self.positions)) if signal.num_exact is None else signal.num_exact.numpy()
        exact = np.arange(signal.ids.shape[1]) < num_exact[:, None]
        return {"positions": self.positions, **found, "exact": exact}


class Store:
    """The records of one teacher in one folder, local or behind a URL. Made by ``open_store``; to be closed.

    Attributes:
        uri: the folder.
    """

    def __init__(self, reader: StoreReader) -> None:
        self.uri = reader.uri
        self._reader = reader

    def __len__(self) -> int:
        """The number of samples that have a record."""
        return len(self._reader)

    def __contains__(self, sample_id: object) -> bool:
        """Whether there is a record of that sample, whole or not."""
        return isinstance(sample_id, str) and self._reader.has(sample_id)

    def __getitem__(self, sample_id: str) -> StoredRecord:
        """The record of a sample.

        Raises:
            KeyError: there is none.
            SignalError: it is damaged.
            StorageError: the store cannot be read.
        """
        if sample_id not in self:
            raise KeyError(sample_id)
        try:
            return self._of(self._reader.layout.read(sample_id))
        except RecordError as error:
            raise _damaged(self.uri, sample_id, error) from None

    def records(self, limit: int | None = None) -> Iterator[StoredRecord]:
        """All records, or the first ``limit``, in the order in which they lie there.

        Raises:
            SignalError: one is damaged; those before it have come.
            StorageError: the store cannot be read.
        """
        for name, found in islice(self._reader.layout.records(), limit):
            if isinstance(found, RecordError):
                raise _damaged(self.uri, name, found)
            yield self._of(found)

    def describe(self) -> dict[str, Any]:
        """Whose signal it is and how it is kept: teacher, revision, tokenizer, vocabulary, codec, layout, records."""
        return self._reader.describe()

    def to_pandas(self, *, temperature: float = 1.0, top: int = 8, limit: int | None = 100) -> pandas.DataFrame:
        """The likeliest tokens of each position as rows of a table.

        Args:
            temperature: as for ``StoredRecord.signal``.
            top: ids a position.
            limit: records; None for all of them (a large store does not fit a table).

        Returns:
            Columns ``sample_id``, ``type``, ``position``, ``rank`` (from 0), ``token_id``, ``log_prob``, ``weight``
            (the probability that the loss gives the id) and ``exact`` (False where the codec drew the id: then both
            are estimates).

        Raises:
            SignalError: the codec cannot answer at this temperature, or a record is damaged.
            ValueError: ``top`` below 1.
        """
        import pandas as pd

        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        tables = [_table(record, temperature, top) for record in self.records(limit)]
        return pd.concat(tables, ignore_index=True)

    def close(self) -> None:
        """Close its files and end its threads."""
        self._reader.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _of(self, record: Record) -> StoredRecord:
        header: RecordHeader = record.header
        difference = header.identity.difference(self._reader.identity)
        if difference is not None:
            raise _damaged(self.uri, header.sample_id, f"it is of another {difference[0]} than the store")
        positions = np.flatnonzero(header.positions()).astype(np.int64)
        size = sum(tensor.nbytes for tensor in record.payload.values())
        return StoredRecord(header.sample_id, header.type, header.num_tokens, positions, size, record, self._reader)


def open_store(uri: str) -> Store:
    """Open a signal store, a folder that ``liquid capture`` has filled. The folder is listed once.

    ``with open_store(uri) as store: store["sample-7"].signal(temperature=2.0)``

    Args:
        uri: local folder or any fsspec URL (``gs://``, ``s3://``, ...).

    Raises:
        SignalError: there is no store or no record there, or a newer program wrote it.
        StorageError: the folder cannot be read.
    """
    return Store(stores.open_store(uri))


def _damaged(uri: str, sample_id: str, why: object) -> SignalError:
    return SignalError("a record cannot be read", where=f"{uri}: {sample_id}", got=why, remedy=COPY_OR_CAPTURE)


def _table(record: StoredRecord, temperature: float, top: int) -> pandas.DataFrame:
    """The rows of one record."""
    import pandas as pd

    found = record.arrays(temperature)
    log_probs = found["log_probs"]
    weights, exact = found.get("weights", np.exp(log_probs)), found.get("exact", np.ones_like(log_probs, dtype=bool))
    order = np.argsort(np.where(weights > 0, -log_probs, np.inf), axis=1, kind="stable")[:, :top]
    ids = order if "ids" not in found else np.take_along_axis(found["ids"], order, axis=1)
    rows, width = order.shape
    columns = {
        "position": np.repeat(found["positions"], width),
        "rank": np.tile(np.arange(width), rows),
        "token_id": ids.reshape(-1),
        "log_prob": np.take_along_axis(log_probs, order, axis=1).reshape(-1),
        "weight": np.take_along_axis(weights, order, axis=1).reshape(-1),
        "exact": np.take_along_axis(exact, order, axis=1).reshape(-1),
    }
    table = pd.DataFrame(columns)[columns["weight"] > 0]
    table.insert(0, "sample_id", record.sample_id)
    table.insert(1, "type", record.type)
    return table
