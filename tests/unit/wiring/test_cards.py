"""The card of a student: what it says is what the run has kept, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import tiny_model

from liquid_llm.checkpoint.metadata import CheckpointMetadata
from liquid_llm.models.card import Card, Section
from liquid_llm.models.positions import fit_positions
from liquid_llm.wiring.cards import declared_context, make_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
METADATA = CheckpointMetadata(
    step=20,
    tokens_seen=1234,
    block_size=48,
    kd_alpha=0.5,
    kd_temperature=2.0,
    alpha_schedule=None,
    temp_schedule="0:1.2,6:1.0",
    schedule_state={},
    grad_accum=1,
    warmup_steps=2,
    lr=1e-3,
    lr_peak=None,
    positional_embedding="rotary",
    rope_scale=None,
    eval_ctx_lens=(),
    student={"spec": "/home/me/shapes/small.json", "config": {}, "trained_positions": 48},
    tokenizer_hash="ab" * 32,
    data_position=20,
    best_val_loss=1.25,
    created="2026-11-27T12:00:00+00:00",
    run={
        "seed": 7,
        "taught": {
            "lm": {"teacher": "org/wise", "revision": COMMIT, "codec": None, "codec_options": None},
            "math": {"teacher": "wiser", "revision": "sha256-" + "f" * 64, "codec": "tail", "codec_options": {"k": 8}},
        },
    },
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", 128, max_position_embeddings=256)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run has kept, of a manifest in a folder of somebody's own."""
    kept: dict[str, Any] = {
        "config.json": {"objective": {"divergence": "forward_kl"}},
        "data_readiness.json": {
            "types": {
                "lm": {"train_tokens": 5000, "validation_tokens": 70},
                "math": {"train_tokens": 300, "validation_tokens": 9},
            }
        },
        "environment.json": {"packages": {"liquid-llm": "9.9", "torch": "2.99"}, "git": {"commit": COMMIT}},
        "datasets_snapshot.yaml": {"name": None, "config": None},
    }
    folder = tmp_path / "run" / "provenance"
    folder.mkdir(parents=True)
    for name, values in kept.items():
        (folder / name).write_text(json.dumps(values))
    lines = [
        {"path": "/home/me/secret/books/*.jsonl", "type": "lm", "weight": 1.0, "license": "CC-BY-4.0"},
        {"path": "gs://our-bucket/private/math.jsonl", "type": "math", "weight": 1.0},
    ]
    (folder / "manifest_snapshot.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"kind": "eval", "step": step, "val_loss_student": loss, "by_type": {}} for step, loss in ((10, 3.0), (20, 2.0))
    ]
    rows[1]["by_type"] = {
        "lm": {"val_loss": 2.5, "val_loss_teacher": 1.5, "val_kd": 0.25},
        "math": {"val_loss": 1.0},
    }
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"kind":"eval","step":20,"val_lo')
    return tmp_path / "run"


