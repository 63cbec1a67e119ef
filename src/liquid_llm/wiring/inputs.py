"""Data of a run: manifest entries or a named dataset -> training mixture and validation batches by type."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from liquid_llm.config import DataConfig
from liquid_llm.data.hub import load_hub_dataset
from liquid_llm.data.loader import WeightedDataset, validation_batches
from liquid_llm.data.manifest import entry_files, shard_name
from liquid_llm.data.many_files import Cut, FileCaches, ManyFiles
from liquid_llm.data.token_writer import MESSAGES, TEXT
from liquid_llm.data.tokens import TellProgress, TokenDataset, build_token_dataset, split
from liquid_llm.data.types import ManifestEntry, MicroBatch
from liquid_llm.distributed import Engine, deal_on_host
from liquid_llm.errors import DataError
from liquid_llm.signal_store.description import present_layout
from liquid_llm.signal_store.units import UnitsLayout
from liquid_llm.sources import BLOCKS, WINDOWS, default_layout, order_types
from liquid_llm.wiring.places import cache_dir
from liquid_llm.wiring.tokenizers import TextTools

log = logging.getLogger(__name__)

_UNLEARNT = "%s: left out %d samples of whose first %d tokens nothing is learnt"


class HeldOut(NamedTuple):
    """What evaluation takes at most of what is held out of a type: so many tokens, and so many samples at least."""

    tokens: int
    samples: int = 0


NOTHING_APART: Mapping[str, HeldOut] = MappingProxyType({})


@dataclass(frozen=True)
class Inputs:
    """What a run trains and validates on.

    Attributes:
        mixture: training datasets with their weights.
        validation: held-out datasets by type, in the order of ``types``; a type without any is absent.
        entries: the manifest's lines; empty when the data is a named dataset.
        everything: what there is before the split: of each manifest entry, or the splits of a named dataset; nothing
            of those of many files, which nobody sees before their turn.
        unlearnt: type -> records left out because nothing of what a model sees of them is learnt; only of types with
            a prompt or messages.
        windowed: types whose documents are cut into windows. Those of ``validation`` are whole still, as each context
            length cuts them anew.
    """

    mixture: list[WeightedDataset]
    validation: dict[str, list[TokenDataset]]
    entries: list[ManifestEntry] = field(default_factory=list)
    everything: list[TokenDataset] = field(default_factory=list)
    unlearnt: dict[str, int] = field(default_factory=dict)
    windowed: frozenset[str] = frozenset()

    @property
    def has_chat(self) -> bool:
        """Whether conversations are trained on."""
        return any(MESSAGES in part.dataset.meta.forms for part in self.mixture)

    @property
    def is_text(self) -> bool:
        """Whether all records are texts, which are learnt from end to end."""
        return all(set(part.dataset.meta.forms) == {TEXT} for part in self.mixture)

    @property
    def blocks_by_file(self) -> bool:
        """Whether there are blocks that end with their data file."""
        return any(isinstance(part.dataset, ManyFiles) and part.dataset.layout == BLOCKS for part in self.mixture)

    @property
    def sources(self) -> list[tuple[TokenDataset | ManyFiles, float]]:
        """What is drawn from, before anything of it is held out, with its weight."""
        if not self.entries:  # the splits of a named dataset
            return [(part.dataset, part.weight) for part in self.mixture]
        known = iter(self.everything)
        return [
            (part.dataset if isinstance(part.dataset, ManyFiles) else next(known), part.weight) for part in self.mixture
        ]

    @property
    def types(self) -> list[str]:
        """The types present, in the order that metrics have."""
        return order_types(part.dataset.type for part in self.mixture)

    def readiness(self) -> dict[str, dict[str, int]]:
        """Samples and tokens by type and split, for provenance and the log."""
        rows: dict[str, dict[str, int]] = {}
        for type in self.types:
            train = [part.dataset for part in self.mixture if part.dataset.type == type]
            held = self.validation.get(type, [])
            rows[type] = {
                "train_samples": sum(len(one) for one in train),
                "train_tokens": sum(one.num_tokens for one in train),
                "validation_samples": sum(len(one) for one in held),
                "validation_tokens": sum(one.num_tokens for one in held),
            }
            behind = sum(one.behind for one in train if isinstance(one, ManyFiles))
            if behind:
                rows[type]["train_tokens_behind_last_blocks"] = behind
            if type in self.unlearnt:
                rows[type]["left_out_nothing_learnt"] = self.unlearnt[type]
        return rows


def is_of_units(store: str | None) -> bool:
    """Whether a store finds its records by the data file that a sample is of."""
    return store is not None and present_layout(store) == UnitsLayout.name


def token_cache(config: DataConfig) -> Path:
    """Where tokenised data is kept between runs."""
    return Path(config.cache_dir) if config.cache_dir else cache_dir() / "data"


def read_manifest_inputs(
    config: DataConfig,
    text: TextTools,
    entries: Sequence[ManifestEntry],
    layout_of: Callable[[str], str] = default_layout,
    *,
    progress: TellProgress | None = None,
    by_file: Callable[[str], bool] = lambda type: False,
    apart: Mapping[str, HeldOut] = NOTHING_APART,
) -> Inputs:
    """Tokenise (or open) every manifest entry in the layout of its type, and hold out the validation share.

    Args:
        by_file: whether the samples of a type have to know which file they are of.
        apart: type -> what evaluation takes of it, of types whose files are read one by one (``data.many_files``).

    Raises:
        DataError: a shard or a record cannot be used.
    """
    mixture: list[WeightedDataset] = []
    everything: list[TokenDataset] = []
    unlearnt: dict[str, int] = {}
    validation: dict[str, list[TokenDataset]] = {type: [] for type in order_types(entry.type for entry in entries)}
    told = {type: by_file(type) for type in validation}  # asked once a type: it may be a request
    for entry in entries:
        files = entry_files(entry)
        if entry.type in apart:
            many = _read_apart(config, text, entry, files, layout_of(entry.type), apart[entry.type], progress)
            mixture.append(WeightedDataset(many, entry.weight))
            _count_unlearnt(many, unlearnt)
            if (taken := many.held_out) is not None:
                validation[entry.type].append(taken)
            continue
        dataset = build_token_dataset(
            files,
            entry.type,
            text.tokenizer,
            text.hash,
            token_cache(config),
            framing=text.framings(entry.type),
            layout=_kept_as(layout_of(entry.type)),
            progress=progress,
            learning=text.learning,
            shards=[shard_name(file, str(config.manifest)) for file in files] if told[entry.type] else (),
        )
        layout = layout_of(entry.type)
        seen = sys.maxsize if layout == WINDOWS else min(config.seq_len, config.block_size)
        dataset = _keep_learnt(dataset, seen, unlearnt)
        # All of it is held out where nothing is trained on.
        train, held = split(dataset, config.val_fraction) if config.val_fraction < 1 else (dataset, dataset)
        if len(train) == 0:
            raise _nothing_left(entry)
        cut = _cutter(config, layout)
        mixture.append(WeightedDataset(cut(train), entry.weight))
        everything.append(cut(dataset))
        if len(held):
            validation[entry.type].append(held)
    held_out = {type: datasets for type, datasets in validation.items() if datasets}
    windowed = frozenset(type for type in validation if layout_of(type) == WINDOWS)
    return Inputs(mixture, held_out, list(entries), everything, unlearnt, windowed)


def tokenise_share(
    config: DataConfig,
    text: TextTools,
    entries: Sequence[ManifestEntry],
    layout_of: Callable[[str], str],
    apart: Mapping[str, HeldOut],
    engine: Engine,
    progress: TellProgress | None = None,
) -> None:
    """Tokenise and survey this rank's share of what its host is to have in its cache of types in ``apart``.

    Whoever reads them afterwards finds them; what a rank has left out is made by then.

    Raises:
        DataError: a file is not there or cannot be used.
        StorageError: one cannot be read, or the cache not be written.
    """
    for entry in entries:
        if entry.type not in apart:
            continue
        layout, files = layout_of(entry.type), deal_on_host(entry_files(entry), engine)
        caches = _file_caches(config, text, entry.type, layout)
        for _ in caches.survey_all(files, _cut_of(config, layout, apart[entry.type]), progress):
            pass
        if caches.tokenised:
            said = "%s: tokenised %d of %d data files, this process's share of its host's"
            log.info(said, entry.type, caches.tokenised, len(files))


def _read_apart(
    config: DataConfig,
    text: TextTools,
    entry: ManifestEntry,
    files: Sequence[str],
    layout: str,
    held: HeldOut,
    progress: TellProgress | None,
) -> ManyFiles:
    """The samples of an entry's files, each of which is tokenised into a cache of its own."""
    caches, cut = _file_caches(config, text, entry.type, layout), _cut_of(config, layout, held)
    found = ManyFiles.read(caches, cut, files, [shard_name(file, str(config.manifest)) for file in files], progress)
    said = "%s: the tokens of %d data files were in the cache, %d were tokenised"
    log.info(said, entry.type, len(files) - caches.tokenised, caches.tokenised)
    if len(found) == 0:
        raise _nothing_left(entry)
    return found


