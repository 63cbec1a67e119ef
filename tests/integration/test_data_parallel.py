"""Several processes take the steps of one, stop together, fail together, and go on where they were."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.support.annealing import anneal_words
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny

from liquid_llm import step_sums
from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.training import Student
from liquid_llm.wiring.recorder import Recorder

pytestmark = pytest.mark.slow
HYBRID, ANNEALING = "stage1_hybrid.cli", "trainer.entrypoint"


@pytest.fixture(scope="module")
def tiny(scored: Tiny) -> Tiny:
    return scored


def hybrid_words(tiny: Tiny, output: Path, **options: object) -> list[str]:
    """Six steps of micro-batches of three types; how many a step has is not said. Evaluation: three batches of each."""
    given = {"max_steps": 6, "eval_every": 3, "save_every": 3, "keep_old_logit_l2": 0, "metrics_interval": 1}
    given |= {"eval_tokens": 384}
    return tiny.train_words(output, **{**given, **options})


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    run(HYBRID, hybrid_words(tiny, output), output / "said")
    return output / "run"


def rows(folder: Path, kind: str = "train") -> list[dict]:
    return [without_timings(row) for row in read_metrics(folder) if row["kind"] == kind]


def state(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def metadata(folder: Path, name: str = "last") -> dict:
    return json.loads((folder / f"{name}.meta.json").read_text())


def as_killed_at(folder: Path, step: int, target: Path) -> Path:
    """A copy of a finished run as if it had been killed after the snapshot of ``step``."""
    shutil.copytree(folder, target / "run")
    for path in (target / "run").glob("*"):
        later = path.name.startswith("step-") and int(path.name[5:13]) > step
        if later or path.name == ".lock" or path.name.startswith(("final", "best", "last", "time-")):
            path.unlink()
    shutil.rmtree(target / "run" / "student")
    return target


def test_a_command_without_grad_accum_takes_a_micro_batch_a_rank_and_says_so(undisturbed: Path) -> None:
    said = [(undisturbed.parent / "said" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "--grad_accum=2: a micro-batch of each step for each of 2 processes" in said[0]
    assert "INFO" not in said[1]
    kept = metadata(undisturbed)
    assert (kept["grad_accum"], kept["data_position"], kept["run"]["group_size"]) == (2, 12, 2)
    assert kept["versions"]["order"] == 2
    for row in rows(undisturbed):
        types = [type for type, one in row["by_type"].items() if one["tokens"]]
        assert len(types) == 1, "ranks do the same kind of work at the same time"
    assert len({tuple(row["by_type"]) for row in rows(undisturbed)}) > 1


def test_killed_and_continued_on_as_many_ranks_it_is_bit_identical(tiny, undisturbed, tmp_path) -> None:
    output = as_killed_at(undisturbed, 3, tmp_path)
    run(HYBRID, hybrid_words(tiny, output), tmp_path / "said")
    assert rows(output / "run") == rows(undisturbed)
    assert rows(output / "run", "eval") == rows(undisturbed, "eval")
    found, expected = state(output / "run"), state(undisturbed)
    for name, tensor in expected["student"].items():
        assert torch.equal(found["student"][name], tensor), name
    for index, moments in expected["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(found["optimizer"]["state"][index][name], tensor)


def test_continued_on_one_process_it_is_equal_to_rounding(tiny, undisturbed, tmp_path) -> None:
    """That is, ranks take the steps of one process: the samples, losses and weights of its steps."""
    output = as_killed_at(undisturbed, 3, tmp_path)
    run(HYBRID, hybrid_words(tiny, output), tmp_path / "said", 1)
    assert_equal_runs(output / "run", undisturbed)


def assert_equal_runs(one: Path, other: Path) -> None:
    for kind in ("train", "eval"):
        for row, expected in zip(rows(one, kind), rows(other, kind), strict=True):
            for name in ("loss", "ce", "kd", "val_loss_student"):
                one_value, other_value = row.get(name) or 0.0, expected.get(name) or 0.0
                assert one_value == pytest.approx(other_value, rel=1e-6), (name, row["step"])
            assert {type: found.get("tokens") for type, found in row["by_type"].items()} == {
                type: found.get("tokens") for type, found in expected["by_type"].items()
            }
    assert metadata(one)["tokens_seen"] == metadata(other)["tokens_seen"]
    found, expected = state(one)["student"], state(other)["student"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_fresh_run_of_one_process_can_have_the_steps_of_several(tiny, undisturbed, tmp_path) -> None:
    """``undisturbed`` has two by default; and three."""
    three = tmp_path / "three"
    run(HYBRID, hybrid_words(tiny, three, max_steps=3), tmp_path / "said", 3)
    for count, several in ((2, undisturbed), (3, three / "run")):
        alone = tmp_path / f"alone-{count}"
        options = {"draw_group": count, "grad_accum": count, "max_steps": 6 if count == 2 else 3}
        run(HYBRID, hybrid_words(tiny, alone, **options), alone / "said", 1)
        assert_equal_runs(alone / "run", several)
        kept = metadata(alone / "run")
        assert (kept["run"]["group_size"], kept["versions"]["order"]) == (count, 2)


def test_three_ranks_on_hosts_of_their_own_take_the_steps_of_one_process(tiny, tmp_path) -> None:
    """They share no folder: the first alone has the checkpoint that is resumed, and sees the run's directory."""
    options = {"train_steps": 4, "eval_every": 2, "save_every": 2, "grad_accum": 3, "batch_size": 2, "data_cache": None}
    before = tmp_path / "before"
    run(ANNEALING, anneal_words(tiny, before, **{**options, "train_steps": 2}), tmp_path / "said", 1)
    (tmp_path / "apart" / "host-0").mkdir(parents=True)
    shutil.copytree(before, tmp_path / "apart" / "host-0" / "before")
    words = anneal_words(tiny, "after", resume_gcs_uri="before/last.pt", **options)
    ranks = launch(ANNEALING, words, tmp_path / "apart", 3, apart=True)
    assert wait(ranks) == [0, 0, 0], "\n".join(rank.said for rank in ranks)
    words = anneal_words(tiny, tmp_path / "one", resume_gcs_uri=before / "last.pt", **options)
    run(ANNEALING, words, tmp_path / "said", 1)
    assert_equal_runs(tmp_path / "apart" / "host-0" / "after", tmp_path / "one")
    for host in ("host-1", "host-2"):
        assert [one.name for one in (tmp_path / "apart" / host).iterdir()] == ["cache"], "the main rank has the files"


