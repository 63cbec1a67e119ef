"""The shape of a cut: every list in the configuration that has an entry a block follows the blocks."""

import pytest
from tests.support.cuts import SHAPES, VOCAB, cut_teacher
from tests.support.models import tiny_config
from transformers import AutoConfig

from liquid_llm.errors import ModelError
from liquid_llm.models.cut import TYPES, cut_config, spread_layers
from liquid_llm.models.spec import Cut


def cut(name, **asked):
    changes = asked.pop("changes", {})
    return cut_config(cut_teacher(name, **changes).config, Cut(**asked), VOCAB, "the test")


def test_every_type_has_a_shape_in_the_tests():
    assert set(TYPES) == set(SHAPES)


@pytest.mark.parametrize(
    ("num_layers", "wanted", "expected"),
    [
        (30, 15, (0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29)),
        (4, 4, (0, 1, 2, 3)),
        (4, 2, (0, 3)),
        (5, 1, (0,)),
    ],
)
def test_spread_layers_lie_evenly_with_both_ends(num_layers, wanted, expected):
    assert spread_layers(num_layers, wanted) == expected


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("lfm2", {"layers": (0, 1, 3)}, {"layer_types": ["conv", "full_attention", "full_attention"]}),
        ("gemma3_text", {"layers": (1, 2)}, {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma2", {"layers": (1, 3)}, {"layer_types": ["full_attention"] * 2}),
        (
            "qwen2",
            {"layers": (0, 2, 3)},
            {"max_window_layers": 1, "layer_types": ["full_attention"] + ["sliding_attention"] * 2},
        ),
        ("qwen3", {"layers": (2, 3)}, {"max_window_layers": 0, "layer_types": ["sliding_attention"] * 2}),
        ("smollm3", {"layers": (1, 2)}, {"no_rope_layers": [0, 1]}),
        ("llama", {"layers": 3}, {"num_hidden_layers": 3, "vocab_size": VOCAB, "hidden_size": 32}),
        ("llama", {"width": 16}, {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}),
        (
            "llama",
            {"width": 16, "kv_heads": 2, "mlp": 50},
            {"intermediate_size": 50, "num_attention_heads": 4, "head_dim": 8},
        ),
        ("llama", {"mlp": 20}, {"hidden_size": 32, "intermediate_size": 20, "num_key_value_heads": 2}),
        ("lfm2", {"width": 16}, {"intermediate_size": 128, "block_auto_adjust_ff_dim": False}),
    ],
)
def test_what_counts_blocks_or_channels_follows(name, asked, expected):
    made = cut(name, **asked)
    assert {key: getattr(made, key) for key in expected} == expected


def test_a_rotary_table_of_each_kind_of_attention_stays():
    made = cut("gemma3_text", layers=(0, 2))
    assert made.rope_parameters == cut_teacher("gemma3_text").config.rope_parameters
    assert set(made.rope_parameters) == {"sliding_attention", "full_attention"}


def test_full_attention_indices_are_counted_anew():
    changes = {"layer_types": None, "full_attn_idxs": [1, 3]}
    config = AutoConfig.for_model("lfm2", **{**SHAPES["lfm2"], **changes, "num_hidden_layers": 4, "hidden_size": 32})
    made = cut_config(config, Cut(layers=(0, 2, 3)), VOCAB, "the test")
    assert made.full_attn_idxs == [2]


@pytest.mark.parametrize("name", ["gpt2", "phi", "mixtral", "opt", "cohere"])
def test_another_architecture_is_refused_by_name(name):
    with pytest.raises(ModelError, match=f"got {name}; expected llama") as error:
        cut_config(tiny_config(name), Cut(layers=1), VOCAB, "the test")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("lfm2", {"layers": (0, 2)}, "no block with attention"),
        ("llama", {"layers": (1, 4)}, "0 to 3"),
        ("llama", {"layers": 5}, "at most 4"),
        ("llama", {"width": 15}, "not a multiple of the number of attention heads"),
    ],
)
def test_what_cannot_be_is_refused_in_words(name, asked, said):
    with pytest.raises(ModelError, match=said):
        cut(name, **asked)
