"""A student that is dealt out among processes learns what a whole one learns, and is saved as one."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.annealing import anneal_words, as_of
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny

from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.training import Student

pytestmark = pytest.mark.slow
ANNEALING, HYBRID = "trainer.entrypoint", "stage1_hybrid.cli"


LLAMA = {"student": "llama", "grad_checkpoint": True, "eval_measures": True}


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Path:
    """A run of one process."""
    return train(tiny, tmp_path_factory.mktemp("one"), 1, **LLAMA)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> Path:
    """The same, its student dealt out among two."""
    return train(tiny, tmp_path_factory.mktemp("two"), 2, shard="full", **LLAMA)


def train(tiny: Tiny, output: Path, size: int, **options: object) -> Path:
    run(ANNEALING, words(tiny, output, **options), output / "said", size)
    return output


def words(tiny: Tiny, output: Path, **options: object) -> list[str]:
    """Four steps of two micro-batches, evaluated and saved after two; texts of one type."""
    given = {"train_steps": 4, "eval_every": 2, "save_every": 2, "grad_accum": 2, "batch_size": 2, "lr": 1e-2}
    student = {"student": tiny.root / f"{options['student']}.json"} if "student" in options else {}
    return anneal_words(tiny, output, **{**given, **options, **student})


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
        ("gpt2", {"eval_tokens": 160}),  # an odd number of validation batches
        ("student", {"precision": "bfloat16"}),  # LFM2: convolutions and attention
    ],
)
def test_it_takes_the_steps_of_one_process(tiny, tmp_path, name, options) -> None:
    alone = train(tiny, tmp_path / "one", 1, student=name, **options)
    dealt = train(tiny, tmp_path / "two", 2, shard="full", student=name, **options)
    assert_equal_runs(dealt, alone)


def test_it_takes_them_with_activations_recomputed_and_is_exported_as_a_whole(one, two) -> None:
    assert_equal_runs(two, one)
    assert "blocks among 2 processes" in (two / "said" / "rank-0.log").read_text()
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        found, expected = (json.loads((folder / "student" / file).read_text()) for folder in (two, one))
        assert found == expected
    found, expected = (load_file(folder / "student" / "model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_continued_on_as_many_ranks_it_is_bit_identical(tiny, two, tmp_path) -> None:
    again = train(tiny, as_of(two, 2, tmp_path / "again"), 2, shard="full", **LLAMA)
    for kind in ("train", "eval"):
        assert [without_timings(row) for row in rows(again, kind)] == [without_timings(row) for row in rows(two, kind)]
    assert_equal(state(again), state(two))


def assert_equal(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        for key in expected.keys() - {"metadata", "accumulator"}:
            assert_equal(found[key], expected[key])


@pytest.mark.parametrize(
    ("begun", "size", "options"),
    [("two", 1, {}), ("one", 2, {"shard": "full"}), ("two", 2, {})],
    ids=["parts-to-one-process", "one-process-to-parts", "parts-to-data-parallel"],
)
def test_it_goes_on_from_and_to_whole_students(tiny, one, two, tmp_path, begun, size, options) -> None:
    again = as_of({"one": one, "two": two}[begun], 2, tmp_path / "again")
    assert_equal_runs(train(tiny, again, size, **options, **LLAMA), one)


def test_it_stays_near_its_old_logits_as_one_process_does(tiny, one, tmp_path) -> None:
    """The reference student is dealt out too, and let go of when its weight is 0."""
    manifest = tmp_path / "lm-alone.jsonl"
    manifest.write_text(json.dumps({"path": str(tiny.root / "lm.jsonl"), "type": "lm", "weight": 1}) + "\n")
    given = {
        "student": None,
        "resume_gcs_uri": one / "last.pt",
        "dataset_manifest": manifest,
        "math_logits_dir": None,
        "code_logits_dir": None,
        "block_size": 32,
        "max_steps": 4,
        "eval_every": 2,
        "save_every": 2,
        "keep_old_logit_l2": 0.1,
        "keep_old_logit_l2_fade_step": 3,
        "grad_accum": 2,
    }
    run(HYBRID, tiny.train_words(tmp_path / "one", **given), tmp_path / "said-one", size=1)
    run(HYBRID, tiny.train_words(tmp_path / "two", shard="full", **given), tmp_path / "said-two")
    assert sum(row.get("l2") or 0 for row in rows(tmp_path / "one" / "run", "train")) > 0
    assert_equal_runs(tmp_path / "two" / "run", tmp_path / "one" / "run")


def test_a_teacher_that_is_dealt_out_says_what_a_whole_one_says(tiny, tmp_path) -> None:
    """Texts of three types, one of which it is not asked for; the ranks evaluate different numbers of batches."""
    given = {
        "hybrid": False,
        "math_logits_dir": None,
        "code_logits_dir": None,
        "alpha_by_type": "code=0",
        "max_steps": 6,
        "eval_every": 3,
        "save_every": 3,
    }
    run(HYBRID, tiny.train_words(tmp_path / "whole", **given), tmp_path / "said-whole")
    for name, options in (("teacher", {}), ("both", {"shard": "full"})):
        given_too = {**given, "teacher_shard": "full", **options}
        run(HYBRID, tiny.train_words(tmp_path / name, **given_too), tmp_path / f"said-{name}")
        assert "the online teacher is dealt out among 2" in (tmp_path / f"said-{name}" / "rank-0.log").read_text()
        assert_equal_runs(tmp_path / name / "run", tmp_path / "whole" / "run")
    assert len({tuple(row["by_type"]) for row in rows(tmp_path / "whole" / "run", "train")}) > 1


def test_a_rank_that_has_no_room_ends_all_and_none_waits(tiny, tmp_path) -> None:
    given = words(tiny, tmp_path, shard="full", **LLAMA)
    began = time.monotonic()
    ranks = launch(ANNEALING, given, tmp_path / "said", fault=(1, run_out_of_memory))
    assert wait(ranks) == [6, 6], "\n".join(rank.said for rank in ranks)
    assert time.monotonic() - began < 200
    assert ranks[1].said.count("is not cut") == 1
    assert "error" not in ranks[0].said
    assert "Traceback" not in ranks[0].said + ranks[1].said


def run_out_of_memory() -> None:
    """There is no room for the second micro-batch."""
    fail_at(2, lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")))


def lose_a_number() -> None:
    fail_at(2, lambda output: dataclasses.replace(output, loss=output.loss * float("nan")))


def fail_at(call, change) -> None:
    """Let ``change`` happen to what a training pass gives, the ``call``-th of them."""
    forward, calls = Student.forward, []

    def broken(self, batch, *given):
        calls.extend([1] * (type(batch.input_ids) is torch.Tensor and torch.is_grad_enabled()))
        output = forward(self, batch, *given)
        return change(output) if len(calls) == call and torch.is_grad_enabled() else output

    Student.forward = broken


def test_a_loss_that_is_no_number_on_one_rank_ends_all(tiny, tmp_path) -> None:
    given = words(tiny, tmp_path, shard="full", save_every=1, **LLAMA)
    ranks = launch(ANNEALING, given, tmp_path / "said", fault=(1, lose_a_number))
    assert wait(ranks) == [5, 5], "\n".join(rank.said for rank in ranks)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_rank_that_is_killed_ends_the_others_and_a_stop_saves(tiny, tmp_path) -> None:
    given = words(tiny, tmp_path, shard="full", train_steps=5000, eval_every=0, save_every=0, **LLAMA)
    ranks = launch(ANNEALING, given, tmp_path / "said")
    wait_for_rows(tmp_path, 2)
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    assert wait(ranks) == [75, 75], "\n".join(rank.said for rank in ranks)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == rows(tmp_path, "train")[-1]["step"] > 0
    ranks = launch(ANNEALING, given, tmp_path / "said")
    wait_for_rows(tmp_path, found.step + 2)
    ranks[1].process.kill()
    assert wait(ranks) == [6, -signal.SIGKILL]
    assert "another process of this run has ended" in ranks[0].said
    assert "Traceback" not in ranks[0].said


def wait_for_rows(folder: Path, count: int, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count('"train"') >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no rows")


def test_a_dry_run_takes_two_steps_and_leaves_nothing(tiny, tmp_path) -> None:
    given = words(tiny, tmp_path / "out", shard="full", teacher_shard="full", dry_run=True, student="llama")
    ranks = launch(ANNEALING, given, tmp_path / "said")
    assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    assert "gathered weights and their exchange" in ranks[0].said
    assert not (tmp_path / "out").exists()


def test_one_process_deals_nothing_out_and_says_so(tiny, tmp_path) -> None:
    ranks = launch(ANNEALING, words(tiny, tmp_path / "out", shard="full", student="llama"), tmp_path / "said", 1)
    assert wait(ranks) == [2]
    assert "--shard=full: one process has nobody to share a model with" in ranks[0].said
    assert not (tmp_path / "out").exists()
