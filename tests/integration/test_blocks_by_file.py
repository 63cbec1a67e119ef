"""Plain text in many files, in blocks that end with their file: begun, stopped and gone on with by real commands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.support import texts
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.wiring.start import Start

pytestmark = pytest.mark.slow
FILES = 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A world whose plain text lies in five files behind a pattern."""
    made = build(tmp_path_factory.mktemp("blocks"))
    rng = random.Random(5)
    (made.root / "lm").mkdir()
    for number in range(FILES):
        rows = [{"text": texts.paragraph(rng), "sample_id": f"p{number}-{n}"} for n in range(12)]
        (made.root / "lm" / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.draw_from({"path": "lm/*.jsonl", "type": "lm", "weight": 1.0})
    return made


def train(tiny: Tiny, place: Path, **options: Any) -> list[dict[str, Any]]:
    sizes = {"max_steps": 4, "save_every": 2, "eval_every": 4, "order": "shards", "data_cache": tiny.root / "tokens"}
    assert tiny.train_plainly(place, **{**sizes, **options}) == 0
    return [without_timings(row) for row in read_metrics(place / "run")]


def as_after_step_2(folder: Path) -> dict[str, Any]:
    for path in folder.glob("*.pt*"):
        if not path.name.startswith("step-00000002"):
            path.unlink()
    found: dict[str, Any] = json.loads((folder / "step-00000002.meta.json").read_text())
    return found


def test_it_goes_on_to_the_bit_and_is_evaluated_on_the_same_text(tiny, tmp_path, capsys) -> None:
    whole = train(tiny, tmp_path, document_mask=True)
    said = capsys.readouterr().err
    assert "of the tokens are behind the last full block of their data file" in said
    cache, folder = tiny.root / "tokens", tmp_path / "run"
    left = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert len(left) == FILES, "each data file has a cache of tokens of its own, and there is no other"
    readiness = json.loads((folder / "provenance" / "data_readiness.json").read_text())["types"]["lm"]
    assert 0 < readiness["train_tokens_behind_last_blocks"] < 64 * FILES
    assert main(["evaluate", str(folder)]) == 0
    judged = json.loads((folder / "evaluation.json").read_text())["measures"]["by_type"]["lm"]["ce"]["value"]
    (last,) = [row for row in whole if row["kind"] == "eval" and row["step"] == 4]
    assert judged == pytest.approx(last["val_loss_student"], rel=1e-5)
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == left
    kept = as_after_step_2(folder)
    assert (kept["versions"]["order"], kept["run"]["blocks_by_file"]) == (4, True)
    assert train(tiny, tmp_path, document_mask=True) == whole


def test_a_run_that_was_begun_before_goes_on_joining_its_files(tiny, tmp_path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Start, "blocks_by_file", False)  # as a release had it that knew of no others
        before = train(tiny, tmp_path, eval_every=0)
    kept = as_after_step_2(tmp_path / "run")
    assert kept["versions"]["order"] == 3
    assert "blocks_by_file" not in kept["run"]
    capsys.readouterr()
    assert train(tiny, tmp_path, eval_every=0) == before
    assert "blocks go on from one data file into the next, as in the run so far" in capsys.readouterr().err
    assert as_after_step_2(tmp_path / "run")["versions"]["order"] == 3
    assert train(tiny, tmp_path / "new", eval_every=0) != before, "a new run has the other order"


def test_ranks_share_the_files_and_take_the_steps_of_one_process(tiny, tmp_path) -> None:
    unused = dict.fromkeys(("mc_teacher_id", "math_logits_dir", "code_logits_dir"))
    few = {"max_steps": 2, "eval_every": 0, "save_every": 0, "grad_accum": 2, "draw_group": 2, "order": "shards"}
    words = tiny.train_words(tmp_path, **unused, **few, data_cache=tmp_path / "tokens")
    alone = tiny.train_words(tmp_path / "one", **unused, **few)
    ranks = launch("stage1_hybrid.cli", words, tmp_path / "said")
    assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    assert "lm: tokenised 3 of 3 data files, this process's share of its host's" in ranks[0].said
    assert "lm: the tokens of 5 data files were in the cache, 0 were tokenised" in ranks[0].said
    run("stage1_hybrid.cli", alone, tmp_path / "said-alone", 1)
    losses = [
        [row["loss"] for row in read_metrics(place / "run") if row["kind"] == "train"]
        for place in (tmp_path, tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
