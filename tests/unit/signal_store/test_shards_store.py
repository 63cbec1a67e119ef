"""Folders of shards: written in parts and by several at once, packed under a reader, read from a bucket."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.faults import faulty_proxy
from tests.support.gcs import Bucket, put_packed
from tests.support.stores import SAMPLES, assert_usable, condition, put, shard_files, statuses, write, writer
from tests.support.teachers import HARD_IDS, make_samples

from liquid_llm import storage
from liquid_llm.errors import SignalError, StorageError
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.shards import writer as shards_writer
from liquid_llm.signal_store.shards.folder import INDEX_FILE, ShardsLayout
from liquid_llm.signal_store.shards.remote import RemoteShard, ShardCache, cost_seconds
from liquid_llm.signal_store.store import open_store
from liquid_llm.storage import FileInfo


def ids_of(folder: Path | str) -> Any:
    store = open_store(str(folder))
    return [store.get(sample, 1024, 2.0).signal.ids for sample in SAMPLES]  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------------------- writing


def test_any_sample_id_and_no_name_decides_a_path(tmp_path: Path) -> None:
    ids = [*HARD_IDS, "Case", "case", "CASE"]
    samples = [replace(sample, sample_id=id) for sample, id in zip(make_samples(len(ids)), ids, strict=True)]
    write(tmp_path / "a" / "store", samples)
    assert_usable(tmp_path / "a" / "store", samples)
    (shard,) = shard_files(tmp_path / "a" / "store")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {STORE_FILE, INDEX_FILE, shard.name}
    assert shard.parent == tmp_path / "a" / "store"


def test_full_shards_and_the_rest(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES, shard_bytes=4000)
    sizes = [path.stat().st_size for path in shard_files(tmp_path)]
    assert len(sizes) > 2
    assert all(4000 < size < 8000 for size in sizes[:-1])
    assert_usable(tmp_path)
    assert condition(open_store(str(tmp_path))).unindexed == []


def await_records(folder: Path, count: int) -> None:
    for _ in range(500):
        if shard_files(folder) and len(open_store(str(folder))) == count:
            return
        threading.Event().wait(0.02)
    raise AssertionError("they never came")


def test_nothing_is_held_back_longer_than_asked(tmp_path: Path) -> None:
    """A writer that is never finished, as when its process is killed: the records are there after ``part_seconds``."""
    store = writer(tmp_path, part_seconds=0.05)
    for end in (6, 12):
        put(store, SAMPLES[end - 6 : end])
        await_records(tmp_path, end)
    parts = shard_files(tmp_path)
    assert len(parts) >= 2
    store.finish()
    assert len(shard_files(tmp_path)) == 1
    assert not set(parts) & set(shard_files(tmp_path))
    assert_usable(tmp_path)


def test_a_crash_between_a_full_shard_and_the_removal_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = writer(tmp_path, part_seconds=0.05)
    put(store, SAMPLES[:6])
    await_records(tmp_path, 6)
    put(store, SAMPLES[6:])

    def crash(uri: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards_writer.storage, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        store.finish()
    monkeypatch.undo()
    assert len(shard_files(tmp_path)) >= 2
    assert_usable(tmp_path)


def test_several_writers_at_once_and_the_last_record_counts(tmp_path: Path) -> None:
    first, second = writer(tmp_path), writer(tmp_path)
    put(first, SAMPLES[:8], seed=0)
    put(second, SAMPLES[4:], seed=100)
    first.finish()
    second.finish()
    assert_usable(tmp_path)
    store = open_store(str(tmp_path))
    assert len([name for name, _ in store.layout.records()]) == len(SAMPLES)
    before = ids_of(tmp_path)
    write(tmp_path, SAMPLES, seed=500)  # a later job's records hide what was there
    assert_usable(tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(before, ids_of(tmp_path), strict=True))
    (tmp_path / INDEX_FILE).unlink()
    after = ids_of(tmp_path)
    write(tmp_path, [])
    assert all(torch.equal(a, b) for a, b in zip(after, ids_of(tmp_path), strict=True))


def test_threads_write_one_store(tmp_path: Path) -> None:
    samples = make_samples(80, low=20, high=90)
    store = writer(tmp_path, shard_bytes=5000, part_seconds=0.01)
    threads = [threading.Thread(target=put, args=(store, samples[n::4])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.finish()
    assert_usable(tmp_path, samples)


def test_a_place_that_cannot_be_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = writer(tmp_path, shard_bytes=1)
    refused = StorageError("the disk is full", where=tmp_path)
    calls: list[str] = []

    def refuse(uri: str, data: bytes) -> None:
        calls.append(uri)
        raise refused

    monkeypatch.setattr(shards_writer.storage, "write_bytes", refuse)
    put(store, SAMPLES[:2])  # two failures are taken with a warning
    with pytest.raises(StorageError, match="disk is full"):
        put(store, SAMPLES[2:3])
    with pytest.raises(StorageError, match="disk is full"):
        store.finish()
    monkeypatch.undo()
    store.finish()
    assert len(calls) == 4
    assert_usable(tmp_path, SAMPLES[:3])


def test_a_slow_teacher_hears_of_what_the_timer_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts fail behind its back, and no shard is full for an hour: the write after the third failure says so."""
    store = writer(tmp_path, part_seconds=0.01)
    calls = threading.Semaphore(0)

    def refuse(uri: str, data: bytes) -> None:
        calls.release()
        raise StorageError("the disk is full", where=tmp_path)

    monkeypatch.setattr(shards_writer.storage, "write_bytes", refuse)
    for number in range(3):
        put(store, SAMPLES[number : number + 1])
        assert calls.acquire(timeout=30)
        for _ in range(500):
            if store._writer._failures > number:  # type: ignore[union-attr]
                break
            threading.Event().wait(0.01)
    with pytest.raises(StorageError, match="disk is full"):
        put(store, SAMPLES[3:4])
    with pytest.raises(StorageError, match="disk is full"):
        store.finish()
    monkeypatch.undo()
    store.finish()
    put(store, SAMPLES[4:5])  # the error is over once something could be published
    store.finish()
    assert_usable(tmp_path, SAMPLES[:5])


