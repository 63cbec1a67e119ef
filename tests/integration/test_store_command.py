"""``liquid store`` on captured stores: packed, verified against their teacher, measured and compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support.gcs import Bucket
from tests.support.models import tiny_model
from tests.support.tiny import VOCAB_SIZE, Tiny, build, start
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm import storage
from liquid_llm.capture.plan import Window, batches
from liquid_llm.cli.main import main
from liquid_llm.signal_store.store import open_store

pytestmark = pytest.mark.slow

CODEC = {"codec": "topk", "topk": 16}  # quicker than the default, which has a test of its own


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Captured in both layouts; maths and code of each in one folder."""
    made = build(tmp_path_factory.mktemp("tiny"), teacher_steps=20)
    for layout in ("pt", "shards"):
        folder = made.root / layout
        words = made.capture_words(math_logits_dir=folder, code_logits_dir=folder, logits_format=layout, **CODEC)
        assert main(["capture", *words]) == 0
    return made


@pytest.fixture(scope="module")
def one_shard(tiny: Tiny) -> Path:
    """Maths and code in a single shard."""
    assert main(["store", "pack", str(tiny.root / "shards"), str(tiny.root / "packed")]) == 0
    assert len(shards_of(tiny.root / "packed")) == 1
    return tiny.root / "packed"


