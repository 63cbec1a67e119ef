"""A change of the numbers is a decision, never an accident."""

import json

import pytest
from tests.golden.compare import RECORDED, RUNS, STEPS, present


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_losses_are_the_recorded_ones(run):
    recorded = json.loads(RECORDED.read_text())[run]
    now = present(run)
    assert len(recorded) == len(now) == STEPS
    # Processors sum in different orders: 20 steps carry a difference of 1e-7 a product to about 1e-5. A changed
    # formula, order or seed shows in the first digits. `python -m tests.golden.compare` prints both.
    for old, new in zip(recorded, now, strict=True):
        assert new == pytest.approx(old, rel=1e-4), f"step {old['step']}"
