"""A form of row arithmetic that cannot be compiled in a process is given up there, which is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

given_up: set[str] = set()
"""Forms, as ``choice`` names them."""

_COMPILERS = frozenset({"triton.compiler", "triton.runtime", "torch._dynamo", "torch._inductor"})


def or_else(form: str, work: Callable[[], T], instead: Callable[[], T]) -> T:
    """What ``work`` gives; where its compiler fails, what ``instead`` gives, now and for the rest of the process.

    ``work`` compiles all that it needs before it overwrites anything, so what is overwritten is still what it was. Any
    other error is raised: memory that runs out is an answer to whoever cuts the pass in two.
    """
    if form not in given_up:
        try:
            return work()
        except Exception as error:
            if not is_compilers(error):
                raise
            given_up.add(form)
            log.warning(
                "the loss goes on with torch's own operations, which are slower: its %s form cannot be compiled here: "
                "%s: %s",
                form,
                type(error).__name__,
                " ".join(str(error).split("\n")[:2]),
            )
    return instead()


def is_compilers(error: Exception) -> bool:
    """Whether a compiler has raised it: Triton's, or torch's, of whose errors not all are RuntimeErrors."""
    return bool(_COMPILERS & {".".join(one.__module__.split(".")[:2]) for one in type(error).__mro__})
