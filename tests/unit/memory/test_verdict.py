"""Fits or not, the changes that make it fit, and the largest batch: against a model of memory with simple rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import preset, shape_of

from liquid_llm.errors import ModelError
from liquid_llm.memory import verdict as verdict_module
from liquid_llm.memory.prediction import MemoryPrediction
from liquid_llm.memory.shapes import BatchShape, CaptureShape, TrainingShape
from liquid_llm.memory.verdict import (
    capture_options,
    divisors,
    fits,
    largest_batch,
    largest_that_fits,
    training_options,
)

MIB = 2**20
BATCH = BatchShape(8, 64, "dense")


def answer(peak_bytes: int, device: str = "cpu") -> MemoryPrediction:
    parts = {"activations": peak_bytes // 2, "loss buffers": peak_bytes // 3}
    parts["student weights"] = peak_bytes - sum(parts.values())
    return MemoryPrediction(peak_bytes, 0, {"forward": peak_bytes}, parts, "forward", "", device)


def simple(shape: TrainingShape | CaptureShape) -> MemoryPrediction:
    """100 MiB, a fixed part for what is there, and a part for each row; no device, so 5 % on top and nothing else."""
    if isinstance(shape, CaptureShape):
        return answer((100 + 10 * shape.rows) * (MIB if shape.teacher.dtype == "float32" else MIB // 2))
    rows = max(batch.rows for batch in shape.batches)
    a_row = 10 if shape.grad_checkpoint else 100
    peak = 100 + 200 * shape.reference + 50 * shape.accumulates + a_row * rows
    return answer(peak * (MIB if shape.compute_dtype == "float32" else 9 * MIB // 10))


def options(shape: TrainingShape, free: int, grad_accum: int = 1) -> list[str]:
    tried = training_options(shape, BATCH.rows, grad_accum, free, simple)
    return [change for change, found in tried if found.needed_bytes <= free]


def test_what_fits_needs_no_options_and_none_is_tried() -> None:
    def never() -> list[tuple[str, MemoryPrediction]]:
        raise AssertionError

    verdict = fits(answer(100), answer(100).needed_bytes, never)
    assert verdict.fits
    assert verdict.words == "yes, it fits: 105 bytes of 105 bytes"


def test_one_byte_short_is_no() -> None:
    verdict = fits(answer(100 * MIB), answer(100 * MIB).needed_bytes - 1, lambda: [("--less", answer(MIB))])
    assert not verdict.fits
    assert "no, it does not fit" in verdict.words
    assert verdict.words.endswith("with --less it does: 1.05 MiB")
    assert verdict.as_dict()["options"] == [{"change": "--less", "needed_bytes": answer(MIB).needed_bytes}]


def test_when_nothing_fits_the_three_largest_are_named() -> None:
    verdict = fits(answer(100 * MIB), MIB, lambda: [("--less", answer(50 * MIB))])
    assert verdict.options == ()
    assert "no option makes it" in verdict.words
    assert "activations 50 MiB, loss buffers 33.3 MiB, student weights 16.7 MiB" in verdict.words


@pytest.mark.parametrize(
    ("free_mib", "expected"),
    [
        # rows 8, reference: 1100 MiB as it is; 380 with checkpointing
        (1060, ["--grad_checkpoint=true", "--batch_size=4 --grad_accum=2", "--keep_old_logit_l2=0"]),
        (700, ["--grad_checkpoint=true", "--batch_size=2 --grad_accum=4"]),
        (480, ["--grad_checkpoint=true", "--batch_size=1 --grad_accum=8"]),
        (420, ["--grad_checkpoint=true"]),
        (396, ["--grad_checkpoint=true --batch_size=2 --grad_accum=4"]),
        (250, ["--grad_checkpoint=true --keep_old_logit_l2=0"]),
        (180, ["--grad_checkpoint=true --keep_old_logit_l2=0 --batch_size=2 --grad_accum=4"]),
        (150, []),
    ],
)
def test_the_smallest_change_comes_first_and_several_only_where_one_does_not_do(
    free_mib: int, expected: list[str]
) -> None:
    shape = shape_of("llama-test", BATCH, reference=True)
    assert options(shape, free_mib * MIB) == expected


def test_what_is_already_so_is_no_option() -> None:
    shape = shape_of("llama-test", BATCH, grad_checkpoint=True)
    assert options(shape, 160 * MIB, grad_accum=3) == []
    assert options(shape, 180 * MIB, grad_accum=3) == ["--batch_size=2 --grad_accum=12"]
    on_gpu = replace(shape, device="cuda")
    assert options(on_gpu, 175 * MIB) == ["--batch_size=1 --grad_accum=8", "--precision=bfloat16"]


def test_an_architecture_without_checkpointing_is_not_offered_it() -> None:
    def predict(shape: TrainingShape) -> MemoryPrediction:
        if shape.grad_checkpoint:
            raise ModelError("this architecture does not support gradient checkpointing")
        return simple(shape)

    shape = shape_of("llama-test", BATCH, reference=True)

    def found(free: int) -> list[str]:
        return [change for change, one in training_options(shape, 8, 1, free, predict) if one.needed_bytes <= free]

    assert found(480 * MIB) == ["--batch_size=1 --grad_accum=8"]
    assert found(300 * MIB) == ["--keep_old_logit_l2=0 --batch_size=1 --grad_accum=8"]


def test_capture_offers_smaller_batches_and_16_bits() -> None:
    shape = CaptureShape(preset("llama-test"), 8, 64, 384)
    needs = {rows: simple(replace(shape, rows=rows)).needed_bytes for rows in (8, 4, 2, 1)}
    assert sorted(needs.values(), reverse=True) == list(needs.values())  # else this shows nothing
    for rows, smaller in ((4, needs[4]), (2, needs[4] - 1), (1, needs[2] - 1)):
        tried = dict(capture_options(shape, 8, smaller, simple))
        assert list(tried) == [f"--batch_size={rows}", "--teacher_precision=bfloat16"]
        assert tried[f"--batch_size={rows}"].needed_bytes == needs[rows] <= smaller
    assert list(dict(capture_options(shape, 8, needs[1] - 1, simple))) == ["--teacher_precision=bfloat16"]


@given(sizes=st.lists(st.integers(1, 100), unique=True, max_size=40), free=st.integers(0, 110))
def test_the_largest_size_that_fits_is_found_with_few_questions(sizes: list[int], free: int) -> None:
    falling, asked = sorted(sizes, reverse=True), []

    def needs(size: int) -> MemoryPrediction:
        asked.append(size)
        return answer(size * MIB)

    found = largest_that_fits(falling, needs, answer(free * MIB).needed_bytes)
    assert (None if found is None else found[0]) == max((one for one in sizes if one <= free), default=None)
    assert found is None or found[1] == answer(found[0] * MIB)
    assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(len(sizes) + 1))
    assert found is not None or len(asked) <= 1


def test_options_are_looked_for_with_bounded_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(verdict_module.time, "monotonic", lambda: float(next(seconds)))
    endless = (("--less", answer(MIB)) for _ in iter(int, 1))
    assert len(fits(answer(100 * MIB), 50 * MIB, lambda: endless).options) == 2


# ------------------------------------------------------------------------------------------------- the largest batch


def build(size: int, accumulation: int, checkpointing: bool) -> TrainingShape:
    return shape_of("llama-test", BatchShape(size, 64), grad_checkpoint=checkpointing, accumulates=accumulation > 1)


@given(st.integers(1, 96), st.integers(90, 12_000))
def test_the_largest_batch_is_the_largest_of_all_that_keep_the_step(blocks: int, free_mib: int) -> None:
    free = free_mib * MIB
    found = largest_batch(build, simple, blocks_per_step=blocks, free_bytes=free)
    all_of_them = [(size, checkpointing) for checkpointing in (False, True) for size in divisors(blocks)]
    fitting = [
        (size, checkpointing)
        for size, checkpointing in all_of_them
        if simple(build(size, blocks // size, checkpointing)).needed_bytes <= free
    ]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert found.batch_size * found.grad_accum == blocks
    assert found.needed_bytes <= free
    # Without checkpointing where anything fits, and then the largest.
    assert (found.batch_size, found.grad_checkpoint) == fitting[0]


@given(st.integers(1, 96), st.integers(90, 12_000))
def test_a_larger_card_never_gets_a_smaller_batch_of_its_kind(blocks: int, free_mib: int) -> None:
    for checkpointing in (False, True):
        sizes = []
        for free in (free_mib, free_mib + 500):
            found = largest_batch(
                build, simple, blocks_per_step=blocks, free_bytes=free * MIB, checkpointing=(checkpointing,)
            )
            sizes.append(0 if found is None else found.batch_size)
        assert sizes[0] <= sizes[1]


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert found == sorted({one for one in range(1, number + 1) if number % one == 0}, reverse=True)
