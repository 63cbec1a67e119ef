"""Samples of many data files, each tokenised into a cache of its own, of which those of the present windows are open.

part     what one data file gives: the samples of its cache without those held out or of which nothing is learnt, cut
         into windows where the layout says so; or the full blocks of its joined texts, which end with the file
item     a sample, or a block: what an order shuffles
survey   what has to be known of a file before its turn: how many items it gives and how long they are, and those held
         out that evaluation takes first. A small file beside the cache: tokens and index are not looked at for it
row      what is kept of a file in memory: its name, items, tokens, and a hash of its cache

So memory grows by a row a file, whatever the files hold. The order of a run (``two_levels``) is what it would be were
all samples in one cache, with one difference: a text that comes in two files is two samples, as nobody sees both.
Blocks are others than those of one cache, which go on from one file into the next.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liquid_llm import storage
from liquid_llm.data.blocks import Blocks, Span
from liquid_llm.data.learning import USUAL, Learning
from liquid_llm.data.records import RecordFiles
from liquid_llm.data.token_writer import TEXT, DatasetMeta
from liquid_llm.data.tokens import (
    BatchTokenizer,
    TellProgress,
    TokenDataset,
    cache_folders,
    gather,
    open_cache,
    say_left_out,
    split,
    tokenize,
)
from liquid_llm.data.types import Sample
from liquid_llm.errors import DataError
from liquid_llm.framing import Framing
from liquid_llm.parsing import ParseError, parse_json
from liquid_llm.storage import FileInfo

_log = logging.getLogger(__name__)
_SURVEY_VERSION = 1
_ASKING = 32  # data files whose version is asked for at once
_OPEN_PARTS = 64


# --------------------------------------------------------------------------------------------------------- what is used


@dataclass(frozen=True)
class Cut:
    """What of a file's samples is trained on, and what evaluation takes first of the others.

    Attributes:
        window: tokens of a sample that a model sees.
        val_fraction: share that is held out; 1: all, and all is trained on.
        windows_of: documents are cut into windows of so many tokens, each a sample; None: samples are whole.
        held_tokens, held_samples: of all files what evaluation takes at most of what is held out, both at least.
        block: documents are joined into blocks of so many tokens; None: each is for itself.
    """

    window: int
    val_fraction: float
    windows_of: int | None = None
    held_tokens: int = 0
    held_samples: int = 0
    block: int | None = None

    @cached_property
    def name(self) -> str:
        """Another for other values."""
        values = asdict(self)
        if self.block is None:  # as surveys were called before there were any of blocks
            del values["block"]
        return blake2b(json.dumps([_SURVEY_VERSION, values]).encode(), digest_size=6).hexdigest()

    def learnable(self, dataset: TokenDataset) -> TokenDataset:
        """The samples of a cache of which something is learnt; of documents that are cut anywhere, or joined all."""
        if self.block is not None:
            return dataset
        return dataset.learnable(self.window if self.windows_of is None else 2**62)

    def train(self, learnable: TokenDataset) -> TokenDataset:
        """What is trained on; where it is joined into blocks, the documents of these."""
        kept = split(learnable, self.val_fraction)[0] if self.val_fraction < 1 else learnable
        if self.block is not None:
            return kept
        return (kept if self.windows_of is None else kept.windows(self.windows_of)).learnable(self.window)

    def ranks(self, dataset: TokenDataset) -> NDArray[np.uint64]:
        """[samples] which of a cache's samples evaluation takes first, the lowest: of joined texts as they come."""
        return dataset.split_hashes if self.block is None else np.zeros(len(dataset), np.uint64)

    def held_out(self, dataset: TokenDataset) -> NDArray[np.int64]:
        """The numbers of a cache's samples that are held out, those first that evaluation takes first."""
        order = np.argsort(dataset.split_hashes, kind="stable")
        kept = self.learnable(dataset)
        if kept is not dataset:
            within = np.isin(dataset.starts, kept.starts)
            order = order[within[order]]
        if self.val_fraction < 1:
            order = order[: len(split(kept, self.val_fraction)[1])]
        return order if self.block is None else np.sort(order)


