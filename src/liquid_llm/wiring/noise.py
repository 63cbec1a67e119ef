"""Whether a run's stored signal is too noisy for its steps: said before the first of them.

variance   of a position's stored weights, summed over the ids that were drawn: what the draws of its store leave open
noise      of a step: s = alpha T sqrt(variance / thousands of positions learnt in the step); r is that of rare ids
           alone, whose rows of the output matrix hear of little else
cost       of it in held-out cross-entropy, nats a position: 0.1 s^2 / (1 + s) + 0.1 r / (0.2 + r)
too much   0.15 (1 - alpha) nats: the smaller the labels' part, the less full logits gain in a short run

Fitted on students of 0.5 to 16 million parameters, vocabularies of 4,096 and 49,152 ids, steps of 96 to 32,768
positions and T = 1 to 4, and tried on other settings (docs/LOG.md, 2026-11-26; ``benchmarks/bench_noise.py``). In a
small vocabulary no id is rare, and the same variance costs a fifth.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from liquid_llm.config import RunConfig
from liquid_llm.data.loader import TrainingStream, WeightedDataset
from liquid_llm.schedules import StepSchedules
from liquid_llm.signal_store.survey import DrawnVariance, drawn_variance
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.teachers.stored import StoredTeacher

log = logging.getLogger(__name__)

WORTH_SAYING = 0.02  # nats
_SAMPLES = 32  # records looked at
_POINTS = 64  # of the schedules
_MICRO_BATCHES = 16  # looked at, of each dataset


class Noise(NamedTuple):
    """Of a step: s and r of the module's words."""

    total: float
    rare: float

    @classmethod
    def of_step(cls, alpha: float, temperature: float, variance: DrawnVariance, num_positions: float) -> Noise:
        """``num_positions``: what a step learns; ``alpha``: the root of its mean square over the run."""
        return cls(*(alpha * temperature * math.sqrt(1000.0 * one / num_positions) for one in variance))

    @property
    def cost(self) -> float:
        """Nats of held-out cross-entropy that it costs; see the module."""
        return 0.1 * self.total**2 / (1.0 + self.total) + 0.1 * self.rare / (0.2 + self.rare)

    def in_larger_steps(self, times: int) -> Noise:
        """That of steps of so many times as many positions."""
        return Noise(self.total / math.sqrt(times), self.rare / math.sqrt(times))


def most_cost(alpha: float) -> float:
    """The cost in nats above which a student may learn less than without a teacher; see the module."""
    return max(WORTH_SAYING, 0.15 * (1.0 - alpha))


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
    positions: Callable[[], Mapping[str, float]],
    first_step: int,
) -> None:
    """Log what the draws of each type's store are likely to cost, and what to change where it is too much.

    Args:
        positions: type -> what its micro-batches learn, see ``learnt_positions``; asked where a signal is stored.

    Raises:
        StorageError: a store cannot be read.
    """
    stored = {type: one for type in router if isinstance(one := router[type], StoredTeacher)}
    if not stored:
        return
    counted = positions()
    span = max(1, config.optimizer.steps - first_step)
    steps = sorted({first_step + span * point // _POINTS for point in range(_POINTS)})
    for type, teacher in stored.items():
        if type not in counted:
            continue
        objectives = [schedules.at(step).objective(type) for step in steps]
        alpha = math.sqrt(sum(one.alpha**2 for one in objectives) / len(objectives))
        temperature = objectives[0].signal_temperature
        num_positions = counted[type] * config.optimizer.grad_accum
        noise = _noise(teacher, type, alpha, temperature, num_positions)
        if noise.cost < WORTH_SAYING:
            continue
        words = f"{type}: the draws of its stored signal are likely to cost {noise.cost:.2f} nats of held-out"
        words += f" cross-entropy in steps of {num_positions:,.0f} positions"
        if noise.cost < most_cost(alpha):
            log.info("%s; full logits gain about 0.2", words)
            continue
        advice = _advice(noise, most_cost(alpha), config.optimizer.grad_accum)
        if temperature > 1.0 >= teacher.temperature_range[0]:
            colder = _noise(teacher, type, alpha, 1.0, num_positions)
            advice += f", or lower --kd_temperature to 1 ({colder.cost:.2f} nats)"
        log.warning(
            "%s at T=%g: it may learn less than without a teacher. %s, or capture with more draws (--codec_options)",
            words,
            temperature,
            advice,
        )


def _noise(teacher: StoredTeacher, type: str, alpha: float, temperature: float, num_positions: float) -> Noise:
    variance = drawn_variance(teacher.store, type, samples=_SAMPLES, temperature=temperature)
    return Noise.of_step(alpha, temperature, variance, num_positions)


def _advice(noise: Noise, most: float, grad_accum: int) -> str:
    """How many micro-batches a step would need to be well below ``most``."""
    times = 2
    while noise.in_larger_steps(times).cost > most / 2:
        times *= 2
    return f"Raise --grad_accum to {grad_accum * times} ({noise.in_larger_steps(times).cost:.2f} nats)"