@pytest.mark.parametrize("contents", [None, b"", b"junk" * 100])
def test_a_writer_with_nothing_to_write_repairs_the_index(
    tmp_path: Path, contents: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SAMPLES, shard_bytes=4000)
    index = tmp_path / INDEX_FILE
    whole = index.read_bytes()
    index.unlink()
    if contents is not None:
        index.write_bytes(contents)
    store = writer(tmp_path)
    store.finish()
    assert index.read_bytes() == whole
    listed: list[str] = []
    real = storage.list_files
    monkeypatch.setattr(shards_writer.storage, "list_files", lambda uri: listed.append(uri) or real(uri))
    store.finish()
    assert listed == []
    writer(tmp_path).finish()
    assert len(listed) == 1  # the opening's own: of an index that is whole nothing is asked


def test_an_index_that_cannot_be_repaired_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, SAMPLES)
    (tmp_path / INDEX_FILE).unlink()
    store = writer(tmp_path)

    def refuse(uri: str, data: bytes) -> None:
        raise StorageError("permission denied", where=uri)

    monkeypatch.setattr(shards_writer.storage, "write_bytes", refuse)
    store.finish()
    assert "the index could not be repaired" in caplog.text
    put(store, SAMPLES[:1])
    with pytest.raises(StorageError, match="permission denied"):
        store.finish()


# ---------------------------------------------------------------------------------------------------- packed meanwhile


def pack_in_place(folder: str) -> None:
    """What compaction does, as far as a reader notices: new shards, then the old ones go."""
    before = [info.uri for info in storage.list_files(folder) if info.name.startswith("shard-")]
    store = writer(folder)
    for _, found in open_store(folder).layout.records():
        store.put(found)  # type: ignore[arg-type]
    store.finish()
    for uri in before:
        storage.remove(uri)


@pytest.mark.parametrize("where", ["local", "gcs"])
def test_a_reader_survives_that_its_shards_are_packed(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path / "s") if where == "local" else f"{request.getfixturevalue('gcs').uri}/signal/"
    write(folder, SAMPLES, shard_bytes=2000)
    store = open_store(folder)
    assert store.get(SAMPLES[0], 1024, 2.0).status == "usable"
    pack_in_place(folder)
    assert set(statuses(store)) == {"usable"}
    assert condition(store).lost == 0
    store.close()


