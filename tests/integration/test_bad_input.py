"""Every mistake a user can make ends with one message, the right exit code, no traceback and nothing half-written."""

import gzip
import json

import pytest
from tests.support import forked
from tests.support.models import tiny_model
from tests.support.tiny import QUICK, VOCAB_SIZE, Tiny, build
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Tiny:
    tiny = build(tmp_path_factory.mktemp("tiny"))
    assert main(["capture", *tiny.capture_words(**QUICK)]) == 0
    return tiny


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def fails(capsys, code, *parts, words):
    assert main(["train", *words]) == code
    err = capsys.readouterr().err
    message = err[err.rindex("error: ") :]
    assert "Traceback" not in err
    assert message.count("\n") <= 3, message
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{not json", ["manifest.jsonl:2"]),
        ('{"type": "lm"}', ["manifest.jsonl:2", "path"]),
        ('{"path": "lm.jsonl", "type": "po etry"}', ["manifest.jsonl:2", "po etry", "math_tool"]),
        ('{"path": "lm.jsonl", "type": "lm", "weight": 0}', ["manifest.jsonl:2", "weight"]),
        ('{"path": "nowhere-*.jsonl", "type": "lm"}', ["manifest.jsonl:2", "nowhere-"]),
    ],
)
def test_a_bad_manifest_line_is_named(captured, tmp_path, capsys, line, parts):
    good = json.dumps({"path": str(captured.root / "lm.jsonl"), "type": "lm"})
    (tmp_path / "manifest.jsonl").write_text(f"{good}\n{line}\n")
    words = captured.train_words(tmp_path / "out", dataset_manifest=tmp_path / "manifest.jsonl")
    fails(capsys, 3, *parts, words=words)
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_missing_manifest_is_named(captured, tmp_path, capsys):
    words = captured.train_words(tmp_path / "out", dataset_manifest=tmp_path / "no.jsonl")
    assert main(["train", *words]) in (3, 4)
    assert str(tmp_path / "no.jsonl") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", b"", ["empty.jsonl"]),
        ("bad.parquet", b"PAR1 not really", ["bad.parquet"]),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a b c"}\n' * 500, mtime=0)[:-20], ["torn.jsonl.gz"]),
        ("line.jsonl", b'{"text": "fine and well"}\n{"text": 5}\n', ["line.jsonl:2", "text"]),
        ("type.jsonl", b'{"text": "fine", "type": "code"}\n', ["type.jsonl:1", "code"]),
    ],
)
def test_a_bad_shard_is_named(captured, tmp_path, capsys, name, content, parts):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"path": name, "type": "lm"}) + "\n")
    words = captured.train_words(tmp_path / "out", dataset_manifest=tmp_path / "manifest.jsonl")
    fails(capsys, 3, *parts, words=words)


def test_a_teacher_with_another_tokenizer_is_refused_naming_both(captured, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("llama", 400).save_pretrained(other)
    tiny_tokenizer(400).save_pretrained(other)
    words = captured.train_words(tmp_path / "out", lm_teacher_id=other)
    fails(capsys, 3, "tokenizer", words=words)  # the stored signal is of the first teacher's tokenizer


def test_a_student_with_another_tokenizer_is_refused_naming_both(captured, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("llama", 400).save_pretrained(other)
    tiny_tokenizer(400).save_pretrained(other)
    words = captured.train_words(tmp_path / "out", resume_gcs_uri=other)
    fails(capsys, 2, "different tokenizers", other, captured.teacher, words=words)


def test_a_model_that_cannot_be_found_offline_says_how_to_make_it_available(captured, tmp_path, capsys):
    words = captured.train_words(tmp_path / "out", lm_teacher_id="nobody/no-such-model")
    message = fails(capsys, 2, "nobody/no-such-model", words=words)
    assert "download" in message


def test_stored_signal_that_is_missing_entirely_is_an_error_before_step_one(captured, tmp_path, capsys):
    words = captured.train_words(tmp_path / "out", math_logits_dir=tmp_path / "none", code_logits_dir=tmp_path / "none")
    fails(capsys, 3, tmp_path / "none", "liquid capture", words=words)
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))


