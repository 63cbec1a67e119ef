"""Tokenised records in a memory map on disk, read without loading them.

dataset: the samples of one source, in the order of their records; split: a view of some of them; fate: in which
split a sample falls, decided by a hash of its id alone, so that neither other records nor their order matter.

Samples are stored whole; windows and blocks are cut by readers. A maths or code sample ends with the end-of-text
token, so that a student learns to stop; ``lm`` documents are stored without it and joined by it (``blocks.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.records import Shard
from liquid_llm.data.token_writer import COLUMNS, FORMAT_VERSION, DatasetMeta, TokenWriter, fate, read_meta
from liquid_llm.data.types import Record, Sample
from liquid_llm.errors import DataError
from liquid_llm.storage import translate_errors
from liquid_llm.versions import FRAMING

_log = logging.getLogger(__name__)
_CHUNK_RECORDS = 1024
_CHUNK_CHARACTERS = 1 << 20
_LINES_PER_SHARD = 1 << 40


class TokenDataset:
    """Samples in a memory map; ``subset`` gives views that share it.

    Attributes:
        meta: how it was built, and what was left out.
        tokens: [all tokens] uint16 or uint32, the memory map; samples are runs of it.
        starts: [samples] int64, where each begins in ``tokens``.
        lengths: [samples] int64, tokens of each, end-of-text included where it is stored.
        fates: [samples] uint64, the hash that decides a sample's split.
    """

    def __init__(self, directory: Path, meta: DatasetMeta) -> None:
        def column(name: str, dtype: str) -> NDArray[Any]:
            # np.asarray drops the memmap class, whose indexing is several times slower
            return np.asarray(np.memmap(directory / name, dtype=dtype, mode="r"))

        self.meta = meta
        self.tokens = column("tokens", meta.token_dtype)
        self.starts, self.lengths, self._id_starts, self._id_lengths, self.fates = (
            column(name, dtype) for name, dtype in COLUMNS.items()
        )
        self._ids = column("ids", "u1")

    @property
    def type(self) -> str:
        return self.meta.type

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
        view.meta, view.tokens, view._ids = self.meta, self.tokens, self._ids
        view.starts, view.lengths, view.fates = self.starts[indices], self.lengths[indices], self.fates[indices]
        view._id_starts, view._id_lengths = self._id_starts[indices], self._id_lengths[indices]
        return view


def held_out(sample_id: str, fraction: float) -> bool:
    """Whether a sample is in the validation split of ``fraction`` of all; a larger fraction keeps it there."""
    return fate(sample_id) < _threshold(fraction)


def split(dataset: TokenDataset, fraction: float) -> tuple[TokenDataset, TokenDataset]:
    """(train, validation) views, ``held_out`` for all samples at once. Either can be empty where samples are few."""
    chosen = dataset.fates < np.uint64(_threshold(fraction))
    return dataset.subset(np.flatnonzero(~chosen)), dataset.subset(np.flatnonzero(chosen))


def _threshold(fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise ValueError(f"a held-out fraction is at least 0 and below 1, got {fraction}")
    return int(fraction * 2**64)


class BatchTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def get_vocab(self) -> Mapping[str, int]: ...


class Progress(Protocol):
    """Told now and then how far tokenising has come."""

    def __call__(self, fraction: float, num_tokens: int) -> None: ...


class RecordSource(Protocol):
    """Records of one type with numbered places, and what they are known by.

    Attributes:
        type: of every record.
        identity: plain values that change when the records do.
        fraction_read: share of the source consumed so far, 0 to 1.
    """

    type: str
    identity: object

    @property
    def fraction_read(self) -> float: ...

    def __iter__(self) -> Iterator[tuple[int, Record]]: ...

    def place(self, number: int) -> str: ...


class ShardFiles:
    """The records of several shards as one source."""

    def __init__(self, files: Sequence[str], type: str) -> None:
        self.type = type
        self._shards = [Shard(uri, type) for uri in files]
        infos = [_existing(uri) for uri in files]
        self._size = sum(info.size for info in infos)
        self.identity: object = [[info.uri, info.size, info.version] for info in infos]

    @property
    def fraction_read(self) -> float:
        return sum(shard.bytes_read for shard in self._shards) / max(1, self._size)

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        for index, shard in enumerate(self._shards):
            for line, record in shard:
                yield index * _LINES_PER_SHARD + line, record

    def place(self, number: int) -> str:
        index, line = divmod(number, _LINES_PER_SHARD)
        return self._shards[index].place(line) if line else self._shards[index].uri


def _existing(uri: str) -> storage.FileInfo:
    info = storage.stat(uri)
    if info is None:
        raise DataError("no such shard", where=uri)
    return info


def build_token_dataset(
    files: Sequence[str],
    type: str,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    eos_id: int,
    progress: Progress | None = None,
) -> TokenDataset:
    """The samples of ``files``, tokenised once and kept in ``cache_dir``; see ``tokenize`` for the errors."""
    return tokenize(ShardFiles(files, type), tokenizer, tokenizer_hash, cache_dir, eos_id=eos_id, progress=progress)


def tokenize(
    source: RecordSource,
    tokenizer: BatchTokenizer,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    eos_id: int,
    progress: Progress | None = None,
    framing: int = FRAMING,
) -> TokenDataset:
    """The source's samples, from the cache where it has them, else tokenised in one pass with flat memory.

    The cache is keyed by the source's identity, the tokenizer, the format and the framing. Of several processes that
    want the same samples one does the work and the others wait. A dataset appears complete or not at all.

    Args:
        tokenizer_hash: names the tokenizer; equal hashes tokenise alike.
        cache_dir: a local folder.
        eos_id: the end-of-text token, appended to maths and code samples.
        progress: told after each chunk.
        framing: version of how texts become tokens (``liquid_llm.versions``).

    Raises:
        DataError: a malformed record or shard; two texts under one sample id; no usable record.
        StorageError: a shard cannot be read, or the cache cannot be written.
    """
    key = [FORMAT_VERSION, source.identity, source.type, tokenizer_hash, eos_id]
    key += [framing] * (framing > 1)  # so that a cache of the first framing keeps its name
    name = f"{source.type}-{hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()}"
    directory = Path(cache_dir) / name
    if (meta := read_meta(directory, framing)) is not None:
        return TokenDataset(directory, meta)
    with translate_errors(cache_dir, writing=True):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        waiting = "waiting for process %s, which tokenises the same files"
        with storage.locked(directory.parent / f".{name}.lock", on_wait=lambda holder: _log.info(waiting, holder)):
            if (meta := read_meta(directory, framing)) is None:
                meta = _publish(directory, source, tokenizer, eos_id, progress, framing)
    return TokenDataset(directory, meta)


def _publish(
    directory: Path,
    source: RecordSource,
    tokenizer: BatchTokenizer,
    eos_id: int,
    progress: Progress | None,
    framing: int,
) -> DatasetMeta:
    with storage.publish_folder(directory, alone=True) as temporary:
        token_dtype = "<u2" if max(eos_id, *tokenizer.get_vocab().values()) < 2**16 else "<u4"
        with TokenWriter(temporary, source.type, token_dtype, source.place, framing) as writer:
            for records in _chunks(source):
                token_ids = _token_ids(tokenizer, [record.text for _, record in records])
                if source.type != "lm":
                    token_ids = [ids if ids[-1:] == [eos_id] else [*ids, eos_id] for ids in token_ids]
                writer.add([record.sample_id for _, record in records], token_ids, [place for place, _ in records])
                if progress is not None:
                    progress(source.fraction_read, writer.num_tokens)
            meta = writer.finish()
    if meta.num_short or meta.num_repeated:
        message = "%s: left out %d records under two tokens and %d that repeat another"
        _log.info(message, source.type, meta.num_short, meta.num_repeated)
    return meta


def _chunks(records: Iterable[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    """Runs of records, few and short enough to be held with their tokens."""
    chunk: list[tuple[int, Record]] = []
    characters = 0
    for place, record in records:
        chunk.append((place, record))
        characters += len(record.text)
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _token_ids(tokenizer: BatchTokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model is no mistake here, windows are cut later
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    token_ids: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return token_ids
