"""What launchers expect: places in the environment, ranks, a signal before the end, a finished run started again."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.gcs import Bucket
from tests.support.tiny import Tiny, build, files, run, start

from liquid_llm import storage
from liquid_llm.cli.main import main
from liquid_llm.metrics import read_metrics

pytestmark = pytest.mark.slow
CAPTURE = "stage1_hybrid.precompute_hybrid_logits"
SHORT = {"max_steps": 4, "eval_every": 0, "save_every": 0}


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"))
    assert main(["capture", *tiny.capture_words()]) == 0
    return tiny


def capture(capsys, words: list[str], code: int = 0) -> dict[str, Any]:
    """A capture in this process; what it says of itself at the end."""
    capsys.readouterr()
    assert main(["capture", *words]) == code
    return json.loads(capsys.readouterr().out)


def names(uri: str) -> set[str]:
    """What is below a folder, without the leases: each run leaves one of its own number."""
    return {info.name for info in storage.list_files(uri) if ".lease/" not in info.name}


@pytest.fixture
def vertex(gcs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4711")
    for name, place in (("CHECKPOINT", "checkpoints"), ("MODEL", "model"), ("TENSORBOARD_LOG", "logs")):
        monkeypatch.setenv(f"AIP_{name}_DIR", f"{gcs.uri}/job/{place}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{gcs.uri}/job"


def test_a_vertex_job_writes_where_vertex_says(captured: Tiny, vertex: str) -> None:
    words = captured.train_words("", output_gcs_uri=None, run_id=None, **SHORT)
    assert main(["train", *words]) == 0
    assert {"final.pt", "final.meta.json", "metrics.jsonl"} <= names(f"{vertex}/checkpoints/4711")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names(f"{vertex}/model")
    events = names(f"{vertex}/logs")
    assert events
    assert all("tfevents" in name for name in events)


def test_options_win_over_what_vertex_says(captured: Tiny, vertex: str, tmp_path: Path) -> None:
    other = {"tensorboard_uri": tmp_path / "tb", "model_uri": f"{vertex}/elsewhere"}
    assert main(["train", *captured.train_words(tmp_path / "out", run_id="mine", **other, **SHORT)]) == 0
    assert (tmp_path / "out" / "mine" / "final.pt").exists()
    assert list((tmp_path / "tb").glob("*tfevents*"))
    assert "config.json" in names(f"{vertex}/elsewhere")
    assert not names(f"{vertex}/checkpoints")
    assert not names(f"{vertex}/model")


def test_without_trackers_metrics_go_nowhere_else(captured: Tiny, tmp_path: Path) -> None:
    words = captured.train_words(tmp_path / "out", run_id="mine", tensorboard_uri=tmp_path / "tb", **SHORT)
    assert main(["train", *words, "--trackers=none"]) == 0
    assert read_metrics(tmp_path / "out" / "mine")
    assert not (tmp_path / "out" / "mine" / "tb").exists()
    assert not list(tmp_path.glob("tb/*"))


def test_a_finished_run_started_again_sends_what_a_mirror_lacks(captured: Tiny, vertex: str) -> None:
    words = captured.train_words("", output_gcs_uri=None, run_id=None, **SHORT)
    assert main(["train", *words]) == 0
    whole = names(vertex)
    for name in ("checkpoints/4711/final.pt", "checkpoints/4711/final.meta.json", "model/config.json"):
        storage.remove(f"{vertex}/{name}", missing_ok=False)
    assert main(["train", *words]) == 0
    assert names(vertex) == whole


def test_a_capture_that_is_asked_to_stop_says_so_and_goes_on_later(captured: Tiny, tmp_path: Path, capsys) -> None:
    words = captured.capture_words(
        math_logits_dir=tmp_path / "math", code_logits_dir=tmp_path / "code", batch_size=1, logits_format="pt"
    )
    process = start(CAPTURE, words)
    while not files(tmp_path, "math/*.pt") and not files(tmp_path, "code/*.pt"):
        assert process.poll() is None
        time.sleep(0.0005)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    stopped = json.loads(out)
    assert stopped["interrupted"]
    assert "Run the same command again" in err
    summary = capture(capsys, words)
    assert stopped["written"] > 0
    assert stopped["written"] + summary["written"] == 80
    assert summary["skipped"] == stopped["written"]


def test_a_store_is_begun_as_it_suits_its_size_and_goes_on_as_it_was_begun(
    captured: Tiny, tmp_path: Path, capsys, caplog
) -> None:
    words = captured.capture_words(math_logits_dir=tmp_path / "math", code_logits_dir=tmp_path / "code")
    few = ["--codec_options=draws_t1=48,draws_t2=30,draws_t4=8"]
    with caplog.at_level("INFO"):
        assert capture(capsys, words)["written"] == 80
    said = [message for message in caplog.messages if "is begun with codec" in message]
    assert len(said) == 2
    assert all("codec tail (draws_t1 180.0, draws_t2 112.0, draws_t4 30.0), for the" in one for one in said)
    other = captured.capture_words(math_logits_dir=tmp_path / "math2", code_logits_dir=tmp_path / "code2")
    caplog.clear()
    with caplog.at_level("INFO"):
        assert capture(capsys, [*other, *few])["written"] == 80
        assert capture(capsys, other)["written"] == 0
    assert json.loads((tmp_path / "math2" / "store.json").read_text())["codec_options"]["draws_t1"] == 48
    assert sum("as asked" in message for message in caplog.messages) == 2
    third = captured.capture_words(math_logits_dir=tmp_path / "math3", code_logits_dir=tmp_path / "code3")
    for words in ([*third, "--codec_options=draws_t1=200"], third, [*third, "--codec_options=draws_t2=112"]):
        capture(capsys, words)
        options = json.loads((tmp_path / "math3" / "store.json").read_text())["codec_options"]
        assert options == {"draws_t1": 200, "draws_t2": 112, "draws_t4": 30}, "what is not given stays as it suits"


def test_a_sample_that_cannot_be_captured_is_reported_by_the_exit_code_and_the_rest_goes_on(
    captured: Tiny, tmp_path: Path, capsys
) -> None:
    words = captured.capture_words(
        math_logits_dir=tmp_path / "math", code_logits_dir=tmp_path / "code", logits_format="pt"
    )
    capture(capsys, words)
    victim = sorted((tmp_path / "math").glob("*.pt"))[0]
    victim.unlink()
    victim.mkdir()
    summary = capture(capsys, [*words, "--overwrite=true"], code=3)
    assert (summary["failed"], summary["written"]) == (1, 79)
    assert summary["failures"][0]["reason"]


def test_ranks_take_disjoint_samples_and_another_world_completes_the_store(
    captured: Tiny, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = captured.capture_words(math_logits_dir=tmp_path / "math", code_logits_dir=tmp_path / "code")
    first = run(CAPTURE, words, RANK="1", WORLD_SIZE="3")
    assert first.returncode == 0, first.stderr
    one = json.loads(first.stdout)["written"]
    assert 0 < one < 80
    monkeypatch.setenv("WORLD_SIZE", "2")
    rest = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        rest.append(capture(capsys, words))
    assert one + sum(summary["written"] for summary in rest) == 80
    assert sum(summary["skipped"] for summary in rest) == one


def test_a_rank_outside_its_world_is_refused(captured: Tiny, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["capture", *captured.capture_words()]) == 2
    assert "RANK=2 WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--codec_options=draws_t1=many"], "not a name and a number; got 'draws_t1=many'"),
        (["--codec_options=draws_t1=nan"], "not a name and a number; got 'draws_t1=nan'"),
        (
            ["--codec_options=speed=3"],
            "'speed': 3}; expected some of draws_t1, draws_t2, draws_t4.",
        ),
        (["--codec_options=draws_t1=9,draws_t1=8"], "'draws_t1' is there twice; got 'draws_t1=8'"),
        (["--codec_options=draws_t1=-3"], "got -3; expected more than 0"),
        (["--codec=full", "--codec_options=k=3"], "does not have; got {'k': 3}; expected none."),
        (["--topk=8"], "--topk: a setting of codec 'topk' only, to be given once; got --codec=tail."),
        (["--codec=topk", "--topk=8", "--codec_options=k=9"], "to be given once"),
        (["--codec=topk", "--topk=100000000"], "more ids than there are; got 100000000; expected at most"),
    ],
)
def test_a_codec_setting_without_effect_is_refused(
    captured: Tiny, tmp_path: Path, words: list[str], said: str, capsys
) -> None:
    folders = captured.capture_words(math_logits_dir=tmp_path / "m", code_logits_dir=tmp_path / "c")
    assert main(["capture", *folders, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ".." not in error
    assert not (tmp_path / "m").exists()


def test_a_folder_of_another_store_is_refused_before_the_teacher_is_loaded(
    captured: Tiny, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("liquid_llm.jobs.capture.load_online", load)
    for words, said in (
        (["--codec=full"], "the codec differs; got full; expected tail"),
        (["--codec_options=draws_t1=3"], "the codec options differ; got"),
        (["--kd_positions=0.5"], "the share of positions (--kd_positions) differs; got 0.5; expected 1.0"),
        (["--logits_format=pt"], "another layout; got pt; expected shards"),
    ):
        assert main(["capture", *captured.capture_words(), *words]) == 3
        assert said in capsys.readouterr().err
    with pytest.raises(AssertionError, match="loaded"):
        main(["capture", *captured.capture_words()])


def test_a_temperature_no_store_answers_at_is_refused_before_anything_is_trained(
    captured: Tiny, tmp_path: Path, capsys
) -> None:
    assert main(["train", *captured.train_words(tmp_path, kd_temperature=9.0)]) == 3
    assert "--kd_temperature" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_whose_stored_signal_is_too_noisy_for_its_steps_says_so_before_the_first(
    captured: Tiny, tmp_path: Path, caplog
) -> None:
    folders = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    few = {"codec_options": "draws_t1=2,draws_t2=1,draws_t4=0.5"}
    assert main(["capture", *captured.capture_words(**folders, **few)]) == 0
    steps = {**SHORT, "max_steps": 1, "kd_temperature": 2, "kd_alpha_start": 0.7, "kd_alpha_end": 0.7}
    with caplog.at_level("INFO"):
        assert main(["train", *captured.train_words(tmp_path / "noisy", **folders, **steps)]) == 0
    (said,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("math_tool: the draws")]
    assert "in steps of" in said
    assert "at T=2: it may learn less than without a teacher. Raise --grad_accum to" in said
    assert "or lower --kd_temperature to 1" in said
    assert [one.levelname for one in caplog.records if one.getMessage() == said] == ["WARNING"]
    caplog.clear()
    quiet = {"math_logits_dir": captured.root / "signal" / "math", "code_logits_dir": captured.root / "signal" / "code"}
    calm = {**steps, "kd_temperature": 1.0, "kd_alpha_start": 0.1, "kd_alpha_end": 0.1, "grad_accum": 64}
    with caplog.at_level("INFO"):
        assert main(["train", *captured.train_words(tmp_path / "calm", **quiet, **calm)]) == 0
    assert "the draws of its stored signal" not in caplog.text


def test_a_store_of_draws_at_one_temperature_trains_there(captured: Tiny, tmp_path: Path, caplog) -> None:
    folders = {"math_logits_dir": tmp_path / "math", "code_logits_dir": tmp_path / "code"}
    codec = {"codec": "sampled", "codec_options": "draws=20,temperature=2", "held_out_tokens": 0}
    assert main(["capture", *captured.capture_words(**folders, **codec)]) == 0
    steps = {**SHORT, "max_steps": 12, "kd_temperature": 2}
    assert main(["train", *captured.train_words(tmp_path / "out", **folders, **steps)]) == 0
    lines = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any(row["by_type"].get("math_tool", {}).get("kd_coverage") == 1.0 for row in rows if row["kind"] == "train")
    evaluated = [row["by_type"]["math_tool"] for row in rows if row["kind"] == "eval"]
    assert all("val_kd" not in row and row["val_loss"] > 0 for row in evaluated)
    assert "no val_kd for this type" in caplog.text
    shutil.rmtree(tmp_path / "out")
