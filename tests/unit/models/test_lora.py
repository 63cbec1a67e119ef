"""An adapter: what it begins as, that leaving it out is the base and merging it is the same model."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from tests.support.models import tiny_model

from liquid_llm.errors import CheckpointError
from liquid_llm.models.heads import hidden_states

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="comes with the extra lora")
IDS = torch.arange(24).view(2, 12)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2", "granite", "phi"])


def adapted(family, *, seed=3, filled=True):
    from liquid_llm.models.lora import LoraSpec, add_adapter

    model = tiny_model(family, 512)
    add_adapter(model, LoraSpec(4, 8.0), seed)
    if filled:
        generator = torch.Generator().manual_seed(1)
        for name, one in model.named_parameters():
            if ".lora_B." in name:
                one.data = torch.randn(one.shape, generator=generator) * 0.1
    return model


@FAMILIES
def test_a_new_adapter_changes_nothing_and_is_a_function_of_its_seed(family):
    state = torch.random.get_rng_state()
    one, same, other = (adapted(family, seed=seed, filled=False) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(hidden_states(one, IDS), hidden_states(tiny_model(family, 512), IDS))
    first, second, third = ([p for p in model.parameters() if p.requires_grad] for model in (one, same, other))
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@FAMILIES
def test_left_out_it_is_the_base_and_gradients_are_as_if_it_had_never_been(family):
    from liquid_llm.models.lora import without_adapter

    model, base = adapted(family), tiny_model(family, 512)
    expected, gradients = hidden_states(base, IDS), []
    for asks in (False, True):
        hidden = hidden_states(model, IDS)
        if asks:  # between a pass and its backward, as the loss does
            with torch.no_grad(), without_adapter(model):
                assert torch.equal(hidden_states(model, IDS), expected)
        assert not torch.equal(hidden, expected)
        hidden.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@FAMILIES
def test_merged_it_is_the_same_model_with_the_names_of_the_base(family):
    from liquid_llm.models.lora import has_adapter, merge_adapter, trained_weights

    model = adapted(family)
    expected = hidden_states(model, IDS)
    assert set(trained_weights(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    merge_adapter(model)
    assert not has_adapter(model)
    assert model.state_dict().keys() == tiny_model(family, 512).state_dict().keys() == trained_weights(model).keys()
    torch.testing.assert_close(hidden_states(model, IDS), expected, atol=1e-5, rtol=1e-4)
    before = copy.deepcopy(model.state_dict())
    merge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_another_shape_is_refused():
    from liquid_llm.models.lora import load_adapter, trained_weights

    model = adapted("llama")
    weights = trained_weights(model)
    load_adapter(model, weights, "x")
    first = next(iter(weights))
    for wrong in (
        {**weights, first: weights[first][:2]},
        {**weights, "more": weights[first]},
        dict([*weights.items()][1:]),
    ):
        with pytest.raises(CheckpointError, match="of another rank, or of other modules"):
            load_adapter(model, wrong, "x")
