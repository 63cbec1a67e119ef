"""Golden losses: 20 hybrid steps of a two-layer model in float32 with each codec, against what was recorded.

python -m tests.golden.compare            print recorded and present losses side by side; exit 1 if a bit differs
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
CODECS = ("tail", "topk", "full")  # the default first

Rows = list[dict[str, float | None]]


def present(codec: str) -> Rows:
    """Loss, CE and KL of each step with a store of ``codec``, now, on one thread."""
    from tests.support.tiny import build

    from liquid_llm.cli.main import main
    from liquid_llm.metrics import read_metrics

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny = build(Path(folder), teacher_steps=150)
            assert main(["capture", *tiny.capture_words(teacher_precision="float32", codec=codec)]) == 0
            precise = {"precision": "float32", "teacher_precision": "float32", "eval_every": 0, "save_every": 0}
            assert main(["train", *tiny.train_words(folder, max_steps=STEPS, **precise)]) == 0
            rows = [row for row in read_metrics(Path(folder) / "run") if row["kind"] == "train"]
    finally:
        torch.set_num_threads(threads)
    return [{key: row[key] for key in ("step", "loss", "ce", "kd", "grad_norm")} for row in rows]


def main(argv: list[str]) -> int:
    """Print both side by side; with ``--write`` record the present ones."""
    now = {codec: present(codec) for codec in CODECS}
    before: dict[str, Rows] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for codec, rows in now.items():
        print(f"{codec}\n{'step':>4}  {'recorded loss':>20}  {'present loss':>20}  {'difference':>10}")
        for index, row in enumerate(rows):
            recorded = before.get(codec, [])
            old = recorded[index]["loss"] if index < len(recorded) else float("nan")
            print(f"{row['step']:>4}  {old:>20.15f}  {row['loss']:>20.15f}  {row['loss'] - old:>10.2e}")
    if "--write" in argv:
        tables = [f'"{codec}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for codec, rows in now.items()]
        RECORDED.write_text("{\n" + ",\n".join(tables) + "\n}\n")
        print(f"recorded in {RECORDED}")
    return 0 if now == before else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
