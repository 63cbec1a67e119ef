"""Students of which an adapter is trained, by the real command line, opened in peft itself."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal, anneal_words, as_of, metadata, rows
from tests.support.models import tiny_model
from tests.support.tiny import VOCAB_SIZE, Tiny
from transformers import AutoModelForCausalLM

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("peft") is None, reason="comes with the extra lora"),
]
STEPS = 4
OPTIONS = {"lora_r": 4, "train_steps": STEPS, "save_every": 1, "keep_last": STEPS, "eval_every": 2, "lr": 0.02}
IDS = torch.tensor([[5, 9, 2, 30, 7, 11, 4, 8]])


@pytest.fixture(scope="module")
def bases(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with weights: linear maps of both kinds, positions of both kinds."""
    root = tmp_path_factory.mktemp("bases")
    for family in ("llama", "gpt2"):
        tiny_model(family, VOCAB_SIZE, seed=5).save_pretrained(root / family)
    return {family: root / family for family in ("llama", "gpt2")}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def whole(
    request: pytest.FixtureRequest, bases: dict[str, Path], tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A base, and a run that has trained an adapter of it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert anneal(tiny, folder, student=bases[request.param], **OPTIONS) == 0
    return bases[request.param], folder


def logits(folder: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def test_a_run_goes_on_to_the_bit_from_a_checkpoint_that_holds_the_adapter_alone(whole, tiny, tmp_path):
    base, folder = whole
    again = as_of(folder, 2, tmp_path / "run")
    assert anneal(tiny, again, student=base, **OPTIONS) == 0
    mine, theirs = ([without_timings(row) for row in read_metrics(one)] for one in (again, folder))
    assert mine == theirs
    a, b = (torch.load(one / "final.pt", weights_only=True) for one in (again, folder))
    assert a["student"].keys() == b["student"].keys()
    assert all(".lora_" in name for name in a["student"])
    assert all(torch.equal(value, b["student"][name]) for name, value in a["student"].items())
    for index, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in moments.items())
    assert (folder / "final.pt").stat().st_size < (base / "model.safetensors").stat().st_size


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_the_folder_that_a_run_leaves_is_the_base_with_the_adapter_as_peft_opens_and_merges_it(whole, tmp_path, capsys):
    from peft import PeftModel

    base, folder = whole
    assert main(["export", str(folder), str(tmp_path / "merged"), "--which=final"]) == 0
    assert main(["export", str(folder), str(tmp_path / "adapter"), "--which=final", "--adapter"]) == 0
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    left, merged = logits(folder / "student"), logits(tmp_path / "merged")
    assert torch.equal(left, merged)
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(IDS).logits, left, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(theirs.merge_and_unload()(IDS).logits, left, atol=1e-5, rtol=1e-4)
    assert (left - logits(base)).abs().max() > 1e-3
    assert main(["export", str(folder), str(tmp_path / "adapter"), "--adapter"]) == 2
    assert main(["export", str(folder), str(tmp_path / "adapter"), "--adapter", "--force"]) == 0
    assert main(["export", str(folder), str(tmp_path / "x"), "--adapter", "--tokenizer=x"]) == 2


def test_the_base_is_found_again_and_refused_where_it_has_changed(whole, tiny, tmp_path, capsys):
    base, folder = whole
    run, copy = as_of(folder, 2, tmp_path / "run"), tmp_path / "copy"
    shutil.copytree(base, copy)
    assert anneal(tiny, run, student=copy, **OPTIONS) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    model.save_pretrained(copy)
    run = as_of(folder, 2, tmp_path / "again")
    capsys.readouterr()
    assert anneal(tiny, run, student=copy, **OPTIONS) == 4
    said = capsys.readouterr().err
    assert "the model that this adapter was trained on has changed" in said
    assert str(copy) in said
    assert anneal(tiny, run, student=tmp_path / "gone", **OPTIONS) == 4
    assert "cannot be opened" in capsys.readouterr().err


def test_a_run_trains_the_same_weights_to_its_end(whole, tiny, tmp_path, capsys):
    base, folder = whole
    run = as_of(folder, 2, tmp_path / "run")
    for other in ({"lora_r": 2}, {"lora_alpha": 3.0}):
        assert anneal(tiny, run, student=base, **{**OPTIONS, **other}) == 2
        assert "a run trains the same weights to its end" in capsys.readouterr().err
    without = {name: value for name, value in OPTIONS.items() if name != "lora_r"}
    assert anneal(tiny, run, student=base, **without) == 0, "what is resumed has its options from its checkpoint"
    assert metadata(run)["student"]["lora"]["rank"] == 4


def test_what_is_resumed_afresh_begins_with_the_adapter_merged(whole, tiny, tmp_path):
    _, folder = whole
    resumed = {"resume_gcs_uri": folder / "final.pt", "reset_optim": True, "train_steps": 1, "lr": 1e-9}
    assert anneal(tiny, tmp_path / "whole", **resumed) == 0
    assert "lora" not in metadata(tmp_path / "whole")["student"]
    torch.testing.assert_close(logits(tmp_path / "whole" / "student"), logits(folder / "student"), atol=1e-4, rtol=1e-3)
    assert anneal(tiny, tmp_path / "adapted", lora_r=2, **resumed) == 0
    adapted = metadata(tmp_path / "adapted")["student"]["lora"]
    assert adapted["base"] == {"resume": str(folder / "final.pt")}
    assert main(["export", str(tmp_path / "adapted"), str(tmp_path / "merged"), "--which=final"]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(folder / "student"), atol=1e-4, rtol=1e-3)


def test_keeping_old_logits_asks_the_base_itself_and_checkpointing_changes_no_bit(bases, tiny, tmp_path):
    """With an adapter that is new the distance from the base is zero, later it is not; no second model is held."""
    found = []
    for name, more in (("plain", {}), ("recomputed", {"grad_checkpoint": True})):
        words = tiny.train_words(
            tmp_path / name, student=bases["llama"], lora_r=4, lr=0.02, max_steps=3, keep_old_logit_l2=0.1,
            math_logits_dir=None, code_logits_dir=None, signal="math_tool=none,code=none", metrics_interval=1,
            optimizer="muon", **more,
        )  # fmt: skip
        assert main(["train", *words]) == 0
        run = next(path.parent for path in (tmp_path / name).rglob("metrics.jsonl"))
        found.append(rows(run))
    losses = [[row["l2"] for row in one] for one in found]
    assert losses[0][0] == 0
    assert losses[0][-1] > 0
    assert [row["loss"] for row in found[0]] == pytest.approx([row["loss"] for row in found[1]], rel=1e-5)


def test_a_dry_run_says_how_small_its_checkpoints_are(bases, tiny, tmp_path, capsys):
    found = {}
    for rank in (0, 2):
        given = anneal_words(tiny, tmp_path / "run", student=bases["llama"], lora_r=rank)
        assert main(["anneal", *given, "--dry_run"]) == 0
        found[rank] = json.loads(capsys.readouterr().out)
    assert found[2]["estimate"]["checkpoint_bytes"] < found[0]["estimate"]["checkpoint_bytes"] / 5
    assert found[2]["memory"]["rest_bytes"] < found[0]["memory"]["rest_bytes"]


def test_what_it_cannot_do_is_refused_in_words(bases, tiny, tmp_path, capsys, monkeypatch):
    def refused(**options):
        assert anneal(tiny, tmp_path / "run", **{"student": bases["llama"], "lora_r": 4, **options}) == 2
        return capsys.readouterr().err

    assert "--lora_alpha goes with --lora_r" in refused(lora_r=0, lora_alpha=2.0)
    assert "leave out --shard=full" in refused(shard="full")
    assert "weights that nothing has trained" in refused(student=tiny.root / "gpt2.json")
    assert "train the cut first" in refused(student=f"from:{tiny.teacher},layers=1")
    assert "no positions" in refused(student=bases["gpt2"], block_size=128)
    said = refused(lora_target_modules="qkv")
    assert "q_proj" in said
    assert "lm_head" not in said
    assert "embedding or the output head" in refused(lora_target_modules="lm_head")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find_spec(name))
    assert "pip install 'liquid-llm[lora]'" in refused()
