"""Micro-batches in parts: the same sums, the same gradient, and what happens when memory runs out."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import tiny_model
from tests.support.teachers import VOCAB, batch_of, make_samples, random_logits, tiny_teacher

from liquid_llm import passes
from liquid_llm.data.types import IGNORE_INDEX, MicroBatch
from liquid_llm.errors import DeviceError
from liquid_llm.losses.objective import Objective
from liquid_llm.optimizers import build_optimizer
from liquid_llm.passes import PassLimit
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.signal_store.codecs.full import FullCodec
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.teachers.teacher import Prepared
from liquid_llm.training import Progress, Student, Trainer

OBJECTIVE = Objective(alpha=0.6, temperature=2.0, gamma=0.3)
SCHEDULES = StepSchedules(Constant(0.6), Constant(2.0), Constant(0.3), Constant(1e-2))
SIGNALS = ("none", "online", "sparse", "logits")


def student_of(seed: int = 1) -> Student:
    model, old = (tiny_model("llama", vocab_size=VOCAB, seed=n, max_position_embeddings=256) for n in (seed, 7))
    return Student(model, torch.float32, old)


def signal_of(kind: str, batch: MicroBatch):
    """What a feed hands out with a batch: a stored signal lacks every third row's record."""
    if kind == "none":
        return None
    if kind == "online":
        online = OnlineTeacher(tiny_teacher(), VOCAB)
        return lambda part, positions: online.signal(part)
    codec = TopKCodec(16) if kind == "sparse" else FullCodec()
    logits = random_logits(batch.num_positions, VOCAB, seed=5)
    signal = codec.decode(codec.pack(codec.encode(logits, 1, 0)), 0, batch.num_positions, 2.0, VOCAB)
    signal = replace(signal, mask=torch.arange(batch.num_positions) % 3 != 0, num_signal=None)
    return lambda part, positions: Prepared(signal).part(positions).signal


def gradients(limit: PassLimit, kind: str, batch: MicroBatch):
    """Sums of a batch's passes and the gradient they leave."""
    student, sums, counts = student_of(), torch.zeros(4), torch.zeros(2)
    made = signal_of(kind, batch)
    for part, positions in limit.parts(batch):
        output = student(part, None if made is None else made(part, positions), OBJECTIVE)
        output.loss.backward()
        sums += torch.stack([output.loss.detach(), output.ce, output.kd, output.l2])
        counts += torch.tensor([output.num_positions, output.num_signal])
    return sums, counts, [p.grad for p in student.model.parameters()]


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("max_tokens", [1, 130, 200])
def test_the_passes_of_a_batch_add_up_to_it(kind: str, max_tokens: int) -> None:
    batch = batch_of(make_samples(7, low=20, high=60))
    whole, counted, expected = gradients(PassLimit(), kind, batch)
    sums, counts, got = gradients(PassLimit(max_tokens), kind, batch)
    assert counts.tolist() == counted.tolist()
    torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_tokens=st.one_of(st.none(), st.integers(1, 600)),
)
def test_parts_hold_every_row_and_position_once_and_no_more_than_is_allowed(
    lengths: list[int], max_tokens: int | None
) -> None:
    batch = batch_of([make_samples(1, low=n, high=n, seed=n)[0] for n in lengths])
    time = batch.input_ids.shape[1]
    parts = list(PassLimit(max_tokens).parts(batch))
    assert torch.equal(torch.cat([part.input_ids for part, _ in parts]), batch.input_ids)
    assert torch.equal(torch.cat([part.labels for part, _ in parts]), batch.labels)
    assert torch.equal(torch.cat([part.targets for part, _ in parts]), batch.targets)
    assert sum((part.samples for part, _ in parts), ()) == batch.samples
    held = [number for _, positions in parts for number in range(batch.num_positions)[positions]]
    assert held == list(range(batch.num_positions))
    for part, positions in parts:
        assert part.num_positions == len(range(batch.num_positions)[positions]) == int(part.row_positions.sum())
        assert torch.equal(part.labels.reshape(-1)[part.positions], part.targets)
        assert part.num_positions == int((part.labels != IGNORE_INDEX).sum())
        assert max_tokens is None or part.padded_tokens <= max(max_tokens, time)


# ------------------------------------------------------------------------------------------------------- out of memory


