"""The metrics file: continued equals uninterrupted, torn lines never count, sums become means once."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liquid_llm.distributed import Engine
from liquid_llm.errors import StorageError
from liquid_llm.losses.signals import LossOutput
from liquid_llm.metrics import (
    TIMING_KEYS,
    MetricsWriter,
    StepAccumulator,
    iter_metrics,
    read_metrics,
    without_timings,
)

TYPES = ("lm", "math_tool", "code")


def output(loss: float, ce: float, kd: float, l2: float, positions: int, signal: int) -> LossOutput:
    as_tensor = torch.tensor([loss, ce, kd, l2], dtype=torch.float64)
    return LossOutput(as_tensor[0], as_tensor[1], as_tensor[2], as_tensor[3], positions, signal)


def values(step: int, run: int = 0) -> dict[str, object]:
    return {"loss": 1.0 / step, "by_type": {"lm": {"ce": step * 0.5}}, "tokens_per_second": 100.0 + run}


def write_steps(folder: Path, steps: range, resume_step: int | None, run: int = 0) -> None:
    with MetricsWriter(folder, resume_step=resume_step) as writer:
        for step in steps:
            writer.write("train", step, values(step, run))
            if step % 3 == 0:
                writer.write("eval", step, {"val_loss_student": 2.0 / step})


# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("killed_after", [0, 1, 3, 4, 7, 9])
@pytest.mark.parametrize("checkpoint", [0, 1, 3, 6])
@pytest.mark.parametrize("torn", [b"", b'{"kind":"train","step":', b'{"kind":"train","step":1}', b"\xff\xfe"])
def test_a_continued_file_equals_an_uninterrupted_one(
    tmp_path: Path, killed_after: int, checkpoint: int, torn: bytes
) -> None:
    checkpoint = min(checkpoint, killed_after)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_steps(whole, range(1, 10), None)
    write_steps(broken, range(1, killed_after + 1), None)
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write_steps(broken, range(checkpoint + 1, 10), checkpoint, run=1)
    assert [without_timings(row) for row in read_metrics(broken)] == [
        without_timings(row) for row in read_metrics(whole)
    ]
    kept = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    continued = (broken / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    earlier = [line for line in kept if json.loads(line)["step"] <= checkpoint]
    assert continued[: len(earlier)] == earlier  # byte for byte, not re-encoded
    assert not list(broken.glob(".*.tmp"))


def test_a_fresh_start_forgets_the_earlier_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), None)
    write_steps(tmp_path, range(1, 3), None, run=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_dropping_rows_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(1, 6), None)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def power_cut(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(StorageError, match="space"):
        MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_every_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        for step in range(1, 4):
            written = writer.write("train", step, values(step))
            assert read_metrics(tmp_path)[-1] == written
            assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == step


def test_unreadable_lines_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [b'{"kind":"train","step":1}', b"{oops", b"[1,2]", b'{"kind":"train"}', b'{"kind":"train","step":2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"kind":"train","step":3')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "4 unreadable" in caplog.text
    assert "line 2" in caplog.text
    assert [number for number, row in iter_metrics(tmp_path) if row is None] == [2, 3, 4, 6]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (torch.tensor(math.nan), "nan")]
)
def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path, value: object, said: str) -> None:
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write("train", 1, {"loss": value, "by_type": {"lm": {"ce": value, "kd": 1.0}}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["by_type"]["lm"] == {"ce": None, "kd": 1.0}
    assert row["not_finite"] == {"loss": said, "by_type.lm.ce": said}


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5).filter(lambda name: name not in ("kind", "step", "not_finite")),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=6,
    )
)
def test_plain_values_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, row: dict[str, object]) -> None:
    # any text, newlines and surrogate-free unicode included, must stay on its own line
    folder = tmp_path_factory.getbasetemp() / "plain"
    with MetricsWriter(folder, resume_step=None) as writer:
        writer.write("train", 7, row)
    assert read_metrics(folder) == [{"kind": "train", "step": 7, **row}]


def test_tensors_and_arrays_of_one_value_are_numbers_and_larger_ones_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        assert writer.write("train", 1, {"a": torch.tensor(2.5), "b": torch.tensor(3)})["a"] == 2.5
        with pytest.raises(TypeError, match="metric c"):
            writer.write("train", 2, {"c": torch.zeros(2)})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_unwritable_run_directory_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        MetricsWriter(tmp_path / "file" / "run", resume_step=None)


class Listening:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def log(self, row: Mapping[str, Any]) -> None:
        self.heard.append(row)

    def close(self) -> None:
        self.heard.append("closed")


def test_every_tracker_gets_each_row_as_it_was_written_and_is_closed(tmp_path: Path) -> None:
    first, second = Listening(), Listening()
    with MetricsWriter(tmp_path, resume_step=None, trackers=[first, second]) as writer:
        writer.write("train", 1, {"loss": math.nan})
        writer.write("eval", 1, {"val_loss_student": 2.0})
        assert first.heard == second.heard == read_metrics(tmp_path)
    assert first.heard[-1] == second.heard[-1] == "closed"


# --------------------------------------------------------------------------------------------------------- accumulating


micro_batches = st.lists(
    st.tuples(
        st.sampled_from(["lm", "math_tool", "code"]),
        st.floats(0, 1e4, width=32),
        st.floats(0, 1e4, width=32),
        st.integers(1, 500),
        st.integers(0, 500),
        st.integers(1, 600),
    ),
    min_size=1,
    max_size=12,
)


def add(to: StepAccumulator, batch: tuple[str, float, float, int, int, int]) -> None:
    kind, ce, kd, positions, signal, tokens = batch
    signal = min(signal, positions)
    kd = kd if signal else 0.0
    to.add(kind, output(ce + kd, ce, kd, kd / 2, positions, signal), tokens=tokens, padded_tokens=tokens + 3)


@given(micro_batches)
def test_means_are_divided_once_by_global_counts(batches: list[tuple[str, float, float, int, int, int]]) -> None:
    accumulator = StepAccumulator(TYPES)
    for batch in batches:
        add(accumulator, batch)
    row = accumulator.row(seconds=2.0, lr=0.5)
    positions = sum(b[3] for b in batches)
    signal = sum(min(b[4], b[3]) for b in batches)
    kd = sum(b[2] for b in batches if min(b[4], b[3]))
    assert row["ce"] == pytest.approx(sum(b[1] for b in batches) / positions)
    assert row["kd_coverage"] == pytest.approx(signal / positions)
    assert row["kd"] == (pytest.approx(kd / signal) if signal else None)
    assert row["l2"] == pytest.approx(kd / 2 / positions)
    assert row["loss"] == pytest.approx((sum(b[1] for b in batches) + kd) / positions)
    tokens = sum(b[5] for b in batches)
    assert row["tokens"] == tokens == sum(one["tokens"] for one in row["by_type"].values())
    assert row["tokens_per_second"] == pytest.approx(tokens / 2)
    assert row["padding_share"] == pytest.approx(3 * len(batches) / (tokens + 3 * len(batches)))
    assert set(row["by_type"]) == {b[0] for b in batches}
    assert row["lr"] == 0.5
    for kind, one in row["by_type"].items():
        mine = [b for b in batches if b[0] == kind]
        assert one["ce"] == pytest.approx(sum(b[1] for b in mine) / sum(b[3] for b in mine))


@given(micro_batches, st.integers(0, 12))
def test_a_checkpoint_between_micro_batches_changes_nothing(
    batches: list[tuple[str, float, float, int, int, int]], cut: int
) -> None:
    whole, first, second = StepAccumulator(TYPES), StepAccumulator(TYPES), StepAccumulator(TYPES)
    for batch in batches:
        add(whole, batch)
    for batch in batches[:cut]:
        add(first, batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[cut:]:
        add(second, batch)
    assert without_timings(second.row(seconds=1.0)) == without_timings(whole.row(seconds=3.0))


def test_the_rate_after_a_resume_counts_only_what_was_timed() -> None:
    first, second = StepAccumulator(TYPES), StepAccumulator(TYPES)
    add(first, ("lm", 1.0, 1.0, 5, 5, 1000))
    second.load_state_dict(first.state_dict())
    add(second, ("lm", 1.0, 1.0, 5, 5, 10))
    row = second.row(seconds=1.0)
    assert row["tokens"] == 1010
    assert row["tokens_per_second"] == 10


class Rank(Engine):
    """One of two ranks: what it is given it keeps, and adds what the other had."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank, self.others = rank, torch.zeros(())
        self.given = self.others

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given = tensor
        return tensor + self.others


