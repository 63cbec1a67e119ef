"""Positions chosen by the student's entropy: the share asked for, whatever the cut, the ranks and the interruptions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.support.distillation import answer, assert_same, fused_loss, make_problem, make_signal, reference_loss
from tests.support.models import tiny_model
from tests.support.ranks import World
from torch import Tensor
from torch.autograd import gradcheck

from liquid_llm.data.loader import collate
from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed import Engine
from liquid_llm.losses import OutputHead
from liquid_llm.metrics import StepAccumulator
from liquid_llm.models.loading import LoadedModel
from liquid_llm.optimizers import build_optimizer
from liquid_llm.passes import PassLimit, SignalOf
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.selection import BINS, PositionSelection, _shift
from liquid_llm.teachers.online import OnlineTeacher
from liquid_llm.training import Progress, Student, Trainer

VOCAB, SHARE = 512, 0.3
SCHEDULES = StepSchedules(Constant(0.7), Constant(2.0), Constant(0.0), Constant(1e-3))


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("kind", ["dense", "logits", "sparse", "sparse with tail"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_below_the_threshold_have_cross_entropy_alone(kind: str, temperature: float) -> None:
    problem, signal = make_problem(), make_signal(kind, 13, 29, temperature)
    entropy = torch.distributions.Categorical(logits=problem.head.logits(problem.hidden).detach()).entropy()
    threshold = float(entropy.sort().values[5:7].mean())  # not on one of them
    stated: dict[str, Any] = {"signal": signal, "alpha": 0.7, "temperature": temperature}
    got = answer(fused_loss, problem, chunk_tokens=4, min_entropy=threshold, **stated)
    assert_same(got, answer(reference_loss, problem, min_entropy=threshold, **stated), rtol=1e-9, atol=1e-11)
    assert signal is not None
    labelled = problem.labels >= 0
    mask = (torch.ones(13, dtype=torch.bool) if signal.mask is None else signal.mask) & labelled
    chosen = mask & (entropy >= threshold)
    assert 0 < int(chosen.sum()) < int(mask.sum())
    assert got[0].num_distilled == int(chosen.sum())
    expected = torch.where(mask, entropy, -1.0)[labelled]
    torch.testing.assert_close(got[0].entropies, expected)
    # The same as the two kinds of position, each computed by itself.
    at = {True: chosen.nonzero().squeeze(1), False: (~chosen & labelled).nonzero().squeeze(1)}
    plain = fused_loss(problem.hidden[at[False]], problem.head, problem.labels[at[False]])
    parts = [
        fused_loss(
            problem.hidden[row : row + 1], problem.head, problem.labels[row : row + 1], **stated | {"signal": one}
        )
        for row in at[True].tolist()
        for one in [signal.part(slice(row, row + 1))]
    ]
    torch.testing.assert_close(got[0].loss.detach(), (plain.loss + sum(one.loss for one in parts)).detach())
    torch.testing.assert_close(got[0].kd, sum(one.kd for one in parts))


def test_gradients_by_finite_differences() -> None:
    """Away from the threshold: which positions are chosen is no part of the loss."""
    problem = make_problem(5, vocab_size=9, width=3, ignored=0)
    signal = make_signal("dense", 5, 9, 2.0)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        stated: dict[str, Any] = {"signal": signal, "alpha": 0.6, "temperature": 2.0, "min_entropy": 1.2}
        output = fused_loss(hidden, OutputHead(weight), problem.labels, **stated)
        assert output.num_distilled in (1, 2, 3, 4)
        return output.loss

    assert gradcheck(value, problem.parameters)


def test_every_position_of_a_first_step_is_distilled_and_counted() -> None:
    problem, signal = make_problem(), make_signal("sparse", 13, 29, 1.0)
    every = answer(fused_loss, problem, signal=signal, alpha=0.5)
    looked = answer(fused_loss, problem, signal=signal, alpha=0.5, min_entropy=-math.inf)
    assert_same(looked, every, rtol=1e-12, atol=1e-12)
    assert looked[0].num_distilled == every[0].num_signal
    assert (every[0].entropies, every[0].num_distilled) == (None, None)


# ------------------------------------------------------------------------------------------------------- the threshold


def test_the_threshold_is_the_quantile_of_what_was_seen() -> None:
    selection = PositionSelection(0.2, ("lm", "code"), 1000)
    assert selection.thresholds() == {"lm": -math.inf, "code": -math.inf}
    entropies = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 6.0
    seen = [("code", entropies[:7000]), ("code", torch.cat([entropies[7000:], torch.full((500,), -1.0)]))]
    selection.update(selection.count(seen, torch.device("cpu")))
    found = selection.thresholds()
    assert found["lm"] == -math.inf
    assert float((entropies >= found["code"]).float().mean()) == pytest.approx(0.2, abs=1e-3)
    for _ in range(60):  # another stretch of training: the student is surer
        selection.update(selection.count([("code", entropies / 2)], torch.device("cpu")))
    found = selection.thresholds()
    assert float((entropies / 2 >= found["code"]).float().mean()) == pytest.approx(0.2, abs=2e-3)


@pytest.mark.parametrize("value", [0.0, 3.0, math.log(1000)])
def test_where_all_are_equally_sure_the_threshold_lies_in_their_bin(value: float) -> None:
    selection = PositionSelection(0.2, ("lm",), 1000)
    selection.update(selection.count([("lm", torch.full((50,), value))], torch.device("cpu")))
    found = selection.thresholds()["lm"]
    assert found <= value, "rather all of them than none"
    assert found == pytest.approx(value, abs=1.01 * math.log(1000) / BINS)


def test_the_positions_of_a_fresh_student_are_told_apart() -> None:
    """It is all but equally unsure everywhere: entropies within a hundredth of a nat below the highest there is."""
    highest = math.log(49_152)
    entropies = highest - 0.011 * torch.rand(400, generator=torch.Generator().manual_seed(0)) - 1e-4
    selection = PositionSelection(0.3, ("lm",), 49_152)
    for _ in range(3):
        selection.update(selection.count([("lm", entropies)], torch.device("cpu")))
        assert float((entropies >= selection.thresholds()["lm"]).float().mean()) == pytest.approx(0.3, abs=0.03)


def shares_of(selection: PositionSelection, steps: list[Tensor]) -> list[float]:
    """The share of each step's entropies that reach the threshold from before it."""
    found = []
    for entropies in steps:
        found.append(float((entropies >= selection.thresholds()["lm"]).float().mean()))
        selection.update(selection.count([("lm", entropies)], torch.device("cpu")))
    return found


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_student_that_becomes_surer_by_more_than_its_positions_differ(share: float) -> None:
    """As one from random weights does: faster and faster for a while, then slower; each step has its own chance."""
    numbers = torch.Generator().manual_seed(0)
    falls = torch.cat([torch.linspace(0.0, 0.04, 60), torch.linspace(0.04, 0.0, 40)])
    levels = 10.5 - falls.cumsum(0) + 0.002 * torch.randn(100, generator=numbers)
    steps = [level + 0.015 * torch.randn(1000, generator=numbers) for level in levels]
    found = shares_of(PositionSelection(share, ("lm",), 49_152), steps)
    assert sum(found[1:]) / 99 == pytest.approx(share, abs=0.1)
    assert sum(one < share / 4 for one in found) < 10
    assert sum(found[-20:]) / 20 == pytest.approx(share, abs=0.1)


