"""What all targets share: what a target may do with any bytes, and how it is watched while it does.

    target     a module of ``targets``: ``check(data, folder)`` gives the bytes to the code under test, ``seeds()`` are
               the inputs that a search begins with, ``mutate(data, number)`` changes one where plain bytes go nowhere
    finding    an input for which ``check`` raises what is no error of the project, takes too long, or takes too much
               memory; two of one kind and one place in the sources are one finding
    corpus     ``corpus/TARGET/NAME``: what was found at some time. ``test_corpus`` gives all of it to its target

Nothing here needs atheris; ``search`` does.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

from liquid_llm.errors import LiquidError

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
NAMES = sorted(path.stem for path in (HERE / "targets").glob("[a-z]*.py"))
SECONDS = 10.0  # of processor; an input has some kilobytes
T = TypeVar("T")
MEMORY_BYTES = 2**29  # that the peak may grow by; a process may ask for four times as much at once


class Finding(Exception):
    """An input for which a target does what it must not. ``place`` is the same for all that are alike."""

    def __init__(self, what: str, place: str) -> None:
        super().__init__(f"{what} at {place}")
        self.place = place


class _TooLongError(BaseException):
    """No Exception: code that takes any error for a damaged file must not take this for one."""


def load(name: str) -> ModuleType:
    """The target of that name."""
    return importlib.import_module(f"tests.fuzz.targets.{name}")


def inputs_of(name: str, target: ModuleType) -> dict[str, bytes]:
    """The seeds of a target and its corpus, by name."""
    seeds = {f"seed-{number}": data for number, data in enumerate(target.seeds())}
    files = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    return seeds | {path.name: path.read_bytes() for path in files}


def check(target: ModuleType, data: bytes) -> None:
    """Give ``data`` to ``target``, in an empty folder.

    Raises:
        Finding: it raised something else than an error of the project, or took too much time or memory.
    """
    peak, begun = _peak_bytes(), time.process_time()
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast_folder()) as folder, _bounds():
            target.check(data, Path(folder))
    except LiquidError:
        pass
    except _TooLongError as error:
        raise Finding(f"more than {SECONDS:g} s", _place(error)) from error
    except Exception as error:
        raise Finding(type(error).__name__, _place(error)) from error
    if time.process_time() - begun > SECONDS:
        raise Finding(f"more than {SECONDS:g} s", target.__name__)
    if _peak_bytes() - peak > MEMORY_BYTES:
        raise Finding(f"more than {MEMORY_BYTES:,} bytes", target.__name__)


def attempt(read: Callable[[], T]) -> T | None:
    """What ``read`` gives, or None where it ends with an error of the project."""
    try:
        return read()
    except LiquidError:
        return None


def quiet() -> None:
    """Say nothing of what is found damaged, which is nearly everything; ``check`` is about what is raised."""
    logging.disable(logging.CRITICAL)


@contextmanager
def _bounds() -> Iterator[None]:
    """Memory that is asked for at once ends with MemoryError, time of the processor with ``_TooLongError``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + 4 * MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _place(error: BaseException) -> str:
    """The last line of the project's own sources that an error came through, else of the target."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if f"{os.sep}src{os.sep}" in one.filename]
    ours = ours or [one for one in frames if f"{os.sep}fuzz{os.sep}targets{os.sep}" in one.filename]
    last = ours[-1] if ours else frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} ({last.name})"


def replay(names: list[str]) -> int:
    """Give each file that is named (``TARGET/NAME`` of the corpus, or a path below such a folder) to its target."""
    quiet()
    for name in names:
        path = Path(name) if Path(name).is_file() else CORPUS / name
        try:
            check(load(path.parent.name), path.read_bytes())
            print(f"{path}: nothing")
        except Finding as finding:
            traceback.print_exception(finding)
    return 0


if __name__ == "__main__":
    sys.exit(replay(sys.argv[1:]))
