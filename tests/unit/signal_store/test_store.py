"""A store: written, found again, and refused where it is of another teacher, stale, damaged or not there.

What concerns the files of layout ``shards`` alone is in ``test_shards*.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.gcs import Bucket
from tests.support.teachers import HARD_IDS, IDENTITY, make_samples, random_logits

from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import SparseSignal
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.description import STORE_FILE
from liquid_llm.signal_store.pt import file_name, from_bytes, to_bytes
from liquid_llm.signal_store.store import StoreWriter, open_store

VOCAB = 300
CODEC = TopKCodec(4)


def writer(folder: Path | str, **changes: Any) -> StoreWriter:
    """A folder named ``shards`` somewhere in its path is one of that layout."""
    arguments: dict[str, Any] = {
        "teacher": IDENTITY,
        "codec": CODEC,
        "vocab_size": VOCAB,
        "layout": "shards" if "shards" in Path(folder).parts else "pt",
        **changes,
    }
    return StoreWriter(str(folder), **arguments)


def write(folder: Path | str, samples: list[Sample], seq_len: int = 1024, **changes: Any) -> list[torch.Tensor]:
    """Write one record a sample; returns the logits they were made of."""
    store = writer(folder, **changes)
    made = []
    for seed, sample in enumerate(samples):
        num_tokens = min(len(sample.input_ids), seq_len)
        logits = random_logits(num_tokens - 1, VOCAB, seed=seed)
        rows = store.codec.encode(logits.clone(), 1, 0)
        store.write(sample, num_tokens, store.codec.pack(rows))
        made.append(logits)
    store.finish()
    return made


@pytest.fixture(params=["pt", "shards", "pt in a bucket", "shards in a bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on disk and in a bucket."""
    layout, _, bucket_wanted = request.param.partition(" ")
    if not bucket_wanted:
        return str(tmp_path / "signal" / layout)
    bucket: Bucket = request.getfixturevalue("gcs")
    return f"{bucket.uri}/signal/{layout}/"


