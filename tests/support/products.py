"""Products of 16-bit operands with a float32 result, which torch has on accelerators alone, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def mixed_product(multiply: Callable[..., Tensor], *args: Any, out: Tensor | None = None) -> Tensor:
    """``multiply`` with its operands widened: products of two 16-bit numbers are exact in float32, and sums float32.

    Args:
        args: what is added (addmm alone, in the result's dtype), the two operands, the dtype of the result.
        out: where the result goes, of its shape and dtype.

    Raises:
        RuntimeError: an accelerator would not take these dtypes together.
    """
    *added, left, right, out_dtype = args
    if left.dtype != right.dtype or out_dtype not in (torch.float32, left.dtype):
        raise RuntimeError(f"no product of {left.dtype} and {right.dtype} comes out as {out_dtype}")
    if any(one.dtype != out_dtype for one in (*added, *([] if out is None else [out]))):
        raise RuntimeError(f"what is added and written must be {out_dtype}, as the result is")
    return multiply(*added, left.to(out_dtype), right.to(out_dtype), out=out)


# The operations with ``out_dtype`` -> what computes each.
MIXED = {
    f"{multiply.__name__}.{overload}": multiply
    for multiply in (torch.mm, torch.bmm, torch.addmm)
    for overload in ("dtype", "dtype_out")
}


class MixedProducts(TorchDispatchMode):
    """While entered, ``torch.mm``, ``torch.bmm`` and ``torch.addmm`` with ``out_dtype`` work on the CPU.

    Attributes:
        calls: how often each was asked for, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        multiply = MIXED.get(str(func).removeprefix("aten."))
        if multiply is None:
            return func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        return mixed_product(multiply, *args, **(kwargs or {}))
