"""Layout ``pt``: one small ``.pt`` file a sample, named after its id.

The folder is listed once by whoever opens it. A file appears complete or not at all (``storage.write_bytes``), so
processes that capture the same sample at the same time only replace each other's equal records.
"""

from __future__ import annotations

from collections.abc import Iterable

from liquid_llm import storage
from liquid_llm.teachers.records import SUFFIX, Record, file_name, from_bytes, to_bytes


class PtLayout:
    """Records of one folder.

    Args:
        uri: the folder.
        names: of the files in it.
    """

    def __init__(self, uri: str, names: Iterable[str]) -> None:
        self._uri = uri
        self._names = {name for name in names if name.endswith(SUFFIX) and "/" not in name}

    def __len__(self) -> int:
        return len(self._names)

    def has(self, sample_id: str) -> bool:
        """Whether the listing had a file for the sample."""
        return file_name(sample_id) in self._names

    def read(self, sample_id: str) -> Record:
        """The sample's record. Raises RecordError where the file is damaged, StorageError where it cannot be read."""
        return from_bytes(storage.read_bytes(storage.join(self._uri, file_name(sample_id))))

    def write(self, record: Record) -> int:
        """Publish a record; returns the bytes it takes."""
        data = to_bytes(record)
        storage.write_bytes(storage.join(self._uri, file_name(record.header.sample_id)), data)
        return len(data)
