"""The capture job: what it writes, skips, refuses and survives."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.gcs import Bucket
from tests.support.teachers import IDENTITY, VOCAB, ListSource, make_samples, tiny_teacher, with_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from liquid_llm.capture import scoring
from liquid_llm.capture.job import CaptureSummary, Failure, capture
from liquid_llm.capture.plan import Window, batches, plan
from liquid_llm.capture.units import UnitsSummary
from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError, StorageError, UsageError
from liquid_llm.losses.products import HeadProducts
from liquid_llm.losses.signals import LogitsSignal, SparseSignal
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs import Codec, Rows
from liquid_llm.signal_store.codecs.base import TOP, Run
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.sampled import SampledCodec
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.pt import file_name, from_bytes
from liquid_llm.signal_store.store import StoreWriter, open_store
from liquid_llm.teachers.online import OnlineTeacher

CODEC = TopKCodec(8)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny_teacher()


def run(folder: Path | str, samples: Sequence[Sample], teacher: LoadedModel, **changes: Any) -> CaptureSummary:
    codec = changes.pop("codec", CODEC)
    writer = StoreWriter(str(folder), teacher.identity, codec, vocab_size=VOCAB)
    kinds = sorted({sample.type for sample in samples})
    datasets = {kind: [ListSource(sample for sample in samples if sample.type == kind)] for kind in kinds}
    return capture(datasets, dict.fromkeys(kinds, writer), teacher, **{"seq_len": 100, "batch_size": 2, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


# ------------------------------------------------------------------------------------------------------ what it writes


def test_every_sample_has_the_teachers_own_distribution(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(20)
    summary = run(tmp_path, samples, teacher, codec=FullCodec())
    store = open_store(str(tmp_path))
    for sample in samples:
        window = sample.input_ids[:100]
        signal = store.get(sample, 100, 1.0).signal
        assert isinstance(signal, LogitsSignal)
        with torch.no_grad():
            exact = teacher.model(torch.tensor(window[None], dtype=torch.int64)).logits[0, :-1, :VOCAB]
        torch.testing.assert_close(torch.softmax(signal.rows.float(), 1), torch.softmax(exact, 1), rtol=5e-2, atol=1e-4)
    assert summary.written == len(store) == 20


def test_summary_and_progress(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = [*make_samples(12), *make_samples(8, type="code", prefix="c")]
    done: list[int] = []
    summary = run(tmp_path, samples, teacher, progress=done.append)
    tokens = sum(min(len(sample.input_ids), 100) for sample in samples)
    assert (summary.written, summary.skipped, summary.failed) == (20, 0, 0)
    assert summary.tokens == tokens == sum(done)
    assert summary.positions == tokens - 20
    assert summary.padded_tokens <= tokens / 0.95
    assert summary.bytes == sum(map(len, contents(tmp_path).values()))
    assert summary.bytes_per_token == summary.bytes / summary.positions
    assert not summary.interrupted
    line = json.loads(json.dumps(summary.as_dict()))
    assert line["tokens_per_second"] > 0
    assert line["failures"] == []


def test_header(tmp_path: Path, teacher: LoadedModel) -> None:
    sample = make_samples(1, low=150, high=150)[0]
    run(tmp_path, [sample], teacher)
    header = from_bytes((tmp_path / file_name(sample.sample_id)).read_bytes()).header
    assert (header.sample_id, header.type, header.num_tokens) == ("s/0", "math_tool", 100)
    assert (header.identity.teacher_id, header.identity.teacher_revision) == (IDENTITY.id, IDENTITY.revision)
    assert (header.identity.codec, header.identity.codec_options, header.identity.vocab_size) == (
        "topk",
        {"k": 8},
        VOCAB,
    )


def test_a_longer_capture_serves_a_shorter_window_as_a_direct_one(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(10, low=20, high=150)
    run(tmp_path / "long", samples, teacher, seq_len=128)
    run(tmp_path / "short", samples, teacher, seq_len=40, batch_size=3)
    long, short = open_store(str(tmp_path / "long")), open_store(str(tmp_path / "short"))
    for sample in samples:
        a, b = long.get(sample, 40, 2.0).signal, short.get(sample, 40, 2.0).signal
        assert isinstance(a, SparseSignal)
        assert isinstance(b, SparseSignal)
        assert a.num_positions == b.num_positions == min(len(sample.input_ids), 40) - 1
        torch.testing.assert_close(a.tail_mass, b.tail_mass, rtol=1e-2, atol=1e-4)
        dense = [torch.zeros(s.num_positions, VOCAB).scatter_(1, s.ids, s.weights) for s in (a, b)]
        torch.testing.assert_close(dense[0], dense[1], rtol=1e-2, atol=1e-3)  # near-equal logits may swap at the k-th


def test_a_sample_of_one_token_has_an_empty_record(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(3, low=1, high=1)
    assert run(tmp_path, samples, teacher).written == 3
    lookup = open_store(str(tmp_path)).get(samples[0], 100, 2.0)
    assert lookup.signal is not None
    assert lookup.signal.num_positions == 0


def test_a_sample_without_tokens_fails_alone(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = [*make_samples(3, low=9, high=9), *make_samples(2, low=0, high=0, prefix="empty")]
    summary = run(tmp_path, samples, teacher)
    assert (summary.written, summary.failed, summary.positions) == (3, 2, 24)
    assert summary.failures[0].reason == "the sample has no tokens."


def test_nothing_to_do(tmp_path: Path, teacher: LoadedModel) -> None:
    writer = StoreWriter(str(tmp_path), IDENTITY, CODEC, vocab_size=VOCAB)
    summary = capture({"math_tool": [ListSource([])]}, {"math_tool": writer}, teacher, seq_len=100, batch_size=2)
    assert (summary.written, summary.bytes_per_token) == (0, None)


def test_to_a_bucket_and_resumed_there(gcs: Bucket, teacher: LoadedModel) -> None:
    samples = make_samples(12)
    uri = f"{gcs.uri}/teacher/logits/math/"
    assert run(uri, samples[:7], teacher).written == 7
    summary = run(uri, samples, teacher)
    assert (summary.written, summary.skipped) == (5, 7)
    store = open_store(uri)
    assert {lookup.status for lookup in store.get_many(samples, [100] * 12, 2.0)} == {"usable"}
    store.close()


# --------------------------------------------------------------------------------------------------------------- resume


def test_complete_records_are_skipped_and_others_made(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(10, low=20)
    assert run(tmp_path, samples, teacher).written == 10
    before = contents(tmp_path)
    names = [file_name(sample.sample_id) for sample in samples]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes(before[names[1]][:-30])
    (tmp_path / names[2]).write_bytes(b"")
    (tmp_path / names[3]).write_bytes(before[names[4]])
    done: list[int] = []
    summary = run(tmp_path, samples, teacher, progress=done.append)
    assert (summary.written, summary.skipped) == (4, 6)
    assert sum(done) == sum(min(len(sample.input_ids), 100) for sample in samples)
    assert contents(tmp_path).keys() == before.keys()
    store = open_store(str(tmp_path))
    assert {store.get(sample, 100, 2.0).status for sample in samples} == {"usable"}


def test_overwrite_makes_all_again_and_equal(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(10)
    run(tmp_path, samples, teacher)
    before = contents(tmp_path)
    path = tmp_path / file_name(samples[0].sample_id)
    path.write_bytes(b"damaged")
    summary = run(tmp_path, samples, teacher, overwrite=True)
    assert (summary.written, summary.skipped) == (10, 0)
    assert contents(tmp_path) == before


def test_a_longer_window_captures_only_what_was_cut(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = [*make_samples(4, low=90, high=90), *make_samples(3, low=20, high=30, prefix="short")]
    run(tmp_path, samples, teacher, seq_len=64)
    summary = run(tmp_path, samples, teacher, seq_len=100)
    assert (summary.written, summary.skipped) == (4, 3)
    again = run(tmp_path, samples, teacher, seq_len=64)
    assert (again.written, again.skipped) == (0, 7)  # the longer records serve the shorter window


def test_stopped_early_and_gone_on_with(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(30, low=50)
    asked: list[None] = []

    def stopping() -> bool:
        asked.append(None)
        return len(asked) > 3

    first = run(tmp_path, samples, teacher, stopping=stopping)
    assert first.interrupted
    assert 0 < first.written < 30
    assert len(contents(tmp_path)) == first.written
    second = run(tmp_path, samples, teacher)
    assert (second.written, second.skipped, second.interrupted) == (30 - first.written, first.written, False)


def test_ranks_take_disjoint_samples_whatever_their_number(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(40, high=30)
    first = [run(tmp_path, samples, teacher, rank=rank, world_size=3) for rank in (0, 2)]  # rank 1 never ran
    assert all(5 < summary.written < 22 for summary in first)
    written = sum(summary.written for summary in first)
    assert len(contents(tmp_path)) == written
    second = [run(tmp_path, samples, teacher, rank=rank, world_size=2) for rank in (0, 1)]
    assert sum(summary.written for summary in second) == 40 - written
    assert sum(summary.skipped for summary in second) == written
    assert len(contents(tmp_path)) == 40


# ------------------------------------------------------------------------------------------------------------- failures


def failing_on(teacher: LoadedModel, *, token: int | None = None, rows: int | None = None) -> LoadedModel:
    """A copy of the teacher whose forward fails on a token, or on more than so many rows, as torch does."""
    model = tiny_teacher().model

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if (rows is not None and ids.shape[0] > rows) or (token is not None and bool((ids == token).any())):
            raise RuntimeError("no such kernel\nand more")

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return replace(teacher, model=model)


def test_a_sample_the_teacher_fails_on(tmp_path: Path, teacher: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    samples = [replace(s, input_ids=s.input_ids % 290) for s in make_samples(12, low=20, high=22)]
    samples[5] = replace(samples[5], input_ids=np.append(samples[5].input_ids, 295))
    with caplog.at_level(logging.WARNING):
        summary = run(tmp_path, samples, failing_on(teacher, token=295))
    assert (summary.written, summary.failed) == (11, 1)
    assert summary.failures[0]._asdict() == {
        "sample_id": "s/5",
        "type": "math_tool",
        "reason": "the teacher failed: RuntimeError: no such kernel",
    }
    assert "math_tool sample 's/5' is not captured: the teacher failed" in caplog.text
    assert summary.as_dict()["failures"] == [summary.failures[0]._asdict()]


def test_a_batch_too_large_is_done_one_by_one(tmp_path: Path, teacher: LoadedModel) -> None:
    summary = run(tmp_path, make_samples(12, low=20, high=22), failing_on(teacher, rows=1))
    assert (summary.written, summary.failed) == (12, 0)


def test_a_token_outside_the_vocabulary(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(6, low=20, high=20)
    samples[2] = replace(samples[2], input_ids=np.full(20, 100_000, np.int32))
    summary = run(tmp_path, samples, teacher)
    assert (summary.written, summary.failed) == (5, 1)
    assert summary.failures[0].reason == "a token outside the vocabulary; got 100000; expected under 300."


def test_many_failures_are_counted_and_the_first_are_kept() -> None:
    """What a summary holds does not grow with what fails, nor with how many reasons there are."""
    whole, parts = CaptureSummary(), [CaptureSummary() for _ in range(3)]
    for number in range(3_000):
        reason = "of another kind" if number % 3 else f"a token outside the vocabulary; got {number}; expected less."
        failure = Failure(f"s/{number}", "math_tool", reason)
        assert whole.fail(failure) == (number < 20)
        parts[number % 3].fail(failure)
    assert whole.failed == 3_000
    assert not whole.is_whole
    assert [one.sample_id for one in whole.failures] == [f"s/{number}" for number in range(20)]
    assert whole.reasons == {"of another kind": 2_000, "a token outside the vocabulary": 1_000}
    assert whole.as_dict()["failures"][0]["sample_id"] == "s/0"
    total = UnitsSummary()
    for part in parts:
        total.add(part)
    assert (total.failed, total.reasons, len(total.failures)) == (3_000, whole.reasons, 20)
    for number in range(1_000):
        whole.fail(Failure("s", "math_tool", f"each its own: {number}"))
    assert len(whole.reasons) == 51
    assert sum(whole.reasons.values()) == whole.failed == 4_000
    assert whole.reasons["other reasons"] == 1_000 - 48


def test_logits_that_are_not_finite(tmp_path: Path, teacher: LoadedModel) -> None:
    broken = replace(teacher, model=tiny_teacher(tie_word_embeddings=False).model)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[295] = float("nan")
    samples = [replace(s, input_ids=s.input_ids % 290) for s in make_samples(6, low=20, high=20)]
    samples[4].input_ids[7] = 295
    summary = run(tmp_path, samples, broken)
    assert (summary.written, summary.failed) == (5, 1)
    assert summary.failures[0].sample_id == "s/4"
    assert "not finite" in summary.failures[0].reason


def blocked(folder: Path, samples: Sequence[Sample]) -> None:
    """Put a folder where a record would go: renaming a file to its name fails, whoever tries."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (folder / file_name(sample.sample_id) / "x").mkdir(parents=True)


