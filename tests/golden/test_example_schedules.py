"""Alpha, temperature and learning rate of every step of the two annealing examples, against values worked by hand."""

import math

import pytest

from liquid_llm.cli.parse import parse
from liquid_llm.config import build_run_config, build_schedules
from liquid_llm.options import ANNEAL, options_of

A = """--dataset_name=wikitext --alpha=0.7 --T=1.2 --alpha_schedule=0:0.7,400:0.5,800:0.3
       --temp_schedule=0:1.2,800:1.0 --warmup_steps=200 --lr_peak=2.7e-4 --train_steps=1200"""
B = """--dataset_name=wikitext --alpha=0.5 --T=1.0 --alpha_schedule=0:0.5,2000:0.4,4000:0.3
       --warmup_steps=400 --lr_peak=2.7e-4 --grad_accum=2 --reset_optim_on_ctx_change --train_steps=6000"""


def values(command):
    config = build_run_config(ANNEAL, parse(options_of(ANNEAL), command.split(), "prog", "words"))
    steps = map(build_schedules(config).at, range(config.optimizer.steps))
    return [(one.default.alpha, one.default.temperature, one.lr) for one in steps]


def test_example_a():
    expected_alpha = [0.7] * 400 + [0.5] * 400 + [0.3] * 400
    expected_temperature = [1.2] * 800 + [1.0] * 400
    alpha, temperature, lr = map(list, zip(*values(A), strict=True))
    assert alpha == expected_alpha
    assert temperature == expected_temperature
    assert lr[:200] == pytest.approx([1.35e-6 * step for step in range(1, 201)])
    assert lr[200:] == pytest.approx([1.485e-4 + 1.215e-4 * math.cos(math.pi * k / 1000) for k in range(1000)])


def test_example_b():
    alpha, temperature, lr = map(list, zip(*values(B), strict=True))
    assert alpha == [0.5] * 2000 + [0.4] * 2000 + [0.3] * 2000
    assert set(temperature) == {1.0}
    assert lr[:400] == pytest.approx([6.75e-7 * step for step in range(1, 401)])
    assert lr[400:] == pytest.approx([1.485e-4 + 1.215e-4 * math.cos(math.pi * k / 5600) for k in range(5600)])
