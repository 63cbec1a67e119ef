"""Files of records in every packing, read by training and by preparation; the first byte says which."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard
from tests.fuzz.bytes_to_choices import mutate_bytes, mutate_json
from tests.fuzz.driver import attempt
from tests.support.raw_inputs import RAW, as_parquet

from liquid_llm.data.records import read_records
from liquid_llm.preparation.formats import Reading, documents

NAMES = ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.zip", "a.xml", "a.txt", "a.bz2", "a")
_ROWS = [
    {"text": "one", "type": "lm", "sample_id": "1"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]


def seeds() -> Iterator[bytes]:
    lines = "\n".join(map(json.dumps, _ROWS)).encode()
    yield bytes([0]) + lines
    yield bytes([2]) + gzip.compress(lines, mtime=0)
    yield bytes([3]) + zstandard.compress(lines)
    yield bytes([4]) + as_parquet([_ROWS[0], {"text": "two", "type": "lm", "sample_id": "2"}])
    for raw in RAW.values():
        ending = raw.name.rpartition(".")[2]
        yield bytes([next((at for at, name in enumerate(NAMES) if name.endswith(ending)), 9)]) + raw.data


def mutate(data: bytes, number: int) -> bytes:
    """Lines are changed inside their packing."""
    draw = random.Random(number)
    kind, rest = (data[0] if data else 0) % len(NAMES), data[1:]
    try:
        if kind == 2:
            rest = gzip.compress(mutate_json(gzip.decompress(rest), number), mtime=0)
        elif kind == 3:
            packed = zstandard.ZstdDecompressor().decompress(rest, max_output_size=2**20)
            rest = zstandard.compress(mutate_json(packed, number))
        else:
            rest = (mutate_bytes if kind > 3 else mutate_json)(rest, number)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, zstandard.ZstdError):
        rest = mutate_bytes(rest, number)
    return bytes([draw.randrange(len(NAMES)) if draw.random() < 0.05 else kind]) + rest


def check(data: bytes, folder: Path) -> None:
    name = NAMES[(data[0] if data else 0) % len(NAMES)]
    path = folder / name
    path.write_bytes(data[1:])
    for record in attempt(lambda: list(read_records(str(path), "lm"))) or []:
        record.sample_id.encode()
    for found in documents(str(path), Reading("lm"), lambda size: None):
        str(found).encode("utf-8", "surrogatepass")
