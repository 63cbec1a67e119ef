"""Checkpoint files: the bytes decide how a valid one is changed, in its archive or in what it holds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from tests.fuzz.bytes_to_choices import Choices, edit_bytes, edit_value
from tests.fuzz.driver import attempt
from tests.support.checkpoints import metadata_of, state_of

from liquid_llm.checkpoint.discovery import read_checkpoint
from liquid_llm.checkpoint.mending import mend_sidecar
from liquid_llm.checkpoint.resume import read_student_weights
from liquid_llm.jobs.doctor import examine


def seeds() -> Iterator[bytes]:
    yield b""
    yield from (bytes([kind, 1, 2, 3, 4, 5, 6, 7, 8]) for kind in range(4))


@cache
def _content() -> dict[str, object]:
    return {**state_of(7, 4), "metadata": metadata_of(7).to_dict()}


def _saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def check(data: bytes, folder: Path) -> None:
    choices = Choices(data)
    content, of_bytes = _content(), choices.below(2)
    while not of_bytes and choices:
        content = edit_value(content, choices)
    saved = _saved(content)
    while of_bytes and choices:
        saved = edit_bytes(saved, choices)
    path = folder / "last.pt"
    path.write_bytes(saved)
    for look in (
        lambda: read_checkpoint(path),
        lambda: read_student_weights(str(path), folder / "work"),
        lambda: examine(str(path)),
        lambda: mend_sidecar(folder, "last", lambda text: None),
    ):
        attempt(look)
