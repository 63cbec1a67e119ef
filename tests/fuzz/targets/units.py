"""Stores of units: their markers and plan. The bytes say which is changed and how; records are for ``store``.

A marker says what is there; whatever it says, a record is read by itself, and what is right is not lost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from tests.fuzz.bytes_to_choices import Choices, edit_files, write_files
from tests.support.stores import put, writer
from tests.support.teachers import make_samples

from liquid_llm.jobs.doctor import examine
from liquid_llm.signal_store.store import open_store
from liquid_llm.signal_store.units import find_damaged, read_marker, read_plan, why_to_do, write_marker, write_plan
from liquid_llm.storage import FileInfo

UNITS = ("part-0.jsonl-1a", "part-1.jsonl-2b")
SOURCE = FileInfo("data/part.jsonl", "part.jsonl", 100, "v1")
SAMPLES = {unit: [replace(one, shard=unit) for one in make_samples(2, low=20, high=40, prefix=unit)] for unit in UNITS}


def seeds() -> Iterator[bytes]:
    yield b""
    for kind in range(3):
        yield from (bytes([kind, way, 3, 1, 4, 1, 5, 9]) for way in range(3))


@cache
def _base() -> dict[str, bytes]:
    """The files of a valid store."""
    with tempfile.TemporaryDirectory() as folder:
        for unit in UNITS:
            store = writer(folder, layout="units", unit=unit)
            put(store, SAMPLES[unit])
            store.finish()
            write_marker(folder, unit, "made of this", SOURCE)
        write_plan(folder, len(UNITS))
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def check(data: bytes, folder: Path) -> None:
    choices, files = Choices(data), dict(_base())
    whole = choices.below(8) == 0  # a look at everything takes ten times as long
    names = sorted(name for name in files if name.startswith("done/") or name == "plan.json")
    edit_files(files, names, choices, one_in=3)
    write_files(files, folder)
    uri = str(folder)
    damaged = dict(find_damaged(uri))
    for unit in UNITS:
        marker = read_marker(uri, unit)
        assert (marker is None) <= (unit in damaged)
        assert marker is None or why_to_do(uri, unit, marker.fingerprint) == damaged.get(unit, "")
        assert marker is None or all(count >= 0 for count in [*marker.counts.values(), *marker.files.values()])
    plan = read_plan(uri)
    assert plan is None or plan >= 0
    store = open_store(uri)
    try:
        store.describe()
        assert len(store) >= 0
        for samples in SAMPLES.values() if whole else ():
            assert [store.get(sample, 1024, 2.0).status for sample in samples] == ["usable"] * len(samples)
    finally:
        store.close()
    if whole:
        examine(uri)
