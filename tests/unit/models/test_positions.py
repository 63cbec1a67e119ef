import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import CAUSAL, tiny_model
from transformers import AutoModelForCausalLM

from liquid_llm.errors import ModelError, UsageError
from liquid_llm.models.heads import check_causality, check_output_head, hidden_states
from liquid_llm.models.positions import (
    fit_positions,
    max_positions,
    positional_embedding,
    require_positions,
    resize_learned_positions,
)

KINDS = {
    "gpt2": "learned",
    "opt": "learned",
    "gpt_neo": "learned",
    "bloom": "alibi",
    "mamba": "none",
}
LEARNED = [name for name, kind in KINDS.items() if kind == "learned"]
ROTARY = [name for name in CAUSAL if name not in KINDS and name != "gptj"]


def ids_for(model, time):
    return torch.randint(0, model.config.vocab_size, (1, time), generator=torch.Generator().manual_seed(5))


def table_of(model):
    return {"gpt2": "transformer.wpe", "opt": "model.decoder.embed_positions", "gpt_neo": "transformer.wpe"}[
        model.config.model_type
    ]


# resize_learned_positions


@given(old=st.integers(2, 70), new=st.integers(1, 140), dim=st.integers(1, 4), slope=st.floats(-2, 2))
@settings(deadline=None, max_examples=60)
def test_linear_tables_stay_linear_and_keep_their_ends(old, new, dim, slope):
    start = torch.arange(dim, dtype=torch.float64)
    table = start + slope * torch.arange(old, dtype=torch.float64).unsqueeze(1)
    resized = resize_learned_positions(table, new)
    places = torch.arange(new, dtype=torch.float64) * (old - 1) / max(new - 1, 1)
    torch.testing.assert_close(resized, start + slope * places.unsqueeze(1))
    assert torch.equal(resized[0], table[0])
    if new > 1:
        assert torch.equal(resized[-1], table[-1])


