"""What leaves the machine while a run goes on: the run directory to its mirror, parts of it elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

from liquid_llm.checkpoint.mirror import Mirror
from liquid_llm.checkpoint.upload import WATCHED, Uploader
from liquid_llm.wiring.places import Place

log = logging.getLogger(__name__)

_EVERYTHING = (".",)


class Mirrors:
    """The uploaders of a run; a context manager that treats them as one, as ``Uploader`` does itself.

    Attributes:
        checkpoints: of the run directory; checkpoints are given to it.
    """

    def __init__(self, place: Place, every_seconds: float) -> None:
        self._place = place
        self.checkpoints = Uploader(place.run_dir, place.remote, every_seconds=every_seconds)
        self._events = Uploader(
            place.run_dir / "tb", place.tensorboard, every_seconds=every_seconds, watched=_EVERYTHING
        )

    def close(self) -> None:
        """Send what is left. Raises StorageError where something is not there in the end."""
        self._events.close()
        self.checkpoints.close()

    def finish(self) -> None:
        """``close``, with the finished student sent where it is wanted too."""
        with Uploader(self._place.run_dir / "student", self._place.model, watched=_EVERYTHING):
            self.close()

    def __enter__(self) -> Mirrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._events.__exit__(kind, error, traceback)
        self.checkpoints.__exit__(kind, error, traceback)


def send_what_is_lacking(place: Place) -> None:
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
            with Uploader(folder, uri, watched=watched):
                pass
