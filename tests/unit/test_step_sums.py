"""What ranks exchange in a step: the sums are right, begin while backward runs, and happen once whatever goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.ranks import ThreadEngine, World
from torch.nn import Parameter

from liquid_llm.data.loader import collate
from liquid_llm.distributed import Engine
from liquid_llm.optimizers import build_optimizer
from liquid_llm.passes import PassLimit
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.step_sums import RankSums, StepSums, Tally, make_step_sums, split_into_buckets
from liquid_llm.training import Progress, Student, Trainer

SCHEDULES = StepSchedules(Constant(0.5), Constant(1.0), Constant(0.0), Constant(1e-2))
ONE = torch.ones(())


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.step_sums._BUCKET_BYTES", 2**14)


def test_one_process_has_nobody_to_exchange_with() -> None:
    sums, own = make_step_sums(Engine(), ()), Tally(7, 9, None, stop=True)
    assert type(sums) is StepSums
    assert sums.sum(own, ONE) == (own, ONE)


def test_a_gradient_that_no_rank_has_is_none_and_one_that_some_have_is_their_sum() -> None:
    def work(engine: Engine) -> list[Any]:
        parameters = [Parameter(torch.zeros(2)) for _ in range(3)]
        parameters[0].grad = torch.full((2,), 1.0 + engine.rank)
        if engine.rank == 1:
            parameters[1].grad = torch.ones(2)
        make_step_sums(engine, parameters).sum(Tally(1, 1), ONE)
        return [None if one.grad is None else one.grad.tolist() for one in parameters]

    assert World(2).run(work) == [[[3.0, 3.0], [1.0, 1.0], None]] * 2


def test_a_gradient_lies_in_memory_as_its_parameter_does() -> None:
    """Else the fused AdamW updates each weight with another one's gradient, without a word."""

    def work(engine: Engine) -> Any:
        parameter = Parameter(torch.arange(6.0).view(2, 3).t())
        gradient = torch.arange(6.0).view(3, 2)
        (parameter * gradient).sum().backward()
        make_step_sums(engine, [parameter]).sum(Tally(1, 1), ONE)
        assert torch.equal(parameter.grad, 2 * gradient)
        return parameter.stride(), parameter.grad.stride()

    assert World(2).run(work) == [((1, 3), (1, 3))] * 2


def test_gradients_larger_than_a_bucket_are_summed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liquid_llm.step_sums._BUCKET_BYTES", 24)

    def work(engine: Engine) -> list[Any]:
        parameters = [Parameter(torch.zeros(size)) for size in (2, 9, 3, 1)]
        parameters.append(Parameter(torch.zeros(2, 2, dtype=torch.float64)))
        assert len(list(split_into_buckets(parameters))) == 4
        for number, one in enumerate(parameters):
            one.grad = torch.full_like(one, number + engine.rank)
        make_step_sums(engine, parameters).sum(Tally(1, 1), ONE)
        return [one.grad.unique().tolist() for one in parameters]

    assert World(2).run(work) == [[[1.0], [3.0], [5.0], [7.0], [9.0]]] * 2


def test_gradients_that_backward_has_summed_are_left_alone_and_not_sent() -> None:
    def work(engine: Engine) -> list[Any]:
        events: list[str] = []
        parameter = Parameter(torch.zeros(2))
        parameter.grad = torch.full((2,), 6.0)
        recording = Recording(events, engine.rank, engine.world)
        sums = make_step_sums(recording, [parameter], dealt_out=True)
        told, loss = sums.sum(Tally(1 + engine.rank, 1, stop=engine.rank == 1), ONE)
        assert events == ["begun", "exchanged", "waited"], "the loss and the row"
        return [told, float(loss), parameter.grad.tolist()]

    assert World(2).run(work) == [[Tally(3, 2, None, stop=True), 2.0, [6.0, 6.0]]] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_what_one_rank_asks_for_all_learn(size: int) -> None:
    def work(engine: Engine) -> Tally:
        last = engine.rank == size - 1
        limit = None if engine.is_main else 64 - engine.rank
        own = Tally(3, 2**40 + engine.rank, limit, stop=last, save=engine.is_main)
        return RankSums(engine, [Parameter(torch.zeros(1))]).sum(own, ONE)[0]

    expected = Tally(3 * size, size * 2**40 + sum(range(size)), 65 - size, stop=True, save=True)
    assert World(size).run(work) == [expected] * size


def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all() -> None:
    def work(engine: Engine) -> tuple[float, float]:
        parameter = Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        loss = torch.tensor(float("nan") if engine.rank else 1.0)
        _, loss = RankSums(engine, [parameter]).sum(Tally(1, 1), loss)
        return float(loss), float(parameter.grad.sum())

    for loss, gradient in World(2).run(work):
        assert loss != loss
        assert gradient == 0


