"""What ``liquid store stats`` and ``diff`` measure, on small stores made without a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.stores import CODEC, SAMPLES, VOCAB, put, shard_files, write, writer
from tests.support.teachers import random_logits

from liquid_llm.capture.verify import common_tokens, compare
from liquid_llm.signal_store.records import RecordHeader, SignalIdentity, token_hashes
from liquid_llm.signal_store.store import open_store
from liquid_llm.signal_store.survey import Survey, survey

POSITIONS = sum(len(sample.input_ids) - 1 for sample in SAMPLES)


def surveyed(folder: Path) -> Survey:
    store = open_store(str(folder))
    found = survey(store, samples=200, temperature=2.0, seed=0)
    store.close()
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_superseded_records_are_counted_apart(tmp_path: Path) -> None:
    """A few of a shard, and then all of it."""
    write(tmp_path, SAMPLES)
    plain = surveyed(tmp_path)
    assert (plain.superseded, plain.superseded_bytes, plain.unreadable_bytes) == (0, 0, 0)
    for again, count in ((SAMPLES[:4], 4), (SAMPLES, 16)):
        write(tmp_path, again, seed=100)
        found = surveyed(tmp_path)
        values = found.as_dict()
        assert found.superseded == count
        assert (found.types["math_tool"].records, values["positions"]) == (len(SAMPLES), POSITIONS)
        assert found.types["math_tool"].payload_bytes == plain.types["math_tool"].payload_bytes
        assert values["bytes"] == size_of(tmp_path)
        assert sum(found.parts.values()) + found.superseded_bytes == pytest.approx(values["bytes"])
        assert values["bytes_per_token"] == pytest.approx(plain.as_dict()["bytes_per_token"], rel=0.1)


def test_two_captures_at_once(tmp_path: Path) -> None:
    first, second = writer(tmp_path), writer(tmp_path)
    for one in (first, second):
        put(one, SAMPLES)
    first.finish()
    second.finish()
    found = surveyed(tmp_path)
    assert (found.types["math_tool"].records, found.superseded) == (len(SAMPLES), len(SAMPLES))


def test_a_shard_with_superseded_and_lost_records(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    write(tmp_path, SAMPLES[:4], seed=100)
    shard = max(shard_files(tmp_path), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1500])
    found = surveyed(tmp_path)
    assert found.unreadable > 0
    assert found.types["math_tool"].records + found.unreadable == len(SAMPLES)
    total = sum(found.parts.values()) + found.superseded_bytes + found.unreadable_bytes
    assert total == pytest.approx(size_of(tmp_path))


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
    assert found.unreadable == (6 if indexed else 0)
    assert found.unreadable_bytes == 60
    assert (found.sampled, found.corrupt, list(found.examples)) == (6, 0, [shard.name])
    assert found.types["math_tool"].records == 6


# ----------------------------------------------------------------------------------------------------------- two stores


def header(ids: np.ndarray) -> RecordHeader:
    identity = SignalIdentity("t", "r", "h", VOCAB, CODEC.name, CODEC.version, dict(CODEC.options))
    return RecordHeader(2, "s", "code", identity, len(ids), token_hashes(ids))


def test_tokens_in_common_as_far_as_hashes_tell() -> None:
    ids = np.arange(300, dtype=np.int32)
    other = ids.copy()
    other[100] = 7
    for (a, b), expected in (
        ((ids, ids), 300),
        ((ids, ids[:200]), 192),
        ((ids[:128], ids), 128),
        ((ids[:63], ids), 0),
        ((ids, other), None),
        ((ids, other[:200]), None),
        ((ids, other[:127]), 64),  # the change lies behind the last whole 64
        ((ids[:99], ids[:100]), 64),
    ):
        assert common_tokens(header(a), header(b)) == expected


def test_other_tokens_are_not_a_longer_window(tmp_path: Path) -> None:
    samples = [replace(sample, input_ids=np.resize(sample.input_ids, 150)) for sample in SAMPLES[:3]]
    changed = replace(samples[0], input_ids=samples[0].input_ids[::-1].copy())
    logits = random_logits(149, VOCAB, seed=1)
    for folder, window, texts in ((tmp_path / "a", 150, samples), (tmp_path / "b", 70, [changed, *samples[1:]])):
        store = writer(folder)
        for sample in texts:
            store.write(sample, window, CODEC.pack(CODEC.encode(logits[: window - 1].clone(), 1, 0)))
        store.finish()
    a, b = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    found = compare(a, b, 2.0)
    assert {kind: count for kind, count in found.counts.items() if count} == {"tokens": 1, "longer_first": 2}
    assert found.examples["tokens"] == [changed.sample_id]
    assert (found.common_positions, found.common, found.same) == (2 * 64, [0.0, 0.0], False)
