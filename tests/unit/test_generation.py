"""Continuations in batches are those of each prompt alone, computed anew for every token."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import tiny_config, tiny_model

from liquid_llm import generation
from liquid_llm.generation import can_pad_left, generate, repeated_share

VOCAB_SIZE = 61
SHAPES = ("llama", "gpt2", "lfm2", "gemma2", "gemma3", "qwen3", "opt", "bloom", "phi", "mamba", "cohere", "mixtral")
LENGTHS = (5, 1, 12, 7, 5, 3, 12, 9)


def sharp(kind: str, **changes: object) -> object:
    """A model whose logits are far enough apart that rounding chooses no token, and that does not just repeat one.

    Its head is not its embedding, which would have it say the last token again.
    """
    model, generator = tiny_model(kind, VOCAB_SIZE, seed=4, **changes), torch.Generator().manual_seed(11)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=generator))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif "in_proj.bias" in name:
                parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts_of(lengths=LENGTHS, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def anew(model, prompt, end_ids, max_new_tokens) -> list[int]:
    """The plain way: one prompt, no cache, no padding, the whole text for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in end_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", SHAPES)
def test_batches_say_what_each_prompt_alone_is_answered(name):
    model = sharp(name)
    prompts, new_tokens = prompts_of(), 20  # beyond the sliding window of gemma3
    plain = [anew(model, one, (), new_tokens) for one in prompts]
    assert sum(len(set(one)) > 4 for one in plain) > 4, "or nothing is compared"
    ends = (plain[0][9], plain[2][4])
    expected = [anew(model, one, ends, new_tokens) for one in prompts]
    assert {len(one) for one in expected} != {new_tokens}, "some end before"
    for size in (3, 16):
        assert generate(model, prompts, end_ids=ends, max_new_tokens=new_tokens, batch_size=size) == expected


def test_a_convolution_that_padding_reaches_is_found_out_and_never_padded(monkeypatch):
    model = sharp("lfm2", conv_bias=True)  # a bias turns tokens of zeros into something
    assert can_pad_left(sharp("lfm2")), "zeros stay zeros"
    assert not can_pad_left(model)
    prompts = prompts_of()
    expected = [anew(model, one, (0,), 12) for one in prompts]
    assert generate(model, prompts, end_ids=[0], max_new_tokens=12) == expected
    monkeypatch.setattr(generation, "can_pad_left", lambda _: True)
    assert generate(model, prompts, end_ids=[0], max_new_tokens=12) != expected, "or the test sees nothing"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_end_with_the_models_positions(name):
    model = sharp(name)
    model.config.max_position_embeddings = 64
    prompts = prompts_of((60, 64, 3, 70, 63, 60))
    found = generate(model, prompts, end_ids=[VOCAB_SIZE - 1], max_new_tokens=8)
    assert [len(one) for one in found] == [4, 0, 8, 0, 1, 4] or VOCAB_SIZE - 1 in anew(model, prompts[2], (), 8)
    assert found == [
        anew(model, one, [VOCAB_SIZE - 1], min(8, 64 - len(one))) if len(one) < 64 else [] for one in prompts
    ]


def test_modes_settings_and_random_states_are_as_before():
    model = sharp("lfm2").train()
    model.model.layers[0].eval()  # a part that was frozen stays so
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, min_length=30)
    settings = copy.deepcopy(model.generation_config.to_dict())
    modes = [one.training for one in model.modules()]
    python, torch_state = random.getstate(), torch.get_rng_state()
    found = generate(model, prompts_of(), end_ids=[0], max_new_tokens=8)
    assert [one.training for one in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(one.grad is None for one in model.parameters())
    assert found == [anew(model.eval(), one, (0,), 8) for one in prompts_of()], "neither penalties nor sampling"


def test_dropout_is_off_while_a_model_trains():
    model = sharp("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    expected = [anew(copy.deepcopy(model).eval(), one, (0,), 8) for one in prompts_of()]
    assert generate(model, prompts_of(), end_ids=[0], max_new_tokens=8) == expected


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_products_in_bfloat16_are_those_of_autocast(name):
    model = sharp(name)
    (prompt,) = prompts_of((6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = anew(model, prompt, (0,), 6)
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    assert generate(model, [prompt], end_ids=[0], max_new_tokens=6, dtype=torch.bfloat16) == [expected]
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    whole = copy.deepcopy(model).to(torch.bfloat16)
    assert len(generate(whole, prompts_of(), end_ids=[0], max_new_tokens=6, dtype=torch.bfloat16)) == len(LENGTHS)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model, prompts = sharp("llama"), prompts_of()
    expected = generate(model, prompts, end_ids=[0], max_new_tokens=6)
    sizes, call = [], generation._call

    def small(model, ids, *rest, **told):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(model, ids, *rest, **told)

    monkeypatch.setattr(generation, "_call", small)
    assert generate(model, prompts, end_ids=[0], max_new_tokens=6) == expected
    assert max(sizes) == 8
    monkeypatch.setattr(generation, "_call", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompts[:1], end_ids=[0], max_new_tokens=6)


def test_nothing_is_asked_of_nothing():
    model = sharp("llama")
    assert generate(model, [], end_ids=[0], max_new_tokens=4) == []
    assert generate(model, [[1, 2]], end_ids=[0], max_new_tokens=0) == [[]]
    for prompts, ends in (([[]], [0]), ([[1]], [])):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, prompts, end_ids=ends, max_new_tokens=4)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_the_repeated_share_counts_what_stood_there_before(ids, n):
    grams = [ids[start : start + n] for start in range(max(0, len(ids) - n + 1))]
    before = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert repeated_share(ids, n) == pytest.approx(before / len(grams) if grams else 0.0)


def test_repeated_four_grams_of_known_texts():
    assert repeated_share([7] * 11) == 1 - 1 / 8
    assert repeated_share(range(50)) == 0.0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 1, 1]) == 0.0


def test_a_shape_of_every_preset_is_among_those_tested():
    from liquid_llm.models.student import PRESETS

    kinds = {tiny_config(name).model_type for name in SHAPES}
    assert {preset.model_type for preset in PRESETS.values()} <= kinds
