"""Ending a process at a chosen file-system call, as a kill at that moment would, or at a chosen batch of a capture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


def die_before_call(number: int, calls: Sequence[str], die: Callable[[], object]) -> None:
    """Have ``die`` called right before the ``number``-th call, from now on, of the functions ``calls`` of ``os``."""
    done = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                die()
            return call(*args, **kwargs)

        return wrapper

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))


def at_batch(number: int, act: Callable[[], object]) -> None:
    """Have ``act`` called right before the ``number``-th batch of a capture, from now on, is scored."""
    from liquid_llm.capture import scoring  # and with it torch, which the others do not need

    score, done = scoring.score, 0

    def counted(*given: Any) -> Any:
        nonlocal done
        done += 1
        if done == number:
            act()
        return score(*given)

    scoring.score = counted
