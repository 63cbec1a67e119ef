"""Ending a process at a chosen file-system call, as a kill at that moment would."""

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
