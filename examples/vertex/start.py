"""What a container of a Vertex AI job begins with: its words are those of ``liquid``, run on each GPU of each machine.

Vertex says in CLUSTER_SPEC which machines a job has and which of them this one is:
https://cloud.google.com/vertex-ai/docs/training/distributed-training
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def torchrun_words(words: Sequence[str], cluster_spec: str | None, processes: str = "gpu") -> list[str]:
    """The words of ``torchrun`` for ``python -m liquid_llm`` with ``words``, one of the ``processes`` a GPU."""
    spec = json.loads(cluster_spec or "{}")
    pools = spec.get("cluster", {})
    machines = [*pools.get("workerpool0", []), *pools.get("workerpool1", [])]
    if len(machines) < 2:
        where = ["--standalone"]
    else:
        number = spec["task"]["index"] + (spec["task"]["type"] == "workerpool1") * len(pools["workerpool0"])
        address, _, port = machines[0].partition(":")
        where = [f"--nnodes={len(machines)}", f"--node-rank={number}", f"--master-addr={address}"]
        where.append(f"--master-port={port}")
    # Without the -- torchrun would take --signal for one of its own options, shortened.
    return [*where, f"--nproc-per-node={processes}", "-m", "--", "liquid_llm", *words]


if __name__ == "__main__":
    try:
        main(torchrun_words(sys.argv[1:], os.environ.get("CLUSTER_SPEC")))
    except ChildFailedError as error:  # torchrun itself would end with 1
        print(error, file=sys.stderr)
        sys.exit(error.get_first_failure()[1].exitcode)
