"""Layout ``pt``: one small ``.pt`` file a sample, named after its id.

The folder is listed once by whoever opens it. A file appears complete or not at all (``storage.write_bytes``), so
processes that capture the same sample at the same time only replace each other's equal records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from liquid_llm import storage
from liquid_llm.signal_store.records import SUFFIX, Record, RecordError, file_name, from_bytes, to_bytes

_READERS = 8
_READ_AHEAD = 64


class PtLayout:
    """Records of one folder.

    Attributes:
        name: of the layout.

    Args:
        uri: the folder.
        names: of the files in it.
    """

    name = "pt"

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

    def finish(self) -> int:
        """Nothing is held back."""
        return 0

    def records(self) -> Iterator[tuple[str, Record | RecordError]]:
        """Every record under its sample's id, or what is wrong with a file under its name; read ahead by threads."""
        waiting: deque[tuple[str, Future[Record | RecordError]]] = deque()
        with ThreadPoolExecutor(_READERS, "records") as threads:
            for name in sorted(self._names):
                waiting.append((name, threads.submit(self._read_file, name)))
                if len(waiting) > _READ_AHEAD:
                    yield _named(*waiting.popleft())
            while waiting:
                yield _named(*waiting.popleft())

    def close(self) -> None:
        """Nothing is open."""

    def _read_file(self, name: str) -> Record | RecordError:
        try:
            return from_bytes(storage.read_bytes(storage.join(self._uri, name)))
        except RecordError as error:
            return error


def _named(name: str, future: Future[Record | RecordError]) -> tuple[str, Record | RecordError]:
    found = future.result()
    return (found.header.sample_id if isinstance(found, Record) else name), found
