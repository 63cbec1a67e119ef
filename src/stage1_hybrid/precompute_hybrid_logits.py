"""Face: ``python -m stage1_hybrid.precompute_hybrid_logits`` is ``liquid capture``."""

import sys

from liquid_llm.cli.main import run_face
from liquid_llm.options import CAPTURE


def main(argv: list[str] | None = None) -> int:
    """Capture a teacher's signal; returns the exit code."""
    return run_face(CAPTURE, argv, "python -m stage1_hybrid.precompute_hybrid_logits")


if __name__ == "__main__":
    sys.exit(main())
