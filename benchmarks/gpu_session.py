"""Proves and measures the project on a GPU in one go of at most nine minutes; without one it does what it can.

    python benchmarks/gpu_session.py                          results below runs/gpu/, the table last
    python benchmarks/gpu_session.py --out DIR --minutes 9    results.jsonl, table.txt and log.txt in DIR
    python benchmarks/gpu_session.py --parts memory,timing    some parts only

Each part is a process of its own with a time box: one that hangs, crashes or runs out of memory takes no other with it,
and what it had found is in the file already. A part's unused time goes to the later ones. Predictions that are worked
out from shapes are made by one more process beside the measurements. The next part's process is started early, so that
its imports cost no time. The card's settings are left as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 4.0  # between the time a part is told and the time it is killed at
CLOSING_SECONDS = 6.0  # for the table


@dataclass(frozen=True)
class Part:
    """A part of the session: module ``benchmarks.gpu.NAME``, seconds it may take, what it is about."""

    name: str
    seconds: float
    about: str


PARTS = (
    Part("correctness", 110, "tests/gpu on the device"),
    Part("ceilings", 20, "versions; copies and products as fast as the device can"),
    Part("memory", 95, "what training takes under a cap of 22 GiB, against what was predicted"),
    Part("timing", 144, "steps of the reference's shape and what they consist of"),
    Part("others", 60, "the loss beside TRL's, Liger's and the plain one"),
    Part("capturing", 65, "an 8B teacher: bare, with its head, with encoding"),
    Part("checkpointing", 24, "how long a checkpoint stops training, by part"),
    Part("decoding", 22, "stored signal decoded beside a step"),
)
BESIDE = Part("predictions", 540, "predictions from shapes alone, on the CPU, beside the others")


class Child:
    """The process of one part; it imports at once and begins when told to."""

    def __init__(self, part: Part, arguments: argparse.Namespace, folder: Path) -> None:
        self.part = part
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if part is BESIDE:
            env["CUDA_VISIBLE_DEVICES"] = ""
        words = [
            "--part",
            part.name,
            "--out",
            str(arguments.out),
            "--folder",
            str(folder),
            "--select",
            arguments.select,
        ]
        self._log = (arguments.out / "log.txt").open("ab", buffering=0)
        # A group of its own, so that it can be killed with its children; not a session, which would outlive a launcher.
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=env,
            preexec_fn=os.setpgrp,  # no thread is running here
        )

    def begin(self, seconds: float) -> None:
        """Let it work for ``seconds``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while importing: its exit status says so
            self._process.stdin.write(json.dumps({"seconds": seconds}).encode() + b"\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it had to be killed."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def hold(arguments: argparse.Namespace) -> None:
    """The whole session."""
    from benchmarks.gpu.results import FAILED, SKIPPED, Recorder, Row

    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt", "table.txt"):
        (arguments.out / name).unlink(missing_ok=True)
    recorder = Recorder(arguments.out / "results.jsonl")
    end = started + 60 * arguments.minutes - CLOSING_SECONDS
    parts = [part for part in PARTS if part.name in arguments.parts]
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as scratch:

        def start(part: Part) -> Child:
            folder = Path(scratch) / part.name
            folder.mkdir()
            children.append(Child(part, arguments, folder))
            return children[-1]

        try:
            start(BESIDE).begin(end - started)
            following: Child | None = start(parts[0])
            spare = 0.0
            for number, part in enumerate(parts):
                child, following = following, None
                assert child is not None
                limit = min(part.seconds + spare, end - time.monotonic())
                if limit < 2 * GRACE_SECONDS:
                    recorder.add(Row(part.name, "all", SKIPPED, note="no time left in the session"))
                    break
                print(f"== {part.name}: {part.about}; {limit:.0f} s at most", flush=True)
                began = time.monotonic()
                child.begin(limit - GRACE_SECONDS)
                if number + 1 < len(parts):
                    following = start(parts[number + 1])
                status = child.wait(limit)
                took = time.monotonic() - began
                spare = max(0.0, part.seconds + spare - took)
                if status != 0:
                    why = f"killed after {took:.0f} s" if status is None else f"ended with status {status}: see log.txt"
                    recorder.add(Row(part.name, "the part itself", FAILED, note=why))
                recorder.add(Row("session", part.name, measured=took, unit="s", predicted=part.seconds, basis="box"))
        finally:
            for child in children:
                child.kill()
    close(arguments, time.monotonic() - started)


def close(arguments: argparse.Namespace, seconds: float) -> None:
    """Write the table, and print it without the tests that passed and measured nothing."""
    from benchmarks.gpu.results import in_short, read, table

    rows = sorted(read(arguments.out / "results.jsonl"), key=lambda row: row.part == "session")
    end = f"\n{seconds:.0f} s; results in {arguments.out}\n"
    left = sorted({row.part for row in rows if row.note == "no GPU"})
    if left:
        end += f"not measured: no GPU. Left for a real card, in whole or in part: {', '.join(left)}\n"
    wrong = [f"{row.part}: {row.name}" for row in rows if row.status == "failed" or row.verdict.startswith("OUTSIDE")]
    end += "".join(f"LOOK AT {one}\n" for one in wrong)
    (arguments.out / "table.txt").write_text(table(rows) + end, encoding="utf-8")
    shown, passed = in_short(rows)
    print(table(shown) + f"\n{passed} more tests passed" + end, flush=True)


def work(arguments: argparse.Namespace) -> None:
    """One part, in the process made for it: imports, waits to be told, works."""
    module: Any = importlib.import_module(f"benchmarks.gpu.{arguments.part}")
    line = sys.stdin.readline() if select.select([sys.stdin], [], [], 3600)[0] else ""
    if not line:  # the session is gone
        return
    deadline = time.monotonic() + float(json.loads(line)["seconds"])
    from benchmarks.gpu.context import Context, find_device
    from benchmarks.gpu.results import Recorder, read

    results = arguments.out / "results.jsonl"
    device = find_device()
    context = Context(
        part=arguments.part,
        device=device,
        recorder=Recorder(results),
        deadline=deadline,
        folder=arguments.folder,
        earlier=read(results),
        select=arguments.select,
    )
    print(f"---- {arguments.part} on {device}", flush=True)
    module.run(context)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results (default: a new one below runs/gpu/)")
    parser.add_argument("--minutes", type=float, default=9.0, help="longest the session may take [9]")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="comma-separated [all]")
    parser.add_argument("--select", default="", help="which tests of tests/gpu, as pytest's -k takes it [all]")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    arguments.parts = arguments.parts.split(",")
    arguments.out = (arguments.out or ROOT / "runs" / "gpu" / time.strftime("%Y%m%dT%H%M%S")).resolve()
    return arguments


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts' processes end too
    arguments = _options()
    if arguments.part:
        work(arguments)
    else:
        hold(arguments)


if __name__ == "__main__":
    main()
