"""Tokenised records in a memory map on disk, read without loading them.

dataset: the samples of one source, in the order of their records; split: a view of some of them. In which split a
sample falls is decided by a hash of its id alone, so that neither other records nor their order matter.

Samples are stored whole; windows and blocks are cut by readers. In the layout ``samples`` each has its framing around
it (``framing``); in ``blocks`` they are stored without, and framed where they are joined (``blocks.py``). What is
learnt of a sample goes with its tokens (``learning.py``). A conversation has what its chat template puts around it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.learning import USUAL, Encoded, Encoder, Learning, LearningError
from liquid_llm.data.records import RecordFiles
from liquid_llm.data.token_writer import (
    COLUMNS,
    FIRST_LEARNT,
    FORMAT_VERSION,
    LEARNT,
    MESSAGES,
    PROMPT,
    TEXT,
    DatasetMeta,
    TokenWriter,
    read_hashes,
    read_meta,
    split_hash,
    write_hashes,
)
from liquid_llm.data.types import Sample, TextRecord
from liquid_llm.errors import DataError
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
        directory: where its files lie.
        tokens: [all tokens] uint16 or uint32, the memory map; samples are runs of it.
        starts: [samples] int64, where each begins in ``tokens``.
        lengths: [samples] int64, tokens of each, framing included where it is stored.
        split_hashes: [samples] uint64, what decides a sample's split.
        learnt: [all tokens] uint8, 1 where a token is learnt, of the same runs; None where all are.
        first_learnt: [samples] int64, the first learnt token that another precedes; None where all are learnt.
        offsets: [samples] int64, where in its document each window begins; None where all are whole samples.
        shards: the names of the input files, in their order; empty where nobody has asked.
        shard_of: [samples] int32, the number of each sample's file among them; None where nobody has asked.
    """

    offsets: NDArray[np.int64] | None = None

    def __init__(
        self,
        directory: Path,
        meta: DatasetMeta,
        framing: Framing,
        hashes: Mapping[str, str] | None = None,
        shards: Sequence[str] = (),
    ) -> None:
        def column(name: str, dtype: str) -> NDArray[Any]:
            if not meta.sizes[name]:  # nothing can be mapped of an empty file
                return np.zeros(0, dtype)
            # np.asarray drops the memmap class, whose indexing is several times slower
            return np.asarray(np.memmap(directory / name, dtype=dtype, mode="r"))

        self.meta, self.framing, self.directory, self._hashes = meta, framing, directory, hashes or {}
        self.tokens = column("tokens", meta.token_dtype)
        self.starts, self.lengths, self._id_starts, self._id_lengths, self.split_hashes = (
            column(name, dtype) for name, dtype in COLUMNS.items()
        )
        self._ids = column("ids", "u1")
        masked = LEARNT in meta.sizes
        self.learnt = column(LEARNT, "u1") if masked else None
        self.first_learnt = column(FIRST_LEARNT, "<i8") if masked else None
        self.shards: Sequence[str] = tuple(shards)
        counts = meta.file_samples or (len(self.starts),)
        self.shard_of: NDArray[np.int32] | None = (
            np.repeat(np.arange(len(counts), dtype=np.int32), counts) if shards else None
        )

    @property
    def type(self) -> str:
        return self.meta.type

    @property
    def layout(self) -> str:
        return self.meta.layout

    @property
    def fingerprint(self) -> str:
        """A hash of the samples that a view is of: their names, tokens and order, wherever they were tokenised."""
        known = {name: self._hashes.get(name) or storage.sha256(self.directory / name) for name in self.meta.sizes}
        return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.starts)

    def document_id(self, index: int) -> str:
        """The sample id of the document that a window is of, or of the sample itself."""
        start = self._id_starts[index]
        return self._ids[start : start + self._id_lengths[index]].tobytes().decode()

    def sample_id(self, index: int) -> str:
        name = self.document_id(index)
        return name if self.offsets is None or not self.offsets[index] else f"{name}#{self.offsets[index]}"

    def input_ids(self, index: int, limit: int | None = None) -> NDArray[np.int32]:
        """The first ``limit`` tokens of sample ``index``, all of them by default: [n] int32."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        ids = self.tokens[start : start + (length if limit is None else min(limit, length))].astype(np.int32)
        if self.offsets is not None and self.offsets[index] and self.framing.begin_id is not None:
            ids[0] = self.framing.begin_id
        return ids

    def sample(self, index: int) -> Sample:
        learnt = None
        if self.learnt is not None:
            start = int(self.starts[index])
            learnt = self.learnt[start : start + int(self.lengths[index])].astype(bool)
        return Sample(self.sample_id(index), self.type, self.input_ids(index), learnt, self.shard(index))

    def shard(self, index: int) -> str | None:
        """The name of the input file that a sample is of; None where nobody has asked."""
        return None if self.shard_of is None else self.shards[self.shard_of[index]]

    @property
    def counts(self) -> NDArray[np.int64] | None:
        """[shards] int64, samples of each input file, in whose order they are; None where nobody has asked."""
        return None if self.shard_of is None else np.bincount(self.shard_of, minlength=len(self.shards))

    def learnable(self, window: int) -> TokenDataset:
        """The samples of which something is learnt in their first ``window`` tokens; itself where that is all."""
        if self.first_learnt is None or (within := self.first_learnt < window).all():
            return self
        return self.subset(np.flatnonzero(within))

    def subset(self, indices: NDArray[np.int64]) -> TokenDataset:
        """The samples at ``indices``, in that order, as a dataset that shares the memory map."""
        view = object.__new__(TokenDataset)
        view.meta, view.framing, view.tokens, view._ids = self.meta, self.framing, self.tokens, self._ids
        view.learnt, view.directory, view._hashes = self.learnt, self.directory, self._hashes
        view.first_learnt = None if self.first_learnt is None else self.first_learnt[indices]
        for name in ("starts", "lengths", "split_hashes", "_id_starts", "_id_lengths"):
            setattr(view, name, getattr(self, name)[indices])
        view.offsets = None if self.offsets is None else self.offsets[indices]
        view.shards = self.shards
        view.shard_of = None if self.shard_of is None else self.shard_of[indices]
        return view

    def windows(self, size: int) -> TokenDataset:
        """The samples cut into windows of ``size`` tokens, each as a sample of its own.

        Every token but a document's first is predicted once. A window begins as a text does: with the begin token where
        the framing has one, else with the last token of the window before. The first one has the name of its document,
        each other, with ``#`` and its place, a name of its own.

        Args:
            size: at least 2; the last window of a document has 2 to ``size`` tokens.
        """
        counts = np.maximum(1, -(-(self.lengths - 1) // (size - 1)))
        rows = np.repeat(np.arange(len(self)), counts)
        first = np.cumsum(counts) - counts
        view = self.subset(rows)
        view.offsets = (np.arange(len(rows)) - first[rows]) * (size - 1)
        view.starts = view.starts + view.offsets
        view.lengths = np.minimum(size, view.lengths - view.offsets)
        return view if self.learnt is None else view._find_learnt(self.learnt)

    def count_learnt(self, window: int) -> NDArray[np.int64]:
        """The learnt positions in the first ``window`` tokens of each sample: [samples] int64.

        A position is learnt where its next token is, so that a sample has one fewer than tokens at most.
        """
        lengths = self.lengths.clip(max=window)
        if self.learnt is None:
            return (lengths - 1).clip(min=0)
        runs = self._predicted(self.learnt, lengths)
        return np.fromiter((np.count_nonzero(run) for run in runs), np.int64, len(self))

    def _find_learnt(self, learnt: NDArray[np.uint8]) -> TokenDataset:
        """The windows in which something is learnt, with the first such token of each found anew.

        Window by window: what is read of the map is let go of again, and no number of each token is kept.
        """
        runs = self._predicted(learnt, self.lengths)
        firsts = (1 + int(run.argmax()) if run.any() else 1 + len(run) for run in runs)
        self.first_learnt = np.fromiter(firsts, np.int64, len(self))
        return self.subset(np.flatnonzero(self.first_learnt < self.lengths))

    def _predicted(self, learnt: NDArray[np.uint8], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
        """Which of each sample's first ``lengths`` tokens are learnt, without its first, which nothing predicts."""
        flags = learnt.view(np.bool_)  # whose searches end at the first
        for start, length in zip(self.starts.tolist(), lengths.tolist(), strict=True):
            yield flags[start + 1 : start + length]


