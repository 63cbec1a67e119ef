"""Codec ``tail``: a few ids exactly, all others by draws that cost little more than half a byte each.

What is stored of a position is a random function of the teacher's distribution, and its expectation is that
distribution, at every temperature:

1.  Ids likely enough are stored exactly, with their log-probability in eighths of a nat or finer.
2.  The others are drawn in proportion to their probability, and all draws weigh the same. Leaving them out instead
    biases a student for good (Anshumann et al. 2025, arXiv 2503.16870): at T = 2 three quarters of a small teacher's
    mass lie outside its 12 likeliest tokens.
3.  A drawn id would take 12 bits or more if it were written down. But it does not matter which of many equally good ids
    stand for a tail. So they come from a list that the reader makes again by itself (``draws``): ids in
    proportion to how common they are, shuffled. The writer walks along the position's window of the list and accepts
    an id when its intensity (how often it is wanted) over its prior exceeds its arrival time (its slot in the window),
    which happens the wanted number of times on average. Only the slots of the accepted ids are stored: 5 bits each,
    what a tail says beyond the prior. This is relative entropy coding (Harsha et al. 2010; Theis and Yosri 2022, arXiv
    2110.12805) by thinning a Poisson process.
4.  Log-partitions at T = 4, 4/3, 1 and 2/3, and log-probabilities of drawn ids to a nat, give the weights at any other
    temperature. Roundings are dithered, so that they do not bias a weight.

At T = 2 no weight depends on a rounding. Between the stored temperatures a position's weights have a common factor that
is off by a percent or two (the error of interpolating its log-partition), and by less than 0.3 % on average.
``docs/LOG.md`` has the measurements, and what was tried and left out.

Version 1 has no log-partition at T = 4/3; its average is up to 1.4 % off between T = 1 and 2. Records say which version
they are of; a store of version 1 is read as it was, and goes on in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liquid_llm.errors import SignalError
from liquid_llm.losses.signals import HEAD_AND_DRAWS, SparseSignal
from liquid_llm.signal_store.codecs.base import (
    Codec,
    Options,
    Payload,
    PayloadError,
    Rows,
    Run,
    check_temperature,
    lagrange_weights,
    require,
)
from liquid_llm.signal_store.codecs.tail.bits import BitsError
from liquid_llm.signal_store.codecs.tail.chosen import MOST_EXACT, most_draws
from liquid_llm.signal_store.codecs.tail.draws import (
    BASE_TEMPERATURE,
    DRAW_STEP,
    NODES,
    NODES_BY_VERSION,
    PARTITION_STEP,
    TEMPERATURE_RANGE,
    Draws,
    Floats,
    candidates,
    dither_gain,
    dither_shift,
)
from liquid_llm.signal_store.codecs.tail.payload import Levels, Values, read_levels, write_levels
from liquid_llm.signal_store.codecs.tail.rows import encode_rows

_MOST_DRAWS = 1024
_LARGE_STORE = 10_000_000_000  # positions, from which on bytes count more than draws
_MANY_DRAWS = {"draws_t1": 180.0, "draws_t2": 112.0, "draws_t4": 30.0}  # about 100 bytes a position instead of 40
_LEAST_TAIL = 0.01  # of the exact ids' sum: less than rounding hides


class TailCodec(Codec):
    """Exact head and unbiased tail.

    Args:
        draws_t1, draws_t2, draws_t4: draws the whole distribution would get at T = 1, 2 and 4. An id is wanted as often
            as the greatest of the three demands; above about 1 / draws it is stored exactly. The gradient's error
            falls with the square root of the draws. A position's bytes go with the mass of its tail.
        version: of the form, see the module.
    """

    name = "tail"
    version = 2
    versions = (1, 2)
    temperature_range = TEMPERATURE_RANGE
    form = HEAD_AND_DRAWS

    def __init__(
        self, draws_t1: float = 48, draws_t2: float = 30, draws_t4: float = 8, *, version: int = version
    ) -> None:
        self.version = version
        self._nodes = NODES_BY_VERSION[version]
        values = {"draws_t1": draws_t1, "draws_t2": draws_t2, "draws_t4": draws_t4}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST_DRAWS:
                expected = f"more than 0, at most {_MOST_DRAWS}"
                raise SignalError(f"codec 'tail' needs a number of draws as {name}", got=value, expected=expected)
        self.options: Options = dict(values)
        self._draws = Draws(draws_t1, draws_t2, draws_t4)
        self.most_ids = MOST_EXACT + most_draws(self._draws)

    @classmethod
    def usual_options(cls, num_positions: int) -> Options:
        """A store of up to a terabyte takes about 100 bytes a position, a larger one 40."""
        return _MANY_DRAWS if num_positions < _LARGE_STORE else {}

    def encode_runs(self, logits: Tensor, runs: Sequence[Run], exhaustive: bool = False) -> Rows:
        return encode_rows(logits, runs, self._draws, exhaustive)

    def pack(self, rows: Rows) -> Payload:
        columns = {name: tensor.numpy() for name, tensor in rows.items()}
        n = columns["head_counts"].size
        head = np.arange(columns["head_ids"].shape[1]) < columns["head_counts"][:, None]
        draw = np.arange(columns["draw_slots"].shape[1]) < columns["draw_counts"][:, None]
        levels = Levels(
            seed=int(columns["seed"][0]) if n else 0,
            vocab_size=int(columns["vocab_size"][0]) if n else 0,
            head_counts=columns["head_counts"].astype(np.int64),
            head_ids=columns["head_ids"][head].astype(np.int64),
            head_levels=columns["head_levels"][head].astype(np.int64),
            partition=columns["partition"][:, : self._nodes].astype(np.int64),
            draw_counts=columns["draw_counts"].astype(np.int64),
            draw_slots=columns["draw_slots"][draw].astype(np.int64),
            draw_levels=columns["draw_levels"][draw].astype(np.int64),
        )
        data = write_levels(levels, self._draws) if n else b""
        return {"bytes": torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))}

    def decode(self, payload: Payload, start: int, stop: int, temperature: float, vocab_size: int) -> SparseSignal:
        check_temperature(self, temperature)
        stored = self._read(payload, vocab_size)
        if stop > (stored[0].num_positions if stored else 0):
            raise PayloadError(f"{stored[0].num_positions if stored else 0} positions, {stop} wanted")
        if stored is None:
            return _empty(temperature)
        levels, values = stored
        exponent = BASE_TEMPERATURE / temperature
        partition = _partition(levels, values, exponent)
        head_log = exponent * values.head_base - np.repeat(partition, levels.head_counts)
        head_weight = np.exp(head_log) / values.of_head(dither_gain, exponent)
        base = values.draw_base(levels.draw_levels)
        draw_log = exponent * base - np.repeat(partition, levels.draw_counts)
        wanted = np.exp(self._draws.log_intensity(base, values.of_draws(values.partition)))
        accepted = np.minimum(wanted, values.draw_share * candidates(vocab_size).window)  # times on average
        draw_weight = np.exp(draw_log) / (accepted * dither_gain(exponent, DRAW_STEP))
        # The divergence is weights times log-probabilities: a rounding that raises the one raises the other.
        head_log -= values.of_head(dither_shift, exponent)
        draw_log -= dither_shift(exponent, DRAW_STEP)
        return _padded(levels, values, (head_weight, head_log), (draw_weight, draw_log), start, stop, temperature)

    def parts(self, payload: Payload, vocab_size: int) -> dict[str, int]:
        sizes: dict[str, int] = {}
        if (stored := self._read(payload, vocab_size)) is not None:
            write_levels(stored[0], self._draws, sizes)
        return sizes

    def _read(self, payload: Payload, vocab_size: int) -> tuple[Levels, Values] | None:
        """What is stored; None for a payload without positions. Raises PayloadError."""
        data = require(payload, "bytes", torch.uint8, (None,)).numpy()
        try:
            return read_levels(data, self._draws, vocab_size, self._nodes) if data.size else None
        except BitsError as error:
            raise PayloadError(str(error)) from error


def _partition(levels: Levels, values: Values, exponent: float) -> Floats:
    """F(exponent) of every position [n].

    Between the nodes exact ids are summed as they are. What is interpolated is the log-partition of all others, smooth
    and convex in the exponent, by a polynomial through 0 (where it is the log of their number), the nodes, and 1 (where
    F is 0). The fourth node is far from those below 1 and the third from those between 1 and 2: each would bend the
    curve there, and is left out.
    """
    if exponent == 1.0:
        return np.zeros(levels.num_positions)
    nodes = NODES[: values.partition.shape[1]]
    if exponent in nodes:
        return values.partition[:, nodes.index(exponent)] + math.log(dither_gain(1.0, PARTITION_STEP))
    left_out = () if len(nodes) == 3 or exponent > 2.0 else (1.5,) if exponent < 1.0 else (3.0,)
    points = (0.0, 1.0, *(node for node in nodes if node not in left_out))
    tails = [np.log(np.maximum(levels.vocab_size - levels.head_counts, 0.5))]
    for point in points[1:]:
        head = values.head_sum(point)
        whole = 0.0 if point == 1.0 else values.partition[:, nodes.index(point)]
        tails.append(head + np.log(np.maximum(np.expm1(whole - head), _LEAST_TAIL)))
    weights = np.array(lagrange_weights(points, exponent))
    return np.asarray(np.logaddexp(values.head_sum(exponent), weights @ np.stack(tails)))


def _padded(
    levels: Levels,
    values: Values,
    head: tuple[Floats, Floats],
    draw: tuple[Floats, Floats],
    start: int,
    stop: int,
    temperature: float,
) -> SparseSignal:
    """Exact ids first, then draws, in rows as long as the record's longest; an id drawn twice has two slots."""
    width = int((levels.head_counts + levels.draw_counts).max())
    ids = np.zeros((stop - start, width), np.int64)
    weights = np.zeros((stop - start, width), np.float32)
    log_probs = np.zeros((stop - start, width), np.float32)
    before = np.cumsum(levels.draw_counts) - levels.draw_counts
    head_slot = np.arange(values.head_rows.size) - values.head_starts[values.head_rows]
    draw_slot = np.arange(values.draw_rows.size) + (levels.head_counts - before)[values.draw_rows]
    for rows, slot, which, (weight, log_prob) in (
        (values.head_rows, head_slot, levels.head_ids, head),
        (values.draw_rows, draw_slot, values.draw_ids, draw),
    ):
        begin, end = np.searchsorted(rows, (start, stop))
        at = (rows[begin:end] - start, slot[begin:end])
        ids[at], weights[at], log_probs[at] = which[begin:end], weight[begin:end], log_prob[begin:end]
    return SparseSignal(
        torch.from_numpy(ids),
        torch.from_numpy(weights),
        torch.from_numpy(log_probs),
        torch.zeros(stop - start),
        torch.ones(stop - start, dtype=torch.bool),
        temperature,
        form=HEAD_AND_DRAWS,
        num_exact=torch.from_numpy(levels.head_counts[start:stop].astype(np.int64)),
    )


def _empty(temperature: float) -> SparseSignal:
    nothing = torch.zeros(0, 0)
    mask, num_exact = torch.ones(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    return SparseSignal(
        nothing.long(),
        nothing,
        nothing.clone(),
        torch.zeros(0),
        mask,
        temperature,
        form=HEAD_AND_DRAWS,
        num_exact=num_exact,
    )
