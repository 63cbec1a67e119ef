"""``make gpu`` where there is no GPU: every part is walked, what could not be measured is said, nothing is made up."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tests.support import forked

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.py"
PARTS = ("correctness", "ceilings", "memory", "timing", "others", "capturing", "checkpointing", "decoding")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")


def hold(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A session; tests are few, because `make test` runs them all beside this."""
    return begin(SCRIPT, "--out", str(out), *words)


def begin(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Its parts are processes of their own that have the libraries already."""
    place = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return forked.run(["-m", "tests.support.forked_session", str(script), *words], env=place, timeout=280)


def rows_of(out: Path) -> list[dict[str, object]]:
    values = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [value for value in values if value["kind"] == "row"]


@pytest.mark.slow
def test_every_part_is_walked_on_the_pretend_device_and_memory_is_what_was_predicted(tmp_path: Path) -> None:
    done = hold(tmp_path / "out", "--select", "codec or dry_run")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path / "out")
    assert {row["part"] for row in rows} == {*PARTS, "session"}
    failed = [row for row in rows if row["status"] == "failed"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert not failed, f"{failed}\n{log[-3000:]}"
    tests = [row for row in rows if row["part"] == "correctness"]
    assert len(tests) > 4
    assert all(row["status"] == "passed" for row in tests)
    # Only a count is a figure without a GPU: bytes, parameters, and the session's own seconds.
    assert {row["unit"] for row in rows if row["measured"] is not None} <= {"GiB", "1e9 parameters", "s"}
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "not measured: no GPU. Left for a real card" in text
    assert "LOOK AT" not in text
    predicted = [line for line in text.splitlines() if line.startswith("B=")]
    assert len(predicted) == 8
    assert all("within 5%" in line for line in predicted), "\n".join(predicted)
    said = done.stdout.splitlines()
    missing = [line for line in text.splitlines() if line not in said and not line.endswith("passed")]
    assert not missing


def test_a_part_that_hangs_or_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    """Two parts of a copy of the session are broken: one sleeps, one is killed; the third is there."""
    copy = tmp_path / "benchmarks" / "gpu"
    copy.mkdir(parents=True)
    for path in (ROOT / "benchmarks" / "gpu").glob("*.py"):
        (copy / path.name).write_text(path.read_text())
    script = copy.parent / "gpu_session.py"
    script.write_text(SCRIPT.read_text().replace('Part("ceilings", 20', 'Part("ceilings", 15'))
    (copy / "ceilings.py").write_text("import time\ndef run(context):\n    context.ran('one')\n    time.sleep(600)\n")
    (copy / "memory.py").write_text(
        "import os\ndef run(context):\n    context.ran('two')\n    os.kill(os.getpid(), 9)\n"
    )
    (copy / "timing.py").write_text("def run(context):\n    context.ran('three')\n")
    done = begin(script, "--out", str(tmp_path / "out"), "--parts", "ceilings,memory,timing")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(row["name"], row["status"]) for row in rows_of(tmp_path / "out") if row["part"] != "session"]
    broken = [("the part itself", "failed")]
    assert found == [("one", "ran, not measured"), *broken, ("two", "ran, not measured"), *broken,
                     ("three", "ran, not measured")]  # fmt: skip
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "killed after" in text
    assert "LOOK AT ceilings: the part itself" in text
    assert "ended with status -9" in text


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    done = hold(tmp_path / "out", "--parts", "memory,speed")
    assert done.returncode == 2
    assert "no such part: speed" in done.stderr