def _file_caches(config: DataConfig, text: TextTools, type: str, layout: str) -> FileCaches:
    """Where the tokens of each data file of a type are."""
    return FileCaches(
        type,
        text.tokenizer,
        text.hash,
        token_cache(config),
        framing=text.framings(type),
        layout=_kept_as(layout),
        learning=text.learning,
    )


def _cut_of(config: DataConfig, layout: str, held: HeldOut) -> Cut:
    """What is taken of them."""
    window = config.block_size if layout == BLOCKS else min(config.seq_len, config.block_size)
    return Cut(
        window,
        config.val_fraction,
        config.seq_len if layout == WINDOWS else None,
        held.tokens,
        held.samples,
        config.block_size if layout == BLOCKS else None,
    )


def _nothing_left(entry: ManifestEntry) -> DataError:
    return DataError("nothing left to train on", where=entry.where, remedy="lower --val_fraction or add samples")


def _count_unlearnt(many: ManyFiles, unlearnt: dict[str, int]) -> None:
    if set(many.meta.forms) != {TEXT}:
        if many.unseen:
            log.info(_UNLEARNT, many.type, many.unseen, many.window)
        unlearnt[many.type] = unlearnt.get(many.type, 0) + many.unseen + many.meta.num_unlearnt


def _keep_learnt(dataset: TokenDataset, window: int, unlearnt: dict[str, int]) -> TokenDataset:
    """The samples of which something is learnt in their window; the others are counted."""
    if set(dataset.meta.forms) == {TEXT}:
        return dataset
    kept = dataset.learnable(window) if dataset.layout == "samples" else dataset
    left_out = len(dataset) - len(kept)
    if left_out:
        log.info(_UNLEARNT, dataset.type, left_out, window)
    unlearnt[dataset.type] = unlearnt.get(dataset.type, 0) + left_out + dataset.meta.num_unlearnt
    return kept


