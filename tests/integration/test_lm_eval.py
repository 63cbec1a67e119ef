"""``liquid evaluate --tasks``: a benchmark of one's own, and what is said without lm-eval."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.tiny import Tiny, build

from liquid_llm import lm_eval_tasks
from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow

TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


WHOLE = """
task: whole
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


def words(tiny: Tiny, tasks: object, folder: Path) -> list[str]:
    records = f"--records=lm={tiny.root / 'lm.jsonl'}"
    return ["evaluate", str(tiny.teacher), records, "--teacher=none", "--block_size=64", f"--tasks={tasks}",
            f"--json={folder / 'found.json'}", "--eval_tokens=512", f"--data_cache={folder / 'cache'}"]  # fmt: skip


def test_without_lm_eval_nothing_is_opened(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    given = words(tiny, "arc_easy,hellaswag", tmp_path)
    assert main([given[0], str(tmp_path / "nowhere"), *given[2:]]) == 2
    error = capsys.readouterr().err
    assert "--tasks=arc_easy,hellaswag" in error
    assert "pip install 'liquid-llm[lm-eval]'" in error


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
@pytest.mark.filterwarnings("default")  # a library's own
def test_a_task_of_ones_own_is_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is {number} a number?"}) + "\n" for number in range(8)))
    (tmp_path / "own.yaml").write_text(TASK.format(data=data))
    assert main([*words(tiny, tmp_path / "own.yaml", tmp_path), "--task_limit=5"]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["tasks"]["own"]["samples"] == 5
    assert 0 <= found["tasks"]["own"]["metrics"]["acc"]["value"] <= 1
    assert found["measures"]["all"]["ce"]["value"] > 0
    assert "lm-eval, each figure" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
@pytest.mark.filterwarnings("default")  # a library's own
def test_an_exported_folder_is_judged_as_it_was_trained(tiny: Tiny, tmp_path: Path) -> None:
    """The harness begins a text with what the folder's tokenizer names, and so must training have done."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"path": str(tiny.root / "lm.jsonl"), "type": "lm"}) + "\n")
    assert tiny.train_plainly(tmp_path, max_steps=2, warmup_steps=1, dataset_manifest=manifest) == 0
    folder = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run"), str(folder), "--which=final"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    text = json.loads((tiny.root / "lm.jsonl").read_text().splitlines()[0])["text"][:100]
    begin = tokenizer.bos_token_id
    framing = json.loads((tmp_path / "run" / "last.meta.json").read_text())["run"]["framing"]
    assert {begin} == set(framing["begin_ids"].values())
    ids = torch.tensor([[begin, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        expected = float(model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())

    judge = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    asked = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    assert judge.prefix_token_id == begin
    assert judge.loglikelihood_rolling([asked], disable_tqdm=True) == [pytest.approx(expected, rel=1e-4)]

    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "whole.yaml").write_text(WHOLE.format(data=data))
    given = words(tiny, tmp_path / "whole.yaml", tmp_path)
    assert main([given[0], str(folder), *given[2:], "--precision=float32"]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    bits = -expected / math.log(2) / len(text.encode())
    assert found["tasks"]["whole"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
