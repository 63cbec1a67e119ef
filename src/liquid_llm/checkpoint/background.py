"""Saving checkpoints behind the steps: training stops for a copy of its state, and a thread writes that.

    under way   the one save that is being written; the next waits for it, so that memory holds one copy, and names
                move in the order of the saves
    given up    under way when the run was asked to stop, and not finished: a newer state is saved in its place
    in pieces   each rank's saver writes what the rank has, the main one's the rest once all of them have (``pieces``)

Until a save is whole the checkpoint before it has all its names. What a save fails with is raised where the run asks
next: ``check`` after each step, the next save, the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from liquid_llm.checkpoint.copies import HostCopies, block_sizes
from liquid_llm.checkpoint.discovery import Log
from liquid_llm.checkpoint.files import plain_content
from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.checkpoint.pieces import KEY, PieceWriter
from liquid_llm.checkpoint.store import CheckpointInfo, CheckpointStore
from liquid_llm.device import is_out_of_memory
from liquid_llm.errors import RankError, first_line
from liquid_llm.formatting import format_bytes, format_seconds

ASSUMED_BYTES_PER_SECOND = 240e6  # of a disk that was not written to yet: a network disk of 500 GB
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A save that is whole.

    Attributes:
        info: the checkpoint.
        stopped_seconds: how long training stood still for it.
        seconds: from its beginning until it was on the disk under all its names.
    """

    info: CheckpointInfo
    stopped_seconds: float
    seconds: float


@dataclass
class _Work:
    """What the saver's thread is at: a save, or taking memory.

    Attributes:
        pieces: of a save in pieces.
        own_done: what is this rank's own of it is written, or has failed.
        failure: what it has failed with.
    """

    began: float
    names: tuple[str, ...] = ()
    is_save: bool = False
    pieces: PieceWriter | None = None
    given_up: threading.Event = field(default_factory=threading.Event)
    own_done: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    result: Future[None] = field(default_factory=Future)


