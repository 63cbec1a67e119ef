"""``benchmarks/gpu_session.py`` whose parts' processes are forked, where ten starts of Python would take a minute.

    forked_session.py SCRIPT WORDS…    run from ``tests.support.forked``, so that the libraries are there

The session, its parts and how it ends them are the script's own; what is another one is how a process comes to be.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import IO

from tests.support import forked


class Part:
    """What the script uses of ``subprocess.Popen``."""

    def __init__(
        self,
        words: list[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        env: Mapping[str, str],
        preexec_fn: Callable[[], None],
    ) -> None:
        assert (stdin, stderr) == (subprocess.PIPE, subprocess.STDOUT)
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            preexec_fn()
            weakref.finalize._registry.clear()  # the session's folder is the session's to remove
            for number, stream in enumerate((read, stdout.fileno(), stdout.fileno())):
                os.dup2(stream, number)
            os.close(write)
            forked.become(words[1:], env, os.getcwd())
        os.close(read)
        self.stdin = os.fdopen(write, "wb")
        self._words = words
        self._status: int | None = None

    def wait(self, timeout: float = 60.0) -> int:
        until = time.monotonic() + timeout
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired(self._words, timeout)
            else:
                time.sleep(0.02)
        return self._status


def main(script: str, *words: str) -> None:
    spec = importlib.util.spec_from_file_location("gpu_session", script)
    assert spec is not None
    assert spec.loader is not None
    session = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(session)
    known = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "TimeoutExpired")}
    session.subprocess = SimpleNamespace(Popen=Part, **known)
    sys.argv = [script, *words]
    session.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
