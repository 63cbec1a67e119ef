"""Output that nobody reads any more: a closed pipe (``| head``), a terminal that is gone (leaf).

A job of days does not end because the window that showed its log was closed. While ``go_on_unread`` is entered, what is
written to a standard stream whose reader is gone is dropped, quietly, and the command goes on to its own end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar, cast

from liquid_llm.errors import StorageError

T = TypeVar("T")

_READER_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a pipe; a terminal; a terminal that was opened again


class _Stream:
    """A standard stream as it is, but for a reader that is gone.

    Args:
        stream: the stream.
        is_log: whether anything else that goes wrong (a log file on a full disk) is no trouble of the job either.
    """

    def __init__(self, stream: TextIO, is_log: bool) -> None:
        self._stream = stream
        self._is_log = is_log

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), len(text))

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except OSError as error:
            if error.errno in _READER_GONE:
                _let_go(self._stream)
            elif not self._is_log:
                raise StorageError(
                    "it could not be written", where="standard output", got=error.strerror, remedy="write it elsewhere"
                ) from error
            return otherwise


def _let_go(stream: TextIO) -> None:
    """Have the stream's descriptor lead nowhere: what is written later, at the end of the process too, is no error."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def go_on_unread() -> Iterator[None]:
    """While entered, standard output and error take what is written to them whether or not somebody reads it.

    Raises:
        StorageError: standard output could not be written for another reason: a full disk.
    """
    before = sys.stdout, sys.stderr
    output, log = (None if one is None else _Stream(one, one is before[1]) for one in before)  # None: closed by >&-
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, log)
    try:
        yield
    finally:
        try:
            for stream in (output, log):
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before
