"""Benchmarks of lm-eval: what ``--tasks`` names, and a task of one's own run and marked, where it is installed."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm import lm_eval_tasks
from liquid_llm.errors import DataError, UsageError
from liquid_llm.framing import Framing
from liquid_llm.generation import generate
from liquid_llm.lm_eval_tasks import plan_tasks, run_tasks
from liquid_llm.models.tokenizers import frame_tokenizer

INSTALLED = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is an extra")

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SAID = """
task: own_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], do_sample: false, max_gen_toks: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named is found out without lm-eval."""
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: object())


def test_without_lm_eval_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        plan_tasks(["arc_easy"])
    assert "pip install 'liquid-llm[lm-eval]'" in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_names_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("task: first\ndoc_to_text: !function steal.me\n")
    (tmp_path / "two.yml").write_text("group: several\ntask: [first]\n")
    (tmp_path / "piece.yaml").write_text("test_split: test\n")
    (tmp_path / "notes.txt").write_text("task: not one")
    plan = plan_tasks(["arc_easy", str(tmp_path / "one.yaml"), str(tmp_path)], limit=3, num_fewshot=0)
    assert plan.names == ("arc_easy", "first", "several")
    assert plan.folders == (str(tmp_path),)
    assert plan.knows_all
    assert not plan_tasks([str(tmp_path / "one.yaml")]).knows_all, "its own thousands need not be looked through"
    for wrong, told in (("piece.yaml", "no task of lm-eval"), ("none.yaml", "no such task file")):
        with pytest.raises(UsageError, match=told):
            plan_tasks([str(tmp_path / wrong)])
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(UsageError, match="cannot be read"):
        plan_tasks([str(tmp_path / "bad.yaml")])


def write_tasks(folder: Path, rows: list[dict[str, Any]]) -> None:
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "said.yaml").write_text(SAID.format(data=data))


@needs_lm_eval
@pytest.mark.filterwarnings("default")  # a library's own
@pytest.mark.parametrize("conv_bias", [False, True])
def test_tasks_of_ones_own_give_what_the_model_says(tmp_path: Path, conv_bias: bool) -> None:
    tokenizer = frame_tokenizer(tiny_tokenizer(), Framing(0, 0))
    model = tiny_model("lfm2", 512, conv_bias=conv_bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(float("in_proj.bias" in name))
    questions = [f"{'why ' * number}{number}?" for number in range(6)]
    prompts = [tokenizer(f"Q: {one}\nA:")["input_ids"] for one in questions]
    said = [tokenizer.decode(ids) for ids in generate(model, prompts, end_ids=[0], max_new_tokens=5)]
    choices = [" yes", " no it"]

    def score(prompt: list[int], choice: str) -> float:
        ids = prompt + tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))

    best = [score(prompt, choices[0]) > score(prompt, choices[1]) for prompt in prompts]
    rows = [{"question": one, "choices": choices, "said": two} for one, two in zip(questions, said, strict=True)]
    rows[2]["said"] = "something else"
    write_tasks(tmp_path, rows)
    tokenizer.pad_token = None
    python, state, pad = random.getstate(), torch.get_rng_state(), tokenizer.pad_token
    found = run_tasks(plan_tasks([str(tmp_path)]), model, tokenizer, batch_size=4)
    assert found["own_said"]["metrics"]["exact_match"]["value"] == pytest.approx(5 / 6)
    assert found["own_choice"]["metrics"]["acc"]["value"] == pytest.approx(sum(best) / 6)
    assert found["own_said"]["metrics"]["exact_match"]["error"] == pytest.approx((5 / 36 / 5) ** 0.5)
    assert found["own_choice"]["samples"] == 6
    assert json.loads(json.dumps(found)) == found
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token == pad
    limited = run_tasks(plan_tasks([str(tmp_path / "choice.yaml")], limit=2), model, tokenizer)
    assert limited["own_choice"]["samples"] == 2
    assert limited["own_choice"]["metrics"]["acc"]["value"] == pytest.approx(sum(best[:2]) / 2)


@needs_lm_eval
@pytest.mark.filterwarnings("default")
def test_what_lm_eval_cannot_run_is_said(tmp_path: Path) -> None:
    write_tasks(tmp_path, [{"question": "x", "choices": ["a", "b"], "said": "y"}])
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="cannot run the tasks"):
        run_tasks(plan_tasks([str(tmp_path)]), tiny_model("llama", 512), tiny_tokenizer())
    plan = plan_tasks([str(tmp_path)])
    with pytest.raises(UsageError, match="knows no such task") as caught:
        run_tasks(type(plan)(("own_chioce",), plan.folders, False), tiny_model("llama", 512), tiny_tokenizer())
    assert "own_choice" in str(caught.value)
