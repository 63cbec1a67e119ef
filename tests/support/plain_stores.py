"""Stores that cannot make a file only where there is none."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Overwriting(MemoryFileSystem):
    """A store that takes ``mode`` for a parameter of a request, and writes over what is there."""

    protocol = "overwriting"

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        super().pipe_file(path, value)


class Refusing(MemoryFileSystem):
    """A store that says that it knows no such mode."""

    protocol = "refusing"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode != "overwrite":
            raise NotImplementedError
        super().pipe_file(path, value)


def register(kind: type[MemoryFileSystem]) -> str:
    """Have URLs of its scheme go there; the scheme."""
    scheme = str(kind.protocol)
    fsspec.register_implementation(scheme, kind, clobber=True)
    return scheme