def gather(parts: Sequence[TokenDataset]) -> TokenDataset:
    """The samples of several datasets of one type and framing, one after another, in memory. At least one dataset."""
    first = parts[0]
    runs = [(one, index) for one in parts for index in range(len(one))]

    def joined(arrays: Sequence[NDArray[Any]], empty: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([empty[:0], *arrays])

    def column(name: str) -> NDArray[Any]:
        return joined([getattr(one, name) for one in parts], getattr(first, name))

    view = object.__new__(TokenDataset)
    forms = dict.fromkeys(form for one in parts for form in one.meta.forms)
    known = hashlib.blake2b("".join(one.fingerprint for one in parts).encode(), digest_size=16).hexdigest()
    view.meta = replace(first.meta, forms=tuple(forms), sizes={"parts": 0}, file_samples=())
    view.framing, view.directory, view._hashes = first.framing, first.directory, {"parts": known}
    view.lengths, view._id_lengths, view.split_hashes = (
        column(name) for name in ("lengths", "_id_lengths", "split_hashes")
    )
    view.starts = np.cumsum(view.lengths) - view.lengths
    view._id_starts = np.cumsum(view._id_lengths) - view._id_lengths

    def cut(one: TokenDataset, index: int) -> slice:
        return slice(int(one.starts[index]), int(one.starts[index] + one.lengths[index]))

    view.tokens = joined([one.tokens[cut(one, index)] for one, index in runs], first.tokens)
    ids = [one.document_id(index).encode() for one, index in runs]
    view._ids = np.frombuffer(b"".join(ids), np.uint8)
    view.learnt = view.first_learnt = None
    if any(one.learnt is not None for one in parts):
        masks = [
            np.ones(int(one.lengths[index]), np.uint8) if one.learnt is None else one.learnt[cut(one, index)]
            for one, index in runs
        ]
        view.learnt = joined(masks, np.zeros(0, np.uint8))
        firsts = [np.ones(len(one), np.int64) if one.first_learnt is None else one.first_learnt for one in parts]
        view.first_learnt = joined(firsts, np.zeros(0, np.int64))
    view.shards = tuple(dict.fromkeys(name for one in parts for name in one.shards))
    numbers = {name: number for number, name in enumerate(view.shards)}
    of = [numbers[name] for one, index in runs if (name := one.shard(index)) is not None]
    view.shard_of = np.array(of, np.int32) if view.shards else None
    return view


def is_held_out(sample_id: str, fraction: float) -> bool:
    """Whether a sample is in the validation split of ``fraction`` of all; a larger fraction keeps it there."""
    return split_hash(sample_id) < _threshold(fraction)


def split(dataset: TokenDataset, fraction: float) -> tuple[TokenDataset, TokenDataset]:
    """(train, validation) views, ``is_held_out`` for all samples at once. Either can be empty where samples are few."""
    held_out = dataset.split_hashes < np.uint64(_threshold(fraction))
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def first_held_out(dataset: TokenDataset, fraction: float, max_tokens: int) -> TokenDataset:
    """Of what ``split`` holds out the samples that evaluation takes first, until ``max_tokens`` are reached."""
    chosen = np.argsort(dataset.split_hashes, kind="stable")
    if fraction < 1:
        chosen = chosen[: int((dataset.split_hashes < np.uint64(_threshold(fraction))).sum())]
    chosen = chosen[: int(np.searchsorted(np.cumsum(dataset.lengths[chosen]), max_tokens)) + 1]
    return dataset.subset(np.sort(chosen))


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
        num_files: how many files the records are of; a record's number says which (``records.LINES_PER_FILE``).
        fraction_read: share of the source consumed so far, 0 to 1.
    """

    type: str
    identity: object
    num_files: int

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
    learning: Learning = USUAL,
    shards: Sequence[str] = (),
    one_of_many: bool = False,
) -> TokenDataset:
    """The source's samples, from the cache where it has them, else tokenised in one pass with flat memory.

    What is cached is read once and compared with its checksums; what is damaged is made again, and that is said. The
    cache is keyed by the source's identity, the tokenizer, the format, the layout and the framing; where not all
    records are texts, by what is learnt of the others too. Of several processes that want the same samples one does the
    work and the others wait. A dataset appears whole or not at all.

    Args:
        tokenizer_hash: names the tokenizer; equal hashes tokenise alike.
        cache_dir: a local folder.
        framing: put around each text in the layout ``samples``, and by who joins them in ``blocks``.
        layout: ``blocks`` or ``samples``; None: as the type has it by itself.
        progress: told after each chunk.
        learning: what is learnt of records with a prompt or messages.
        shards: what the source's files are called, where each sample has to know which of them it is of.
        one_of_many: other sources hold samples of the same kind: this one may have none, and what is left out of it is
            for whoever sums it up to say.

    Raises:
        DataError: a malformed record or file; two texts under one sample id; no usable record; a conversation that no
            chat template writes out.
        StorageError: a file cannot be read, or the cache cannot be written.
    """
    layout = layout or default_layout(source.type)
    texts, mixed = cache_folders(
        source.identity, source.type, tokenizer_hash, cache_dir, framing=framing, layout=layout, learning=learning
    )

    def find(*, say: bool = False) -> TokenDataset | None:
        found = (open_cache(directory, framing, shards, say=say) for directory in (texts, mixed))
        return next((one for one in found if one is not None), None)

    if (dataset := find()) is not None:
        return dataset
    with translate_errors(cache_dir, writing=True):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        waiting = "waiting for process %s, which tokenises the same files"
        with storage.locked(texts.with_name(f".{texts.name}.lock"), on_wait=lambda holder: _log.info(waiting, holder)):
            if (dataset := find(say=True)) is None:
                with storage.publish_folder(mixed, alone=True) as fresh:
                    highest = max(framing.end_id, *tokenizer.get_vocab().values())
                    options = ("<u2" if highest < 2**16 else "<u4", source.location, framing.version, layout)
                    with TokenWriter(fresh, source.type, *options, source.num_files) as writer:
                        _write(writer, source, Encoder(tokenizer, learning), framing, progress)
                        meta = writer.finish(may_be_empty=one_of_many)
                if not one_of_many:
                    say_left_out(source.type, meta.num_short, meta.num_repeated, meta.num_unlearnt)
                directory = mixed
                if tuple(meta.forms) == (TEXT,):
                    directory = texts
                    with storage.publish_folder(texts, alone=True) as fresh:
                        for path in mixed.iterdir():
                            path.rename(fresh / path.name)
                    mixed.rmdir()
                dataset = TokenDataset(directory, meta, framing, write_hashes(directory, meta), shards)
    return dataset


def cache_folders(
    identity: object,
    type: str,
    tokenizer_hash: str,
    cache_dir: str | Path,
    *,
    framing: Framing,
    layout: str,
    learning: Learning = USUAL,
) -> tuple[Path, Path]:
    """Where the samples of a source of this ``identity`` are cached: where all its records are texts, and where not."""
    key = [FORMAT_VERSION, identity, type, tokenizer_hash, framing.end_id]
    if framing.begin_id is not None:  # a cache of the first framing keeps its name
        key += [framing.version, framing.begin_id]
    key += [layout] * (layout != default_layout(type))
    # Texts alone are the same whatever is learnt of other records: they have one name, that of earlier releases.
    return Path(cache_dir) / _name(type, key), Path(cache_dir) / _name(type, [*key, *learning.key])


def open_cache(
    directory: Path, framing: Framing, shards: Sequence[str] = (), *, say: bool = False
) -> TokenDataset | None:
    """The samples in a folder of the cache, after a look at all that is there; None where it is none, or damaged.

    Args:
        shards: as ``tokenize`` has them.
        say: whether it is logged why a folder that is there cannot be used.
    """
    hashes = read_hashes(directory, say=say) if directory.is_dir() else None
    meta = None if hashes is None else read_meta(directory, framing.version)
    if meta is not None and len(shards) > 1 and not meta.file_samples:
        if say:
            _log.info("%s: made again, as it does not say which file each sample is of", directory)
        return None
    return None if meta is None else TokenDataset(directory, meta, framing, hashes, shards)


def _name(type: str, key: Sequence[object]) -> str:
    return f"{type}-{hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()}"


def say_left_out(type: str, short: int, repeated: int, unlearnt: int) -> None:
    """Log how many records are no samples; see ``DatasetMeta``."""
    if short or repeated:
        _log.info("%s: left out %d records under two tokens and %d that repeat another", type, short, repeated)
    if unlearnt:
        _log.info("%s: left out %d records of which nothing is learnt", type, unlearnt)


def _write(
    writer: TokenWriter,
    source: RecordSource,
    encoder: Encoder,
    framing: Framing,
    progress: TellProgress | None,
) -> None:
    for numbered in _chunks(source):
        rows: list[list[int]] = []
        learnt: list[list[bool] | None] = []
        for (_, record), encoded in zip(numbered, _encode(numbered, source, encoder), strict=True):
            bare = record.messages is not None and writer.layout == "samples"
            ids, mask = encoded if bare else _frame(framing, writer.layout, *encoded)
            rows.append(ids)
            learnt.append(mask)
        before = writer.num_tokens
        ids_of, numbers = [record.sample_id for _, record in numbered], [number for number, _ in numbered]
        writer.add(ids_of, rows, numbers, learnt, {_form(record) for _, record in numbered})
        if progress is not None:
            progress(source.fraction_read, writer.num_tokens - before)


def _frame(
    framing: Framing, layout: str, ids: list[int], learnt: list[bool] | None
) -> tuple[list[int], list[bool] | None]:
    """A text's tokens as its layout keeps them. The end of one is learnt where its last token is, a begin is not."""
    framed = framing.wrap(ids) if layout == "samples" else framing.unwrap(ids)
    if learnt is None or not framed:
        return framed, learnt and []
    start = framing.begin_id is not None and ids[0] == framing.begin_id
    inner = learnt[start : start + len(framing.unwrap(ids))]
    before = framing.begin_id is not None and layout == "samples"
    return framed, [False] * before + inner + inner[-1:] * (len(framed) - before - len(inner))


def _encode(numbered: Sequence[tuple[int, TextRecord]], source: RecordSource, encoder: Encoder) -> list[Encoded]:
    """The tokens of some records. Raises DataError with the place of one whose learnt tokens cannot be told."""

    def refuse(number: int, error: LearningError) -> DataError:
        return DataError(str(error), where=source.location(number), remedy=error.remedy)

    pieces = []
    for number, record in numbered:
        try:
            pieces.append(encoder.pieces(record))
        except LearningError as error:
            raise refuse(number, error) from error
    encoded = []
    for (number, _), found in zip(numbered, encoder.encode(pieces), strict=True):
        if isinstance(found, LearningError):
            raise refuse(number, found)
        encoded.append(found)
    return encoded


def _form(record: TextRecord) -> str:
    return MESSAGES if record.messages is not None else TEXT if record.prompt is None else PROMPT


def _chunks(records: Iterable[tuple[int, TextRecord]]) -> Iterator[list[tuple[int, TextRecord]]]:
    """Runs of records, few and short enough to be held with their tokens."""
    chunk: list[tuple[int, TextRecord]] = []
    characters = 0
    for number, record in records:
        chunk.append((number, record))
        characters += len(record.whole)
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
