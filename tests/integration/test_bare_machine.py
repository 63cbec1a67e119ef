"""A machine that has torch and transformers but not every dependency: local JSONL and a model folder need no more.

The packages are not removed: in a process of its own, which has none of this project yet, the path finder does not see
them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tests.support import forked
from tests.support.gguf_files import write_gguf
from tests.support.models import tiny_model
from tests.support.servers import LIBRARIES
from tests.support.tiny import Tiny
from tests.support.tokenizers import tiny_tokenizer

ABSENT = ("datasets", "gcsfs", "zstandard", "gguf")

BARE = f"""
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

for name in [name for name in sys.modules if name.partition(".")[0] in {ABSENT!r}]:
    del sys.modules[name]  # the server that this is forked from has what other libraries load
sys.meta_path[:] = [Without if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
from liquid_llm.cli.main import main
code = main(sys.argv[1:])
present = [name for name in {ABSENT!r} if name in sys.modules]
sys.exit(f"imported: {{present}}" if present else code)
"""


def bare(words: list[str]) -> subprocess.CompletedProcess[str]:
    """``liquid WORDS`` where the packages are absent."""
    return forked.run(["-c", BARE, *words], server=LIBRARIES)


def assert_done(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_finder_hides_them() -> None:
    script = BARE.split("from liquid_llm")[0] + "".join(
        f"\ntry:\n    import {name}\n    sys.exit('{name} is there')\nexcept ImportError:\n    pass\n"
        for name in ABSENT
    )
    assert_done(forked.run(["-c", script], server=LIBRARIES))


def test_help() -> None:
    done = bare(["train", "--help"])
    assert_done(done)
    assert "--dataset_manifest" in done.stdout


def test_capture_and_train_on_local_jsonl(tiny: Tiny, tmp_path: Path) -> None:
    stores = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    assert_done(bare(["capture", *tiny.capture_words(codec="tail", **stores)]))
    assert_done(bare(["train", *tiny.train_words(tmp_path / "out", max_steps=4, eval_every=2, save_every=2, **stores)]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert all(row["kd_coverage"] == 1.0 for row in rows if row["kind"] == "train")
    assert (tmp_path / "out" / "run" / "student" / "model.safetensors").is_file()


def manifest_of(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps({"path": name, "type": "lm", "weight": 1.0}) + "\n")
    return manifest


@pytest.mark.parametrize("package", ABSENT)
def test_what_needs_an_absent_package_says_so(package: str, tiny: Tiny, tmp_path: Path) -> None:
    if package == "datasets":
        done = bare(["anneal", f"--student={tiny.student}", f"--dataset_name={tiny.root / 'texts'}", "--train_steps=1",
                     "--block_size=64", f"--teacher_name={tiny.teacher}", f"--output_gcs_uri={tmp_path}"])  # fmt: skip
        expected, code = "pip install datasets", 2
    elif package == "zstandard":
        manifest = manifest_of(tmp_path, "lm.jsonl.zst", b"\x28\xb5\x2f\xfd")
        done = bare(["train", *tiny.train_words(tmp_path / "out", dataset_manifest=manifest, max_steps=1)])
        expected, code = "pip install zstandard", 2
    elif package == "gcsfs":
        done = bare(["train", *tiny.train_words("gs://bucket/run", max_steps=1)])
        expected, code = "gcsfs", 4
    else:
        teacher = write_gguf(tmp_path / "teacher.gguf", tiny_model("llama"), tiny_tokenizer())
        done = bare(["train", *tiny.train_words(tmp_path / "out", lm_teacher_id=teacher, hybrid="false", max_steps=1)])
        expected, code = "install torch and gguf", 2
    assert done.returncode == code, done.stderr[-3000:]
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
