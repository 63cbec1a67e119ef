"""Every command in full on the pretend accelerator: what comes out is what comes out of the CPU.

Arithmetic is float32 on both, so losses differ by nothing but the order of sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.accelerator import NAME, install
from tests.support.annealing import anneal_words, make_world
from tests.support.tiny import Tiny, build

from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics, without_timings
from liquid_llm.training import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("accelerator")]

CODECS = {
    "tail": {"codec": "tail"},
    "full": {"codec": "full"},
    "topk": {"codec": "topk", "topk": 16},
    "sampled": {"codec": "sampled", "codec_options": "draws=32,temperature=2"},
}
FLOAT32 = {"precision": "float32", "teacher_precision": "float32"}
# A learning rate at which what rounding differs by does not grow from step to step.
SHORT = {
    "kd_temperature": 2,
    "max_steps": 4,
    "lr": 1e-3,
    "eval_every": 2,
    "save_every": 2,
    "eval_tokens": 192,
    "seed": 3,
    **FLOAT32,
}
DEVICES = ("cpu", NAME)
NOT_STORED = {"mc_teacher_id": None, "math_logits_dir": None, "code_logits_dir": None}
KINDS: dict[str, dict[str, object]] = {
    "online": {"hybrid": "false", **NOT_STORED},
    "online and stored, several lengths": {"eval_ctx_lens": "16,32,128"},
    "checkpointing, three micro-batches": {"grad_checkpoint": "true", "grad_accum": 3},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Texts and a teacher; the CPU's store of each codec in a folder of its name."""
    made = build(tmp_path_factory.mktemp("tiny"), teacher_steps=30)
    for codec in CODECS:
        capture(made, codec, made.root / codec, "cpu")
    return made


def command(device: str, words: list[str], code: int = 0) -> None:
    """A command that must end with ``code``, and compute on ``device``."""
    with install().record() as log:
        assert main([*words, f"--device={device}"]) == code
    assert (log.count("launch") > 0) == (device == NAME), "not computed where it was asked for"


def capture(tiny: Tiny, codec: str, folder: Path, device: str, **options: object) -> None:
    given = {**CODECS[codec], "logits_format": "pt", "teacher_precision": "float32", **options}
    words = tiny.capture_words(math_logits_dir=folder / "math", code_logits_dir=folder / "code", **given)
    command(device, ["capture", *words])


def stored(tiny: Tiny, codec: str) -> dict[str, object]:
    return {"math_logits_dir": tiny.root / codec / "math", "code_logits_dir": tiny.root / codec / "code"}


def no_teacher(tiny: Tiny) -> dict[str, object]:
    """Options of plain cross-entropy; the student is a model, as a shape alone has no tokenizer."""
    manifest = tiny.root / "texts.jsonl"
    manifest.write_text(json.dumps({"path": "lm.jsonl", "type": "lm", "weight": 1.0}) + "\n")
    return {"student": tiny.teacher, "lm_teacher_id": None, "dataset_manifest": manifest, **NOT_STORED}


def scoring(tiny: Tiny, kind: str) -> dict[str, object]:
    """Options of a run whose signal is of ``kind``."""
    if kind in CODECS:
        return {"hybrid": "false", "teacher_mode": "precomputed", "lm_teacher_id": None, **stored(tiny, kind)}
    return no_teacher(tiny) if kind == "no teacher" else KINDS[kind]


def train(tiny: Tiny, output: Path, device: str, **options: object) -> Path:
    """A run of four steps; its directory. On the device each step waits once, whatever it is that is trained."""
    given = {**SHORT, **stored(tiny, "topk"), **options}
    with each_step_waits_once(device):
        command(device, ["train", *tiny.train_words(output, **given)])
    return output / "run"