def test_a_stop_that_one_rank_is_asked_for_stops_all_at_one_step(tiny, tmp_path) -> None:
    ranks = launch(HYBRID, hybrid_words(tiny, tmp_path, max_steps=2000, save_every=0, eval_every=0), tmp_path / "said")
    wait_for_rows(tmp_path / "run", 2)
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    assert wait(ranks) == [75, 75], "\n".join(rank.said for rank in ranks)
    assert ranks[0].said.count("stopped at step") == 1
    assert "error" not in ranks[1].said
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == rows(tmp_path / "run")[-1]["step"]
    assert len(list((tmp_path / "run").glob("step-*.pt"))) == 1


def wait_for_rows(folder: Path, count: int, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count('"train"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError("no rows")


def test_a_rank_that_is_killed_ends_the_others_and_the_last_checkpoint_stays(tiny, tmp_path) -> None:
    ranks = launch(HYBRID, hybrid_words(tiny, tmp_path, max_steps=2000, eval_every=0), tmp_path / "said")
    wait_for_rows(tmp_path / "run", 5)
    ranks[1].process.kill()
    killed = time.monotonic()
    assert wait(ranks) == [6, -signal.SIGKILL]
    assert time.monotonic() - killed < 30
    assert "another process of this run has ended" in ranks[0].said
    assert "Traceback" not in ranks[0].said
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert state(tmp_path / "run", found.path.stem)["student"]


def is_real(batch) -> bool:
    """Of a step: neither of the memory model, whose tensors have no values, nor of an evaluation."""
    return type(batch.input_ids) is torch.Tensor and torch.is_grad_enabled()


def lose_a_number() -> None:
    """The second loss is not a number, though its gradient is."""
    forward, calls = Student.forward, []

    def broken(self, batch, *given):
        output = forward(self, batch, *given)
        calls.extend([1] * is_real(batch))
        if len(calls) != 2:
            return output
        return dataclasses.replace(output, loss=output.loss + (torch.tensor(float("nan")) - output.loss.detach()))

    Student.forward = broken


def test_a_loss_that_is_no_number_on_one_rank_ends_all(tiny, tmp_path) -> None:
    words = hybrid_words(tiny, tmp_path, save_every=1, eval_every=0)
    ranks = launch(HYBRID, words, tmp_path / "said", fault=(1, lose_a_number))
    assert wait(ranks) == [5, 5], "\n".join(rank.said for rank in ranks)
    assert ranks[1].said.count("not finite") == 1
    assert "error" not in ranks[0].said
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 1


def run_out_of_memory() -> None:
    """In the second step there is no room for two rows on one rank."""
    forward, calls = Student.forward, []

    def broken(self, batch, *given):
        calls.extend([1] * is_real(batch))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, batch, *given)

    if os.environ["RANK"] == "1":
        Student.forward = broken


def run_out_of_memory_in_backward() -> None:
    """The same at the twelfth gradient, when sums of others are under way."""
    step_sums._BUCKET_BYTES = 2**13
    forward, calls, found = Student.forward, [], []

    def fail(_):
        found.extend([1] * (len(calls) == 2))
        if len(calls) == 2 and len(found) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def broken(self, batch, *given):
        calls.extend([1] * is_real(batch))
        if len(calls) == 1:
            for one in self.parameters():
                one.register_post_accumulate_grad_hook(fail)
        return forward(self, batch, *given)

    if os.environ["RANK"] == "1":
        Student.forward = broken


@pytest.mark.parametrize("fault", [run_out_of_memory, run_out_of_memory_in_backward])
def test_a_cut_that_one_rank_makes_is_made_by_all_and_changes_nothing(tiny, undisturbed, tmp_path, fault) -> None:
    ranks = launch(HYBRID, hybrid_words(tiny, tmp_path), tmp_path / "said", fault=(None, fault))
    assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    assert "cut in two" in ranks[1].said
    assert_equal_runs(tmp_path / "run", undisturbed)
    assert metadata(tmp_path / "run")["run"]["max_pass_tokens"] == 64  # the main rank's own passes all fitted


def test_killed_between_the_last_evaluation_and_the_end_no_rank_waits(tiny, undisturbed, tmp_path) -> None:
    """The main rank alone can read that the evaluation is done; nothing is evaluated twice, and nobody hangs."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    for name in ("final.pt", "final.meta.json"):
        (tmp_path / "run" / name).unlink()
    run(HYBRID, hybrid_words(tiny, tmp_path), tmp_path / "said")
    assert rows(tmp_path / "run", "eval") == rows(undisturbed, "eval")
    assert (tmp_path / "run" / "student").is_dir()
    assert (tmp_path / "run" / "final.pt").exists()


def be_killed_between_evaluation_and_save() -> None:
    """Of the sixth step: its rows are written, and nothing of its checkpoint."""
    save = Recorder._save

    def killed(self, **given):
        if self.parts.progress.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, **given)

    Recorder._save = killed


def test_killed_between_an_evaluation_and_its_save_it_goes_on_as_if_nothing_had_been(
    tiny, undisturbed, tmp_path
) -> None:
    fault = (0, be_killed_between_evaluation_and_save)  # the main rank, which the others have met through
    ranks = launch(HYBRID, hybrid_words(tiny, tmp_path), tmp_path / "said", fault=fault)
    assert wait(ranks) == [-signal.SIGKILL, 6], "\n".join(rank.said for rank in ranks)
    assert ranks[1].said.count("another process of this run has ended") == 1
    assert "Traceback" not in ranks[1].said
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 3
    assert rows(tmp_path / "run", "eval")[-1]["step"] == 6, "or this is not the moment that is meant"
    run(HYBRID, hybrid_words(tiny, tmp_path), tmp_path / "said")
    for kind in ("train", "eval"):
        assert rows(tmp_path / "run", kind) == rows(undisturbed, kind)
    for name, tensor in state(undisturbed)["student"].items():
        assert torch.equal(state(tmp_path / "run")["student"][name], tensor), name


def test_a_rank_that_fails_while_starting_ends_all_with_its_message(tiny, tmp_path) -> None:
    """A host lacks the texts."""
    words = [hybrid_words(tiny, tmp_path), hybrid_words(tiny, tmp_path, dataset_manifest=tmp_path / "none.jsonl")]
    ranks = launch(HYBRID, words, tmp_path / "said", apart=True)
    assert wait(ranks) == [4, 4], "\n".join(rank.said for rank in ranks)
    assert ranks[1].said.count("none.jsonl") == 1
    assert "error" not in ranks[0].said


def test_a_mistake_is_said_once_and_nothing_is_made(tiny, tmp_path) -> None:
    words = hybrid_words(tiny, tmp_path / "out", grad_accum=3)
    ranks = launch(HYBRID, words, tmp_path / "said")
    assert wait(ranks) == [2, 2]
    expected = "--grad_accum=3: the micro-batches of a step cannot be dealt out among the processes"
    assert expected in ranks[0].said
    assert "error" not in ranks[1].said
    assert not (tmp_path / "out" / "run" / "metrics.jsonl").exists()
