"""What a run's ranks record: all of them count, score and decide together, the main one alone writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.support.ranks import World

from liquid_llm.distributed import Engine
from liquid_llm.framing import Framing
from liquid_llm.losses import LossOutput, Objective
from liquid_llm.metrics import StepAccumulator
from liquid_llm.schedules import StepValues
from liquid_llm.training import Progress
from liquid_llm.wiring.recorder import Recorder
from liquid_llm.wiring.speech import Speech


class Written:
    """Stands for the metrics, the checkpoint store and the uploader: what was asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def write(self, kind: str, step: int, row: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((kind, step, row.get("loss", row.get("val_loss_student"))))
        return row

    def sync(self) -> None:
        self.calls.append(("sync",))

    def save(self, state: dict[str, Any], metadata: Any, *, kind: str, also_as: tuple[str, ...]) -> Any:
        self.calls.append((kind, metadata.step, also_as, state["accumulator"]["sums"][0][0]))
        return SimpleNamespace(step=metadata.step, names=also_as)

    def publish_as(self, info: Any, names: tuple[str, ...]) -> Any:
        self.calls.append(("publish", info.step, names))
        return info

    def enqueue_checkpoint(self, info: Any) -> None:
        self.calls.append(("upload", info.step))


class Plain(Recorder):
    """Metadata is another's subject."""

    def metadata(self) -> Any:
        return SimpleNamespace(step=self.parts.progress.step, lr=0.1)


class Evaluate:
    def __init__(self) -> None:
        self.sets = {8: {"lm": [1]}}

    def __call__(self, student: Any) -> dict[str, Any]:
        return {"val_loss_student": 2.0}


def recorder(engine: Engine, folder: Path, clock: Any) -> tuple[Plain, Written]:
    written = Written()
    written.run_dir = folder
    config = SimpleNamespace(
        output=SimpleNamespace(metrics_every_steps=1, save_every_steps=0, save_every_minutes=1),
        optimizer=SimpleNamespace(steps=3, peak=0.1),
        evaluation=SimpleNamespace(every_steps=0),
    )
    module = SimpleNamespace(state_dict=dict)
    parts = SimpleNamespace(
        engine=engine,
        accumulator=StepAccumulator(("lm",), engine),
        evaluator=Evaluate(),
        speech=Speech(tokenizer=None, framing=Framing(None, 0), end_ids=()),
        progress=Progress(),
        student=SimpleNamespace(model=module),
        optimizer=module,
        device=torch.device("cpu"),
    )
    return Plain(config, parts, written, written, written, waited=lambda: 0.0, clock=clock), written


def test_the_main_rank_alone_writes_what_all_have_summed_and_one_clock_is_enough_to_save(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("liquid_llm.wiring.recorder.describe_metadata", lambda metadata: "")

    def work(engine: Engine) -> tuple[list[Any], float]:
        now = [0.0]
        one, written = recorder(engine, tmp_path, lambda: now[0])
        stage = SimpleNamespace(advance=lambda: None, note=lambda _: None)
        for step in (1, 2):
            now[0] += 70.0 if engine.rank == 1 and step == 2 else 1.0  # one rank's minute is over
            one.parts.progress.step = step
            zero = torch.zeros(())
            output = LossOutput(torch.tensor(1.0 + engine.rank), zero, zero, zero, num_positions=1, num_signal=0)
            batch = SimpleNamespace(type="lm", num_tokens=2, num_learnt=2, padded_tokens=2)
            result = SimpleNamespace(
                step=step,
                values=StepValues(0.1, Objective()),
                grad_norm=1.0,
                scored=[SimpleNamespace(batch=batch, output=output)],
            )
            for hook, _ in one.hooks(stage):
                hook(result)
        one.evaluate()
        one.finish()
        return written.calls, one.parts.progress.best_val_loss

    (main, best), (other, other_best) = World(2).run(work)
    assert other == []
    assert best == other_best == 2.0
    assert main == [
        ("train", 1, 1.5),
        ("train", 2, 1.5),
        ("sync",),
        ("time", 2, ("last",), 0.0),
        ("upload", 2),
        ("eval", 2, 2.0),
        ("sync",),
        ("step", 2, ("last", "best"), 0.0),
        ("upload", 2),
        ("publish", 2, ("final",)),
        ("upload", 2),
    ]
