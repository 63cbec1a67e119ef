"""How the records of a store lie in its folder: what every layout answers, so that nobody asks which one it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from liquid_llm.signal_store.records import Record, RecordError, SignalIdentity
from liquid_llm.storage import FileInfo

Found: TypeAlias = tuple[str, Record | RecordError]
"""A sample's id and its record; or the name of a file or sample, and why there is none."""


@dataclass
class Contents:
    """What the files of a store hold, superseded records included.

    Attributes:
        files: their number.
        types: type -> {"records", "tokens", "positions", "payload_bytes"} of all files whose header can be read.
        parts: bytes of those files by purpose.
        unreadable: records that count and cannot be read because a file is cut or damaged, as far as is known.
        unreadable_bytes: of files that are not in ``parts``.
        damaged: of those, files that should hold many records -> what is wrong with each.
    """

    files: int
    types: dict[str, Counter[str]] = field(default_factory=dict)
    parts: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    unreadable_bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


class RecordWriter(Protocol):
    """Takes records; safe to use from several threads."""

    def write(self, record: Record) -> int:
        """Take a record, replacing any of its sample; returns the bytes it takes. Raises StorageError."""
        ...

    def finish(self) -> int:
        """Publish what is held back; returns the bytes of files beyond what ``write`` told. Raises StorageError."""
        ...


class Layout(Protocol):
    """The records of one folder, listed when this was made; safe to use from several threads."""

    @property
    def name(self) -> str: ...

    @property
    def superseded(self) -> int:
        """Records that a later one of the same sample hides."""
        ...

    def __len__(self) -> int:
        """Number of samples that have a record, complete or not."""
        ...

    def is_empty(self) -> bool:
        """Whether there is nothing at all."""
        ...

    def counts(self) -> dict[str, int]:
        """How much there is, as far as that is known without a look into every part; for provenance."""
        ...

    def has(self, sample_id: str, shard: str | None = None) -> bool:
        """Whether there is something for the sample, without asking storage (but see ``units``).

        Args:
            shard: the data file that the sample is of, by which a store of units finds it.
        """
        ...

    def read(self, sample_id: str, shard: str | None = None) -> Record:
        """The sample's record. Raises RecordError or StorageError."""
        ...

    def records(self) -> Iterator[Found]:
        """All that is in the folder, superseded records left out."""
        ...

    def draw(self, count: int, seed: int) -> Iterator[Found]:
        """``count`` of ``records`` drawn at random, all where there are fewer."""
        ...

    def contents(self) -> Contents:
        """What the files hold."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with the folder, in words."""
        ...

    def replaceable(self, left_out: set[str]) -> list[FileInfo]:
        """Files that may go once all records but those of ``left_out`` (samples or files) were written anew."""
        ...

    def writer(self, identity: SignalIdentity, *, shard_bytes: int, part_seconds: float) -> RecordWriter:
        """What writes more records of ``identity`` into the folder."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...
