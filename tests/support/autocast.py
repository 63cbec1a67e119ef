"""In which dtype autocast to bfloat16 has each operation computed, on any device.

python -m tests.support.autocast     those of the pretend accelerator, as JSON: a process of its own, for a backend
                                     registered beside CUDA upsets the streams of CUDA's backward passes
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CAST: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :, None]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "layer_norm": lambda x: F.layer_norm(x.bfloat16(), x.shape[-1:]),
    "softmax": lambda x: x.bfloat16().softmax(-1),
    "log_softmax": lambda x: x.bfloat16().log_softmax(-1),
    "logsumexp": lambda x: x.bfloat16().logsumexp(-1),
    "sum": lambda x: x.bfloat16().sum(),
    "mean": lambda x: x.bfloat16().mean(),
    "pow": lambda x: x.bfloat16().pow(2),
    "rsqrt": lambda x: x.bfloat16().abs().rsqrt(),
    "exp": lambda x: x.bfloat16().exp(),
    "sigmoid": lambda x: x.bfloat16().sigmoid(),
    "silu": lambda x: F.silu(x.bfloat16()),
    "gelu": lambda x: F.gelu(x.bfloat16()),
    "tanh": lambda x: x.bfloat16().tanh(),
    "mul": lambda x: x.bfloat16() * x,
    "add": lambda x: x.bfloat16() + x.bfloat16(),
    "cat": lambda x: torch.cat([x.bfloat16(), x]),
    "stack": lambda x: torch.stack([x.bfloat16(), x]),
    "cumsum": lambda x: x.bfloat16().cumsum(0),
    "embedding": lambda x: F.embedding(torch.zeros(3, dtype=torch.int64, device=x.device), x),
    "cross_entropy": lambda x: F.cross_entropy(x.bfloat16(), torch.zeros(8, dtype=torch.int64, device=x.device)),
}


def result_dtypes(device: torch.device) -> dict[str, str]:
    """Operation -> dtype of its result, from float32 or bfloat16 operands as models have them."""
    x = torch.ones(8, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return {name: str(call(x).dtype) for name, call in CAST.items()}


if __name__ == "__main__":
    from tests.support.accelerator import install

    print(json.dumps(result_dtypes(install().device)))
