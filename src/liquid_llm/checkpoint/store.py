"""The checkpoints of one run directory: saving, finding, loading, forgetting.

Data is written once, under a snapshot's name; ``last``, ``best`` and ``final`` are hard links to it (copies where the
file system has none) with sidecars of their own. Whatever the moment a process is killed at, at least one complete
checkpoint of the last acknowledged step or later remains:

    save a snapshot       temporary file -> fsync -> rename -> sidecar
    move a name           old sidecar away -> data replaced by rename -> new sidecar; the snapshot is complete meanwhile
    overwrite a snapshot  the old one is first renamed to ``NAME.replaced``, which is complete in its own right
    forget                sidecar first, then data
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from liquid_llm import storage
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    METADATA_KEY,
    MOVING_NAMES,
    REPLACED,
    CheckpointInfo,
    Log,
    damaged_pieces,
    data_path,
    is_snapshot,
    known_names,
    latest_checkpoint,
    newest_first,
    read_checkpoint,
    remote_sidecars,
    remove_checkpoint,
    sidecar_path,
    sidecar_text,
    sidecars,
    step_name,
    time_name,
)
from liquid_llm.checkpoint.files import write_archive
from liquid_llm.checkpoint.mending import lacks_sidecar, mend_sidecar, read_whole, remains
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.pieces import PIECES_PATTERN, drop_unused, fetch_pieces, folder_name
from liquid_llm.errors import StorageError
from liquid_llm.storage import TEMPORARY_SUFFIX, sync, translate_errors

__all__ = ["CheckpointInfo", "CheckpointStore", "fetch_latest"]

# What a run writes beside its checkpoints and goes on with.
ROW_FILES = ("metrics.jsonl", "samples.jsonl", "trackers.json")
# What all sessions of a run add to, whatever becomes of its checkpoints.
GOING_ON = ("log.txt", "provenance/history.json", "provenance/environment.json")
LOCK_FILE = ".lock"
MARK_FILE = ".lease-mark"  # says which lease on the mirror was taken from this directory
_log = logging.getLogger(__name__)


class CheckpointStore:
    """Writes checkpoints into one run directory, which it locks for this process.

    Args:
        run_dir: made where it is missing.
        keep_last: snapshots kept; 0 keeps all.
        log: told, in a sentence, about damaged or unfinished files.

    Raises:
        StorageError: another process holds the directory, or it cannot be written.
    """

    def __init__(self, run_dir: Path, keep_last: int, log: Log = _log.warning) -> None:
        self.run_dir = run_dir
        self._keep_last = keep_last
        self._say = log
        with translate_errors(run_dir, writing=True), ExitStack() as stack:
            stack.enter_context(storage.borrow_folder(run_dir))
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(storage.locked(run_dir / LOCK_FILE, on_wait=self._refuse))
            self._tidy()
            self._held = stack.pop_all()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the directory; of one that holds nothing, nothing is left behind."""
        with self._held, suppress(FileNotFoundError):
            if [path.name for path in self.run_dir.iterdir()] == [LOCK_FILE]:
                (self.run_dir / LOCK_FILE).unlink()

    def save(
        self,
        state: Mapping[str, Any],
        metadata: CheckpointMetadata,
        *,
        kind: Literal["step", "time"] = "step",
        also_as: Sequence[str] = (),
        given_up: Callable[[], bool] = lambda: False,
    ) -> CheckpointInfo:
        """Publish a snapshot, give it the names ``also_as``, and forget snapshots past ``keep_last``.

        When this returns the checkpoint survives a power cut. The tensors must not change before that.

        Args:
            state: tensors and plain values, nested; ``student`` is the model's state dict, ``metadata`` is taken.
            metadata: of this step; its sha256 is filled in here.
            kind: named by its step, or by ``metadata.created``.
            also_as: of ``last``, ``best`` and ``final``.
            given_up: asked while data is written: whether nobody wants this checkpoint any more.

        Raises:
            StorageError: full disk, no permission, given up; what was complete before still is.
            TypeError: ``state`` holds something that is neither a tensor nor a plain value.
        """
        name = step_name(metadata.step) if kind == "step" else time_name(metadata.created)
        inside = replace(metadata.as_read_back(), sha256=None)
        temporary = self.run_dir / f".{name}{TEMPORARY_SUFFIX}"
        target = data_path(self.run_dir, name)
        with translate_errors(target, writing=True):
            try:
                temporary.unlink(missing_ok=True)
                digest = write_archive(temporary, {**state, METADATA_KEY: inside.to_dict()}, given_up)
                sync(temporary)
                complete = replace(inside, sha256=digest)
                if sidecar_path(self.run_dir, name).exists():
                    self._move(name, name + REPLACED)
                self._publish(temporary, name, complete)
                self._forget(name + REPLACED)
            finally:
                temporary.unlink(missing_ok=True)
        info = self.publish_as(CheckpointInfo(target, complete), also_as)
        self._retain(info)
        self._drop_pieces()
        return info

    def open_pieces(self, metadata: CheckpointMetadata) -> AbstractContextManager[Path]:
        """The folder that takes the pieces of a checkpoint (``pieces``) before its ``save``."""
        return storage.publish_folder(self.run_dir / folder_name(metadata), alone=True)

    def publish_as(self, info: CheckpointInfo, names: Sequence[str]) -> CheckpointInfo:
        """Give a complete checkpoint further names (``last``, ``best``, ``final``), taking them from others."""
        for name in names:
            if name not in MOVING_NAMES:
                raise ValueError(f"{name!r} is not one of {MOVING_NAMES}")
            temporary = self.run_dir / f".{name}{TEMPORARY_SUFFIX}"
            with translate_errors(data_path(self.run_dir, name), writing=True):
                try:
                    _link_or_copy(info.path, temporary)
                    sidecar_path(self.run_dir, name).unlink(missing_ok=True)
                    self._publish(temporary, name, info.metadata)
                finally:
                    temporary.unlink(missing_ok=True)  # rename does nothing between two links to one file
        return replace(info, also_as=(*info.also_as, *names))

    def latest(self) -> CheckpointInfo | None:
        """The complete checkpoint with the highest step, its hash verified, or None."""
        return latest_checkpoint(self.run_dir, self._say)

    def load(self, info: CheckpointInfo) -> tuple[dict[str, Any], CheckpointMetadata]:
        """State and metadata of a checkpoint of this store; see ``read_checkpoint``."""
        return read_checkpoint(info.path, info.metadata)

    def set_aside(self) -> Path | None:
        """Move every checkpoint, whole or not, and its rows into a folder of their own (for ``--restart``).

        None when there is none.
        """
        found = self.remains()
        if not found:
            return None
        folder = self.run_dir / datetime.now(timezone.utc).strftime("before-restart-%Y%m%dT%H%M%S%fZ")
        with translate_errors(folder, writing=True):
            folder.mkdir()
            names = [one.removesuffix(DATA_SUFFIX) for one in found]
            parts = [place(self.run_dir, name) for name in names for place in (sidecar_path, data_path)]
            for path in [*parts, *(self.run_dir / name for name in ROW_FILES)]:
                if path.exists():
                    os.replace(path, folder / path.name)
            for pieces in self.run_dir.glob(PIECES_PATTERN):
                os.replace(pieces, folder / pieces.name)
        return folder

    def remains(self) -> list[str]:
        """Data files that are here under names of checkpoints, or that a sidecar names, whatever state they are in."""
        return remains(path.name for path in self.run_dir.iterdir())

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _refuse(self, holder: str) -> None:
        raise StorageError(
            f"another run, process {holder}, is using this run directory",
            where=self.run_dir,
            remedy="wait for it to end, stop it, or give another output",
        )

    def _publish(self, temporary: Path, name: str, metadata: CheckpointMetadata) -> None:
        os.replace(temporary, data_path(self.run_dir, name))
        sync(self.run_dir)
        storage.write_bytes(str(sidecar_path(self.run_dir, name)), sidecar_text(metadata))

    def _move(self, old: str, new: str) -> None:
        """Rename a checkpoint: complete under one name or the other at every moment, the rename of the data decides."""
        text = sidecar_path(self.run_dir, old).read_bytes()
        storage.write_bytes(str(sidecar_path(self.run_dir, new)), text)
        if data_path(self.run_dir, old).exists():
            os.replace(data_path(self.run_dir, old), data_path(self.run_dir, new))
        sidecar_path(self.run_dir, old).unlink()

    def _forget(self, name: str) -> None:
        remove_checkpoint(self.run_dir, name)

    def _retain(self, newest: CheckpointInfo) -> None:
        if self._keep_last <= 0:
            return
        # A snapshot of a later step than the one just saved is damaged or of another history: not counted, not touched.
        found = {
            name: metadata
            for name, metadata in sidecars(self.run_dir, self._say).items()
            if is_snapshot(name) and metadata.step <= newest.step and name != newest.name
        }
        with translate_errors(self.run_dir, writing=True):
            for name in newest_first(found)[self._keep_last - 1 :]:
                self._forget(name)

    def _drop_pieces(self) -> None:
        """Remove the pieces of checkpoints that are gone; none while something is there that may lead to them."""
        known = sidecars(self.run_dir, lambda _: None)
        if known.keys() >= {one.removesuffix(DATA_SUFFIX) for one in self.remains()}:
            drop_unused(self.run_dir, known.values())

    def _tidy(self) -> None:
        """Finish or undo what a killed process left half done."""
        for path in self.run_dir.glob(".*" + TEMPORARY_SUFFIX):
            if path.is_dir():  # pieces that were being written
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in known_names(self.run_dir):
            original = name.removesuffix(REPLACED)
            if not data_path(self.run_dir, name).exists():
                if data_path(self.run_dir, original).exists() or data_path(self.run_dir, name + REPLACED).exists():
                    sidecar_path(self.run_dir, name).unlink(missing_ok=True)  # of a name that was being moved
            elif name != original and self._is_complete(original):
                self._forget(name)
            elif name != original:
                self._forget(original)  # data that never got its sidecar
                self._move(name, original)
        for data in self.run_dir.glob("*" + DATA_SUFFIX):
            name = data.name.removesuffix(DATA_SUFFIX)
            original = name.removesuffix(REPLACED)
            if not is_snapshot(original) or not lacks_sidecar(self.run_dir, name):
                continue
            if name == original:
                mend_sidecar(self.run_dir, name, self._say)
            elif self._is_complete(original):
                data.unlink()  # the rest of what a snapshot of its name has replaced
        self._drop_pieces()

    def _is_complete(self, name: str) -> bool:
        metadata = sidecars(self.run_dir, self._say).get(name)
        return metadata is not None and storage.sha256(data_path(self.run_dir, name)) == metadata.sha256


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
            raise
        shutil.copyfile(source, target)
        sync(target)


