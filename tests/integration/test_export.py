"""``liquid export``: any checkpoint of a run as a folder that transformers opens, equal to the run's own."""

import json
import re
import shutil

import pytest
import torch
from tests.support.annealing import anneal, as_of, contents
from tests.support.hub import TOKEN, running_hub
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics
from liquid_llm.models.tokenizers import tokenizer_hash
from liquid_llm.training import Trainer

pytestmark = pytest.mark.slow

IDS = torch.arange(48).reshape(2, 24) * 7 % 512


def export(run, folder, *words):
    return main(["export", str(run), str(folder), *words])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(checkpoint):
    """The model in a checkpoint, put together without a line of ours."""
    content = torch.load(checkpoint, weights_only=True)
    described = dict(content["metadata"]["student"]["config"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(described.pop("model_type"), **described))
    model.load_state_dict(content["student"])
    return model


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """A run of a student with short convolutions that was asked to stop after three steps of eight."""
    run = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        train = Trainer.train

        def stop_early(trainer):
            trainer.total_steps = 3
            train(trainer)
            return False

        patch.setattr(Trainer, "train", stop_early)
        assert anneal(tiny, run, student=tiny.student, eval_every=0) == 75
    return run


def test_the_last_checkpoint_gives_what_the_run_itself_wrote(short, tmp_path):
    assert export(short, tmp_path / "final", "--which=final") == 0
    own = contents(short / "student")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= own.keys()
    assert contents(tmp_path / "final") == own
    assert "| optimizer steps | 8 |" in own["README.md"].decode()
    assert re.search(r"^\| lm \| teacher \| sha256-\w+ \| asked while training \|$", own["README.md"].decode(), re.M)
    last = read_metrics(short)[-1]
    assert f"| lm | {last['val_loss_student']:.4g} | " in own["README.md"].decode(), "of this checkpoint"


def test_config_generation_and_tokenizer_name_the_tokens_and_the_length_of_training(short, interrupted, tmp_path):
    assert export(interrupted, tmp_path / "student") == 0
    for folder, length in ((short / "student", 32), (tmp_path / "student", 32)):
        config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert named == (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)
        assert named[:2] == (config.bos_token_id, config.eos_token_id)
        assert tokenizer.model_max_length == length
        assert tokenizer.chat_template is None


def test_an_interrupted_run_has_a_student_with_the_very_same_logits(interrupted, tmp_path, capsys):
    assert not (interrupted / "student").exists()
    assert export(interrupted, tmp_path / "student") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(model), logits(trained(interrupted / "last.pt")))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "student")) == tokenizer_hash(tiny_tokenizer(512))


def test_a_folder_generates_with_a_cache_in_a_padded_batch_and_in_a_pipeline(interrupted, tmp_path):
    assert export(interrupted, tmp_path / "student") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    prompts = ["Once", "def add(a, b):\n    return"]
    plainly = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    said = []
    for prompt in prompts:
        one = tokenizer(prompt, return_tensors="pt")
        assert one.input_ids[0, 0] == tokenizer.bos_token_id, "as in training"
        cached, whole = (model.generate(**one, **plainly, use_cache=use_cache)[0] for use_cache in (True, False))
        assert torch.equal(cached, whole)
        said.append(cached[one.input_ids.shape[1] :])
    both = tokenizer(prompts, return_tensors="pt", padding=True)
    assert not both.attention_mask.all(), "the shorter one is padded"
    together = model.generate(**both, **plainly)[:, both.input_ids.shape[1] :]
    assert torch.equal(together, torch.stack(said))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for answer, expected in zip(write(prompts, return_full_text=False, **plainly), said, strict=True):
        assert answer[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_any_snapshot_is_found_by_name_and_by_file(short, tmp_path):
    assert export(short, tmp_path / "named", "--which=step-4") == 0
    assert export(short / "step-00000004.pt", tmp_path / "file") == 0
    assert contents(tmp_path / "named") == contents(tmp_path / "file")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "named")
    assert torch.equal(logits(model), logits(trained(short / "step-00000004.pt")))
    assert not torch.equal(logits(model), logits(trained(short / "final.pt")))


def test_the_best_comes_first_and_the_newest_where_there_is_none(short, tmp_path):
    torch.manual_seed(0)
    for name, expected in (("with", "step-00000004"), ("without", "step-00000008")):
        run = as_of(short, 8, tmp_path / name)
        for suffix in (".pt", ".meta.json"):
            shutil.copy(short / f"step-00000004{suffix}", run)
            if name == "with":
                shutil.copy(short / f"step-00000004{suffix}", run / f"best{suffix}")
        shutil.copytree(short / "provenance", run / "provenance")
        assert export(run, tmp_path / f"{name}-student") == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-student")
        assert torch.equal(logits(model), logits(trained(short / f"{expected}.pt")))


