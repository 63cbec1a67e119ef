"""In which order a run sees its texts: shuffled as a whole, or data file by data file (``data.two_levels``), of which
each then has a cache of tokens of its own (``data.many_files``)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from liquid_llm import storage
from liquid_llm.config import RunConfig
from liquid_llm.data.loader import WeightedDataset
from liquid_llm.data.many_files import ManyFiles
from liquid_llm.data.two_levels import MAX_SHARDS, WINDOW_TOKENS
from liquid_llm.data.types import ManifestEntry
from liquid_llm.errors import UsageError
from liquid_llm.options import AUTO
from liquid_llm.runtime import Choice
from liquid_llm.sources import BLOCKS
from liquid_llm.wiring.inputs import is_of_units
from liquid_llm.wiring.start import Start

log = logging.getLogger(__name__)

WHOLE, SHARDS = "whole", "shards"
_MUCH_BEHIND = 0.01  # of a type's tokens


def choose_windows(config: RunConfig, start: Start, types: Sequence[str]) -> tuple[dict[str, int], dict[str, Choice]]:
    """Type -> tokens that are shuffled together, of types that are not shuffled as a whole; and why.

    A run that goes on keeps its order; what was begun before there was another one is shuffled as a whole.

    Raises:
        UsageError: another order was asked for than the run so far has.
    """
    kept, asked = start.window_tokens, config.data.order
    if kept is not None:
        has = SHARDS if kept else WHOLE
        if asked not in (AUTO, has) or (asked == SHARDS and set(types) - kept.keys()):
            raise UsageError(
                "the run so far has seen its texts in another order",
                where=f"--order={asked}",
                got=f"order {has} in {start.origin.description}",
                remedy="leave the option out; another order is another run: start with --restart for that",
            )
        return dict(kept), {"order": Choice(has, "as the run so far")} if kept else {}
    if asked != AUTO:
        return dict.fromkeys(types, WINDOW_TOKENS) if asked == SHARDS else {}, {"order": Choice(asked, "as asked")}
    far = [type for type in types if _is_read_by_file(config.source(type).store)]
    if not far:
        return {}, {}
    choice = Choice(SHARDS, f"of {', '.join(far)}: a store of units behind a URL is read file by file")
    log.info("order %s %s", choice.value, choice.reason)
    return dict.fromkeys(far, WINDOW_TOKENS), {"order": choice}


def say_scattered(windows: Collection[str], entries: Sequence[ManifestEntry]) -> None:
    """Warn of a type whose files are read one by one and listed so too: each line is drawn from by its own weight."""
    for type in windows:
        lines = sum(entry.type == type for entry in entries)
        if lines > MAX_SHARDS:
            log.warning(
                "%s: %d lines of the manifest are drawn from one by one, each shuffled for itself, and all their files "
                "are wanted at once: list the files of a type by one pattern",
                type,
                lines,
            )


def choose_apart(config: RunConfig, start: Start, windows: Collection[str]) -> list[str]:
    """Of the types that are not shuffled as a whole those whose files are read one by one.

    Blocks of a run that was begun when they went on from one file into the next still do.
    """
    if config.data.manifest is None:  # a named dataset has no files that a run knows of
        return []
    apart = [type for type in windows if start.blocks_by_file or config.source(type).layout != BLOCKS]
    for type in sorted({*windows} - {*apart}):
        log.info("%s: blocks go on from one data file into the next, as in the run so far", type)
    return apart


def say_left_behind(mixture: Sequence[WeightedDataset]) -> None:
    """Warn of a type of whose text much is left behind the last full block of each data file."""
    for part in mixture:
        many = part.dataset
        if not isinstance(many, ManyFiles) or not many.full_blocks:
            continue
        share = many.behind / (many.full_blocks * many.window + many.behind)
        if share > _MUCH_BEHIND:
            log.warning(
                "%s: %.2g%% of the tokens are behind the last full block of their data file and are not used: larger "
                "files leave fewer, half a block each, and --order=whole joins the texts of all",
                many.type,
                100 * share,
            )


def order_version(group_size: int, windows: Mapping[str, int], blocks_by_file: bool = False) -> int:
    """The version of what an order is, for checkpoints: 1 where all is as it always was."""
    if windows:
        return 4 if blocks_by_file else 3
    return 1 if group_size == 1 else 2


def needs_files(config: RunConfig, type: str) -> bool:
    """Whether the samples of a type have to know which data file they are of."""
    return config.data.order == SHARDS or is_of_units(config.source(type).store)


def _is_read_by_file(store: str | None) -> bool:
    return store is not None and storage.is_remote(store) and is_of_units(store)
