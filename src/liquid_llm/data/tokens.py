"""Tokenised records in a memory map on disk, read without loading them.

dataset: the samples of one source, in the order of their records; split: a view of some of them. In which split a
sample falls is decided by a hash of its id alone, so that neither other records nor their order matter.

Samples are stored whole; windows and blocks are cut by readers. In the layout ``samples`` each has its framing around
it (``framing``); in ``blocks`` they are stored without, and framed where they are joined (``blocks.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.records import RecordFiles
from liquid_llm.data.token_writer import COLUMNS, FORMAT_VERSION, DatasetMeta, TokenWriter, read_meta, split_hash
from liquid_llm.data.types import Sample, TextRecord
from liquid_llm.framing import Framing
from liquid_llm.sources import default_layout
from liquid_llm.storage import translate_errors

_log = logging.getLogger(__name__)
_CHUNK_RECORDS = 1024
_CHUNK_CHARACTERS = 1 << 20

TellProgress = Callable[[float, int], object]
"""Told now and then which share of a source is read, and how many tokens came since it was told last."""


class TokenDataset:
    """Samples in a memory map; ``subset`` gives views that share it.

    Attributes:
        meta: how it was built, and what was left out.
        framing: what stands around each text, in its tokens or where they are joined.
        tokens: [all tokens] uint16 or uint32, the memory map; samples are runs of it.
        starts: [samples] int64, where each begins in ``tokens``.
        lengths: [samples] int64, tokens of each, framing included where it is stored.
        split_hashes: [samples] uint64, what decides a sample's split.
    """

    def __init__(self, directory: Path, meta: DatasetMeta, framing: Framing) -> None:
        def column(name: str, dtype: str) -> NDArray[Any]:
            # np.asarray drops the memmap class, whose indexing is several times slower
            return np.asarray(np.memmap(directory / name, dtype=dtype, mode="r"))

        self.meta, self.framing = meta, framing
        self.tokens = column("tokens", meta.token_dtype)
        self.starts, self.lengths, self._id_starts, self._id_lengths, self.split_hashes = (
            column(name, dtype) for name, dtype in COLUMNS.items()
        )
        self._ids = column("ids", "u1")

    @property
    def type(self) -> str:
        return self.meta.type

    @property
    def layout(self) -> str:
        return self.meta.layout

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.starts)

    def sample_id(self, index: int) -> str:
        start = self._id_starts[index]
        return self._ids[start : start + self._id_lengths[index]].tobytes().decode()

    def input_ids(self, index: int, limit: int | None = None) -> NDArray[np.int32]:
        """The first ``limit`` tokens of sample ``index``, all of them by default: [n] int32."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        return self.tokens[start : start + (length if limit is None else min(limit, length))].astype(np.int32)

    def sample(self, index: int) -> Sample:
        return Sample(self.sample_id(index), self.type, self.input_ids(index))

    def subset(self, indices: NDArray[np.int64]) -> TokenDataset:
        """The samples at ``indices``, in that order, as a dataset that shares the memory map."""
        view = object.__new__(TokenDataset)
        view.meta, view.framing, view.tokens, view._ids = self.meta, self.framing, self.tokens, self._ids
        for name in ("starts", "lengths", "split_hashes", "_id_starts", "_id_lengths"):
            setattr(view, name, getattr(self, name)[indices])
        return view


def is_held_out(sample_id: str, fraction: float) -> bool:
    """Whether a sample is in the validation split of ``fraction`` of all; a larger fraction keeps it there."""
    return split_hash(sample_id) < _threshold(fraction)


