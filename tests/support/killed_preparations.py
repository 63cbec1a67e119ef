"""Preparations that are killed; run as a script by the preparation tests, so that imports are paid for once.

killed_preparations.py CATALOG OLD NEW

For each file-system call of a preparation in turn: start from a copy of the folder OLD, prepare dataset ``a`` of
CATALOG there in a child that is killed by SIGKILL right before that call, look whether what is taken for complete is
right, prepare again, and compare with the folder NEW. Prints one line of JSON with what was seen.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tests.support.dying import die_before_call

from liquid_llm.preparation.catalog import Dataset, read_catalog
from liquid_llm.preparation.dataset import input_files, prepare, read_complete

CALLS = ("replace", "unlink", "fsync", "mkdir", "rename")


def prepare_now(dataset: Dataset) -> None:
    prepare(dataset, input_files(dataset))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below ``folder`` but strays of a kill."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".tmp")}


def killed(dataset: Dataset, number: int) -> bool:
    """Whether a child preparing ``dataset`` died at call ``number``; else it was done before."""
    pid = os.fork()
    if pid == 0:
        die_before_call(number, CALLS, lambda: os.kill(os.getpid(), signal.SIGKILL))
        prepare_now(dataset)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"point {number}: the child ended with {code}")
    return code != 0


def main(catalog: str, old: Path, new: Path) -> None:
    dataset = read_catalog(catalog).datasets["a"]
    before, after = files(old), files(new)
    points = strays = taken_for_complete = 0
    while True:
        points += 1
        folder = new.with_name(f"killed-{points}")
        shutil.copytree(old, folder)
        here = replace(dataset, out=str(folder))
        died = killed(here, points)
        marker = read_complete(here)
        if marker is not None:
            taken_for_complete += 1
            is_new = marker["fingerprint"] == json.loads(after["_prepared/a/complete.json"])["fingerprint"]
            right = after if is_new else before
            for shard in marker["shards"]:
                if (folder / shard["name"]).read_bytes() != right[shard["name"]]:
                    raise SystemExit(f"point {points}: {shard['name']} is taken for complete and is not")
        strays += len(list(folder.rglob("*.tmp")))
        prepare_now(here)
        if files(folder) != after:
            raise SystemExit(f"point {points}: not the same after running again")
        shutil.rmtree(folder)
        if not died:
            break
    print(json.dumps({"points": points, "strays": strays, "taken_for_complete": taken_for_complete}))


if __name__ == "__main__":
    os.fsync = lambda _: None  # type: ignore[assignment]  # a kill loses nothing that was written; power is not cut
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
