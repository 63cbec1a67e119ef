"""What programs may call: ``liquid_llm``'s own names, a store read by hand, whole runs that leave nothing behind."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.support.models import tiny_model
from tests.support.readme import REPOSITORY
from tests.support.tiny import Tiny
from torch.nn import functional as F

import liquid_llm
from liquid_llm.cli.main import main
from liquid_llm.errors import ModelError, SignalError, StorageError, UsageError
from liquid_llm.losses.signals import LogitsSignal
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.terminal import setup_logging

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stores(scored: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The teacher's signal of the maths by codec: ``tail`` one file a sample, ``full`` in shards."""
    found = {codec: str(tmp_path_factory.mktemp(codec)) for codec in ("tail", "full")}
    for codec, layout in (("tail", "pt"), ("full", None)):
        given = {"math_logits_dir": found[codec], "code_logits_dir": None, "signal": "code=none"}
        assert main(["capture", *scored.capture_words(**given, codec=codec, logits_format=layout)]) == 0
    return found


def options(scored: Tiny, output: Path, **more: Any) -> dict[str, Any]:
    """Options of a run of two steps, as Python values."""
    words = [word[2:].partition("=") for word in scored.train_words(output)]
    given: dict[str, Any] = {name: value for name, _, value in words}
    given |= {"max_steps": 2, "warmup_steps": 0, "eval_every": 2, "trackers": "none", "betas": (0.9, 0.95)}
    return {**given, "hybrid_strict": False, "output_gcs_uri": output, "lr": 1e-2, "run_id": "run", **more}


def state_of_the_process() -> dict[str, Any]:
    """What a run might leave behind in the process that called it."""
    names = ("", "liquid_llm", "gcsfs", "torchao")
    return {
        "signals": [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "loggers": [(logging.getLogger(one).level, list(logging.getLogger(one).handlers)) for one in names],
        "environment": dict(os.environ),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # type: ignore[union-attr]
        "threads": sorted(one.name for one in threading.enumerate()),
        "hooks": (sys.excepthook, threading.excepthook),
        "torch": (torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.is_grad_enabled()),
    }


@contextmanager
def untouched() -> Iterator[None]:
    """The process is as it was at the end, whatever happened in it."""
    setup_logging()  # a handler of the name of ours that was there before
    for name in ("PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "DISABLE_SAFETENSORS_CONVERSION"):
        os.environ.pop(name, None)
    before = state_of_the_process()
    yield
    after = state_of_the_process()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


def test_importing_it_brings_in_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import liquid_llm\n"
        "assert set(liquid_llm.__all__) <= set(dir(liquid_llm))\n"
        "from liquid_llm import LiquidError, errors\n"
        "heavy = {'torch', 'numpy', 'transformers', 'fsspec', 'yaml', 'rich', 'argparse'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_its_names_are_there_and_no_others() -> None:
    for name in liquid_llm.__all__:
        assert getattr(liquid_llm, name) == getattr(liquid_llm, name)
    assert {type(getattr(liquid_llm, name)).__name__ for name in ("codecs", "errors", "losses")} == {"module"}
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = liquid_llm.distil


def test_a_run_from_a_mapping_and_from_a_file_is_the_commands(scored: Tiny, tmp_path: Path) -> None:
    with untouched():
        run = liquid_llm.distill(options(scored, tmp_path / "mapping"))
    assert (run.folder, run.output) == (tmp_path / "mapping" / "run", str(tmp_path / "mapping" / "run"))
    assert run.summary["steps"] == 2
    assert {row["type"] for row in run.summary["rows"]} >= {"lm", "math_tool", "code"}
    assert (run.student / "config.json").is_file()
    assert run.report.is_file()
    plain = {name: _as_yaml(value) for name, value in options(scored, tmp_path / "file").items()}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**plain, "accept_changes": None}))
    again = liquid_llm.distill(path)
    rows = [without_timings(row) for row in run.metrics()]
    assert [row["kind"] for row in rows] == ["eval", "train", "train", "eval"]
    assert (
        rows
        == [without_timings(row) for row in again.metrics()]
        == [without_timings(row) for row in read_metrics(again.folder)]
    )
    assert liquid_llm.distill(path).summary == again.summary, "a run that is done is given as it is"


