"""The copy of a run directory at a URL: what it holds, and bringing it one checkpoint or file further.

A checkpoint goes up data first, sidecar last; a name that is overwritten loses its sidecar in the mirror first. Data
that is already there under another name is copied there, not sent again. Everything here blocks;
``upload`` calls it from its thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    SIDECAR_SUFFIX,
    data_path,
    is_snapshot,
    remote_sidecars,
    sidecar_text,
    sidecars,
)
from liquid_llm.checkpoint.metadata import IN_PIECES, CheckpointMetadata
from liquid_llm.checkpoint.pieces import find_unused, piece_files
from liquid_llm.storage import translate_errors
from liquid_llm.storage.lease import LeaseLost

_SMALL_BYTES = 32 * 2**20


class Mirror:
    """What is known of one mirror. Used by one thread at a time.

    Args:
        fence: raises LeaseLost where another has taken the mirror over; asked around everything that is published.

    Attributes:
        bytes_per_second: at which the last checkpoint's data was sent; None before the first.
    """

    def __init__(self, run_dir: Path, uri: str, fence: Callable[[], None] = lambda: None) -> None:
        self._dir = run_dir
        self.uri = uri
        self.bytes_per_second: float | None = None
        self._fence = fence
        self._complete: dict[str, CheckpointMetadata] = {}  # checkpoints known to be complete there
        self._sent: dict[str, tuple[int, int]] = {}  # file -> (size, time of change) as it was sent

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def find_lacking(self) -> dict[str, CheckpointMetadata]:
        """Look at what the mirror has; returns the complete local checkpoints it lacks or has differently."""
        # what cannot be read is not complete: it will be overwritten
        self._complete |= remote_sidecars(self.uri, log=lambda _: None)[0]
        return {
            name: metadata
            for name, metadata in sidecars(self._dir).items()
            if not self._has(name, metadata) and storage.sha256(data_path(self._dir, name)) == metadata.sha256
        }

    def send_checkpoint(self, name: str, data: Path, metadata: CheckpointMetadata) -> None:
        """Make the mirror hold a checkpoint under ``name``.

        Args:
            name: what it is called there.
            data: a file with the data ``metadata`` belongs to.
            metadata: with its sha256.

        Raises:
            LeaseLost: another has taken the mirror over; what it has stays as it is.
        """
        if self._has(name, metadata):
            return
        pieces = piece_files(self._dir, metadata)
        if metadata.format_version == IN_PIECES and not pieces:
            return  # forgotten before its turn, or another of its step has its name by now
        self._fence()
        twin = next((other for other, known in self._complete.items() if known.sha256 == metadata.sha256), None)
        self._complete.pop(name, None)
        storage.remove(self._of(name, SIDECAR_SUFFIX))
        for piece, path in pieces.items():
            there = storage.stat(storage.join(self.uri, piece))
            with translate_errors(path):
                size = path.stat().st_size
            if there is None or there.size != size:  # they never change
                storage.upload(path, storage.join(self.uri, piece))
        if twin is None:
            began = time.monotonic()
            storage.upload(data, self._of(name, DATA_SUFFIX))
            self.bytes_per_second = data.stat().st_size / max(time.monotonic() - began, 1e-3)
        else:
            known = self._complete.pop(twin)  # should it be gone, the next attempt sends the data
            storage.copy(self._of(twin, DATA_SUFFIX), self._of(name, DATA_SUFFIX))
            self._complete[twin] = known
        self._publish_sidecar(self._of(name, SIDECAR_SUFFIX), sidecar_text(metadata))
        self._complete[name] = metadata

    def _publish_sidecar(self, uri: str, text: bytes) -> None:
        """What makes a checkpoint count; taken back should another have taken over between the look and the write."""
        self._fence()
        storage.write_bytes(uri, text)
        try:
            self._fence()
        except LeaseLost:
            if storage.read_bytes(uri) == text:
                storage.remove(uri)
            raise

    def forget_dropped(self) -> None:
        """Remove what the run directory no longer has: snapshots, and any checkpoint of a later step than its newest.

        Such later ones are of a history that ``--restart`` ended. To be called after a checkpoint was sent.
        """
        local = sidecars(self._dir)
        newest = max((metadata.step for metadata in local.values()), default=-1)
        for name, metadata in list(self._complete.items()):
            if name not in local and local and (is_snapshot(name) or metadata.step > newest):
                self._fence()
                del self._complete[name]
                storage.remove(self._of(name, SIDECAR_SUFFIX))
                storage.remove(self._of(name, DATA_SUFFIX))
        if any(metadata.format_version == IN_PIECES for metadata in self._complete.values()):
            for name in find_unused([one.name for one in storage.list_files(self.uri)], self._complete.values()):
                self._fence()
                storage.remove(storage.join(self.uri, name))

    def _has(self, name: str, metadata: CheckpointMetadata) -> bool:
        return name in self._complete and self._complete[name].sha256 == metadata.sha256

    def _of(self, name: str, suffix: str) -> str:
        return storage.join(self.uri, name + suffix)

    # ------------------------------------------------------------------------------------------------------------ files

    def changed_files(self, names: Iterable[str]) -> list[str]:
        """Files among ``names`` (folders are walked) that differ from what was sent, relative to the run directory."""
        return [name for name, state in self._files(names) if self._sent.get(name) != state]

    def send_file(self, name: str) -> None:
        """Send a file as it is now; one that grows meanwhile is sent up to where it was."""
        path = self._dir / name
        with translate_errors(path):
            status = path.stat()
            small = path.read_bytes() if status.st_size <= _SMALL_BYTES else None
        target = storage.join(self.uri, name)
        self._fence()
        if small is not None:
            storage.write_bytes(target, small)
        else:
            storage.upload(path, target)
        self._sent[name] = (status.st_size, status.st_mtime_ns)

    def _files(self, names: Iterable[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        for name in names:
            top = self._dir / name
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                with contextlib.suppress(FileNotFoundError):  # not there yet, or taken away meanwhile
                    status = path.stat()
                    if path.is_file() and not path.name.endswith(storage.TEMPORARY_SUFFIX):
                        yield path.relative_to(self._dir).as_posix(), (status.st_size, status.st_mtime_ns)

    # ----------------------------------------------------------------------------------------------------- verification

    def missing(self, names: Iterable[str]) -> list[str]:
        """Checkpoints and files of the run directory that the mirror lacks, or has in another size or version."""
        sizes = {info.name: info.size for info in storage.list_files(self.uri)}
        lacking = []
        for name, metadata in sidecars(self._dir).items():
            size = data_path(self._dir, name).stat().st_size
            there = sizes.get(name + DATA_SUFFIX) == size and name + SIDECAR_SUFFIX in sizes
            pieces = piece_files(self._dir, metadata).items()
            there = there and all(sizes.get(piece) == path.stat().st_size for piece, path in pieces)
            if not there or not self._has(name, metadata):
                lacking.append(name + DATA_SUFFIX)
        for name, (size, _) in self._files(names):
            if sizes.get(name) != size:
                lacking.append(name)
        return lacking
