"""Every error a user can cause, and the exit code each one ends the process with.

    LiquidError
    ├── UsageError        2   options or configuration that cannot work
    │   └── ModelError    2   a model or tokenizer that is missing, foreign or unsupported
    ├── DataError         3   manifest, shards, records, dataset
    │   └── SignalError   3   a teacher-signal record or store
    ├── StorageError      4   a place that cannot be read or written, a disk that is full
    │   └── CheckpointError 4 a checkpoint that is missing, truncated or of another architecture
    ├── NumericalError    5   a loss or gradient that is not finite
    ├── DeviceError       6   a device whose memory does not suffice, or that is lost
    │   └── RankError         another process of the run is gone: 6, or the exit code it has ended with
    └── Interrupted      75   stopped by a signal with the state saved: run again to go on

An error is one message: where it happened, what is wrong, what was got, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any

LAST_WORDS_SECONDS = 2.0  # how long a process waits with its end for the one of its run that says why


class LiquidError(Exception):
    """Base of all errors shown to a user without a traceback.

    Attributes:
        speaks: whether this process says it, where several of one run end with it; None while that is not settled.

    Args:
        problem: what is wrong, as a short clause without a full stop.
        where: the file and line, option, URI or record concerned.
        got: the offending value.
        expected: what would have been accepted.
        remedy: what the user can do, as an imperative clause.
    """

    exit_code = 1
    speaks: bool | None = None

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.where = where
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where is not None else self.problem
        if self.got is not None:
            text += f"; got {self.got}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        text += "."
        if self.remedy:
            text += f" {self.remedy[0].upper()}{self.remedy[1:]}" + ("" if self.remedy[-1] in ".?" else ".")
        return text


class UsageError(LiquidError):
    """Options or configuration that cannot work."""

    exit_code = 2


class ModelError(UsageError):
    """A model or tokenizer that is missing, foreign or unsupported."""


class DataError(LiquidError):
    """A manifest, shard, record or dataset that cannot be used."""

    exit_code = 3


class SignalError(DataError):
    """A teacher-signal record or store that cannot be used."""


class StorageError(LiquidError):
    """A place that cannot be read or written, or a disk that is full."""

    exit_code = 4


class CheckpointError(StorageError):
    """A checkpoint that is missing, truncated, or of another architecture or format."""


class NumericalError(LiquidError):
    """A loss or gradient that is not finite."""

    exit_code = 5


class DeviceError(LiquidError):
    """A device (GPU, or the machine's own memory) that cannot hold what is asked, or that failed."""

    exit_code = 6


class RankError(DeviceError):
    """Another process of the same run has failed, or cannot be reached.

    Args:
        exit_code: what it ended with, where that is known; this one ends with the same.
        speaks: as the attribute.
    """

    def __init__(self, problem: str, *, exit_code: int | None = None, speaks: bool | None = None, **words: Any) -> None:
        super().__init__(problem, **words)
        if exit_code is not None:
            self.exit_code = exit_code
        self.speaks = speaks


class Interrupted(LiquidError):
    """Stopped by a signal after the state was saved; running again goes on."""

    exit_code = 75


def first_line(value: object, limit: int = 200) -> str:
    """The first line of a text or of an exception's message, without its full stop, cut to ``limit`` characters.

    An exception without a message gives its class.
    """
    line = str(value).strip().partition("\n")[0].rstrip(". ") or (
        type(value).__name__ if isinstance(value, BaseException) else ""
    )
    return line if len(line) <= limit else line[: limit - 3] + "..."