@contextmanager
def each_step_waits_once(device: str) -> Iterator[None]:
    """Whether all is finite is read from the device, once; all else that the host must know it knows beforehand."""
    step, waits, read = Trainer.step, [], []

    def counted(trainer: Trainer) -> object:
        with install().record() as log:
            result = step(trainer)
        waits.append(log.sites("wait"))
        read.append(log.nbytes("to_host"))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        yield
    assert waits
    for number, places in enumerate(waits if device == NAME else [], start=1):
        assert places.total() == 1, f"step {number} waits at {dict(places)}"
        assert next(iter(places)).startswith("liquid_llm/training.py:"), places
    assert max(read) < 100, "bytes a step"


def assert_same_rows(expected: Path, got: Path) -> None:
    """Every train and eval row says the same, up to 1e-5; what is not a loss says exactly the same."""
    rows = [[without_timings(row) for row in read_metrics(run)] for run in (expected, got)]
    assert [(row["kind"], row["step"]) for row in rows[0]] == [(row["kind"], row["step"]) for row in rows[1]]
    assert {row["kind"] for row in rows[0]} >= {"train", "eval"}
    for mine, theirs in zip(*rows, strict=True):
        assert_same(mine, theirs, f"{mine['kind']} row of step {mine['step']}")


def assert_same(expected: Any, got: Any, where: str) -> None:
    if isinstance(expected, dict):
        keys = {key for key in (*expected, *got) if not key.endswith("bytes")}
        assert keys <= {*expected} & {*got}, where
        for key in keys:
            assert_same(expected[key], got[key], f"{where}, {key}")
    elif isinstance(expected, float):
        assert math.isclose(expected, got, rel_tol=1e-5, abs_tol=1e-6), f"{where}: {expected} and {got}"
    else:
        assert expected == got, where


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_losses_of_the_cpu(tiny, tmp_path, kind):
    expected, got = (train(tiny, tmp_path / device, device, **KINDS[kind]) for device in DEVICES)
    assert_same_rows(expected, got)


