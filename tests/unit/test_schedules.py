"""Schedules at every step, against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.errors import UsageError
from liquid_llm.losses.objective import Objective
from liquid_llm.schedules import (
    Constant,
    Piecewise,
    Ramp,
    StepSchedules,
    WarmupCosine,
    level_from,
    parse_piecewise,
)

ALPHA = parse_piecewise("0:0.7,400:0.5,800:0.3", option="--alpha_schedule", maximum=1.0)


@pytest.mark.parametrize(
    ("step", "value", "pending"),
    [(0, 0.7, 1), (1, 0.7, 1), (399, 0.7, 1), (400, 0.5, 2), (799, 0.5, 2), (800, 0.3, 3), (10**6, 0.3, 3)],
)
def test_piecewise_applies_an_entry_from_its_step_on(step, value, pending):
    schedule = Piecewise(0.9, ALPHA)
    assert schedule.value(step) == value
    assert schedule.pending(step) == pending


def test_piecewise_holds_the_initial_value_before_its_first_entry():
    schedule = Piecewise(0.9, ((5, 0.1),))
    assert [schedule.value(step) for step in (0, 4, 5)] == [0.9, 0.9, 0.1]
    assert schedule.pending(0) == 0


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.001, 1.0)), min_size=1, unique_by=lambda entry: entry[0]))
def test_a_schedule_reads_back_as_written(entries):
    entries = sorted(entries)
    text = ",".join(f"{step}:{value!r}" for step, value in entries)
    assert list(parse_piecewise(text, option="--x", maximum=1.0)) == entries


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    st.integers(0, 45),
    st.floats(0, 1, allow_subnormal=False),
)
def test_a_level_given_anew_holds_until_the_next_entry(steps, at, level):
    text = ",".join(f"{step}:{1 / (step + 2)!r}" for step in sorted(steps))
    before, after = (
        Piecewise(0.0, parse_piecewise(one, option="--x", maximum=1.0)) for one in (text, level_from(text, at, level))
    )
    following = min((step for step in steps if step > at), default=50)
    assert all(after.value(step) == level for step in range(at, following))
    assert all(after.value(step) == before.value(step) for step in range(following, 50))


@pytest.mark.parametrize(
    ("text", "entry", "words"),
    [
        ("0:0.7,,5:0.1", "''", "empty"),
        ("", "''", "empty"),
        ("0:0.7,x:0.1", "'x:0.1'", "not a number"),
        ("0:0.7,5", "'5'", "step:value"),
        ("5:0.7,4:0.1", "'4:0.1'", "out of order"),
        ("5:0.7,5:0.1", "'5:0.1'", "duplicate"),
        ("-1:0.7", "'-1:0.7'", "negative"),
        ("1:-0.7", "'1:-0.7'", "negative"),
        ("1:nan", "'1:nan'", "infinite"),
        ("1:inf", "'1:inf'", "infinite"),
        ("1:1.5", "'1:1.5'", "at most 1"),
        ("1.5:0.5", "'1.5:0.5'", "not a number"),
    ],
)
def test_a_bad_entry_is_refused_and_named(text, entry, words):
    with pytest.raises(UsageError) as caught:
        parse_piecewise(text, option="--alpha_schedule", maximum=1.0)
    assert entry in str(caught.value)
    assert words in str(caught.value)
    assert "--alpha_schedule" in str(caught.value)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UsageError, match="positive"):
        parse_piecewise("0:0", option="--temp_schedule")


def test_ramp_is_linear_then_flat():
    ramp = Ramp(0.7, 0.4, 300)
    assert ramp.value(0) == 0.7
    assert ramp.value(150) == pytest.approx(0.55)
    assert ramp.value(100) == pytest.approx(0.6)
    assert ramp.value(300) == ramp.value(10**6) == 0.4
    assert Ramp(0.7, 0.4, 0).value(0) == 0.4


def test_learning_rate_warms_up_reaches_the_peak_and_ends_at_a_tenth():
    lr = WarmupCosine(2.7e-4, 200, 1200)
    assert lr.value(0) == pytest.approx(2.7e-4 / 200)
    assert lr.value(99) == pytest.approx(2.7e-4 / 2)
    assert lr.value(199) == lr.value(200) == pytest.approx(2.7e-4)
    assert lr.value(700) == pytest.approx(2.7e-4 * (0.1 + 0.9 / 2))
    assert lr.value(1200) == lr.value(5000) == pytest.approx(2.7e-5)
    quarter = 0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    assert lr.value(450) == pytest.approx(2.7e-4 * quarter)


@given(st.integers(0, 50), st.integers(0, 100))
def test_learning_rate_never_exceeds_the_peak_nor_falls_below_the_floor_after_warm_up(warmup, total):
    lr = WarmupCosine(1.0, warmup, total)
    values = [lr.value(step) for step in range(total + 5)]
    assert max(values) <= 1.0 + 1e-12
    assert all(value >= 0.1 - 1e-12 for value in values[warmup:])
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_what_a_type_has_for_itself_stays_and_the_rest_follows_the_run():
    schedules = StepSchedules(
        Piecewise(0.9, ALPHA), Constant(2.0), Ramp(0.5, 0.0, 100), Constant(1e-3), overrides={"code": {"alpha": 0.1}}
    )
    for step, alpha, gamma in ((0, 0.7, 0.5), (50, 0.7, 0.25), (400, 0.5, 0.0)):
        values = schedules.at(step)
        assert values.objective() == values.objective("lm") == values.default == Objective(alpha, 2.0, gamma)
        assert values.objective("code") == Objective(0.1, 2.0, gamma)
        assert values.as_row() == {"kd_alpha": alpha, "kd_temperature": 2.0, "l2_gamma": gamma, "lr": 1e-3}
