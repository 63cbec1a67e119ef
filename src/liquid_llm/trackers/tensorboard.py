"""TensorBoard: event files in the run directory's ``tb/``."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter

from liquid_llm.storage import translate_errors
from liquid_llm.trackers import numbers

FOLDER = "tb"
_MAX_WAIT_SECONDS = 5.0

_log = logging.getLogger(__name__)


class TensorBoardTracker:
    """Writes every number of a row as a scalar event, samples as text; a continued run as if never interrupted.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._folder = run_dir / FOLDER
        with translate_errors(self._folder, writing=True):
            if resume_step is None:
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                _wait_until_later(self._folder)
            # Readers drop earlier events from the purge step on: those are about to be written again.
            first_step = 0 if resume_step is None else resume_step + 1
            self._hook = threading.excepthook
            threading.excepthook = self._look
            try:
                self._events: Any = SummaryWriter(str(self._folder), purge_step=first_step)
            except OSError:
                for one in threading.enumerate():
                    if isinstance(one, _AsyncWriterThread) and one.exception is not None:
                        one.join()  # it has still to be looked at
                threading.excepthook = self._hook
                raise

    def _look(self, failure: threading.ExceptHookArgs) -> None:
        """Of a thread that failed. What a writer's thread meets is raised by the next call here: it is said once."""
        if not isinstance(failure.thread, _AsyncWriterThread):
            self._hook(failure)

    def log(self, row: Mapping[str, Any]) -> None:
        with translate_errors(self._folder, writing=True):
            for tag, value in numbers(row):
                self._events.add_scalar(tag, value, row["step"])
            self._events.flush()

    def log_sample(self, row: Mapping[str, Any]) -> None:
        with translate_errors(self._folder, writing=True):
            self._events.add_text(f"samples/{row['prompt']:.60}", row["text"], row["step"])
            self._events.flush()

    def close(self) -> None:
        try:
            with translate_errors(self._folder, writing=True):
                self._events.close()
        finally:
            threading.excepthook = self._hook


def _wait_until_later(folder: Path) -> None:
    """Wait for the second after that in which the newest event file was begun.

    Readers take event files in the order of their names, which begin with that second; what follows it within the same
    second is the process id, which orders nothing.
    """
    begun = [name.name.split(".")[3] for name in folder.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in begun if second.isdigit()), default=0)
    ahead = newest + 1 - time.time()
    if ahead > _MAX_WAIT_SECONDS:
        _log.warning("%s: earlier events are dated %.0f s ahead of this clock and will hide new ones", folder, ahead)
    elif ahead > 0:
        time.sleep(ahead)
