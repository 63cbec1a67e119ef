"""``datasets.yaml``, and the markers that a preparation leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_bytes as mutate
from tests.fuzz.driver import attempt

from liquid_llm.jobs.doctor import examine
from liquid_llm.preparation.catalog import STATE_FOLDER, read_catalog

__all__ = ["check", "mutate", "seeds"]

_CATALOG = """\
gsm8k:
  type: math_tool
  in: [raw/*.jsonl, gs://b/x.parquet]
  out: prepared/gsm8k
  manifest: manifest.jsonl
  weight: 0.5
  format: gsm8k
  field: text
  members: "*train*"
  shard_bytes: 1000
"""


def seeds() -> Iterator[bytes]:
    yield _CATALOG.encode()
    yield b"a: {type: lm, in: x, out: y/n-*.jsonl.gz}\nb: {type: code, in: x, out: y}\n"
    yield b'{"shards": [{"name": "a.jsonl", "bytes": 3, "records": 1}], "type": "lm"}'


def check(data: bytes, folder: Path) -> None:
    path = folder / "datasets.yaml"
    path.write_bytes(data)
    found = attempt(lambda: read_catalog(str(path)))
    for dataset in found.datasets.values() if found else ():
        assert dataset.is_shard_name(dataset.shard_name(0, 0))
    marker = folder / STATE_FOLDER / "x" / "complete.json"
    marker.parent.mkdir(parents=True)
    marker.write_bytes(data)
    examine(str(folder))