def test_training_without_a_teacher_gives_the_losses_and_the_samples_of_the_cpu(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The first\nQuestion: what\nSo\n")
    asked = {"sample_prompts": prompts, "sample_tokens": 6, **scoring(tiny, "no teacher")}
    runs = [train(tiny, tmp_path / device, device, **asked) for device in DEVICES]
    assert_same_rows(*runs)
    assert {row["kd_coverage"] for row in read_metrics(runs[1]) if row["kind"] == "train"} == {0.0}
    expected, got = ((run / "samples.jsonl").read_text() for run in runs)
    assert expected == got
    assert len(got.splitlines()) == 9


@pytest.mark.parametrize("codec", ["tail", "full"])
def test_training_on_a_store_gives_the_losses_of_the_cpu(tiny, tmp_path, codec):
    """What all codecs but ``full`` store becomes the same signal, on the host; ``topk`` is in the tests above."""
    expected, got = (train(tiny, tmp_path / device, device, **scoring(tiny, codec)) for device in DEVICES)
    assert_same_rows(expected, got)
    coverages = {
        kind: part["kd_coverage"]
        for row in read_metrics(got)
        if row["kind"] == "train"
        for kind, part in row["by_type"].items()
    }
    assert coverages["math_tool"] == coverages["code"] == 1.0


def test_staying_near_the_old_logits_gives_the_losses_of_the_cpu(tiny, tmp_path):
    begun = train(tiny, tmp_path / "begun", NAME)
    near = {"resume_gcs_uri": begun / "student", "keep_old_logit_l2": 0.5, "keep_old_logit_l2_fade_step": 3}
    expected, got = (train(tiny, tmp_path / device, device, **near) for device in DEVICES)
    assert_same_rows(expected, got)
    assert any(row["l2"] > 0 for row in read_metrics(got) if row["kind"] == "train")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny, tmp_path, monkeypatch):
    """To the bit, in the usual precision; on the CPU other tests say so."""
    device, given = NAME, {**SHORT, **stored(tiny, "topk"), "precision": "bfloat16", "deterministic": "true"}
    whole = train(tiny, tmp_path / "whole", device, **given)
    step = Trainer.step

    def stop_after_one(trainer: Trainer) -> object:
        result = step(trainer)
        trainer.stopping = lambda: True
        return result

    words = ["train", *tiny.train_words(tmp_path / "cut", **given)]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stop_after_one)
        command(device, words, 75)
    command(device, words)
    for run in (whole, tmp_path / "cut" / "run"):
        assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == [1, 2, 3, 4]
    one, other = ([without_timings(row) for row in read_metrics(run)] for run in (whole, tmp_path / "cut" / "run"))
    assert one == other
    weights = [torch.load(run / "final.pt", weights_only=True)["student"] for run in (whole, tmp_path / "cut" / "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_run_begun_on_the_device_goes_on_on_the_cpu(tiny, tmp_path):
    for output, devices in (("same", ("cpu", "cpu")), ("moved", (NAME, "cpu"))):
        for device, steps in zip(devices, (2, 4), strict=True):
            train(tiny, tmp_path / output, device, max_steps=steps, warmup_steps=0, kd_anneal_pct=0.0)
    assert_same_rows(tmp_path / "same" / "run", tmp_path / "moved" / "run")


def test_in_bfloat16_the_losses_are_near_those_of_the_cpu(tiny, tmp_path):
    found = []
    for device, precision in (("cpu", "bfloat16"), (NAME, "auto")):
        given = {"precision": precision, "teacher_precision": precision, "grad_accum": 2}
        found.append(list(read_metrics(train(tiny, tmp_path / device, device, **given))))
    losses = [[row.get("loss", row.get("val_loss_student")) for row in rows] for rows in found]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    # Weights and their updates are float32 all the same.
    weights = torch.load(tmp_path / NAME / "run" / "final.pt", weights_only=True)["student"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["no teacher", *KINDS, "staying near", "tail", "full"])
def test_a_step_waits_for_the_device_once_in_bfloat16_too(tiny, tmp_path, kind):
    """In float32 the runs of the tests above do."""
    if kind == "staying near":
        begun = train(tiny, tmp_path / "begun", "cpu", max_steps=2, save_every=0)
        given: dict[str, object] = {"resume_gcs_uri": begun / "student", "keep_old_logit_l2": 0.5}
    else:
        given = scoring(tiny, kind)
    train(tiny, tmp_path, NAME, **{**given, "precision": "bfloat16", "eval_every": 0, "save_every": 0})


def test_a_teacher_on_a_stream_of_its_own_gives_the_same_run(accelerator, tiny, tmp_path):
    """Online and stored; what one stream has made the other uses behind a wait, or this device refuses it."""
    given = {"grad_accum": 2, "grad_checkpoint": "true", "max_steps": 3}
    runs = []
    for stream in ("false", "true"):
        used = accelerator.streams.ticks
        runs.append(train(tiny, tmp_path / stream, NAME, teacher_stream=stream, **given))
        beside = sum(accelerator.streams.ticks.values()) - sum(used.values()) - accelerator.streams.ticks[0] + used[0]
        assert (beside > 0) == (stream == "true")
    rows = [[without_timings(row) for row in read_metrics(run)] for run in runs]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("device", "given", "words"), [("cpu", {}, "one thing after another"), (NAME, {"teach": False}, "no teacher")]
)
def test_a_stream_that_could_do_nothing_is_refused(tiny, tmp_path, capsys, device, given, words):
    kind = {} if given else KINDS["online"]
    options = {**(no_teacher(tiny) if given else {}), **kind, "teacher_stream": "true", "max_steps": 1}
    assert main(["train", *tiny.train_words(tmp_path, **{**SHORT, **options}), f"--device={device}"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert ("train samples" in said) == (device != "cpu"), "what the device cannot do is known before texts are read"


def test_a_dry_run_says_what_it_says_on_the_cpu(tiny, tmp_path, capsys):
    said = []
    for device in DEVICES:
        capsys.readouterr()
        words = tiny.train_words(tmp_path / "none", **{**SHORT, **stored(tiny, "topk")})
        command(device, ["train", *words, "--dry_run"])
        said.append(json.loads(capsys.readouterr().out))
    assert not (tmp_path / "none").exists()
    one_step = [without_timings(report["one_step"]) for report in said]
    assert_same(*one_step, "one step")
    assert said[0]["signal"] == said[1]["signal"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_captured_on_the_device_is_that_of_the_cpu_byte_for_byte(tiny, tmp_path, codec):
    capture(tiny, codec, tmp_path, NAME)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.pt"))
    assert len(names) == 80
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny.root / codec / name).read_bytes(), name


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_is_verified_on_the_device(tiny, capsys, codec):
    capsys.readouterr()
    words = [f"--teacher={tiny.teacher}", f"--manifest={tiny.manifest}", f"--data_cache={tiny.root / 'tokens'}"]
    words += ["--teacher_precision=float32", "--samples=8", "--json"]
    command(NAME, ["store", "verify", str(tiny.root / codec / "math"), *words])
    found = json.loads(capsys.readouterr().out)
    assert (found["looked_at"], found["identical"], found["agrees"]) == (8, 8, True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Texts to anneal on, students' configurations and a teacher."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("student", ["gpt2", pytest.param("llama", marks=pytest.mark.soak)])
def test_annealing_with_a_change_of_context_gives_the_losses_of_the_cpu(world, tmp_path, student):
    """GPT-2's positions are learned, so its weights grow with the context; with the other only texts do."""
    for device in DEVICES:
        common = {"lr": 1e-3, "grad_accum": 2, "save_every": 2, "eval_every": 2, **FLOAT32}
        begun = {**common, "student": world.root / f"{student}.json", "block_size": 16, "train_steps": 2}
        command(device, ["anneal", *anneal_words(world, tmp_path / device / "short", **begun)])
        longer = {**common, "block_size": 64, "train_steps": 4, "eval_ctx_lens": "16,32,64"}
        resumed = {"resume_gcs_uri": tmp_path / device / "short" / "last.pt", "reset_optim_on_ctx_change": "true"}
        command(device, ["anneal", *anneal_words(world, tmp_path / device / "long", **longer, **resumed)])
    for part in ("short", "long"):
        assert_same_rows(*(tmp_path / device / part for device in DEVICES))


def test_an_evaluation_finds_the_same_figures(tiny: Tiny, tmp_path: Path) -> None:
    """Beside a model, a store of some ids and one of whole logits; with the measures of each evaluation in training."""
    code = {"code_logits_dir": tiny.root / "full" / "code", "eval_measures": "true", "max_steps": 2}
    run = train(tiny, tmp_path, "cpu", **code)
    found = []
    for device in DEVICES:
        place = tmp_path / f"{device}.json"
        command(device, ["evaluate", str(run), str(run / "last.pt"), "--eval_ctx_lens=16,32", f"--json={place}"])
        found.append([one["measures"] for one in json.loads(place.read_text())])
    for mine, theirs in zip(*found, strict=True):
        assert {"overlap", "teacher_ce"} <= mine["by_type"]["lm"].keys() & mine["by_type"]["code"].keys()
        assert "agreement" in mine["by_type"]["math_tool"]
        for type in ("lm", "math_tool", "code"):
            assert_same(mine["by_type"][type]["ce"], theirs["by_type"][type]["ce"], type)
            for figure in ("kl", "agreement", "teacher_calibration"):
                assert_same(mine["by_type"][type][figure], theirs["by_type"][type][figure], f"{figure} of {type}")
        assert_same(mine["by_length"]["16"]["all"]["overlap"], theirs["by_length"]["16"]["all"]["overlap"], "overlap")
    on_device = train(tiny, tmp_path / "device", NAME, **code)
    assert_same_rows(run, on_device)
