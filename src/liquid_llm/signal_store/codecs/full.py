"""Codec ``full``: every logit in 16 bits.

Stored is ``z - max z`` in float16. Subtracting the maximum costs nothing (the distribution does not change) and puts
float16's digits where the probability is. Mean KL of what the teacher said to what is read, T=2, SmolLM2-135M: 8e-7,
against 1.3e-4 for bfloat16 of plain logits and 5e-5 for bfloat16 of shifted ones. Any temperature can be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from liquid_llm.losses.signals import WHOLE, LogitsSignal
from liquid_llm.signal_store.codecs.base import (
    TOP,
    Codec,
    Options,
    Payload,
    PayloadError,
    Rows,
    Run,
    check_temperature,
    require,
    row_blocks,
    row_maximum,
)

_LOWEST = -65504.0  # the most negative float16: a masked token's probability is 0 without an infinity in the loss


class FullCodec(Codec):
    """2 * vocab bytes a position; the yardstick for every other codec."""

    name = "full"
    version = 1
    temperature_range = (math.ulp(0.0), math.inf)
    most_ids = 0
    form = WHOLE

    def __init__(self) -> None:
        self.options: Options = {}

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        n, vocab_size = logits.shape
        kept, tops = logits.new_empty(n, vocab_size, dtype=torch.float16), logits.new_empty(n)
        for rows in row_blocks(n, logits.device, 4 * vocab_size):
            top = row_maximum(logits[rows])
            kept[rows] = logits[rows].sub_(top).clamp_(min=_LOWEST)
            tops[rows] = top.squeeze(1)
        return {"logits": kept, TOP: tops}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> LogitsSignal:
        check_temperature(self, temperature)
        stored = require(payload, "logits", torch.float16, (None, vocab_size))
        if stored.shape[0] < stop:
            raise PayloadError(f"{stored.shape[0]} positions, {stop} wanted")
        return LogitsSignal(stored[start:stop], torch.ones(stop - start, dtype=torch.bool))