@dataclass(frozen=True)
class Survey:
    """What is known of a file; see the module.

    Attributes:
        fingerprint: of its cache, 32 hex digits.
        samples, tokens: that are trained on.
        lengths: what items are long, at most a window: [2, n] ascending lengths, and how many items have each.
        held: samples and tokens that are held out.
        first: rank, number in the cache, tokens: of those that evaluation takes first, of this file alone.
        left_out: records that are no samples: under two tokens, repeated, of which nothing is learnt.
        unseen: samples of which nothing is learnt in what a model sees.
        forms: of the records.
        blocks: all full blocks, and the tokens behind the last of them; None where texts are not joined.
    """

    fingerprint: str
    samples: int
    tokens: int
    lengths: NDArray[np.int64]
    held: tuple[int, int]
    first: Sequence[tuple[int, int, int]]
    left_out: tuple[int, int, int]
    unseen: int
    forms: Sequence[str]
    blocks: tuple[int, int] | None = None

    @classmethod
    def of(cls, dataset: TokenDataset, cut: Cut) -> Survey:
        """That of a file with these samples."""
        learnable = cut.learnable(dataset)
        train, held = cut.train(learnable), cut.held_out(dataset)
        blocks = None if cut.block is None else Blocks(train, cut.block)
        if blocks is None:
            lengths = np.array(np.unique(np.minimum(train.lengths, cut.window), return_counts=True))
        else:
            lengths = np.array([[cut.block], [len(blocks)]])
        first = held[: _enough(dataset.lengths[held], cut)]
        rows = zip(cut.ranks(dataset)[first].tolist(), first.tolist(), dataset.lengths[first].tolist(), strict=True)
        meta = dataset.meta
        return cls(
            dataset.fingerprint,
            len(train),
            train.num_tokens,
            lengths,
            (len(held), int(dataset.lengths[held].sum())),
            list(rows),
            (meta.num_short, meta.num_repeated, meta.num_unlearnt),
            len(dataset) - len(learnable),
            list(meta.forms),
            None if blocks is None else (blocks.full, blocks.behind),
        )

    def plain(self) -> dict[str, Any]:
        """As ``of_plain`` reads it; counts of lengths as one string, which is read twenty times as fast as numbers."""
        lengths = base64.b64encode(self.lengths.astype("<u4").tobytes()).decode()
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "lengths": lengths}

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Survey:
        """Raises TypeError, ValueError or KeyError where it is none."""
        lengths = np.frombuffer(base64.b64decode(values["lengths"]), "<u4").reshape(2, -1).astype(np.int64)
        found = cls(**{**values, "lengths": lengths})
        if found.blocks is None and lengths[1].sum() != found.samples:
            raise ValueError("counts of other samples")
        if found.blocks is not None and not 0 <= lengths[1].sum() <= found.blocks[0]:
            raise ValueError("more blocks than there are")
        return found


def _enough(tokens: NDArray[np.int64], cut: Cut) -> int:
    """How many of these samples make what evaluation takes."""
    return max(int(np.searchsorted(np.cumsum(tokens), cut.held_tokens)) + 1, cut.held_samples)


