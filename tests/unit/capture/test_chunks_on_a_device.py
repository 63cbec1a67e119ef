"""Rows of many samples at once: the bytes are those of each sample alone, and a device is waited for once a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.accelerator import NAME, Accelerator
from tests.support.teachers import VOCAB, ListSource, make_samples, random_logits, tiny_teacher, with_prompts

from liquid_llm import registry
from liquid_llm.capture import scoring
from liquid_llm.capture.plan import Window
from liquid_llm.data.types import Sample
from liquid_llm.errors import SignalError
from liquid_llm.signal_store.codecs import Codec, Payload, Rows, get_codec
from liquid_llm.signal_store.codecs.base import SPILT, TOP, Run, encode_as_on
from liquid_llm.signal_store.codecs.tail import room
from liquid_llm.teachers.online import OnlineTeacher

MANY = {"tail": {"draws_t1": 180.0, "draws_t2": 112.0, "draws_t4": 30.0}}
# What one chunk may launch, its products included. With a call for each sample there were 285 of them for codec tail.
LAUNCHES = {"tail": 215, "topk": 55, "full": 12, "sampled": 40}


def codecs() -> dict[str, Codec]:
    return {name: get_codec(name, options=MANY.get(name)) for name in registry.CODECS}


def parts(rows: Rows, runs: list[Run]) -> Iterator[Rows]:
    at = 0
    for run in runs:
        yield {name: tensor[at : at + run.count] for name, tensor in rows.items() if name not in (TOP, SPILT)}
        at += run.count


def equal(one: Payload, other: Payload) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", registry.CODECS)
@settings(max_examples=20)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    vocab=st.sampled_from([1, 63, 64, 65, 700]),
    seed=st.integers(0, 2**63 - 10),
    start=st.integers(0, 5000),
    spread=st.floats(0.3, 9.0),
)
def test_rows_of_many_records_are_those_of_each_alone(
    name: str, device: str, counts: list[int], vocab: int, seed: int, start: int, spread: float
) -> None:
    """In both ways to encode: as much room as is taken, and room of a fixed size, in which nothing is waited for."""
    codec = codecs()[name]
    runs = [Run(seed + number, start * number, count) for number, count in enumerate(counts)]
    logits = random_logits(sum(counts), vocab, seed=seed % 997, spread=spread)
    with encode_as_on(device):
        together = codec.encode_runs(logits.clone(), runs)
    assert SPILT not in together or not together[SPILT].any()
    assert torch.equal(together[TOP], logits.amax(dim=1))
    at = 0
    for run, rows in zip(runs, parts(together, runs), strict=True):
        alone = codec.encode(logits[at : at + run.count].clone(), run.seed, run.start)
        assert equal(codec.pack(rows), codec.pack(alone))
        at += run.count


@pytest.mark.parametrize("what", ["exact ids", "draws"])
def test_a_row_that_takes_more_room_says_so(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs()["tail"]
    logits = random_logits(12, 700, spread=1.0) * torch.linspace(0.3, 9.0, 12)[:, None]
    logits[3] = torch.where(torch.arange(700) % 64 == 0, 9.0, -9.0) + torch.arange(700) / 1e4  # in all runs of ids
    expected = codec.encode(logits.clone(), 5, 0)
    if what == "exact ids":
        monkeypatch.setattr(room, "_MOST_RUNS", 4)
    else:
        monkeypatch.setattr(room, "_ROOM", 0.2)
    with encode_as_on("cuda"):
        rows = codec.encode_runs(logits.clone(), [Run(5, 0, 12)])
        again = codec.encode(logits.clone(), 5, 0)
    assert bool(rows[SPILT][3] if what == "exact ids" else rows[SPILT].any())
    assert not rows[SPILT].all()
    assert equal(codec.pack(again), codec.pack(expected))
    for row in (~rows[SPILT]).nonzero().flatten().tolist():
        for count, ids in (("head_counts", "head_ids"), ("draw_counts", "draw_slots")):
            used = int(expected[count][row])
            assert rows[count][row] == used
            assert torch.equal(rows[ids][row, :used], expected[ids][row, :used])


# ---------------------------------------------------------------------------------------------------------- on a device


def score(teacher: OnlineTeacher, samples: list[Sample], codec: Codec, **given: Any) -> dict[str, Rows | SignalError]:
    source = ListSource(samples)
    items = [Window(source, n, one.sample_id, one.type, len(one.input_ids)) for n, one in enumerate(samples)]
    scored = scoring.score(teacher, items, dict.fromkeys({one.type for one in samples}, codec), **given)
    return {window.sample_id: rows for window, rows, _ in scored}


@pytest.fixture(scope="module")
def teachers(accelerator: Accelerator) -> dict[str, OnlineTeacher]:
    here, there = tiny_teacher(), tiny_teacher()
    moved = replace(there, model=there.model.to(accelerator.device))
    return {"cpu": OnlineTeacher(here, VOCAB), NAME: OnlineTeacher(moved, VOCAB)}


@pytest.mark.parametrize("name", registry.CODECS)
def test_a_device_is_waited_for_once_a_chunk(
    accelerator: Accelerator, teachers: dict[str, OnlineTeacher], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MAX_CHUNK_ROWS", 100)
    samples = with_prompts(make_samples(9, low=40, high=90))
    num_rows = [int(one.learnt_positions(len(one.input_ids)).sum()) for one in samples]
    num_chunks = len(list(scoring.chunks(num_rows, 100)))
    codec, scratch = codecs()[name], scoring.Scratch()
    score(teachers[NAME], samples[:1], codec, scratch=scratch)  # tables that are made once
    with accelerator.record() as log:
        found = score(teachers[NAME], samples, codec, scratch=scratch)
    assert 2 <= num_chunks < len(samples)
    assert log.count("wait") == num_chunks, log.sites("wait")
    assert log.count("to_host") == num_chunks
    # Token ids and the places learnt, once a batch; random numbers once a chunk.
    assert log.count("to_device") <= 2 + num_chunks, log.sites("to_device")
    places = (event.site for event in log if event.kind == "launch")
    ours = [place for place in places if "signal_store/" in place or "capture/" in place]
    assert len(ours) <= num_chunks * LAUNCHES[name], log.sites("launch")
    here = score(teachers["cpu"], samples, codec, scratch=scoring.Scratch())
    for sample_id, rows in found.items():
        expected = here[sample_id]
        assert isinstance(rows, dict)
        assert isinstance(expected, dict)
        assert equal(codec.pack(rows), codec.pack(expected))


def test_a_chunk_that_spilt_is_encoded_again(
    teachers: dict[str, OnlineTeacher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "_MAX_CHUNK_ROWS", 100)
    samples, codec = make_samples(6, low=40, high=90), codecs()["tail"]
    expected = score(teachers["cpu"], samples, codec, scratch=scoring.Scratch())
    monkeypatch.setattr(room, "_ROOM", 0.05)
    caplog.set_level("INFO", "liquid_llm")
    found = score(teachers[NAME], samples, codec, scratch=scoring.Scratch())
    assert caplog.text.count("encoded again") == 1
    assert found.keys() == expected.keys()
    assert all(equal(codec.pack(found[one]), codec.pack(expected[one])) for one in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", NAME])
@pytest.mark.parametrize("name", registry.CODECS)
def test_a_sample_whose_logits_are_not_finite_keeps_none_from_its_neighbours(
    teachers: dict[str, OnlineTeacher], name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, codec = make_samples(4, low=20, high=30), codecs()[name]
    expected = score(teachers[device], samples, codec, scratch=scoring.Scratch())
    logits = scoring.Scratch.logits

    def broken(self: scoring.Scratch, *args: Any) -> torch.Tensor:
        made = logits(self, *args)
        made[len(samples[0].input_ids) + 4, 7] = float("nan")  # the second sample's, after one row fewer than tokens
        return made

    monkeypatch.setattr(scoring.Scratch, "logits", broken)
    found = score(teachers[device], samples, codec, scratch=scoring.Scratch())
    assert isinstance(found["s/1"], SignalError)
    assert "row 5" in str(found["s/1"])
    for number in (0, 2, 3):
        rows, wanted = found[f"s/{number}"], expected[f"s/{number}"]
        assert isinstance(rows, dict)
        assert isinstance(wanted, dict)
        assert equal(codec.pack(rows), codec.pack(wanted))
