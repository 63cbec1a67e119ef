"""``--teacher_ranks``: the teacher on processes of its own changes nothing of a run, and all of them end together."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.integration.test_data_parallel import hybrid_words, metadata, rows, state, wait_for_rows
from tests.support.annealing import anneal_words
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny

from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.distributed_link import TrainingLink
from liquid_llm.teachers.online import OnlineTeacher

pytestmark = pytest.mark.slow
HYBRID, ANNEALING = "stage1_hybrid.cli", "trainer.entrypoint"


@pytest.fixture(scope="module")
def tiny(scored: Tiny) -> Tiny:
    return scored


def online_words(tiny: Tiny, output: Path, **options: object) -> list[str]:
    """Steps on three types, two of which ask the online teacher; it is evaluated too."""
    asked = {"signal": f"code=online:{tiny.teacher}", "code_logits_dir": None, "max_steps": 4, "eval_every": 2}
    return hybrid_words(tiny, output, **{**asked, "save_every": 2, **options})


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """Two ranks that train, each with a teacher of its own."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(HYBRID, online_words(tiny, output), output / "said")
    return output / "run"


def refuse_to_open() -> None:
    """No teacher can be opened in this process, nor asked."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a rank that trains has opened the teacher")

    OnlineTeacher.__init__ = refuse  # type: ignore[method-assign, assignment]


def run_out_of_memory() -> None:
    """The teacher has no room for two rows."""
    hidden = OnlineTeacher.hidden

    def broken(self, input_ids, places=None):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return hidden(self, input_ids, places)

    OnlineTeacher.hidden = broken


def have_no_room() -> None:
    """The teacher has no room for a row, once steps are taken."""
    hidden, calls = OnlineTeacher.hidden, []

    def broken(self, input_ids, places=None):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return hidden(self, input_ids, places)

    OnlineTeacher.hidden = broken


def assert_bit_equal(one: Path, other: Path) -> None:
    for kind in ("train", "eval"):
        assert rows(one, kind) == rows(other, kind)
    found, expected = state(one)["student"], state(other)["student"]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_teacher_on_a_rank_of_its_own_changes_nothing(tiny, undisturbed, tmp_path) -> None:
    assert any(row["by_type"].get("code", {}).get("kd") for row in rows(undisturbed)), "else nobody is asked"
    assert any("val_loss_teacher" in row for row in rows(undisturbed, "eval"))
    words = online_words(tiny, tmp_path, teacher_ranks=1)
    ranks = launch(HYBRID, words, tmp_path / "said", 3, fault=(1, refuse_to_open))
    assert wait(ranks) == [0, 0, 0], "\n".join(rank.said for rank in ranks)
    assert_bit_equal(tmp_path / "run", undisturbed)
    assert "on a process of its own" in ranks[0].said
    assert not ranks[2].said
    kept, expected = metadata(tmp_path / "run"), metadata(undisturbed)
    assert (kept["grad_accum"], kept["run"]["group_size"]) == (2, 2), "ranks that train are counted alone"
    assert kept["data_position"] == expected["data_position"]
    told, usual = (
        json.loads((folder / "provenance" / "config.json").read_text()) for folder in (tmp_path / "run", undisturbed)
    )
    assert told["teacher"].pop("ranks") == 1
    assert usual["teacher"].pop("ranks") == 0
    assert told["teacher"] == usual["teacher"]


def test_two_teacher_ranks_take_turns_for_one_that_trains(tiny, tmp_path) -> None:
    """In the other face, over blocks whose documents are kept apart; a teacher that has no room for two rows cuts."""
    options = {"train_steps": 3, "eval_every": 3, "save_every": 3, "grad_accum": 2, "batch_size": 2}
    options |= {"document_mask": True}
    run(ANNEALING, anneal_words(tiny, tmp_path / "one", **options), tmp_path / "said", 1)
    words = anneal_words(tiny, tmp_path / "three", teacher_ranks=2, **options)
    ranks = launch(ANNEALING, words, tmp_path / "said", 3, fault=(2, run_out_of_memory))
    assert wait(ranks) == [0, 0, 0], "\n".join(rank.said for rank in ranks)
    assert "the teacher: out of memory with 2 x" in ranks[2].said
    assert not ranks[1].said
    for kind in ("train", "eval"):
        for row, expected in zip(rows(tmp_path / "three", kind), rows(tmp_path / "one", kind), strict=True):
            for name in ("loss", "ce", "kd", "val_loss_student", "val_kd", "val_loss_teacher"):
                assert row.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-6), (name, row["step"])


def test_a_stop_that_the_teachers_rank_is_asked_for_stops_all_with_the_state_saved(tiny, tmp_path) -> None:
    words = online_words(tiny, tmp_path, teacher_ranks=1, max_steps=2000, save_every=0, eval_every=0)
    ranks = launch(HYBRID, words, tmp_path / "said", 3)
    wait_for_rows(tmp_path / "run", 2)
    os.kill(ranks[2].process.pid, signal.SIGTERM)
    assert wait(ranks) == [75, 75, 75], "\n".join(rank.said for rank in ranks)
    assert ranks[0].said.count("stopped at step") == 1
    assert "error" not in ranks[1].said + ranks[2].said
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == rows(tmp_path / "run")[-1]["step"]


@pytest.mark.parametrize(("killed", "codes"), [(2, [6, 6, -9]), (1, [6, -9, 6])])
def test_a_rank_that_is_killed_ends_all_whichever_it_is(tiny, tmp_path, killed, codes) -> None:
    words = online_words(tiny, tmp_path, teacher_ranks=1, max_steps=2000, eval_every=0)
    ranks = launch(HYBRID, words, tmp_path / "said", 3)
    wait_for_rows(tmp_path / "run", 3)
    ranks[killed].process.kill()
    since = time.monotonic()
    assert wait(ranks) == codes, "\n".join(rank.said for rank in ranks)
    assert time.monotonic() - since < 60
    said = "\n".join(rank.said for rank in ranks)
    assert said.count("another process of this run has ended") == 1
    assert "Traceback" not in said
    assert latest_checkpoint(tmp_path / "run") is not None


def test_a_teacher_that_has_no_room_for_a_row_ends_all_with_its_message(tiny, tmp_path) -> None:
    words = online_words(tiny, tmp_path, teacher_ranks=1, max_steps=2000, eval_every=0)
    ranks = launch(HYBRID, words, tmp_path / "said", 3, fault=(2, have_no_room))
    assert wait(ranks) == [6, 6, 6], "\n".join(rank.said for rank in ranks)
    assert ranks[2].said.count("the teacher: a single row of") == 1
    assert "error" not in ranks[0].said + ranks[1].said


def lose_a_number() -> None:
    """The loss of this rank is not a number, from the second step on."""
    ask, calls = TrainingLink.ask, []

    def broken(self, question, answer):
        ask(self, question, answer)
        calls.append(1)
        if len(calls) > 4:
            answer.fill_(float("nan"))

    TrainingLink.ask = broken


def test_what_ends_the_ranks_that_train_ends_the_teachers_with_its_code(tiny, tmp_path) -> None:
    words = online_words(tiny, tmp_path, teacher_ranks=1, max_steps=2000, eval_every=0)
    ranks = launch(HYBRID, words, tmp_path / "said", 3, fault=(1, lose_a_number))
    assert wait(ranks) == [5, 5, 5], "\n".join(rank.said for rank in ranks)
    said = "\n".join(rank.said for rank in ranks)
    assert said.count("not finite") == 1
    assert not ranks[2].said


def test_a_mistake_while_starting_is_said_once(tiny, tmp_path) -> None:
    """The teacher's rank alone can find out that there is no such teacher; texts are the others' business."""
    words = online_words(tiny, tmp_path / "out", teacher_ranks=1)
    for changed, code, who, said in (
        ({"dataset_manifest": tmp_path / "none.jsonl"}, 4, 0, "none.jsonl"),
        ({"signal": "code=none", "lm_teacher_id": None}, 2, 0, "no teacher is asked while training"),
    ):
        words = online_words(tiny, tmp_path / "out", teacher_ranks=1, **changed)
        ranks = launch(HYBRID, words, tmp_path / "said", 3)
        assert wait(ranks) == [code] * 3, "\n".join(rank.said for rank in ranks)
        assert [rank.said.count("error:") for rank in ranks] == [int(number == who) for number in range(3)]
        assert said in ranks[who].said


def test_too_few_processes_are_refused_in_words(tiny, tmp_path, capsys, monkeypatch) -> None:
    from liquid_llm.cli.main import main

    for size, number in ((1, 1), (2, 2)):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        assert main(["train", *online_words(tiny, tmp_path / "out", teacher_ranks=number)]) == 2
        said = capsys.readouterr().err
        assert f"--teacher_ranks={number}: too few processes" in said
        assert f"got {size}" in said
    assert not (tmp_path / "out").exists()
