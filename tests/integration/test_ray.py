"""examples/capture_ray.py on a Ray of this machine, one of whose workers is killed in the middle of a data file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.support import texts
from tests.support.readme import REPOSITORY
from tests.support.tiny import build

from liquid_llm.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROWS, FILES = 6, 5
# The example, whose first worker to have written part of a data file is killed: once in all.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "examples")
import capture_ray
import ray

class Dying(capture_ray.Teacher):
    def __call__(self, unit):
        from tests.support import dying
        mark = Path(MARK)
        def killed():
            if not mark.exists():
                mark.write_text(unit["name"])
                os.kill(os.getpid(), signal.SIGKILL)
        dying.at_batch(3, killed)
        return super().__call__(unit)

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
sys.exit(capture_ray.main(worker=Dying))
"""


def test_a_killed_workers_data_file_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    tiny = build(tmp_path / "world")
    rng = random.Random(5)
    (tiny.root / "math").mkdir()
    for number in range(FILES):
        rows = [{"text": texts.word_problem(rng), "sample_id": f"{number}-{n}"} for n in range(ROWS)]
        (tiny.root / "math" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny.root / "math" / f"{FILES}.jsonl").write_text("no record\n")
    tiny.draw_from({"path": "math/*.jsonl", "type": "math_tool", "weight": 1.0})
    options = {
        "mc_teacher_id": str(tiny.teacher),
        "dataset_manifest": str(tiny.manifest),
        "math_logits_dir": str(tmp_path / "store"),
        "data_cache": str(tmp_path / "tokens"),
        "seq_len": 64,
        "batch_size": 1,
    }
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "dying.py").write_text(KILLED.replace("MARK", repr(str(tmp_path / "killed"))))
    paths = os.pathsep.join([str(REPOSITORY / "examples"), *filter(None, sys.path)])  # workers import the example too
    done = subprocess.run(
        [sys.executable, str(tmp_path / "dying.py"), f"--config={tmp_path / 'capture.yaml'}", "--workers=2"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 3, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"unit"')]
    found = {row["unit"]: json.loads(row["summary"]) for row in said}
    broken = [name for name, summary in found.items() if not summary["complete"]]
    assert [name[: len(f"{FILES}.jsonl")] for name in broken] == [f"{FILES}.jsonl"]
    assert "not a JSON object" in found[broken[0]]["error"]
    assert (tmp_path / "killed").read_text() in found
    assert sum(summary.get("written", 0) + summary.get("skipped", 0) for summary in found.values()) == FILES * ROWS
    capsys.readouterr()
    assert main(["store", "stats", str(tmp_path / "store"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["units"], stats["types"]["math_tool"]["records"], stats["unreadable"]) == (FILES, FILES * ROWS, 0)
