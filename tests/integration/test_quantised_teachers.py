"""Teachers in 8 bits by the real command lines: another teacher to stores, runs and memory, and said so everywhere."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.annealing import anneal, anneal_words, as_of, rows
from tests.support.processes import run
from tests.support.tiny import Tiny

from liquid_llm.cli.main import main
from liquid_llm.models import quantised
from liquid_llm.signal_store.description import read_store_file

pytestmark = pytest.mark.slow
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="comes with the extra quantize")
INT8 = {"teacher_quantize": "int8"}
SHORT = {"train_steps": 2, "save_every": 1, "eval_every": 2, "grad_accum": 2, **INT8}


@pytest.fixture(scope="module")
def captured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores that a teacher in 8 bits has filled."""
    root = tmp_path_factory.mktemp("signal")
    stores = {"math_logits_dir": root / "math", "code_logits_dir": root / "code"}
    assert main(["capture", *tiny.capture_words(**INT8, **stores)]) == 0
    return stores


@pytest.fixture(scope="module")
def taught(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose online teacher is in 8 bits."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    assert anneal(tiny, folder, **SHORT) == 0
    return folder


@needs_torchao
def test_a_store_says_that_its_teacher_was_quantised_and_takes_no_other(tiny, captured, capsys):
    identity = read_store_file(str(captured["math_logits_dir"])).identity
    assert identity.quantisation == "int8"
    assert identity.teacher.endswith("+int8")
    plain = main(["capture", *tiny.capture_words(**captured)])
    said = capsys.readouterr().err
    assert plain == 3
    assert "quantisation of the teacher (--teacher_quantize) differs" in said
    assert main(["inspect", str(captured["math_logits_dir"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantisation"] == "int8"


@needs_torchao
def test_a_store_is_verified_by_the_teacher_that_it_was_captured_from(tiny, captured, capsys):
    words = [f"--teacher={tiny.teacher}", f"--manifest={tiny.manifest}", "--seq_len=64", "--samples=3", "--json"]
    store = str(captured["math_logits_dir"])
    assert main(["store", "verify", store, *words, f"--data_cache={tiny.root / 'tokens'}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["looked_at"], report["identical"]) == (3, 3), report


@needs_torchao
def test_a_run_says_it_and_goes_on_with_no_other(tiny, taught, capsys):
    environment = json.loads((taught / "provenance" / "environment.json").read_text())
    assert environment["teachers"]["online"]["quantisation"] == "int8"
    assert environment["choices"]["teacher_quantisation"]["value"] == "int8"
    assert "teacher_quantize: int8" in (taught / "provenance" / "options.yaml").read_text()
    assert anneal(tiny, taught, train_steps=3) == 2
    assert "--teacher_quantize is none and was int8" in capsys.readouterr().err


@needs_torchao
def test_one_that_is_dealt_out_among_processes_says_what_a_whole_one_says(tiny, taught, tmp_path):
    """The run goes on from where one process had come: whole numbers and their scales are dealt out and gathered."""
    parts = as_of(taught, 1, tmp_path / "parts")
    run("trainer.entrypoint", anneal_words(tiny, parts, teacher_shard="full", **SHORT), tmp_path / "said")
    assert "the online teacher is dealt out among 2" in (tmp_path / "said" / "rank-0.log").read_text()
    for kind, names in (("train", ("loss", "kd", "grad_norm")), ("eval", ("val_loss_teacher", "val_kd"))):
        found, expected = rows(parts, kind)[-1], rows(taught, kind)[-1]
        assert found["step"] == expected["step"] == 2
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@needs_torchao
def test_memory_counts_what_is_kept_in_8_bits(tiny, capsys):
    words = [
        f"--teacher_name={tiny.teacher}",
        f"--student={tiny.root / 'gpt2.json'}",
        "--block_size=32",
        "--device=cpu",
    ]
    found = []
    for more in ([], ["--teacher_quantize=int8"]):
        assert main(["memory", "anneal", *words, "--teacher_precision=float32", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["prediction"]["consumers"]["teacher weights"])
    assert found[1] < found[0]


def test_without_its_package_it_is_refused_before_anything_is_read(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torchao" else object())
    assert anneal(tiny, tmp_path / "run", **INT8) == 2
    assert "pip install 'liquid-llm[quantize]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
