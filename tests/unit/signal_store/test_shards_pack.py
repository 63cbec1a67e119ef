"""Packing a folder in place: only what was copied goes, whatever else lies there or comes meanwhile."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from tests.support.stores import SAMPLES, assert_usable, condition, shard_files, statuses, write, writer

from liquid_llm.signal_store.shards import pack as shards_pack
from liquid_llm.signal_store.shards.folder import INDEX_FILE
from liquid_llm.signal_store.shards.pack import PackSummary, pack
from liquid_llm.signal_store.store import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three shards, four records each."""
    for begin in range(0, 12, 4):
        write(tmp_path / "store", SAMPLES[begin : begin + 4])
    return tmp_path / "store"


def packed(folder: Path) -> PackSummary:
    store = open_store(str(folder))
    try:
        return pack(store, str(folder))
    finally:
        store.close()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_published_meanwhile_stays(folder: Path, tmp_path: Path) -> None:
    """A capture is running: what appears after the store was opened, or while it is copied, was not copied."""
    (late,) = shard_files(folder)[2:]
    shutil.move(late, tmp_path / late.name)
    (folder / INDEX_FILE).unlink()
    write(folder, [])
    store = open_store(str(folder))
    shutil.move(tmp_path / late.name, late)
    progress = []

    def running(records: int) -> None:
        if not progress:
            write(folder, SAMPLES[:1], seed=700)
        progress.append(records)

    done = pack(store, str(folder), progress=running)
    store.close()
    assert (done.packed, done.left_out_count) == (8, 0)
    assert len(shard_files(folder)) == 3  # the late one, the other writer's, and the packed
    assert late in shard_files(folder)
    assert_usable(folder)
    assert packed(folder).files_after == 3
    assert_usable(folder)


@pytest.mark.parametrize("damage", ["front", "front, not in the index", "empty", "cut", "a record"])
def test_packing_again_adds_nothing_beside_a_damaged_shard(folder: Path, damage: str) -> None:
    hurt = shard_files(folder)[1]
    if damage.startswith("front"):
        flip(hurt, 300)
        if "index" in damage:
            (folder / INDEX_FILE).unlink()
    elif damage == "a record":
        flip(hurt, -20)
    else:
        hurt.write_bytes(hurt.read_bytes()[: -300 if damage == "cut" else 0])
    before = statuses(open_store(str(folder)))
    first = packed(folder)
    assert first.left_out_count > 0
    files, size = len(shard_files(folder)), size_of(folder)
    assert files == 2
    assert hurt in shard_files(folder)
    for _ in range(2):
        again = packed(folder)
        assert again.left_out_count == first.left_out_count
        assert (len(shard_files(folder)), size_of(folder)) == (files, size)
    assert statuses(open_store(str(folder))) == before
    assert before.count("usable") >= 8


@pytest.mark.parametrize("damage", ["front", "empty", "cut", "a record"])
def test_a_damaged_shard_goes_once_its_samples_are_captured_again(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after the folder was packed, for which the index was made again from fronts that it cannot read."""
    hurt = shard_files(folder)[1]
    if damage in ("front", "a record"):
        flip(hurt, 300 if damage == "front" else -20)
    else:
        hurt.write_bytes(hurt.read_bytes()[: -300 if damage == "cut" else 0])
    packed(folder)
    again = [sample for sample in SAMPLES if not writer(folder).complete(sample, 1024)]
    assert 0 < len(again) <= 4
    write(folder, again[:-1])
    assert packed(folder).left_out_count == 1  # a sample left, or the shard for it
    assert hurt in shard_files(folder)
    write(folder, again[-1:])
    assert_usable(folder)
    assert packed(folder).left_out_count == 0
    assert len(shard_files(folder)) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert_usable(folder)
    assert caplog.text == ""


def test_an_empty_file_that_no_index_knows_is_named_once_and_goes(folder: Path) -> None:
    empty = folder / "shard-000009-000000-00000000.safetensors"
    empty.touch()
    assert packed(folder).left_out == {empty.name: "it is empty"}
    assert not empty.exists()
    assert packed(folder).left_out_count == 0
    assert condition(open_store(str(folder))).problems() == []
    assert_usable(folder)


@pytest.mark.parametrize("after", range(4))
def test_a_crash_while_shards_are_removed(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One front is damaged: what the index knows of it outlasts the shards that are gone."""
    flip(shard_files(folder)[1], 300)
    remove, removed = shards_pack.storage.remove, []

    def crash(uri: str) -> None:
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(uri)
        remove(uri)

    monkeypatch.setattr(shards_pack.storage, "remove", crash)
    if after < 2:
        with pytest.raises(KeyboardInterrupt):
            packed(folder)
    else:
        packed(folder)
    monkeypatch.undo()
    assert statuses(open_store(str(folder))) == ["usable"] * 4 + ["corrupt"] * 4 + ["usable"] * 4
    packed(folder)
    assert len(shard_files(folder)) == 2
