"""What is mutated, and the tests that stand nearest to it. Entries are paths or patterns below the repository."""

from __future__ import annotations

from pathlib import Path

CODE = "src/liquid_llm"
UNIT = "tests/unit"

# Subject -> (its modules, its tests). A module's own test file runs first, then the others by what they take.
SUBJECTS: dict[str, tuple[list[str], list[str]]] = {
    "loss": (
        [f"{CODE}/losses/**/*.py"],
        [f"{UNIT}/losses/test_*.py", f"{UNIT}/test_training.py", "tests/golden/test_golden.py"],
    ),
    "schedules": (
        [f"{CODE}/schedules.py"],
        [f"{UNIT}/test_schedules.py", f"{UNIT}/test_training.py", "tests/golden/test_example_schedules.py"],
    ),
    "order": (
        [f"{CODE}/data/{name}.py" for name in ("sampling", "blocks", "buckets", "two_levels", "many_files", "loader")],
        [
            f"{UNIT}/data/test_{name}.py"
            for name in ("sampling", "blocks*", "buckets", "two_levels", "many_files", "loader", "prefetch")
        ],
    ),
    "records": (
        [f"{CODE}/signal_store/records.py"],
        [f"{UNIT}/signal_store/test_records.py", f"{UNIT}/signal_store/test_s*.py"],
    ),
    "codecs": (
        [f"{CODE}/signal_store/codecs/**/*.py"],
        [f"{UNIT}/signal_store/test_codec*.py", f"{UNIT}/signal_store/test_sizes.py"],
    ),
    "served": ([f"{CODE}/served/protocol.py"], [f"{UNIT}/served/test_protocol.py"]),
    "checkpoints": (
        [f"{CODE}/checkpoint/{name}.py" for name in ("store", "discovery", "files")],
        [f"{UNIT}/checkpoint/test_{name}.py" for name in ("files", "store", "upload", "resume")],
    ),
    "metrics": ([f"{CODE}/metrics.py"], [f"{UNIT}/test_metrics.py"]),
}


def modules(root: Path) -> dict[str, list[str]]:
    """Module file -> its nearest test files, its own (``test_NAME.py``) first."""
    table = {}
    for sources, tests in SUBJECTS.values():
        near = list(dict.fromkeys(found for pattern in tests for found in files(root, pattern)))
        for source in [found for pattern in sources for found in files(root, pattern)]:
            own = f"test_{Path(source).stem}.py"
            table[source] = sorted(near, key=lambda test: Path(test).name != own)
    return table


def files(root: Path, pattern: str) -> list[str]:
    return [str(path.relative_to(root)) for path in sorted(root.glob(pattern))]