def test_a_look_up_that_another_thread_overtakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread learns of the packing, and lists again, between this one's look-up and its reading."""
    write(tmp_path, SAMPLES, shard_bytes=2000)
    store = open_store(str(tmp_path))
    pack_in_place(str(tmp_path))
    real, overtaken = ShardsLayout._locate, []

    def place_then_wait(layout: ShardsLayout, index: Any, sample_id: str) -> Any:
        place = real(layout, index, sample_id)
        if not overtaken:
            overtaken.append(True)
            thread = threading.Thread(target=lambda: overtaken.append(store.get(SAMPLES[5], 1024, 2.0).status))
            thread.start()
            thread.join()
        return place

    monkeypatch.setattr(ShardsLayout, "_locate", place_then_wait)
    assert store.get(SAMPLES[0], 1024, 2.0).status == "usable"
    assert overtaken == [True, "usable"]


def test_no_sample_is_unknown_while_the_folder_is_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is packed once more between a listing and the reading of what it names."""
    write(tmp_path, SAMPLES, shard_bytes=2000)
    store = open_store(str(tmp_path))
    pack_in_place(str(tmp_path))
    (tmp_path / INDEX_FILE).unlink()
    real, known = storage.list_files, []

    def list_then_pack(uri: str) -> Any:
        infos = real(uri)
        known.append(sum(store.has(sample.sample_id) for sample in SAMPLES))
        if len(known) == 1:
            monkeypatch.setattr(storage, "list_files", real)
            pack_in_place(uri)
            (tmp_path / INDEX_FILE).unlink()
            monkeypatch.setattr(storage, "list_files", list_then_pack)
        return infos

    monkeypatch.setattr(storage, "list_files", list_then_pack)
    assert set(statuses(store)) == {"usable"}
    assert known == [len(SAMPLES)] * 2


def test_a_listing_of_what_is_never_there_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SAMPLES[:2])
    store = open_store(str(tmp_path))
    listings = []

    def never_there(uri: str) -> Any:
        listings.append(uri)
        return [replace(info, name=f"shard-000001-{len(listings):06d}-aaaaaaaa.safetensors") for info in infos]

    infos = [info for info in storage.list_files(str(tmp_path)) if info.name.startswith("shard-")]
    for path in shard_files(tmp_path):
        path.unlink()
    monkeypatch.setattr(storage, "list_files", never_there)
    assert store.get(SAMPLES[0], 1024, 2.0).status == "missing"
    assert len(listings) < 10


def test_a_folder_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SAMPLES, shard_bytes=2000)
    (tmp_path / INDEX_FILE).unlink()
    real, packed = storage.list_files, []

    def list_then_pack(uri: str) -> Any:
        infos = real(uri)
        if not packed:
            packed.append(True)
            pack_in_place(uri)
        return infos

    monkeypatch.setattr("liquid_llm.signal_store.store.storage.list_files", list_then_pack)
    assert_usable(tmp_path)


# --------------------------------------------------------------------------------------------------------------- remote


def test_ranges_first_then_the_whole_shard(gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{gcs.uri}/signal"
    write(uri, SAMPLES)
    with faulty_proxy(gcs.base) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.base)
        cache = ShardCache(tmp_path / "cache")
        store = open_store(uri, cache=cache)
        assert {store.get(sample, 1024, 2.0).status for sample in SAMPLES} == {"usable"}
        reads = [seen for seen in proxy.requests if "shard-" in seen.path and "alt=media" in seen.path]
        # The shard is so small that its price is one request: the front by range, then the whole.
        assert len(reads) <= 3
        (held,) = (tmp_path / "cache").glob("*.shard")
        proxy.requests.clear()
        again = open_store(uri, cache=ShardCache(tmp_path / "cache"))  # another run on this machine
        assert set(statuses(again)) == {"usable"}
        assert not [seen for seen in proxy.requests if "shard-" in seen.path and "alt=media" in seen.path]
        data = bytearray(held.read_bytes())
        data[-300:] = bytes(300)
        held.write_bytes(data)  # a damaged copy is replaced, not believed
        third = open_store(uri, cache=ShardCache(tmp_path / "cache"))
        assert set(statuses(third)) == {"usable"}
        for one in (store, again, third):
            one.close()


def test_processes_of_a_host_fetch_a_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shard").write_bytes(b"signal" * 1000)
    (info,) = storage.list_files(str(tmp_path))
    real, fetched = storage.download, []

    def download(uri: str, path: Path) -> None:
        fetched.append(uri)
        time.sleep(0.05)  # both are there by now
        real(uri, path)

    monkeypatch.setattr(storage, "download", download)
    ranks = [ShardCache(tmp_path / "cache") for _ in range(3)]  # a lock each, as in processes of their own
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda cache: cache.fetch(info)(0, 6), ranks))
    assert (found, len(fetched)) == ([b"signal"] * 3, 1)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".shard"]
    late = RemoteShard(info, ShardCache(tmp_path / "cache"))
    late._local = None  # it was opened before another process had fetched it
    monkeypatch.setattr(storage, "read_bytes", lambda *_: pytest.fail("a range is asked for"))
    assert late(0, 6) == b"signal"


def test_the_price_of_ranges_never_exceeds_that_of_the_whole_by_much() -> None:
    whole, record = cost_seconds(64_000_000), cost_seconds(7000)
    spent, reads = 0.0, 0
    while spent < whole:
        spent += record
        reads += 1
    assert reads == 9
    assert spent < 1.2 * whole


def test_the_cache_keeps_to_its_bound(gcs: Bucket, tmp_path: Path) -> None:
    uri = f"{gcs.uri}/signal"
    write(uri, SAMPLES, shard_bytes=3000)
    sizes = [info.size for info in storage.list_files(uri) if info.name.startswith("shard-")]
    bound = max(sizes) + 10
    store = open_store(uri, cache=ShardCache(tmp_path, bound))
    for _ in range(3):
        assert set(statuses(store)) == {"usable"}
        assert sum(path.stat().st_size for path in tmp_path.glob("*.shard")) <= bound
    none = open_store(uri, cache=ShardCache(tmp_path / "none", 10))
    assert set(statuses(none)) == {"usable"}
    assert not (tmp_path / "none").exists()
    for one in (store, none):
        one.close()


def test_the_cache_gives_up_what_was_not_used_for_longest(tmp_path: Path) -> None:
    """Three shards of 100 bytes, room for two and a half."""
    (tmp_path / "bucket").mkdir()
    for name in "abcd":
        (tmp_path / "bucket" / name).write_bytes(name.encode() * 100)
    a, b, c, d = sorted(storage.list_files(str(tmp_path / "bucket")), key=lambda info: info.name)
    cache = ShardCache(tmp_path / "cache", max_bytes=250)

    def used(info: FileInfo, seconds: int) -> None:
        os.utime(cache._path(tmp_path / "cache", info), (seconds, seconds))

    def held() -> set[str]:
        return {info.name for info in (a, b, c, d) if cache._path(tmp_path / "cache", info).exists()}

    for number, info in enumerate((a, b)):
        assert cache.fetch(info)(0, 2) == info.name.encode() * 2
        used(info, 1000 + number)
    assert cache.find(a) is not None  # now b is the one not used for longest
    cache.fetch(c)
    assert held() == {"a", "c"}
    used(a, 2000)
    used(c, 1000)
    cache.fetch(d)
    assert held() == {"a", "d"}


def test_a_temporary_cache_is_removed(gcs: Bucket) -> None:
    uri = f"{gcs.uri}/signal"
    write(uri, SAMPLES)
    store = open_store(uri)
    assert set(statuses(store)) == {"usable"}
    folder = store.layout._cache._folder  # type: ignore[attr-defined]
    assert folder.is_dir()
    store.close()
    assert not folder.exists()


def test_an_empty_store_of_shards(tmp_path: Path) -> None:
    writer(tmp_path).finish()
    with pytest.raises(SignalError, match="the signal store has no record"):
        open_store(str(tmp_path))
    assert not (tmp_path / INDEX_FILE).exists()


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_that_a_bucket_keeps_packed_are_not_called_damaged(gcs: Bucket, tmp_path: Path, indexed: bool) -> None:
    write(tmp_path / "s", SAMPLES)
    for path in (tmp_path / "s").iterdir():
        if indexed or not path.name.startswith("index"):
            put_packed(gcs, f"signal/{path.name}", path.read_bytes())
    with pytest.raises(StorageError, match=r"shard-\S+: .*packed.*Content-Encoding: gzip.*without -Z or -z") as said:
        statuses(open_store(f"{gcs.uri}/signal"))
    assert "capture again" not in str(said.value).lower()