def test_stored_signal_of_another_teacher_is_refused_naming_both(captured, tmp_path, capsys):
    other = tmp_path / "bigger"
    tiny_model("llama", VOCAB_SIZE, seed=5).save_pretrained(other)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(other)
    words = captured.train_words(tmp_path / "out", mc_teacher_id=other)
    fails(capsys, 3, "bigger", "teacher", words=words)


def test_preparation_without_a_list_of_datasets_is_refused(captured, tmp_path, capsys):
    fails(capsys, 2, "--datasets_yaml", words=captured.train_words(tmp_path / "out", prepare_data="force"))


def test_a_store_is_not_gone_on_with_in_another_layout(captured, capsys):
    assert main(["capture", *captured.capture_words(**QUICK, logits_format="pt")]) == 3
    assert "got pt; expected shards. Go on with --logits_format=shards" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_a_storage_error(captured, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fails(capsys, 4, tmp_path / "file", words=captured.train_words(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


CHEAP = [
    ({"student": "no-such-preset"}, 2, "no-such-preset"),
    ({"student": "/no/such.json"}, 2, "/no/such.json"),
    ({"lm_teacher_id": "/no/such/teacher"}, 2, "/no/such/teacher"),
    ({"signal": "code=online:/no/such/teacher", "code_logits_dir": None}, 2, "/no/such/teacher"),
    ({"device": "nonsense"}, 2, "--device"),
    ({"hf_token_file": "/no/such/token"}, 2, "/no/such/token"),
    ({"block_size": 512}, 2, "--block_size=512"),
    ({"eval_ctx_lens": "64,1000"}, 2, "--eval_ctx_lens=64,1000"),
    ({"batch_size": "auto", "tokens_per_step": 1000}, 2, "--tokens_per_step=1000"),
    ({"divergence": "sideways"}, 2, "--divergence"),
    ({"divergence": "jsd:beta=2"}, 2, "--divergence: divergence 'jsd:beta=2': beta must lie between 0 and 1"),
    ({"divergence_by_type": "code=tail_aware:q=2"}, 2, "the divergence of code: "),
    ({"resume_gcs_uri": "/no/such.pt"}, 4, "/no/such.pt"),
    ({"output_gcs_uri": "{tmp}/manifest.jsonl"}, 4, "manifest.jsonl"),
]
CHEAP_OF_CAPTURE = [
    ({"mc_teacher_id": "/no/such/teacher"}, 2, "/no/such/teacher"),
    ({"codec": "topk", "topk": 100_000}, 2, "--topk"),
    ({"codec_options": "draws=1"}, 2, "--codec_options"),
    ({"device": "nonsense"}, 2, "--device"),
    ({"hf_token_file": "/no/such/token"}, 2, "/no/such/token"),
    ({"math_logits_dir": "{tmp}/manifest.jsonl"}, 4, "manifest.jsonl"),
]


@pytest.mark.parametrize(
    ("command", "options", "code", "part"),
    [*(("train", *case) for case in CHEAP), *(("capture", *case) for case in CHEAP_OF_CAPTURE)],
)
def test_what_is_cheap_to_refuse_is_refused_before_data_is_touched(
    captured, tmp_path, capsys, command, options, code, part
):
    """The data is wrong too, so that whoever looked at it first would say so; nothing is left behind."""
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("no manifest\n")
    options = {name: str(value).format(tmp=tmp_path) if value else value for name, value in options.items()}
    make = captured.train_words if command == "train" else captured.capture_words
    place = {"output": tmp_path / "out" / "deep"} if command == "train" else {}
    assert main([command, *make(**place, **{"dataset_manifest": manifest, **options})]) == code
    err = capsys.readouterr().err
    message = err[err.rindex("error: ") :]
    assert part in message
    assert "manifest.jsonl:1" not in message
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [manifest]


def test_a_full_disk_is_one_message_and_leaves_no_half_checkpoint(captured, tmp_path):
    # No file may grow past 200 kB: the first checkpoint does not fit.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from liquid_llm.cli.main import main; sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    words = captured.train_words(tmp_path, max_steps=6, save_every=2, eval_every=0)
    done = forked.run(["-c", code, *words])
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_with_its_own_code(captured, tmp_path, capsys):
    words = captured.train_words(tmp_path, lr=1e30, warmup_steps=0, grad_clip=0, eval_every=0)
    fails(capsys, 5, "step", "--lr", words=words)
