"""The units of a capture on Ray: workers that each hold the teacher take one data file after the other.

    pip install 'ray[data]'
    python examples/capture_ray.py --config=capture.yaml --workers=8 --gpus=1

``capture.yaml`` has the options of ``liquid capture``. Workers are started, retried and moved by Ray: one that is
killed is replaced, and the data file that it was at is gone on with, record by record. Files that are complete are
skipped, so the same command again does what is left. A file that cannot be used keeps no other from being captured; the
script ends with 3 then.

On a cluster name its address in RAY_ADDRESS; every node needs liquid_llm, and the places in the file as URLs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import liquid_llm


class Teacher:
    """A worker: it loads the teacher when it meets the first data file that is not complete."""

    def __init__(self, config: str) -> None:
        self.capture = liquid_llm.open_capture(config)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        try:
            found = self.capture.run(unit)
        except liquid_llm.errors.DataError as error:  # this file has to be mended; the others are captured
            found = {"complete": False, "error": str(error)}
        return {"unit": unit["name"], "worker": os.getpid(), "summary": json.dumps(found)}


def main(argv: list[str] | None = None, worker: type = Teacher) -> int:
    try:
        return capture(argv, worker)
    except liquid_llm.errors.LiquidError as error:  # an option or a place that cannot work, said before Ray begins
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def capture(argv: list[str] | None, worker: type) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the options of liquid capture")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each worker")
    asked = parser.parse_args(argv)

    units = list(liquid_llm.open_capture(asked.config).units())

    import ray.data

    # One block a unit: a worker is given another when it has done with one, and a retry repeats no other.
    done = ray.data.from_items(units, override_num_blocks=len(units)).map(
        worker,
        fn_constructor_args=[str(asked.config.resolve())],
        compute=ray.data.ActorPoolStrategy(size=min(asked.workers, len(units)), max_tasks_in_flight_per_actor=1),
        num_cpus=asked.cpus,
        num_gpus=asked.gpus,
    )
    failed = 0
    for row in done.iter_rows():
        print(json.dumps(row), flush=True)
        failed += not json.loads(row["summary"])["complete"]
    return 3 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
