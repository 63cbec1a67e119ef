"""The units of a capture on Ray: workers that each hold the teacher take one data file after the other.

    pip install 'ray[data]'
    python examples/capture_ray.py --config=capture.yaml --workers=8 --gpus=1

``capture.yaml`` has the options of ``liquid capture``. Workers are started, retried and moved by Ray: one that is
killed is replaced, and the data file that it was at is gone on with, record by record. Files that are complete are
skipped, so the same command again does what is left. A file that cannot be used keeps no other from being captured; the
script ends with 3 then. Any other trouble (a place that cannot be written, a server that is lost) would meet each file:
the script ends, with one line that says what it is and the exit code that ``liquid capture`` has for it.

On a cluster name its address in RAY_ADDRESS; every node needs liquid_llm, and the places in the file as URLs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import liquid_llm


class Teacher:
    """A worker: it loads the teacher when it meets the first data file that is not complete.

    What goes wrong is told as a row: what a worker raises comes out as Ray's traceback, after Ray has tried again.
    """

    def __init__(self, config: str) -> None:
        self.config = config
        self.capture: Any = None

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        code = 0
        try:
            self.capture = self.capture or liquid_llm.open_capture(self.config)
            found = self.capture.run(unit)
        except liquid_llm.errors.LiquidError as error:
            found, code = {"complete": False, "error": str(error)}, error.exit_code
        return {"unit": unit["name"], "worker": os.getpid(), "summary": json.dumps(found), "exit_code": code}


def main(argv: list[str] | None = None, worker: type = Teacher) -> int:
    try:
        return capture(argv, worker)
    except liquid_llm.errors.LiquidError as error:  # an option or a place that cannot work, said before Ray begins
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def share_of(text: str) -> float:
    """A number of processors or of GPUs."""
    if not 0.0 <= (number := float(text)) < float("inf"):
        raise ValueError(text)
    return number


def count_of(text: str) -> int:
    """A number of workers."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def capture(argv: list[str] | None, worker: type) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the options of liquid capture")
    parser.add_argument("--workers", type=count_of, default=1)
    parser.add_argument("--gpus", type=share_of, default=0.0, help="of each worker")
    parser.add_argument("--cpus", type=share_of, default=1.0, help="of each worker")
    asked = parser.parse_args(argv)

    units = list(liquid_llm.open_capture(asked.config).units())

    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise liquid_llm.errors.UsageError(
            "Ray is not installed", got=error, remedy="install it: pip install 'ray[data]'"
        ) from error

    # One block a unit: a worker is given another when it has done with one, and a retry repeats no other.
    done = ray.data.from_items(units, override_num_blocks=len(units)).map(
        worker,
        fn_constructor_args=[str(asked.config.resolve())],
        compute=ray.data.ActorPoolStrategy(size=min(asked.workers, len(units)), max_tasks_in_flight_per_actor=1),
        num_cpus=asked.cpus,
        num_gpus=asked.gpus,
    )
    return report(done.iter_rows())


def report(rows: Iterable[dict[str, Any]]) -> int:
    """Print what came of each unit as it comes; the exit code."""
    failed, data_code = 0, liquid_llm.errors.DataError.exit_code
    for row in rows:
        print(json.dumps(row), flush=True)
        found = json.loads(row["summary"])
        if row["exit_code"] not in (0, data_code):  # no other file would fare better
            print(f"error: {row['unit']}: {found['error']}", file=sys.stderr)
            return int(row["exit_code"])
        failed += not found["complete"]
    return data_code if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
