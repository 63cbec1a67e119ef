"""Servers that have libraries loaded and fork: what processes of tests are started from, seconds of each saved.

Two of them, since a process forked from one cannot unload what that has loaded:

    EVERYTHING   the libraries and this project's modules
    LIBRARIES    torch and transformers alone, for another copy of the project, or a machine that has no more
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from unittest import mock

EVERYTHING = multiprocessing.get_context("forkserver")
EVERYTHING.set_forkserver_preload(["tests.support.preloaded"])

# The library knows of one server; this is a second one of the same kind.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["tests.support.preloaded_libraries"])


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: BaseProcess) -> None:
        with mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            super()._launch(process)  # type: ignore[misc]


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> _Popen:
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


LIBRARIES = _Context()


def pids() -> list[int]:
    """Of the servers that run."""
    found = (server._forkserver_pid for server in (forkserver._forkserver, _SERVER))
    return [pid for pid in found if pid is not None]
