"""One dataset from inputs to complete shards: the same bytes whatever happens, flat memory, nothing twice."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import forked, killed_preparations, raw_inputs
from tests.support.raw_inputs import RAW, jsonl

from liquid_llm.data.manifest import read_manifest
from liquid_llm.data.records import read_records
from liquid_llm.errors import DataError, UsageError
from liquid_llm.preparation.catalog import Dataset, read_catalog
from liquid_llm.preparation.dataset import MAX_REJECTS, fingerprints, input_files, prepare, read_complete
from liquid_llm.preparation.manifest_lines import write_line
from liquid_llm.preparation.shards import Seen

ROWS = [{"text": f"text {number} " + "word " * (number % 7)} for number in range(60)]


def dataset_at(root: Path, **entry: Any) -> Dataset:
    """Dataset ``a`` of a catalog at ``root``; its inputs are ``raw/*`` unless the entry says otherwise."""
    root.mkdir(parents=True, exist_ok=True)
    plain = {"a": {"type": "lm", "in": "raw/*", "out": "out", "shard_bytes": 700, **entry}}
    (root / "datasets.yaml").write_text(yaml.safe_dump(plain))
    return read_catalog(str(root / "datasets.yaml")).datasets["a"]


def put(root: Path, **files: bytes) -> None:
    (root / "raw").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / "raw" / name.replace("_", ".")).write_bytes(data)


def run(dataset: Dataset, **options: Any) -> dict[str, Any]:
    return prepare(dataset, input_files(dataset), **options)


def records(dataset: Dataset, marker: dict[str, Any]) -> list[Any]:
    return [one for shard in marker["shards"] for one in read_records(f"{dataset.out}/{shard['name']}", dataset.type)]


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("out", ["out", "out/part-*.jsonl.gz"])
def test_every_format_comes_back_through_the_reader_of_shards(tmp_path: Path, name: str, out: str) -> None:
    raw = RAW[name]
    (tmp_path / raw.name).write_bytes(raw.data)
    dataset = dataset_at(tmp_path, **{"in": raw.name, "type": raw.type, "out": out})
    marker = run(dataset)
    found = records(dataset, marker)
    assert [record.whole for record in found] == raw.texts
    assert {record.type for record in found} == {raw.type}
    assert len({record.sample_id for record in found}) == len(found)
    assert read_complete(dataset) == marker
    assert marker["counts"]["records"] == len(raw.texts)
    if out.endswith(".gz"):  # no name and no time in the header: the same records are the same bytes at any time
        packed = Path(dataset.out, marker["shards"][0]["name"]).read_bytes()
        assert packed[3] == 0
        assert packed[4:8] == bytes(4)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())


@settings(max_examples=30)
@given(st.lists(texts, min_size=1, max_size=12), st.lists(st.integers(0, 12), max_size=3), st.integers(1, 400))
def test_how_texts_are_spread_over_inputs_and_shards_changes_no_record(
    some: list[str], cuts: list[int], shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        edges = [0, *sorted(min(cut, len(some)) for cut in cuts), len(some)]
        parts = [some[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]
        put(Path(folder), **{f"{n}_jsonl": jsonl([{"text": t} for t in part]) for n, part in enumerate(parts)})
        dataset = dataset_at(Path(folder), shard_bytes=shard_bytes)
        found = records(dataset, run(dataset))
    assert [record.text for record in found] == list(dict.fromkeys(some))
    assert len({record.sample_id for record in found}) == len(found)


def test_ids_depend_on_type_and_text_alone_and_given_ones_stay(tmp_path: Path) -> None:
    put(tmp_path / "one", a_jsonl=jsonl([{"text": "same"}, {"text": "named", "sample_id": "n/1"}]))
    put(tmp_path / "two", b_txt=b"other\n", c_jsonl=jsonl([{"text": "same"}]))
    first, second = (dataset_at(tmp_path / name) for name in ("one", "two"))
    ids, others = ({r.text: r.sample_id for r in records(d, run(d))} for d in (first, second))
    assert ids["named"] == "n/1"
    assert ids["same"] == others["same"] != others["other"]


def test_one_id_for_two_texts_is_a_reject(tmp_path: Path) -> None:
    rows = [{"text": "one", "sample_id": "x"}, {"text": "two", "sample_id": "x"}, {"text": "one", "sample_id": "x"}]
    put(tmp_path, a_jsonl=jsonl(rows))
    marker = run(dataset_at(tmp_path))
    assert {name: marker["counts"][name] for name in ("records", "repeated", "rejected")} == {
        "records": 1,
        "repeated": 1,
        "rejected": 1,
    }
    (reject,) = (tmp_path / "out/_prepared/a/rejects.jsonl").read_text().splitlines()
    assert "already names another text" in json.loads(reject)["reason"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=20))
def test_seen_ids_are_what_a_dictionary_would_say(pairs: list[tuple[str, str]]) -> None:
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        seen = Seen(Path(folder))
        for name, text in pairs:
            expected = "new" if name not in known else "repeated" if known[name] == text else "conflict"
            known.setdefault(name, text)
            assert seen.add(name, text) == expected
        seen.close()


# ------------------------------------------------------------------------------------------------------------- rejects


def test_rejects_are_counted_all_and_kept_few_and_short(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=b"{broken " + b"x" * 5000 + b"\n", b_jsonl=jsonl([*ROWS[:1], *["no object"] * 300]))
    with pytest.raises(DataError, match="nothing in this input is usable"):
        run(dataset_at(tmp_path))
    put(tmp_path, a_jsonl=b"{broken \xff\n" * 150 + jsonl(ROWS[1:2]) + b'{"text": "\\ud800 half"}\n')
    marker = run(dataset_at(tmp_path))
    rejects = [json.loads(line) for line in (tmp_path / "out/_prepared/a/rejects.jsonl").read_text().splitlines()]
    assert marker["counts"]["rejected"] == 451
    assert len(rejects) == MAX_REJECTS
    assert rejects[0]["place"] == f"{tmp_path}/raw/a.jsonl:1"
    assert all(len(value) <= 400 for reject in rejects for value in reject.values())


def test_an_input_with_nothing_usable_is_an_error_and_its_rejects_can_be_read(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(ROWS[:2]), b_jsonl=b"{broken\n{broken\n")
    dataset = dataset_at(tmp_path)
    with pytest.raises(
        DataError, match=r"raw/b.jsonl: nothing in this input is usable; got 2 rejects.*b\.jsonl:1"
    ) as e:
        run(dataset)
    assert e.value.exit_code == 3
    assert len((tmp_path / "out/_prepared/a/rejects.jsonl").read_text().splitlines()) == 2
    assert read_complete(dataset) is None


def test_secrets_in_the_names_of_inputs_reach_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted0123456789")
    put(tmp_path, **{"a-planted0123456789_jsonl": jsonl(ROWS[:2]) + b"{broken\n"})
    run(dataset_at(tmp_path))
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"planted" not in path.read_bytes(), path


# ------------------------------------------------------------------------------------------------------------- restart


@pytest.fixture
def three(tmp_path: Path) -> Dataset:
    put(tmp_path, **{f"{n}_jsonl": jsonl(ROWS[n * 15 : n * 15 + 20]) for n in range(3)})  # each repeats five
    return dataset_at(tmp_path)


def test_the_same_inputs_give_the_same_bytes(three: Dataset, tmp_path: Path) -> None:
    run(three)
    before = killed_preparations.files(tmp_path / "out")
    assert len([name for name in before if name.endswith(".jsonl")]) > 6
    run(three, force=True)
    assert killed_preparations.files(tmp_path / "out") == before


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("a-*")}


def test_a_new_input_at_the_end_costs_only_itself(three: Dataset, tmp_path: Path) -> None:
    run(three)
    before = modified(tmp_path / "out")
    put(tmp_path, **{"3_jsonl": jsonl([*ROWS[:5], *ROWS[50:60]])})
    marker = run(three)
    after = modified(tmp_path / "out")
    assert before.items() <= after.items()
    assert {name[:7] for name in after.keys() - before.keys()} == {"a-00003"}
    assert marker["counts"]["records"] == 60  # rows 0-49 and 50-59: repeats across inputs are left out
    assert marker["counts"]["repeated"] == 5 + 5 + 5


def test_what_an_earlier_release_made_of_an_input_is_gone_on_from(three: Dataset, tmp_path: Path) -> None:
    """Its markers count one thing more: pieces that were left out on purpose."""
    run(three)
    before = modified(tmp_path / "out")
    for path in (tmp_path / "out/_prepared/a").glob("*.json"):
        marker = json.loads(path.read_text())
        path.write_text(json.dumps({**marker, "counts": {**marker["counts"], "left_out": 3}}))
    assert (read_complete(three) or {})["counts"]["left_out"] == 3
    put(tmp_path, **{"3_jsonl": jsonl(ROWS[55:60])})
    assert run(three)["counts"]["records"] == 55
    assert before.items() <= modified(tmp_path / "out").items()


def test_a_changed_input_is_prepared_anew_and_nothing_stale_is_left(three: Dataset, tmp_path: Path) -> None:
    run(three)
    before = modified(tmp_path / "out")
    put(tmp_path, **{"1_jsonl": jsonl([{"text": "only this"}])})
    (tmp_path / "raw" / "2.jsonl").unlink()
    marker = run(three)
    names = {path.name for path in (tmp_path / "out").glob("a-*")}
    assert names == {shard["name"] for shard in marker["shards"]}
    assert {path.name for path in (tmp_path / "out/_prepared/a").glob("input-*")} == {
        "input-00000.json",
        "input-00001.json",
    }
    kept = {name for name in names if name.startswith("a-00000")}
    assert {name: before[name] for name in kept} == {
        name: stamp for name, stamp in modified(tmp_path / "out").items() if name in kept
    }


@pytest.mark.parametrize("change", [{"type": "code"}, {"format": "jsonl"}, {"shard_bytes": 900}])
def test_other_settings_are_another_preparation(three: Dataset, change: dict[str, Any]) -> None:
    files = input_files(three)
    assert fingerprints(three, files)[-1] != fingerprints(replace(three, **change), files)[-1]


@pytest.mark.parametrize("damage", ["remove", "cut", "marker", "input"])
def test_what_is_not_whole_is_not_complete_and_is_made_whole(three: Dataset, tmp_path: Path, damage: str) -> None:
    run(three)
    before = killed_preparations.files(tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("a-00001*"))[1]
    state = tmp_path / "out/_prepared/a"
    {
        "remove": shard.unlink,
        "cut": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "marker": lambda: (state / "complete.json").write_bytes(b'{"format_version": 1, "sha'),
        "input": lambda: (shard.unlink(), (state / "input-00001.json").write_bytes(b"[]")),
    }[damage]()
    assert read_complete(three) is None
    run(three)
    assert killed_preparations.files(tmp_path / "out") == before


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_shards(tmp_path: Path, earlier: bool) -> None:
    """Real SIGKILLs, one before each call that changes the disk; ``earlier``: over a complete older preparation."""
    dataset = dataset_at(tmp_path, shard_bytes=1000)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    if earlier:
        rows = [{"text": one["text"].replace("text", "word")} for one in ROWS]  # shards of the same sizes
        put(tmp_path, **{f"{n}_jsonl": jsonl([*rows[n * 9 : n * 9 + 12], "bad"]) for n in range(2)})
        run(replace(dataset, out=str(old)))
    put(tmp_path, **{f"{n}_jsonl": jsonl([*ROWS[n * 9 : n * 9 + 12], "bad"]) for n in range(2)})
    run(replace(dataset, out=str(new)))
    words = [str(tmp_path / "datasets.yaml"), str(old), str(new)]
    done = forked.run(["-m", "tests.support.killed_preparations", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["points"] > 20
    assert seen["strays"] > 0
    assert seen["taken_for_complete"] >= 1


# -------------------------------------------------------------------------------------------------------------- memory


def _large(kind: str, rng: random.Random) -> bytes:
    """An input of about 12 MB in 300 records."""
    words = [f"w{rng.randrange(10**6)}" for _ in range(600)]
    some = [" ".join(rng.choices(words, k=6000)) for _ in range(300)]
    if kind == "jsonl":
        return jsonl([{"text": text} for text in some])
    if kind == "txt":
        return "\n\n".join(some).encode()
    if kind == "parquet":
        return raw_inputs.as_parquet([{"text": text} for text in some], row_group_size=25)
    articles = "".join(f" \n = {n} = \n \n {text} \n" for n, text in enumerate(some))
    return raw_inputs.zipped({"wiki.train.raw": articles.encode()})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "zip"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, kind: str) -> None:
    data = _large(kind, random.Random(1))
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data, 1) if kind == "jsonl" else data)
    dataset = dataset_at(tmp_path, **{"in": f"a.{kind}", "shard_bytes": 2**20})
    del data
    tracemalloc.start()
    try:
        marker = run(dataset)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = marker["counts"]["characters"]
    assert size > 12e6
    assert peak < 0.7 * size, f"{peak:,} bytes"  # the buffers of a zip are 8 MB


# ------------------------------------------------------------------------------------------------------------- catalog


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a", "not a mapping of datasets"),
        ("", "got nothing"),
        ("a: [", "not a YAML file"),
        ("a: words", "not a mapping"),
        ("a: {type: lm, in: x}", "no out"),
        ("a: {type: po etry, in: x, out: y}", "po etry.*math_tool"),
        ("a: {type: lm, in: x, out: y, wieght: 1}", "'wieght'; expected weight"),
        ("a: {type: lm, in: x, out: y, weight: 0}", "weight"),
        ("a: {type: lm, in: x, out: y, format: word}", "unknown format.*gsm8k"),
        ("a: {type: lm, in: [x, 5], out: y}", "not a path"),
        ("a/b: {type: lm, in: x, out: y}", "file names"),
        ("a: {type: lm, in: x, out: y*/z}", "out cannot be used"),
        ("a: {type: lm, in: x, out: y/z-*.txt}", "out cannot be used"),
        ("a: {type: lm, in: 'y/*.jsonl', out: y}", "taken for inputs"),
        ("a: {type: lm, in: x, out: y/p-*.jsonl}\nb: {type: lm, in: x, out: y/p-q-*.jsonl}", "taken for each other"),
        ("a: {type: lm, in: x, out: y/p-*.jsonl}\nb: {type: lm, in: x, out: y/p-*.jsonl}", "taken for each other"),
    ],
)
def test_a_catalog_that_cannot_be_used_says_where_and_why(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "datasets.yaml").write_text(content)
    with pytest.raises(UsageError, match=f"(?s){says}") as caught:
        read_catalog(str(tmp_path / "datasets.yaml"))
    assert str(tmp_path / "datasets.yaml") in str(caught.value)


