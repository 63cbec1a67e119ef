"""Which form of row arithmetic a device has, and why: looked for once in a process, by trying it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from liquid_llm.runtime import Choice

EAGER, COMPILED, TRITON, MEMORY = "eager", "compiled", "triton", "memory"
FORMS = (EAGER, COMPILED, TRITON, MEMORY)

_TRIED_ROWS, _TRIED_VOCAB = 3, 10_000  # more than one block of a row, and no multiple of one
_TOLERANCE = 1e-4


def choose_rows(device: torch.device | str) -> Choice:
    """The form for ``device``: Triton's kernels on a CUDA device where they run and give the right numbers, else eager.

    The variable LIQUID_LOSS_ROWS=eager asks for the eager form, to find out whether kernels are at fault for something.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return Choice(EAGER, "on a CPU slices stay in a core's cache, where passes cost little")
    if device.type != "cuda":
        return Choice(EAGER, f"there are no kernels for {device.type}")
    if os.environ.get("LIQUID_LOSS_ROWS") == EAGER:
        return Choice(EAGER, "LIQUID_LOSS_ROWS asks for it")
    if not torch.cuda.is_available():
        return Choice(EAGER, "no CUDA device here")
    return _try_kernels(device)


def expect_rows(device_type: str) -> str:
    """The form that a device of this kind has, as far as this machine can tell; where it has none, as a rule."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return TRITON
    return choose_rows(device_type).value


@functools.cache
def _try_kernels(device: torch.device) -> Choice:
    if importlib.util.find_spec("triton") is None:
        return Choice(EAGER, "Triton is not installed")
    try:
        error = kernel_error(device)
    except Exception as problem:  # noqa: BLE001 - a compiler, a driver or a missing file: the eager form needs none of them
        first = next(iter(str(problem).splitlines()), "")
        return Choice(EAGER, f"Triton's kernels do not run here: {type(problem).__name__}: {first}")
    if error > _TOLERANCE:
        return Choice(EAGER, f"Triton's kernels are {error:.2g} off here")
    return Choice(TRITON, "two passes by Triton's kernels, tried here and found right")


def kernel_error(device: torch.device, vocab_size: int = _TRIED_VOCAB) -> float:
    """How far the kernels are from plain torch on made-up rows on ``device``, relative to the largest number of each.

    Whole distributions and a sparse signal with a tail are tried, at T = 2: all that kernels do but for soft-caps.
    """
    from liquid_llm.losses.rows.passes import NUM_FACTORS, TAUGHT, Logits, PlainPasses, Slice
    from liquid_llm.losses.rows.triton_passes import TritonPasses

    random = torch.Generator().manual_seed(0)
    raw, teacher = (4.0 * torch.randn(2, _TRIED_ROWS, vocab_size, generator=random)).to(device).unbind()
    labels = torch.randint(vocab_size, (_TRIED_ROWS,), generator=random).to(device)
    factors = torch.rand(NUM_FACTORS, _TRIED_ROWS, generator=random).to(device)
    ids = torch.randperm(vocab_size, generator=random)[: _TRIED_ROWS * 5].view(_TRIED_ROWS, 5).to(device)
    mask = torch.tensor([True, False, True], device=device)
    factors[TAUGHT] *= mask
    emptied = mask.unsqueeze(1).expand(_TRIED_ROWS, 5).contiguous()
    student = Logits(raw)
    dense = Slice(student, labels, 2.0, Logits(teacher), mask, reference=Logits(teacher), with_spread=True)
    sparse = Slice(student, labels, 2.0, ids=ids, emptied=emptied)
    worst = 0.0
    for part in (dense, sparse):
        found = []
        for passes in (PlainPasses(), TritonPasses()):
            figures = passes.measure(part)
            out = torch.empty_like(raw)
            passes.fill(part, figures, factors, 0.1, out)
            values = torch.arange(15.0, device=device).view(_TRIED_ROWS, 5)
            passes.place(out, ids, emptied, values, values, values)
            found += [figures[:5] if part is sparse else figures[[0, 1, 2, 3, 8, 9]], out]
            found += [] if part is sparse else [figures[5:8, mask]]
        half = len(found) // 2
        for plain, kernel in zip(found[:half], found[half:], strict=True):
            difference = (plain - kernel).abs().amax(dim=1) / plain.abs().amax(dim=1)
            worst = max(worst, difference.nan_to_num(nan=torch.inf).max().item())
    return worst
