"""Shards that are cut or damaged, once all that is wanted of their folder has been captured again: they are removed.

Of a cut shard the records before the cut still count, as nobody captures those again. They are copied into a new shard;
when it is there and the index names it, the cut one goes. A crash at any moment leaves each record in one of the two or
in both, and the next call does what is left.
"""

from __future__ import annotations

import logging

from liquid_llm import storage
from liquid_llm.signal_store.records import Record, RecordError, SignalIdentity
from liquid_llm.signal_store.shards.file import NewerShardError, read_shard_header
from liquid_llm.signal_store.shards.folder import ShardsLayout, write_index
from liquid_llm.signal_store.shards.remote import ShardCache, open_shard
from liquid_llm.signal_store.shards.writer import PART_SECONDS, SHARD_BYTES
from liquid_llm.storage import FileInfo

log = logging.getLogger(__name__)


def replace_damaged(uri: str, layout: ShardsLayout, identity: SignalIdentity) -> list[str]:
    """Remove the cut and damaged shards of folder ``uri``, after what can be read of them has been copied.

    To be called when every sample that the folder is for has a whole record: of what cannot be read nothing is wanted
    then. What a newer program has written is left alone.

    Args:
        layout: of the folder as it is now.
        identity: of its records; those of another are not copied.

    Returns:
        The names of the shards that were removed.

    Raises:
        StorageError: something cannot be read, written or removed. Nothing is lost by it.
    """
    listing = layout.listing
    names = [*listing.truncated, *(name for name in listing.damaged if not _is_newer(listing.files[name]))]
    if not names:
        return []
    writer = layout.writer(identity, shard_bytes=SHARD_BYTES, part_seconds=PART_SECONDS)
    for _, found in layout.records(names):
        if isinstance(found, Record) and found.header.identity.difference(identity) is None:
            writer.write(found)
    writer.finish()
    for name in names:
        storage.remove(listing.files[name].uri)
    write_index(uri)
    log.info("%s: %d cut or damaged shards were replaced, the first %s", uri, len(names), names[0])
    return names


def _is_newer(info: FileInfo) -> bool:
    cache = ShardCache()
    try:
        read_shard_header(open_shard(info, cache).header, info.size)
    except RecordError as error:
        return isinstance(error, NewerShardError)
    finally:
        cache.close()
    return False