def split(dataset: TokenDataset, fraction: float) -> tuple[TokenDataset, TokenDataset]:
    """(train, validation) views, ``is_held_out`` for all samples at once. Either can be empty where samples are few."""
    held_out = dataset.split_hashes < np.uint64(_threshold(fraction))
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def _threshold(fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise ValueError(f"a held-out fraction is at least 0 and below 1, got {fraction}")
    return int(fraction * 2**64)


class BatchTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def get_vocab(self) -> Mapping[str, int]: ...


class RecordSource(Protocol):
    """Numbered records of one type, and what they are known by.

    Attributes:
        type: of every record.
        identity: plain values that change when the records do.
        fraction_read: share of the source consumed so far, 0 to 1.
    """

    type: str
    identity: object

    @property
    def fraction_read(self) -> float: ...

    def __iter__(self) -> Iterator[tuple[int, TextRecord]]: ...

    def location(self, number: int) -> str:
        """Where a record is, in words; 0: the source as a whole."""


def build_token_dataset(
    files: Sequence[str],
    type: str,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    **options: Any,
) -> TokenDataset:
    """The samples of ``files``, tokenised once and kept in ``cache_dir``; see ``tokenize`` for options and errors."""
    return tokenize(RecordFiles(files, type), tokenizer, tokenizer_hash, cache_dir, **options)


def tokenize(
    source: RecordSource,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    framing: Framing,
    layout: str | None = None,
    progress: TellProgress | None = None,
) -> TokenDataset:
    """The source's samples, from the cache where it has them, else tokenised in one pass with flat memory.

    The cache is keyed by the source's identity, the tokenizer, the format, the layout and the framing. Of several
    processes that want the same samples one does the work and the others wait. A dataset appears whole or not at all.

    Args:
        tokenizer_hash: names the tokenizer; equal hashes tokenise alike.
        cache_dir: a local folder.
        framing: put around each text in the layout ``samples``, and by who joins them in ``blocks``.
        layout: ``blocks`` or ``samples``; None: as the type has it by itself.
        progress: told after each chunk.

    Raises:
        DataError: a malformed record or file; two texts under one sample id; no usable record.
        StorageError: a file cannot be read, or the cache cannot be written.
    """
    layout = layout or default_layout(source.type)
    key = [FORMAT_VERSION, source.identity, source.type, tokenizer_hash, framing.end_id]
    if framing.begin_id is not None:  # a cache of the first framing keeps its name
        key += [framing.version, framing.begin_id]
    key += [layout] * (layout != default_layout(source.type))
    name = f"{source.type}-{hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()}"
    directory = Path(cache_dir) / name
    if (meta := read_meta(directory, framing.version)) is not None:
        return TokenDataset(directory, meta, framing)
    with translate_errors(cache_dir, writing=True):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        waiting = "waiting for process %s, which tokenises the same files"
        with storage.locked(directory.parent / f".{name}.lock", on_wait=lambda holder: _log.info(waiting, holder)):
            if (meta := read_meta(directory, framing.version)) is None:
                with storage.publish_folder(directory, alone=True) as fresh:
                    highest = max(framing.end_id, *tokenizer.get_vocab().values())
                    options = ("<u2" if highest < 2**16 else "<u4", source.location, framing.version, layout)
                    with TokenWriter(fresh, source.type, *options) as writer:
                        _write(writer, source, tokenizer, framing, progress)
                        meta = writer.finish()
                left_out = "%s: left out %d records under two tokens and %d that repeat another"
                if meta.num_short or meta.num_repeated:
                    _log.info(left_out, source.type, meta.num_short, meta.num_repeated)
    return TokenDataset(directory, meta, framing)


def _write(
    writer: TokenWriter,
    source: RecordSource,
    tokenizer: BatchTokenizer,
    framing: Framing,
    progress: TellProgress | None,
) -> None:
    for numbered in _chunks(source):
        # verbose=False: a text longer than the model is no mistake here, windows are cut later
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        rows: list[list[int]] = tokenizer([record.text for _, record in numbered], **options)["input_ids"]
        rows = [framing.wrap(ids) if writer.layout == "samples" else framing.unwrap(ids) for ids in rows]
        before = writer.num_tokens
        writer.add([record.sample_id for _, record in numbered], rows, [number for number, _ in numbered])
        if progress is not None:
            progress(source.fraction_read, writer.num_tokens - before)


def _chunks(records: Iterable[tuple[int, TextRecord]]) -> Iterator[list[tuple[int, TextRecord]]]:
    """Runs of records, few and short enough to be held with their tokens."""
    chunk: list[tuple[int, TextRecord]] = []
    characters = 0
    for number, record in records:
        chunk.append((number, record))
        characters += len(record.text)
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
