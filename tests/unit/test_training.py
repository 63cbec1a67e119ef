"""What is applied before each step, and what a step does."""

import copy
import gc
import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
from tests.support.models import tiny_model

from liquid_llm.data.loader import collate
from liquid_llm.errors import NumericalError
from liquid_llm.losses.objective import Objective
from liquid_llm.optimizers import build_optimizer
from liquid_llm.schedules import Constant, Piecewise, Ramp, StepSchedules, WarmupCosine
from liquid_llm.training import Progress, SkippedSteps, Student, Trainer

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


# steps


def batches(model, rows):
    """Micro-batches of ``rows`` sequences for ever, the same for the same seed."""
    generator = torch.Generator().manual_seed(9)
    while True:
        drawn = [torch.randint(0, model.config.vocab_size, (12,), generator=generator) for _ in range(rows)]
        yield collate("lm", [row.numpy() for row in drawn]), None


def trainer(schedules, *, grad_accum=1, rows=4, total_steps=6, **options):
    model = tiny_model("gpt2")  # in evaluation mode: no dropout
    optimizer = build_optimizer(model, **OPTIONS)
    student = Student(model, torch.float32)
    return Trainer(
        student, optimizer, schedules, batches(model, rows), Progress(), total_steps, grad_accum, 1.0, **options
    )


SCHEDULES = StepSchedules(
    Piecewise(0.9, ((0, 0.7), (2, 0.5))), Piecewise(1.2, ((4, 1.0),)), Constant(0.0), WarmupCosine(1e-2, 3, 6)
)


def test_the_values_of_a_step_are_applied_before_it_is_taken():
    run = trainer(SCHEDULES)
    seen = []
    forward, step = run.student.forward, run.optimizer.step
    rates = []

    def watched_forward(batch, signal, objective):
        seen.append(objective)
        return forward(batch, signal, objective)

    def watched_step():
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        return step()

    run.student.forward, run.optimizer.step = watched_forward, watched_step
    assert run.train()
    assert [one.alpha for one in seen] == [0.7, 0.7, 0.5, 0.5, 0.5, 0.5]
    assert [one.temperature for one in seen] == [1.2, 1.2, 1.2, 1.2, 1.0, 1.0]
    assert rates == [[pytest.approx(SCHEDULES.lr.value(number))] * 2 for number in range(6)]


