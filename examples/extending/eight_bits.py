"""Codec ``eight_bits``: every logit in 8 bits, half of what ``full`` takes: ``--codec=eight_bits``.

A row's logits, from its highest down to ``RANGE`` nats below, are rounded to 256 levels. What lies lower is put at the
lowest level: 16 nats below the most probable token a probability is at most 1e-7, and a vocabulary of 100,000 such
tokens would still be 1 % of the mass. Any temperature can be read.
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
    row_maximum,
)

RANGE = 16.0
_STEP = RANGE / 255


class EightBitsCodec(Codec):
    """vocab bytes a position; a log-probability is wrong by at most half a step, 0.03 nats."""

    name = "eight_bits"
    version = 1
    temperature_range = (math.ulp(0.0), math.inf)
    most_ids = 0
    form = WHOLE

    def __init__(self) -> None:
        self.options: Options = {}

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        top = row_maximum(logits)
        below = top.sub(logits).clamp_(max=RANGE)
        return {"levels": below.div_(_STEP).round_().to(torch.uint8), TOP: top.squeeze(1)}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> LogitsSignal:
        check_temperature(self, temperature)
        levels = require(payload, "levels", torch.uint8, (None, vocab_size))
        if levels.shape[0] < stop:
            raise PayloadError(f"{levels.shape[0]} positions, {stop} wanted")
        rows = levels[start:stop].to(torch.float16).mul_(-_STEP)
        return LogitsSignal(rows, torch.ones(stop - start, dtype=torch.bool))
