"""``provenance/options.yaml`` runs a job again: the same losses, weights and records to the last bit, from anywhere."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.support.annealing import anneal_words, contents, make_world
from tests.support.tiny import Tiny

from liquid_llm.cli.main import main, run_face
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.options import CAPTURE
from liquid_llm.signal_store.records import Record
from liquid_llm.signal_store.store import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a world in ``tiny``, whose commands name it from there, and a captured store."""
    root = tmp_path_factory.mktemp("here")
    make_world(root / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run_face(CAPTURE, Tiny(Path("tiny")).capture_words(codec="tail"), "capture") == 0
    return root


@pytest.fixture
def elsewhere(here, tmp_path, monkeypatch):
    """Goes there, where the names of the first command mean nothing, and leaves the environment behind."""

    def go() -> None:
        for name in [one for one in os.environ if one.startswith(("AIP_", "CLOUD_ML_"))]:
            monkeypatch.delenv(name)
        monkeypatch.chdir(tmp_path)

    monkeypatch.chdir(here)
    return go


def kept_options(folder: Path) -> dict:
    return yaml.safe_load((folder / "provenance" / "options.yaml").read_text())


def assert_same_run(one: Path, other: Path) -> None:
    mine, theirs = ([without_timings(row) for row in read_metrics(run)] for run in (one, other))
    assert mine == theirs
    assert [row["kind"] for row in mine].count("train") >= 2
    a, b = (torch.load(run / "final.pt", weights_only=True) for run in (one, other))
    for name, value in a["student"].items():
        assert torch.equal(value, b["student"][name]), name
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in moments.items())


def test_a_hybrid_run_with_all_that_can_be_given_and_chosen(here, elsewhere, tmp_path, monkeypatch):
    Path("more.yaml").write_text(
        "lr: 0.003\nsources:\n"
        "  math_tool: {teacher: tiny/signal/math, alpha: 0.25, temperature: 1.5}\n"
        "  code: {teacher: 'online:tiny/teacher'}\n"
    )
    words = Tiny(Path("tiny")).train_words(
        None, run_id=None, max_steps=4, math_logits_dir=None, code_logits_dir=None, lr=None, batch_size="auto"
    )
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "first")
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "job-7")
    assert main(["train", *words, "--config=more.yaml", "--tokens_per_step=256", "--restart"]) == 0
    first = here / "first" / "job-7"
    given = kept_options(first)
    assert {"restart", "tokens_per_step", "output_gcs_uri", "run_id"}.isdisjoint(given)
    assert given["batch_size"] * given["grad_accum"] * 64 == 256
    assert (given["device"], given["grad_checkpoint"], given["begin_token"]) == ("cpu", False, "always")
    assert {given[name] for name in ("precision", "teacher_precision")} <= {"float32", "bfloat16"}
    assert (
        given["sources"]["math_tool"]
        == {
            "teacher": f"store:{here / 'tiny/signal/math'}",
            "alpha": "0.25",
            "temperature": "1.5",
        }
        or given["sources"]["math_tool"]["alpha"] == 0.25
    )
    elsewhere()
    kept = first / "provenance" / "options.yaml"
    assert main(["train", f"--config={kept}", "--output_gcs_uri=again", "--run_id=run"]) == 0
    assert_same_run(first, tmp_path / "again" / "run")
    assert kept_options(tmp_path / "again" / "run") == {**given, "output_gcs_uri": "again", "run_id": "run"}


def test_an_annealing_run_that_resumed_at_another_length(here, elsewhere, tmp_path):
    tiny = Tiny(Path("tiny"))
    assert main(["anneal", *anneal_words(tiny, "begun", train_steps=4, alpha_schedule="0:0.7,2:0.5")]) == 0
    words = anneal_words(
        tiny, "first", resume_gcs_uri="begun/last.pt", block_size=64, batch_size=None, eval_ctx_lens="32,64"
    )
    Path("anneal.yaml").write_text("reset-optim-on-ctx-change: yes\ntemp_schedule: 0:1.2,2:1.0\nbatch_size: 3\n")
    assert main(["anneal", "--config=anneal.yaml", *words, "--train_steps=4", "--precision=float32"]) == 0
    elsewhere()
    kept = here / "first" / "provenance" / "options.yaml"
    assert main(["anneal", f"--config={kept}", "--output_gcs_uri=again"]) == 0
    assert_same_run(here / "first", tmp_path / "again")


@pytest.mark.parametrize("layout", ["pt", "shards"])
def test_a_capture_writes_the_same_bytes(layout, here, elsewhere, tmp_path):
    Path("signal.yaml").write_text("codec: tail\nsignal: [lm=first/lm, code=none]\ncodec_options: draws_t1=8\n")
    words = Tiny(Path("tiny")).capture_words(
        math_logits_dir=f"first/{layout}", code_logits_dir=None, logits_format=None, num_workers=3, batch_size=2
    )
    new = {"signal": f"lm=first/lm-{layout},code=none", "config": "signal.yaml"}
    command = [*words, *(f"--{name}={value}" for name, value in new.items())]
    capture = (lambda: run_face(CAPTURE, command, "capture")) if layout == "pt" else lambda: main(["capture", *command])
    assert capture() == 0
    stores = [here / "first" / layout, here / "first" / f"lm-{layout}"]
    assert kept_options(stores[0]) == kept_options(stores[1])
    assert kept_options(stores[0])["logits_format"] == layout
    elsewhere()
    kept = stores[0] / "provenance" / "options.yaml"
    assert main(["capture", f"--config={kept}", "--math_logits_dir=again/math", "--signal=lm=again/lm"]) == 0
    for store, name in zip(stores, ("math", "lm"), strict=True):
        ours, again = (records(one) for one in (store, tmp_path / "again" / name))
        assert ours == again
        assert len(ours) >= 40
        if layout == "pt":  # shards have random names, and hold records in the order in which they came
            assert files(store) == files(tmp_path / "again" / name)


def files(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(store).items() if not name.startswith("provenance/")}


def records(store: Path) -> dict[str, tuple[Any, dict[str, bytes]]]:
    """Sample id -> header and the very bytes of its payload."""
    found = {}
    with closing(open_store(str(store))) as opened:
        for name, record in opened.layout.records():
            assert isinstance(record, Record), record
            payload = {part: tensor.numpy().tobytes() for part, tensor in record.payload.items()}
            found[name] = (record.header, payload)
    return found