@given(micro_batches, micro_batches)
def test_ranks_add_up(
    mine: list[tuple[str, float, float, int, int, int]], theirs: list[tuple[str, float, float, int, int, int]]
) -> None:
    """Rank 1 asks first, and its sums are what rank 0's engine adds."""
    other, main = Rank(1), Rank(0)
    together, rank0, rank1 = StepAccumulator(TYPES), StepAccumulator(TYPES, main), StepAccumulator(TYPES, other)
    for batch in mine:
        add(together, batch)
        add(rank0, batch)
    for batch in theirs:
        add(together, batch)
        add(rank1, batch)
    rank1.state_dict()
    main.others = other.given
    kept = rank0.state_dict()
    continued = StepAccumulator(TYPES, Rank(0)), StepAccumulator(TYPES, Rank(1))
    for one in continued:
        one.load_state_dict(kept)
    assert continued[1].state_dict()["sums"] == [[0.0] * len(sums) for sums in kept["sums"]]
    assert continued[0].state_dict() == kept
    row = rank0.row(seconds=1.0)
    expected = together.row(seconds=1.0)
    assert row["by_type"].keys() == expected["by_type"].keys()
    for key in ("loss", "ce", "kd", "l2", "tokens", "kd_coverage", "tokens_per_second"):
        assert row[key] == pytest.approx(expected[key])