def test_accumulating_gives_the_step_of_one_large_batch():
    many, one = trainer(SCHEDULES, grad_accum=4, rows=2), trainer(SCHEDULES, grad_accum=1, rows=8)
    first, second = many.step(), one.step()
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    for a, b in zip(many.student.model.parameters(), one.student.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (many.progress.data_position, one.progress.data_position) == (4, 1)
    assert many.progress.tokens_seen == one.progress.tokens_seen == 96


def test_padding_counts_neither_as_seen_nor_in_the_mean():
    """Rows of 12, 5 and 2 tokens padded to 12 are 19 tokens and 16 labelled positions."""
    lengths = (12, 5, 2)
    rows = [torch.arange(1, n + 1).numpy() for n in lengths]
    run = trainer(SCHEDULES, grad_accum=2)
    run.batches = itertools.repeat((collate("code", rows), None))
    padded = run.step()
    assert run.progress.tokens_seen == 2 * sum(lengths)
    run.step()
    assert run.progress.tokens_seen == 4 * sum(lengths)
    alone = trainer(SCHEDULES, grad_accum=3)
    alone.batches = ((collate("code", [row]), None) for row in rows)
    assert padded.grad_norm == pytest.approx(alone.step().grad_norm, rel=1e-4)
    assert alone.progress.tokens_seen == sum(lengths)


def test_each_type_is_taught_by_its_own_objective():
    own = {"code": {"alpha": 0.1, "temperature": 3.0}}
    run = trainer(replace(SCHEDULES, overrides=own), grad_accum=3)
    ids = torch.arange(1, 9).numpy()
    run.batches = iter([(collate(type, [ids]), None) for type in ("lm", "code", "math_tool")])
    seen = {}

    def watch(module, given):
        batch, _, objective = given
        seen[batch.type] = (objective.alpha, objective.temperature)

    run.student.register_forward_pre_hook(watch)
    assert run.step().values.as_row() == {"kd_alpha": 0.7, "kd_temperature": 1.2, "l2_gamma": 0.0, "lr": 1e-2 / 3}
    assert seen == {"lm": (0.7, 1.2), "code": (0.1, 3.0), "math_tool": (0.7, 1.2)}


def test_the_student_is_a_module_of_the_trained_model_alone():
    model, reference = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    student = Student(model, torch.float32, reference)
    assert list(map(id, student.parameters())) == list(map(id, model.parameters()))
    assert list(student.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    student.train()
    assert model.training
    assert not reference.training
    batch = collate("lm", [torch.arange(1, 9).numpy()])
    with_old = student(batch, None, Objective(gamma=0.5))
    assert with_old.l2 > 0
    student.reference = None
    assert student(batch, None, Objective()).loss == with_old.ce
    with pytest.raises(ValueError, match="needs a reference student"):
        student(batch, None, Objective(gamma=0.5))


def test_the_reference_student_is_let_go_when_gamma_has_come_to_zero():
    run = trainer(replace(SCHEDULES, gamma=Ramp(0.5, 0.0, 2)))
    run.student = Student(run.student.model, torch.float32, tiny_model("gpt2"))
    held = weakref.ref(run.student.reference)
    for expected in (True, True, False):
        run.step()
        gc.collect()
        assert (held() is not None) == expected


def test_hooks_run_every_so_many_steps_and_a_stop_is_heeded_between_steps():
    calls = []
    run = trainer(SCHEDULES, hooks=[(lambda result: calls.append(result.step), 2)], stopping=lambda: len(calls) == 2)
    assert not run.train()
    assert calls == [2, 4]
    assert run.progress.step == 4


def test_a_loss_that_is_not_finite_leaves_the_weights():
    run = trainer(SCHEDULES)
    run.student.model.transformer.ln_f.weight.data[0] = float("nan")
    before = [p.detach().clone() for p in run.student.model.parameters()]
    with pytest.raises(NumericalError, match=r"step 0.*not finite"):
        run.step()
    for a, b in zip(before, run.student.model.parameters(), strict=True):
        assert torch.equal(
            a,
            b,
        ) or (torch.isnan(a).any() and torch.isnan(b).any())
    assert run.progress.step == 0


def bad_in(run, steps):
    """Lets the loss of the second micro-batch of some steps be no number; its gradient is one."""
    forward, calls = run.student.forward, []

    def broken(batch, signal, objective):
        calls.append(run.progress.step)
        output = forward(batch, signal, objective)
        bad = calls.count(calls[-1]) == run.grad_accum and calls[-1] in steps
        return replace(output, loss=output.loss * float("nan")) if bad else output

    run.student.forward = broken
    return run


def test_a_bad_step_is_left_out_counted_and_named(caplog):
    skipped = SkippedSteps(most_in_a_row=2)
    run = bad_in(trainer(SCHEDULES, grad_accum=2, names=lambda number: [f"s{number}"]), {1, 2, 4})
    run.progress.skipped = skipped
    taken = []
    for step in range(5):
        weights = [one.detach().clone() for one in run.student.model.parameters()]
        moments = copy.deepcopy(run.optimizer.state_dict()["state"])
        result = run.step()
        same = all(map(torch.equal, weights, run.student.model.parameters()))
        taken.append(not same)
        assert result.step == step + 1
        assert bool(result.scored) == (not same)
        assert math.isnan(result.grad_norm) == same
        if same:
            after = run.optimizer.state_dict()["state"]
            assert all(torch.equal(after[n][k], one) for n, state in moments.items() for k, one in state.items())
            assert all(one.grad is None for one in run.student.model.parameters())
    assert taken == [True, False, False, True, False]
    assert (skipped.count, skipped.in_a_row, run.progress.data_position) == (3, 1, 10)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "step 1; got " in said[0]
    assert "lm samples s3: the step is left out (1 so far)" in said[0]  # its second micro-batch alone
    assert "s2" not in said[0]


def test_one_bad_step_too_many_in_a_row_ends_with_its_texts():
    run = bad_in(trainer(SCHEDULES, names=lambda number: [f"s{number}-{n}" for n in range(40)]), {1, 2, 3})
    run.progress.skipped = SkippedSteps(most_in_a_row=2)
    for _ in range(3):
        run.step()
    with pytest.raises(NumericalError, match=r"step 3: .*lm samples s3-0, s3-1, .*, s3-31 and 8 more") as raised:
        run.step()
    assert "--skip_bad_steps" in str(raised.value)
    assert run.progress.step == 3


def test_where_no_loss_shows_it_all_texts_of_the_step_are_named():
    """A gradient that overflows comes of a loss that is a number."""
    run = trainer(SCHEDULES, grad_accum=2, names=lambda number: [f"s{number}"])
    forward = run.student.forward

    def steep(batch, signal, objective):
        output = forward(batch, signal, objective)
        return replace(output, loss=output.loss.detach() + (output.loss - output.loss.detach()) * 3e38)

    run.student.forward = steep
    with pytest.raises(NumericalError, match=r"gradient norm (inf|nan); lm samples s0; lm samples s1"):
        run.step()
