"""Codec ``tail``'s pass over all logits: as torch makes it and as a Triton kernel does, in Triton's interpreter.

``make test-kernels`` installs Triton and sets TRITON_INTERPRET; without both the kernel's tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from tests.support.teachers import random_logits

from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.codecs.base import TOP, Run, encode_as_on
from liquid_llm.signal_store.codecs.tail import rows, scanning
from liquid_llm.signal_store.codecs.tail.draws import candidates

in_the_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="a kernel runs on a CPU with TRITON_INTERPRET=1 alone: make test-kernels",
)
POWERS = (1, 2, 4, 6, 3)


def test_where_there_is_no_cuda_there_is_no_kernel() -> None:
    choice = scanning.choose_scan(torch.device("cpu"))
    assert (choice.value, choice.reason) == ("eager", "there is no kernel for cpu")


@pytest.mark.parametrize("block_bytes", [1, 2**26])
def test_torchs_pass_is_that_of_float64(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a row, as an accelerator with little memory has them, and in one."""
    monkeypatch.setattr(scanning, "_BLOCK_BYTES", block_bytes)
    logits = random_logits(5, 700)
    logits[2, :300] = -torch.inf
    with encode_as_on("cuda"):
        peaks, logs = scanning.by_torch(logits, candidates(700))
    assert torch.equal(peaks.amax(dim=1), logits.amax(dim=1))
    above = (logits - logits.amax(dim=1, keepdim=True)).double() / 4
    right = torch.stack([torch.logsumexp(power * above, dim=1) for power in POWERS], dim=1)
    torch.testing.assert_close(logs.double(), right, rtol=0, atol=1e-5)


@in_the_interpreter
@pytest.mark.parametrize("vocab", [1, 64, 100, 333, 1000])
def test_the_kernel_is_right_in_blocks_that_do_not_divide_a_row(vocab: int) -> None:
    assert scanning.kernel_error(torch.device("cpu"), vocab, block=128) < 1e-5


def by_small_blocks(logits: torch.Tensor, known: object, beside: Callable[[slice], object]) -> tuple[torch.Tensor, ...]:
    beside(slice(0, len(logits)))
    return scanning.by_kernel(logits, block=128)


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_bytes_are_those_of_torchs_pass_and_neither_hides_a_row_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec, logits = get_codec("tail"), random_logits(12, 700)
    expected = codec.pack(codec.encode(logits.clone(), 3, 0))
    monkeypatch.setattr(rows, "scan", by_small_blocks)
    assert torch.equal(codec.pack(codec.encode(logits.clone(), 3, 0))["bytes"], expected["bytes"])
    for row, value in ((1, float("nan")), (4, float("inf"))):
        logits[row, 650] = value
    logits[7] = -torch.inf
    tops = codec.encode_runs(logits, [Run(3, 0, 12)])[TOP]
    assert (~torch.isfinite(tops)).nonzero().flatten().tolist() == [1, 4, 7]
