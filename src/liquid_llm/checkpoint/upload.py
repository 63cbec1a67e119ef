"""Mirroring a run directory to a URL while the run goes on, from one background thread.

    staged   a hard link to a checkpoint's data, so that what is being sent cannot be replaced or forgotten meanwhile
    watched  a small file that grows or changes (metrics, TensorBoard events, provenance): sent when it did

Of several waiting versions of one name only the newest is sent, and a snapshot that was forgotten before its turn is
not: a slow line lags behind, it does not pile up. All a training step calls is ``enqueue_checkpoint``, which makes a
link.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from liquid_llm.checkpoint.background import ASSUMED_BYTES_PER_SECOND
from liquid_llm.checkpoint.discovery import (
    DATA_SUFFIX,
    CheckpointInfo,
    Log,
    data_path,
    is_snapshot,
    sidecar_path,
)
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.mirror import Mirror
from liquid_llm.errors import StorageError
from liquid_llm.storage.lease import Lease, LeaseLost

_log = logging.getLogger(__name__)
WATCHED = (
    "metrics.jsonl",
    "samples.jsonl",
    "trackers.json",
    "log.txt",
    "tb",
    "provenance",
    "summary.json",
    "report.html",
    "student",
)
_STAGE = ".upload"
_LISTING = "the list of what is there"


@dataclass(frozen=True)
class _Job:
    """Something to be sent. ``data`` is the file it needs, staged where links are possible; None for a watched file."""

    action: Callable[[], None]
    data: Path | None = None


class Uploader:
    """Keeps a mirror of a run directory up to date; does nothing without a remote.

    At the start, complete local checkpoints the mirror lacks are sent: an earlier process may have been killed too
    soon. What fails, after the storage seam's own retries, is logged at once, and tried again every ``retry_seconds``
    and at the end.

    Args:
        every_seconds: how often watched files are looked at.
        watched: files and folders of ``run_dir``; an absent one is no trouble.
        retry_seconds: pause before what failed is tried again.
        log: told about each failure.
        lease: the right to write there, where others may want it too; once it is lost nothing more is sent.
    """

    def __init__(
        self,
        run_dir: Path,
        remote_uri: str | None,
        *,
        every_seconds: float = 60.0,
        watched: Iterable[str] = WATCHED,
        retry_seconds: float = 60.0,
        log: Log = _log.warning,
        lease: Lease | None = None,
    ) -> None:
        self._dir = run_dir
        self._lease = lease
        self._watched = tuple(watched)
        self._every = every_seconds
        self._retry_after = retry_seconds
        self._say = log
        self._changed = threading.Condition()
        self._waiting: dict[str, _Job] = {}  # guarded by _changed, as is _closing
        self._closing = False
        self._doing: str | None = None
        self._failed: dict[str, _Job] = {}  # the thread's own
        self._missing: list[str] = []  # the thread's last word
        self._unseen: StorageError | None = None
        self._thread: threading.Thread | None = None
        if remote_uri is not None:
            self._mirror = Mirror(run_dir, remote_uri) if lease is None else Mirror(run_dir, remote_uri, lease.check)
            shutil.rmtree(run_dir / _STAGE, ignore_errors=True)
            self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
            self._thread.start()

    # -------------------------------------------------------------------------------------------------- the run's side

    def enqueue_checkpoint(self, info: CheckpointInfo) -> None:
        """Have a checkpoint sent under all its names. Returns at once."""
        if self._thread is None:
            return
        with self._changed:
            for name in info.names:
                self._waiting.pop(name, None)  # to the end of the queue
                self._waiting[name] = self._checkpoint_job(name, info.metadata)
            self._changed.notify_all()

    def expected_seconds(self, num_bytes: int) -> float:
        """How long a checkpoint of this size is on its way: as the last one was; the first as to the assumed disk."""
        if self._thread is None:
            return 0.0
        return num_bytes / (self._mirror.bytes_per_second or ASSUMED_BYTES_PER_SECOND)

    def check(self) -> None:
        """Raise LeaseLost where another has taken the mirror over, as far as that is known. Returns at once."""
        if self._lease is not None:
            self._lease.require()

    def close(self, deadline_seconds: float = 900.0, until: Callable[[], float] = lambda: math.inf) -> None:
        """Send what is left, try again what failed, compare the mirror with the run directory. Once; then nothing.

        Args:
            deadline_seconds: how long at most.
            until: asked again and again: when to have ended, on the monotonic clock.

        Raises:
            StorageError: something is not there in the end; it lists every such file.
        """
        if self._thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        began = time.monotonic()
        while self._thread.is_alive() and (left := min(began + deadline_seconds, until()) - time.monotonic()) > 0:
            self._thread.join(min(left, 0.2))
        late = self._thread.is_alive()
        self._thread = None
        if not late:
            shutil.rmtree(self._dir / _STAGE, ignore_errors=True)
            if self._unseen is not None:
                raise self._unseen
        missing = self._unsent() if late else self._missing
        if missing:
            waited = f" after {time.monotonic() - began:.0f} s" if late else ""
            raise StorageError(
                f"the mirror lacks {len(missing)} of this run's files{waited}: {', '.join(missing)}",
                where=self._mirror.uri,
                remedy=f"they are kept in {self._dir}; run the same command again to send them",
            )

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(deadline_seconds=20.0)  # the run failed, and spot machines give 30 s: a moment for what it saved
        except StorageError as unsent:
            self._say(str(unsent))

    def _checkpoint_job(self, name: str, metadata: CheckpointMetadata) -> _Job:
        data = self._stage(name, metadata)
        return _Job(lambda: self._send(name, data, metadata), data)

    def _stage(self, name: str, metadata: CheckpointMetadata) -> Path:
        staged = self._dir / _STAGE / f"{metadata.sha256}{DATA_SUFFIX}"
        staged.parent.mkdir(exist_ok=True)
        try:
            os.link(data_path(self._dir, name), staged)
        except FileExistsError:
            pass  # the same data under another name
        except OSError:
            return data_path(self._dir, name)  # no links here: it is read where it lies
        return staged

    def _unsent(self) -> list[str]:
        with self._changed:
            names = [name for name in (self._doing, *self._waiting, *self._failed) if name is not None]
        return [name + DATA_SUFFIX if data_path(self._dir, name).exists() else name for name in dict.fromkeys(names)]

    # ----------------------------------------------------------------------------------------------- the thread's side

    def _run(self) -> None:
        self._attempt(_LISTING, _Job(self._find_lacking))
        retry_at = time.monotonic() + self._retry_after
        closing = False
        while not closing and not self._is_lost():
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(min(self._every, self._retry_after))
                closing = self._closing
            self._send_everything()
            if self._failed and (closing or time.monotonic() >= retry_at):
                for name, job in list(self._failed.items()):
                    self._attempt(name, job)
                self._unstage()
                self._send_everything()
                retry_at = time.monotonic() + self._retry_after
        self._doing = _LISTING
        try:
            self.check()
            self._missing = self._mirror.missing(self._watched)
        except StorageError as error:
            self._unseen = error

    def _is_lost(self) -> bool:
        try:
            self.check()
        except LeaseLost:
            return True
        return False

    def _find_lacking(self) -> None:
        lacking = self._mirror.find_lacking()
        with self._changed:
            for name, metadata in lacking.items():
                if name not in self._waiting:
                    self._waiting[name] = self._checkpoint_job(name, metadata)

    def _send_everything(self) -> None:
        while True:
            # watched files first: a checkpoint in the mirror then never lacks the metrics before it
            self._send_watched()
            with self._changed:
                if not self._waiting or self._is_lost():
                    return
                name = next(iter(self._waiting))
                job = self._waiting.pop(name)
                self._failed.pop(name, None)  # superseded
            self._attempt(name, job)
            self._unstage()

    def _send_watched(self) -> None:
        for name in self._mirror.changed_files(self._watched):
            if name not in self._failed and not self._is_lost():  # what failed waits for its time
                self._attempt(name, _Job(partial(self._mirror.send_file, name)))

    def _send(self, name: str, data: Path, metadata: CheckpointMetadata) -> None:
        if is_snapshot(name) and not sidecar_path(self._dir, name).exists():
            return  # forgotten before its turn
        self._mirror.send_checkpoint(name, data, metadata)
        self._mirror.forget_dropped()

    def _attempt(self, name: str, job: _Job) -> None:
        self._doing = name
        try:
            job.action()
        except LeaseLost:
            self._failed.pop(name, None)  # nothing is tried again; whoever asks, or closes, is told
        except StorageError as error:
            self._failed[name] = job
            self._say(f"not uploaded yet, will be tried again: {error}")
        else:
            self._failed.pop(name, None)
        finally:
            self._doing = None

    def _unstage(self) -> None:
        """Let go of staged data that no job needs any more."""
        with self._changed:
            needed = {job.data for job in (*self._waiting.values(), *self._failed.values())}
            for path in (self._dir / _STAGE).glob("*" + DATA_SUFFIX):
                if path not in needed:
                    path.unlink(missing_ok=True)