@pytest.fixture(params=["pt", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same on disk only."""
    return tmp_path / request.param


def test_written_and_read(place: str) -> None:
    samples = make_samples(5)
    logits = write(place, samples)
    store = open_store(place, teacher_id="org/teacher", tokenizer_hash="tokenizer-1", vocab_size=VOCAB)
    assert len(store) == 5
    found = store.get_many(samples, [1024] * 5, 2.0)
    for lookup, made in zip(found, logits, strict=True):
        assert (lookup.status, lookup.reason) == ("usable", "")
        assert isinstance(lookup.signal, SparseSignal)
        exact = torch.softmax(made / 2.0, dim=1).gather(1, lookup.signal.ids)
        torch.testing.assert_close(lookup.signal.weights, exact, rtol=2e-3, atol=1e-6)
    assert store.describe()["layout"] in place
    other = make_samples(1, prefix="other")[0]
    lookup = store.get(other, 1024, 2.0)
    assert (lookup.status, lookup.signal) == ("missing", None)
    store.close()


def test_overwriting_replaces(place: str) -> None:
    sample = make_samples(1)[0]
    write(place, [sample])
    before = open_store(place).get(sample, 1024, 1.0).signal
    store = writer(place)
    store.write(
        sample,
        len(sample.input_ids),
        CODEC.pack(CODEC.encode(random_logits(len(sample.input_ids) - 1, VOCAB, seed=9), 1, 0)),
    )
    store.finish()
    again = open_store(place)
    after = again.get(sample, 1024, 1.0).signal
    assert len(again) == 1
    assert isinstance(before, SparseSignal)
    assert isinstance(after, SparseSignal)
    assert not torch.equal(before.ids, after.ids)


def test_any_sample_id(tmp_path: Path) -> None:
    """Each has a record of its own, inside the folder; what was stored under it is what is read."""
    folder = tmp_path / "a" / "store"
    ids = [*HARD_IDS, "Case", "case", "CASE"]
    samples = [replace(sample, sample_id=id) for sample, id in zip(make_samples(len(ids)), ids, strict=True)]
    write(folder, samples)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {STORE_FILE, *map(file_name, ids)}
    assert all(path.parent == folder for path in tmp_path.rglob("*.pt"))
    store = open_store(str(folder))
    assert [store.get(sample, 1024, 2.0).status for sample in samples] == ["usable"] * len(ids)


@pytest.mark.parametrize("window", [2, 3, 63, 64, 65, 100])
def test_a_shorter_window_of_a_longer_record(folder: Path, window: int) -> None:
    sample = make_samples(1, low=100, high=100)[0]
    write(folder, [sample])
    store = open_store(str(folder))
    whole, part = store.get(sample, 1024, 2.0).signal, store.get(sample, window, 2.0).signal
    assert isinstance(whole, SparseSignal)
    assert isinstance(part, SparseSignal)
    assert part.num_positions == window - 1
    assert torch.equal(part.ids, whole.ids[: window - 1])
    torch.testing.assert_close(part.weights, whole.weights[: window - 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(part.tail_mass, whole.tail_mass[: window - 1], rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------- stale, corrupt


def status(folder: Path, sample: Sample, window: int = 1024) -> tuple[str, str]:
    lookup = open_store(str(folder)).get(sample, window, 2.0)
    assert (lookup.signal is None) == (lookup.status != "usable")
    return lookup.status, lookup.reason


def test_a_record_of_a_shorter_window_is_stale(folder: Path) -> None:
    sample = make_samples(1, low=150, high=150)[0]
    write(folder, [sample], seq_len=100)
    assert status(folder, sample, 100) == ("usable", "")
    assert status(folder, sample, 101) == ("stale", "captured at 100 tokens, 101 wanted")
    assert status(folder, sample, 1024) == ("stale", "captured at 100 tokens, 150 wanted")


def test_a_changed_text_is_stale(folder: Path) -> None:
    sample = make_samples(1, low=150, high=150)[0]
    write(folder, [sample])
    tokens = sample.input_ids.copy()
    tokens[70] += 1
    changed = replace(sample, input_ids=tokens)
    assert status(folder, changed) == ("stale", "the text differs from the captured one after token 64")
    assert status(folder, changed, 64) == ("usable", "")  # nothing changed inside this window
    longer = replace(sample, input_ids=np.concatenate([sample.input_ids, sample.input_ids]))
    assert status(folder, longer) == ("stale", "captured at 150 tokens, 300 wanted")
    assert status(folder, longer, 150) == ("usable", "")
    shorter = replace(sample, input_ids=sample.input_ids[:149])
    assert status(folder, shorter) == ("stale", "the text has 149 tokens, 150 were captured")


def test_a_record_of_another_sample_or_type_is_stale(tmp_path: Path) -> None:
    first, second = make_samples(2)
    write(tmp_path, [first, second])
    shutil.copy(tmp_path / file_name(first.sample_id), tmp_path / file_name(second.sample_id))
    assert status(tmp_path, second) == ("stale", "it is the record of math_tool sample 's/0'")
    assert status(tmp_path, replace(first, type="code")) == ("stale", "it is the record of math_tool sample 's/0'")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher": replace(IDENTITY, id="org/big")}, "captured with teacher id org/big, the store is of org/teacher"),
        ({"teacher": replace(IDENTITY, revision="c2")}, "captured with teacher revision c2, the store is of commit-1"),
        (
            {"teacher": replace(IDENTITY, tokenizer_hash="t2")},
            "captured with tokenizer hash t2, the store is of tokenizer-1",
        ),
        ({"codec": TopKCodec(5)}, "captured with codec options {'k': 5}, the store is of {'k': 4}"),
        ({"codec": FullCodec()}, "captured with codec full, the store is of topk"),
    ],
)
def test_a_foreign_record_moved_into_a_store_is_stale(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    first, second = make_samples(2)
    write(tmp_path / "ours", [first])
    write(tmp_path / "theirs", [second], **changes)
    shutil.copy(tmp_path / "theirs" / file_name(second.sample_id), tmp_path / "ours")
    assert status(tmp_path / "ours", second) == ("stale", reason)
    assert status(tmp_path / "ours", first) == ("usable", "")


def test_a_record_of_a_newer_format_is_stale(tmp_path: Path) -> None:
    sample = make_samples(1)[0]
    write(tmp_path, [sample])
    path = tmp_path / file_name(sample.sample_id)
    record = from_bytes(path.read_bytes())
    path.write_bytes(to_bytes(replace(record, header=replace(record.header, format_version=4))))
    assert status(tmp_path, sample) == ("stale", "record format 4, this program reads 3")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data[:600] + bytes(64) + data[664:], ""),
        (lambda data: b"not a record at all", "truncated or not a record"),
    ],
    ids=["half", "empty", "zeros", "text"],
)
def test_a_damaged_record_is_corrupt_and_not_complete(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    sample = make_samples(1, low=150, high=150)[0]
    write(tmp_path, [sample])
    assert writer(tmp_path).complete(sample, 1024)
    path = tmp_path / file_name(sample.sample_id)
    path.write_bytes(damage(path.read_bytes()))
    found, said = status(tmp_path, sample)
    assert found == "corrupt"
    assert reason in said
    assert not writer(tmp_path).complete(sample, 1024)


def test_a_payload_that_is_not_the_codecs_is_corrupt(folder: Path) -> None:
    sample = make_samples(1)[0]
    store = writer(folder)
    store.write(sample, len(sample.input_ids), {"gaps": torch.zeros(3)})
    store.finish()
    found, said = status(folder, sample)
    assert found == "corrupt"
    assert "not one of codec 'topk'" in said


def test_complete_means_serving_the_window(folder: Path) -> None:
    sample, other = make_samples(2, low=150, high=150)
    write(folder, [sample], seq_len=100)
    store = writer(folder)
    assert store.complete(sample, 64)
    assert store.complete(sample, 100)
    assert not store.complete(sample, 128)
    assert not store.complete(other, 64)


# --------------------------------------------------------------------------------------------------------- whole stores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": replace(IDENTITY, id="org/big")}, "the teacher id differs; got org/big; expected org/teacher"),
        ({"teacher": replace(IDENTITY, revision="c2")}, "the teacher revision differs; got c2; expected commit-1"),
        ({"codec": TopKCodec(5)}, r"the codec options differ; got \{'k': 5\}; expected \{'k': 4\}"),
        ({"codec": FullCodec()}, "the codec differs; got full; expected topk"),
        ({"vocab_size": 301}, "the vocab size differs; got 301; expected 300"),
    ],
)
def test_a_second_teacher_or_codec_is_refused(place: str, changes: dict[str, Any], message: str) -> None:
    sample = make_samples(1)[0]
    write(place, [sample])
    with pytest.raises(SignalError, match=message):
        writer(place, **changes)
    assert open_store(place).get(sample, 1024, 2.0).status == "usable"


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"teacher_id": "org/big"}, "another teacher; got org/teacher; expected org/big"),
        ({"tokenizer_hash": "t2"}, r"another tokenizer; got tokenizer-1 \(of org/teacher@commit-1\); expected t2"),
        ({"vocab_size": 512}, r"another vocabulary size; got 300 \(of org/teacher@commit-1\); expected 512"),
    ],
)
def test_a_reader_that_expects_another_is_refused(folder: Path, expected: dict[str, Any], message: str) -> None:
    write(folder, make_samples(1))
    with pytest.raises(SignalError, match=message):
        open_store(str(folder), **expected)


@pytest.mark.parametrize(("there", "wanted"), [("pt", "shards"), ("shards", "pt")])
def test_another_layout_is_refused(tmp_path: Path, there: str, wanted: str) -> None:
    sample = make_samples(1)[0]
    write(tmp_path, [sample], layout=there)
    with pytest.raises(
        SignalError, match=rf"another layout; got {wanted}; expected {there}\. Go on with --logits_format"
    ):
        writer(tmp_path, layout=wanted)
    assert status(tmp_path, sample) == ("usable", "")


def test_no_store(place: str) -> None:
    with pytest.raises(SignalError, match=r"there is no signal store here \(missing or empty folder\).*liquid capture"):
        open_store(place)


def test_a_store_without_records(place: str) -> None:
    writer(place)
    with pytest.raises(SignalError, match=r"the signal store has no record.*liquid capture"):
        open_store(place)


def test_records_without_store_file(tmp_path: Path) -> None:
    write(tmp_path, make_samples(1))
    (tmp_path / STORE_FILE).unlink()
    with pytest.raises(SignalError, match=r"no store\.json in it.*liquid capture"):
        open_store(str(tmp_path))
    with pytest.raises(SignalError, match=r"\.pt files but no store\.json.*got 1 such files"):
        writer(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"{}", b'{"format_version": "x", "layout": "pt"}', b"\xff\xfe"])
def test_a_damaged_store_file(folder: Path, contents: bytes) -> None:
    write(folder, make_samples(1))
    (folder / STORE_FILE).write_bytes(contents)
    for act in (lambda: open_store(str(folder)), lambda: writer(folder)):
        with pytest.raises(SignalError, match=r"store\.json: not a description of a signal store"):
            act()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 5}, "written by a newer program; got format 5; expected at most 4"),
        ({"versions": {"framing": 9}}, r"another way; got framing 9 \(known: at most 2\)\. Install a newer"),
        ({"layout": "tape"}, "a layout that this program does not know; got 'tape'"),
        ({"codec": "zip"}, "unknown codec"),
        ({"codec_version": 9}, r"version 9; expected version 1\. Install the newer"),
    ],
)
def test_a_store_of_a_newer_program(folder: Path, changes: dict[str, Any], message: str) -> None:
    write(folder, make_samples(1))
    values = json.loads((folder / STORE_FILE).read_text())
    (folder / STORE_FILE).write_text(json.dumps({**values, **changes}))
    with pytest.raises(SignalError, match=message):
        open_store(str(folder))


def test_other_files_beside_the_records_do_no_harm(tmp_path: Path) -> None:
    samples = make_samples(2)
    (tmp_path / "README.txt").write_text("mine")
    write(tmp_path, samples)
    (tmp_path / ".0123.tmp").write_bytes(b"left by a killed process")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / file_name(samples[0].sample_id), tmp_path / "sub" / "x.pt")
    assert len(open_store(str(tmp_path))) == 2


def test_a_temperature_outside_the_codecs_range(folder: Path) -> None:
    sample = make_samples(1)[0]
    write(folder, [sample])
    with pytest.raises(SignalError, match=r"got 0\.5; expected 0\.667 to 4"):
        open_store(str(folder)).get(sample, 1024, 0.5)


def test_description_is_plain(folder: Path) -> None:
    write(folder, make_samples(3))
    found = json.loads(json.dumps(open_store(str(folder)).describe()))
    assert (found["records"], found["teacher_id"], found["codec_options"]) == (3, "org/teacher", {"k": 4})
