"""Manifests, and what a preparation makes of one that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_json as mutate
from tests.fuzz.driver import attempt

from liquid_llm.data.manifest import read_manifest
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.preparation.manifest_lines import write_line

__all__ = ["check", "mutate", "seeds"]


def seeds() -> Iterator[bytes]:
    yield b'{"path": "lm/*.jsonl", "type": "lm", "weight": 1.0}\n{"path": "gs://b/c.parquet", "type": "math_tool"}\n'
    yield b'\xef\xbb\xbf{"path": "a", "type": "x", "wieght": 2}'


def check(data: bytes, folder: Path) -> None:
    path = folder / "manifest.jsonl"
    path.write_bytes(data)
    for entry in attempt(lambda: read_manifest(str(path))) or []:
        entry.plain()
    raw, out = str(folder / "raw"), str(folder / "out")
    dataset = Dataset("x", "lm", (raw,), out, "x-", ".jsonl", str(path), 0.5)
    write_line(dataset)
    lines = path.read_bytes()
    assert not write_line(dataset)  # once is enough, whatever else the manifest holds
    assert path.read_bytes() == lines
