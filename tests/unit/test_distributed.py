"""The seam for several processes, proved with a pretend world: two engines in threads of one process, each with half of
the micro-batches, take the steps, write the rows and evaluate as one process does."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.datasets import token_dataset
from tests.support.models import tiny_model
from tests.support.ranks import ThreadEngine, World

from liquid_llm.cli.main import main
from liquid_llm.data.loader import TrainingStream, WeightedDataset
from liquid_llm.data.types import MicroBatch
from liquid_llm.distributed import Engine, Ranks, deal, deal_on_host, join_engine, start_engine
from liquid_llm.errors import NumericalError, UsageError
from liquid_llm.evaluation import Evaluator
from liquid_llm.metrics import StepAccumulator
from liquid_llm.optimizers import build_optimizer
from liquid_llm.schedules import Constant, StepSchedules
from liquid_llm.teachers.router import TeacherRouter
from liquid_llm.training import Progress, Student, Trainer

VOCAB, STEPS, GRAD_ACCUM = 512, 3, 4
SCHEDULES = StepSchedules(Constant(0.5), Constant(1.0), Constant(0.0), Constant(1e-2))


@pytest.fixture(scope="module", autouse=True)
def model() -> Any:
    """Made before any thread begins: making one is no matter for several threads at once."""
    model = tiny_model("llama")
    model(torch.zeros(1, 2, dtype=torch.int64))
    return model


def mixture() -> list[WeightedDataset]:
    """Whole samples and blocks, of unequal numbers of tokens."""
    random = np.random.default_rng(0)
    texts = {
        type: [random.integers(1, VOCAB, n).tolist() for n in random.integers(2, 40, 30)] for type in ("lm", "code")
    }
    names = {type: [f"{type}-{n}" for n in range(30)] for type in texts}
    return [WeightedDataset(token_dataset(samples, type, names[type]), 1.0) for type, samples in texts.items()]


def stream(engine: Engine) -> TrainingStream:
    return TrainingStream(
        mixture(), block_size=16, batch_size=2, seed=3, rank=engine.rank, world_size=engine.world_size
    )


def train(model: Any, engine: Engine) -> dict[str, Any]:
    """Some steps of a rank: what a run would keep of them."""
    model = copy.deepcopy(model)
    order, types, rows = stream(engine), [], []
    accumulator = StepAccumulator(("lm", "code"), engine)

    def batches():
        position = 0
        while True:
            batch = order.micro_batch(position)
            types.append(batch.type)
            yield batch, None
            position += 1

    def count(result):
        for one in result.scored:
            accumulator.add(one.batch.type, one.output, tokens=one.batch.num_tokens)
        rows.append(accumulator.row(seconds=1.0, grad_norm=result.grad_norm))

    progress = Progress()
    trainer = Trainer(
        Student(model, torch.float32),
        build_optimizer(model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
        SCHEDULES,
        batches(),
        progress,
        STEPS,
        GRAD_ACCUM,
        1.0,
        hooks=[(count, 1)],
        engine=engine,
    )
    assert trainer.train()
    weights = [parameter.detach() for parameter in model.parameters()]
    return {"weights": weights, "rows": rows, "types": types, "progress": vars(progress)}


def assert_equal_rows(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_equal_rows(got[key], expected[key])
    else:
        assert got == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_take_the_steps_of_one_process(size: int, model: Any) -> None:
    one, ranks = train(model, Engine()), World(size).run(partial(train, model))
    assert len(set(one["types"])) == 2, "else this shows nothing of types"
    for rank, found in enumerate(ranks):
        assert found["types"] == one["types"][rank::size][: len(found["types"])], "one order between them"
        assert found["progress"] | {"passes": None} == one["progress"] | {"passes": None}
        assert_equal_rows(dict(enumerate(found["rows"])), dict(enumerate(one["rows"])))
        for mine, theirs, first in zip(found["weights"], one["weights"], ranks[0]["weights"], strict=True):
            assert torch.equal(mine, first), "ranks never drift apart"
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_evaluate_as_one_process(size: int, model: Any) -> None:
    def evaluate(engine: Engine) -> dict[str, object]:
        order = stream(Engine())
        found: dict[str, list[MicroBatch]] = {"lm": [], "code": []}
        for position in range(9):
            batch = order.micro_batch(position)
            found[batch.type].append(batch)
        return Evaluator({16: found}, 16, (16,), TeacherRouter({}), engine=engine, measures=True)(
            Student(copy.deepcopy(model), torch.float32)
        )

    expected = evaluate(Engine())
    assert "val_calibration" in expected["by_type"]["code"]
    for found in World(size).run(evaluate):
        assert_equal_rows(found, expected)


def test_all_ranks_stop_when_one_cannot_go_on(model: Any) -> None:
    def fail_on_rank_1(engine: Engine) -> str:
        student = Student(copy.deepcopy(model), torch.float32)
        optimizer = build_optimizer(student.model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        order = stream(engine)
        batches = ((order.micro_batch(position), None) for position in range(9))
        trainer = Trainer(student, optimizer, SCHEDULES, batches, Progress(), 1, 2, 0.0, engine=engine)
        if engine.rank == 1:  # its loss alone is not a number; its gradient is
            forward = student.forward
            student.forward = lambda *given: _with_nan(forward(*given))
        with pytest.raises(NumericalError):
            trainer.step()
        return "raised"

    assert World(2).run(fail_on_rank_1) == ["raised", "raised"]


def _with_nan(output: Any) -> Any:
    return replace(output, loss=output.loss + (torch.tensor(float("nan")) - output.loss.detach()))


def test_ranks_differ_in_who_is_the_main_one() -> None:
    assert Engine().is_main
    assert [ThreadEngine(rank, World(2)).is_main for rank in (0, 1)] == [True, False]


def test_micro_batches_that_do_not_divide_among_the_ranks_are_refused(model: Any) -> None:
    student = Student(model, torch.float32)
    with pytest.raises(ValueError, match="3 micro-batches cannot be dealt out among 2 ranks"):
        Trainer(student, None, SCHEDULES, iter(()), Progress(), 1, 3, 1.0, engine=ThreadEngine(0, World(2)))


@pytest.mark.parametrize("value", ["1", "", " 1 "])
def test_one_process_started_by_a_launcher_is_a_world_of_one(value: str) -> None:
    engine = start_engine({"WORLD_SIZE": value, "RANK": "0"})
    assert (engine.rank, engine.world_size, engine.is_main) == (0, 1, True)
    assert start_engine({}).world_size == 1


def test_a_job_of_one_process_refuses_several_in_words() -> None:
    with pytest.raises(UsageError, match=r"WORLD_SIZE.*several processes.*got 2.*torchrun") as caught:
        start_engine({"WORLD_SIZE": "2"})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("face", ["train", "anneal"])
def test_several_processes_without_a_place_to_meet_end_before_anything_is_made(
    face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    words = ["--dataset_manifest=m.jsonl"] if face == "train" else ["--teacher_name=t", "--dataset_name=d"]
    assert main([face, f"--output_gcs_uri={tmp_path / 'run'}", "--device=cpu", *words]) == 2
    said = capsys.readouterr().err
    assert "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT" in said
    assert "torchrun" in said
    assert not list(tmp_path.iterdir())


def test_what_a_launcher_says_is_read_and_what_is_no_rank_is_refused() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Ranks.read({**given, "MASTER_ADDR": "host", "MASTER_PORT": "29500"}) == Ranks(5, 8, 1, 4, "host:29500")
    assert Ranks.read({}) == Ranks(0, 1, 0, 1, "")
    for wrong in ({"RANK": "8"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}):
        with pytest.raises(UsageError, match="not a rank of a world"):
            Ranks.read({**given, **wrong})


def test_numbers_are_gathered_by_rank_and_a_limit_of_one_is_that_of_all() -> None:
    assert World(3).run(lambda engine: engine.gather(2.5 * engine.rank)) == [[0.0, 2.5, 5.0]] * 3
    assert World(2).run(lambda engine: engine.smallest(None if engine.is_main else 64)) == [64, 64]
    assert World(2).run(lambda engine: engine.smallest(None)) == [None, None]
    assert World(2).run(lambda engine: engine.smallest(0 if engine.is_main else 64)) == [0, 0]


def test_what_ranks_have_is_collected_by_rank() -> None:
    def work(engine: Engine) -> list[Any]:
        return engine.collect({"rank": engine.rank, "words": ["ä"] * engine.rank, "tensor": torch.ones(engine.rank)})

    for found in World(3).run(work):
        assert [one["rank"] for one in found] == [0, 1, 2]
        assert [one["words"] for one in found] == [[], ["ä"], ["ä", "ä"]]
        assert [len(one["tensor"]) for one in found] == [0, 1, 2]
    assert Engine().collect(5) == [5]
    assert World(2).run(lambda engine: deal([1, 2, 3], engine)) == [[1, 3], [2]]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "MASTER_ADDR=127.0.0.1, but WORLD_SIZE is not set"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "srun has started 8 processes, but WORLD_SIZE is not set"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({}, ""),
    ],
)
def test_a_process_that_a_launcher_leaves_alone_says_so(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `accelerate launch --num_processes=2` without --multi_gpu does, and srun without ranks."""
    for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert join_engine(torch.device("cpu")).world_size == 1
    assert (said in caplog.text) if said else not caplog.text


def test_the_ranks_of_a_host_share_what_it_has_to_do() -> None:
    works = list(range(23))
    assert list(deal_on_host(works, Engine())) == works
    for hosts, size, teachers in ((1, 3, 0), (2, 4, 0), (2, 4, 1), (3, 1, 0)):
        begun = set()
        for host in range(hosts):
            done: list[int] = []
            for local in range(size):
                ranks = Ranks(host * size + local, hosts * size, local, size, "")
                engine = Engine()
                engine.rank, engine.world_size = ranks.rank, ranks.world_size - teachers
                engine.host_rank, engine.host_size = ranks.on_host(teachers)
                if engine.rank >= engine.world_size:
                    assert ranks.on_host(teachers) == (0, 1), "one that holds a teacher has a world of its own"
                    continue
                own = deal_on_host(works, engine)
                begun.add(own[0])
                done += own
            assert sorted(done) == works
        assert len(begun) == hosts * size - teachers, "hosts begin at other places"
    assert list(deal_on_host([], engine)) == []