@pytest.fixture
def store(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(tiny.root / "shards", tmp_path / "store")


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def asked(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> dict[str, Any]:
    """What a command says as JSON; it must end with ``code``."""
    capsys.readouterr()
    assert main(["store", *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown_rows(shown: str) -> dict[str, str]:
    """The outermost names of a table for people, and what it says of each."""
    lines = [line.partition("  ") for line in shown.splitlines() if not line.startswith(" ")]
    return {name: text.strip() for name, _, text in lines}


def teacher_words(tiny: Tiny, teacher: Path | None = None) -> list[str]:
    return [
        f"--teacher={teacher or tiny.teacher}",
        f"--manifest={tiny.manifest}",
        f"--data-cache={tiny.root / 'tokens'}",
    ]


def test_ranks_at_once_make_one_store(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As torchrun starts them, with the real command, into one folder of shards."""
    folder = tmp_path / "store"
    words = tiny.capture_words(math_logits_dir=folder, code_logits_dir=folder, **CODEC)
    ranks = [start("liquid_llm.cli.main", ["capture", *words], RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    done = [(rank.communicate(timeout=240), rank.returncode) for rank in ranks]
    assert [code for _, code in done] == [0, 0], done
    assert sum(json.loads(out)["written"] for (out, _), _ in done) == 80
    found = asked(capsys, 0, "diff", folder, tiny.root / "shards")
    assert (found["equal"], found["same"]) == (80, True)
    assert asked(capsys, 0, "stats", folder)["superseded"] == 0


def test_signal_of_any_type(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain text and a type of the user's own, each where ``--signal`` says; ``none`` leaves a type out."""
    texts = [json.dumps({"text": f"A line of number {n} about the river and the town."}) for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    lines = [{"path": "texts.jsonl", "type": type, "weight": 1.0} for type in ("lm", "chat", "code")]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"--mc_teacher_id={tiny.teacher}", f"--dataset_manifest={manifest}", "--codec=topk", "--topk=16"]
    words += ["--seq_len=64", f"--data_cache={tmp_path / 'tokens'}", "--device=cpu"]
    chat, lm = tmp_path / "chat", tmp_path / "lm"
    capsys.readouterr()
    assert main(["capture", *words, f"--signal=chat={chat}"]) == 2
    shown = capsys.readouterr().err
    assert "code samples" in shown
    assert "--code_logits_dir or --signal code=URI" in shown
    assert "--signal code=none" in shown
    assert not chat.exists()
    signals = ["--signal", f"chat={chat},code=none", "--signal", f"lm={lm}"]
    assert main(["capture", *words, *signals]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 24
    teacher = [f"--teacher={tiny.teacher}", f"--manifest={manifest}", f"--data-cache={tmp_path / 'tokens'}"]
    for folder, type, others in ((chat, "chat", {"chat", "code"}), (lm, "lm", {"lm", "chat", "code"})):
        assert set(asked(capsys, 0, "stats", folder)["types"]) == {type}
        found = asked(capsys, 0, "verify", folder, *teacher, "--samples=3")
        assert (found["agrees"], found["coverage"][type]) == (True, {"samples": 12, "with_record": 12})
        assert set(found["coverage"]) == others


def test_a_store_of_another_codec_is_refused_before_data_is_touched(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"path": "no/such/file.jsonl", "type": "code", "weight": 1.0}\n')
    words = {"math_logits_dir": tmp_path, "code_logits_dir": tiny.root / "shards", "dataset_manifest": manifest}
    assert main(["capture", *tiny.capture_words(**words)]) == 3
    assert "this folder holds the signal of" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- pack


def test_pack_and_diff_by_url(tiny: Tiny, gcs: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """From files to a bucket, in place there, and back: the same signal everywhere."""
    uri = f"{gcs.uri}/signal/packed"
    first = asked(capsys, 0, "pack", tiny.root / "pt", uri)
    assert (first["packed"], first["present"], first["left_out_count"]) == (80, 0, 0)
    assert first["files_after"] == 3
    assert first["bytes_after"] < 0.85 * first["bytes_before"]
    assert asked(capsys, 0, "diff", tiny.root / "pt", uri)["equal"] == 80
    again = asked(capsys, 0, "pack", tiny.root / "pt", uri)
    assert (again["packed"], again["present"]) == (0, 80)
    names = {info.name for info in storage.list_files(uri)}
    assert asked(capsys, 0, "pack", uri, uri)["packed"] == 80
    kept = {info.name for info in storage.list_files(uri)} & names
    assert kept == {"store.json", "index.safetensors", "held_out/store.json", "held_out/index.safetensors"}
    found = asked(capsys, 0, "diff", uri, tiny.root / "shards")
    assert (found["same"], found["equal"]) == (True, 80)
    stats = asked(capsys, 0, "stats", uri, "--samples=10")
    assert (stats["sampled"], stats["corrupt"], stats["superseded"]) == (10, 0, 0)
    assert asked(capsys, 0, "verify", uri, *teacher_words(tiny), "--samples=4")["agrees"]


def test_pack_in_place_removes_what_is_superseded(tiny: Tiny, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny.capture_words(math_logits_dir=store, code_logits_dir=store, overwrite="true", **CODEC)
    assert main(["capture", *words]) == 0
    before = asked(capsys, 0, "stats", store)
    assert (before["superseded"], before["records"], before["types"]["code"]["records"]) == (80, 80, 80)
    assert main(["store", "stats", str(store)]) == 0
    shown = capsys.readouterr().out
    assert f"liquid store pack {store} {store} gives their room back" in shown
    assert shown_rows(shown)["superseded"] == "80"
    assert asked(capsys, 0, "pack", store, store)["packed"] == 80
    after = asked(capsys, 0, "stats", store)
    assert (after["superseded"], after["records"]) == (0, 80)
    assert after["bytes"] < 0.6 * before["bytes"]
    assert len(shards_of(store)) == 1
    assert asked(capsys, 0, "diff", store, tiny.root / "shards")["equal"] == 80


def test_pack_leaves_out_what_is_damaged_and_keeps_its_shard(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shards_of(store)[0]
    data = bytearray(damaged.read_bytes())
    data[-10] ^= 1
    damaged.write_bytes(data)
    done = asked(capsys, 3, "pack", store, store)
    assert done["left_out_count"] == 1
    assert list(done["left_out"].values()) == ["the checksum does not match"]
    assert damaged.read_bytes() == data


def test_pack_into_another_teachers_store_is_refused(
    tiny: Tiny, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    values = json.loads((store / "store.json").read_text())
    (tmp_path / "other" / "store.json").write_text(json.dumps({**values, "teacher_id": "org/other"}))
    assert main(["store", "pack", str(store), str(tmp_path / "other")]) == 3
    assert "holds the signal of org/other" in capsys.readouterr().err


def test_a_store_of_files_is_not_packed_in_place(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in (tiny.root / "pt").iterdir()}
    assert main(["store", "pack", str(tiny.root / "pt"), f"{tiny.root}/./pt/"]) == 2
    shown = capsys.readouterr().err
    assert f"liquid store pack {tiny.root / 'pt'} FOLDER" in shown
    assert "--logits_format" not in shown
    assert {path.name for path in (tiny.root / "pt").iterdir()} == before


# --------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("layout", ["pt", "shards"])
def test_verify_agrees_with_the_teacher(tiny: Tiny, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, 0, "verify", tiny.root / layout, *teacher_words(tiny), "--samples=12")
    assert (found["looked_at"], found["usable"], found["differing"], found["agrees"]) == (12, 12, 0, True)
    assert {(row["type"], row["temperature"]) for row in found["measured"]} == {
        (kind, temperature) for kind in ("math_tool", "code") for temperature in (1.0, 2.0)
    }
    for row in found["measured"]:
        assert abs(row["stored_divergence"]) < 0.03
        assert row["stored_error"] == pytest.approx(row["fresh_error"], abs=1e-3)


def test_verify_says_the_same_however_many_records_it_asks_of_at_once(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, sizes = [], []

    def passes(windows: Iterable[Window], budget: int) -> list[list[Window]]:
        cut = batches(windows, budget if not found else 1)
        sizes.append([len(batch) for batch in cut])
        return cut

    monkeypatch.setattr("liquid_llm.jobs.store.batches", passes)
    for _ in range(2):
        found.append(asked(capsys, 0, "verify", tiny.root / "shards", *teacher_words(tiny), "--samples=12"))
    assert (sum(sizes[0]), sizes[1]) == (12, [1] * 12)
    assert max(sizes[0]) > 2
    together, alone = found
    for one, other in zip(alone.pop("measured"), together.pop("measured"), strict=True):
        assert one.pop("type") == other.pop("type")
        assert one == pytest.approx(other, rel=1e-3, abs=2e-3)
    assert alone == {**together, "identical": alone["identical"]}  # of sums in another order some bytes differ


def test_verify_refuses_another_teacher(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", VOCAB_SIZE, seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(tmp_path / "other")
    assert main(["store", "verify", str(tiny.root / "shards"), *teacher_words(tiny, tmp_path / "other")]) == 3
    assert "another teacher" in capsys.readouterr().err


def test_verify_finds_a_store_that_only_says_it_is_of_this_teacher(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signal of other weights under this teacher's name: identities, hashes and checksums are all in order."""
    other = tmp_path / "elsewhere" / tiny.teacher.name
    model = tiny_model("llama", VOCAB_SIZE, seed=9, max_position_embeddings=256)
    model.save_pretrained(other)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(other)
    folder = tmp_path / "store"
    words = tiny.capture_words(mc_teacher_id=other, math_logits_dir=folder, code_logits_dir=folder, **CODEC)
    assert main(["capture", *words]) == 0
    true = json.loads((tiny.root / "shards" / "store.json").read_text())
    source = open_store(str(folder))
    assert source.identity.teacher_revision != true["teacher_revision"]
    forged = shutil.copytree(tiny.root / "pt", tmp_path / "forged")
    _forge(folder, forged)
    found = asked(capsys, 3, "verify", forged, *teacher_words(tiny), "--samples=10")
    assert (found["usable"], found["differing"], found["agrees"]) == (10, 10, False)
    assert all(row["drifted"] for row in found["measured"] if row["temperature"] == 1.0)


def _forge(source: Path, target: Path) -> None:
    """Replace the payloads of ``target``'s records by those of ``source``."""
    from dataclasses import replace

    from liquid_llm.signal_store.pt import file_name, to_bytes
    from liquid_llm.signal_store.records import Record

    there = open_store(str(target))
    for name, record in open_store(str(source)).layout.records():
        mine = there.layout.read(name)
        assert isinstance(record, Record)
        (target / file_name(name)).write_bytes(to_bytes(replace(mine, payload=record.payload)))


def test_verify_counts_stale_and_corrupt_apart(
    tiny: Tiny, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(shards_of(store)[0].read_bytes())
    data[-10] ^= 1
    shards_of(store)[0].write_bytes(data)
    rows = [json.loads(line) for line in (tiny.root / "code.jsonl").read_text().splitlines()]
    changed = [{**rows[0], "text": "def other():\n    return 1\n"}, *rows[1:]]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    shutil.copy(tiny.root / "math_tool.jsonl", tmp_path)
    lines = [{"path": f"{kind}.jsonl", "type": kind, "weight": 1.0} for kind in ("math_tool", "code")]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"--teacher={tiny.teacher}", f"--manifest={manifest}", f"--data-cache={tmp_path / 'tokens'}"]
    found = asked(capsys, 3, "verify", store, *words, "--samples=1000")
    assert (found["looked_at"], found["usable"], found["stale"], found["corrupt"]) == (80, 78, 1, 1)
    assert sorted(why.split(":")[0] for why in found["examples"].values()) == ["corrupt", "stale"]
    assert found["verdict"] == "1 stale, 1 corrupt, 0 differing: the usable ones say what the teacher says"


def test_verify_says_how_many_samples_have_a_record(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    manifest = tmp_path / "manifest.jsonl"
    rows = (tiny.root / "code.jsonl").read_text().splitlines()[:6]
    (tmp_path / "code.jsonl").write_text("\n".join(rows) + "\n")
    manifest.write_text(json.dumps({"path": "code.jsonl", "type": "code", "weight": 1.0}) + "\n")
    words = {"math_logits_dir": folder, "code_logits_dir": folder, "dataset_manifest": manifest, **CODEC}
    assert main(["capture", *tiny.capture_words(**words)]) == 0
    found = asked(capsys, 0, "verify", folder, *teacher_words(tiny), "--samples=3")
    assert (found["with_record"], found["samples"]) == (6, 80)
    assert found["coverage"]["math_tool"] == {"samples": 40, "with_record": 0}
    (shard,) = shards_of(folder)
    shard.write_bytes(b"")
    found = asked(capsys, 3, "verify", folder, *teacher_words(tiny), "--samples=3")
    assert (found["agrees"], found["verdict"]) == (False, "3 corrupt, 0 differing: none could be compared")
    assert main(["store", "verify", str(folder), *teacher_words(tiny), "--samples=3"]) == 3
    rows = shown_rows(capsys.readouterr().out)
    assert (rows["samples"], rows["with_record"], rows["verdict"]) == ("80", "6", found["verdict"])


# ---------------------------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize("layout", ["pt", "shards"])
def test_stats_add_up(tiny: Tiny, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.root / layout
    found = asked(capsys, 0, "stats", folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert found["files"] == len(files)
    assert sum(found["parts_bytes_per_token"].values()) == pytest.approx(found["bytes_per_token"])
    assert sum(name.startswith("payload: ") for name in found["parts_bytes_per_token"]) == 4
    assert {kind: row["records"] for kind, row in found["types"].items()} == {"math_tool": 40, "code": 40}
    assert (found["sampled"], found["corrupt"], found["stale"], found["problems"]) == (80, 0, 0, [])
    for row in found["types"].values():
        assert row["mass"] == pytest.approx(1, abs=1e-3)
        assert 0 < row["tail_share"] < 1


def test_the_default_codec_tells_its_parts_and_agrees(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (tiny.root / "code.jsonl").read_text().splitlines()[:6]
    (tmp_path / "code.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "manifest.jsonl").write_text('{"path": "code.jsonl", "type": "code", "weight": 1.0}\n')
    words = {"dataset_manifest": tmp_path / "manifest.jsonl", "code_logits_dir": tmp_path / "store"}
    assert main(["capture", *tiny.capture_words(**words)]) == 0
    teacher = [f"--teacher={tiny.teacher}", f"--manifest={words['dataset_manifest']}"]
    found = asked(capsys, 0, "stats", tmp_path / "store", *teacher, f"--data-cache={tiny.root / 'tokens'}")
    assert (found["codec"], found["layout"], found["sampled"]) == ("tail", "shards", 6)
    assert sum(name.startswith("payload: ") for name in found["parts_bytes_per_token"]) > 4
    assert found["types"]["code"]["mass"] == pytest.approx(1, abs=0.1)
    (measured,) = found["fidelity"]["measured"]
    assert found["fidelity"]["identical"] == 6
    assert abs(measured["stored_divergence"]) < 0.05
    assert measured["stored_error"] < 0.1


def test_stats_with_the_teacher_show_fidelity(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, 0, "stats", tiny.root / "shards", *teacher_words(tiny), "--samples=8", "--temperature=2")
    assert {row["type"] for row in found["fidelity"]["measured"]} <= {"math_tool", "code"}
    assert found["fidelity"]["agrees"]
    assert main(["store", "stats", str(tiny.root / "shards"), f"--teacher={tiny.teacher}"]) == 2
    assert "--teacher and --manifest go together" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 40, -200])
def test_stats_count_what_cannot_be_read(
    one_shard: Path, tmp_path: Path, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard emptied, cut inside its front, and cut before its last records."""
    store = shutil.copytree(one_shard, tmp_path / "store")
    (shard,) = shards_of(store)
    shard.write_bytes(shard.read_bytes()[:keep])
    found = asked(capsys, 0, "stats", store)
    assert found["records"] == 80
    assert found["bytes"] == sum(path.stat().st_size for path in store.iterdir() if path.is_file())
    assert main(["store", "stats", str(store)]) == 0
    shown = capsys.readouterr().out
    if keep < 0:
        assert 0 < found["unreadable"] < 10
        assert found["corrupt"] == found["unreadable"] == len(found["examples"])
        assert all(why.startswith("corrupt: ") for why in found["examples"].values())
        return
    assert (found["unreadable"], found["positions"], found["bytes_per_token"]) == (80, 0, None)
    assert (found["sampled"], found["types"], list(found["examples"])) == (0, {}, [shard.name])
    rows = shown_rows(shown)
    assert [rows[name] for name in ("records", "files", "positions", "unreadable")] == ["80", "3", "0", "80"]
    assert (rows["bytes_per_token"], rows["types"]) == ("-", "-")


def test_stats_of_stale_and_damaged_files_name_them(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny.root / "pt", tmp_path / "pt")
    values = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**values, "teacher_revision": "another"}))
    next(folder.glob("math_tool-*.pt")).write_bytes(b"")
    found = asked(capsys, 0, "stats", folder)
    assert (found["stale"], found["corrupt"], found["unreadable"], len(found["examples"])) == (79, 1, 1, 20)
    assert any(why.startswith("stale: captured with teacher revision") for why in found["examples"].values())
    assert [row["mass"] for row in found["types"].values()] == [None, None]
    assert main(["store", "stats", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^    mass +-$", shown, re.MULTILINE)) == 2


# ----------------------------------------------------------------------------------------------------------------- diff


def test_diff_names_what_differs(tiny: Tiny, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "half"
    codec = {"math_logits_dir": folder, "code_logits_dir": folder, "codec": "topk", "topk": 8, "seq_len": 40}
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"path": str(tiny.root / "code.jsonl"), "type": "code", "weight": 1.0}) + "\n")
    assert main(["capture", *tiny.capture_words(**codec, dataset_manifest=manifest)]) == 0
    found = asked(capsys, 3, "diff", store, folder)
    assert found["identity"]["field"] == "codec options"
    assert (found["only_first"], found["only_second"], found["equal"]) == (40, 0, 0)
    assert found["payload"] + found["tokens"] == 40
    assert found["tokens"] > 0  # windows of 40 and of more tokens
    assert all(name.startswith("math_tool-") for name in found["examples"]["only_first"])
    assert asked(capsys, 3, "diff", folder, store)["only_second"] == 40
    assert main(["store", "diff", str(store), str(folder)]) == 3
    assert shown_rows(capsys.readouterr().out)["only_first"] == "40"


# ------------------------------------------------------------------------------------------------------------ the words


def test_every_action_prints_a_table_for_people(
    tiny: Tiny, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (
        (["stats", store], ["bytes_per_token", "tail_share", "sample ids", "KiB"]),
        (
            ["verify", store, *teacher_words(tiny), "--samples=3"],
            ["what its teacher says", "fresh_divergence"],
        ),
        (["pack", store, tmp_path / "packed"], ["packed", "80"]),
        (["diff", store, tmp_path / "packed"], ["equal", "80"]),
    ):
        capsys.readouterr()
        assert main(["store", *map(str, words)]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected), shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["stats", "/no/such/folder"], 3, "there is no signal store here"),
        (["pack"], 2, "SRC, DST"),
        (["mend", "x"], 2, "mend"),
        (["stat", "x"], 2, "Did you mean stats?"),
        (["pack", "x", ""], 2, "DST: got '', expected a folder"),
        (["stats", "x", "--seed=-1"], 2, "--seed: got -1, expected at least 0"),
        (["verify", "x", "--teacher=t", "--manifest=m", "--seed=-1"], 2, "--seed: got -1, expected at least 0"),
        (["stats", "x", "--seed=abc"], 2, "--seed: got 'abc', expected a whole number"),
        (["diff", "a", "b", "--temperature=abc"], 2, "--temperature: got 'abc', expected a number"),
        (["verify", "x", "--temperatures=1,abc"], 2, "--temperatures: got '1,abc', expected comma-separated numbers"),
        ([], 2, "no action is named"),
        (["stats", "x", "--samples=0"], 2, "at least 1"),
        (["diff", "a", "b", "--temperature=-1"], 2, "more than 0"),
        (["verify", "x"], 2, "--teacher"),
        (["stats", "x", "--sample=3"], 2, "liquid store stats: unknown option --sample. Did you mean --samples?"),
        (["verify", "x", "--teacher=t", "--manifest=m", "--smples=3"], 2, "Did you mean --samples?"),
        (["pack", "a", "b", "c"], 2, "unexpected word; got 'c'"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", *words]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_temperature_the_codec_does_not_know(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.root / "shards")
    teacher = teacher_words(tiny)
    for words, option in (
        (["stats", folder, "--temperature=9"], "--temperature"),
        (["diff", folder, folder, "--temperature=9"], "--temperature"),
        (["verify", folder, *teacher, "--temperatures=1,9"], "--temperatures"),
    ):
        assert main(["store", *words]) == 2
        shown = capsys.readouterr().err
        assert f"{option}, store {folder}" in shown
        assert "got 9; expected " in shown
        assert "kd_temperature" not in shown


def test_the_usual_temperature_moves_to_the_codecs(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codec ``sampled`` is read at the temperature of its capture alone."""
    folder, other = tmp_path / "one", tmp_path / "three"
    for store, temperature in ((folder, 1), (other, 3)):
        codec = {"codec": "sampled", "codec_options": f"temperature={temperature}"}
        assert main(["capture", *tiny.capture_words(math_logits_dir=store, code_logits_dir=store, **codec)]) == 0
    assert asked(capsys, 0, "stats", folder)["temperature"] == 1
    found = asked(capsys, 0, "verify", folder, *teacher_words(tiny), "--samples=4")
    assert (found["temperatures"], {row["temperature"] for row in found["measured"]}) == ([1], {1})
    assert asked(capsys, 0, "diff", folder, folder)["temperature"] == 1
    found = asked(capsys, 3, "diff", folder, other)
    assert (found["temperature"], found["payload"], found["decoded_difference_mean"]) == (None, 80, None)
    assert main(["store", "stats", str(folder)]) == 0
    assert "1 instead of 2: codec 'sampled' is read at 1" in capsys.readouterr().out