class _First:
    """Of what is held out in all files, what evaluation takes first; few are kept."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self.rows: list[tuple[int, int, int, int]] = []  # rank, file, number, tokens

    def add(self, file: int, rows: Sequence[Sequence[int]]) -> None:
        full = len(self.rows) >= _enough(np.array([row[3] for row in self.rows], np.int64), self._cut)
        below = self.rows[-1][0] if full else 2**64
        new = [(value, file, number, tokens) for value, number, tokens in rows if value < below]
        if new:
            self.rows = sorted(self.rows + new)
            del self.rows[_enough(np.array([row[3] for row in self.rows], np.int64), self._cut) :]


# ------------------------------------------------------------------------------------------------------------ the files


class FileCaches:
    """The caches of data files of one type: found, made, surveyed.

    Args:
        cache_dir, framing, layout, learning: as ``tokens.tokenize`` has them.

    Attributes:
        tokenised: files that were not in the cache when they were surveyed.
    """

    def __init__(
        self,
        type: str,
        tokenizer: BatchTokenizer,
        tokenizer_hash: str,
        cache_dir: str | Path,
        *,
        framing: Framing,
        layout: str,
        learning: Learning = USUAL,
    ) -> None:
        self.type, self.framing, self.layout = type, framing, layout
        self._tokenizer, self._hash, self._cache_dir, self._learning = tokenizer, tokenizer_hash, cache_dir, learning
        self.tokenised = 0

    def survey(self, info: FileInfo, cut: Cut, progress: TellProgress | None = None) -> tuple[Survey, Path]:
        """What is known of a file, which is tokenised where it is not in the cache, and the folder of its cache."""
        known = False
        for folder in cache_folders(
            [[info.uri, info.size, info.version]],
            self.type,
            self._hash,
            self._cache_dir,
            framing=self.framing,
            layout=self.layout,
            learning=self._learning,
        ):
            if folder.is_dir():
                known = True
                if (found := read_survey(folder, cut)) is not None:
                    return found, folder
        dataset = self._tokenise(info, "", progress)
        self.tokenised += not known
        made = Survey.of(dataset, cut)
        write_survey(dataset.directory, cut, made)
        return made, dataset.directory

    def survey_all(
        self, files: Sequence[str], cut: Cut, progress: TellProgress | None = None
    ) -> Iterator[tuple[Survey, Path]]:
        """``survey`` of each of ``files``, in their order. Raises DataError: one is not there."""
        for number, info in enumerate(_stat_all(files)):

            def tell(share: float, tokens: int, number: int = number) -> None:
                if progress is not None:
                    progress((number + share) / len(files), tokens)

            yield self.survey(info, cut, tell)

    def open(self, uri: str, folder: Path, name: str, fingerprint: str) -> TokenDataset:
        """All samples of a file's cache, which is made again where it is damaged or gone.

        Raises:
            DataError: the samples are others than those that were surveyed.
        """
        dataset = open_cache(folder, self.framing, [name], say=True)
        if dataset is None:
            info = storage.stat(uri)
            if info is None:
                raise DataError("no such file, and its tokens are no longer in the cache", where=uri)
            dataset = self._tokenise(info, name)
        if dataset.fingerprint != fingerprint:
            raise DataError(
                "a data file has changed since this run looked at it",
                where=uri,
                remedy="put back what was there, or begin a run of its own",
            )
        return dataset

    def _tokenise(self, info: FileInfo, name: str, progress: TellProgress | None = None) -> TokenDataset:
        return tokenize(
            RecordFiles([info.uri], self.type, [info]),
            self._tokenizer,
            self._hash,
            self._cache_dir,
            framing=self.framing,
            layout=self.layout,
            progress=progress,
            learning=self._learning,
            shards=[name] if name else (),
            one_of_many=True,
        )


def _survey_file(folder: Path, cut: Cut) -> Path:
    return folder.with_name(f".{folder.name}.{cut.name}.json")


def write_survey(folder: Path, cut: Cut, survey: Survey) -> None:
    """Keep it beside a cache, with a hash of it in a line of its own. Raises StorageError."""
    body = json.dumps(survey.plain()).encode()
    storage.write_bytes(str(_survey_file(folder, cut)), body + b"\n" + _hash_of(body))


def read_survey(folder: Path, cut: Cut) -> Survey | None:
    """What is kept beside a cache; None where nothing is, or it is damaged."""
    try:
        body, _, told = _survey_file(folder, cut).read_bytes().rpartition(b"\n")
        return Survey.of_plain(parse_json(body)) if told == _hash_of(body) else None
    except (OSError, ParseError, TypeError, ValueError, KeyError):
        return None


def _hash_of(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).hexdigest().encode()


class _Part(NamedTuple):
    """What is open of a file: its samples that are trained on, and their blocks where they are joined."""

    samples: TokenDataset
    blocks: Blocks | None


class ManyFiles:
    """The samples of many files as one dataset to train on, in the order of the files; ``two_levels.Lengths`` of them.

    Its length is the number of samples; where they are joined, items are blocks all the same. Safe to use from several
    threads.

    Attributes:
        type, layout, framing: of all samples.
        meta: what the caches say together.
        window: tokens that a model sees of a sample: what is learnable is so within them; of blocks their size.
        shards: the names of the files that have items.
        counts, shard_tokens: [shards] int64, items of each file, and their tokens as far as a model sees them.
        num_tokens: of all samples, whole.
        full_blocks, behind: where samples are joined, all full blocks of all files, and the tokens behind their last
            ones; else 0.
        fingerprint: a hash of the samples of all files.
        unseen: samples left out as nothing of what a model sees of them is learnt.
        held: samples and tokens of all files that are held out.
        held_out: of them, what evaluation takes first.
    """

    def __init__(self, caches: FileCaches, cut: Cut, files: Sequence[str], names: Sequence[str]) -> None:
        self._caches, self._cut = caches, cut
        self.type, self.layout, self.framing, self.window = caches.type, caches.layout, caches.framing, cut.window
        self._names, self._uris, self._folders, self._prints = list(names), list(files), list[str](), bytearray()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Future[_Part]] = OrderedDict()
        self._most = _OPEN_PARTS

    @classmethod
    def read(
        cls,
        caches: FileCaches,
        cut: Cut,
        files: Sequence[str],
        names: Sequence[str],
        progress: TellProgress | None = None,
    ) -> ManyFiles:
        """Those of ``files``, each called as ``names`` says; what is not in the cache is tokenised.

        Raises:
            DataError: a file is not there or cannot be used.
            StorageError: one cannot be read, or the cache not be written.
        """
        made = cls(caches, cut, files, names)
        made._survey_all(progress)
        return made

    def _survey_all(self, progress: TellProgress | None) -> None:
        counts, sums, first = [], [], _First(self._cut)
        left_out, forms = np.zeros(3, np.int64), dict[str, None]()
        self.num_tokens = self.unseen = self._samples = self.full_blocks = self.behind = 0
        self.held = (0, 0)
        self._cache_dir = Path()
        self._histogram = np.zeros(self.window + 1, np.int64)
        for number, (one, folder) in enumerate(self._caches.survey_all(self._uris, self._cut, progress)):
            self._cache_dir = folder.parent
            self._folders.append(folder.name)
            self._prints += bytes.fromhex(one.fingerprint)
            counts.append(int(one.lengths[1].sum()))
            sums.append(int(one.lengths.prod(axis=0).sum()))
            self._histogram[one.lengths[0]] += one.lengths[1]
            first.add(number, one.first)
            self._samples += one.samples
            self.num_tokens += one.tokens
            full, behind = one.blocks or (0, 0)
            self.full_blocks += full
            self.behind += behind
            self.unseen += one.unseen
            self.held = (self.held[0] + one.held[0], self.held[1] + one.held[1])
            left_out += one.left_out
            forms |= dict.fromkeys(one.forms)
        self._first = first.rows
        kept = np.flatnonzero(counts)
        self._files = kept.tolist()
        self.shards: Sequence[str] = [self._names[file] for file in self._files]
        self.counts, self.shard_tokens = np.array(counts, np.int64)[kept], np.array(sums, np.int64)[kept]
        self._starts = np.append(0, np.cumsum(self.counts))
        short, repeated, unlearnt = left_out.tolist()
        say_left_out(self.type, short, repeated, unlearnt)
        self.meta = DatasetMeta(
            1, self.type, "", short, repeated, {}, self.framing.version, self.layout, tuple(forms) or (TEXT,), unlearnt
        )

    def __len__(self) -> int:
        return self._samples

    @property
    def num_blocks(self) -> int:
        """Full blocks in which something is learnt, where samples are joined."""
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        return blake2b(self._prints, digest_size=16).hexdigest()

    @cached_property
    def held_out(self) -> TokenDataset | None:
        chosen: dict[int, list[int]] = {}
        for _, file, number, _ in self._first:
            chosen.setdefault(file, []).append(number)
        parts = [self._cache(file).subset(np.sort(np.array(numbers))) for file, numbers in sorted(chosen.items())]
        return gather(parts) if parts else None

    # -------------------------------------------------------------------------------------------------------- items

    def block(self, number: int) -> Span:
        """A block, where samples are joined; counted over the files in their order."""
        shard, number = self._find(number)
        blocks = self._part(shard).blocks
        assert blocks is not None
        return blocks.span(number)

    def sample_id(self, index: int) -> str:
        shard, number = self._find(index)
        return self.part(shard).sample_id(number)

    def sample(self, index: int) -> Sample:
        shard, number = self._find(index)
        return self.part(shard).sample(number)

    def _find(self, index: int) -> tuple[int, int]:
        """The file that an item is of, and its number there."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def keep_open(self, parts: int) -> None:
        """Have so many parts open at most; those of two windows at least, or each sample would open its own."""
        self._most = max(parts, 1)

    @property
    def num_open(self) -> int:
        """Parts whose index is in memory."""
        return len(self._open)

    def part(self, shard: int) -> TokenDataset:
        """The samples of one of ``shards``. Raises DataError: its data file has changed."""
        return self._part(shard).samples

    def _part(self, shard: int) -> _Part:
        with self._lock:
            found = self._open.get(shard)
            mine = found is None
            if found is None:
                found = self._open[shard] = Future()
            self._open.move_to_end(shard)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        if mine:  # beside threads that need others; those that need this one wait for it
            try:
                samples = self._cut.train(self._cut.learnable(self._cache(self._files[shard])))
                found.set_result(_Part(samples, None if self._cut.block is None else Blocks(samples, self._cut.block)))
            except BaseException as error:
                with self._lock:
                    self._open.pop(shard, None)
                found.set_exception(error)
                raise
        return found.result()

    def _cache(self, file: int) -> TokenDataset:
        known = self._prints[16 * file : 16 * file + 16].hex()
        return self._caches.open(self._uris[file], self._cache_dir / self._folders[file], self._names[file], known)

    # ------------------------------------------------------------------------------------------------------ lengths

    def histogram(self, shards: NDArray[np.int64] | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See ``two_levels.Lengths``; out of surveys, of which one at a time is in memory."""
        counts = self._histogram if shards is None else np.zeros(self.window + 1, np.int64)
        for shard in [] if shards is None else shards.tolist():
            values, held = self._lengths(shard)
            counts[values] += held
        values = np.flatnonzero(counts)
        return values, counts[values]

    def of(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([np.minimum(self.part(shard).lengths, self.window) for shard in shards.tolist()])

    def _lengths(self, shard: int) -> NDArray[np.int64]:
        file = self._files[shard]
        found = read_survey(self._cache_dir / self._folders[file], self._cut)
        if found is None:  # taken away meanwhile
            return np.array(np.unique(self.of(np.array([shard])), return_counts=True))
        return found.lengths


def _stat_all(uris: Sequence[str]) -> Iterator[FileInfo]:
    """What each file is, in their order; many are asked for at once where each is a request."""

    def ask(uri: str) -> FileInfo:
        info = storage.stat(uri)
        if info is None:
            raise DataError("no such file", where=uri)
        return info

    if not any(map(storage.is_remote, uris)):
        yield from map(ask, uris)
        return
    with ThreadPoolExecutor(_ASKING, "stat") as threads:
        for start in range(0, len(uris), 16 * _ASKING):
            yield from threads.map(ask, uris[start : start + 16 * _ASKING])
