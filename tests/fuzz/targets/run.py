"""What a run writes beside its checkpoints, as reports, comparisons and continued runs read it.

The first byte says which file, the rest is its content; the others are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_json
from tests.fuzz.driver import attempt

from liquid_llm.jobs.doctor import examine
from liquid_llm.jobs.inspect import describe
from liquid_llm.metrics import MetricsWriter, read_metrics
from liquid_llm.provenance import _earlier_sessions
from liquid_llm.report import build_report
from liquid_llm.study.folder import StudyFolder
from liquid_llm.wiring.exports import _models

_ROW = {"kind": "train", "step": 1, "loss": 2.5, "by_type": {"lm": {"ce": 2.0}}, "not_finite": {"by_type.lm.kd": "nan"}}
FILES: dict[str, bytes] = {
    "metrics.jsonl": (json.dumps(_ROW) + "\n" + json.dumps({**_ROW, "kind": "eval", "step": 2}) + "\n").encode(),
    "samples.jsonl": json.dumps({"step": 1, "samples": [{"prompt": "a", "said": "b"}]}).encode() + b"\n",
    "summary.json": b'{"steps": 4, "seconds": 2.5, "best": {"val_loss_student": 1.5}}',
    "provenance/options.yaml": b"teacher_id: a\nsources: {code: {teacher: 'online:b'}}\nstudent: llama-test\n",
    "provenance/config.json": b'{"student": {"student": "a"}, "data": {"block_size": 8}}',
    "provenance/manifest_snapshot.jsonl": b'{"path": "a", "type": "lm", "weight": 1.0}\n',
    "provenance/data_readiness.json": b'{"types": {"lm": {"samples": 3, "tokens": 8}}, "teachers": {"a": {"id": "b"}}}',
    "provenance/datasets_snapshot.yaml": b"a: {type: lm, in: x, out: y}\n",
    "provenance/environment.json": b'{"sessions": [{"started": "x", "argv": ["a"], "packages": {"torch": "2"}}]}',
    "study.json": b'{"version": 1, "face": "train", "arms": [{"name": "a", "counts": {"lr": 1}}], "seeds": [1, 2]}',
}
_NAMES = tuple(FILES)


def seeds() -> Iterator[bytes]:
    for number, name in enumerate(_NAMES):
        yield bytes([number]) + FILES[name]


def mutate(data: bytes, number: int) -> bytes:
    return data[:1] + mutate_json(data[1:], number)


def check(data: bytes, folder: Path) -> None:
    files = {**FILES, _NAMES[(data[0] if data else 0) % len(_NAMES)]: data[1:]}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    def go_on() -> None:
        with MetricsWriter(folder, resume_step=1) as writer:
            writer.write("train", 2, {"loss": 1.0})

    for look in (
        lambda: build_report(folder),
        lambda: describe(str(folder)),
        lambda: examine(str(folder)),
        lambda: _models(str(folder / "provenance/options.yaml")),
        lambda: StudyFolder(folder).merge_plan({"face": "train", "arms": [{"name": "a", "counts": {}}], "seeds": [3]}),
        go_on,
        lambda: read_metrics(folder),
        lambda: _earlier_sessions(str(folder / "provenance/environment.json")),
    ):
        attempt(look)
