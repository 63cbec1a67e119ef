"""What leaves the machine while a run goes on: the run directory to its mirror, parts of it elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from liquid_llm.checkpoint.mirror import Mirror
from liquid_llm.checkpoint.upload import WATCHED, Uploader
from liquid_llm.errors import StorageError
from liquid_llm.storage.lease import Lease
from liquid_llm.wiring.places import Place

log = logging.getLogger(__name__)

SENDING_SECONDS = 20.0  # of the 30 that spot machines leave a process between SIGTERM and the end
_FAILED_SECONDS = 20.0
_EVERYTHING = (".",)


class Mirrors:
    """The uploaders of a run; a context manager that treats them as one, as ``Uploader`` does itself.

    Args:
        lease: the right to write to the place of the run, and with it to the others.
        until: when so many seconds have passed since the run was asked to stop, on the monotonic clock.

    Attributes:
        checkpoints: of the run directory; checkpoints are given to it.
    """

    def __init__(
        self,
        place: Place,
        every_seconds: float,
        until: Callable[[float], float] = lambda seconds: math.inf,
        lease: Lease | None = None,
    ) -> None:
        self._place = place
        self._until = until
        self._lease = lease
        self.checkpoints = Uploader(place.run_dir, place.remote, every_seconds=every_seconds, lease=lease)
        self._events = Uploader(
            place.run_dir / "tb", place.tensorboard, every_seconds=every_seconds, watched=_EVERYTHING, lease=lease
        )

    def close(self) -> None:
        """Send what is left. Raises StorageError where something is not there in the end."""
        try:
            self.checkpoints.close(until=self._stop_at)
        finally:
            self._events.close(until=self._stop_at)

    def finish(self) -> None:
        """``close``, with the finished student sent where it is wanted too."""
        student = Uploader(self._place.run_dir / "student", self._place.model, watched=_EVERYTHING, lease=self._lease)
        try:
            self.close()
        finally:
            student.close(until=self._stop_at)

    def _stop_at(self) -> float:
        return self._until(SENDING_SECONDS)

    def __enter__(self) -> Mirrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The run failed: a moment for what it saved, none for a second Ctrl-C.
        end = time.monotonic() + (_FAILED_SECONDS if isinstance(error, Exception) else 0.0)
        for one in (self.checkpoints, self._events):
            try:
                one.close(until=lambda: min(end, self._stop_at()))
            except StorageError as unsent:
                log.warning("%s", unsent)


def send_what_is_lacking(place: Place, lease: Lease | None = None) -> None:
    """Bring the mirrors of a finished run up to date: the process that finished it may have been killed just then.

    Raises:
        StorageError: a mirror cannot be read, or lacks something in the end.
    """
    places: tuple[tuple[Path, str | None, tuple[str, ...]], ...] = (
        (place.run_dir, place.remote, WATCHED),
        (place.run_dir / "tb", place.tensorboard, _EVERYTHING),
        (place.run_dir / "student", place.model, _EVERYTHING),
    )
    for folder, uri, watched in places:
        if uri is None or not folder.is_dir():
            continue
        mirror = Mirror(folder, uri)
        mirror.find_lacking()
        lacking = mirror.missing(watched)
        if lacking:
            log.info("%s lacks %d files of this finished run: they are sent now", uri, len(lacking))
            with Uploader(folder, uri, watched=watched, lease=lease):
                pass
