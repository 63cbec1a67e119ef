"""Memory of the pretend accelerator: counted by storages that are alive, to the byte."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import torch
from torch import Tensor

GIB = 2**30


class Memory:
    """What the device holds, in bytes, as ``torch.cuda`` counts it but without rounding.

    Attributes:
        total: bytes that it has.
        peak: the most that was alive at the same time since the last reset.
        peak_reserved: the most that was kept.
    """

    def __init__(self, total: int = 16 * GIB) -> None:
        self.total = total
        self.peak = self.peak_reserved = 0
        self._allocated = self._reserved = 0
        # A storage may be freed at any moment, also by the garbage collector in the middle of what is done here: that
        # only leaves its size behind, to be subtracted by whoever looks next.
        self._freed: deque[int] = deque()
        self._lock = threading.RLock()
        self._pinned: set[int] = set()

    @property
    def allocated(self) -> int:
        """Bytes of storages that are alive."""
        with self._lock:
            while self._freed:
                self._allocated -= self._freed.popleft()
            return self._allocated

    @property
    def reserved(self) -> int:
        """Bytes kept: freed ones too, until the cache is emptied or they are needed."""
        return max(self._reserved, self.allocated)

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it is freed.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        nbytes = storage.nbytes()
        with self._lock:
            if nbytes and self.allocated + nbytes > self.total:
                raise torch.OutOfMemoryError(
                    f"pretend out of memory. Tried to allocate {nbytes} bytes. The device has a total capacity of "
                    f"{self.total} bytes of which {self.total - self.allocated} are free."
                )
            self._allocated += nbytes
            self.peak = max(self.peak, self._allocated)
            self._reserved = max(self._reserved, self._allocated)
            self.peak_reserved = max(self.peak_reserved, self._reserved)
        weakref.finalize(storage, self._freed.append, nbytes).atexit = False

    def reset_peak(self) -> None:
        """Let the peaks begin anew from what there is now."""
        with self._lock:
            self.peak, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Give back what is kept but not alive."""
        with self._lock:
            self._reserved = self.allocated

    def pin(self, tensor: Tensor) -> Tensor:
        """Say of a CPU tensor that its memory is pinned."""
        storage = tensor.untyped_storage()
        self._pinned.add(storage.data_ptr())
        weakref.finalize(storage, self._pinned.discard, storage.data_ptr()).atexit = False
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether its memory was pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned
