"""Face: ``python -m stage1_hybrid.cli`` is ``liquid train``."""

import sys

from liquid_llm.cli.main import run_face
from liquid_llm.options import TRAIN


def main(argv: list[str] | None = None) -> int:
    """Run the hybrid trainer; returns the exit code."""
    return run_face(TRAIN, argv, "python -m stage1_hybrid.cli")


if __name__ == "__main__":
    sys.exit(main())
