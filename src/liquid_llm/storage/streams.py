"""Bytes of a file as they come: unpacked, and cut into lines, never a whole file at a time.

chunk: bytes as they come; where a line begins and ends never depends on where one chunk ends and the next begins.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from liquid_llm.errors import UsageError

CHUNK_BYTES = 1 << 18
_ZST_PIECE_BYTES = 1 << 11  # four bytes of it can stand for 128 KiB, and what a piece stands for comes all at once


class DamageError(ValueError):
    """The bytes are not what their format asks for, and nothing after this place can be read."""


def unpack(stream: BinaryIO, packing: str | None) -> Iterator[bytes]:
    """The chunks of a stream packed as ``gz``, ``bz2`` or ``zst``, or not packed (None).

    Raises:
        DamageError: while iterating: truncated or damaged.
        UsageError: the package that a packing needs is not installed.
    """
    if packing == "zst":
        yield from _frames(stream)
        return
    source: Any = stream
    if packing is not None:
        source = gzip.GzipFile(fileobj=stream) if packing == "gz" else bz2.BZ2File(stream)
    try:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamageError(f"truncated or damaged ({error})") from error
    except OSError as error:
        if packing != "bz2" or error.errno is not None:  # bz2 has no error class of its own
            raise
        raise DamageError(f"truncated or damaged ({error})") from error


def _frames(stream: BinaryIO) -> Iterator[bytes]:
    """Zstandard frames one after another. The library's own stream reader takes a cut-off file for a complete one."""
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            "a .zst file needs the package zstandard, which is not installed",
            where=getattr(stream, "name", None),
            remedy="install it with pip install zstandard, or unpack the file",
        ) from error
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while chunk := stream.read(CHUNK_BYTES):
            for start in range(0, len(chunk), _ZST_PIECE_BYTES):
                piece = chunk[start : start + _ZST_PIECE_BYTES]
                while piece:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(piece)
                    piece = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DamageError(f"truncated or damaged ({error})") from error
    if frame is not None:
        raise DamageError("truncated or damaged (compressed file ended before the end of its last frame)")


def lines(chunks: Iterable[bytes], limit: float = float("inf")) -> Iterator[bytes | None]:
    """Lines without their newline, None for one over ``limit`` bytes; text may hold Unicode's other separators."""
    begun: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            yield b"".join([*begun, piece]) if size + len(piece) <= limit else None
            begun, size = [], 0
        size += len(rest)
        begun.append(rest)
        if size > limit:
            begun = []
    if size:
        yield b"".join(begun) if size <= limit else None
