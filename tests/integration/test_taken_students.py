"""Students made of a teacher's weights, by the real command lines: trained, stopped, gone on with, exported."""

import json
import logging

import pytest
import torch
import yaml
from tests.support.annealing import anneal, contents, metadata, rows
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM

from liquid_llm.cli.main import main
from liquid_llm.models import loading
from liquid_llm.training import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cut(tiny):
    return f"from:{tiny.teacher},layers=1,width=16"


@pytest.fixture(scope="module")
def run(tiny, cut, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("cut")
    assert anneal(tiny, folder, student=cut, train_steps=4, save_every=2, eval_every=2) == 0
    return folder


def weights(run, name="final"):
    return torch.load(run / f"{name}.pt", weights_only=True)["student"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_run_says_what_was_cut(tiny, cut, run, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert anneal(tiny, tmp_path, student=cut, train_steps=1) == 0
    said = [line for line in caplog.messages if line.startswith("student: ")]
    assert len(said) == 1
    assert "1 of 2 layers of teacher (" in said[0]
    assert "width 16 of 32" in said[0]
    assert "loss untrained" in said[0]
    known = metadata(run)["student"]["taken"]
    assert known["model"] == "teacher"
    assert known["sizes"]["width"] == [16, 32]
    assert json.loads((run / "provenance" / "environment.json").read_text())["student"]["taken"] == known
    assert metadata(run)["student"]["config"]["num_hidden_layers"] == 1


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been_and_asks_the_teacher_for_nothing(
    tiny, cut, run, tmp_path, monkeypatch
):
    train = Trainer.train

    def stop_early(trainer):
        trainer.total_steps = 2
        train(trainer)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop_early)
        assert anneal(tiny, tmp_path, student=cut, train_steps=4, save_every=2, eval_every=2) == 75
    opened = []
    with monkeypatch.context() as patch:
        found = loading.open_weights
        patch.setattr(
            "liquid_llm.models.taking.open_weights",
            lambda *given, **more: opened.append(given) or found(*given, **more),
        )
        assert anneal(tiny, tmp_path, student=cut, train_steps=4, save_every=2, eval_every=2) == 0
    assert not opened
    assert same(weights(tmp_path), weights(run))
    assert metadata(tmp_path)["student"] == metadata(run)["student"]


def test_options_repeat_the_run_bit_for_bit_from_another_folder(tiny, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.root)
    first, again = tmp_path / "first", tmp_path / "again"
    assert anneal(tiny, first, student="from:teacher,layers=1,choose=evenly", train_steps=2) == 0
    options = first / "provenance" / "options.yaml"
    assert yaml.safe_load(options.read_text())["student"] == f"from:{tiny.teacher},layers=1,choose=evenly"
    monkeypatch.chdir(tmp_path)
    assert main(["anneal", f"--config={options}", f"--output_gcs_uri={again}"]) == 0
    assert same(weights(first), weights(again))


def test_it_is_exported_with_a_card_that_names_its_base(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out"), "--which=final"]) == 0
    assert contents(run / "student").keys() == contents(tmp_path / "out").keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card  # the hub has no such model
    assert "1 of 2 layers of teacher" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 16)
    assert same(dict(model.state_dict()), {**weights(run)})


def test_a_later_run_takes_it_up_by_its_checkpoint(tiny, cut, run, tmp_path):
    words = {"resume_gcs_uri": run / "last.pt", "train_steps": 5}
    assert anneal(tiny, tmp_path / "a", **words) == 0
    assert anneal(tiny, tmp_path / "b", student=cut, **words) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert metadata(tmp_path / "a")["student"]["taken"] == metadata(run)["student"]["taken"]
    assert anneal(tiny, tmp_path / "c", student=cut.replace("width=16", "width=8"), **words) == 4


def test_a_dry_run_and_the_memory_command_know_it(tiny, cut, tmp_path, capsys):
    assert anneal(tiny, tmp_path / "run", student=cut, dry_run=True) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = found["estimate"]["parameters"]
    assert not (tmp_path / "run").exists()
    memory = ["memory", "anneal", f"--student={cut}", f"--teacher_name={tiny.teacher}", "--gpu_memory=1GiB"]
    (tiny.teacher / "model.safetensors").rename(tiny.teacher / "hidden")
    try:
        assert main(memory) == 0
    finally:
        (tiny.teacher / "hidden").rename(tiny.teacher / "model.safetensors")
    assert json.loads(capsys.readouterr().out)["prediction"]["rest_bytes"] >= 16 * parameters


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("from:{teacher},layer=1", "Did you mean layers="),
        ("from:{teacher},layers=3", "at most 2"),
        ("from:{teacher},layers=0+5", "0 to 1"),
        ("from:{teacher},width=64", "at most 32"),
        ("from:{root}/gpt2,layers=1", "got gpt2"),
        ("liquid-test,embeding={teacher}", "Did you mean embedding="),
    ],
)
def test_what_cannot_be_made_is_refused_before_data_is_read(tiny, tmp_path, capsys, spec, said):
    folder = tiny.root / "gpt2"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text((tiny.root / "gpt2.json").read_text())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text((tiny.teacher / name).read_text())
    spec = spec.format(teacher=tiny.teacher, root=tiny.root)
    assert anneal(tiny, tmp_path / "run", student=spec, dataset_name=tmp_path / "nowhere") == 2
    assert said in capsys.readouterr().err


def test_a_preset_takes_the_embedding(tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        spec = f"liquid-test,embedding={tiny.teacher}"
        assert anneal(tiny, tmp_path, student=spec, train_steps=2, save_every=1) == 0
    assert any("32 channels projected to 32 (100% kept)" in line for line in caplog.messages)
    assert len(rows(tmp_path)) == 2
    assert metadata(tmp_path)["student"]["taken"]["embedding"] == [32, 32]


def test_the_hybrid_face_cuts_too_and_its_text_decides(tiny, tmp_path, caplog):
    words = {
        "hybrid": "false",
        "teacher_mode": "online",
        "max_steps": 2,
        "math_logits_dir": None,
        "code_logits_dir": None,
    }
    spec = f"from:{tiny.teacher},layers=1,mlp=40"
    with caplog.at_level(logging.INFO):
        for run_id in ("a", "b"):
            assert main(["train", *tiny.train_words(tmp_path, student=spec, run_id=run_id, **words)]) == 0
    assert sum(line.startswith("student: 1 of 2 layers") for line in caplog.messages) == 2
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert metadata(tmp_path / "a")["student"]["taken"]["sizes"]["mlp"] == [40, 64]
    assert main(["train", *tiny.train_words(tmp_path, student=spec, run_id=None, **words)]) == 0
    assert [path.name.rpartition("-")[0] for path in tmp_path.glob("teacher-*")] == ["teacher-cut"]


def test_a_teacher_of_another_tokenizer_is_refused(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("llama", 700).save_pretrained(other)
    tiny_tokenizer(700).save_pretrained(other)
    assert anneal(tiny, tmp_path / "run", student=f"from:{other},layers=1") == 2
    said = capsys.readouterr().err
    assert "tokenizer" in said
    assert str(other) in said
    assert str(tiny.teacher) in said


def test_a_run_without_a_teacher_takes_the_tokenizer_of_what_it_cuts(tiny, tmp_path):
    assert anneal(tiny, tmp_path, student=f"from:{tiny.teacher},layers=1", teacher_name=None, train_steps=1) == 0
    assert metadata(tmp_path)["student"]["taken"]["layers"] in ([0], [1])
