import math
import threading

import pytest
import torch
from tests.support.models import CAUSAL, tiny_model
from torch import nn

from liquid_llm.errors import ModelError
from liquid_llm.models.documents import tell_rows
from liquid_llm.models.heads import check_causality, check_output_head, hidden_states, output_head


def ids_for(model, batch=2, time=9):
    return torch.randint(0, model.config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_head_of_hidden_states_gives_the_models_logits(name, dtype):
    model = tiny_model(name).to(dtype)
    ids = ids_for(model)
    with torch.no_grad():
        hidden, head = hidden_states(model, ids), output_head(model)
        expected = model(ids).logits
    assert hidden.shape[:2] == ids.shape
    assert hidden.dtype == head.weight.dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(head.logits(hidden), expected, check_dtype=False, **tolerance)
    check_output_head(model)


@pytest.mark.parametrize(
    ("name", "scale", "soft_cap", "bias"),
    [
        ("llama", 1.0, None, False),
        ("gemma2", 1.0, 5.0, False),
        ("cohere", 0.25, None, False),
        ("granite", 0.25, None, False),
        ("hyperclovax", 3.0, None, False),
        ("gptj", 1.0, None, True),
        ("phi", 1.0, None, True),
    ],
)
def test_scale_cap_and_bias_are_read_from_the_architecture(name, scale, soft_cap, bias):
    head = output_head(tiny_model(name))
    assert (head.scale, head.soft_cap, head.bias is not None) == (scale, soft_cap, bias)
    assert head.vocab_size == 512


def test_gradients_reach_a_tied_embedding_through_body_and_head():
    model = tiny_model("lfm2").train()
    ids = ids_for(model)
    output_head(model).logits(hidden_states(model, ids)).square().mean().backward()
    ours = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    torch.testing.assert_close(ours, model.get_input_embeddings().weight.grad)
    assert output_head(model).weight is model.get_input_embeddings().weight


class Disguised(nn.Module):
    """An output layer that does something its weight does not tell."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change
        self.weight = inner.weight

    def forward(self, hidden):
        return self.change(self.inner(hidden))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda logits: logits * 1.01, "differ"),
        (lambda logits: 100 * torch.tanh(logits / 100), "differ"),  # invisible in a fresh model's tiny logits
        (lambda logits: logits + 0.1, "differ"),
        (lambda logits: logits[..., :500], r"\[2, 8, 500\]"),
        (lambda logits: logits * float("nan"), "differ"),
    ],
    ids=["scale", "soft cap", "shift", "cut", "nan"],
)
@pytest.mark.parametrize("name", ["gpt2", "lfm2"])
def test_an_unknown_transformation_of_the_logits_is_refused(name, change, complaint):
    model = tiny_model(name)
    model.set_output_embeddings(Disguised(model.get_output_embeddings(), change))
    with pytest.raises(ModelError, match=complaint) as caught:
        check_output_head(model)
    assert type(model).__name__ in str(caught.value)


def test_a_hidden_state_transformation_before_the_head_is_refused():
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, arguments: (arguments[0].roll(1, -1),))
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        check_output_head(model)


def test_a_head_that_is_not_called_is_refused():
    model = tiny_model("llama")
    detached = nn.Linear(32, 512, bias=False)
    detached.weight = model.lm_head.weight
    model.get_output_embeddings = lambda: detached
    with pytest.raises(ModelError, match="0 times"):
        check_output_head(model)


def test_a_model_without_a_linear_head_is_refused():
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="no linear output head"):
        output_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_right_padding_cannot_reach_earlier_positions(name, dtype):
    check_causality(tiny_model(name).to(dtype))


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ModelError, match=r"BertLMHeadModel.*later tokens"):
        check_causality(tiny_model("bert"))


@pytest.mark.parametrize("check", [check_output_head, check_causality])
def test_checks_leave_modes_generators_and_gradients_alone(check):
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check(model)  # dropout is on in train mode: only evaluation mode can pass
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_passes_in_several_threads_leave_transformers_as_it_was():
    """One sequence a row is said for our own passes alone, however they overlap."""
    from transformers import masking_utils

    inside, leave = threading.Barrier(3, timeout=30), threading.Barrier(3, timeout=30)
    packed = torch.tensor([[0, 1, 0, 1]])
    seen = []

    def work():
        with tell_rows(joined=False):
            inside.wait()
            seen.append(masking_utils.find_packed_sequence_indices(packed))
            leave.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    elsewhere = masking_utils.find_packed_sequence_indices(packed)
    leave.wait()
    for thread in threads:
        thread.join()
    assert seen == [None, None]
    assert elsewhere.tolist() == [[0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_not_called_an_unknown_architecture(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(
        ModelError, match=r"the model's weights are not finite; got NaN or infinity in model\.norm\.weight"
    ):
        check_output_head(model)
