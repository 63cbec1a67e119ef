"""Micro-batches: for training by position, without state; for validation as a fixed list.

number: of a micro-batch among those of all ranks, which share one order between them, whatever their number.
position: of a micro-batch of one rank, whose number is ``position * world_size + rank``.
group: so many micro-batches in a row, drawn from the same dataset: what ranks compute at the same time takes equally
long.

Micro-batches of the layout ``blocks`` hold ``batch_size`` full blocks, those of ``samples`` whole samples of near-equal
length, at most ``batch_size * block_size`` tokens with padding (``buckets.py``). A dataset repeats for ever; each pass
over it is an epoch in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from liquid_llm.data.blocks import Blocks, Span, TokenStream
from liquid_llm.data.buckets import WholePlan, WindowedPlan, plan_buckets
from liquid_llm.data.many_files import ManyFiles
from liquid_llm.data.sampling import WeightedDraws, keyed_permutation
from liquid_llm.data.tokens import TokenDataset
from liquid_llm.data.two_levels import KnownLengths, Shards, Windows
from liquid_llm.data.types import IGNORE_INDEX, Documents, MicroBatch, Sample
from liquid_llm.errors import DataError

NO_WINDOWS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class WeightedDataset:
    """Samples of one type and how often a micro-batch is drawn from them, relative to the other datasets."""

    dataset: TokenDataset | ManyFiles
    weight: float


class TrainingStream:
    """The endless, seeded order of training micro-batches.

    ``at`` is a pure function of a micro-batch's number and of what is given here: resuming is going on at a number.

    Args:
        mixture: what is drawn from, in the order of the manifest (the order is part of the seed).
        block_size: tokens of a block.
        batch_size: blocks in a micro-batch; times ``block_size`` its token budget.
        seed: of the run.
        sample_tokens: the most a model sees of a whole sample; a block by default, and never more.
        document_mask: the documents of a block are kept apart, see ``read_blocks``.
        rank: this process's number among ``world_size``.
        group_size: micro-batches of a group; part of the order, like the seed.
        window_tokens: type -> tokens that are shuffled together, see ``two_levels``; other types are as a whole.

    Attributes:
        orders: for each dataset, how its material is cut: see ``BlockOrder`` and ``SampleOrder``.

    Raises:
        DataError: no dataset; one without samples, or with less text than one block.
        ValueError: a size or weight that is not positive.
    """

    def __init__(
        self,
        mixture: Sequence[WeightedDataset],
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        sample_tokens: int | None = None,
        document_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
        group_size: int = 1,
        window_tokens: Mapping[str, int] = NO_WINDOWS,
    ) -> None:
        if block_size < 2 or batch_size < 1 or group_size < 1 or not 0 <= rank < world_size:
            sizes = f"{block_size=} below 2, {batch_size=} or {group_size=} below 1"
            raise ValueError(f"{sizes}, or {rank=} outside {world_size=}")
        if not mixture:
            raise DataError("there is nothing to train on", remedy="add an entry to the manifest")
        self.orders: list[BlockOrder | SampleOrder] = []
        for number, part in enumerate(mixture):
            key, together = (seed, number), window_tokens.get(part.dataset.type)
            if part.dataset.layout == "blocks":
                self.orders.append(BlockOrder(part.dataset, block_size, batch_size, key, document_mask, together))
            else:
                self.orders.append(SampleOrder(part.dataset, block_size, batch_size, key, sample_tokens, together))
        self._draws = WeightedDraws([part.weight for part in mixture], seed)
        self._rank = rank
        self._world_size = world_size
        self._group_size = group_size

    def micro_batch(self, position: int) -> MicroBatch:
        """The micro-batch of this rank at ``position``. May be called from several threads."""
        return self.at(position * self._world_size + self._rank)

    def at(self, number: int) -> MicroBatch:
        """Micro-batch ``number`` of all ranks. May be called from several threads."""
        order, index = self._find(number)
        return order.micro_batch(index)

    def names(self, number: int) -> list[str]:
        """The sample ids of the texts in micro-batch ``number`` of all ranks; for messages."""
        order, index = self._find(number)
        return order.names(index)

    def _find(self, number: int) -> tuple[BlockOrder | SampleOrder, int]:
        group, within = divmod(number, self._group_size)
        source = self._draws.source(group)
        return self.orders[source], self._draws.count(source, group) * self._group_size + within


class BlockOrder:
    """Text as shuffled full blocks; what is left of the text after the last full block is not used.

    Blocks in which nothing is learnt are left out. Where files are read one by one, what is left of each is not used.

    Attributes:
        num_blocks: in one epoch.
        num_micro_batches: in one epoch, rounded up; the last one is filled up from the next epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset | ManyFiles,
        block_size: int,
        batch_size: int,
        key: tuple[int, ...],
        document_mask: bool = False,
        window_tokens: int | None = None,
    ) -> None:
        self._document_mask = document_mask
        self._type = dataset.type
        self._block_size = block_size
        self._batch_size = batch_size
        self._span: Callable[[int], Span]
        shards: Shards | None
        if isinstance(dataset, ManyFiles):
            shards = self._take_files(dataset, window_tokens)
        else:
            shards = self._take_all(dataset, window_tokens)
        if not self.num_blocks:
            remedy = "use a larger --block_size, or --learn=all"
            raise DataError(f"nothing is learnt in any full block of the {dataset.type} text", remedy=remedy)
        if shards is None or window_tokens is None:
            whole = lru_cache(maxsize=2)(partial(keyed_permutation, self.num_blocks, "blocks", *key))
            self._place: Callable[[int, int], int] = lambda epoch, within: int(whole(epoch)[within])
        else:
            windows = Windows(shards, key, window_tokens)
            if isinstance(dataset, ManyFiles):
                dataset.keep_open(2 * windows.most_shards)  # those of the next window are opened ahead of need
            self._place = _shuffle_windows(windows, key)
        self.num_micro_batches = -(-self.num_blocks // batch_size)

    def _take_all(self, dataset: TokenDataset, window_tokens: int | None) -> Shards | None:
        """Cut all texts into blocks; runs of these are taken for shards."""
        blocks = Blocks(dataset, self._block_size)
        self._span, self.num_blocks = blocks.span, len(blocks)
        if not blocks.full:
            raise DataError(
                f"the {dataset.type} text is shorter than one block",
                got=f"{blocks.tokens} tokens to train on",
                expected=f"at least {self._block_size}",
                remedy="use a smaller --block_size, hold out less, or add text",
            )
        if window_tokens is None or not len(blocks):
            return None
        return Shards.of(np.full(len(blocks), self._block_size), None, window_tokens)

    def _take_files(self, dataset: ManyFiles, window_tokens: int | None) -> Shards:
        """The blocks of each file are a shard."""
        if window_tokens is None or dataset.window != self._block_size:
            raise ValueError(f"files read one by one are shuffled so, in blocks of {dataset.window} tokens")
        self._span, self.num_blocks = dataset.block, dataset.num_blocks
        if not dataset.full_blocks:
            raise DataError(
                f"no {dataset.type} data file fills a block, and blocks end with their file",
                got=f"{dataset.behind} tokens to train on, of all files together",
                expected=f"a file of at least {self._block_size}",
                remedy="give --order=whole, which joins the texts of all files; or larger files, or a smaller "
                "--block_size",
            )
        return Shards(np.append(0, np.cumsum(dataset.counts)), dataset.shard_tokens)

    def shapes(self) -> set[tuple[int, int]]:
        """Rows and tokens a row of every micro-batch."""
        return {(self._batch_size, self._block_size)}

    def micro_batch(self, index: int) -> MicroBatch:
        """The ``index``-th micro-batch since the beginning, across epochs."""
        return read_blocks(self._type, self._spans(index), self._document_mask)

    def names(self, index: int) -> list[str]:
        """The sample ids of its documents, in their order there."""
        return list(dict.fromkeys(name for span in self._spans(index) for name in span.document_names()))

    def _spans(self, index: int) -> list[Span]:
        numbers = range(index * self._batch_size, (index + 1) * self._batch_size)
        return [self._span(self._place(*divmod(number, self.num_blocks))) for number in numbers]


def _shuffle_windows(windows: Windows, key: tuple[int, ...]) -> Callable[[int, int], int]:
    """Epoch and place in it -> which block comes there."""
    counts = windows.count_items()

    @lru_cache(maxsize=4)
    def shuffle(epoch: int, window: int) -> NDArray[np.int64]:
        items = windows.items(window)
        return items[keyed_permutation(len(items), "blocks", *key, epoch, window)]

    def place(epoch: int, within: int) -> int:
        window, number = windows.find(epoch, within, counts)
        return int(shuffle(epoch, window)[number])

    return place


class SampleOrder:
    """Whole samples in length buckets, shuffled in each epoch.

    Attributes:
        num_micro_batches: in one epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset | ManyFiles,
        block_size: int,
        batch_size: int,
        key: tuple[int, ...],
        sample_tokens: int | None = None,
        window_tokens: int | None = None,
    ) -> None:
        if not len(dataset):
            raise DataError(
                f"there is no {dataset.type} sample to train on", remedy="hold out less, or add records of this type"
            )
        self._window = block_size if sample_tokens is None else min(sample_tokens, block_size)
        self._dataset = dataset
        self._plan: WholePlan | WindowedPlan
        if isinstance(dataset, ManyFiles):
            self._plan = self._plan_files(dataset, batch_size, block_size, key, window_tokens)
        else:
            self._plan = self._plan_samples(dataset, batch_size, block_size, key, window_tokens)
        self.num_micro_batches = self._plan.num_micro_batches

    def _plan_samples(
        self, dataset: TokenDataset, batch_size: int, block_size: int, key: tuple[int, ...], window_tokens: int | None
    ) -> WholePlan | WindowedPlan:
        self._dataset = dataset = dataset.learnable(self._window)
        if not len(dataset):
            raise DataError(
                f"nothing is learnt in the first {self._window} tokens of any {dataset.type} sample",
                remedy="use a larger --block_size or --seq_len, or --learn=all",
            )
        windows = np.minimum(dataset.lengths, self._window)
        if window_tokens is None:
            return WholePlan(windows, batch_size, block_size, key)
        shards = Shards.of(windows, dataset.shard_of, window_tokens)
        parts = Windows(shards, key, window_tokens)
        return WindowedPlan(KnownLengths(windows, shards), batch_size, block_size, parts, key)

    def _plan_files(
        self, dataset: ManyFiles, batch_size: int, block_size: int, key: tuple[int, ...], window_tokens: int | None
    ) -> WindowedPlan:
        if window_tokens is None or dataset.window != self._window:
            raise ValueError(f"files read one by one are shuffled so, as windows of {dataset.window} tokens")
        shards = Shards(np.append(0, np.cumsum(dataset.counts)), dataset.shard_tokens)
        parts = Windows(shards, key, window_tokens)
        dataset.keep_open(2 * parts.most_shards)  # those of the next window are opened ahead of need
        return WindowedPlan(dataset, batch_size, block_size, parts, key)

    def shapes(self) -> set[tuple[int, int]]:
        """Rows, and the most tokens a row, that every micro-batch can have."""
        return self._plan.shapes()

    def micro_batch(self, index: int) -> MicroBatch:
        """The ``index``-th micro-batch since the beginning, across epochs."""
        return _whole_samples(self._dataset, self._plan.samples(index), self._window)

    def names(self, index: int) -> list[str]:
        """The sample ids of its samples, in their order there."""
        return [self._dataset.sample_id(int(one)) for one in self._plan.samples(index)]


def validation_batches(
    dataset: TokenDataset,
    *,
    block_size: int,
    batch_size: int,
    max_tokens: int | None = None,
    sample_tokens: int | None = None,
    document_mask: bool = False,
) -> list[MicroBatch]:
    """A fixed list of micro-batches that covers the same text whatever the block size.

    Blocks: the first ``max_tokens`` tokens of the stream in its order, the last block as short as it comes. Samples:
    in the order of the hash of their ids (a random choice that stays) until
    ``max_tokens`` are reached, each cut to its first ``block_size`` tokens, gathered by length. Blocks and windows in
    which nothing is learnt are left out.

    Args:
        max_tokens: None takes everything.
        sample_tokens, document_mask: as for ``TrainingStream``.

    Returns:
        batches that name the texts of their positions; nothing for an empty dataset.
    """
    if dataset.layout == "blocks":
        stream = TokenStream(dataset)
        end = len(stream) if max_tokens is None else min(max_tokens, len(stream))
        blocks = [Span(stream, start, min(block_size, end - start)) for start in range(0, end, block_size)]
        blocks = [span for span in blocks if _is_learnt(span)]
        cuts = [blocks[n : n + batch_size] for n in range(0, len(blocks), batch_size)]
        batches = [_with_documents(read_blocks(dataset.type, cut, document_mask), stream, cut) for cut in cuts]
        return [batch for batch in batches if batch.num_positions]
    chosen = np.argsort(dataset.split_hashes, kind="stable")
    if max_tokens is not None:
        chosen = chosen[: np.searchsorted(np.cumsum(dataset.lengths[chosen]), max_tokens) + 1]
    window = block_size if sample_tokens is None else min(sample_tokens, block_size)
    if dataset.first_learnt is not None:
        chosen = chosen[dataset.first_learnt[chosen] < window]
    if not chosen.size:
        return []
    windows = np.minimum(dataset.lengths[chosen], window)
    chosen = chosen[np.argsort(windows, kind="stable")]
    plan = plan_buckets(windows, batch_size, block_size)
    found = []
    for start, end in zip(plan.bounds[:-1], plan.bounds[1:], strict=True):
        batch = _whole_samples(dataset, chosen[start:end], window)
        rows = torch.arange(end - start).repeat_interleave(batch.row_positions)
        names = tuple(dataset.document_id(int(index)) for index in chosen[start:end])
        found.append(replace(batch, documents=Documents(names, rows)))
    return found


def collate(
    type: str,
    rows: Sequence[NDArray[np.integer]],
    samples: tuple[Sample, ...] = (),
    learnt: Sequence[NDArray[np.bool_] | None] | None = None,
) -> MicroBatch:
    """Rows of token ids, right-padded with 0 to the longest, and their next-token labels.

    Args:
        learnt: which tokens of each row are learnt, as long as it; None: all.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    input_ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        mask = None if learnt is None else learnt[number]
        labels[number, : len(row) - 1] = row[1:] if mask is None else np.where(mask[1:], row[1:], IGNORE_INDEX)
    return MicroBatch(type, torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(lengths), samples)


def _whole_samples(dataset: TokenDataset | ManyFiles, indices: NDArray[np.int64], block_size: int) -> MicroBatch:
    samples = tuple(dataset.sample(int(index)) for index in indices)
    learnt = [None if sample.learnt is None else sample.learnt[:block_size] for sample in samples]
    return collate(dataset.type, [sample.input_ids[:block_size] for sample in samples], samples, learnt)


def read_blocks(type: str, spans: Sequence[Span], document_mask: bool = False) -> MicroBatch:
    """Runs of a stream, or of several, as rows.

    With ``document_mask`` each document is to a model as if it stood alone: it comes with the places of its tokens, and
    its last token is not asked for the first one of the next.
    """
    batch = collate(type, [span.read() for span in spans], learnt=[span.read_learnt() for span in spans])
    if not document_mask:
        return batch
    labels, places = batch.labels.clone(), torch.zeros_like(batch.labels)
    for row, span in enumerate(spans):
        row_places, ends = span.borders()
        places[row, : len(ends)] = torch.from_numpy(row_places)
        labels[row, : len(ends)][torch.from_numpy(ends)] = IGNORE_INDEX
    return MicroBatch(type, batch.input_ids, labels, batch.lengths, places=places)


def _with_documents(batch: MicroBatch, stream: TokenStream, spans: Sequence[Span]) -> MicroBatch:
    """Blocks of one stream with the documents of their labels."""
    of_label = torch.zeros_like(batch.labels)
    for row, span in enumerate(spans):
        of_label[row, : span.count - 1] = torch.from_numpy(stream.documents(span.start + 1, span.count - 1))
    numbers, of_position = torch.unique(of_label.reshape(-1)[batch.positions], return_inverse=True)
    return replace(batch, documents=Documents(tuple(map(stream.document_name, numbers.tolist())), of_position))


def _is_learnt(span: Span) -> bool:
    """Whether something is learnt in a run of a stream; its first token, which nothing predicts, does not count."""
    learnt = span.read_learnt()
    return span.count > 1 and (learnt is None or bool(learnt[1:].any()))
