"""Products of bfloat16 operands with a float32 result, which torch has on accelerators alone, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class MixedProducts(TorchDispatchMode):
    """While entered, ``torch.mm`` and ``torch.addmm`` with ``out_dtype`` work on the CPU.

    The operands are widened and multiplied in ``out_dtype``: products of two bfloat16 numbers are exact in float32, and
    sums are float32, as on an accelerator.

    Attributes:
        calls: how often each was asked for, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):
            return func(*args, **kwargs)
        self.calls[str(func)] += 1
        *added, left, right, out_dtype = args
        assert left.dtype == right.dtype, f"operands of {left.dtype} and {right.dtype}"
        assert all(one.dtype == out_dtype for one in added), "what is added must be in the dtype of the result"
        result: Tensor = torch.mm(left.to(out_dtype), right.to(out_dtype))
        if added:
            result = added[0] + result
        out = kwargs.get("out")
        return result if out is None else _fill(out, result)


def _fill(out: Tensor, result: Tensor) -> Tensor:
    assert (out.shape, out.dtype) == (result.shape, result.dtype)
    return out.copy_(result)
