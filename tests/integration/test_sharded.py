"""A student that is dealt out among processes learns what a whole one learns, and is saved as one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal_words, make_world
from tests.support.processes import end_all, launch, run, wait
from tests.support.tiny import Tiny

from liquid_llm.metrics import read_metrics

pytestmark = pytest.mark.slow
ANNEALING = "trainer.entrypoint"


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    end_all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_world(tmp_path_factory.mktemp("tiny"))


def words(tiny: Tiny, output: Path, **options: object) -> list[str]:
    """Four steps of two micro-batches, evaluated and saved after two; texts of one type."""
    given = {"train_steps": 4, "eval_every": 2, "save_every": 2, "grad_accum": 2, "batch_size": 2, "lr": 1e-2}
    return anneal_words(tiny, output, **{**given, **options})


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(folder) if row["kind"] == kind]


def state(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses to 1e-6, weights and moments to 1e-5; the same files."""
    for kind, names in (("train", ("loss", "ce", "kd", "l2", "grad_norm")), ("eval", ("val_loss_student", "val_kd"))):
        found, expected = rows(one, kind), rows(other, kind)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, as_expected in zip(found, expected, strict=True):
            for name in names:
                values = row.get(name) or 0.0, as_expected.get(name) or 0.0
                assert values[0] == pytest.approx(values[1], rel=1e-5 if name == "grad_norm" else 1e-6), (name, row)
    found, expected = state(one), state(other)
    assert list(found["student"]) == list(expected["student"])
    for name, tensor in expected["student"].items():
        torch.testing.assert_close(found["student"][name], tensor, rtol=0, atol=1e-5, msg=name)
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, moments in expected["optimizer"]["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(found["optimizer"]["state"][index][name], tensor, rtol=0, atol=1e-5, msg=name)
    assert sorted(one.glob("*.pt")) == [one / path.name for path in sorted(other.glob("*.pt"))]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("llama", {"grad_checkpoint": True, "eval_measures": True, "eval_tokens": 160}),
        ("student", {"precision": "bfloat16"}),  # LFM2: convolutions and attention
    ],
)
def test_it_takes_the_steps_of_one_process(tiny, tmp_path, name, options) -> None:
    given = {"student": tiny.root / f"{name}.json", **options}
    run(ANNEALING, words(tiny, tmp_path / "one", **given), tmp_path / "said-one", size=1)
    run(ANNEALING, words(tiny, tmp_path / "two", shard="full", **given), tmp_path / "said-two")
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    assert "blocks among 2 processes" in (tmp_path / "said-two" / "rank-0.log").read_text()
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        found, expected = (json.loads((tmp_path / run / "student" / file).read_text()) for run in ("two", "one"))
        assert found == expected
