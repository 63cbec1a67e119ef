"""Golden losses: 20 hybrid steps of a two-layer model, full precision, against what was recorded.

python -m tests.golden.compare            print recorded and present losses side by side
python -m tests.golden.compare --write    record the present ones (say why in the commit message)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

RECORDED = Path(__file__).parent / "losses.json"
STEPS = 20


def present() -> list[dict[str, float | None]]:
    """Loss, CE and KL of each step, now, on one thread."""
    from tests.support.tiny import build

    from liquid_llm.cli.main import main
    from liquid_llm.metrics import read_metrics

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny = build(Path(folder))
            assert main(["capture", *tiny.capture_words(teacher_precision="float32", codec="topk")]) == 0
            precise = {"precision": "float32", "teacher_precision": "float32", "eval_every": 0, "save_every": 0}
            assert main(["train", *tiny.train_words(folder, max_steps=STEPS, **precise)]) == 0
            rows = [row for row in read_metrics(Path(folder) / "run") if row["kind"] == "train"]
    finally:
        torch.set_num_threads(threads)
    return [{key: row[key] for key in ("step", "loss", "ce", "kd", "grad_norm")} for row in rows]


def main(argv: list[str]) -> int:
    """Print both side by side; with ``--write`` record the present ones."""
    now = present()
    before = json.loads(RECORDED.read_text()) if RECORDED.exists() else []
    print(f"{'step':>4}  {'recorded loss':>20}  {'present loss':>20}  {'difference':>10}")
    for index, row in enumerate(now):
        old = before[index]["loss"] if index < len(before) else float("nan")
        print(f"{row['step']:>4}  {old:>20.15f}  {row['loss']:>20.15f}  {row['loss'] - old:>10.2e}")
    if "--write" in argv:
        RECORDED.write_text("[\n" + ",\n".join(json.dumps(row) for row in now) + "\n]\n")
        print(f"recorded in {RECORDED}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