def test_paths_are_relative_to_the_catalog_and_may_be_urls(tmp_path: Path) -> None:
    dataset = dataset_at(tmp_path, **{"in": ["raw/x", "gs://b/raw/*.gz"], "out": "../shards", "manifest": "m.jsonl"})
    assert dataset.inputs == (f"{tmp_path}/raw/x", "gs://b/raw/*.gz")
    assert dataset.shards == f"{tmp_path.parent}/shards/a-*.jsonl"
    assert dataset.manifest == f"{tmp_path}/m.jsonl"


# ------------------------------------------------------------------------------------------------------ manifest lines


def test_a_line_is_added_once_and_other_lines_stay(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b'{"path": "other.jsonl",  "type":"lm"}\n\nnot json')
    dataset = dataset_at(tmp_path, manifest="m.jsonl")
    assert write_line(dataset)
    assert not write_line(dataset)
    assert manifest.read_bytes() == (
        b'{"path": "other.jsonl",  "type":"lm"}\n\nnot json\n{"path": "out/a-*.jsonl", "type": "lm", "weight": 1.0}\n'
    )
    manifest.write_bytes(manifest.read_bytes().replace(b"not json\n", b""))
    assert read_manifest(str(manifest))[1].path == dataset.shards


def test_a_weight_that_is_stated_wins_and_one_edited_by_hand_stays(tmp_path: Path) -> None:
    dataset = dataset_at(tmp_path, manifest="m.jsonl")
    line = {"path": str(dataset.shards), "type": "lm", "weight": 3.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    assert not write_line(dataset)
    assert write_line(replace(dataset, weight=0.5))
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {**line, "weight": 0.5}


def test_a_line_for_a_raw_input_is_enough(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "raw/x.txt", "type": "lm"}\n')
    assert not write_line(dataset_at(tmp_path, manifest="m.jsonl"))


def test_many_writers_of_one_manifest_lose_no_line(tmp_path: Path) -> None:
    datasets = [replace(dataset_at(tmp_path, manifest="m.jsonl"), prefix=f"p{n}-") for n in range(24)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write_line, datasets * 2))
    assert len(read_manifest(str(tmp_path / "m.jsonl"))) == 24
