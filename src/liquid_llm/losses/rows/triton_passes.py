"""The two passes by Triton's kernels (``kernels``).

Triton comes with torch for CUDA; nothing else needs it, so this module is imported where it is used alone. With
``TRITON_INTERPRET=1`` set before that, kernels run on a CPU, one program after the other, which is how they are tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from liquid_llm.losses.rows import kernels
from liquid_llm.losses.rows.passes import NUM_FIGURES, Logits, Slice

# Entries that a program holds at once, and the threads (in warps of 32) that share them: 16 a thread while it measures,
# where five sums are kept beside them, and as many while it writes. Others are measured by ``make gpu``.
MEASURED_BLOCK, FILLED_BLOCK = 8192, 4096
_ENTRIES_A_WARP = 512
_MOST_WARPS = 16

_placed: set[tuple[object, ...]] = set()
"""What ``place`` has been compiled for in this process: Triton tells arguments apart by dtype and by divisors of 16."""


class TritonPasses:
    """The passes by kernels, of float32 logits.

    Args:
        measured_block, filled_block: entries that a program holds at once, powers of 2.
    """

    def __init__(self, measured_block: int = MEASURED_BLOCK, filled_block: int = FILLED_BLOCK) -> None:
        self._measured_block, self._filled_block = measured_block, filled_block

    def measure(self, part: Slice) -> Tensor:
        rows, vocab_size = part.student.raw.shape
        out = part.student.raw.new_empty(NUM_FIGURES, rows)
        slots = 0 if part.ids is None or part.emptied is None else part.ids.shape[1]
        block = min(self._measured_block, triton.next_power_of_2(vocab_size))
        raw = part.student.raw
        ids = raw if part.ids is None else part.ids.contiguous()
        emptied = raw if part.emptied is None else part.emptied.contiguous().view(torch.uint8)
        with _on(raw.device):
            kernels.measure[(rows,)](
                *_inputs(part),
                ids,
                emptied,
                slots,
                out,
                rows,
                **_switches(part),
                SLOTS=triton.next_power_of_2(slots) if slots else 0,
                BLOCK=block,
                num_warps=_warps(block),
            )
        return out

    def fill(self, part: Slice, figures: Tensor, factors: Tensor, pull: float, out: Tensor) -> None:
        rows, vocab_size = part.student.raw.shape
        block = min(self._filled_block, triton.next_power_of_2(vocab_size))
        with _on(out.device):
            kernels.fill[(rows, triton.cdiv(vocab_size, block))](
                *_inputs(part),
                pull,
                figures,
                factors,
                rows,
                out,
                out.stride(0),
                **_switches(part),
                BLOCK=block,
                num_warps=_warps(block),
            )

    def prepare_place(
        self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor
    ) -> None:
        """Compiled by a launch in which no slot is used."""
        tensors = (out, ids, used, values, shares, slopes)
        aligned = [one.data_ptr() % 16 == 0 for one in tensors]
        kind = (out.device, out.dtype, out.stride(0), ids.shape[1], *aligned)
        if kind not in _placed:
            self.place(out, ids, torch.zeros_like(used), values, shares, slopes)
            _placed.add(kind)

    def place(self, out: Tensor, ids: Tensor, used: Tensor, values: Tensor, shares: Tensor, slopes: Tensor) -> None:
        rows, slots = ids.shape
        size = triton.next_power_of_2(slots)
        inputs = [one.contiguous() for one in (ids, used.view(torch.uint8), values, shares, slopes)]
        with _on(out.device):
            kernels.place[(rows,)](out, out.stride(0), *inputs, slots, SLOTS=size, num_warps=_warps(size))


def _inputs(part: Slice) -> tuple[object, ...]:
    """What both kernels are given of a slice, in their order; what is not there is never looked at."""
    student, teacher, reference = part.student, part.teacher or part.student, part.reference or part.student
    mask = part.labels if part.mask is None else part.mask.contiguous().view(torch.uint8)
    shared_size = teacher.raw.shape[1]
    inverse = 1.0 / part.temperature
    one, two, three = _raw(student), _raw(teacher), _raw(reference)
    return *one, part.labels.contiguous(), student.raw.shape[1], inverse, *two, shared_size, mask, *three


def _raw(logits: Logits) -> tuple[Tensor, int, float, float]:
    raw = logits.raw if logits.raw.stride(1) == 1 else logits.raw.contiguous()
    return raw, raw.stride(0), float(logits.scale), logits.soft_cap or 1.0


def _switches(part: Slice) -> dict[str, bool]:
    """Which parts of a kernel are compiled."""
    teacher, reference = part.teacher, part.reference
    return {
        "Z_CAPPED": part.student.soft_cap is not None,
        "W_CAPPED": teacher is not None and teacher.soft_cap is not None,
        "R_CAPPED": reference is not None and reference.soft_cap is not None,
        "HAS_TEACHER": teacher is not None,
        "HAS_MASK": part.mask is not None,
        "HAS_REFERENCE": reference is not None,
        "IS_TEMPERED": part.temperature != 1.0,
    }


def _warps(block: int) -> int:
    return max(1, min(_MOST_WARPS, block // _ENTRIES_A_WARP))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which is one thread's: make it the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
