"""What a step asks of the student: one value from the schedules down to the loss.

alpha         weight of the KD term in [0, 1] where a position has a teacher signal; cross-entropy has the rest
temperature   T, which the logits of teacher and student are divided by before they are compared
gamma         weight of the squared distance to the reference student's logits
divergence    what is between the two distributions, a spec: see ``divergences``
min_entropy   nats: a position where the student's own entropy (at T = 1) is below has no KD term, cross-entropy has all
              of it; minus infinity for every position. None: entropies are not looked at
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from liquid_llm.losses.divergences import get_divergence


@dataclass(frozen=True)
class Objective:
    """See the module; the default is plain cross-entropy.

    Raises:
        ValueError: alpha outside [0, 1], a temperature that is not positive, a negative gamma, an unknown divergence or
            an option that it does not take.
    """

    alpha: float = 0.0
    temperature: float = 1.0
    gamma: float = 0.0
    divergence: str = "forward_kl"
    min_entropy: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not (self.gamma >= 0.0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be finite and not negative, got {self.gamma}")
        get_divergence(self.divergence, self.temperature)

    @property
    def signal_temperature(self) -> float:
        """The temperature at which a teacher is asked: 1 where the divergence divides by the objective's itself."""
        return 1.0 if get_divergence(self.divergence).tempers else self.temperature


CROSS_ENTROPY = Objective()
