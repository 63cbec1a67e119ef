"""Records of the positions that are learnt: written, read for others than they were written for, and stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.teachers import IDENTITY, make_samples, random_logits, with_prompts

from liquid_llm.data.types import Sample
from liquid_llm.losses.signals import LogitsSignal
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.compare import compare
from liquid_llm.signal_store.pt import file_name, from_bytes
from liquid_llm.signal_store.records import WHOLE_VERSION, RecordHeader, SignalIdentity, runs_of
from liquid_llm.signal_store.shards.file import read_shard_header
from liquid_llm.signal_store.shards.pack import pack
from liquid_llm.signal_store.store import StoreReader, StoreWriter, open_store
from liquid_llm.signal_store.survey import survey

VOCAB = 300
WHOLE = make_samples(6, low=20, high=150)
SAMPLES = with_prompts(WHOLE)
LAYOUTS = pytest.mark.parametrize("layout", ["pt", "shards"])


def logits_of(sample: Sample) -> torch.Tensor:
    return random_logits(len(sample.input_ids) - 1, VOCAB, seed=len(sample.input_ids))


def write(folder: Path, samples: list[Sample], layout: str, seq_len: int = 1024) -> StoreReader:
    codec = FullCodec()
    writer = StoreWriter(str(folder), IDENTITY, codec, vocab_size=VOCAB, layout=layout)
    for sample in samples:
        learnt = torch.from_numpy(sample.learnt_positions(seq_len))
        rows = codec.encode(logits_of(sample)[: len(learnt)][learnt], 1, 0)
        writer.write(sample, min(seq_len, len(sample.input_ids)), codec.pack(rows))
    writer.finish()
    return open_store(str(folder))


def rows_of(store: StoreReader, sample: Sample, window: int) -> torch.Tensor:
    lookup = store.get(sample, window, 1.0)
    assert lookup.status == "usable", lookup.reason
    assert isinstance(lookup.signal, LogitsSignal)
    return lookup.signal.rows


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_runs_say_which_positions_have_a_row(positions: list[bool]) -> None:
    runs = runs_of(np.array(positions))
    identity = SignalIdentity("t", "r", "h", 10, "full", 1, {})
    header = RecordHeader(3, "s", "code", identity, len(positions) + 1, b"", runs)
    assert header.positions().tolist() == positions
    assert header.num_rows == sum(positions)
    assert (runs == ()) == all(positions)


@LAYOUTS
@pytest.mark.parametrize("window", [1024, 70, 19])
def test_a_record_gives_the_rows_of_what_is_learnt(tmp_path: Path, layout: str, window: int) -> None:
    """Captured for just that, or for more; in a window as long as the record, or shorter."""
    kept, whole = write(tmp_path / "kept", SAMPLES, layout), write(tmp_path / "whole", WHOLE, layout)
    for sample in SAMPLES:
        learnt = torch.from_numpy(sample.learnt_positions(window))
        exact = FullCodec().encode(logits_of(sample), 1, 0)["logits"][: len(learnt)][learnt]
        for store in (kept, whole):
            assert torch.equal(rows_of(store, sample, window), exact)


@LAYOUTS
def test_a_record_of_other_positions_is_stale_unless_it_has_all_that_are_learnt(tmp_path: Path, layout: str) -> None:
    store = write(tmp_path, SAMPLES, layout)
    for whole, sample in zip(WHOLE, SAMPLES, strict=True):
        lookup = store.get(whole, 1024, 1.0)
        lacking = int((~sample.learnt_positions(1024)).sum())
        assert lookup.status == "stale"
        assert lookup.reason == f"captured for other positions than are learnt: {lacking} of these have no row"
        assert lookup.remedy == "give --learn and --chat_template as they were at capture, or capture again"
        assert sample.learnt is not None
        fewer = sample.learnt & (np.arange(len(sample.learnt)) % 3 > 0)
        assert store.get(replace(sample, learnt=fewer), 1024, 1.0).status == "usable"
    # a short window of which all that is learnt has a row
    prompt = replace(WHOLE[0], learnt=np.arange(len(WHOLE[0].input_ids)) > 4)
    again = write(tmp_path / "again", [prompt], layout)
    assert again.get(WHOLE[0], 4, 1.0).status == "stale"
    assert again.get(replace(prompt, learnt=np.arange(len(prompt.input_ids)) > 5), 9, 1.0).status == "usable"


@LAYOUTS
def test_a_job_that_goes_on_knows_its_own_records(tmp_path: Path, layout: str) -> None:
    write(tmp_path, SAMPLES, layout)
    writer = StoreWriter(str(tmp_path), IDENTITY, FullCodec(), vocab_size=VOCAB, layout=layout)
    assert all(writer.complete(sample, 1024) for sample in SAMPLES)
    assert not any(writer.complete(sample, 1024) for sample in WHOLE)


def test_stores_are_packed_measured_and_compared_with_their_positions(tmp_path: Path) -> None:
    loose, whole = write(tmp_path / "loose", SAMPLES, "pt"), write(tmp_path / "whole", WHOLE, "shards")
    pack(loose, str(tmp_path / "packed"))
    packed = open_store(str(tmp_path / "packed"))
    assert compare(loose, packed, 1.0).same
    assert compare(packed, whole, 1.0).counts["tokens"] == len(SAMPLES)
    positions = sum(int(sample.learnt_positions(1024).sum()) for sample in SAMPLES)
    for store in (loose, packed):
        found = survey(store, samples=100, temperature=1.0, seed=0)
        assert (found["positions"], found["corrupt"], found["stale"]) == (positions, 0, 0)
        every = sum(len(sample.input_ids) - 1 for sample in SAMPLES)
        for row in (found, found["types"]["math_tool"]):
            assert (row["positions"], row["window_positions"]) == (positions, every)
            assert row["stored_share"] == row["learnt_share"] == positions / every
        assert found["kd_positions"] == 1.0
        assert found["types"]["math_tool"]["sampled_positions"] == positions
        assert found["types"]["math_tool"]["payload_bytes_per_token"] == 2 * VOCAB
    assert survey(whole, samples=1, temperature=1.0, seed=0)["positions"] == sum(len(s.input_ids) - 1 for s in WHOLE)


def test_what_leaves_nothing_out_is_written_as_earlier_releases_wrote_it(tmp_path: Path) -> None:
    """They refuse, in words, only what they could not read."""
    write(tmp_path / "pt", WHOLE[:1], "pt")
    header = from_bytes((tmp_path / "pt" / file_name(WHOLE[0].sample_id)).read_bytes()).header
    assert (header.format_version, header.runs) == (WHOLE_VERSION, ())
    for samples, version in ((WHOLE, b'"format_version\\": 1'), (SAMPLES, b'"format_version\\": 2')):
        folder = tmp_path / f"shards-{len(version)}-{samples is WHOLE}"
        write(folder, samples, "shards")
        (shard,) = folder.glob("shard-*")
        data = shard.read_bytes()
        assert version[1:] in data[:4096]
        assert read_shard_header(lambda begin, end, data=data: data[begin:end], len(data)).num_records == len(samples)  # type: ignore[misc]


def test_a_record_of_chosen_positions_is_stale_when_its_text_got_shorter(tmp_path: Path) -> None:
    sample = make_samples(1, low=120, high=120)[0]
    writer = StoreWriter(str(tmp_path), IDENTITY, FullCodec(), vocab_size=VOCAB, layout="shards", positions=0.25)
    chosen = np.zeros(119, dtype=bool)
    chosen[: writer.identity.num_chosen(119)] = True
    rows = FullCodec().encode(logits_of(sample)[torch.from_numpy(chosen)], 1, 0)
    writer.write(sample, 120, FullCodec().pack(rows), chosen)
    writer.finish()
    store = open_store(str(tmp_path))
    assert store.get(sample, 64, 1.0).status == "usable"
    shorter = replace(sample, input_ids=sample.input_ids[:100])
    lookup = store.get(shorter, 64, 1.0)
    assert (lookup.status, lookup.reason) == ("stale", "captured of 120 tokens of which there are 100 now")
