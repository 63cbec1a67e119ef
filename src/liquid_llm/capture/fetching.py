"""Rows of a chunk on their way from the device to the host: one copy, during which the device goes on.

A device with streams copies on one of its own, so that neither the host nor the next chunk waits for it. Elsewhere the
host waits for all that the device has been given so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liquid_llm.signal_store.codecs import Rows


class Fetcher:
    """Brings rows to the host.

    Args:
        device: where they are made; rows of the CPU are taken as they are.
    """

    def __init__(self, device: torch.device) -> None:
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._module = module
        self._stream = module.Stream(device) if hasattr(module, "Stream") else None

    def start(self, found: Sequence[Rows]) -> Fetch:
        """Begin to copy; ``found`` is to be let go of."""
        there = [tensor for rows in found for tensor in rows.values() if tensor.device.type != "cpu"]
        if not there:
            return Fetch(found, None, None)
        packed = side_by_side(there)
        if self._stream is None:
            return Fetch(found, packed.to("cpu", non_blocking=True), self._module.synchronize)
        self._stream.wait_stream(self._module.current_stream(packed.device))
        with self._module.stream(self._stream):
            host = packed.to("cpu", non_blocking=True)
            arrived = self._stream.record_event()
        packed.record_stream(self._stream)
        return Fetch(found, host, arrived.synchronize)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as bytes in one, those of large items first: each then begins at a multiple of its item's size."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in ordered])


class Fetch:
    """Rows under way; see ``Fetcher.start``."""

    def __init__(self, found: Sequence[Rows], host: Tensor | None, wait: Callable[[], object] | None) -> None:
        self._found = [{name: _Form.of(tensor) for name, tensor in rows.items()} for rows in found]
        self._host, self._wait = host, wait

    def result(self) -> list[Rows]:
        """The rows, on the CPU; waits until they are there. To be asked once."""
        if self._host is not None and self._wait is not None:
            self._wait()
            at = 0
            forms = [form for rows in self._found for form in rows.values() if form.tensor is None]
            for form in sorted(forms, key=lambda form: -form.dtype.itemsize):
                form.tensor = self._host[at : at + form.nbytes].view(form.dtype).view(form.shape)
                at += form.nbytes
        return [{name: form.tensor for name, form in rows.items() if form.tensor is not None} for rows in self._found]


@dataclass
class _Form:
    """A tensor of the CPU, or the form of one of the device, which is not kept alive."""

    dtype: torch.dtype
    shape: torch.Size
    nbytes: int
    tensor: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tensor.dtype, tensor.shape, tensor.nbytes, tensor if tensor.device.type == "cpu" else None)