def _as_yaml(value: object) -> object:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def test_what_is_wrong_is_raised_and_nothing_is_left(
    scored: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = options(scored, tmp_path)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"max_stepz": 3}, UsageError, "Did you mean --max_steps"),
        ({"lr": "fast"}, UsageError, "expected a number"),
        ({"dry_run": True}, UsageError, "a dry run trains nothing"),
        ({"max_steps": 0}, UsageError, "no step was left"),
        ({"dataset_manifest": tmp_path / "none.jsonl"}, StorageError, "none.jsonl"),
        ({"student": "liquid-16n"}, ModelError, "liquid-16n"),
        ({"math_logits_dir": tmp_path / "empty"}, SignalError, "no signal store"),
    ]
    for changes, kind, words in wrong:
        with untouched(), pytest.raises(kind, match=words):
            liquid_llm.distill({**good, **changes})
    with pytest.raises(UsageError, match="no command that trains"):
        liquid_llm.distill(good, command="capture")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cannot read .*absent.yaml|absent.yaml"):
        liquid_llm.distill(tmp_path / "absent.yaml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun"):
        liquid_llm.distill(good)


def test_no_secret_is_in_what_is_raised(scored: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "tok-5sJ0rq8e")
    with pytest.raises(StorageError) as raised:
        liquid_llm.distill(options(scored, tmp_path, dataset_manifest=tmp_path / "tok-5sJ0rq8e" / "none.jsonl"))
    assert "tok-5sJ0rq8e" not in str(raised.value)
    assert "none.jsonl" in str(raised.value)


