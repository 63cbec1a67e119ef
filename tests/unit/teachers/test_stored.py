"""The stored teacher: its rows, what happens where records are missing, what is counted, reported and covered."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.teachers import VOCAB, ListSource, batch_of, make_samples, tiny_teacher

from liquid_llm.capture.job import capture
from liquid_llm.data.types import MicroBatch, Sample
from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import LogitsSignal, Signal, SparseSignal
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs import Codec
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.pt import file_name
from liquid_llm.signal_store.store import StoreReader, StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.stored import StoredTeacher, _spread_over_units, open_stored
from liquid_llm.teachers.teacher import TeacherSetup

BLOCK = 64


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny_teacher()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(8, low=20, high=90)


def stored(folder: Path, teacher: LoadedModel, samples: list[Sample], codec: Codec | None = None) -> StoreReader:
    writer = StoreWriter(str(folder), teacher.identity, codec or TopKCodec(16), vocab_size=VOCAB)
    summary = capture(
        {samples[0].type: [ListSource(samples)]}, {samples[0].type: writer}, teacher, seq_len=128, batch_size=2
    )
    assert summary.failed == 0
    return open_store(str(folder))


def asked(teacher: StoredTeacher, batch: MicroBatch, temperature: float = 2.0) -> Signal | None:
    prepared = teacher.prepare(batch, temperature)
    return None if prepared is None else teacher.signal(batch, prepared)


# ------------------------------------------------------------------------------------------------------ rows and values


@pytest.mark.parametrize("codec", [FullCodec(), TopKCodec(VOCAB)], ids=lambda codec: codec.name)
def test_stored_rows_are_what_the_online_teacher_says(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], codec: Codec
) -> None:
    """Captured at 128 tokens in other batches, read in windows of 64: row by row the same distribution."""
    batch = batch_of(samples, BLOCK)
    reader = StoredTeacher(stored(tmp_path, teacher, samples, codec), strict=True)
    signal = asked(reader, batch)
    dense = OnlineTeacher(teacher, VOCAB).signal(batch)
    exact = torch.softmax(dense.head.logits(dense.hidden) / 2.0, dim=1)
    if isinstance(signal, LogitsSignal):
        found = torch.softmax(signal.rows.float() / 2.0, dim=1)
    else:
        assert isinstance(signal, SparseSignal)
        found = torch.zeros_like(exact).scatter_(1, signal.ids, signal.weights)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-5)
    assert float((found - exact).abs().sum(1).max()) < 2e-3


@pytest.mark.parametrize("codec", [FullCodec(), TopKCodec(16)], ids=lambda codec: codec.name)
def test_a_sample_without_record_is_masked(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], codec: Codec
) -> None:
    store = stored(tmp_path, teacher, samples[:2] + samples[3:], codec)
    reader = StoredTeacher(store, strict=False)
    batch = batch_of(samples, BLOCK)
    signal = asked(reader, batch)
    assert isinstance(signal, (LogitsSignal, SparseSignal))
    rows = [min(len(sample.input_ids), BLOCK) - 1 for sample in samples]
    expected = [place != 2 for place, count in enumerate(rows) for _ in range(count)]
    assert signal.mask.tolist() == expected
    assert reader.counts == {("math_tool", "missing"): 1, ("math_tool", "usable"): 7}


# --------------------------------------------------------------------------------------------------- strict, reporting


def test_strict_skips_a_batch_with_any_record_missing(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    reader = StoredTeacher(stored(tmp_path, teacher, samples[1:]), strict=True)
    with caplog.at_level(logging.WARNING):
        assert asked(reader, batch_of(samples)) is None
        assert asked(reader, batch_of(samples[:2])) is None
        assert isinstance(asked(reader, batch_of(samples[1:])), SparseSignal)
    (record,) = caplog.records
    assert record.getMessage() == (
        "math_tool: KD is skipped for micro-batches with a sample that has no usable signal; "
        f"the first is sample 's/0': missing (no record in {tmp_path})"
    )


def test_strict_warns_once_for_each_type(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with their records; one teacher may stand for several types."""
    stored(tmp_path, teacher, samples[1:])
    (tmp_path / file_name(samples[1].sample_id)).write_bytes(b"cut")
    code = make_samples(4, type="code", prefix="c")
    reader = StoredTeacher(stored(tmp_path, teacher, code[1:]), strict=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert asked(reader, batch_of(samples)) is None
            assert asked(reader, batch_of(code)) is None
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == ["code", "math_tool"]


def test_each_kind_of_trouble_is_counted_and_reported_once(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, teacher, samples)
    for sample in samples[:2]:
        (tmp_path / file_name(sample.sample_id)).write_bytes(b"cut")
    (tmp_path / file_name(samples[2].sample_id)).unlink()
    changed = [replace(s, input_ids=np.roll(s.input_ids, 1)) if s is samples[3] else s for s in samples]
    reader = StoredTeacher(open_store(str(tmp_path)), strict=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert isinstance(asked(reader, batch_of(changed)), SparseSignal)
    assert {status: n for (_, status), n in reader.counts.items()} == {
        "corrupt": 4,
        "missing": 2,
        "stale": 2,
        "usable": 8,
    }
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "corrupt signal train on cross-entropy; the first is sample 's/0': corrupt (truncated" in messages[0]
    assert "missing signal train on cross-entropy; the first is sample 's/2'" in messages[1]
    assert "'s/3': stale (the text differs from the captured one after token 0)" in messages[2]


@pytest.mark.parametrize("strict", [True, False])
def test_no_usable_record_is_no_signal(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], strict: bool
) -> None:
    store = stored(tmp_path, teacher, make_samples(1, prefix="other"))
    reader = StoredTeacher(store, strict=strict)
    assert asked(reader, batch_of(samples)) is None


def test_prepared_in_threads_as_in_turn(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    reader = StoredTeacher(stored(tmp_path, teacher, samples), strict=False)
    batches = [batch_of(samples[n : n + 3], BLOCK) for n in range(6)] * 5

    def signal_of(batch: MicroBatch) -> Signal | None:
        prepared = reader.prepare(batch, 2.0)
        return None if prepared is None else prepared.signal

    alone = [signal_of(batch) for batch in batches[:6]] * 5
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(signal_of, batches))
    for a, b in zip(alone, together, strict=True):
        assert isinstance(a, SparseSignal)
        assert isinstance(b, SparseSignal)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
    assert reader.counts["math_tool", "usable"] == 3 * 36


def test_blocks_that_join_several_samples_are_refused(tmp_path: Path, teacher: LoadedModel) -> None:
    documents = make_samples(3, type="lm", low=20, high=40)
    reader = StoredTeacher(stored(tmp_path, teacher, documents), strict=False)
    assert isinstance(asked(reader, batch_of(documents)), SparseSignal)
    block = replace(batch_of(make_samples(1, type="lm", low=BLOCK, high=BLOCK)), samples=())
    with pytest.raises(SignalError, match=r"cannot serve blocks that join several; got a lm block"):
        reader.prepare(block, 2.0)


# ------------------------------------------------------------------------------------------------------------ coverage


def test_coverage_of_a_run(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    reader = StoredTeacher(stored(tmp_path, teacher, samples[:6]), strict=False)
    halves = [ListSource(samples[:3]), ListSource(samples[3:])]
    row = reader.coverage(halves, BLOCK).as_dict()
    assert row == {"samples": 8, "listed": 6, "checked": 6, "usable": 6, "problem": ""}
    assert json.loads(json.dumps(row)) == row
    every = reader.coverage(halves, BLOCK, every=True)
    assert every.statuses == {"usable": 6, "missing": 2}
    assert every.examples == {"missing": f"sample 's/6' is missing: no record in {tmp_path}"}
    assert not reader.counts  # a check is no use


def test_what_is_wrong_with_the_records_is_said(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    reader = StoredTeacher(stored(tmp_path, teacher, samples), strict=False)
    changed = [replace(sample, input_ids=np.roll(sample.input_ids, 1)) for sample in samples]
    found = reader.coverage([ListSource(changed)], BLOCK)
    assert (found.usable, found.statuses) == (0, {"stale": 8})
    assert found.problem.startswith("sample 's/0' is stale: the text differs")
    others = make_samples(3, prefix="other")
    assert reader.coverage([ListSource(others)], BLOCK).problem == "none has a record"


def test_one_usable_record_among_many_stale_ones_is_found(tmp_path: Path, teacher: LoadedModel) -> None:
    many = make_samples(150, low=3, high=6)
    reader = StoredTeacher(stored(tmp_path, teacher, many), strict=False)
    changed = [s if n == 148 else replace(s, input_ids=np.roll(s.input_ids, 1)) for n, s in enumerate(many)]
    found = reader.coverage([ListSource(changed)], BLOCK)
    assert found.usable == 1
    assert found.checked > 64


# ------------------------------------------------------------------------------------------------------------ the maker


def test_the_maker_opens_the_store_that_it_was_told_to_expect(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample]
) -> None:
    stored(tmp_path / "store", teacher, samples)
    setup = TeacherSetup(
        tokenizer=None,
        tokenizer_hash=teacher.identity.tokenizer_hash,
        vocab_size=VOCAB,
        context=BLOCK,
        device=torch.device("cpu"),
        cache=tmp_path / "cache",
        stored_id=teacher.identity.id,
    )
    made = open_stored(str(tmp_path / "store"), setup)
    assert made.temperature_range == TopKCodec(16).temperature_range
    assert made.describe()["teacher_id"] == teacher.identity.id
    for wrong in (
        replace(setup, stored_id="org/other"),
        replace(setup, tokenizer_hash="other"),
        replace(setup, vocab_size=VOCAB + 1),
    ):
        with pytest.raises(SignalError, match="the store is of another") as raised:
            open_stored(str(tmp_path / "store"), wrong)
        # The same teacher's signal, captured anew, would be of the same other tokenizer.
        helps = "helps only where" in str(raised.value)
        assert helps == ("another tokenizer" in str(raised.value))


def test_closing_says_how_often_records_served(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    reader = StoredTeacher(stored(tmp_path, teacher, samples[1:]), strict=False)
    asked(reader, batch_of(samples))
    with caplog.at_level(logging.INFO, "liquid_llm.teachers"):
        reader.close()
    assert caplog.records[-1].getMessage() == "math_tool: stored signal asked for: 1 missing, 7 usable"


class OfUnits:
    """Samples of which it is told how many are of each unit."""

    def __init__(self, **counts: int) -> None:
        self.shards, self.counts = list(counts), np.array(list(counts.values()))

    def __len__(self) -> int:
        return int(self.counts.sum())

    def sample_id(self, index: int) -> str:
        return str(index)

    def sample(self, index: int) -> Sample:
        raise AssertionError(f"sample {index} is looked at")


def test_the_samples_that_are_looked_at_are_of_complete_units() -> None:
    one, other = OfUnits(a=40, b=100, c=7, d=90), OfUnits(a=3)
    places, samples, listed = _spread_over_units([one, other], frozenset("bd"))
    assert (samples, listed) == (240, 190)
    ours = [index for dataset, index in places if dataset is one]
    assert {40 <= index < 140 or 147 <= index < 237 for index in ours} == {True}
    assert (ours[0], ours[-1], len(set(ours))) == (40, 236, len(ours))
    assert [index for dataset, index in places if dataset is other] == [0, 1, 2], "of none that is complete, any"