class Recording(ThreadEngine):
    """Notes when a sum begins, when it is waited for, and other exchanges."""

    def __init__(self, events: list[str], rank: int = 0, world: World | None = None) -> None:
        super().__init__(rank, world or World(1))
        self.events = events

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.events.append("exchanged")
        return super().sum(tensor)

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        self.events.append("begun")
        total = super().sum(tensor)
        tensor.copy_(total)
        return lambda: self.events.append("waited")


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
def test_sums_begin_while_backward_runs(name: str, small_buckets: None) -> None:
    """All but the last have begun when backward comes to the embedding, in a tied model too the last of all."""
    student = Student(tiny_model(name), torch.float32)
    events: list[str] = []
    sums = RankSums(Recording(events), student.parameters())
    count = len(list(split_into_buckets(list(student.parameters()))))
    assert count > 4
    student.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(lambda _: events.append("embedding"))
    batch = collate("lm", [torch.arange(1, 9).numpy()])
    loss = student(batch, None, SCHEDULES.at(0).objective("lm")).loss
    with sums.last_pass():
        loss.backward()
        events.append("backward has ended")
    sums.sum(Tally(1, 1), loss.detach())
    assert events.index("embedding") >= count - 2, events
    first = events.index("exchanged")
    assert "waited" not in events[:first], "none is waited for before all have begun"
    assert "begun" not in events[first:]
    assert events.count("begun") == count


def test_outside_of_the_last_pass_nothing_begins(small_buckets: None) -> None:
    student = Student(tiny_model("llama"), torch.float32)
    events: list[str] = []
    sums = RankSums(Recording(events), student.parameters())
    batch = collate("lm", [torch.arange(1, 9).numpy()])
    for _ in range(2):
        student(batch, None, SCHEDULES.at(0).objective("lm")).loss.backward()
        assert events == []
        with sums.last_pass():
            pass


@pytest.mark.parametrize("fails_at", [0, 12, 19])
def test_a_pass_that_runs_out_of_memory_in_backward_is_computed_anew_and_nothing_is_added_twice(
    fails_at: int, small_buckets: None
) -> None:
    """On one rank of two, at its first, a middle and its last gradient of the last pass; with passes before it."""
    first = tiny_model("llama")
    ids = torch.randint(1, first.config.vocab_size, (8, 6, 8), generator=torch.Generator().manual_seed(1))

    def train(engine: Engine, failing: bool) -> dict[str, Any]:
        model = copy.deepcopy(first)
        events: list[str] = []
        if engine.world_size > 1:
            engine = Recording(events, engine.rank, engine.world)
        batches = [(collate("lm", list(rows.numpy())), None) for rows in ids]
        trainer = Trainer(
            Student(model, torch.float32),
            build_optimizer(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
            SCHEDULES,
            iter(batches[engine.rank :: engine.world_size]),
            Progress(passes=PassLimit()),
            2,
            4,
            1.0,
            engine=engine,
        )
        if failing and engine.rank == 1:
            _run_out_of_memory(trainer.student, fails_at)
        trainer.step()
        result = trainer.step()
        weights = [one.detach() for one in model.parameters()]
        return {"weights": weights, "norm": result.grad_norm, "cut": trainer.progress.passes.max_tokens, "e": events}

    expected = train(Engine(), False)
    count = len(list(split_into_buckets(list(first.parameters()))))
    for failing in (False, True):
        for found in World(2).run(lambda engine, failing=failing: train(engine, failing)):
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
            assert found["cut"] == (24 if failing else None)
            assert found["e"].count("begun") == 2 * count
            assert found["e"].count("exchanged") == 1 + 2, (
                "of the first step's counts; then one of all that is told a step"
            )
            for mine, theirs in zip(found["weights"], expected["weights"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_in_bfloat16_too_ranks_take_the_steps_of_one_process() -> None:
    """Losses are divided before backward: a divided sum would have been rounded at other places."""
    first = tiny_model("llama")
    ids = torch.randint(1, first.config.vocab_size, (6, 3, 8), generator=torch.Generator().manual_seed(2))

    def train(engine: Engine) -> tuple[list[float], list[Any]]:
        model = copy.deepcopy(first)
        optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        batches = iter([(collate("lm", list(rows.numpy())), None) for rows in ids][engine.rank :: engine.world_size])
        student = Student(model, torch.bfloat16)
        trainer = Trainer(student, optimizer, SCHEDULES, batches, Progress(), 3, 2, 1.0, engine=engine)
        return [trainer.step().grad_norm for _ in range(3)], [one.detach() for one in model.parameters()]

    norms, weights = train(Engine())
    for found, others in World(2).run(train):
        assert found == pytest.approx(norms, rel=1e-5)
        for one, other in zip(weights, others, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def _run_out_of_memory(student: Student, fails_at: int) -> None:
    """In the backward of the second micro-batch, when ``fails_at`` gradients are there."""
    passes, found = [0], [0]
    student.register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))

    def fail(_: torch.Tensor) -> None:
        if passes[0] == 2:
            found[0] += 1
            if found[0] == fails_at + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    for one in student.parameters():
        one.register_post_accumulate_grad_hook(fail)
