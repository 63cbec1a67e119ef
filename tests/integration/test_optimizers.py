"""Training with every optimizer by the real command line: it goes on to the bit, and never changes unsaid."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal, anneal_words, as_of, metadata, rows
from tests.support.tiny import Tiny

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.options import ADAMW, ADAMW8BIT, MUON

pytestmark = pytest.mark.slow
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="comes with the extra torchao")
STEPS = 4
EVERY_STEP = {"train_steps": STEPS, "save_every": 1, "keep_last": STEPS, "eval_every": 2}


@pytest.fixture(scope="module", params=[MUON, pytest.param(ADAMW8BIT, marks=needs_torchao)])
def whole(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert anneal(tiny, folder, optimizer=request.param, **EVERY_STEP) == 0
    return request.param, folder


def assert_same(mine: Path, theirs: Path) -> None:
    numbers = [[without_timings(row) for row in read_metrics(folder)] for folder in (mine, theirs)]
    assert numbers[0] == numbers[1]
    a, b = (torch.load(folder / "final.pt", weights_only=True) for folder in (mine, theirs))
    assert all(torch.equal(value, b["student"][name]) for name, value in a["student"].items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for index, moments in a["optimizer"]["state"].items():
        assert moments.keys() == b["optimizer"]["state"][index].keys()
        assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in moments.items())


def test_a_run_that_was_ended_after_a_step_goes_on_to_the_bit(whole, tiny, tmp_path):
    kind, folder = whole
    for step in (1, STEPS - 1):
        again = as_of(folder, step, tmp_path / str(step))
        assert anneal(tiny, again, optimizer=kind, **EVERY_STEP) == 0
        assert_same(again, folder)


def test_what_a_run_leaves_says_its_optimizer(whole):
    kind, folder = whole
    assert metadata(folder)["run"]["optimizer"] == kind
    assert f"optimizer: {kind}" in (folder / "provenance" / "options.yaml").read_text()


def test_another_optimizer_is_refused_where_a_run_goes_on_and_begins_without_moments_if_that_is_accepted(
    whole, tiny, tmp_path, capsys, caplog
):
    kind, folder = whole
    run = as_of(folder, 2, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert anneal(tiny, run, optimizer=ADAMW, **EVERY_STEP) == 2
    said = capsys.readouterr().err
    assert f"--optimizer is {ADAMW} and was {kind}" in said
    assert "--accept_changes" in said
    assert {name: (run / name).read_bytes() for name in before} == before
    assert anneal(tiny, run, optimizer=ADAMW, accept_changes=True, **EVERY_STEP) == 0
    assert "its moments begin at nothing" in caplog.text
    state = torch.load(run / "final.pt", weights_only=True)["optimizer"]["state"]
    assert {float(one["step"]) for one in state.values()} == {STEPS - 2.0}


def test_a_run_that_is_resumed_elsewhere_takes_its_optimizer_along(whole, tiny, tmp_path, capsys):
    kind, folder = whole
    resumed = {"resume_gcs_uri": folder / "step-00000002.pt", "train_steps": STEPS}
    assert anneal(tiny, tmp_path / "a", **resumed) == 0
    assert [row["step"] for row in rows(tmp_path / "a")] == [3, 4]
    assert metadata(tmp_path / "a")["run"]["optimizer"] == kind
    assert anneal(tiny, tmp_path / "b", optimizer=ADAMW, **resumed) == 2
    assert "another optimizer cannot go on" in capsys.readouterr().err
    assert anneal(tiny, tmp_path / "b", optimizer=ADAMW, reset_optim=True, **{**resumed, "train_steps": 1}) == 0


@pytest.mark.parametrize("kind", [MUON, pytest.param(ADAMW8BIT, marks=needs_torchao)])
def test_a_dry_run_and_liquid_memory_say_what_its_moments_take(kind, tiny, tmp_path, capsys):
    sizes = {}
    for one in (ADAMW, kind):
        assert main(["anneal", *anneal_words(tiny, tmp_path / one, optimizer=one), "--dry_run"]) == 0
        found = json.loads(capsys.readouterr().out)
        taken = found["memory"]["consumers"]
        sizes[one] = found["estimate"]["checkpoint_bytes"], next(v for k, v in taken.items() if "moments" in k)
    assert all(small < large for small, large in zip(sizes[kind], sizes[ADAMW], strict=True))


def test_what_it_cannot_do_is_refused_before_anything_is_made(tiny, tmp_path, capsys, monkeypatch):
    assert anneal(tiny, tmp_path / "run", optimizer=MUON, shard="full") == 2
    assert "--optimizer=muon takes whole weights: leave out --shard=full" in capsys.readouterr().err
    assert anneal(tiny, tmp_path / "run", optimizer="sgd") == 2
    assert "adamw, adamw8bit, muon" in capsys.readouterr().err
    find = lambda name, *rest: None if name == "torchao" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    assert anneal(tiny, tmp_path / "run", optimizer=ADAMW8BIT) == 2
    assert "pip install 'liquid-llm[torchao]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
