"""Who may write to a place that several machines reach: one holder at a time, and none that was thought dead.

    lease    ``PLACE/.lease/NUMBER.json``: who writes here. The highest number counts, and each is made once: the store
             refuses a name that is there (on a bucket the precondition ``ifGenerationMatch=0``), so of two that take
             the place over one is told that it came too late. The highest is never removed: numbers only grow
    beat     the holder writes its lease again, every ten seconds. Whoever waits compares versions by a clock of its
             own, so that clocks need not agree; a lease that has not changed for its time has run out
    fence    around each thing that is published the holder looks whether its number is still the highest. One that was
             paused, or cut off, while another took over finds that out and is done, whatever it wrote meanwhile

A holder that ends says so in its lease, and the next begins at once. One that was killed is waited for, unless its
mark, kept in the run directory it had locked, says that it was this very directory's.

A store that cannot refuse a name has no leases: that is said in a warning, as of a file system without locks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from liquid_llm import storage
from liquid_llm.errors import StorageError
from liquid_llm.parsing import ParseError, parse_json

FOLDER = ".lease"
EXPIRES_SECONDS, BEAT_SECONDS, LOOK_SECONDS = 40.0, 10.0, 2.0
_RELEASE_SECONDS = 3.0
_NONE = 0  # numbers of leases begin with 1
_MOST_SECONDS = 60.0  # however long a lease says that it lasts: what is read from a bucket is not believed
_NAME = re.compile(r"(\d{8})\.json")
_log = logging.getLogger(__name__)


class LeaseLost(StorageError):
    """Another has taken the place over; nothing more may be published there."""


def read_clock() -> float:
    """Seconds that go on while the machine sleeps, where the system counts such."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class _Found:
    """A lease as it is there."""

    number: int
    version: str
    values: dict[str, Any]

    @property
    def holder(self) -> str:
        return f"process {self.values.get('process', '?')} on {self.values.get('host', '?')}"

    @property
    def expires_seconds(self) -> float:
        given = self.values.get("expires_seconds")
        return min(given, _MOST_SECONDS) if isinstance(given, int | float) and given > 0 else EXPIRES_SECONDS


