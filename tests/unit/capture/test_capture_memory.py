"""Capture when the device's memory does not suffice, or the device is lost."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.teachers import VOCAB, ListSource, make_samples, tiny_teacher

from liquid_llm.capture import scoring
from liquid_llm.capture.job import CaptureSummary, capture
from liquid_llm.data.types import Sample
from liquid_llm.models.loading import LoadedModel
from liquid_llm.signal_store.codecs.tail import TailCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.store import StoreWriter

pytestmark = pytest.mark.usefixtures("few_to_collect")


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny_teacher()


def run(folder: Path, samples: list[Sample], teacher: LoadedModel, codec: Any = None) -> CaptureSummary:
    writer = StoreWriter(str(folder), teacher.identity, codec or TopKCodec(8), vocab_size=VOCAB)
    datasets = {"math_tool": [ListSource(samples)]}
    return capture(datasets, {"math_tool": writer}, teacher, seq_len=100, batch_size=4)


@contextmanager
def holding(teacher: LoadedModel, most_tokens: int, seen: list[int], alive: list[int]) -> Iterator[None]:
    """The teacher as on a device that holds passes of so many tokens; notes how many failed passes' tensors live on."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def enter(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        gc.collect()
        seen.append(kwargs["input_ids"].numel())
        alive.append(sum(one() is not None for one in kept))

    def leave(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].numel() > most_tokens:
            hidden = output[0].clone()  # what the failed frames hold
            kept.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")

    body = teacher.model.base_model
    handles = [
        body.register_forward_pre_hook(enter, with_kwargs=True),
        body.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("codec", [TopKCodec(8), TailCodec()], ids=lambda codec: codec.name)
def test_a_batch_that_does_not_fit_is_cut_and_so_is_the_rest(
    tmp_path: Path, teacher: LoadedModel, codec: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = make_samples(24, low=40, high=90)
    whole = run(tmp_path / "whole", samples, teacher, codec)
    seen: list[int] = []
    alive: list[int] = []
    caplog.set_level(logging.WARNING, "liquid_llm")
    with holding(teacher, 200, seen, alive):
        cut = run(tmp_path / "cut", samples, teacher, codec)
    assert (cut.written, cut.failed) == (whole.written, 0) == (24, 0)
    assert {path.name for path in (tmp_path / "cut").glob("*.pt")} == {
        path.name for path in (tmp_path / "whole").glob("*.pt")
    }
    # Learnt once: after the last failure nothing larger is tried, and passes do not shrink to single samples.
    last_failure = max(number for number, size in enumerate(seen) if size > 200)
    assert last_failure <= 3
    assert max(seen[last_failure + 1 :]) <= 200
    assert len(seen) < 4 + 24
    assert set(alive) == {0}
    assert "at most" in caplog.text
    assert "tokens a batch from now on" in caplog.text


def test_a_sample_that_does_not_fit_alone_is_named_and_the_rest_is_captured(
    tmp_path: Path, teacher: LoadedModel
) -> None:
    short, long = make_samples(6, low=10, high=30), make_samples(2, low=95, high=99, prefix="long")
    with holding(teacher, 60, [], []):
        summary = run(tmp_path, [*short, *long], teacher)
    assert summary.written == 6
    assert (summary.failed, summary.too_large) == (2, 2)
    assert {failure.sample_id for failure in summary.failures} == {"long/0", "long/1"}
    assert all("does not fit into memory" in failure.reason for failure in summary.failures)


def test_a_sample_alone_is_tried_with_fewer_logits_at_a_time(
    tmp_path: Path, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(3, low=90, high=99)
    whole = run(tmp_path / "whole", samples, teacher, TailCodec())
    make, sizes = torch.empty, []

    def small(*size: Any, **given: Any) -> torch.Tensor:
        if size[-1] == VOCAB:
            sizes.append(size[0])
            if size[0] > 2000:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*size, **given)

    monkeypatch.setattr(scoring.torch, "empty", small)
    cut = run(tmp_path / "cut", samples, teacher, TailCodec())
    monkeypatch.undo()
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 2000 < sizes[-2]
    assert (cut.written, cut.too_large) == (whole.written, 0)
    # Each was scored alone in the end, like these; the chunks had no part in it.
    alone = [run(tmp_path / f"alone{n}", [one], teacher, TailCodec()) for n, one in enumerate(samples)]
    assert sum(one.written for one in alone) == 3
    for n in range(3):
        for path in (tmp_path / f"alone{n}").glob("*.pt"):
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_lost_device_ends_the_job_and_what_is_written_stays(tmp_path: Path, teacher: LoadedModel) -> None:
    samples = make_samples(12, low=40, high=90)
    passes: list[int] = []

    def fail(_module: Any, _args: Any) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    handle = teacher.model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path, samples, teacher)
    handle.remove()
    assert len(passes) == 3  # nothing is tried on a device that is gone
    written = len(list(tmp_path.glob("*.pt")))
    assert written >= 4
    again = run(tmp_path, samples, teacher)
    assert (again.skipped, again.written) == (written, 12 - written)
