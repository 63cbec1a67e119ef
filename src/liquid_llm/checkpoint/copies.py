"""Copies of a run's state in the host's memory, so that the run goes on while they are written.

The memory is taken once and used again by every copy: a page that is touched for the first time costs about ten times
what copying it costs. For a device other than the CPU it is pinned, which the device copies to at full speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liquid_llm.checkpoint.files import plain_content, stands_alone

_PAGE_BYTES = 4096


class HostCopies:
    """Makes one copy at a time: the next one is written over the last.

    Args:
        device: where the tensors that are copied lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[int, list[Tensor]] = {}  # bytes -> blocks of so many, as uint8

    def prepare(self, sizes: Mapping[int, int]) -> None:
        """Take the memory of a copy ahead of need: ``sizes`` are those of ``block_sizes``."""
        self._memory = {size: [self._block(size) for _ in range(count)] for size, count in sizes.items()}

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` as it is now, and as ``write_archive`` would write it: what shares a storage still does.

        Nothing of it changes when the run goes on. Each tensor is copied once, without a wait between two of them.

        Raises:
            TypeError: as ``write_archive`` does.
        """
        left, taken = self._memory, defaultdict[int, list[Tensor]](list)
        copied: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> the tensor, which keeps it alive, and its copy

        def of_tensor(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:
                return tensor.to("cpu", copy=True)
            if not stands_alone(tensor):
                tensor = tensor.clone()
            storage = tensor.untyped_storage()
            if storage._cdata not in copied:
                blocks = left.get(storage.nbytes())
                block = blocks.pop() if blocks else self._block(storage.nbytes())
                taken[storage.nbytes()].append(block)
                host = _laid_out(block, tensor)
                host.copy_(tensor, non_blocking=self._device.type != "cpu")
                copied[storage._cdata] = tensor, host
            return _laid_out(copied[storage._cdata][1], tensor)

        content: dict[str, Any] = plain_content(state, of_tensor)
        self._memory = taken  # what no tensor of this state needs is given back
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        return content

    def _block(self, size: int) -> Tensor:
        block = torch.empty(size, dtype=torch.uint8)
        if self._device.type != "cpu":
            return block.pin_memory()
        block.numpy()[::_PAGE_BYTES] = 0  # in this thread alone: torch's own would start threads for it
        return block


def _laid_out(block: Tensor, like: Tensor) -> Tensor:
    """A tensor in the storage of ``block``, with dtype, shape and strides of ``like``."""
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(block.untyped_storage(), like.storage_offset(), like.size(), like.stride())


def block_sizes(state: Mapping[str, Any]) -> dict[int, int]:
    """How many blocks of which size, in bytes, a copy of ``state`` takes."""
    seen: dict[int, Tensor] = {}
    sizes: dict[int, int] = defaultdict(int)

    def count(tensor: Tensor) -> Tensor:
        alone = tensor.layout == torch.strided and stands_alone(tensor)
        size = tensor.untyped_storage().nbytes() if alone else tensor.numel() * tensor.element_size()
        key = tensor.untyped_storage()._cdata if alone else id(tensor)
        if key not in seen:
            seen[key] = tensor
            sizes[size] += 1
        return tensor

    plain_content(state, count)
    return dict(sizes)
