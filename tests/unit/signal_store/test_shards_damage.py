"""Folders of shards damaged in every way a folder can be: what is hit is counted and named, the rest is served."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.stores import SAMPLES, assert_usable, condition, put, shard_files, statuses, write, writer
from tests.support.teachers import IDENTITY

from liquid_llm.errors import SignalError
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.records import RecordError
from liquid_llm.signal_store.shards.file import read_shard_header
from liquid_llm.signal_store.shards.folder import INDEX_FILE, Listing
from liquid_llm.signal_store.store import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three shards with six records each; the last is not in the index."""
    folder = tmp_path / "store"
    for begin in range(0, 12, 4):
        store = writer(folder)
        put(store, SAMPLES[begin : begin + 4])
        store.finish()
        if begin == 4:
            kept = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(kept)
    return folder


def warned(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_store(str(folder)).close()
    return caplog.text


def test_a_shard_without_an_index_is_read_from_its_own_front(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert condition(open_store(str(folder))).unindexed == [shard_files(folder)[2].name]
    assert_usable(folder)
    (folder / INDEX_FILE).unlink()
    assert_usable(folder)
    assert warned(folder, caplog) == ""  # usual while a capture runs


@pytest.mark.parametrize("contents", [b"", b"junk" * 100, None])
def test_a_damaged_index_is_named_and_done_without(
    folder: Path, contents: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    data = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(data[:-9] if contents is None else contents)
    assert_usable(folder)
    assert "index.safetensors is not used (it is damaged): " in warned(folder, caplog)
    write(folder, SAMPLES[:1])  # the next writer makes it again
    assert "index.safetensors" not in warned(folder, caplog)


def test_an_index_without_its_shard(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = shard_files(folder)[0]
    gone.unlink()
    text = warned(folder, caplog)
    assert f"1 shard of the index is not there, the first {gone.name}: 4 samples have lost their record" in text
    store = open_store(str(folder))
    assert statuses(store) == ["missing"] * 4 + ["usable"] * 8
    assert condition(store).lost == 4
    write(folder, SAMPLES[:4])
    assert_usable(folder)
    assert warned(folder, caplog) == ""


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_shard(folder: Path, indexed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its records before the cut are served, the others are corrupt, and are made again."""
    cut = shard_files(folder)[0 if indexed else 2]
    cut.write_bytes(cut.read_bytes()[: int(0.8 * cut.stat().st_size)])
    assert f"1 shard is truncated, the first {cut.name}" in warned(folder, caplog)
    store = open_store(str(folder))
    found = statuses(store)
    reasons = {store.get(sample, 1024, 2.0).reason for sample in SAMPLES} - {""}
    assert reasons
    assert all(reason.startswith(f"shard {cut.name} is truncated") for reason in reasons)
    hit = set(found[:4] if indexed else found[8:])
    assert hit == {"usable", "corrupt"}
    assert found.count("usable") >= 9
    again = [sample for sample in SAMPLES if not writer(folder).complete(sample, 1024)]
    assert len(again) == found.count("corrupt")
    write(folder, again)
    assert_usable(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_whose_front_is_damaged(folder: Path, indexed: bool, caplog: pytest.LogCaptureFixture) -> None:
    shard = shard_files(folder)[0 if indexed else 2]
    data = bytearray(shard.read_bytes())
    data[300] ^= 1
    shard.write_bytes(data)
    found = statuses(open_store(str(folder)))
    assert found == (["corrupt"] * 4 + ["usable"] * 8 if indexed else ["usable"] * 8 + ["missing"] * 4)
    if not indexed:
        assert f"1 shard cannot be read, the first {shard.name} (its header is damaged, " in warned(folder, caplog)


def test_a_wrong_checksum_hits_one_record(folder: Path) -> None:
    shard = shard_files(folder)[1]
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    found = statuses(open_store(str(folder)))
    assert (found.count("corrupt"), found.count("usable")) == (1, 11)
    (hit,) = [sample for sample, status in zip(SAMPLES, found, strict=True) if status == "corrupt"]
    assert open_store(str(folder)).get(hit, 1024, 2.0).reason == "the checksum does not match"


def test_a_shard_of_another_teacher_moved_in(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", SAMPLES[:2], teacher=replace(IDENTITY, id="org/big"))
    for path in shard_files(tmp_path / "other"):
        shutil.copy(path, folder / path.name.replace("000001", "000009"))
    store = open_store(str(folder))
    assert statuses(store) == ["stale"] * 2 + ["usable"] * 10
    assert store.get(SAMPLES[0], 1024, 2.0).reason == "captured with teacher id org/big, the store is of org/teacher"
    with pytest.raises(SignalError, match="the teacher id differs"):
        writer(folder, teacher=replace(IDENTITY, id="org/big"))


def test_a_shard_of_a_newer_codec_moved_in(folder: Path, tmp_path: Path) -> None:
    codec = TopKCodec(4)
    codec.version = 2
    write(tmp_path / "other", SAMPLES[:1], codec=codec)
    (path,) = shard_files(tmp_path / "other")
    shutil.copy(path, folder / path.name.replace("000001", "000009"))
    lookup = open_store(str(folder)).get(SAMPLES[0], 1024, 2.0)
    assert (lookup.status, lookup.reason) == ("stale", "captured with codec version 2, the store is of 1")


def test_shards_without_a_store_file(folder: Path) -> None:
    (folder / STORE_FILE).unlink()
    with pytest.raises(SignalError, match=r"no store\.json in it"):
        open_store(str(folder))
    with pytest.raises(SignalError, match=r"this folder has shards but no store\.json.*got 3 such files"):
        writer(folder)


def test_every_shard_damaged_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    (tmp_path / INDEX_FILE).unlink()
    shard_files(tmp_path)[0].write_bytes(b"junk")
    with pytest.raises(SignalError, match=r"no record; got 1 shard cannot be read.*liquid capture"):
        open_store(str(tmp_path))


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.signal_store.shards.folder._OPEN_FILES", 3)
    write(tmp_path, SAMPLES, shard_bytes=1)
    store = open_store(str(tmp_path))
    assert len(shard_files(tmp_path)) == 12
    for _ in range(2):
        assert set(statuses(store)) == {"usable"}
        assert len(store.layout._open) == 3  # type: ignore[attr-defined]


def test_problems_are_counted_in_plain_words() -> None:
    """One or several; an empty file is called empty, whatever Python made of it."""
    with pytest.raises(RecordError, match=r"^it is empty$"):
        read_shard_header(lambda begin, end: b"", 0)
    with pytest.raises(RecordError, match=r"^its header is damaged, 1,000 bytes$"):
        read_shard_header(lambda begin, end: bytes(1000)[begin:end], 1000)
    one = Listing(damaged={"a": "it is empty"}, truncated=["a"], gone=["a"], lost=1).problems()
    two = Listing(damaged={"a": "it is empty", "b": ""}, truncated=["a", "b"], gone=["a", "b"], lost=2).problems()
    assert [text.partition(",")[0] for text in one] == [
        "1 shard cannot be read",
        "1 shard is truncated",
        "1 shard of the index is not there",
    ]
    assert [text.partition(",")[0] for text in two] == [
        "2 shards cannot be read",
        "2 shards are truncated",
        "2 shards of the index are not there",
    ]
    assert one[2].endswith(": 1 sample has lost its record")
    assert two[2].endswith(": 2 samples have lost their record")
