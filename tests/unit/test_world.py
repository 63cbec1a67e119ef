"""The offline world that integration tests run in is what it says it is."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
from tests.support import texts
from tests.support.world import MANIFEST, STAGE0_STUDENT, STAGE1_STUDENT, World, served

PROBE = """
import json, os, sys
import datasets, fsspec, torch, transformers

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
bucket = fsspec.filesystem("gcs", token="anon")
found = {"models": {}, "shards": {}, "students": {}}
tokenizers = {transformers.AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str() for name in sys.argv[4:]}
for name in sys.argv[4:]:
    found["models"][name] = transformers.AutoConfig.from_pretrained(name).model_type
found["tokenizers"] = len(tokenizers)
found["rows"] = datasets.load_dataset("wikitext", "wikitext-103-raw-v1").num_rows
for line in bucket.cat(sys.argv[1]).splitlines():
    entry = json.loads(line)
    found["shards"][entry["type"]] = len(bucket.glob(entry["path"]))
for uri in sys.argv[2:4]:
    with bucket.open(uri) as file:
        saved = torch.load(file, weights_only=True)
    config = transformers.AutoConfig.for_model(**saved["config"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(saved["student"])
    found["students"][uri] = config.model_type
json.dump(found, sys.stdout)
"""


def test_world_answers_offline_to_the_names_the_commands_use(world: World) -> None:
    models = {"gpt2-xl": "gpt2", "meta-llama/Llama-3.2-3B": "llama", "meta-llama/Llama-3.1-8B": "llama"}
    done = world.run([sys.executable, "-c", PROBE, MANIFEST, STAGE0_STUDENT, STAGE1_STUDENT, *models])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["models"] == {
        "gpt2-xl": "gpt2",
        "meta-llama/Llama-3.2-3B": "llama",
        "meta-llama/Llama-3.1-8B": "llama",
    }
    assert found["tokenizers"] == 1
    assert found["shards"] == {"lm": 2, "math_tool": 2, "code": 2}
    assert found["students"] == {STAGE0_STUDENT: "gpt2", STAGE1_STUDENT: "lfm2"}
    assert set(found["rows"]) == {"train", "validation", "test"}
    assert min(found["rows"].values()) > 50


def test_world_hides_the_settings_of_the_machine(
    built_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AIP_CHECKPOINT_DIR", "CLOUD_ML_JOB_ID", "HF_TOKEN", "TRANSFORMERS_CACHE"):
        monkeypatch.setenv(name, "/elsewhere")
    with served(built_world, tmp_path) as world:
        assert "/elsewhere" not in world.env.values()
        assert world.run("python -c 'import sys; print(sys.executable)'").stdout.strip() == sys.executable


def test_a_fresh_world_does_not_see_what_another_was_sent(world: World, fresh_world: World) -> None:
    (world.bucket / "left-over").mkdir(exist_ok=True)
    assert world.env["STORAGE_EMULATOR_HOST"] != fresh_world.env["STORAGE_EMULATOR_HOST"]
    assert not (fresh_world.bucket / "left-over").exists()
    assert (fresh_world.bucket / "stage1" / "stage1.pt").exists()


def test_word_problems_are_right_and_functions_compile() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        traces = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", texts.word_problem(rng))
        assert traces, seed
        for left, sign, right, result, shown in traces:
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
            assert value == int(result) == int(shown), seed
        compile(texts.function(rng, extra_steps=3), "made", "exec")


def test_texts_are_a_function_of_the_seed() -> None:
    first, second = random.Random(5), random.Random(5)
    assert texts.article(first) == texts.article(second)
