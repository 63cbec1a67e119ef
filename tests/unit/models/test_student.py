import json

import pytest
import torch
from accelerate import init_empty_weights
from tests.support.models import tiny_config, tiny_model
from tests.support.tokenizers import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from liquid_llm.errors import ModelError
from liquid_llm.models.export import save_student
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.positions import max_positions, positional_embedding
from liquid_llm.models.student import PRESETS, build_student, enable_gradient_checkpointing

MILLIONS = {
    "liquid-16m": 16,
    "liquid-40m": 40,
    "liquid-130m": 130,
    "liquid-350m": 350,
    "llama-16m": 16,
    "llama-40m": 40,
    "llama-135m": 135,
    "gpt2-tiny": 16,
    "gpt2-small": 124,
    "gpt2-medium": 354,
}
TEST_PRESETS = [name for name in PRESETS if name.endswith("-test")]


def build(spec, **changes):
    return build_student(spec, **{"vocab_size": 512, "bos_id": 0, "eos_id": 0, "block_size": 64, "seed": 7, **changes})


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_size_their_name_says(name):
    preset = PRESETS[name]
    config = AutoConfig.for_model(preset.model_type, vocab_size=49152, tie_word_embeddings=True, **preset.settings)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if name in MILLIONS:
        assert model.num_parameters() == pytest.approx(MILLIONS[name] * 1e6, rel=0.06)
    else:
        assert config.num_hidden_layers == 2


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("liquid") and name not in TEST_PRESETS])
def test_liquid_presets_mix_convolution_and_attention(name):
    kinds = PRESETS[name].settings["layer_types"]
    assert kinds[0] == "conv"
    assert 0.3 <= kinds.count("full_attention") / len(kinds) <= 0.5


def test_every_preset_has_a_size_or_is_for_tests():
    assert set(PRESETS) == set(MILLIONS) | set(TEST_PRESETS)


@pytest.mark.parametrize("name", TEST_PRESETS)
def test_a_preset_is_built_from_the_seed_alone(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = build(name), build(name, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", TEST_PRESETS)
def test_a_student_is_tied_float32_trainable_and_without_dropout(name):
    student = build(name, vocab_size=500)
    assert student.training
    assert output_head(student).weight is student.get_input_embeddings().weight
    assert output_head(student).vocab_size == 500
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    ids = torch.randint(0, 500, (2, 16))
    assert torch.equal(hidden_states(student, ids), hidden_states(student, ids))
    assert student.config.eos_token_id == student.generation_config.eos_token_id == 0


@pytest.mark.parametrize("spec", [*TEST_PRESETS, "folder"])
def test_every_token_id_can_learn_even_those_called_padding(spec, tmp_path):
    if spec == "folder":
        spec = str(tmp_path)
        tiny_model("llama", pad_token_id=0).save_pretrained(tmp_path)
    student = build(spec)
    embedding = student.get_input_embeddings()
    if spec in TEST_PRESETS:  # a padding row would have been made zero
        assert embedding.weight[0].abs().sum() > 0
    before = student.lm_head.weight
    student.lm_head.weight = nn.Parameter(before.detach().clone())  # untied: only the input side remains
    hidden_states(student, torch.tensor([[0, 5, 0]])).square().sum().backward()
    assert embedding.weight.grad[0].abs().sum() > 0


def test_configured_dropout_is_off(tmp_path):
    config = tiny_config("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    config.to_json_file(tmp_path / "config.json")
    student = build(str(tmp_path / "config.json"))
    ids = torch.randint(0, 512, (1, 20))
    assert torch.equal(student(ids).logits, student(ids).logits)
    tiny_model("opt", dropout=0.5, attention_dropout=0.5, layerdrop=0.5).save_pretrained(tmp_path / "opt")
    student = build(str(tmp_path / "opt"))
    assert torch.equal(student(ids).logits, student(ids).logits)


def test_a_configuration_file_gives_random_weights_with_the_wanted_vocabulary(tmp_path):
    tiny_config("llama", vocab_size=77).to_json_file(tmp_path / "config.json")
    student = build(str(tmp_path / "config.json"), vocab_size=300)
    assert student.get_input_embeddings().weight.shape == (300, 32)
    again = build(str(tmp_path / "config.json"), vocab_size=300)
    assert torch.equal(student.get_input_embeddings().weight, again.get_input_embeddings().weight)


def test_a_folder_gives_its_weights_in_float32(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    student = build(str(tmp_path), vocab_size=500)  # the model's embedding may be padded
    assert student.training
    for ours, theirs in zip(student.parameters(), model.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize(("spec", "kind"), [("gpt2-test", "learned"), ("liquid-test", "rotary")])
def test_block_size_is_supported(spec, kind):
    student = build(spec, block_size=5000)
    assert positional_embedding(student) == kind
    assert max_positions(student) == 5000
    assert max_positions(build(spec, block_size=16)) >= 1024  # longer evaluation contexts stay possible


@pytest.mark.parametrize("form", ["folder", "config.json"])
def test_where_a_student_was_read_is_not_kept(tmp_path, form):
    """Two equal runs write equal metadata, and an exported student names no folder of the machine it was made on."""
    tiny_model("gpt2", vocab_size=512).save_pretrained(tmp_path / "model")
    spec = tmp_path / "model" if form == "folder" else tmp_path / "model" / "config.json"
    student = build(str(spec))
    assert str(tmp_path) not in json.dumps(student.config.to_dict())
    save_student(student, tiny_tokenizer(), tmp_path / "student")
    texts = [path.read_text() for path in (tmp_path / "student").glob("*.json")]
    assert texts
    assert not [text for text in texts if str(tmp_path) in text]


@pytest.mark.parametrize("name", TEST_PRESETS)
def test_gradient_checkpointing_changes_no_gradient(name):
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        student = build(name)
        if checkpointing:
            enable_gradient_checkpointing(student)
            assert any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
        hidden_states(student, ids).square().sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_where_it_is_not_supported_is_refused():
    model = tiny_model("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        enable_gradient_checkpointing(model)


# refusals


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(ModelError, match=r"liquid-16m, liquid-40m") as caught:
        build("liquid-17m@nowhere!")
    assert "-test" not in str(caught.value)


@pytest.mark.parametrize("layers", [-1, 10**9])
def test_a_number_of_layers_that_no_model_has_is_refused_before_they_are_built(tmp_path, layers):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": layers}))
    for spec in (str(tmp_path / "m"), str(config)):
        with pytest.raises(ModelError, match="no model has so many layers"):
            build_student(spec, vocab_size=512, bos_id=0, eos_id=0, block_size=8, seed=0)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"got 512; expected at least 513"):
        build(str(tmp_path), vocab_size=513)


def test_a_model_that_looks_ahead_cannot_be_a_student(tmp_path):
    tiny_config("bert").to_json_file(tmp_path / "config.json")
    with pytest.raises(ModelError, match="later tokens"):
        build(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "content",
    [
        "{broken",
        "[]",
        json.dumps({"model_type": "no-such-type"}),
        json.dumps({"model_type": "vit"}),
        json.dumps({"model_type": "llama", "hidden_size": "wide"}),
        json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0}),
        json.dumps(
            {"model_type": "x", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        ),
    ],
    ids=["json", "list", "unknown", "not causal", "field", "zero heads", "own code"],
)
def test_a_bad_configuration_is_one_clear_error(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        build(str(path))
    assert "\n" not in str(caught.value)