def test_the_threshold_of_a_student_that_hardly_changes_rests() -> None:
    """Chance moves the mean of a batch, and a threshold that ran after it would let now few and now many through."""
    numbers = torch.Generator().manual_seed(0)
    steps = [
        torch.cat([2.0 * (1 + 0.25 * torch.randn(1, generator=numbers)) * row for row in rows])
        for rows in -torch.rand(100, 4, 256, generator=numbers).log()
    ]
    for share in (0.2, 0.5):
        found = torch.tensor(shares_of(PositionSelection(share, ("lm",), 1000), steps)[10:])
        still = torch.tensor(
            [float((one >= torch.cat(steps).quantile(1 - share)).float().mean()) for one in steps[10:]]
        )
        assert float(found.mean()) == pytest.approx(share, abs=0.02)
        assert float((found - share).square().mean()) < 1.7 * float((still - share).square().mean())


def test_a_threshold_from_before_there_were_levels_goes_on_where_it_was() -> None:
    selection, before = (PositionSelection(0.3, ("lm",), 1000) for _ in range(2))
    entropies = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 2.0
    shares_of(before, [entropies])
    state = before.state_dict()
    selection.load_state_dict({name: state[name] for name in ("highest", "counts")})
    assert selection.thresholds() == before.thresholds()
    assert shares_of(selection, [entropies - 0.5 * n / 9 for n in range(10)])[-1] == pytest.approx(0.3, abs=0.05)


def test_after_a_step_that_let_hardly_any_through_all_are_taken() -> None:
    """A student far off from what was expected, as with learning rates of toys; and never two such steps in a row."""
    selection = PositionSelection(0.3, ("lm", "code"), 1000)
    entropies = 0.01 * torch.rand(500, generator=torch.Generator().manual_seed(0))
    found = shares_of(selection, [entropies + level for level in (6.0, 6.0, 5.0, 4.4, 3.0, 1.0, 1.0)])
    assert found[:4] == [1.0, pytest.approx(0.3, abs=0.05), 0.0, 1.0]
    assert not any(one == other == 0.0 for one, other in pairwise(found))
    assert selection.thresholds()["code"] == -math.inf, "never seen"
    for number, is_miss in ((20, False), (10, True)):  # of 500, where 150 are wanted and a tenth of that is too few
        few = PositionSelection(0.3, ("lm",), 1000)
        shares_of(few, [torch.cat([entropies[:one] + 6.0, entropies[one:] + 3.0]) for one in (150, number)])
        again = PositionSelection(0.3, ("lm",), 1000)
        again.load_state_dict(few.state_dict())
        assert (few.thresholds()["lm"] == -math.inf) == (again.thresholds()["lm"] == -math.inf) == is_miss


