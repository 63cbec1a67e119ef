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
from liquid_llm.streams import has_streams


class Fetcher:
    """Brings rows to the host.

    Args:
        device: where they are made; rows of the CPU are taken as they are.
    """

    def __init__(self, device: torch.device) -> None:
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._module = module
        self._stream = module.Stream(device=device) if has_streams(device) else None
        self._under_way: list[Fetch] = []

    def start(self, found: Sequence[Rows]) -> Fetch:
        """Begin to copy; ``found`` is to be let go of."""
        self._under_way = [one for one in self._under_way if not one.has_arrived]
        if len(self._under_way) > 1:  # the last chunk's is; others were begun for a batch that failed
            self.settle()
        there = [tensor for rows in found for tensor in rows.values() if tensor.device.type != "cpu"]
        if not there:
            return Fetch(found)
        packed = side_by_side(there)
        if self._stream is None:
            return Fetch(found, packed, packed.to("cpu", non_blocking=True), self._module.synchronize)
        self._stream.wait_stream(self._module.current_stream(packed.device))
        with self._module.stream(self._stream):
            host = packed.to("cpu", non_blocking=True)
            arrived = self._module.Event()
            arrived.record(self._stream)
        self._under_way.append(Fetch(found, packed, host, arrived.synchronize))
        return self._under_way[-1]

    def settle(self) -> None:
        """Wait for all that is under way, and hold none of it."""
        for one in self._under_way:
            one.wait()
        self._under_way.clear()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as bytes in one, those of large items first: each then begins at a multiple of its item's size."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in ordered])


class Fetch:
    """Rows under way; see ``Fetcher.start``. What is copied is held until it has arrived: its memory is not free."""

    def __init__(
        self,
        found: Sequence[Rows],
        packed: Tensor | None = None,
        host: Tensor | None = None,
        wait: Callable[[], object] = lambda: None,
    ) -> None:
        self._found = [{name: _Form.of(tensor) for name, tensor in rows.items()} for rows in found]
        self._packed, self._host, self._wait = packed, host, wait

    @property
    def has_arrived(self) -> bool:
        """Whether it has been waited for."""
        return self._packed is None

    def wait(self) -> None:
        """Wait until the rows are there."""
        if self._packed is not None:
            self._wait()
            self._packed = None

    def result(self) -> list[Rows]:
        """The rows, on the CPU; waits until they are there. To be asked once."""
        self.wait()
        if self._host is not None:
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
