"""Students with a teacher's weights: what is said of them, and that nothing is held or read longer than needed."""

import gc
import weakref

import pytest
import torch
from tests.support.cuts import VOCAB, cut_teacher, some_text
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.errors import ModelError
from liquid_llm.models import taking
from liquid_llm.models.heads import hidden_states
from liquid_llm.models.student import student_config
from liquid_llm.models.taking import take_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "big"
    cut_teacher("lfm2").save_pretrained(folder)
    return folder


def take(spec, **changes):
    given = {"vocab_size": VOCAB, "bos_id": 1, "eos_id": 2, "block_size": 32, "seed": 3, "device": torch.device("cpu")}
    return take_student(spec, **{**given, "text": some_text(), **changes})


def test_what_was_cut_is_said_in_plain_values(folder):
    taken = take(f"from:{folder},layers=3,width=16")
    facts = taken.facts
    assert (facts["model"], facts["on_hub"]) == ("big", False)
    assert facts["revision"].startswith("sha256-")
    assert len(facts["layers"]) == 3
    assert facts["sizes"] == {
        "layers": [3, 4],
        "width": [16, 32],
        "mlp": [128, 256],  # LFM2 makes 256 of the 64 in its configuration
        "heads": [2, 4],
        "kv_heads": [1, 2],
        "head_dim": [8, 8],
        "vocabulary": [90, 100],
    }
    assert taken.teacher_loss > 0


def test_a_cut_is_a_student_like_any_other(folder):
    student = take(f"from:{folder},layers=2").model
    assert student.training
    assert (student.config.bos_token_id, student.generation_config.eos_token_id) == (1, 2)
    assert student.config.name_or_path == ""
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in student.parameters())
    hidden_states(student, torch.arange(32)[None]).sum().backward()


@pytest.mark.parametrize("asked", ["layers=2", "layers=3,width=16", "layers=1+3", "layers=2,choose=evenly", "mlp=40"])
def test_its_shape_is_known_from_the_configuration_alone(folder, asked, tmp_path):
    bare = tmp_path / "big"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    made = take(f"from:{folder},{asked}").model.config
    known = student_config(f"from:{bare},{asked}", vocab_size=VOCAB, bos_id=1, eos_id=2)
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim"):
        assert getattr(known, name, None) == getattr(made, name, None)
    assert len(known.layer_types) == made.num_hidden_layers


def test_the_teacher_is_let_go_as_soon_as_the_student_is_made(folder, monkeypatch):
    held = []
    found = taking.open_weights

    def look(*given, **more):
        model = found(*given, **more)
        held.append(weakref.ref(model))
        return model

    def finish(model, *given):
        gc.collect()
        assert held[0]() is None
        return finish_student(model, *given)

    finish_student = taking.finish_student
    monkeypatch.setattr(taking, "open_weights", look)
    monkeypatch.setattr(taking, "finish_student", finish)
    take(f"from:{folder},layers=2,width=16")


def test_a_gguf_file_is_cut(tmp_path):
    model = cut_teacher("llama", mlp_bias=False, attention_bias=False)
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(100))
    student = take(f"from:{path}").model.eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(student(ids).logits, model(ids).logits[..., :VOCAB], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("from:{folder},layers=0+2", "no block with attention"),
        ("from:{folder},layers=5", "at most 4"),
        ("from:{folder},kv_heads=3", "at most 2"),
        ("from:{folder},mlp=999", "at most 256"),
        ("liquid-16m,embedding={folder}", "smaller than the student's"),
        ("from:{folder}-not-there,layers=1", "no such model"),
    ],
)
def test_what_the_teacher_has_not_got_is_refused(folder, spec, said):
    with pytest.raises(ModelError) as error:
        take(spec.format(folder=folder))
    assert said in str(error.value)
    assert error.value.exit_code == 2
