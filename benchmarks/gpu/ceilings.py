"""Part 0: versions, and how fast the device copies and multiplies at best; later parts are held against it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable

import torch
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import GIB
from benchmarks.gpu.timing_tools import seconds

# What data sheets and earlier measurements of an H100 say; another card differs.
_H100 = {"copy": 3000.0, "bf16": 798.0, "bf16 operands, float32 out": 700.0, "tf32": 420.0, "fp32": 51.0}
_PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "pyarrow", "liger-kernel", "trl", "flash-attn")


def run(context: Context) -> None:
    versions = {name: _version(name) for name in _PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    context.row("versions", note=f"Python {platform.python_version()}, {shown}", more={**versions, "argv": sys.argv})
    if context.on_gpu:
        card = torch.cuda.get_device_properties(context.device)
        context.row(
            "memory of the card", card.total_memory / GIB, "GiB", note=f"{card.name}, CUDA {torch.version.cuda}"
        )
    _copy(context)
    _products(context)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _copy(context: Context) -> None:
    with context.attempt("copy"):
        size = 4 * GIB if context.on_gpu else 64 * 2**20
        source = torch.empty(size, dtype=torch.uint8, device=context.device).random_()
        target = torch.empty_like(source)
        if not context.on_gpu:
            target.copy_(source)
            context.ran("copy")
            return
        took = seconds(lambda: target.copy_(source), context.device)
        _ceiling(context, "copy", 2 * size / took / 1e9, "GB/s")


def _products(context: Context) -> None:
    size = 8192 if context.on_gpu else 64
    with context.attempt("products"):
        wide = torch.randn(size, size, device=context.device)
        narrow = wide.bfloat16()
        out = torch.empty_like(wide)

        def measure(name: str, work: Callable[[], object]) -> None:
            with context.attempt(name):
                if not context.on_gpu:
                    work()
                    context.ran(name)
                    return
                _ceiling(context, name, 2 * size**3 / seconds(work, context.device) / 1e12, "TFLOP/s")

        measure("bf16", lambda: torch.mm(narrow, narrow))
        if context.device.type != "cpu":
            measure("bf16 operands, float32 out", lambda: torch.mm(narrow, narrow, out_dtype=torch.float32))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        measure("tf32", lambda: torch.mm(wide, wide, out=out))
        torch.backends.cuda.matmul.allow_tf32 = before
        measure("fp32", lambda: torch.mm(wide, wide, out=out))


def _ceiling(context: Context, name: str, measured: float, unit: str) -> None:
    context.row(name, measured, unit, predicted=_H100[name], basis="an H100's")
