"""A student's embedding from a wider one: what a projection to so many directions can keep, it keeps."""

import pytest
import torch
from tests.support.cuts import VOCAB, cut_teacher

from liquid_llm.models.embedding import take_embedding
from liquid_llm.models.student import build_student


def student(**changes):
    given = {"vocab_size": VOCAB, "bos_id": 0, "eos_id": 0, "block_size": 16, "seed": 0}
    return build_student("liquid-test", **{**given, **changes})


def gram(rows):
    return rows.detach().double() @ rows.detach().double().t()


def test_of_as_many_channels_all_inner_products_stay_up_to_one_factor():
    teacher, ours = cut_teacher("llama", seed=4), student()
    size = ours.get_input_embeddings().weight.square().mean()
    facts = take_embedding(ours, teacher, VOCAB, "the test")
    mine, theirs = gram(ours.get_input_embeddings().weight), gram(teacher.get_input_embeddings().weight[:VOCAB])
    torch.testing.assert_close(mine / mine.norm(), theirs / theirs.norm())
    torch.testing.assert_close(ours.get_input_embeddings().weight.square().mean(), size)
    assert facts == {"embedding": [32, 32], "kept": pytest.approx(1.0)}
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_of_more_channels_the_best_approximation_stays():
    teacher, ours = cut_teacher("llama", hidden_size=64, head_dim=16), student()
    facts = take_embedding(ours, teacher, VOCAB, "the test")
    rows = teacher.get_input_embeddings().weight[:VOCAB].detach().double()
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    best = (left[:, :32] * values[:32].square()) @ left[:, :32].t()
    mine = gram(ours.get_input_embeddings().weight)
    torch.testing.assert_close(mine / mine.norm(), best / best.norm(), rtol=1e-4, atol=1e-6)
    assert facts["kept"] == pytest.approx(float(values[:32].square().sum() / values.square().sum()))
    assert facts["kept"] < 0.9


def test_heads_of_their_own_are_taken_too(tmp_path):
    config = student().config
    config.tie_word_embeddings = False
    (tmp_path / "config.json").write_text(config.to_json_string())
    given = {"vocab_size": VOCAB, "bos_id": 0, "eos_id": 0, "block_size": 16, "seed": 0}
    ours, teacher = build_student(str(tmp_path / "config.json"), **given), cut_teacher("llama", tied=False)
    take_embedding(ours, teacher, VOCAB, "the test")
    mine, theirs = gram(ours.get_output_embeddings().weight), gram(teacher.get_output_embeddings().weight[:VOCAB])
    torch.testing.assert_close(mine / mine.norm(), theirs / theirs.norm())
