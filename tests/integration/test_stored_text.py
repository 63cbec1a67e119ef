"""Plain text from a store: captured once, window by window, for annealing and hybrid runs alike."""

import json
import re
from pathlib import Path

import pytest
from tests.support.annealing import anneal, anneal_words, make_world, rows
from tests.support.tiny import Tiny

from liquid_llm.cli.main import main
from liquid_llm.signal_store.store import open_store

pytestmark = pytest.mark.slow

FALLING = {"alpha": 0.7, "T": 2.0, "temp_schedule": "0:2.0,4:1.0"}
RUN = {"max_steps": 6, "eval_every": 3, "precision": "float32", "teacher_precision": "float32", "lr": 2e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Tiny:
    """Its plain text has documents of several windows: five paragraphs in each."""
    tiny = make_world(tmp_path_factory.mktemp("world"))
    texts = [json.loads(line)["text"] for line in (tiny.root / "lm.jsonl").read_text().splitlines()]
    documents = ["\n".join(texts[start : start + 5]) for start in range(0, len(texts), 5)]
    lines = [json.dumps({"text": text, "sample_id": f"doc-{number}"}) + "\n" for number, text in enumerate(documents)]
    (tiny.root / "long.jsonl").write_text("".join(lines))
    (tiny.root / "long.manifest.jsonl").write_text('{"path": "long.jsonl", "type": "lm"}\n')
    return tiny


def capture(tiny: Tiny, store: Path, codec: str, *more: str, **options: object) -> int:
    given = {
        "dataset_manifest": tiny.root / "long.manifest.jsonl",
        "math_logits_dir": None,
        "code_logits_dir": None,
        "teacher_precision": "float32",
        "codec": codec,
        "seq_len": 32,
    }
    return main(["capture", *tiny.capture_words(**{**given, **options}), f"--signal=lm={store}", *more])


@pytest.fixture(scope="module")
def stores(world) -> dict[str, Path]:
    found = {codec: world.root / "signal" / codec for codec in ("full", "tail")}
    for codec, store in found.items():
        assert capture(world, store, codec) == 0
    return found


def annealing(tiny: Tiny, output: Path, **options: object) -> int:
    given = {"dataset_name": None, "dataset_manifest": tiny.root / "long.manifest.jsonl", **FALLING}
    return anneal(tiny, output, **{"precision": "float32", "teacher_precision": "float32", **given, **options})


def hybrid(tiny: Tiny, output: Path, *more: str, **options: object) -> int:
    given = {"dataset_manifest": tiny.root / "long.manifest.jsonl", "mc_teacher_id": None, "block_size": 32, **RUN}
    given |= {"math_logits_dir": None, "code_logits_dir": None, "student": tiny.student, **options}
    return main(["train", *tiny.train_words(output, **given), *more])


def online(tmp_path: Path, tiny: Tiny) -> str:
    """The control: the same windows, with the teacher asked while training."""
    file = tmp_path / "online.yaml"
    file.write_text(f"sources: {{lm: {{teacher: 'online:{tiny.teacher}', layout: windows}}}}\n")
    return f"--config={file}"


def figures(run: Path, name: str) -> list[float]:
    return [row[name] for row in rows(run)]


def test_a_long_document_gives_several_windows_each_a_record_of_its_own(world, stores):
    store = open_store(str(stores["full"]))
    by_document: dict[str, list[tuple[int, int]]] = {}
    for name, record in store.layout.records():
        document, _, place = name.partition("#")
        by_document.setdefault(document, []).append((int(place or 0), record.header.num_tokens))
    store.close()
    assert sorted(by_document) == sorted(f"doc-{number}" for number in range(12))
    for windows in by_document.values():
        places, lengths = zip(*sorted(windows), strict=True)
        assert places == tuple(range(0, 31 * len(windows), 31)), "each begins with the last token of the one before"
        assert set(lengths[:-1]) == {32}
        assert 2 <= lengths[-1] <= 32
    assert max(map(len, by_document.values())) > 3


def test_verify_looks_at_every_window(world, stores, capsys):
    words = [
        f"--teacher={world.teacher}",
        f"--manifest={world.root / 'long.manifest.jsonl'}",
        "--samples=40",
        "--json",
    ]
    capsys.readouterr()
    assert main(["store", "verify", str(stores["tail"]), *words, "--seq_len=32", "--teacher_precision=float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["coverage"]["lm"]["samples"] == found["coverage"]["lm"]["with_record"] > 200
    assert found["usable"] == found["looked_at"] == 40


def test_annealing_from_a_store_says_what_the_teacher_would_have_said(world, stores, tmp_path):
    control = [online(tmp_path, world)]
    words = anneal_words(world, tmp_path / "online", **FALLING, dataset_name=None, teacher_name=None)
    words += [f"--dataset_manifest={world.root / 'long.manifest.jsonl'}", "--precision=float32"]
    assert main(["anneal", *words, "--teacher_precision=float32", *control]) == 0
    for codec in ("full", "tail"):
        assert annealing(world, tmp_path / codec, teacher_mode="precomputed", signal=f"lm={stores[codec]}") == 0
        assert figures(tmp_path / codec, "kd_coverage") == [1.0] * 8
        assert figures(tmp_path / codec, "kd_temperature") == [2.0] * 4 + [1.0] * 4
        assert figures(tmp_path / codec, "tokens") == figures(tmp_path / "online", "tokens")
    assert figures(tmp_path / "full", "kd") == pytest.approx(figures(tmp_path / "online", "kd"), rel=1e-5)
    assert figures(tmp_path / "full", "loss") == pytest.approx(figures(tmp_path / "online", "loss"), rel=1e-5)
    # Draws differ from the teacher by their noise alone.
    assert figures(tmp_path / "tail", "kd")[0] == pytest.approx(figures(tmp_path / "online", "kd")[0], rel=0.2)
    for mine, theirs in zip(*(rows(tmp_path / name, "eval") for name in ("full", "online")), strict=True):
        assert mine["val_kd"] == pytest.approx(theirs["val_kd"], rel=1e-5)
        assert mine["val_loss_student"] == pytest.approx(theirs["val_loss_student"], rel=1e-5)


def test_a_hybrid_run_reads_the_same_capture(world, stores, tmp_path):
    assert hybrid(world, tmp_path / "online", online(tmp_path, world), lm_teacher_id=None) == 0
    kept = {"lm_teacher_id": None, "mc_teacher_id": world.teacher}
    assert hybrid(world, tmp_path / "stored", f"--signal=lm={stores['full']}", **kept) == 0
    one, other = tmp_path / "online" / "run", tmp_path / "stored" / "run"
    assert figures(other, "kd_coverage") == [1.0] * 6
    assert figures(other, "kd") == pytest.approx(figures(one, "kd"), rel=1e-5)
    teachers = json.loads((other / "provenance" / "environment.json").read_text())["teachers"]
    assert teachers["lm"]["uri"] == str(stores["full"])
    assert not (other / "provenance" / "environment.json").read_text().count("teacher_dtype"), "no teacher was loaded"


def test_precomputed_means_stores_for_text_too(world, stores, tmp_path, caplog):
    mode = {"hybrid": "false", "teacher_mode": "precomputed", "lm_teacher_id": world.teacher}
    assert hybrid(world, tmp_path / "with", f"--signal=lm={stores['tail']}", **mode) == 0
    assert figures(tmp_path / "with" / "run", "kd_coverage") == [1.0] * 6
    mode["dataset_manifest"] = world.manifest
    kept = {"math_logits_dir": world.root / "signal" / "math", "code_logits_dir": world.root / "signal" / "code"}
    assert main(["capture", *world.capture_words()]) == 0
    assert hybrid(world, tmp_path / "without", **mode, **kept) == 0
    assert "lm: no store is named (--signal lm=URI): plain cross-entropy" in caplog.text


def test_windows_of_another_length_than_the_captures_are_said(world, tmp_path, caplog):
    lines = (world.root / "long.jsonl").read_text()
    # Whole in a window of either length.
    short = [json.dumps({"text": " ".join("abc" * n), "sample_id": f"short-{n}"}) + "\n" for n in range(1, 7)]
    (tmp_path / "texts.jsonl").write_text("".join(short) + lines)
    (tmp_path / "manifest.jsonl").write_text('{"path": "texts.jsonl", "type": "lm"}\n')
    manifest = tmp_path / "manifest.jsonl"
    assert capture(world, tmp_path / "store", "full", dataset_manifest=manifest) == 0
    kept = {"lm_teacher_id": None, "mc_teacher_id": world.teacher, "block_size": 24, "seq_len": 24}
    assert hybrid(world, tmp_path, f"--signal=lm={tmp_path / 'store'}", dataset_manifest=manifest, **kept) == 0
    assert "windows of documents have no record and train on cross-entropy" in caplog.text
    assert "--seq_len=24" in caplog.text


def test_noise_is_said_of_the_positions_that_steps_learn(world, tmp_path, caplog):
    """The last window of a document is short: steps learn 4 % less than they have room for."""
    few = "draws_t1=0.5,draws_t2=0.3,draws_t4=0.1"
    assert capture(world, tmp_path / "store", "tail", codec_options=few) == 0
    options = {"lm_teacher_id": None, "batch_size": 8, "max_steps": 12, "grad_accum": 2, "metrics_interval": 1}
    options["kd_temperature"] = 2
    signal = f"--signal=lm={tmp_path / 'store'}"
    assert hybrid(world, tmp_path, signal, **options, mc_teacher_id=world.teacher) == 0
    said = re.search(r"lm: the draws of its stored signal .* in steps of ([\d,]+) positions at T=2: (.*)", caplog.text)
    learnt = figures(tmp_path / "run", "positions")
    assert float(said[1].replace(",", "")) == pytest.approx(sum(learnt) / len(learnt), rel=0.01)
    assert sum(learnt) / len(learnt) < 0.97 * 2 * 8 * 32
    advice = re.match(
        r"it may learn less than without a teacher. Raise --grad_accum to (\d+) \(([\d.]+) nats\)", said[2]
    )
    assert int(advice[1]) in [2 * 2**n for n in range(1, 12)]
    assert float(advice[2]) < 0.06


def test_what_is_said_of_no_text_is_said(world, tmp_path, caplog):
    options = {"lm_teacher_id": None, "mc_teacher_id": world.teacher, "kd_positions": 0.5, "alpha_by_type": "lmm=0.5"}
    assert hybrid(world, tmp_path, "--signal=lm=none", **options) == 0
    assert "lmm: something is said of this type and no text has it; there are lm" in caplog.text
    assert "--kd_positions changes nothing here: no teacher is asked" in caplog.text


def test_a_named_dataset_is_captured_and_annealed_on(world, tmp_path):
    texts = world.root / "texts"
    assert capture(world, tmp_path / "store", "full", dataset_manifest=None, dataset_name=texts) == 0
    stored = {"teacher_mode": "precomputed", "signal": f"lm={tmp_path / 'store'}", "dataset_name": texts}
    assert annealing(world, tmp_path / "run", dataset_manifest=None, eval_ctx_lens="16,32", **stored) == 0
    assert figures(tmp_path / "run", "kd_coverage") == [1.0] * 8
    evaluated = rows(tmp_path / "run", "eval")[-1]
    assert evaluated["val_kd"] > 0
    assert evaluated["val_loss_student@32"] == evaluated["val_loss_student"] != evaluated["val_loss_student@16"]


def test_what_cannot_be_is_refused_in_words(world, stores, tmp_path, capsys):
    store, manifest = stores["full"], world.root / "long.manifest.jsonl"
    (tmp_path / "blocks.yaml").write_text(f"sources: {{lm: {{teacher: {store}, layout: blocks}}}}\n")
    other = tmp_path / "other"
    assert (
        main(["capture", *world.capture_words(math_logits_dir=other, code_logits_dir=None), "--signal=code=none"]) == 0
    )
    cases: list[tuple[dict[str, object], int, str]] = [
        ({"teacher_mode": "precomputed"}, 2, "--signal lm=URI is missing"),
        ({"teacher_mode": "precomputed", "signal": f"lm={tmp_path / 'nowhere'}"}, 3, "nowhere"),
        ({"teacher_mode": "precomputed", "signal": f"lm={other}"}, 3, "no sample of this run has usable stored signal"),
        ({"config": tmp_path / "blocks.yaml", "teacher_name": None}, 2, "a store serves samples or windows"),
        ({"dataset_name": world.root / "texts", "dataset_manifest": manifest}, 2, "not both"),
        ({"dataset_manifest": None}, 2, "--dataset_name is missing"),
    ]
    for options, code, said in cases:
        capsys.readouterr()
        assert annealing(world, tmp_path / "run", **options) == code, options
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.pt"))
    assert capture(world, tmp_path / "new", "full", dataset_name=world.root / "texts") == 2
    assert "not both" in capsys.readouterr().err