class Lease:
    """The right to write to ``place``, taken on entering and given back on leaving.

    Args:
        place: a folder, usually behind a URL.
        mark: a local file that only one process at a time can have: it lies in a folder that is locked.
        log: told, in a sentence, of what is waited for.

    Raises:
        StorageError: on entering: another process holds the place and is alive, or it cannot be read or written.
    """

    def __init__(
        self,
        place: str,
        mark: Path,
        *,
        expires_seconds: float = EXPIRES_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        log: Callable[[str], None] = _log.info,
        clock: Callable[[], float] = read_clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place = place
        self._folder = storage.join(place, FOLDER)
        self._mark = mark
        self._expires, self._every, self._look = expires_seconds, beat_seconds, look_seconds
        self._say, self._clock, self._sleep = log, clock, sleep
        self._id = uuid.uuid4().hex
        self._since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._number, self._beats = _NONE, 0
        self._lost: LeaseLost | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    # ---------------------------------------------------------------------------------------------------------- holding

    def require(self) -> None:
        """Raise LeaseLost where it is known already that another has taken over; asks nobody."""
        if self._lost is not None:
            raise self._lost

    def check(self) -> None:
        """Ask the store whether this process still holds the place.

        Raises:
            LeaseLost: another has taken it over.
            StorageError: the store does not answer.
        """
        with self._lock:
            self.require()
            if not self._holds():
                self._lose()

    def beat(self) -> None:
        """Write the lease again; raises as ``check``."""
        with self._lock:
            self.require()
            if self._number == _NONE:
                return
            self._beats += 1
            storage.write_bytes(self._uri(self._number), self._content())
            if not self._holds():
                self._lose()

    def _holds(self) -> bool:
        return self._number == _NONE or max(self._versions(), default=self._number) == self._number

    def _lose(self) -> NoReturn:
        newest = self._newest()
        self._lost = LeaseLost(
            "another run has taken this output over, and nothing more is published there",
            where=self.place,
            got=None if newest is None else newest.holder,
            remedy="this run was paused or cut off for longer than its lease; give another output to go on with it",
        )
        raise self._lost

    # ----------------------------------------------------------------------------------------------- taking and leaving

    def __enter__(self) -> Lease:
        known = self._read_mark()
        try:
            while not self._take(known):
                pass
        except storage.NoExclusionError as error:
            _log.warning("%s: %s: do not start two runs with this output", self.place, error.problem)
            return self
        try:
            storage.write_bytes(str(self._mark), self._id.encode())
        except StorageError:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._number == _NONE:
            return
        self._closing.set()
        self._thread.join(_RELEASE_SECONDS)  # a store that does not answer keeps nobody: the lease runs out

    def _take(self, known: str) -> bool:
        """Take the place, if it is free by now; False where it is to be looked at again."""
        found = self._newest()
        released = found is None or found.values.get("released") is True
        if found is not None and not released and found.values.get("holder") != known and not self._is_left(found):
            return False
        number = 1 if found is None else found.number + 1
        if not storage.create(self._uri(number), self._content()):
            return False
        self._number = number
        for older in self._versions():
            if older < number:
                storage.remove(self._uri(older))
        if found is not None and not released:
            self._say(f"{self.place} is taken over from {found.holder}")
        return True

    def _is_left(self, found: _Found) -> bool:
        """Whether a lease has run out, found by looking at it for that long; False once it is another's, or changed.

        Raises:
            StorageError: its holder is alive.
        """
        seconds = found.expires_seconds
        self._say(f"{self.place} was last written by {found.holder}: waiting up to {seconds:.0f} s to see if it lives")
        end = self._clock() + seconds
        while self._clock() < end:
            self._sleep(self._look)
            versions = self._versions()
            if max(versions, default=0) != found.number:
                return False
            if versions[found.number] != found.version:
                if self._read(found.number).get("released") is True:
                    return False
                raise StorageError(
                    "another run is writing to this output",
                    where=self.place,
                    got=f"{found.holder}, since {found.values.get('since', '?')}",
                    remedy="wait for it to end, stop it, or give another output",
                )
        return True

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            try:
                self.beat()
            except LeaseLost:
                return  # whoever publishes next, or asks, is told
            except StorageError as error:
                _log.warning("the lease on the output could not be renewed, will be tried again: %s", error)
        self._release()

    def _release(self) -> None:
        """Say in the lease that it has ended, if the store can be told."""
        with self._lock, contextlib.suppress(StorageError, OSError):
            if self._lost is None:
                storage.write_bytes(self._uri(self._number), self._content(released=True))
            self._mark.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------------- reading

    def _uri(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")

    def _versions(self) -> dict[int, str]:
        """Number -> version of the leases that are there."""
        found = ((_NAME.fullmatch(info.name), info.version) for info in storage.list_files(self._folder))
        return {int(name[1]): version for name, version in found if name is not None}

    def _newest(self) -> _Found | None:
        versions = self._versions()
        number = max(versions, default=0)
        return _Found(number, versions[number], self._read(number)) if number else None

    def _read(self, number: int) -> dict[str, Any]:
        """What a lease says; nothing where it is gone by now, or damaged."""
        try:
            values = parse_json(storage.read_small(self._uri(number)))
        except ParseError:
            return {}
        except StorageError:
            if storage.exists(self._uri(number)):
                raise
            return {}
        return values if isinstance(values, dict) else {}

    def _read_mark(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._mark.read_text(encoding="utf-8", errors="replace").strip()
        return ""

    def _content(self, *, released: bool = False) -> bytes:
        values = {
            "holder": self._id,
            "host": platform.node(),
            "process": os.getpid(),
            "since": self._since,
            "beat": self._beats,
            "expires_seconds": self._expires,
            "released": released,
        }
        return (json.dumps(values) + "\n").encode()
