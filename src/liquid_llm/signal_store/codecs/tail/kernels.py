"""The pass over all logits as a Triton kernel: a program walks a row once.

Sums are taken over exponentials of the largest logit so far, and brought to the largest of all as it is found.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan(logits, row_stride, vocab_size, peaks, num_runs, logs, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit of every run of RUN ids, and log of sum exp(k (z - top) / 4), k = 1, 2, 4, 6 and 3."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([], float("-inf"), tl.float32)
    by_1 = tl.zeros([], tl.float32)
    by_2 = tl.zeros([], tl.float32)
    by_3 = tl.zeros([], tl.float32)
    by_4 = tl.zeros([], tl.float32)
    by_6 = tl.zeros([], tl.float32)
    for begin in range(0, vocab_size, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + places, mask=places < vocab_size, other=float("-inf"))
        tops = tl.max(tl.reshape(z, (BLOCK // RUN, RUN)), axis=1)
        runs = begin // RUN + tl.arange(0, BLOCK // RUN)
        tl.store(peaks + row * num_runs + runs, tops, mask=runs < num_runs)
        now = tl.maximum(largest, tl.max(tops, axis=0))
        base = tl.where(now == float("-inf"), 0.0, now)  # masked tokens alone so far
        fall = tl.exp((largest - base) * 0.25)
        one = tl.exp((z - base) * 0.25)
        two = one * one
        three = two * one
        by_1 = by_1 * fall + tl.sum(one, axis=0)
        by_2 = by_2 * fall * fall + tl.sum(two, axis=0)
        by_3 = by_3 * fall * fall * fall + tl.sum(three, axis=0)
        by_4 = by_4 * fall * fall * fall * fall + tl.sum(two * two, axis=0)
        by_6 = by_6 * fall * fall * fall * fall * fall * fall + tl.sum(three * three, axis=0)
        largest = now
    out = logs + row * 5
    tl.store(out, tl.log(by_1))
    tl.store(out + 1, tl.log(by_2))
    tl.store(out + 2, tl.log(by_4))
    tl.store(out + 3, tl.log(by_6))
    tl.store(out + 4, tl.log(by_3))
