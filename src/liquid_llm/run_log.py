"""``log.txt`` of a run directory: every log line with its moment, of all the processes that have worked on the run.

A line on a terminal is short, and a machine that is taken away takes its terminal along. The file has everything in
full, whatever ``--log_level`` says, and is mirrored with the run. A log that cannot be written stops no run.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from liquid_llm.errors import LiquidError
from liquid_llm.masking import MaskingFilter, process_masker

LOG_FILE = "log.txt"
_HELD = 1000  # lines before it is known where the run is

_log = logging.getLogger(__name__)


class RunLog(logging.Handler):
    """Takes this process's log lines, and writes them to a run directory once there is one; a context manager.

    Lines of this package from INFO on, of everybody else from WARNING on. What ends the work in an error is the last
    of them. Without a file, nothing stays.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self.addFilter(MaskingFilter(process_masker()))
        self._held: list[str] | None = []
        self._path: Path | None = None

    def open(self, run_dir: Path, argv: Sequence[str] | None = None) -> None:
        """Write to ``log.txt`` in ``run_dir`` from now on, what was said before first; behind what is there.

        Args:
            argv: the words of the command; this process's if None.
        """
        words = shlex.join(process_masker().argv(sys.argv if argv is None else argv))
        held, self._held = self._held or [], None
        self._path = run_dir / LOG_FILE
        self._write([f"---- process {os.getpid()} on {platform.node()}: {words}", *held])

    def end(self, error: BaseException | None = None) -> None:
        """Write nothing more, so that the file can be mirrored whole; last what the work has ended with."""
        if error is not None and self._path is not None:
            said = str(error) if isinstance(error, LiquidError) else f"{type(error).__name__}: {error}"
            self.handle(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": said}))
        self._held = self._path = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep or write one line."""
        if self._held is not None:
            self._held = [*self._held[-_HELD:], self.format(record)]
        elif self._path is not None:
            self._write([self.format(record)])

    def _write(self, lines: list[str]) -> None:
        """Append lines; opened for each, so that none waits in a buffer for a process that is killed."""
        path = self._path
        assert path is not None
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            self._path = None
            _log.warning("%s cannot be written (%s): the run goes on without a log", path, error.strerror)

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)
        logging.getLogger().removeHandler(self)
        self.close()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """While entered, what is said is written; then it ends, before whoever sends the file does."""
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        self.end()
