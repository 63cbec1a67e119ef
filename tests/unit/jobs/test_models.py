"""``liquid models``: the presets, and that their counts are those of the models themselves."""

import json

import pytest

from liquid_llm.cli.main import main
from liquid_llm.models.student import PRESETS, from_configuration


def listed(vocab, capsys):
    assert main(["models", f"--vocab={vocab}", "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["presets"]}


def test_all_are_there_and_only_embeddings_grow_with_the_vocabulary(capsys):
    small, large = listed(1000, capsys), listed(49152, capsys)
    assert set(large) == set(PRESETS)
    for name, one in large.items():
        assert one["parameters_without_embeddings"] == small[name]["parameters_without_embeddings"]
        assert one["parameters"] - small[name]["parameters"] == (49152 - 1000) * one["width"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-test")])
def test_counts_are_those_of_the_model(name, capsys):
    model = from_configuration(name, 1000, 0, 0, 0)
    assert listed(1000, capsys)[name]["parameters"] == sum(one.numel() for one in model.parameters())


def test_people_read_a_table(capsys):
    assert main(["models"]) == 0
    assert "liquid-350m" in capsys.readouterr().out
