"""A cut computes what its teacher computes, as far as the teacher is left whole; what does nothing goes first."""

import pytest
import torch
from tests.support.cuts import PADDED, SHAPES, VOCAB, cut_teacher, some_text
from transformers import AutoModelForCausalLM

from liquid_llm.errors import ModelError
from liquid_llm.models.cut import axes_of
from liquid_llm.models.cut_weights import cut_weights
from liquid_llm.models.spec import Cut

IDS = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
TIED = pytest.mark.parametrize("tied", [True, False])


def cut(teacher, **asked):
    return cut_weights(teacher, Cut(**asked), VOCAB, "the test", some_text())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[..., :VOCAB]


@TIED
@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_that_keeps_everything_is_the_teacher_bit_for_bit(name, tied):
    teacher = cut_teacher(name, tied=tied)
    student, layers, _ = cut(teacher)
    assert layers == (0, 1, 2, 3)
    assert torch.equal(logits(student), logits(teacher))
    assert student.get_output_embeddings().weight.shape[0] == VOCAB
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    assert teacher.get_output_embeddings().weight.shape[0] == PADDED


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_stay_keep_their_kind_and_their_order(name):
    """The plain formula: the teacher with its other blocks taken out."""
    teacher = cut_teacher(name)
    student, layers, _ = cut(teacher, layers=(1, 2, 3))
    assert layers == (1, 2, 3)
    whole = logits(teacher)
    ours = logits(student)
    # what a block adds is taken back by a hook: the teacher itself then has no such block
    teacher.model.layers[0].register_forward_hook(lambda _module, given, _output: given[0])
    assert not torch.equal(whole, logits(teacher))
    assert torch.equal(ours, logits(teacher))


@TIED
@pytest.mark.parametrize("name", SHAPES)
def test_a_width_cut_is_the_plain_formula_where_what_goes_is_zero(name, tied):
    teacher = cut_teacher(name, tied=tied, **{"norm_eps" if name == "lfm2" else "rms_norm_eps": 1e-12})
    generator = torch.Generator().manual_seed(3)
    dead = {  # of each axis; a third of the hidden channels, half of the neurons, one group of heads, of each block
        "hidden": torch.randperm(32, generator=generator)[:12],
        "mlp": None,
        "conv": torch.randperm(32, generator=generator)[:12],
    }
    with torch.no_grad():
        for part, weight in teacher.model.named_parameters():
            for dimension, axis in enumerate(axes_of(part)):
                if axis == "hidden" and ("norm" not in part or tied):
                    weight.index_fill_(dimension, dead["hidden"], _zero(name, part))
                if axis == "mlp":
                    weight.index_fill_(dimension, torch.arange(weight.shape[dimension] // 2), 0.0)
                if axis in ("query", "kv"):
                    weight.narrow(dimension, 0, weight.shape[dimension] // 2).zero_()
                if axis == "conv":
                    weight.index_fill_(dimension, dead["conv"], 0.0)
                if axis == "conv3":
                    for third in range(3):
                        weight.index_fill_(dimension, dead["conv"] + 32 * third, 0.0)
    inner = teacher.model.layers[0].state_dict()
    neurons = next(value.shape[0] for key, value in inner.items() if key.endswith(("up_proj.weight", "w3.weight")))
    student, _, _ = cut(teacher, width=20, mlp=neurons // 2, kv_heads=1)
    assert student.config.hidden_size == 20
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def _zero(name, part):
    """What makes a channel nothing: Gemma's norms multiply by 1 + weight."""
    return -1.0 if "norm" in part and name.startswith("gemma") else 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_is_saved_and_opened_as_what_it_is(name, tmp_path):
    student, layers, _ = cut(cut_teacher(name), layers=3, width=16)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))
    assert again.config.num_hidden_layers == len(layers) == 3


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("idle", [1, 2])
def test_a_block_that_does_nothing_is_the_first_to_go(name, idle):
    teacher = cut_teacher(name)
    with torch.no_grad():
        for part, weight in teacher.model.layers[idle].named_parameters():
            if part.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "w2.weight", "_proj.bias")):
                weight.zero_()
    student, layers, _ = cut(teacher, layers=3)
    assert layers == tuple(one for one in range(4) if one != idle)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_the_same_text_gives_the_same_student_and_the_generators_stay():
    teacher = cut_teacher("llama")
    state = torch.get_rng_state()
    one, other = (cut(teacher, layers=2, width=16)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_student_is_of_float32_and_its_own_memory():
    teacher = cut_teacher("llama").to(torch.bfloat16)
    student, _, _ = cut(teacher)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    before = logits(student)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.zero_()
    assert torch.equal(logits(student), before)


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ModelError, match="vocabulary is smaller"):
        cut_weights(cut_teacher("llama"), Cut(), PADDED + 1, "the test", some_text())
