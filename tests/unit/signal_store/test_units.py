"""Stores of units: a record is found by the data file of its sample, and nothing is opened before it is wanted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.gcs import Bucket
from tests.support.stores import SAMPLES, VOCAB, put, writer
from tests.support.teachers import make_samples

from liquid_llm import storage
from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError
from liquid_llm.signal_store.shards import file, replacing
from liquid_llm.signal_store.store import StoreReader, open_store
from liquid_llm.signal_store.units import (
    UnitsLayout,
    read_marker,
    read_plan,
    unit_folder,
    why_to_do,
    write_marker,
    write_plan,
)
from liquid_llm.storage import FileInfo

NAMES = [f"part-{number}.jsonl-0" for number in range(6)]
SOURCE = FileInfo("data/part.jsonl", "part.jsonl", 100, "v1")


def samples_of(number: int) -> list[Sample]:
    made = make_samples(4, low=20, high=40, seed=number, prefix=f"u{number}")
    return [replace(sample, shard=NAMES[number]) for sample in made]


def fill(folder: Path | str, numbers: range, *, complete: bool = True) -> None:
    for number in numbers:
        store = writer(folder, layout="units", unit=NAMES[number])
        put(store, samples_of(number))
        store.finish()
        if complete:
            write_marker(str(folder), NAMES[number], "made of this", SOURCE)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[StoreReader]:
    fill(tmp_path, range(5))
    fill(tmp_path, range(5, 6), complete=False)
    store = open_store(str(tmp_path))
    yield store
    store.close()


def status(store: StoreReader, sample: Sample) -> str:
    return store.get(sample, 1024, 2.0).status


def layout_of(store: StoreReader) -> UnitsLayout:
    assert isinstance(store.layout, UnitsLayout)
    return store.layout


def test_only_the_unit_of_a_sample_is_opened(opened: StoreReader, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    listing = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda uri: looked.append(uri) or listing(uri))
    assert layout_of(opened).num_open == 0
    assert {status(opened, sample) for sample in samples_of(3)} == {"usable"}
    assert looked == [unit_folder(opened.uri, NAMES[3])]
    assert opened.complete_units == set(NAMES[:5])
    assert {status(opened, sample) for sample in samples_of(5)} == {"usable"}, "half a unit serves what it has"


def test_few_units_are_open_at_a_time(opened: StoreReader) -> None:
    layout_of(opened)._most = 2
    for number in (0, 1, 2, 3, 0, 4, 0):
        assert {status(opened, sample) for sample in samples_of(number)} == {"usable"}
        assert layout_of(opened).num_open <= 2


def test_a_sample_of_another_file_is_missing_and_one_of_no_file_is_looked_for(opened: StoreReader) -> None:
    sample = samples_of(1)[0]
    found = opened.get(replace(sample, shard=NAMES[2]), 1024, 2.0)
    assert (found.status, NAMES[2] in found.reason) == ("missing", True)
    assert status(opened, replace(sample, shard="of no unit")) == "missing"
    assert status(opened, replace(sample, shard=None)) == "usable"
    changed = replace(sample, input_ids=sample.input_ids[::-1].copy())
    assert status(opened, changed) == "stale", "as in any other layout"


def test_all_records_are_walked_counted_and_drawn_from(opened: StoreReader) -> None:
    every = {sample.sample_id for number in range(6) for sample in samples_of(number)}
    assert {name for name, _ in opened.layout.records()} == every
    assert opened.layout.contents().types["math_tool"]["records"] == 24
    assert len(opened) == 20, "what is complete"
    drawn = [name for name, _ in opened.layout.draw(10, seed=1)]
    assert len(set(drawn)) == len(drawn) == 10
    assert set(drawn) < every
    assert drawn == [name for name, _ in opened.layout.draw(10, seed=1)]
    assert len(list(opened.layout.draw(100, seed=1))) == 24


def test_a_marker_holds_for_its_input_and_for_files_that_are_there(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    uri = str(tmp_path)
    assert why_to_do(uri, NAMES[0], "made of this") == ""
    assert "have changed" in why_to_do(uri, NAMES[0], "made of that")
    assert "not complete" in why_to_do(uri, NAMES[2], "made of this")
    marker = read_marker(uri, NAMES[0])
    assert marker is not None
    assert marker.counts == {
        "records": 4,
        "tokens": sum(len(one.input_ids) for one in samples_of(0)),
        "positions": sum(len(one.input_ids) - 1 for one in samples_of(0)),
    }
    next(Path(unit_folder(uri, NAMES[0])).glob("shard-*")).unlink()
    assert "lost or cut" in why_to_do(uri, NAMES[0], "made of this")
    for damage in ("", "[]", "{}", '{"format_version": 99}'):
        (tmp_path / "done" / f"{NAMES[1]}.json").write_text(damage)
        assert "not complete" in why_to_do(uri, NAMES[1], "made of this"), damage


def test_how_many_units_there_are_to_be(tmp_path: Path) -> None:
    assert read_plan(str(tmp_path)) is None
    write_plan(str(tmp_path), 7)
    assert read_plan(str(tmp_path)) == 7
    (tmp_path / "plan.json").write_text("no plan")
    assert read_plan(str(tmp_path)) is None


def test_units_in_a_bucket(gcs: Bucket) -> None:
    fill(f"{gcs.uri}/store", range(2))
    store = open_store(f"{gcs.uri}/store")
    assert [found.status for found in store.get_many([*samples_of(0), *samples_of(1)], [1024] * 8, 2.0)] == [
        "usable"
    ] * 8
    assert store.describe()["units"] == 2
    store.close()


def test_a_store_of_units_is_written_unit_by_unit_and_of_one_layout(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    with pytest.raises(SignalError, match="another layout"):
        writer(tmp_path, layout="shards")
    with pytest.raises(SignalError, match="unit by unit"):
        writer(tmp_path, layout="units")
    with pytest.raises(SignalError, match="vocab"):
        writer(tmp_path, layout="units", unit=NAMES[1], vocab_size=VOCAB + 1)
    assert SAMPLES


def cut_unit(folder: Path) -> Path:
    """A store of one unit of twelve samples, whose shard has been cut; the shard."""
    store = writer(folder, layout="units", unit=NAMES[0])
    put(store, SAMPLES_OF_ONE)
    store.finish()
    write_marker(str(folder), NAMES[0], "made of this", SOURCE)
    (shard,) = Path(unit_folder(str(folder), NAMES[0])).glob("shard-*")
    shard.write_bytes(shard.read_bytes()[: int(0.8 * shard.stat().st_size)])
    return shard


SAMPLES_OF_ONE = [replace(sample, shard=NAMES[0]) for sample in SAMPLES]


def capture_again(folder: Path) -> int:
    """Capture what is missing; how many samples that is."""
    store = writer(folder, layout="units", unit=NAMES[0])
    left = [sample for sample in SAMPLES_OF_ONE if not store.complete(sample, 1024)]
    put(store, left)
    store.finish()
    return len(left)


def looked_into(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[set[str], str]:
    """What the records are, and what is warned of."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        store = open_store(str(folder))
        found = {status(store, sample) for sample in SAMPLES_OF_ONE}
        store.close()
    return found, caplog.text


