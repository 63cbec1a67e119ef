"""What a device holds, how it runs out of memory, and how it is lost (leaf).

device     where a model computes: a GPU, or the CPU with the machine's own memory
peak       the most bytes of tensors that were alive on a device at the same time
reserved   the most bytes its allocator took from the device for them
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liquid_llm.errors import DeviceError, first_line

# What torch and the libraries under it say when there is no room; only the first is a type of its own.
_NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
_NO_LOSS = (  # of the program or the installation: the device is there, and the traceback is wanted
    "no kernel image",
    "invalid configuration argument",
    "invalid argument",
    "invalid device function",
    "NOT_SUPPORTED",
)
_LOST = (
    "CUDA error",
    "device-side assert",
    "device is lost",
    "HIP error",
    "NCCL error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
)


@dataclass(frozen=True)
class DeviceMemory:
    """The most a device has held for this process since it was last asked to forget, in bytes."""

    peak_bytes: int
    reserved_bytes: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on a device or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)


def is_lost(error: BaseException) -> bool:
    """Whether ``error`` says that the device failed: nothing can be computed on it in this process any more."""
    if any(words in str(error) for words in _NO_LOSS):
        return False
    accelerator_error: Any = getattr(torch, "AcceleratorError", ())  # torch 2.8 and newer
    if isinstance(error, accelerator_error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, so that the next allocation has all there is.

    Call it outside of the ``except`` that caught the failure: until then the traceback holds the failed tensors.
    """
    gc.collect()
    module = _module(device)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What ``device`` has held at most; None for the CPU, whose memory is the process's own."""
    module = _module(device)
    if module is None or not hasattr(module, "max_memory_allocated"):
        return None
    return DeviceMemory(int(module.max_memory_allocated(device)), int(module.max_memory_reserved(device)))


def forget_peak(device: torch.device) -> None:
    """Let ``device_memory`` count from now on."""
    module = _module(device)
    if module is None or not hasattr(module, "reset_peak_memory_stats"):
        return
    if getattr(module, "is_initialized", lambda: True)():  # CUDA refuses to be asked before; nothing was held then
        module.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes free on ``device`` now, and in all; None for the CPU and where the device does not tell."""
    module = _module(device)
    if module is None or not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    return int(free), int(total)


def prepare_allocator() -> None:
    """Let CUDA's allocator grow its segments: batches of many shapes would else leave holes that nothing fits.

    To be called before the first CUDA tensor. What the user's environment says wins.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let every operation give the same bits each time, at the price of slower kernels; nothing where not ``wanted``.

    An operation without such a kernel raises ``RuntimeError`` rather than differ in silence. cuBLAS reads its setting
    when it is first used: enter before anything is computed.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def device_error(error: BaseException) -> DeviceError | None:
    """What a user is told of a failure that is the device's; None where it is not."""
    first = first_line(error)
    if is_out_of_memory(error):
        return DeviceError(
            "the device's memory does not suffice",
            got=first,
            remedy="use a smaller --batch_size, --grad_checkpoint, or a larger device; what is saved is whole",
        )
    if is_lost(error):
        return DeviceError(
            "the device failed",
            got=first,
            remedy="run the same command again to go on from the last checkpoint; should it fail again, look at the "
            "driver's log and try another device",
        )
    return None


def _module(device: torch.device) -> Any:
    """``torch.cuda`` or what other devices have in its place; None for the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def find_not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of a tensor in ``state``, nested mappings and lists, that holds a NaN or an infinity; None without one.

    Each is read once and nothing of its size is made; a device is waited for once.
    """
    tensors = {
        name: tensor.detach()
        for name, tensor in _named_tensors(state, "")
        if tensor.is_floating_point() and tensor.numel() and tensor.layout == torch.strided
    }
    for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
        there = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        extremes = [torch.stack(torch.aminmax(tensor)).float() for tensor in there.values()]  # a NaN is both
        right = torch.stack(extremes).isfinite().all(dim=1).tolist()
        if not all(right):
            return list(there)[right.index(False)]
    return None


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named_tensors(one, f"{name}.{key}" if name else str(key))
