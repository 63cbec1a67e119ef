"""Servers that have libraries loaded and fork: what processes of tests are started from, seconds of each saved.

Two of them, since a process forked from one cannot unload what that has loaded:

    EVERYTHING   the libraries and this project's modules
    LIBRARIES    torch and transformers alone, for another copy of the project, or a machine that has no more

``server`` makes a further one, for an environment that libraries read when they are imported.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from functools import partial
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

EVERYTHING = multiprocessing.get_context("forkserver")
EVERYTHING.set_forkserver_preload(["tests.support.preloaded"])

_SERVERS = [forkserver._forkserver]  # the library knows of this one; the others are of the same kind


def server(preload: str, env: Mapping[str, str] | None = None) -> ForkServerContext:
    """A server that has imported the module ``preload`` in the environment ``env``; it starts when it is first used."""
    own = forkserver.ForkServer()
    own.set_forkserver_preload([preload])
    _SERVERS.append(own)

    context = ForkServerContext()
    context.Process = partial(_Process, own, env)  # type: ignore[misc, assignment]
    return context


class _Process(ForkServerProcess):
    def __init__(self, own: forkserver.ForkServer, env: Mapping[str, str] | None, **given: Any) -> None:
        super().__init__(**given)
        self._own = own, env

    def __getstate__(self) -> dict[str, Any]:  # what is sent to the server
        return {name: value for name, value in vars(self).items() if name != "_own"}

    @staticmethod
    def _Popen(process: BaseProcess) -> _Popen:
        return _Popen(process)


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        own, env = process._own
        begun_in = mock.patch.dict(os.environ, env or {}, clear=env is not None)
        with mock.patch.object(forkserver, "connect_to_new_process", own.connect_to_new_process), begun_in:
            super()._launch(process)  # type: ignore[misc]


LIBRARIES = server("tests.support.preloaded_libraries")


def pids() -> list[int]:
    """Of the servers that run."""
    return [own._forkserver_pid for own in _SERVERS if own._forkserver_pid is not None]