def test_a_cut_shard_is_gone_once_its_unit_is_whole_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What can be read of it is not captured again, and is not lost with it."""
    shard = cut_unit(tmp_path)
    assert 0 < capture_again(tmp_path) < len(SAMPLES)
    assert "truncated" in looked_into(tmp_path, caplog)[1]
    marker = write_marker(str(tmp_path), NAMES[0], "made of this", SOURCE)
    assert not shard.exists()
    assert shard.name not in marker.files
    assert marker.counts["records"] == len(SAMPLES)
    assert why_to_do(str(tmp_path), NAMES[0], "made of this") == ""
    assert looked_into(tmp_path, caplog) == ({"usable"}, "")


@pytest.mark.parametrize("moment", ["remove", "write_index"])
def test_a_cut_shard_is_replaced_whenever_the_process_is_killed(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = cut_unit(tmp_path)
    capture_again(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((storage, moment) if moment == "remove" else (replacing, moment)), killed)
        with pytest.raises(KeyboardInterrupt):
            write_marker(str(tmp_path), NAMES[0], "made of this", SOURCE)
    assert shard.exists() == (moment == "remove")
    found, said = looked_into(tmp_path, caplog)
    assert (found, "truncated" in said) == ({"usable"}, moment == "remove")
    assert why_to_do(str(tmp_path), NAMES[0], "made of this"), "it is not taken for complete"
    assert capture_again(tmp_path) == 0
    write_marker(str(tmp_path), NAMES[0], "made of this", SOURCE)
    assert looked_into(tmp_path, caplog) == ({"usable"}, "")
    assert not shard.exists()


def test_what_a_newer_program_wrote_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(1))
    folder = Path(unit_folder(str(tmp_path), NAMES[0]))
    (shard,) = folder.glob("shard-*")
    newer, junk = folder / "shard-000009-000000-0.safetensors", folder / "shard-000009-000001-0.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(file, "WHOLE_SHARD_VERSION", file.SHARD_VERSION + 1)
        fill(tmp_path / "newer", range(1), complete=False)
    (made,) = Path(unit_folder(str(tmp_path / "newer"), NAMES[0])).glob("shard-*")
    newer.write_bytes(made.read_bytes())
    junk.write_bytes(b"junk")
    write_marker(str(tmp_path), NAMES[0], "made of this", SOURCE)
    assert sorted(path for path in folder.glob("shard-*")) == [shard, newer]
