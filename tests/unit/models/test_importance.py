"""What a block weighs is what its absence does, and what is looked at is what the model computes."""

import pytest
import torch
from tests.support.cuts import SHAPES, VOCAB, cut_teacher, some_text

from liquid_llm.models.heads import hidden_states
from liquid_llm.models.importance import mean_loss, measure, weigh_blocks

TEXT = some_text(rows=3, time=24)


def final_norm(model):
    return model.model.embedding_norm if hasattr(model.model, "embedding_norm") else model.model.norm


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_weighs_how_far_the_last_hidden_states_turn_without_it(name):
    """The plain formula: the whole model run again with one block that gives back what it got."""
    model = cut_teacher(name)
    weights = weigh_blocks(model, model.model, final_norm(model), TEXT)
    assert weights.shape == (4,)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            total = 0.0
            for ids, _ in TEXT:
                whole = hidden_states(model, ids[None])[0].double()
                handle = layer.register_forward_hook(lambda _module, given, _output: given[0])
                left = hidden_states(model, ids[None])[0].double()
                handle.remove()
                total += float((1 - torch.nn.functional.cosine_similarity(whole, left, dim=-1)).sum())
            assert float(weights[number]) == pytest.approx(total / sum(len(ids) for ids, _ in TEXT), rel=1e-4, abs=1e-6)


def test_few_tokens_are_weighed_however_long_the_text_is():
    model, seen = cut_teacher("llama", max_position_embeddings=2048), []
    model.model.layers[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[1]))
    weigh_blocks(model, model.model, model.model.norm, some_text(rows=4, time=1000))
    assert seen == [256, 256]


def test_sizes_are_sums_over_all_tokens():
    model = cut_teacher("llama")
    found = measure(model, model.model, ["layers.1.mlp.down_proj"], ["layers.2.input_layernorm"], TEXT)
    inner, states = [], []
    layers = model.model.layers
    handles = [
        layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, given: inner.append(given[0][0])),
        layers[2].input_layernorm.register_forward_pre_hook(lambda _module, given: states.append(given[0][0])),
    ]
    with torch.no_grad():
        for ids, _ in TEXT:
            model(ids[None])
    for handle in handles:
        handle.remove()
    neurons, hidden = torch.cat(inner).double(), torch.cat(states).double()
    torch.testing.assert_close(found.inputs["layers.1.mlp.down_proj"], neurons.square().sum(0), rtol=1e-5, atol=1e-5)
    alike = hidden.square() / hidden.square().mean(dim=1, keepdim=True)
    torch.testing.assert_close(found.norms["layers.2.input_layernorm"], alike.sum(0), rtol=1e-5, atol=1e-5)
    assert found.num_tokens == 72
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks


def test_only_what_is_learnt_counts_for_the_loss():
    model = cut_teacher("llama")
    ids, labels = TEXT[0]
    partly = torch.where(torch.arange(24) < 10, -100, labels)
    logits = model(ids[None]).logits[0].detach()
    learnt = partly != -100
    expected = torch.nn.functional.cross_entropy(logits[learnt], partly[learnt])
    assert mean_loss(model, [(ids, partly)]) == pytest.approx(float(expected), rel=1e-5)
    assert mean_loss(model, [(ids, torch.full_like(ids, -100))]) == 0.0
    assert logits.shape[-1] > VOCAB
