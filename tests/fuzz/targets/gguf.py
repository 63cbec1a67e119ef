"""A teacher in a GGUF file: a damaged one is refused in words, or is a model. The bytes say how a valid one is changed.

The header (names, types, lengths) is three quarters of what can go wrong and a fraction of the file: half of all
changes are in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from tests.fuzz.bytes_to_choices import Choices, edit_bytes
from tests.fuzz.driver import attempt
from tests.support.gguf_files import write_gguf
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.models.loading import load_teacher

_HEADER_BYTES = 4096


def seeds() -> Iterator[bytes]:
    yield b""
    yield bytes([1, 4, 200, 0, 3, 5, 1])
    yield bytes([0, 0, 0, 1, 2])


@cache
def _whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "a.gguf", tiny_model("llama"), tiny_tokenizer()).read_bytes()


def check(data: bytes, folder: Path) -> None:
    choices, content = Choices(data), _whole()
    while choices:
        if choices.below(2):
            content = edit_bytes(content[:_HEADER_BYTES], choices) + content[_HEADER_BYTES:]
        else:
            content = edit_bytes(content, choices)
    path = folder / "a.gguf"
    path.write_bytes(content)
    loaded = attempt(lambda: load_teacher(str(path), dtype=torch.float32, device="cpu"))
    if loaded is not None:
        assert loaded.vocab_size >= len(loaded.tokenizer)