@pytest.mark.parametrize("bins", [0, 3, -3, 70_000, -70_000])
def test_moved_counts_stay_whole(bins: int) -> None:
    counts = torch.arange(float(BINS), dtype=torch.float64)
    moved = _shift(counts, bins)
    assert moved.sum() == counts.sum()
    inside = torch.arange(BINS)[max(0, bins) + 1 : max(0, BINS - 1 + min(0, bins))]
    assert torch.equal(moved[inside], counts[inside - bins])


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A student and a teacher, made before any thread begins."""
    student, teacher = tiny_model("llama", VOCAB, seed=1), tiny_model("gpt2", VOCAB, seed=2)
    with torch.no_grad():  # some positions surer than others
        student.get_output_embeddings().weight.mul_(torch.linspace(5.0, 40.0, VOCAB).unsqueeze(1))
    return student, teacher


def batches(teacher: Any, rank: int, ranks: int, first: int = 0) -> Iterator[tuple[MicroBatch, SignalOf]]:
    """Micro-batches of rows of unequal length, types in turn."""
    online = OnlineTeacher(LoadedModel(teacher, None, None), VOCAB)
    index = first + rank
    while True:
        numbers = torch.Generator().manual_seed(index)
        rows = [torch.randint(1, VOCAB, (int(n),), generator=numbers).numpy() for n in (20, 17, 9, 24)]
        yield collate(("lm", "code")[index // 4 % 2], rows), lambda part, positions: online.signal(part)
        index += ranks


def run(
    models: tuple[Any, Any],
    engine: Engine | None = None,
    *,
    steps: int = 6,
    passes: int | None = None,
    state: Any = None,
) -> dict[str, Any]:
    """Some steps, from the start or from what another run left."""
    engine, model = engine or Engine(), copy.deepcopy(models[0])
    progress = Progress(passes=PassLimit(passes), selection=PositionSelection(SHARE, ("lm", "code"), VOCAB))
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    assert progress.selection is not None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress.selection.load_state_dict(state["selection"])
        progress.step, progress.data_position = state["step"], state["position"]
    accumulator, rows = StepAccumulator(("lm", "code"), engine), []

    def note(result: Any) -> None:
        for one in result.scored:
            accumulator.add(one.batch.type, one.output, tokens=one.batch.num_tokens)
        rows.append(accumulator.row(seconds=1.0, **result.values.as_row()))

    source = batches(models[1], engine.rank, engine.world_size, progress.data_position)
    trainer = Trainer(
        Student(model, torch.float32),
        optimizer,
        SCHEDULES,
        source,
        progress,
        steps,
        4,
        1.0,
        engine=engine,
        hooks=[(note, 1)],
    )
    assert trainer.train()
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "selection": progress.selection.state_dict(),
        "step": progress.step,
        "position": progress.data_position,
        "rows": rows,
    }


def assert_same_course(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """To rounding: the counts exactly, for no entropy here lies so near an edge."""
    for name in ("levels", "trends"):
        for type, value in expected["selection"][name].items():
            torch.testing.assert_close(got["selection"][name][type], value, rtol=0.0, atol=1.0)
    for type, counts in expected["selection"]["counts"].items():
        torch.testing.assert_close(got["selection"]["counts"][type], counts, rtol=0.0, atol=2.0)
        assert counts.sum() == got["selection"]["counts"][type].sum()
    for mine, theirs in zip(got["rows"], expected["rows"], strict=True):
        for name in ("loss", "ce", "kd", "kd_coverage"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name
        assert mine["kd_min_entropy"] == pytest.approx(theirs["kd_min_entropy"], rel=1e-3)


def test_about_the_share_is_distilled_from_the_second_time_that_a_type_is_seen(models: tuple[Any, Any]) -> None:
    rows = run(models)["rows"]
    assert [row["kd_coverage"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[0]["kd_min_entropy"] == {}
    for row in rows[2:]:
        assert row["kd_coverage"] == pytest.approx(SHARE, abs=0.1)
        assert set(row["kd_min_entropy"]) == {"lm", "code"}


def test_cutting_micro_batches_changes_nothing(models: tuple[Any, Any]) -> None:
    assert_same_course(run(models, passes=24), run(models))


@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_change_nothing(models: tuple[Any, Any], size: int) -> None:
    one = run(models)
    for found in World(size).run(partial(run, models)):
        assert_same_course(found, one)


def test_an_interrupted_run_goes_on_bit_for_bit(models: tuple[Any, Any]) -> None:
    whole, half = run(models, steps=6), run(models, steps=3)
    rest = run(models, steps=6, state=half)
    assert half["rows"] + rest["rows"] == whole["rows"]
    assert all(torch.equal(rest["model"][name], one) for name, one in whole["model"].items())
    for name in ("counts", "levels", "trends", "missed"):
        kept = whole["selection"][name]
        assert all(torch.equal(rest["selection"][name][type], one) for type, one in kept.items()), name
    lost = run(models, steps=6, state={**half, "selection": {"highest": 0.0, "counts": {}}})
    assert lost["rows"] != rest["rows"], "else the state is of no use"