def fetch_latest(
    remote_uri: str, run_dir: Path, *, newer_than: int = -1, log: Log = _log.warning
) -> CheckpointInfo | None:
    """Bring the newest complete checkpoint of a mirror, and its metrics, into the run directory.

    Args:
        remote_uri: what the run directory is mirrored to.
        run_dir: local; a checkpoint of the same name there is replaced.
        newer_than: only a checkpoint past this step is fetched.
        log: told about a damaged one that was skipped.

    Returns:
        The checkpoint, or None where the mirror has no complete one past ``newer_than``.

    Raises:
        StorageError: the mirror cannot be read or the disk is full.
    """
    known, present = remote_sidecars(remote_uri, log)
    found = {name: metadata for name, metadata in known.items() if metadata.step > newer_than}
    fetched = run_dir / f".fetched{TEMPORARY_SUFFIX}"
    try:
        for name in newest_first(found):
            storage.download(storage.join(remote_uri, name + DATA_SUFFIX), fetched)
            if storage.sha256(fetched) != found[name].sha256:
                log(f"skipped a checkpoint: {remote_uri}/{name}{DATA_SUFFIX} does not have the sha256 its sidecar says")
                continue
            fetch_pieces(remote_uri, found[name], run_dir)
            damage = damaged_pieces(fetched, found[name])
            if damage is None:
                return _take_fetched(remote_uri, run_dir, name, found[name], fetched, present)
            log(f"skipped a checkpoint: {remote_uri}/{name}{DATA_SUFFIX}: {damage}")
        if known or newer_than >= 0:
            return None
        # The machine went away between the two uploads, or the sidecar was lost.
        bare = [one.removesuffix(DATA_SUFFIX) for one in present if one.endswith(DATA_SUFFIX)]
        for name in sorted(filter(is_snapshot, bare), reverse=True):
            storage.download(storage.join(remote_uri, name + DATA_SUFFIX), fetched)
            metadata = read_whole(fetched)
            if metadata is not None:
                log(f"{remote_uri}/{name}{DATA_SUFFIX} is whole, and has no sidecar that can be read: it is used")
                return _take_fetched(remote_uri, run_dir, name, metadata, fetched, present)
    finally:
        fetched.unlink(missing_ok=True)
    return None


def _take_fetched(
    remote_uri: str, run_dir: Path, name: str, metadata: CheckpointMetadata, fetched: Path, present: Collection[str]
) -> CheckpointInfo:
    """Put what was fetched, and the rows before it, into the run directory."""
    for file in set(present).intersection((*ROW_FILES, *GOING_ON)):
        storage.download(storage.join(remote_uri, file), run_dir / file)
    target = data_path(run_dir, name)
    with translate_errors(target, writing=True):
        sidecar_path(run_dir, name).unlink(missing_ok=True)
        os.replace(fetched, target)
    storage.write_bytes(str(sidecar_path(run_dir, name)), sidecar_text(metadata))
    return CheckpointInfo(target, metadata)
