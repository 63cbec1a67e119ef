"""Whether a run's stored signal is too noisy for its steps: said before the first of them.

variance   of a position's stored weights, summed over the ids that were drawn: what the draws of its store leave open
noise      of a step: s = alpha T sqrt(variance / thousands of positions learnt in the step)
cost       of it in held-out cross-entropy, nats a position: 0.45 s / (1 + 3 s)

The law was fitted on students of 7 and 16 million parameters after 60 to 300 steps of 256 to 32,768 tokens
(docs/LOG.md, 2026-11-26), to about 0.006 nats in most settings. Full logits gained 0.15 to 0.26 nats there, and 0.04
to 0.10 where alpha T^2 was 2.8: a cost of ``TOO_NOISY`` is one at which a student may end worse than without a teacher.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from liquid_llm.config import RunConfig
from liquid_llm.data.loader import TrainingStream, WeightedDataset
from liquid_llm.schedules import StepSchedules
from liquid_llm.signal_store.survey import drawn_variance
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.stored import StoredTeacher

log = logging.getLogger(__name__)

TOO_NOISY = 0.075  # nats
WORTH_SAYING = 0.02
_SAMPLES = 32  # records looked at
_POINTS = 64  # of the schedules
_MICRO_BATCHES = 16  # looked at, of each dataset


def predict_cost(noise: float) -> float:
    """Nats of held-out cross-entropy that a step's ``noise`` costs; see the module."""
    return 0.45 * noise / (1.0 + 3.0 * noise)


def step_noise(alpha: float, temperature: float, variance: float, num_positions: float) -> float:
    """The noise of steps that learn ``num_positions``; ``alpha`` is the root of its mean square over the run."""
    return alpha * temperature * math.sqrt(1000.0 * variance / num_positions)


def learnt_positions(stream: TrainingStream, mixture: Sequence[WeightedDataset]) -> dict[str, float]:
    """Positions that a micro-batch of each type learns on average: no padding, no prompt.

    Counted in some micro-batches of every dataset of the stream, from one end of an epoch to the other.
    """
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for order, part in zip(stream.orders, mixture, strict=True):
        count = min(order.num_micro_batches, _MICRO_BATCHES)
        places = [order.num_micro_batches * n // count for n in range(count)]
        mean = sum(order.micro_batch(place).num_positions for place in places) / count
        found[part.dataset.type].append((part.weight, mean))
    return {
        type: sum(weight * mean for weight, mean in parts) / sum(weight for weight, _ in parts)
        for type, parts in found.items()
    }


def say_noise(
    config: RunConfig,
    schedules: StepSchedules,
    router: TeacherRouter,
    positions: Mapping[str, float],
    first_step: int,
) -> None:
    """Log what the draws of each type's store are likely to cost, and what to change where it is too much.

    Args:
        positions: type -> what its micro-batches learn, see ``learnt_positions``.

    Raises:
        StorageError: a store cannot be read.
    """
    span = max(1, config.optimizer.steps - first_step)
    steps = sorted({first_step + span * point // _POINTS for point in range(_POINTS)})
    for type in router:
        teacher = router[type]
        if not isinstance(teacher, StoredTeacher) or type not in positions:
            continue
        objectives = [schedules.at(step).objective(type) for step in steps]
        alpha = math.sqrt(sum(one.alpha**2 for one in objectives) / len(objectives))
        temperature = objectives[0].signal_temperature
        num_positions = positions[type] * config.optimizer.grad_accum
        cost = _cost(teacher, type, alpha, temperature, num_positions)
        if cost < WORTH_SAYING:
            continue
        words = f"{type}: the draws of its stored signal are likely to cost {cost:.2f} nats of held-out cross-entropy"
        if cost < TOO_NOISY:
            log.info("%s in steps of %s positions; full logits gain about 0.2", words, f"{num_positions:,.0f}")
        else:
            lower = partial(_cost, teacher, type, alpha, 1.0, num_positions)
            coldest = teacher.temperature_range[0]
            advice = _advice(cost, config.optimizer.grad_accum, lower if temperature > 1.0 >= coldest else None)
            log.warning(
                "%s in steps of %s positions at T=%g: it may learn less than without a teacher. %s",
                words,
                f"{num_positions:,.0f}",
                temperature,
                advice,
            )


def _cost(teacher: StoredTeacher, type: str, alpha: float, temperature: float, num_positions: float) -> float:
    variance = drawn_variance(teacher.store, type, samples=_SAMPLES, temperature=temperature)
    return predict_cost(step_noise(alpha, temperature, variance, num_positions))


def _advice(cost: float, grad_accum: int, lower: Callable[[], float] | None) -> str:
    """What to change, and what it would come to; ``lower``: the cost at T = 1, where that is to be had."""

    def noise_of(cost: float) -> float:
        return cost / (0.45 - 3.0 * cost)

    times = math.ceil((noise_of(cost) / noise_of(TOO_NOISY / 2)) ** 2)
    advice = f"Raise --grad_accum to {grad_accum * times} for half of {TOO_NOISY:g} nats"
    if lower is not None:
        advice += f", or lower --kd_temperature to 1 ({lower():.2f} nats)"
    return f"{advice}, or capture with more draws (--codec_options)"
