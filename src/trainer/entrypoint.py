"""Face: ``python -m trainer.entrypoint`` is ``liquid anneal``."""

import sys

from liquid_llm.cli.main import run_face
from liquid_llm.options import ANNEAL


def main(argv: list[str] | None = None) -> int:
    """Run the annealing trainer; returns the exit code."""
    return run_face(ANNEAL, argv, "python -m trainer.entrypoint")


if __name__ == "__main__":
    sys.exit(main())
