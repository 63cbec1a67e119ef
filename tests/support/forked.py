"""Python programs as processes of their own, forked from a server that has the libraries loaded already.

What ``subprocess`` would start takes seconds of the processor until torch, transformers and datasets are imported; here
it takes a blink. It is a whole process: its own pid to be killed, its own working folder, environment and streams, and
modules as they were before anyone ran them. Not for a test of what is imported, of how the interpreter starts, or of a
variable that a library reads when it is imported: those begin from nothing, by ``subprocess``.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from tests.support.servers import EVERYTHING


class Forked:
    """A running program, with what ``subprocess.Popen`` has: pid, streams, ``poll``, ``communicate``, signals.

    Args:
        words: what would stand behind ``python``: ``-m MODULE``, ``-c CODE`` or a script, and its own words.
        env: the whole environment; None: this process's.
        cwd: the folder to run in; None: this process's.
        stdin, stdout, stderr: True: the other end is the caller's; False: as if it were ``/dev/null``.
        server: what it is forked from.
    """

    def __init__(
        self,
        words: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        server: Any = EVERYTHING,
    ) -> None:
        self.args = [os.fspath(word) for word in words]
        theirs, ours = [], []
        for place, kept in enumerate((stdin, stdout, stderr)):
            read, write = os.pipe() if kept else (os.open(os.devnull, os.O_RDWR), None)
            theirs.append(read if place == 0 or write is None else write)
            own = write if place == 0 else read
            ours.append(os.fdopen(own, "r" if place else "w", encoding="utf-8") if kept else None)
        self.stdin, self.stdout, self.stderr = ours
        self._readers: list[threading.Thread] = []
        self._said = ["", ""]
        given = dict(os.environ if env is None else env), os.fspath(cwd or Path.cwd())
        self._process = start_with(self.args, *given, theirs, server)
        for descriptor in theirs:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has said on its streams, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not; it goes on.
        """
        if not self._readers:
            streams = [(place, one) for place, one in enumerate((self.stdout, self.stderr)) if one and not one.closed]
            self._readers = [threading.Thread(target=self._read, args=one, daemon=True) for one in streams]
            for reader in self._readers:
                reader.start()
        self.wait(timeout)
        for reader in self._readers:
            reader.join()
        return self._said[0], self._said[1]

    def _read(self, place: int, stream: IO[str]) -> None:
        with stream:
            self._said[place] = stream.read()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    words: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 240,
    check: bool = False,
    server: Any = EVERYTHING,
) -> subprocess.CompletedProcess[str]:
    """The program to its end, as ``subprocess.run`` with its streams captured as text.

    Raises:
        subprocess.TimeoutExpired: it took longer; it is killed.
        subprocess.CalledProcessError: it failed, and ``check`` is set.
    """
    program = Forked(words, env=env, cwd=cwd, server=server)
    try:
        out, err = program.communicate(timeout)
    except subprocess.TimeoutExpired:
        program.kill()
        program.communicate()
        raise
    done = subprocess.CompletedProcess(program.args, program.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def start_with(
    words: Sequence[str], env: Mapping[str, str], cwd: str, streams: Sequence[int], server: Any = EVERYTHING
) -> Any:
    """The program as a running ``multiprocessing.Process`` whose streams are these three descriptors."""
    process = server.Process(target=_be_a_program, args=(list(words), dict(env), cwd, *map(_Sent, streams)))
    process.start()
    return process


class _Sent:
    """A descriptor that goes along to the process that is started."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._sent: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_sent": DupFd(self._number)}

    def received(self) -> int:
        return int(self._sent.detach())


def _be_a_program(words: list[str], env: dict[str, str], cwd: str, *streams: _Sent) -> None:
    for number, stream in enumerate(streams):
        received = stream.received()
        os.dup2(received, number)
        os.close(received)
    become(words, env, cwd)


def become(words: list[str], env: Mapping[str, str], cwd: str) -> NoReturn:
    """Make this process, which nobody else needs any more, that of a program; 0, 1 and 2 are its streams already."""
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0, closefd=False),
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", errors="backslashreplace", closefd=False),
    )
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(cwd)
    tempfile.tempdir = None  # as the environment says
    _as_the_interpreter_begins(env)
    code = _status_of(words)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = 120  # as the interpreter ends where what was said cannot be written
    os._exit(code)


def _as_the_interpreter_begins(env: Mapping[str, str]) -> None:
    """The paths it looks for modules in, and threads as the environment says."""
    import torch

    before = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [part for part in before.split(os.pathsep) if part and part not in sys.path]
    if (threads := env.get("OMP_NUM_THREADS", "")).isdecimal():
        torch.set_num_threads(int(threads))


def _status_of(words: list[str]) -> int:
    """Run the words as the interpreter would; the status it would end with."""
    if words[0] == "-u":
        words = words[1:]  # torchrun asks for streams that keep nothing back; what is said is read at the end
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv = rest
            sys.path.insert(0, os.getcwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, "")
            module = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), module.__dict__)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(kind).resolve().parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 1
    except Exception:  # noqa: BLE001  said as the interpreter says it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0
