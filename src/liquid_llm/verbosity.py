"""How much a command says on standard error, as its words ask: ``--quiet`` or ``--log_level`` (leaf).

The words are read before anything heavy is imported, and heeded where log lines and progress are set up: in between it
is kept here, for the command that runs now alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LEVELS = ("debug", "info", "warning", "error")
QUIET = "error"
CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers of what is imported wherever it is installed, and then tells of kernels that it was built without and of what
it is going to change: of use to nobody here. torch writes to standard error itself, past every handler of ours."""

_ASKED: ContextVar[str | None] = ContextVar("_ASKED", default=None)


@contextmanager
def one_command() -> Iterator[None]:
    """While entered, what is asked for holds; after it nothing is asked for."""
    token = _ASKED.set(None)
    try:
        yield
    finally:
        _ASKED.reset(token)


def ask(level: str) -> None:
    """Let the present command speak from ``level`` on, one of ``LEVELS``."""
    _ASKED.set(level)


def asked_level() -> str | None:
    """What was asked for, as ``logging`` spells it (``INFO``); None where nothing was."""
    level = _ASKED.get()
    return None if level is None else level.upper()