def rows(card: str, section: str) -> list[list[str]]:
    """The table of a section, without its heads."""
    body = card.split(f"## {section}\n")[1].split("## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_it_says_what_taught_it_on_what_and_how_good_it_is(model: Any, run: Path) -> None:
    card = make_card(model, METADATA, str(run))
    assert rows(card, "Teachers") == [
        ["lm", "org/wise", COMMIT, "asked while training"],
        ["math", "wiser", "sha256-" + "f" * 12, "tail k=8"],
    ]
    assert rows(card, "Data") == [
        ["lm", "5,000", "70", "books/*.jsonl", "CC-BY-4.0"],
        ["math", "300", "9", "math.jsonl", "-"],
    ]
    assert rows(card, "Held-out text") == [
        ["all", "2", f"{math.exp(2):.4g}", "-", "-"],
        ["lm", "2.5", f"{math.exp(2.5):.4g}", "1.5", "0.25"],
        ["math", "1", f"{math.e:.4g}", "-", "-"],
    ]
    assert ["software", "liquid-llm 9.9, torch 2.99"] in rows(card, "Training")
    assert ["divergence", "forward_kl"] in rows(card, "Training")
    assert ["context", "48 tokens"] in rows(card, "What it is")


def test_nothing_of_the_machine_is_named(model: Any, run: Path) -> None:
    card = make_card(model, METADATA, str(run))
    for private in ("/home", "secret", "our-bucket", str(run)):
        assert private not in card


def test_figures_are_those_of_the_checkpoint_itself(model: Any, run: Path) -> None:
    assert rows(make_card(model, replace(METADATA, step=10), str(run)), "Held-out text")[0][1] == "3"
    assert "Held-out text" not in make_card(model, replace(METADATA, step=15), str(run))


def test_the_hub_reads_its_front_matter(model: Any, run: Path) -> None:
    bare = ModelCard(make_card(model, METADATA, str(run))).data
    assert (bare.library_name, bare.pipeline_tag) == ("transformers", "text-generation")
    assert (bare.base_model, bare.license, bare.datasets, bare.eval_results) == (None, None, None, None)
    (run / "provenance" / "manifest_snapshot.jsonl").write_text("")
    (run / "provenance" / "data_readiness.json").write_text('{"types": {"lm": {"train_tokens": 5}}}')
    known = {"name": "org/texts@abc", "config": None, "on_hub": True}
    (run / "provenance" / "datasets_snapshot.yaml").write_text(yaml.safe_dump(known))
    base = {"model": "org/base", "revision": COMMIT, "on_hub": True}
    of_base = replace(METADATA, student={**METADATA.student, "spec": "org/base", "base": base})
    text = make_card(model, of_base, str(run), "apache-2.0")
    card = ModelCard(text).data
    assert (card.base_model, card.license, card.datasets) == ("org/base", "apache-2.0", ["org/texts"])
    (result,) = card.eval_results
    assert (result.dataset_type, result.metric_type) == ("org/texts", "perplexity")
    assert result.metric_value == pytest.approx(math.exp(2), abs=1e-3)
    assert ["weights to begin with", f"org/base ({COMMIT})"] in rows(text, "What it is")


@pytest.mark.parametrize("damage", [b"", b"[1", b'{"types": 3}', b"\xff\xfe", b'{"name": {"a": 1}, "objective": []}'])
def test_what_is_damaged_or_gone_is_not_said(damage: bytes, model: Any, run: Path) -> None:
    for path in (run / "provenance").iterdir():
        path.write_bytes(damage)
    (run / "metrics.jsonl").write_bytes(damage)
    for card in (make_card(model, METADATA, str(run)), make_card(model, METADATA, None)):
        assert ModelCard(card).data.library_name == "transformers"
        assert ["optimizer steps", "20"] in rows(card, "Training")


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"spec": "liquid-16m", "trained_positions": 48}, 48),
        ({"spec": "liquid-16m", "trained_positions": 9999}, 256),
        ({"spec": "liquid-16m"}, 48),
        ({"spec": "a,embedding=b", "taken": {"model": "b", "embedding": [1, 2], "kept": 1.0}}, 48),
        ({"spec": "from:b,layers=1", "taken": {"model": "b", "sizes": {"layers": [1, 2]}, "layers": [0]}}, 256),
        ({"spec": "org/base", "trained_positions": 48}, 256),
    ],
)
def test_a_student_is_meant_for_what_it_has_seen_or_its_base_declares(
    student: dict[str, Any], expected: int, model: Any
) -> None:
    assert declared_context(model, replace(METADATA, student=student)) == expected


def test_learned_positions_bound_it() -> None:
    learned = tiny_model("gpt2", 128)
    fit_positions(learned, 64)
    assert declared_context(learned, replace(METADATA, student={"spec": "gpt2-tiny", "trained_positions": 48})) == 48


@given(title=st.text(max_size=20), value=st.text(max_size=30))
def test_no_value_breaks_the_table_or_the_front_matter(title: str, value: str) -> None:
    text = Card(title, {"license": value or None}, [Section("Facts", [["a", value], ["b", "c"]])]).render()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front).get("license") == (value or None)
    assert [line for line in body.splitlines() if line.startswith("| b |")] == ["| b | c |"]