def test_a_run_that_is_stopped_raises_and_goes_on(
    scored: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liquid_llm.training import Trainer

    step = Trainer.step

    def last_step(self: Trainer, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C in the middle of a step
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", last_step)
        with untouched(), pytest.raises(liquid_llm.errors.Interrupted, match="step 1 of 2"):
            liquid_llm.distill(options(scored, tmp_path))
    run = liquid_llm.distill(options(scored, tmp_path))
    assert [row["step"] for row in run.metrics() if row["kind"] == "train"] == [1, 2]


@pytest.mark.parametrize("codec", ["tail", "full"])
def test_a_store_gives_what_the_teacher_says(codec: str, stores: dict[str, str], scored: Tiny) -> None:
    """Checked with the teacher itself: codec ``full`` to rounding, ``tail`` where it says that it is exact."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scored.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(scored.teacher)
    texts = {row["sample_id"]: row["text"] for row in _rows(scored.root / "math_tool.jsonl")}
    with liquid_llm.open_store(stores[codec]) as store:
        assert len(store) == len(texts) == 40
        assert store.describe()["codec"] == codec
        name = "math_tool-7"
        assert name in store
        assert "another" not in store
        with pytest.raises(KeyError):
            store["another"]
        record = store[name]
        ids = _framed(tokenizer, texts[name], store.describe())[: record.num_tokens]
        with torch.no_grad():
            truth = F.log_softmax(teacher(torch.tensor([ids])).logits[0].float() / 2.0, dim=-1).numpy()
        arrays, signal = record.arrays(temperature=2.0), record.signal(temperature=2.0)
        assert signal.num_positions == len(record.positions) == len(ids) - 1
        told = truth[record.positions]
        if isinstance(signal, LogitsSignal):
            assert np.abs(arrays["log_probs"] - told[:, : signal.vocab_size]).max() < 0.1
        else:
            known = np.take_along_axis(told, arrays["ids"], axis=1)
            assert arrays["exact"].any(axis=1).all()
            assert np.abs(arrays["log_probs"] - known)[arrays["exact"]].max() < 0.1
        assert {one.sample_id for one in store.records()} == set(texts)
        assert [one.sample_id for one in store.records(limit=2)] == [one.sample_id for one in store.records()][:2]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(line) for line in path.read_text().splitlines()]


def _framed(tokenizer: Any, text: str, about: dict[str, Any]) -> list[int]:
    ends = [[] if about[name] is None else [about[name]] for name in ("begin_id", "end_id")]
    return [*ends[0], *tokenizer(text, add_special_tokens=False)["input_ids"], *ends[1]]


@pytest.mark.parametrize("codec", ["tail", "full"])
def test_a_store_becomes_a_table(codec: str, stores: dict[str, str]) -> None:
    with liquid_llm.open_store(stores[codec]) as store:
        table = store.to_pandas(temperature=1.5, top=3, limit=4)
        records = {one.sample_id: one for one in store.records(limit=4)}
        assert set(table["sample_id"]) == set(records)
        for (name, position), rows in table.groupby(["sample_id", "position"]):
            assert list(rows["rank"]) == list(range(len(rows)))
            assert rows["log_prob"].is_monotonic_decreasing
            assert rows["token_id"].is_unique
            assert position in records[name].positions
        places = table.groupby("sample_id")["position"].nunique()
        assert {name: len(record.positions) for name, record in records.items()} == places.to_dict()
        with pytest.raises(ValueError, match="top"):
            store.to_pandas(top=0)


def test_a_damaged_record_is_said_to_be(stores: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(stores["tail"]).glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    record = next(copy.glob("*.pt"))
    record.write_bytes(record.read_bytes()[:200])
    with liquid_llm.open_store(str(copy)) as store, pytest.raises(SignalError, match="capture again"):
        list(store.records())


@pytest.mark.parametrize("name", liquid_llm.codecs.codec_names())
def test_a_codec_answers_at_the_temperature_of_its_capture(name: str) -> None:
    logits = 3 * torch.randn(5, 40, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3))
    kept = logits.clone()
    encoded = liquid_llm.codecs.encode(logits, name, seed=1)
    assert torch.equal(logits, kept)
    assert encoded.nbytes == sum(tensor.nbytes for tensor in encoded.payload.values()) > 0
    signal, truth = encoded.decode(1.0), F.log_softmax(logits.float(), dim=-1)
    assert signal.num_positions == 5
    if isinstance(signal, LogitsSignal):
        assert (F.log_softmax(signal.rows.float(), dim=-1) - truth).abs().max() < 0.02
    else:
        assert (signal.weights.sum(dim=1) + signal.tail_mass - 1).abs().max() < 0.5
        exact = (
            torch.arange(signal.ids.shape[1])
            < (torch.zeros(5) if signal.num_exact is None else signal.num_exact)[:, None]
        )
        assert (signal.log_probs - truth.gather(1, signal.ids))[exact].abs().sum() < 0.1 * exact.sum() + 1e-6
    again = liquid_llm.codecs.encode(logits, encoded.codec, seed=1)
    assert all(torch.equal(value, again.payload[part]) for part, value in encoded.payload.items())


def test_logits_that_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match=r"\[positions, vocab\]"):
        liquid_llm.codecs.encode(torch.zeros(3))
    with pytest.raises(SignalError, match="unknown codec"):
        liquid_llm.codecs.encode(torch.zeros(1, 3), "tails")
    with pytest.raises(ValueError, match="options"):
        liquid_llm.codecs.encode(torch.zeros(1, 3), liquid_llm.codecs.get_codec("topk"), k=3)


@pytest.mark.usefixtures("demo_folder")
def test_what_the_page_shows_runs(scored: Tiny) -> None:
    """Its blocks in their order, in a folder where the places they name are; only sizes are small."""
    page = (REPOSITORY / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    small = {'"liquid-16m"': repr(str(scored.student)), '"max_steps": 200': '"max_steps": 2', "256": "32"}
    for usual, less in small.items():
        assert usual in blocks[0]
        blocks[0] = blocks[0].replace(usual, less)
    known: dict[str, Any] = {
        "student": tiny_model("llama", 64),
        "teacher": tiny_model("llama", 64, seed=1),
        "input_ids": torch.randint(64, (2, 9)),
        "logits": torch.randn(3, 64),
    }
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), known)
    assert known["run"].student.is_dir()
    assert known["student"].lm_head.weight.grad is not None
    assert known["record"].sample_id == "math_tool-7"
    assert len(known["table"]) > 100
    assert len(list(Path("runs/units/done").iterdir())) == 1
    assert known["encoded"].nbytes > 0
