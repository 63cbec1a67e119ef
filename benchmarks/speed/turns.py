"""Processes that take turns: each works only when it is told to, and says how long it took.

turn    one piece of work of one contestant; nobody else works meanwhile
round   a turn of each contestant, all with the same texts

The parent writes the name of a piece of work on a child's standard input; the child answers on what was its standard
output with one JSON line. Whatever else the child prints goes to its standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Took:
    """What a turn took: seconds by clock, and of the processor by all threads of the process."""

    wall: float
    processor: float


class Child:
    """A contestant's process.

    Raises:
        RuntimeError: it ended, or said something else than an answer; with what it printed last.
    """

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, env=environment, text=True
        )

    def wait_until_ready(self) -> dict[str, Any]:
        """What it says of itself when it can begin."""
        return self._read()

    def take_turn(self, work: str) -> Took:
        """Have it do ``work`` once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, or the lack of one, says why
            self._process.stdin.write(work + "\n")
            self._process.stdin.flush()
        return Took(**self._read())

    def end(self) -> dict[str, Any]:
        """What it says at the end; it is gone afterwards."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            return self._read()
        finally:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._printed):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was not read is not flushed
                pipe.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._printed.seek(0)
            last = self._printed.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(self._process.args[1:])} has ended: {last}")  # type: ignore[index, arg-type]
        found: dict[str, Any] = json.loads(line)
        return found


class Turns:
    """The child's end."""

    def __init__(self) -> None:
        self._answers: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def say(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def asked(self) -> Iterator[str]:
        """What is to be done next, until there is no more."""
        while line := sys.stdin.readline():
            yield line.strip()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.say(peak_bytes=peak)

    def serve(self, works: dict[str, Callable[[], None]], prepare: dict[str, Callable[[], None]], wait: Any) -> None:
        """Do what is asked for.

        Args:
            works: by name; timed.
            prepare: what a work needs that is not timed.
            wait: lets the device finish.
        """
        for name in self.asked():
            prepare.get(name, lambda: None)()
            wait()
            clock = Clock()
            works[name]()
            wait()
            self.say(**clock.took())


class Clock:
    """Both clocks from now on."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def took(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "processor": time.process_time() - self._processor}