@given(old=st.integers(2, 60), grow=st.integers(0, 90), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_growing_then_shrinking_returns_within_a_quarter_of_the_bend(old, grow, seed):
    # Interpolation errs only in the cell around a former row, by at most bend * h / 4 for cells of width h <= 1.
    table = torch.randn(old, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    back = resize_learned_positions(resize_learned_positions(table, old + grow), old)
    bend = (table[2:] - 2 * table[1:-1] + table[:-2]).abs().max() if old > 2 else torch.tensor(0.0)
    assert float((back - table).abs().max()) <= float(bend) / 4 + 1e-9


def test_doubling_the_spacing_and_back_is_exact():
    table = torch.randn(9, 4)
    torch.testing.assert_close(resize_learned_positions(resize_learned_positions(table, 17), 9), table)


def test_same_length_is_an_equal_copy():
    table = torch.randn(7, 3)
    resized = resize_learned_positions(table, 7)
    assert torch.equal(resized, table)
    assert resized.data_ptr() != table.data_ptr()


def test_resize_is_pure_and_differentiable():
    table = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    before = table.detach().clone()
    assert torch.autograd.gradcheck(lambda t: resize_learned_positions(t, 8), table)
    assert torch.equal(table.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resize_keeps_the_dtype_and_interpolates_in_float32_at_least(dtype):
    table = (torch.arange(1024.0).unsqueeze(1) / 1024).to(dtype)
    resized = resize_learned_positions(table, 4096)
    assert resized.dtype == dtype
    exact = resize_learned_positions(table.double(), 4096)
    torch.testing.assert_close(resized.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_one_row_spreads_and_none_is_refused():
    assert torch.equal(resize_learned_positions(torch.ones(1, 2), 3), torch.ones(3, 2))
    for table, length in ((torch.ones(2, 2), 0), (torch.ones(0, 2), 4)):
        with pytest.raises(UsageError, match="at least one row"):
            resize_learned_positions(table, length)


# kinds and limits


@pytest.mark.parametrize("name", CAUSAL)
def test_kind_and_limit_of_every_architecture(name):
    model = tiny_model(name)
    kind = KINDS.get(name, "rotary")
    assert positional_embedding(model) == kind
    assert max_positions(model) == (64 if kind in ("learned", "rotary") else None)


def test_alibi_falcon_is_not_taken_for_rotary():
    from transformers import FalconConfig

    model = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    )
    assert positional_embedding(model) == "alibi"


def test_positions_past_the_limit_are_refused_with_the_limit():
    model = tiny_model("gpt2")
    require_positions(model, 64, what="eval_ctx_lens")
    with pytest.raises(ModelError, match=r"eval_ctx_lens.*65 positions.*at most 64"):
        require_positions(model, 65, what="eval_ctx_lens")
    require_positions(tiny_model("mamba"), 10**6, what="anything")


# fitting learned positions


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_grow_by_interpolation_and_the_model_works(name, tmp_path):
    model = tiny_model(name)
    table = model.get_submodule(table_of(model))
    offset = table.weight.shape[0] - 64
    before, names = table.weight.detach().clone(), list(model.state_dict())
    assert "64 trained rows interpolated to 100" in fit_positions(model, 100)
    assert max_positions(model) == 100
    torch.testing.assert_close(table.weight[:offset], before[:offset])
    torch.testing.assert_close(table.weight[offset:], resize_learned_positions(before[offset:], 100))
    assert table.weight.requires_grad
    assert list(model.state_dict()) == names
    check_output_head(model)
    check_causality(model, num_tokens=100)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert max_positions(loaded) == 100
    ids = ids_for(model, 100)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_local_attention_masks_grow_with_the_table():
    model = tiny_model("gpt_neo")
    fit_positions(model, 100)
    masks = [model.transformer.h[layer].attn.attention.bias[0, 0] for layer in (0, 1)]
    for mask in masks:
        assert mask.shape == (100, 100)
    assert bool(masks[0].tril().equal(masks[0]))
    assert masks[0][99].sum() == 100  # global
    assert masks[1][99].sum() == 8  # local, window 8


@pytest.mark.parametrize("block_size", [1, 32, 64])
def test_a_long_enough_table_is_left_alone(block_size):
    model = tiny_model("gpt2")
    weight = model.transformer.wpe.weight
    assert "64 rows cover" in fit_positions(model, block_size)
    assert model.transformer.wpe.weight is weight


def test_only_trained_rows_are_stretched_when_their_number_is_known():
    model = tiny_model("gpt2")
    before = model.transformer.wpe.weight.detach().clone()
    assert "16 trained rows interpolated to 40" in fit_positions(model, 40, trained_positions=16)
    after = model.transformer.wpe.weight.detach()
    torch.testing.assert_close(after[:40], resize_learned_positions(before[:16], 40))
    torch.testing.assert_close(after[40:], before[40:])
    assert max_positions(model) == 64
    assert "interpolated to 128" in fit_positions(model, 128, trained_positions=40)
    torch.testing.assert_close(model.transformer.wpe.weight.detach(), resize_learned_positions(after[:40], 128))


# fitting rotary positions


@pytest.mark.parametrize("name", [name for name in ROTARY if name != "gemma3"])
def test_a_rope_scale_divides_positions(name):
    # With scale 2, every second position has the angles that its half had before.
    plain, scaled = tiny_model(name), tiny_model(name)
    assert "linear RoPE scale 2" in fit_positions(scaled, 128, 2.0)
    hidden = torch.zeros(1, 1, 1)
    find = next(key for key, module in plain.named_modules() if hasattr(module, "rope_type"))
    cos, sin = plain.get_submodule(find)(hidden, torch.arange(64)[None])
    scaled_cos, scaled_sin = scaled.get_submodule(find)(hidden, torch.arange(0, 128, 2)[None])
    torch.testing.assert_close(scaled_cos, cos)
    torch.testing.assert_close(scaled_sin, sin)
    assert max_positions(scaled) == 128


@pytest.mark.parametrize("name", ROTARY)
def test_a_scaled_model_keeps_its_scale_when_saved(name, tmp_path):
    model = tiny_model(name)
    ids = ids_for(model, 100)
    unscaled = model(ids[:, :60]).logits
    fit_positions(model, 100, 1.7)
    assert not torch.allclose(model(ids[:, :60]).logits, unscaled)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert max_positions(loaded) == 100
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_scale_replaces_a_scale_and_one_removes_it():
    model, plain = tiny_model("llama"), tiny_model("llama")
    fit_positions(model, 64, 4.0)
    fit_positions(model, 64, 2.0)
    assert model.config.rope_parameters["factor"] == 2.0
    fit_positions(model, 64, 1.0)
    assert model.config.rope_parameters["rope_type"] == "default"
    ids = ids_for(model, 50)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_only_full_attention_is_scaled_where_windows_slide():
    model = tiny_model("gemma3")
    fit_positions(model, 128, 2.0)
    assert model.config.rope_parameters["full_attention"]["factor"] == 2.0
    assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("name", [*ROTARY, "gptj"])
def test_rotary_positions_are_raised_with_unchanged_angles_and_said_so(name):
    model = tiny_model(name)
    ids = ids_for(model, 150)
    before = hidden_states(model, ids[:, :64])
    said = fit_positions(model, 150)
    assert "raised from 64 to 150" in said
    assert "no rope_scale" in said
    assert max_positions(model) == 150
    torch.testing.assert_close(hidden_states(model, ids[:, :64]), before)
    check_causality(model, num_tokens=150)
    assert "150 cover" in fit_positions(model, 150)


def test_rotary_modules_stay_in_float32_in_a_bfloat16_model():
    model = tiny_model("llama").to(torch.bfloat16)
    fit_positions(model, 128, 2.0)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_fitting_leaves_parameters_generators_and_modes_alone():
    model = tiny_model("llama").train()
    parameters, state = list(model.parameters()), torch.get_rng_state()
    fit_positions(model, 128, 2.0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.model.rotary_emb.config is model.config
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


# refusals


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mamba", "gptj"])
def test_a_rope_scale_without_configurable_rotary_positions_is_refused(name):
    with pytest.raises(ModelError, match=r"rope_scale only applies.*Leave rope_scale out"):
        fit_positions(tiny_model(name), 64, 2.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(UsageError, match="positive"):
        fit_positions(tiny_model("llama"), 64, scale)


def dynamic():
    return tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def test_another_kind_of_scaling_is_not_overwritten():
    with pytest.raises(ModelError, match="rope_type dynamic"):
        fit_positions(dynamic(), 64, 2.0)


def test_angles_that_depend_on_the_limit_are_not_moved_by_raising_it():
    with pytest.raises(ModelError, match="dynamic rotary positions"):
        fit_positions(dynamic(), 65)