class BackgroundSaver:
    """The saves of one run; a context manager that does not end before the last of them has.

    Args:
        store: writes them; not to be used by others while a save is under way. None on a rank that writes pieces alone.
        device: where the state lies.
        when_saved: called with each save that is whole, in the saver's thread.
        log: told where memory has no room for copies, and what a save failed with where the run fails otherwise.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        device: torch.device,
        when_saved: Callable[[Saved], None] = lambda _: None,
        *,
        log: Log = _log.warning,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._when_saved = when_saved
        self._say = log
        self._clock = clock
        self._copies: HostCopies | None = HostCopies(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._work: _Work | None = None
        self._last: Saved | None = None
        self.num_bytes = 0  # of a save, of all ranks

    @property
    def busy(self) -> bool:
        """Whether a save is under way, which the next would have to wait for."""
        return self._work is not None and self._work.is_save and not self._work.result.done()

    @property
    def expected_seconds(self) -> float:
        """How long a save takes until it is on the disk: as the last one did; the first as the assumed disk would."""
        return self.num_bytes / ASSUMED_BYTES_PER_SECOND if self._last is None else self._last.seconds

    def prepare(self, state: Mapping[str, Any], room_bytes: int | None = None, *, num_bytes: int | None = None) -> None:
        """Learn how large saves are and take the memory for their copies, behind the steps.

        Args:
            state: what is going to be copied; only sizes count.
            room_bytes: of the host's memory that copies may take; None where that is not known.
            num_bytes: of a save where it is more than this rank's copy.
        """
        sizes = block_sizes(state)
        copied = _bytes_of(sizes)
        self.num_bytes = copied if num_bytes is None else num_bytes
        if room_bytes is not None and copied > room_bytes:
            self._do_without_copies(copied, f"it has {format_bytes(max(0, room_bytes))} to spare")
        if self._copies is not None:
            self._start(_Work(self._clock()), lambda: self._take_memory(sizes))

    def save(
        self,
        state: Mapping[str, Any],
        metadata: CheckpointMetadata,
        *,
        kind: Literal["step", "time"] = "step",
        also_as: Sequence[str] = (),
        first: Callable[[], None] = lambda: None,
        began: float | None = None,
    ) -> None:
        """As ``CheckpointStore.save``, but back as soon as the state is copied.

        Where memory has no room for a copy, the state is written as it lies and the run waits.

        Args:
            first: what must be on the disk before this; called in the saver's thread.
            began: when training has stopped for it, by ``clock``; now unless given.

        Raises:
            StorageError: the save before this one failed, or, without a copy, this one.
            TypeError: ``state`` holds something that is neither a tensor nor a plain value.
        """
        assert self._store is not None
        store = self._store
        self.wait()
        began = self._clock() if began is None else began
        plain = metadata.as_read_back()  # what it refers to changes when the run goes on
        copied = self._copy(state)
        stopped = self._clock() - began
        mine = _Work(began, tuple(also_as), is_save=True)

        def work() -> None:
            first()
            info = store.save(
                state if copied is None else copied, plain, kind=kind, also_as=also_as, given_up=mine.given_up.is_set
            )
            self._finish(info, info.path.stat().st_size, began, None if copied is None else stopped)

        self._start(mine, work)
        if copied is None:
            self.wait()

    def save_in_pieces(
        self,
        pieces: PieceWriter,
        tensors: Mapping[str, Tensor],
        rest: Mapping[str, Any],
        metadata: CheckpointMetadata,
        *,
        kind: Literal["step", "time"] = "step",
        also_as: Sequence[str] = (),
        first: Callable[[], None] = lambda: None,
        began: float,
    ) -> None:
        """The same of a state of which each rank has a part: all ranks call this, and each copies its own.

        The checkpoint is there once all of them have written theirs. Nobody waits for another here.

        Args:
            tensors: what this rank has.
            rest: what is not in pieces, small; only that of the main rank counts.
        """
        try:
            self.wait()
            plain = metadata.as_read_back()
            content = plain_content(rest, lambda one: one.to("cpu", copy=True))
            copied = self._copy(tensors)
            stopped = self._clock() - began
            mine = _Work(began, tuple(also_as), is_save=True, pieces=pieces)
        except BaseException as error:
            pieces.__exit__(type(error), error, error.__traceback__)
            raise

        def work() -> None:
            with pieces:
                first()
                pieces.write(tensors if copied is None else copied, mine.given_up.is_set)
                stood_still = self._clock() - began if copied is None else stopped
                mine.own_done.set()
                if self._store is None:
                    return
                content[KEY] = pieces.collect(mine.given_up.is_set)
            info = self._store.save(content, plain, kind=kind, also_as=also_as, given_up=mine.given_up.is_set)
            size = info.path.stat().st_size + sum(size for size, _ in content[KEY].values())
            self._finish(info, size, began, stood_still)

        self._start(mine, work)
        if copied is None:
            self.wait_for_own()

    def _finish(self, info: CheckpointInfo, num_bytes: int, began: float, stopped: float | None) -> None:
        seconds = self._clock() - began
        self.num_bytes = num_bytes
        self._last = Saved(info, seconds if stopped is None else stopped, seconds)
        self._when_saved(self._last)

    def wait_for_own(self) -> None:
        """Return when what this rank has of the save under way is written; what others have is not waited for.

        Raises as ``wait``.
        """
        if self._work is not None:
            self._work.own_done.wait()
            if self._work.failure is not None:
                self.wait()

    def check(self) -> None:
        """Raise what the last save failed with, if it did; one that is under way is not waited for."""
        if self._work is not None and self._work.result.done():
            self.wait()

    def wait(self) -> Saved | None:
        """The last save, once it is whole; None where there was none. Raises what it failed with, once."""
        work, self._work = self._work, None
        if work is not None:
            error = work.result.exception()
            if error is not None and not work.given_up.is_set():
                raise error
        return self._last

    def give_names(self, names: Sequence[str]) -> CheckpointInfo | None:
        """Give the last save further names (see ``CheckpointStore.publish_as``) once it is whole; None without one."""
        saved = self.wait()
        if saved is None or self._store is None:
            return None
        self._last = replace(saved, info=self._store.publish_as(saved.info, names))
        return self._last.info

    def stands_in_the_way(self, within_seconds: float) -> bool:
        """Whether another save is whole in time only where the one under way is given up.

        Not if that is to be best, which no later state is. Nor where even alone the other one would take too long: what
        is under way is then all that can be had.
        """
        work = self._work
        if work is None or not self.busy or "best" in work.names:
            return False
        rest = max(0.0, self.expected_seconds - (self._clock() - work.began))
        return self.expected_seconds <= within_seconds < rest + self.expected_seconds

    def give_up(self) -> None:
        """Give up the save under way, if there is one."""
        if self._work is not None:
            self._work.given_up.set()
            self.wait()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._thread:
            if error is None:
                self.wait()
            elif self._work is not None:
                # A second Ctrl-C: at once. What waits for the pieces of a rank that is gone would wait for ever.
                needs_others = self._work.pieces is not None and isinstance(error, RankError)
                if needs_others or not isinstance(error, Exception):
                    self._work.given_up.set()
                elif (failed := self._work.result.exception()) is not None:
                    self._say(f"the last save failed too: {failed}")

    def _start(self, mine: _Work, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                mine.failure = error
                raise
            finally:
                mine.own_done.set()

        self.wait()
        self._work = mine
        mine.result = self._thread.submit(run)

    def _copy(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """A copy of the state; None where there is no memory for one."""
        if self._copies is None:
            return None
        try:
            return self._copies.copy(state)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._do_without_copies(_bytes_of(block_sizes(state)), first_line(error))
            return None

    def _take_memory(self, sizes: Mapping[int, int]) -> None:
        try:
            if self._copies is not None:
                self._copies.prepare(sizes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._do_without_copies(_bytes_of(sizes), first_line(error))

    def _do_without_copies(self, num_bytes: int, why: str) -> None:
        self._copies = None
        self._say(
            f"the host's memory has no room for a copy of {format_bytes(num_bytes)} ({why}): "
            f"each save stops training until it is on the disk, about {format_seconds(self.expected_seconds)}"
        )


def _bytes_of(sizes: Mapping[int, int]) -> int:
    return sum(size * count for size, count in sizes.items())
