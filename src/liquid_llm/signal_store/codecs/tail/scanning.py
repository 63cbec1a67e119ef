"""All of codec ``tail`` that needs every logit of a position: one pass by a kernel, or some by torch's own operations.

The kernel is taken on a CUDA device on which it compiles and gives the right numbers, which is tried once a process.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from liquid_llm.runtime import Choice
from liquid_llm.signal_store.codecs.base import row_blocks
from liquid_llm.signal_store.codecs.tail.chosen import MOST_EXACT, RUN
from liquid_llm.signal_store.codecs.tail.draws import Candidates, device_steps

log = logging.getLogger(__name__)

EAGER, TRITON = "eager", "triton"
_KERNEL_BLOCK = 4096  # entries that a program holds at once
_BLOCK_BYTES = 64 * 2**20  # of logits whose powers exist at the same time, where there is no cache to suit
_TRIED_ROWS, _TRIED_VOCAB, _TOLERANCE = 3, 10_000, 1e-4


def scan(logits: Tensor, known: Candidates, beside: Callable[[slice], object]) -> tuple[Tensor, Tensor]:
    """One pass over logits [n, vocab], float32.

    Args:
        beside: called with runs of rows that are in the cache then; with all there are in the end.

    Returns:
        the largest logit of every run of ``RUN`` ids [n, runs], the last run may be shorter, with a NaN in rows that
        hold one; log of sum exp(k (z - top) / 4) [n, 5], k = 1, 2, 4, 6 and 3.
    """
    if choose_scan(logits.device).value == TRITON:
        beside(slice(0, logits.shape[0]))
        return by_kernel(logits)
    return by_torch(logits, known, beside)


def by_torch(
    logits: Tensor, known: Candidates, beside: Callable[[slice], object] = lambda rows: None
) -> tuple[Tensor, Tensor]:
    """As ``scan``, block by block: on a CPU a block is read from memory once and then found in the cache."""
    n, vocab_size = logits.shape
    even = vocab_size // RUN * RUN
    peaks = logits.new_empty(n, -(-vocab_size // RUN))
    sums = logits.new_empty(n, 5)
    blocks = row_blocks(n, logits.device, 4 * vocab_size, _BLOCK_BYTES)
    powers = logits.new_empty(2, blocks[0].stop - blocks[0].start, vocab_size)
    for rows in blocks:
        block, total = logits[rows], sums[rows]
        runs = block[:, :even].view(block.shape[0], even // RUN, RUN)
        torch.amax(runs, dim=2, out=peaks[rows, : even // RUN])
        if even < vocab_size:
            torch.amax(block[:, even:], dim=1, out=peaks[rows, -1])
        beside(rows)
        one, two = powers[:, : block.shape[0]]  # exp(z / 4) and its powers
        torch.add(peaks[rows].amax(dim=1, keepdim=True) * -0.25, block, alpha=0.25, out=one).exp_()
        torch.sum(one, dim=1, out=total[:, 0])
        torch.linalg.vector_norm(one, dim=1, out=total[:, 1])
        torch.mul(one, one, out=two)
        torch.linalg.vector_norm(two, dim=1, out=total[:, 2])
        torch.linalg.vector_norm(two.mul_(one), dim=1, out=total[:, 3])
        torch.sum(two, dim=1, out=total[:, 4])
    return peaks, sums.log_() * device_steps(MOST_EXACT, known.window, logits.device).squares


def by_kernel(logits: Tensor, block: int = _KERNEL_BLOCK) -> tuple[Tensor, Tensor]:
    """As ``scan``, by the kernel; ``block``: entries a program holds at once, a power of 2 from ``RUN``."""
    from liquid_llm.signal_store.codecs.tail import kernels

    n, vocab_size = logits.shape
    peaks, logs = logits.new_empty(n, -(-vocab_size // RUN)), logits.new_empty(n, 5)
    if n:
        with _on(logits.device):
            kernels.scan[(n,)](
                logits, logits.stride(0), vocab_size, peaks, peaks.shape[1], logs, RUN=RUN, BLOCK=block, num_warps=8
            )
        peaks[:, :1] += 0.0 * logs[:, :1]  # a largest value may pass a NaN by, a sum does not
    return peaks, logs


def choose_scan(device: torch.device) -> Choice:
    """How logits on ``device`` are passed over. LIQUID_LOSS_ROWS=eager asks for torch's own operations here too."""
    if device.type != "cuda":
        return Choice(EAGER, f"there is no kernel for {device.type}")
    if os.environ.get("LIQUID_LOSS_ROWS") == EAGER:
        return Choice(EAGER, "LIQUID_LOSS_ROWS asks for it")
    return _try_kernel(device)


@functools.cache
def _try_kernel(device: torch.device) -> Choice:
    choice = Choice(TRITON, "one pass by Triton's kernel, tried here and found right")
    if importlib.util.find_spec("triton") is None:
        choice = Choice(EAGER, "Triton is not installed")
    else:
        try:
            if (error := kernel_error(device)) > _TOLERANCE:
                choice = Choice(EAGER, f"Triton's kernel is {error:.2g} off here")
        except Exception as problem:  # noqa: BLE001 - a compiler, a driver or a missing file: torch needs none of them
            first = next(iter(str(problem).splitlines()), "")
            choice = Choice(EAGER, f"Triton's kernel does not run here: {type(problem).__name__}: {first}")
    log.info("codec tail passes over logits on %s by %s: %s", device, choice.value, choice.reason)
    return choice


def kernel_error(device: torch.device, vocab_size: int = _TRIED_VOCAB, block: int = _KERNEL_BLOCK) -> float:
    """How far the kernel is from float64 on made-up rows on ``device``: the most of any number of a row, absolutely."""
    random = torch.Generator().manual_seed(0)
    logits = 4.0 * torch.randn(_TRIED_ROWS, vocab_size, generator=random)
    logits[1, : vocab_size // 2] = -torch.inf
    peaks, logs = (found.cpu() for found in by_kernel(logits.to(device), block))
    padded = torch.nn.functional.pad(logits, (0, -vocab_size % RUN), value=-torch.inf)
    if not torch.equal(peaks, padded.view(_TRIED_ROWS, -1, RUN).amax(dim=2)):
        return torch.inf
    above = (logits - logits.amax(dim=1, keepdim=True)).double() / 4
    right = torch.stack([torch.logsumexp(power * above, dim=1) for power in (1, 2, 4, 6, 3)], dim=1)
    return float((logs - right).abs().nan_to_num(nan=torch.inf).max())


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which is one thread's: make it the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
