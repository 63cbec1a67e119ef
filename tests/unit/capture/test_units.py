"""Which units there are and whose each is, at sizes that nobody holds in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm import storage
from liquid_llm.capture.units import Unit, claim, fingerprint, list_units
from liquid_llm.data.manifest import shard_name
from liquid_llm.data.types import ManifestEntry
from liquid_llm.storage import FileInfo

MANIFEST = "gs://bucket/data/manifest.jsonl"


def entry(path: str, type: str = "lm") -> ManifestEntry:
    return ManifestEntry(path, type, 1.0, "manifest.jsonl:1")


def files(count: int) -> list[ManifestEntry]:
    return [entry(f"gs://bucket/data/part-{number}.jsonl") for number in range(count)]


@given(count=st.integers(0, 60), tasks=st.integers(1, 70))
def test_each_unit_is_one_tasks_and_all_tasks_have_about_as_many(count: int, tasks: int) -> None:
    units = list(list_units(files(count), MANIFEST))
    shares = [claim(units, (index, tasks)) for index in range(tasks)]
    assert sorted(unit.number for mine, _ in shares for unit in mine) == list(range(count))
    assert {total for _, total in shares} == {count}
    assert max(len(mine) for mine, _ in shares) - min(len(mine) for mine, _ in shares) <= 1


def test_lines_that_name_files_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "glob", lambda uri: pytest.fail("nobody has to ask"))
    assert len(list(list_units(files(3), MANIFEST))) == 3


def test_patterns_give_their_files_and_a_line_that_comes_twice_counts_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    twice = [entry(f"{tmp_path}/*.jsonl"), entry("gs://other/c.jsonl", "code"), entry(f"{tmp_path}/*.jsonl")]
    found = list(list_units(twice, f"{tmp_path}/manifest.jsonl"))
    assert [(unit.number, unit.type, Path(unit.file).name) for unit in found] == [
        (0, "lm", "a.jsonl"),
        (1, "lm", "b.jsonl"),
        (2, "code", "c.jsonl"),
    ]


def test_a_task_holds_its_own_units_alone() -> None:
    def simulated(count: int) -> Iterator[Unit]:
        """The units of 20,000 samples each, of a corpus of 100 million samples where there are 5,000."""
        for number in range(count):
            yield Unit(number, "lm", f"gs://bucket/part-{number}.jsonl", f"part-{number}.jsonl-{number:012x}")

    def held(count: int) -> int:
        tracemalloc.start()
        mine, total = claim(simulated(count), (3, count // 5))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (len(mine), total) == (5, count)
        return peak

    assert held(5_000) < 2 * held(500) < 100_000


def test_a_units_name_moves_with_its_manifest_and_differs_by_place() -> None:
    here = shard_name("gs://bucket/data/math/part 1.jsonl", MANIFEST)
    assert here == shard_name("s3://copy/of/it/math/part 1.jsonl", "s3://copy/of/it/manifest.jsonl")
    assert here == shard_name("/tmp/it/./math/part 1.jsonl", "file:///tmp/it/manifest.jsonl")
    assert here.startswith("part_1.jsonl-")
    others = [
        "gs://bucket/data/code/part 1.jsonl",
        "gs://bucket/math/part 1.jsonl",
        "gs://bucket/data/math/part_1.jsonl",
    ]
    assert len({here, *(shard_name(other, MANIFEST) for other in others)}) == 4
    for odd in ("gs://b/.hidden", "gs://b/..", "gs://b/a/../../x\n", "gs://b/" + "n" * 400, "gs://b/\N{SNOWMAN}"):
        name = shard_name(odd, MANIFEST)
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name.encode()) < 120


def test_what_a_unit_is_made_of() -> None:
    one = FileInfo("gs://bucket/a.jsonl", "a.jsonl", 10, "v1")
    assert fingerprint(one, ["x", 1]) == fingerprint(FileInfo("gs://moved/a.jsonl", "a.jsonl", 10, "v1"), ["x", 1])
    known = fingerprint(one, ["x", 1])
    assert known != fingerprint(FileInfo(one.uri, one.name, 11, "v1"), ["x", 1])
    assert known != fingerprint(FileInfo(one.uri, one.name, 10, "v2"), ["x", 1])
    assert known != fingerprint(one, ["x", 2])
