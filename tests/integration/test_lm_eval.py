"""``liquid evaluate --tasks``: a benchmark of one's own, and what is said without lm-eval."""

from __future__ import annotations

import json
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

    assert tiny.train_plainly(tmp_path, max_steps=2, run_id="run") == 0
    folder = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run"), str(folder), "--which=final"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    judge = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    text = json.loads((tiny.root / "lm.jsonl").read_text().splitlines()[0])["text"][:120]
    (found,) = judge.loglikelihood_rolling(
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)], disable_tqdm=True
    )
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)
    (begin,) = set(
        json.loads((tmp_path / "run" / "last.meta.json").read_text())["run"]["framing"]["begin_ids"].values()
    )
    assert judge.prefix_token_id == tokenizer.bos_token_id == begin
