"""The router: which teacher answers, what happens where records are missing, what is counted and reported."""

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
from liquid_llm.errors import DataError, SignalError
from liquid_llm.losses.signals import DenseSignal, LogitsSignal, SparseSignal
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs import Codec, FullCodec, TopKCodec
from liquid_llm.signal_store.records import file_name
from liquid_llm.signal_store.store import StoreReader, StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.router import TeacherRouter

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


def lm_block() -> MicroBatch:
    block = make_samples(1, type="lm", low=BLOCK, high=BLOCK)[0]
    return replace(batch_of([block]), samples=())


def routed(router: TeacherRouter, batch: MicroBatch, temperature: float = 2.0) -> object:
    return router.signal(batch, router.prepare(batch, temperature))


# -------------------------------------------------------------------------------------------------------------- routes


def test_each_type_goes_to_its_teacher(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    online = OnlineTeacher(teacher, VOCAB)
    router = TeacherRouter(online, {"math_tool": stored(tmp_path, teacher, samples)}, strict=True, online_types=["lm"])
    block = lm_block()
    dense = routed(router, block)
    assert isinstance(dense, DenseSignal)
    assert dense.num_positions == block.num_positions
    batch = batch_of(samples, BLOCK)
    sparse = routed(router, batch)
    assert isinstance(sparse, SparseSignal)
    assert sparse.num_positions == batch.num_positions
    assert routed(router, batch_of(make_samples(2, type="code"))) is None
    router.close()


def test_online_types_win_over_a_store(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    store = stored(tmp_path, teacher, samples)
    router = TeacherRouter(
        OnlineTeacher(teacher, VOCAB), {"math_tool": store}, strict=True, online_types=["lm", "math_tool", "code"]
    )
    for batch in (lm_block(), batch_of(samples), batch_of(make_samples(2, type="code"))):
        assert isinstance(routed(router, batch), DenseSignal)


def test_without_any_teacher_there_is_no_signal() -> None:
    router = TeacherRouter(None, {}, strict=True, online_types=["lm"])
    assert routed(router, lm_block()) is None
    assert router.coverage({"math_tool": [ListSource(make_samples(2))]}, window=BLOCK) == {}


def test_lm_from_a_store_needs_whole_samples(tmp_path: Path, teacher: LoadedModel) -> None:
    documents = make_samples(3, type="lm", low=20, high=40)
    router = TeacherRouter(None, {"lm": stored(tmp_path, teacher, documents)}, strict=False, online_types=[])
    assert isinstance(routed(router, batch_of(documents)), SparseSignal)
    with pytest.raises(SignalError, match=r"cannot serve blocks that join several; got a lm block"):
        router.prepare(lm_block(), 2.0)


# ------------------------------------------------------------------------------------------------------ rows and values


@pytest.mark.parametrize("codec", [FullCodec(), TopKCodec(VOCAB)], ids=lambda codec: codec.name)
def test_stored_rows_are_what_the_online_teacher_says(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], codec: Codec
) -> None:
    """Captured at 128 tokens in other batches, read in windows of 64: row by row the same distribution."""
    batch = batch_of(samples, BLOCK)
    router = TeacherRouter(None, {"math_tool": stored(tmp_path, teacher, samples, codec)}, strict=True, online_types=[])
    signal = routed(router, batch)
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
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    batch = batch_of(samples, BLOCK)
    signal = routed(router, batch)
    assert isinstance(signal, (LogitsSignal, SparseSignal))
    rows = [min(len(sample.input_ids), BLOCK) - 1 for sample in samples]
    expected = [place != 2 for place, count in enumerate(rows) for _ in range(count)]
    assert signal.mask.tolist() == expected
    assert router.counts.as_dict() == {"math_tool": {"missing": 1, "usable": 7}}


# --------------------------------------------------------------------------------------------------- strict, reporting


def test_strict_skips_a_batch_with_any_record_missing(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(tmp_path, teacher, samples[1:])
    router = TeacherRouter(None, {"math_tool": store}, strict=True, online_types=[])
    with caplog.at_level(logging.WARNING):
        assert routed(router, batch_of(samples)) is None
        assert routed(router, batch_of(samples[:2])) is None
        assert isinstance(routed(router, batch_of(samples[1:])), SparseSignal)
    (record,) = caplog.records
    assert record.getMessage() == (
        "math_tool: KD is skipped for micro-batches with a sample that has no usable signal; "
        f"the first is sample 's/0': missing (no record in {tmp_path})"
    )


def test_strict_warns_once_for_each_type(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    code = make_samples(4, type="code", prefix="c")
    stores = {
        "math_tool": stored(tmp_path / "math", teacher, samples[1:]),
        "code": stored(tmp_path / "code", teacher, code[1:]),
    }
    router = TeacherRouter(None, stores, strict=True, online_types=[])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert routed(router, batch_of(samples)) is None
            assert routed(router, batch_of(code)) is None
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == ["code", "math_tool"]


def test_each_kind_of_trouble_is_counted_and_reported_once(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, teacher, samples)
    for sample in samples[:2]:
        (tmp_path / file_name(sample.sample_id)).write_bytes(b"cut")
    (tmp_path / file_name(samples[2].sample_id)).unlink()
    changed = [replace(s, input_ids=np.roll(s.input_ids, 1)) if s is samples[3] else s for s in samples]
    router = TeacherRouter(None, {"math_tool": open_store(str(tmp_path))}, strict=False, online_types=[])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert isinstance(routed(router, batch_of(changed)), SparseSignal)
    assert router.counts.as_dict() == {"math_tool": {"corrupt": 4, "missing": 2, "stale": 2, "usable": 8}}
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
    router = TeacherRouter(None, {"math_tool": store}, strict=strict, online_types=[])
    assert routed(router, batch_of(samples)) is None


def test_prepared_in_threads_as_in_turn(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    router = TeacherRouter(None, {"math_tool": stored(tmp_path, teacher, samples)}, strict=False, online_types=[])
    batches = [batch_of(samples[n : n + 3], BLOCK) for n in range(6)] * 5
    alone = [router.prepare(batch, 2.0).stored for batch in batches[:6]] * 5
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda batch: router.prepare(batch, 2.0).stored, batches))
    for a, b in zip(alone, together, strict=True):
        assert isinstance(a, SparseSignal)
        assert isinstance(b, SparseSignal)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
    assert router.counts.as_dict()["math_tool"]["usable"] == 3 * 36


def test_temperatures_are_checked_before_the_run(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    store = stored(tmp_path, teacher, samples)
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    router.check_temperatures([1.0, 2.0, 4.0])
    with pytest.raises(SignalError, match=r"got 5; expected 0\.667 to 4"):
        router.check_temperatures([1.0, 5.0])


# ------------------------------------------------------------------------------------------------------------ coverage


def test_coverage_of_a_run(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    store = stored(tmp_path, teacher, samples[:6])
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    found = router.coverage({"math_tool": [ListSource(samples[:3]), ListSource(samples[3:])], "code": []}, window=BLOCK)
    assert found.keys() == {"math_tool"}
    row = found["math_tool"].as_dict()
    assert row == {"samples": 8, "listed": 6, "checked": 6, "usable": 6, "problem": ""}
    assert json.loads(json.dumps(row)) == row
    assert router.counts.as_dict() == {}  # a check is no use


def test_no_record_in_a_whole_run_is_an_error(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    store = stored(tmp_path, teacher, make_samples(1, prefix="other"))
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    with pytest.raises(
        DataError, match=r"no sample of this run has usable stored signal; got math_tool: 8 samples, none has a record"
    ):
        router.coverage({"math_tool": [ListSource(samples)]}, window=BLOCK)


def test_nothing_but_stale_records_is_an_error(tmp_path: Path, teacher: LoadedModel, samples: list[Sample]) -> None:
    store = stored(tmp_path, teacher, samples)
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    changed = [replace(sample, input_ids=np.roll(sample.input_ids, 1)) for sample in samples]
    with pytest.raises(DataError, match=r"sample 's/0' is stale: the text differs"):
        router.coverage({"math_tool": [ListSource(changed)]}, window=BLOCK)


def test_one_usable_record_among_many_stale_ones_is_found(tmp_path: Path, teacher: LoadedModel) -> None:
    many = make_samples(150, low=3, high=6)
    store = stored(tmp_path, teacher, many)
    router = TeacherRouter(None, {"math_tool": store}, strict=False, online_types=[])
    changed = [s if n == 148 else replace(s, input_ids=np.roll(s.input_ids, 1)) for n, s in enumerate(many)]
    found = router.coverage({"math_tool": [ListSource(changed)]}, window=BLOCK)["math_tool"]
    assert found.usable >= 1
    assert found.checked > 64


def test_one_type_without_signal_is_a_warning(
    tmp_path: Path, teacher: LoadedModel, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    code = make_samples(2, type="code", prefix="c")
    stores = {
        "math_tool": stored(tmp_path / "math", teacher, samples),
        "code": stored(tmp_path / "code", teacher, make_samples(1, type="code", prefix="other")),
    }
    router = TeacherRouter(None, stores, strict=False, online_types=[])
    with caplog.at_level(logging.WARNING):
        found = router.coverage({"math_tool": [ListSource(samples)], "code": [ListSource(code)]}, window=BLOCK)
    assert found["code"].usable == 0
    assert [r.getMessage() for r in caplog.records] == [
        "code: no sample has usable stored signal (none has a record): plain cross-entropy"
    ]