def test_a_record_that_cannot_be_written(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(10)
    blocked(tmp_path, samples[3:4])
    summary = run(tmp_path, samples, teacher)
    assert (summary.written, summary.failed) == (9, 1)
    assert summary.failures[0].sample_id == "s/3"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("count", [1, 12])
def test_a_place_where_nothing_can_be_written(tmp_path: Path, teacher: LoadedModel, count: int) -> None:
    samples = make_samples(count)
    blocked(tmp_path, samples)
    with pytest.raises(StorageError):
        run(tmp_path, samples, teacher)


def test_writing_that_keeps_failing_ends_the_job(tmp_path: Path, teacher: LoadedModel) -> None:
    """Storage has retried each of them: after three in a row the teacher is not kept busy for nothing."""
    samples = make_samples(30)
    blocked(tmp_path, [sample for sample in samples if len(sample.input_ids) < 100])
    done: list[int] = []
    with pytest.raises(StorageError):
        run(tmp_path, samples, teacher, progress=done.append, num_workers=1, batch_size=1)
    assert len(contents_of_files(tmp_path)) == sum(len(sample.input_ids) >= 100 for sample in samples) > 0
    assert len(done) < 30


def test_a_store_that_fails_at_the_end_takes_no_other_with_it(
    tmp_path: Path, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are published by ``finish``: that of the second type comes, and the first error is the one raised."""
    kinds = ("math_tool", "code", "general")
    samples = {kind: make_samples(3, type=kind, prefix=kind) for kind in kinds}
    writers = {
        kind: StoreWriter(str(tmp_path / kind), teacher.identity, CODEC, vocab_size=VOCAB, layout="shards")
        for kind in kinds
    }

    def refused(kind: str) -> int:
        raise StorageError("the disk is full", where=kind)

    for kind in ("math_tool", "general"):
        monkeypatch.setattr(writers[kind], "finish", lambda kind=kind: refused(kind))
    datasets = {kind: [ListSource(iter(samples[kind]))] for kind in kinds}
    with pytest.raises(StorageError, match="math_tool: the disk is full"):
        capture(datasets, writers, teacher, seq_len=100, batch_size=2)
    assert len(open_store(str(tmp_path / "code"))) == 3


def contents_of_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.pt") if path.is_file()]


def test_a_window_longer_than_the_teacher_can_see(tmp_path: Path) -> None:
    teacher = tiny_teacher("gpt2", max_position_embeddings=64)
    with pytest.raises(
        UsageError, match=r"seq_len: the teacher cannot see so long a context; got 65; expected at most 64"
    ):
        run(tmp_path, make_samples(2), teacher, seq_len=65)
    assert run(tmp_path, make_samples(2, low=70), teacher, seq_len=64).written == 2


# ------------------------------------------------------------------------------------------------------ plan, batches


def planned(tmp_path: Path, samples: Sequence[Sample]) -> Any:
    writer = StoreWriter(str(tmp_path), IDENTITY, CODEC, vocab_size=VOCAB)
    datasets = {kind: [ListSource(s for s in samples if s.type == kind)] for kind in ("math_tool", "code")}
    with ThreadPoolExecutor(1) as threads:
        writers = {"math_tool": writer, "code": writer}
        return plan(datasets, writers, 100, overwrite=False, share=(0, 1), threads=threads)


def test_the_same_sample_twice_is_done_once(tmp_path: Path) -> None:
    first, second = make_samples(2)
    found = planned(tmp_path, [first, second, first])
    assert [item.sample_id for item in found.todo] == ["s/0", "s/1"]
    assert (found.skipped, found.skipped_tokens, found.refused) == (1, min(len(first.input_ids), 100), [])


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    first, second = make_samples(2)
    found = planned(tmp_path, [first, replace(second, sample_id=first.sample_id), replace(first, type="code")])
    assert [item.sample_id for item in found.todo] == ["s/0"]
    reasons = [(item.type, reason) for item, reason in found.refused]
    assert reasons == [
        ("math_tool", "another text has the same sample id"),
        ("code", "another sample of type math_tool has the same sample id"),
    ]


@given(lengths=st.lists(st.integers(1, 1024), max_size=200), budget=st.integers(1, 8192))
def test_batches_keep_to_the_budget_and_hardly_pad(lengths: list[int], budget: int) -> None:
    items = [Window(ListSource([]), n, str(n), "code", length) for n, length in enumerate(lengths)]
    found = batches(items, budget)
    assert sorted(item.index for batch in found for item in batch) == list(range(len(items)))
    assert [item.num_tokens for batch in found for item in batch] == sorted(lengths, reverse=True)
    for batch in found:
        padded = len(batch) * max(item.num_tokens for item in batch)
        assert padded <= budget or len(batch) == 1
        assert padded - sum(item.num_tokens for item in batch) <= 0.05 * padded


def test_many_near_equal_samples_share_batches() -> None:
    items = [Window(ListSource([]), n, str(n), "code", 100 + n % 10) for n in range(400)]
    assert len(batches(items, 4096)) <= 12


# -------------------------------------------------------------------------------------------------------------- scoring


class DrawCodec(TopKCodec):
    """A codec that draws a random number a row, as sampling codecs do."""

    def encode_runs(self, logits: torch.Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        draws = [torch.arange(run.start, run.start + run.count) + run.seed % 1_000_003 for run in runs]
        return {"draw": torch.cat(draws), TOP: logits.amax(dim=1)}


def drawn(teacher: LoadedModel, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    source = ListSource(samples)
    items = [Window(source, n, s.sample_id, s.type, len(s.input_ids)) for n, s in enumerate(samples)]
    codecs: dict[str, Codec] = {"math_tool": DrawCodec(1)}
    found = {}
    for item, rows, _ in scoring.score(OnlineTeacher(teacher, VOCAB), items, codecs, scoring.Scratch()):
        assert isinstance(rows, dict)
        found[item.sample_id] = rows["draw"]
    return found


def test_draws_depend_on_the_sample_alone(teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CPU_CHUNK_BYTES", 32 * 4 * VOCAB)  # 32 positions: samples are cut
    samples = make_samples(6, low=20, high=140)
    together = drawn(teacher, samples)
    for sample in reversed(samples):
        alone = drawn(teacher, [sample])[sample.sample_id]
        assert len(alone) == len(sample.input_ids) - 1
        assert torch.equal(together[sample.sample_id], alone)
    assert len({float(draws[0]) for draws in together.values()}) == 6


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_chunks_do_not_change_records(
    tmp_path: Path, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    samples = make_samples(8)
    run(tmp_path / "whole", samples, teacher, codec=FullCodec())
    monkeypatch.setattr(scoring, "_CPU_CHUNK_BYTES", chunk * 4 * VOCAB)
    run(tmp_path / "cut", samples, teacher, codec=FullCodec())
    whole, cut = open_store(str(tmp_path / "whole")), open_store(str(tmp_path / "cut"))
    for sample in samples:
        a, b = whole.get(sample, 100, 1.0).signal, cut.get(sample, 100, 1.0).signal
        assert isinstance(a, LogitsSignal)
        assert isinstance(b, LogitsSignal)
        torch.testing.assert_close(a.rows.float(), b.rows.float(), rtol=1e-2, atol=2e-2)


class WatchedProducts(HeadProducts):
    """Notes where logits go, and whether those given last are still held when asked again."""

    held: ClassVar[list[bool]] = []
    places: ClassVar[set[int]] = set()
    _last: ClassVar[weakref.ref[torch.Tensor] | None] = None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        watch = WatchedProducts
        watch.held.append(watch._last is not None and watch._last() is not None)
        logits = super().logits(hidden, out)
        watch._last = weakref.ref(logits)
        assert logits.data_ptr() == out.data_ptr()
        watch.places.add(out.data_ptr())
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", [FullCodec(), CODEC, TailCodec(), SampledCodec()], ids=lambda codec: codec.name)
def test_all_chunks_share_the_memory_of_one(monkeypatch: pytest.MonkeyPatch, codec: Codec, dtype: torch.dtype) -> None:
    """And nothing that a codec gave for a chunk changes when the next chunk's logits take the place."""
    monkeypatch.setattr(scoring, "_CPU_CHUNK_BYTES", 32 * 4 * VOCAB)
    teacher = tiny_teacher()
    teacher.model.to(dtype)
    source = ListSource(make_samples(4, low=20, high=100))
    items = [Window(source, n, str(n), "math_tool", len(s.input_ids)) for n, s in enumerate(source.samples)]
    online = OnlineTeacher(teacher, VOCAB)
    monkeypatch.setattr(scoring, "HeadProducts", WatchedProducts)
    monkeypatch.setattr(WatchedProducts, "held", [])
    monkeypatch.setattr(WatchedProducts, "places", set())
    monkeypatch.setattr(WatchedProducts, "_last", None)
    scratch = scoring.Scratch()
    together = [rows for _, rows, _ in scoring.score(online, items, {"math_tool": codec}, scratch)]
    assert len(WatchedProducts.held) > 4
    assert not any(WatchedProducts.held)
    assert len(WatchedProducts.places) == 1
    kept = [{name: tensor.clone() for name, tensor in rows.items()} for rows in together]
    with torch.inference_mode():
        scratch.logits(online.head, torch.ones(32, online.head.weight.shape[1], dtype=dtype)).fill_(torch.nan)
    for rows, before in zip(together, kept, strict=True):
        assert all(torch.equal(rows[name], before[name]) for name in before)


def test_a_teacher_on_the_cpu_is_not_disturbed_by_packing(
    teacher: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = []
    real = TopKCodec.pack

    def pack(codec: TopKCodec, rows: Rows) -> dict[str, torch.Tensor]:
        packing.append(threading.current_thread() is threading.main_thread())
        return real(codec, rows)

    monkeypatch.setattr(TopKCodec, "pack", pack)
    run(tmp_path, make_samples(3), teacher)
    assert packing == [True] * 3


class LargestVocabularyTensor(TorchDispatchMode):
    """Remembers the most rows any tensor with the vocabulary as its last dimension had."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCAB:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return out


@pytest.mark.parametrize("codec", [FullCodec(), CODEC], ids=lambda codec: codec.name)
def test_logits_of_one_chunk_at_most(teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    monkeypatch.setattr(scoring, "_CPU_CHUNK_BYTES", 32 * 4 * VOCAB)
    source = ListSource(make_samples(8, low=90, high=100))
    items = [Window(source, n, str(n), "math_tool", 90) for n in range(8)]
    online = OnlineTeacher(teacher, VOCAB)
    with LargestVocabularyTensor() as seen:
        for _, rows, _ in scoring.score(online, items, {"math_tool": codec}, scoring.Scratch()):
            if "logits" in rows:  # codec full keeps all of a sample, in 16 bits and not as logits of a chunk
                break
    assert 0 < seen.rows <= 4 * 32  # the powers behind the tail's log-partition are four tensors in one, of few rows


# ------------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.parametrize("codec", [FullCodec(), CODEC, SampledCodec(), TailCodec()], ids=lambda codec: codec.name)
def test_only_what_is_learnt_is_stored(tmp_path: Path, teacher: LoadedModel, codec: Codec) -> None:
    whole = make_samples(6, low=30, high=140)
    samples = with_prompts(whole)
    summary = run(tmp_path / "kept", samples, teacher, codec=codec)
    assert summary.failed == 0
    assert summary.positions == sum(int(sample.learnt_positions(100).sum()) for sample in samples)
    assert summary.tokens == sum(min(100, len(sample.input_ids)) for sample in samples)
    run(tmp_path / "whole", whole, teacher, codec=codec)
    kept, complete = open_store(str(tmp_path / "kept")), open_store(str(tmp_path / "whole"))
    for sample in samples:
        mine, all_of_it = kept.get(sample, 100, 1.0).signal, complete.get(sample, 100, 1.0).signal
        assert mine is not None
        assert all_of_it is not None
        assert mine.num_positions == all_of_it.num_positions == int(sample.learnt_positions(100).sum())
        if isinstance(mine, LogitsSignal):
            assert isinstance(all_of_it, LogitsSignal)
            assert torch.allclose(mine.rows.float(), all_of_it.rows.float(), atol=2e-2)
    assert run(tmp_path / "kept", samples, teacher, codec=codec).skipped == len(samples)
    again = run(tmp_path / "kept", whole, teacher, codec=codec)
    assert (again.written, again.skipped) == (len(samples), 0), "all of a text is more than was captured"


def test_one_name_for_a_sample_that_is_learnt_in_two_ways_is_refused(tmp_path: Path, teacher: LoadedModel) -> None:
    (whole,) = make_samples(1, low=30, high=30)
    summary = run(tmp_path, [whole, *with_prompts([whole])], teacher)
    assert (summary.written, summary.failed) == (1, 1)
    assert summary.failures[0].reason == "another sample, of which something else is learnt, has the same sample id"


# ---------------------------------------------------------------------------------------------------- chosen positions


def test_the_positions_on_which_the_teacher_is_least_sure_are_kept(tmp_path: Path, teacher: LoadedModel) -> None:
    """Of what is learnt; they say what they say in a store of all, and the others nothing."""
    samples = [*make_samples(4, low=20, high=90), *with_prompts(make_samples(3, low=30, high=90, seed=5))]
    samples = [replace(sample, sample_id=f"s{number}") for number, sample in enumerate(samples)]
    stores = []
    for share in (None, 0.3):
        folder = str(tmp_path / str(share))
        writer = StoreWriter(folder, teacher.identity, FullCodec(), vocab_size=VOCAB, positions=share)
        summary = capture(
            {"math_tool": [ListSource(samples)]}, {"math_tool": writer}, teacher, seq_len=64, batch_size=2
        )
        assert summary.failed == 0
        stores.append(open_store(folder))
    whole, chosen = stores
    for sample in samples:
        every, some = (store.get(sample, 64, 1.0).signal for store in (whole, chosen))
        assert isinstance(every, LogitsSignal)
        assert isinstance(some, LogitsSignal)
        entropy = torch.distributions.Categorical(logits=every.rows.float()).entropy()
        kept = -(-3 * len(entropy) // 10)
        assert (some.num_positions, some.num_signal) == (len(entropy), kept)
        assert float(entropy[some.mask].min()) > float(entropy[~some.mask].max()) - 1e-3
        assert torch.equal(some.rows[some.mask], every.rows[some.mask])
        short = chosen.get(sample, 40, 1.0).signal
        assert isinstance(short, LogitsSignal)
        assert torch.equal(short.mask, some.mask[: short.num_positions])
    again = StoreWriter(str(tmp_path / "0.3"), teacher.identity, FullCodec(), vocab_size=VOCAB, positions=0.3)
    summary = capture({"math_tool": [ListSource(samples)]}, {"math_tool": again}, teacher, seq_len=64, batch_size=2)
    assert (summary.written, summary.skipped) == (0, len(samples)), "what is there is complete"
    with pytest.raises(SignalError, match="positions"):
        StoreWriter(str(tmp_path / "0.3"), teacher.identity, FullCodec(), vocab_size=VOCAB)
    changed = replace(samples[0], learnt=np.arange(len(samples[0].input_ids)) > 15)
    assert chosen.check(changed, 64).status == "stale", "another choice is wanted"