def _kept_as(layout: str) -> str:
    """The layout in which a type's tokens are kept: windows are cut out of whole samples."""
    return "samples" if layout == WINDOWS else layout


def _cutter(config: DataConfig, layout: str) -> Callable[[TokenDataset], TokenDataset]:
    return (lambda one: one.windows(config.seq_len)) if layout == WINDOWS else lambda one: one


def read_dataset_inputs(
    config: DataConfig,
    text: TextTools,
    layout: str = "blocks",
    *,
    token: str | None = None,
    progress: TellProgress | None = None,
) -> Inputs:
    """Tokenise (or open) a named dataset's train and validation splits; all of it is plain text.

    Raises:
        DataError: the dataset cannot be found or read.
    """
    assert config.dataset_name is not None
    train, held = load_hub_dataset(
        config.dataset_name,
        config.dataset_config,
        text.tokenizer,
        text.hash,
        token_cache(config),
        framing=text.framings("lm"),
        validation_fraction=config.val_fraction,
        layout=_kept_as(layout),
        token=token,
        progress=progress,
        learning=text.learning,
    )
    unlearnt: dict[str, int] = {}
    for one in (train.meta,) if held.meta is train.meta else (train.meta, held.meta):
        if set(one.forms) != {TEXT}:
            unlearnt[train.type] = unlearnt.get(train.type, 0) + one.num_unlearnt
    cut = _cutter(config, layout)
    windowed = frozenset({train.type} if layout == WINDOWS else ())
    return Inputs(
        [WeightedDataset(cut(train), 1.0)], {train.type: [held]}, [], [cut(train), cut(held)], unlearnt, windowed
    )


def validation_sets(
    inputs: Inputs, lengths: Sequence[int], config: DataConfig, max_tokens: int
) -> dict[int, dict[str, list[MicroBatch]]]:
    """Validation batches for each context length; every length sees the same text.

    A type without held-out text is left out, with a message. Windows are as long as the context length; those of the
    training length are as long as they are in training, so that stored signal serves them.
    """
    sets: dict[int, dict[str, list[MicroBatch]]] = {}
    for length in lengths:
        by_type: dict[str, list[MicroBatch]] = {}
        for type, datasets in inputs.validation.items():
            batches: list[MicroBatch] = []
            tokens = config.seq_len if type not in inputs.windowed or length == config.block_size else length
            for dataset in datasets:
                batches += validation_batches(
                    dataset.windows(tokens) if type in inputs.windowed else dataset,
                    block_size=length,
                    batch_size=max(1, config.batch_size * config.block_size // length),
                    max_tokens=max_tokens // len(datasets),
                    sample_tokens=tokens,
                    document_mask=config.document_mask,
                )
            if batches:
                by_type[type] = batches
        sets[length] = by_type
    lacking = [type for type in inputs.types if not any(type in by_type for by_type in sets.values())]
    if lacking:
        every = len(lacking) == len(inputs.types)
        told = "nothing is evaluated, and no checkpoint is the best" if every else "it is trained on and not judged"
        log.warning("no %s text is held out: %s", ", ".join(lacking), told)
    return sets
