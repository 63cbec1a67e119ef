"""Golden losses: 20 hybrid steps of a two-layer model in float32 with each codec, against what was recorded.

The codecs run without a begin token, as releases before there was one did; the default codec once more with it.

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
# Name of a run -> its codec and --begin_token; the default codec first.
RUNS = {
    "tail": ("tail", "never"),
    "topk": ("topk", "never"),
    "full": ("full", "never"),
    "tail, begin token": ("tail", "auto"),
}
# As it was when the losses were recorded; the default has more draws since.
SETTINGS = {"tail": {"codec_options": "draws_t1=48,draws_t2=30,draws_t4=8"}}

Rows = list[dict[str, float | None]]


def present(run: str) -> Rows:
    """Loss, CE and KL of each step of one of ``RUNS``, now, on one thread."""
    from tests.support.tiny import build

    from liquid_llm.cli.main import main
    from liquid_llm.metrics import read_metrics

    codec, begin_token = RUNS[run]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny = build(Path(folder), teacher_steps=150)
            same = {"teacher_precision": "float32", "begin_token": begin_token}
            assert main(["capture", *tiny.capture_words(**same, codec=codec, **SETTINGS.get(codec, {}))]) == 0
            short = {"max_steps": STEPS, "eval_every": 0, "save_every": 0}
            assert (
                main(["train", *tiny.train_words(folder, **same, **short, precision="float32", kd_temperature=2.0)])
                == 0
            )
            rows = [row for row in read_metrics(Path(folder) / "run") if row["kind"] == "train"]
    finally:
        torch.set_num_threads(threads)
    return [{key: row[key] for key in ("step", "loss", "ce", "kd", "grad_norm")} for row in rows]


def main(argv: list[str]) -> int:
    """Print both side by side; with ``--write`` record the present ones."""
    now = {run: present(run) for run in RUNS}
    before: dict[str, Rows] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for run, rows in now.items():
        print(f"{run}\n{'step':>4}  {'recorded loss':>20}  {'present loss':>20}  {'difference':>10}")
        for index, row in enumerate(rows):
            recorded = before.get(run, [])
            old = recorded[index]["loss"] if index < len(recorded) else float("nan")
            print(f"{row['step']:>4}  {old:>20.15f}  {row['loss']:>20.15f}  {row['loss'] - old:>10.2e}")
    if "--write" in argv:
        tables = [f'"{run}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for run, rows in now.items()]
        RECORDED.write_text("{\n" + ",\n".join(tables) + "\n}\n")
        print(f"recorded in {RECORDED}")
    return 0 if now == before else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