def test_a_row_starts_anew_and_an_empty_one_is_refused() -> None:
    accumulator = StepAccumulator(TYPES)
    add(accumulator, ("lm", 9.0, 1.0, 3, 3, 4))
    assert not accumulator.is_empty()
    accumulator.row(seconds=1.0)
    assert accumulator.is_empty()
    with pytest.raises(ValueError, match="labelled position"):
        accumulator.row(seconds=1.0)
    add(accumulator, ("code", 6.0, 1.0, 3, 0, 4))
    row = accumulator.row(seconds=1.0)
    assert row["ce"] == 2.0
    assert row["kd"] is None
    assert list(row["by_type"]) == ["code"]


class Activations:
    """Stands for what a forward pass keeps for its backward pass."""


class KeepsActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, activations: Activations) -> torch.Tensor:
        ctx.activations = activations
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.expand(3), None


def test_the_graph_of_a_step_is_not_kept_alive() -> None:
    activations = Activations()
    alive = weakref.ref(activations)
    loss = KeepsActivations.apply(torch.ones(3, requires_grad=True), activations)
    zero = torch.zeros(())
    accumulator = StepAccumulator(TYPES)
    accumulator.add("lm", LossOutput(loss, zero, zero, zero, 3, 0), tokens=3)
    del loss, activations
    gc.collect()
    assert alive() is None
    assert accumulator.row(seconds=1.0)["loss"] == 1.0


def test_a_state_of_other_types_keeps_what_was_counted_of_them() -> None:
    earlier, now = StepAccumulator(TYPES), StepAccumulator(["lm", "dialogue"])
    add(earlier, ("code", 6.0, 0.0, 3, 0, 4))
    now.load_state_dict(earlier.state_dict())
    add(now, ("dialogue", 4.0, 0.0, 2, 0, 4))
    row = now.row(seconds=1.0)
    assert row["ce"] == 2.0
    assert {type: one["tokens"] for type, one in row["by_type"].items()} == {"dialogue": 4, "code": 4}
    assert now.state_dict()["types"] == ["lm", "dialogue", "code"]  # math_tool was never seen


def test_timings_are_all_that_is_left_out() -> None:
    row = {"kind": "train", "step": 3, "loss": 1.0, "seconds": 2.0, "rss_bytes": 5}
    assert without_timings(row) == {"kind": "train", "step": 3, "loss": 1.0}
    assert {"tokens_per_second", "signal_wait_seconds", "peak_memory_bytes"} <= TIMING_KEYS


def test_a_row_counts_what_is_learnt_beside_all_positions() -> None:
    accumulator = StepAccumulator(["code"])
    accumulator.add("code", output(3.0, 3.0, 0.0, 0.0, 3, 0), tokens=3, positions=10, padded_tokens=16)
    row = accumulator.row(seconds=2.0)
    assert (row["tokens"], row["positions"], row["tokens_per_second"], row["padding_share"]) == (3, 10, 5.0, 6 / 16)
    assert row["by_type"]["code"]["tokens"] == 3
    assert row["by_type"]["code"]["positions"] == 10


def test_sums_of_a_checkpoint_from_when_all_tokens_were_learnt_go_on() -> None:
    old = {"types": ["code"], "sums": [[4.0, 4.0, 0.0, 0.0, 3, 0, 4, 5, 0.0]]}
    accumulator = StepAccumulator(["code"])
    accumulator.load_state_dict(old)
    row = accumulator.row(seconds=1.0)
    assert (row["tokens"], row["positions"], row["loss"]) == (4, 4, 4.0 / 3)
