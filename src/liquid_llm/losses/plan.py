"""How the loss is worked out on a device: how many positions at once, and what multiplies 16-bit numbers.

A difference of two softmaxes is taken from the logits, so logits must be float32 even where the numbers multiplied
have 16 bits: rounded to bfloat16 they put the gradient of a good student 10 to 40 % off.

    chunk      positions whose logits exist at the same time
    slice      the few of a chunk whose softmax is computed at once: on a CPU as many as stay in a core's cache,
               elsewhere the whole chunk
    product    how two bfloat16 matrices give a float32 one; see ``PRODUCTS``
    rows       what works out the loss of rows of logits; see ``losses.rows``
    look       to read a result on the host. On a CPU that costs nothing; elsewhere the host waits for the device
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from liquid_llm.losses.rows.choice import EAGER, FORMS, choose_rows
from liquid_llm.runtime import has_amx

PRODUCTS = {
    "mixed": "bfloat16 operands, float32 out of the product: torch.mm(..., out_dtype=torch.float32)",
    "widen": "float32 products of operands widened block by block",
    "tiles": "the same through the CPU's bfloat16 tiles (AMX), which round operands as mixed does and sum in float32",
}

_CPU_CHUNK_BYTES = 96 << 20  # of one chunk's logits in float32
CHUNK_BYTES = (1024 << 20, 512 << 20, 256 << 20)
"""Of a chunk elsewhere, the largest first: the larger, the less often both heads are read. The last is usual."""

_MIN_CHUNK_TOKENS, _MAX_CPU_CHUNK_TOKENS = 16, 384  # a CPU's products are no faster on more rows
_SLICE_ELEMENTS = 1 << 20  # 4 MiB of float32


@dataclass(frozen=True)
class LossPlan:
    """How ``fused_loss`` goes about it; no result depends on it but by rounding.

    Attributes:
        chunk_tokens: positions per chunk.
        slice_tokens: positions per slice.
        product: a key of ``PRODUCTS``; of consequence where hidden states are bfloat16.
        looks: whether the host may read results. Without it, and with every row labelled, neither forward nor backward
            waits for the device, and no shape depends on a value.
        rows: a form of ``losses.rows``; a loss that it cannot answer gets the eager one.
        every: whether all chunks and slices are gone through. Without it the first two and the last are, which take
            what all take: for tensors that have no numbers, as where memory is worked out.

    Raises:
        ValueError: a size below 1, a product not in ``PRODUCTS``, or no such form of rows.
    """

    chunk_tokens: int
    slice_tokens: int
    product: str
    looks: bool
    rows: str = EAGER
    every: bool = True

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.slice_tokens < 1:
            raise ValueError(
                f"chunk_tokens and slice_tokens must be at least 1, got {self.chunk_tokens} and {self.slice_tokens}"
            )
        if self.product not in PRODUCTS:
            raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {self.product!r}")
        if self.rows not in FORMS:
            raise ValueError(f"rows must be one of {', '.join(FORMS)}, got {self.rows!r}")

    def starts(self, first: int, stop: int, size: int) -> Sequence[int]:
        """Where the runs of ``size`` rows begin that are gone through from ``first`` to ``stop``."""
        found = range(first, stop, size)
        return found if self.every or len(found) < 4 else (found[0], found[1], found[-1])


def choose_plan(
    device: torch.device | str, vocab_size: int, *, amx: bool | None = None, chunk_bytes: int = CHUNK_BYTES[-1]
) -> LossPlan:
    """The plan for logits of ``vocab_size`` on ``device``.

    A chunk's logits take at most 96 MiB in float32 on a CPU and ``chunk_bytes`` elsewhere (about six such buffers exist
    at the same time in the eager form, two and a half with kernels), but for a minimum of 16 positions. Apple's GPU has
    no product with another result type, so operands are widened there as on a CPU.

    Args:
        device: where hidden states and heads lie.
        vocab_size: of the student.
        amx: whether the CPU has bfloat16 tiles; None looks.
        chunk_bytes: of one of ``CHUNK_BYTES``, where there is memory for more than usual.
    """
    if torch.device(device).type == "cpu":
        fitting = max(_MIN_CHUNK_TOKENS, _CPU_CHUNK_BYTES // (4 * vocab_size))
        return LossPlan(
            chunk_tokens=min(fitting, _MAX_CPU_CHUNK_TOKENS),
            slice_tokens=max(1, _SLICE_ELEMENTS // vocab_size),
            product=choose_product(device, amx=amx),
            looks=True,
        )
    chunk_tokens = max(_MIN_CHUNK_TOKENS, chunk_bytes // (4 * vocab_size))
    return LossPlan(chunk_tokens, chunk_tokens, choose_product(device), looks=False, rows=choose_rows(device).value)


def choose_product(device: torch.device | str, *, amx: bool | None = None) -> str:
    """The fastest product of bfloat16 operands on ``device`` whose result is float32; a key of ``PRODUCTS``."""
    device_type = torch.device(device).type
    if device_type in ("mps", "xpu"):  # torch has such a product for CUDA and HIP
        return "widen"
    if device_type != "cpu":
        return "mixed"
    tiles = (has_amx() if amx is None else amx) and _tile_switch() is not None
    return "tiles" if tiles else "widen"


@contextmanager
def bfloat16_tiles() -> Iterator[None]:
    """Let float32 products on the CPU round their operands to bfloat16, where the CPU has tiles for that (AMX).

    Operands that hold bfloat16 values lose nothing: their products are exact in float32, and tiles sum in float32. A
    softmax gradient and a float32 head are rounded, as they are on a GPU.
    Without AMX results change by the order of sums at most. The switch is the whole process's, so other threads should
    not multiply float32 meanwhile; it goes back to what it was, on an error too. Where torch has no such switch nothing
    changes.
    """
    switch = _tile_switch()
    if switch is None:
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _tile_switch() -> Any:
    """What holds ``fp32_precision`` of oneDNN's matrix products; None where this torch has none."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    return switch if torch.backends.mkldnn.is_available() and hasattr(switch, "fp32_precision") else None  # type: ignore[no-untyped-call]