class Small(Student):
    """A student whose device holds passes of so many padded tokens; the ``late`` ones fail in the backward pass, with
    half of the gradient there."""

    def __init__(self, student: Student, holds: int, *, late: bool) -> None:
        super().__init__(student.model, student.compute_dtype, student.reference)
        self.holds, self.late = holds, late
        self.sizes: list[int] = []
        self.alive_when_cut: list[int] = []
        self._results: list[weakref.ref] = []

    def forward(self, batch, signal, objective):
        self.sizes.append(batch.padded_tokens)
        self.alive_when_cut.append(sum(one() is not None for one in self._results))
        if batch.padded_tokens <= self.holds:
            return super().forward(batch, signal, objective)
        if not self.late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        output = super().forward(batch, signal, objective)
        self._results.append(weakref.ref(output.ce))
        no_room = _once_no_room(after=3)
        for parameter in self.model.parameters():
            parameter.register_hook(no_room)
        return output


def _once_no_room(after: int):
    """A hook that lets so many gradients pass, fails once, and does nothing from then on."""
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == after + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient

    return hook


def trainer(student, kind: str, steps: int = 3, grad_accum: int = 2) -> Trainer:
    def batches():
        for number in range(steps * grad_accum):
            batch = batch_of(make_samples(5, low=20, high=60, seed=number))
            yield batch, signal_of(kind, batch)

    optimizer = build_optimizer(student.model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    return Trainer(student, optimizer, SCHEDULES, batches(), Progress(), steps, grad_accum, 1.0)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_step_that_does_not_fit_is_cut_and_comes_out_the_same(
    kind: str, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "liquid_llm")
    plain = trainer(student_of(), kind)
    small = Small(student_of(), 130, late=late)
    cut = trainer(small, kind)
    for _ in range(3):
        expected, got = plain.step(), cut.step()
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert sum(float(one.output.loss.detach()) for one in got.scored) == pytest.approx(
            sum(float(one.output.loss.detach()) for one in expected.scored), rel=1e-5
        )
        assert sum(one.batch.num_tokens for one in got.scored) == sum(one.batch.num_tokens for one in expected.scored)
    for a, b in zip(cut.student.model.parameters(), plain.student.model.parameters(), strict=True):
        # A step is 1e-2: Adam divides by the gradient's own size, which makes rounding of the smallest ones visible.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
    limit = cut.progress.passes.max_tokens
    assert limit is not None
    # Found once: from then on nothing larger is tried.
    largest = max(number for number, size in enumerate(small.sizes) if size > 130)
    assert all(size <= 130 for size in small.sizes[largest + 1 :])
    assert len(small.sizes) > largest + 6
    assert "out of memory" in caplog.text
    assert "--grad_checkpoint" in caplog.text


def test_nothing_of_the_failed_pass_is_alive_when_it_is_tried_again() -> None:
    small = Small(student_of(), 130, late=True)
    trainer(small, "none").step()
    gc.collect()
    assert len(small._results) > 0
    assert set(small.alive_when_cut) == {0}


def test_what_earlier_passes_made_is_let_go_before_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []
    alive_when_given_back: list[int] = []

    def compute(part: MicroBatch, positions: slice, name: str) -> torch.Tensor:
        if name == "large" and part.padded_tokens > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result = torch.zeros(1)
        made.append(weakref.ref(result))
        return result

    def give_back(_: torch.device) -> None:
        alive_when_given_back.append(sum(one() is not None for one in made))

    monkeypatch.setattr(passes, "release_memory", give_back)
    batch = batch_of(make_samples(5, low=20, high=60))
    PassLimit().run(
        [(batch, "small"), (batch, "large")],
        compute,
        lambda: None,
        device=torch.device("cpu"),
        where="here",
        consumers=lambda: "",
    )
    assert alive_when_given_back[0] == 0
    assert len(alive_when_given_back) > 1


def test_one_row_that_does_not_fit_ends_it_with_the_largest_consumers() -> None:
    run = trainer(Small(student_of(), 10, late=False), "none")
    run.consumers = lambda: "teacher weights 6.0 GiB, student 1.6 GiB, logits 0.5 GiB"
    before = [p.detach().clone() for p in run.student.model.parameters()]
    with pytest.raises(DeviceError, match=r"step 0: a single row of \d+ tokens.*teacher weights 6.0 GiB") as failure:
        run.step()
    assert failure.value.exit_code == 6
    assert "--grad_checkpoint" in str(failure.value)
    for a, b in zip(before, run.student.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is None
    assert run.progress.step == 0


def test_moments_that_do_not_fit_are_no_reason_to_cut() -> None:
    run = trainer(student_of(), "none")

    def no_room() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.optimizer.step = no_room
    with pytest.raises(DeviceError, match="moments do not fit"):
        run.step()


def test_other_errors_of_a_pass_are_not_taken_for_a_lack_of_memory() -> None:
    student = student_of()
    run = trainer(student, "none")

    def broken(batch, signal, objective):
        raise RuntimeError("shape mismatch")

    student.forward = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run.step()
    assert run.progress.passes.max_tokens is None
