"""A ``python`` and a ``liquid`` for scripts: whoever runs them gets a process that is forked from a server.

What is run is a small program, which takes the place of the forked process in the script: it hands its words, folder,
environment and streams over, passes signals on, and ends as the other ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.support.forked import start_with
from tests.support.servers import EVERYTHING

_PROGRAM = """
import json, os, signal, socket, sys

words = {first} + sys.argv[1:]
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({place})
    given = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(asked, [len(given).to_bytes(8, "big")], [0, 1, 2])
    asked.sendall(given)
    told = asked.makefile("rb")
    pid = int.from_bytes(told.read(8), "big")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int.from_bytes(told.read(8), "big", signed=True)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def add_program(folder: Path, name: str, body: str) -> None:
    """An executable ``name`` in ``folder`` that runs ``body``, Python, with its words in ``sys.argv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(body)
    (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$0.py" "$@"\n')
    (folder / name).chmod(0o755)


class Pythons:
    """Programs ``python`` and ``liquid`` in ``folder``, for a PATH, while this is open.

    Args:
        server: what they are forked from.
    """

    def __init__(self, folder: Path, server: Any = EVERYTHING) -> None:
        self.folder, self._server = folder, server
        place = f"{tempfile.mkdtemp()}/asked"  # an address may have no more than a hundred characters
        self._listening = socket.create_server(place, family=socket.AF_UNIX)
        for name, first in (("python", []), ("liquid", ["-m", "liquid_llm"])):
            add_program(folder, name, _PROGRAM.format(first=first, place=repr(place)))
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Pythons:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                asked, _ = self._listening.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._be_one, args=(asked,), daemon=True).start()

    def _be_one(self, asked: socket.socket) -> None:
        with asked:
            length, streams, _, _ = socket.recv_fds(asked, 8, 3)
            with asked.makefile("rb") as told:
                words, env, cwd = json.loads(told.read(int.from_bytes(length, "big")))
            process = start_with(words, env, cwd, streams, self._server)
            for descriptor in streams:
                os.close(descriptor)
            asked.sendall((process.pid or 0).to_bytes(8, "big"))
            process.join()
            asked.sendall(int(process.exitcode or 0).to_bytes(8, "big", signed=True))