def test_bfloat16_rounds_and_does_nothing_else(short, tmp_path):
    assert export(short, tmp_path / "half", "--dtype=bfloat16", "--which=final") == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    whole = trained(short / "final.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16()), name
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    difference = (logits(rounded).log_softmax(-1) - logits(whole).log_softmax(-1)).abs().max()
    assert 0 < difference < 0.05


def test_the_copy_of_the_tokenizer_that_a_run_keeps_is_enough(short, tmp_path):
    run = as_of(short, 8, tmp_path / "run")
    shutil.copytree(short / "provenance" / "tokenizer", run / "provenance" / "tokenizer")
    assert export(run, tmp_path / "student") == 0
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "student")) == tokenizer_hash(tiny_tokenizer(512))


def test_without_its_own_copy_the_tokenizer_comes_from_what_the_options_name(tiny, short, tmp_path, capsys):
    run = as_of(short, 8, tmp_path / "run")
    assert export(run, tmp_path / "a") == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert export(run, tmp_path / "a", f"--tokenizer={tiny.teacher}") == 0
    (run / "provenance").mkdir()
    shutil.copy(short / "provenance" / "options.yaml", run / "provenance")
    assert export(run, tmp_path / "b") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_tokenizer_is_never_taken(short, tmp_path, capsys):
    run = as_of(short, 8, tmp_path / "run")
    tiny_tokenizer(300).save_pretrained(tmp_path / "other")
    shutil.copy(short / "student" / "config.json", tmp_path / "other")
    assert export(run, tmp_path / "a", f"--tokenizer={tmp_path / 'other'}") == 2
    assert "another one" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_exported_is_said_and_nothing_is_written(short, tmp_path, capsys):
    damaged = as_of(short, 8, tmp_path / "damaged")
    data = bytearray((damaged / "step-00000008.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "step-00000008.pt").write_bytes(data)
    torch.save({"weights": {"a": torch.zeros(2)}}, tmp_path / "bare.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    one = as_of(short, 8, tmp_path / "runs" / "one")
    cases = {
        (damaged,): (4, "sha256"),
        (tmp_path / "bare.pt",): (4, "not a checkpoint of a run"),
        (tmp_path / "empty",): (4, "no complete checkpoint"),
        (one.parent,): (4, f"name one of the runs in it: {one}."),
        (tmp_path / "nowhere.pt",): (4, "no checkpoint"),
        (short, "--which=step-5"): (4, "step-00000004"),
        (short, "--which=newest"): (2, "no name of a checkpoint"),
        (short / "last.pt", "--which=best"): (2, "one checkpoint"),
        (short, "--dtype=float16"): (2, "bfloat16"),
    }
    for (source, *words), (code, said) in cases.items():
        assert export(source, tmp_path / "out", *words) == code, source
        assert said.lower() in capsys.readouterr().err.lower(), source
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_replaced_only_when_asked_and_only_if_it_is_a_model(short, tmp_path, capsys):
    target = tmp_path / "student"
    assert export(short, target, "--which=step-4") == 0
    before = contents(target)
    assert export(short, target, "--which=final") == 2
    assert "--force" in capsys.readouterr().err
    assert contents(target) == before
    assert export(short, target, "--which=final", "--force") == 0
    assert contents(target) == contents(short / "student")
    before = contents(short)
    assert export(short, short, "--force") == 2
    assert "left alone" in capsys.readouterr().err
    assert contents(short) == before


def test_force_replaces_nothing_that_no_export_writes(short, tmp_path, gcs, capsys):
    """A folder with a ``config.json`` need not be a model: a run's provenance has one."""
    provenance = tmp_path / "provenance"
    shutil.copytree(short / "provenance", provenance)
    thesis, below, empty = tmp_path / "thesis", tmp_path / "below", tmp_path / "empty"
    for folder in (thesis, below, empty):
        shutil.copytree(short / "student", folder)
    (thesis / "thesis.txt").write_text("years of work")
    (below / "runs").mkdir()
    (below / "runs" / "config.json").write_text("{}")
    (empty / "link").symlink_to(tmp_path)
    for folder, named in {provenance: "environment.json", thesis: "thesis.txt", below: "runs/", empty: "link/"}.items():
        before = contents(folder)
        assert export(short, folder, "--which=final", "--force") == 2, folder
        said = capsys.readouterr().err
        assert named in said
        assert "left alone" in said
        assert contents(folder) == before
    own = tmp_path / "own" / "small.gguf"
    shutil.copytree(short / "student", own.parent)
    own.write_bytes(b"of an earlier export")
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('reached')")
    for file, said in ((own.with_name("other.gguf"), "left alone"), (own, "got reached")):
        words = ("--which=final", "--force", f"--gguf={file}", f"--converter={tmp_path}")
        assert export(short, own.parent, *words) == 2
        assert said in capsys.readouterr().err
    for name in ("thesis.txt", "runs/config.json"):
        target = f"{gcs.uri}/{name.replace('/', '-')}"
        storage.write_bytes(f"{target}/config.json", b"{}")
        storage.write_bytes(f"{target}/{name}", b"years of work")
        assert export(short, target, "--which=final", "--force") == 2
        assert name.partition("/")[0] in capsys.readouterr().err
        assert [one.name for one in storage.list_files(target)] == sorted(["config.json", name])


def test_runs_and_folders_may_be_urls(short, tmp_path, gcs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, target = f"{gcs.uri}/runs/one", f"{gcs.uri}/models/one"
    for name in contents(short):
        storage.upload(short / name, f"{run}/{name}")
    storage.write_bytes(f"{target}/config.json", b"{}")
    storage.write_bytes(f"{target}/model-00001-of-00002.safetensors", b"of an earlier model")
    assert export(run, target, "--which=final") == 2
    assert export(run, target, "--which=final", "--force") == 0
    found = {one.name: storage.read_bytes(one.uri) for one in storage.list_files(target)}
    assert found == contents(short / "student")


def test_a_student_of_conversations_has_the_template_that_it_was_trained_with(tiny, tmp_path):
    turns = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "That is four, as always."}]
    rows = [json.dumps({"messages": turns, "sample_id": f"chat-{number}"}) + "\n" for number in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(rows))
    (tmp_path / "manifest.jsonl").write_text('{"path": "chat.jsonl", "type": "lm"}\n')
    data = {"dataset_name": None, "dataset_manifest": tmp_path / "manifest.jsonl", "chat_template": "chatml"}
    assert anneal(tiny, tmp_path / "run", train_steps=2, warmup_steps=1, **data) == 0
    assert export(tmp_path / "run", tmp_path / "kept", "--which=final") == 0
    assert contents(tmp_path / "kept") == contents(tmp_path / "run" / "student")
    shutil.rmtree(tmp_path / "run" / "provenance" / "tokenizer")
    shutil.rmtree(tmp_path / "run" / "student")
    assert export(tmp_path / "run", tmp_path / "named", "--which=final") == 0, "the teacher has no template"
    assert contents(tmp_path / "named") == contents(tmp_path / "kept")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template


def test_words_that_would_do_nothing_are_refused_before_anything_is_opened(tmp_path, monkeypatch, capsys):
    (tmp_path / "there.gguf").write_bytes(b"mine")
    cases = {
        ("--quantize=q8_0",): "--gguf",
        ("--converter=somewhere",): "--gguf",
        ("--private",): "--push_to_hub",
        ("--gguf=model.bin",): "ends in .gguf",
        (f"--gguf={tmp_path / 'there.gguf'}",): "--force",
        ("--gguf=a.gguf", f"--converter={tmp_path}"): "checkout of llama.cpp",
        ("--gguf=a.gguf", "--quantize=q3"): "q8_0",
        ("--push_to_hub=a/b/c",): "owner/name",
    }
    for words, said in cases.items():
        assert export(tmp_path / "nowhere", tmp_path / "out", *words) == 2, words
        assert said in capsys.readouterr().err, words
    monkeypatch.setattr("liquid_llm.models.gguf_writing.find_spec", lambda name: None)
    assert export(tmp_path / "nowhere", tmp_path / "out", "--gguf=a.gguf") == 2
    assert "pip install 'liquid-llm[gguf]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_it_is_brought_to_the_hub_as_it_is_here(short, tmp_path, monkeypatch, capsys):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    target = tmp_path / "student"
    words = ("--which=final", "--license=mit", f"--hf_token_file={tmp_path / 'token'}", "--push_to_hub=small")
    with running_hub(monkeypatch) as hub:
        hub.writers.clear()
        assert export(short, target, *words) == 2
        assert "does not know this token" in capsys.readouterr().err
        assert not target.exists(), "nothing is written before the token is looked at"
        hub.writers.add(TOKEN)
        assert export(short, target, *words, "--license=my-own") == 2
        assert '"license" must be one of' in (said := capsys.readouterr().err)
        assert f"the student is in {target}" in said
        assert export(short, target, *words, "--private", "--force") == 0
        said = capsys.readouterr()
    assert said.out.split() == [str(target), f"{hub.base}/owner/small"]
    assert TOKEN not in said.out + said.err
    assert hub.files == {"owner/small": contents(target)}
    assert "license: mit" in (target / "README.md").read_text()
