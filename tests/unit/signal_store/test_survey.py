"""What ``liquid store stats`` and ``diff`` measure, on small stores made without a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.stores import CODEC, SAMPLES, VOCAB, put, shard_files, write, writer
from tests.support.teachers import random_logits

from liquid_llm.signal_store.compare import compare
from liquid_llm.signal_store.shards.pack import pack
from liquid_llm.signal_store.store import open_store
from liquid_llm.signal_store.survey import survey

POSITIONS = sum(len(sample.input_ids) - 1 for sample in SAMPLES)


def surveyed(folder: Path) -> dict[str, Any]:
    store = open_store(str(folder))
    found = survey(store, samples=200, temperature=2.0, seed=0)
    store.close()
    assert found["bytes"] == size_of(folder)
    parts = sum(found["parts_bytes_per_token"].values()) * found["positions"]
    assert found["bytes"] == pytest.approx(parts + found["unreadable_bytes"])
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_superseded_records_count_until_they_are_packed(tmp_path: Path) -> None:
    """A few of a shard, and then all of it: positions and bytes are of all that lies there."""
    write(tmp_path, SAMPLES)
    plain = surveyed(tmp_path)
    assert (plain["superseded"], plain["positions"]) == (0, POSITIONS)
    for again, count in ((SAMPLES[:4], 4), (SAMPLES, 16)):
        write(tmp_path, again, seed=100)
        found = surveyed(tmp_path)
        assert found["superseded"] == count
        assert found["types"]["math_tool"]["records"] == len(SAMPLES) + count
        assert found["positions"] > plain["positions"]
        assert found["bytes_per_token"] == pytest.approx(plain["bytes_per_token"], rel=0.3)
    store = open_store(str(tmp_path))
    pack(store, str(tmp_path))
    store.close()
    found = surveyed(tmp_path)
    assert (found["superseded"], found["positions"]) == (0, POSITIONS)


def test_two_captures_at_once(tmp_path: Path) -> None:
    first, second = writer(tmp_path), writer(tmp_path)
    for one in (first, second):
        put(one, SAMPLES)
    first.finish()
    second.finish()
    assert surveyed(tmp_path)["superseded"] == len(SAMPLES)


def test_a_shard_that_is_cut(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    write(tmp_path, SAMPLES[:4], seed=100)
    shard = max(shard_files(tmp_path), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1500])
    found = surveyed(tmp_path)
    assert 0 < found["unreadable"] == found["corrupt"] < len(SAMPLES)
    assert found["sampled"] == len(SAMPLES)
    assert any("truncated" in problem for problem in found["problems"])


@pytest.mark.parametrize("indexed", [True, False])
def test_nothing_is_said_of_what_cannot_be_read(tmp_path: Path, indexed: bool) -> None:
    """Whether the index still knows the records of a damaged shard or not."""
    write(tmp_path, SAMPLES[:6])
    if not indexed:
        (tmp_path / "index.safetensors").unlink()
    (shard,) = shard_files(tmp_path)
    write(tmp_path, SAMPLES[6:])
    shard.write_bytes(shard.read_bytes()[:60])
    if not indexed:
        (tmp_path / "index.safetensors").unlink()
    found = surveyed(tmp_path)
    assert found["unreadable"] == (6 if indexed else 0)
    assert found["unreadable_bytes"] == 60
    assert (found["sampled"], found["corrupt"], list(found["examples"])) == (6, 0, [shard.name])
    assert found["types"]["math_tool"]["records"] == 6


# ----------------------------------------------------------------------------------------------------------- two stores


def test_what_differs_between_two_stores(tmp_path: Path) -> None:
    """One outcome a sample: equal, other signal of the same tokens, another text, another length, only in one."""
    same, other, changed, cut, alone = (replace(one, input_ids=np.resize(one.input_ids, 90)) for one in SAMPLES[:5])
    again = replace(changed, input_ids=changed.input_ids[::-1].copy())
    for name, texts in (("a", [same, other, changed, cut, alone]), ("b", [same, other, again, cut])):
        store = writer(tmp_path / name)
        for sample in texts:
            window = 70 if sample is cut and name == "b" else 90
            logits = random_logits(window - 1, VOCAB, seed=2 if sample is other and name == "b" else 1)
            store.write(sample, window, CODEC.pack(CODEC.encode(logits, 1, 0)))
        store.finish()
    a, b = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    found = compare(a, b, 2.0)
    counts = {"equal": 1, "payload": 1, "tokens": 2, "only_first": 1}
    assert {outcome: count for outcome, count in found.counts.items() if count} == counts
    assert set(found.examples["tokens"]) == {changed.sample_id, cut.sample_id}
    assert found.examples["payload"] == [other.sample_id]
    assert (found.same, len(found.decoded)) == (False, 1)
    assert 0.1 < found.decoded[0] < 10
    assert compare(b, a, None).counts == {**dict.fromkeys(found.counts, 0), **counts, "only_first": 0, "only_second": 1}
    assert compare(a, a, 2.0).same
