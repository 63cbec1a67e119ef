from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.gcs import Bucket

from liquid_llm import storage
from liquid_llm.data.manifest import _entry, entry_files, read_manifest
from liquid_llm.errors import DataError, StorageError

GOOD = '{"path": "lm/*.jsonl", "type": "lm", "weight": 2}'


def manifest(folder: Path, *lines: str) -> str:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_entries_keep_their_order_and_say_where_they_stand(tmp_path: Path) -> None:
    uri = manifest(tmp_path, "", GOOD, "   ", '{"path": "/data/m.parquet", "type": "math_tool"}', "")
    first, second = read_manifest(uri)
    assert (first.path, first.type, first.weight, first.where) == (f"{tmp_path}/lm/*.jsonl", "lm", 2.0, f"{uri}:2")
    assert (second.path, second.type, second.weight, second.where) == ("/data/m.parquet", "math_tool", 1.0, f"{uri}:4")


@pytest.mark.parametrize("path", ["/data/x.jsonl", "gs://bucket/x/*.jsonl", "memory://x.jsonl", "file:///data/x.jsonl"])
def test_absolute_paths_stay(tmp_path: Path, path: str) -> None:
    assert read_manifest(manifest(tmp_path, json.dumps({"path": path, "type": "lm"})))[0].path == path


LOCAL = [
    *("/data/x.jsonl", "file:///data/x.jsonl", "FILE:///data/x.jsonl", "local:///data/x.jsonl", "file:/data/x.jsonl"),
    *("simplecache::/etc/passwd", "simplecache::file:///etc/passwd", "filecache::local:///etc/passwd"),
    *(
        "zip://a.jsonl::/data/x.zip",
        "zip://a.jsonl::file:///data/x.zip",
        "zip://a.jsonl",
        "zip://*::simplecache::/x.zip",
    ),
    *("reference:///data/x.json", "dir::/data", "git:///repository:x.jsonl", "blockcache::gs://b/x::/etc/passwd"),
    *("reference://::gs://b/x.json", "arrow_hdfs::/x", "unheard-of://x"),
    *("a::/etc/passwd", "a/*.jsonl::file:///etc/passwd", "../a::simplecache::/etc/passwd"),
]


@pytest.mark.parametrize("folder", ["memory://data", "zip://data::memory://x.zip"])
@pytest.mark.parametrize("path", LOCAL)
def test_a_manifest_in_a_bucket_names_no_file_of_this_machine(path: str, folder: str) -> None:
    line = json.dumps({"path": path, "type": "lm"}).encode()
    with pytest.raises(DataError, match="may not name files of this machine") as error:
        _entry(line, "m.jsonl:1", f"{folder}/m.jsonl")
    assert str(error.value).startswith("m.jsonl:1: ")
    assert path in str(error.value)


@pytest.mark.parametrize(
    "path", ["x/*.jsonl", "gs://b/x", "https://h/x", "simplecache::gs://b/x", "zip://a/*::simplecache::gs://b/x.zip"]
)
def test_a_manifest_in_a_bucket_names_what_lies_elsewhere(path: str) -> None:
    line = json.dumps({"path": path, "type": "lm"}).encode()
    assert _entry(line, "", "memory://data/m.jsonl").path == (path if ":" in path else f"memory://data/{path}")


def test_a_manifest_named_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(tmp_path, GOOD)
    assert read_manifest("manifest.jsonl")[0].path == "lm/*.jsonl"


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n")
    assert len(read_manifest(str(tmp_path / "m.jsonl"))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{path: 1}", r"not a JSON object"),
        ("[1]", r"not a JSON object; got \[1\]"),
        ('{"path": "x", "type": "lm"', r"not a JSON object"),
        ('{"type": "lm"}', r"no path; expected"),
        ('{"path": "x"}', r"no type; expected"),
        ("{}", r"no path and no type"),
        ('{"path": "", "type": "lm"}', r"path is not a non-empty string"),
        ('{"path": 3, "type": "lm"}', r"path is not a non-empty string; got 3"),
        (
            '{"path": "x", "type": "a chat"}',
            r'name; got "a chat"; expected lm, math_tool, code or another',
        ),
        ('{"path": "x", "type": ""}', r"not a type's name"),
        ('{"path": "x", "type": null}', r"not a type's name; got null"),
        ('{"path": "x", "type": ["lm"]}', r"not a type's name"),
        ('{"path": ' + "[" * 100_000, r"not a JSON object"),
        ('{"path": "x", "type": "lm", "weight": 0}', r"weight is not a positive number; got 0"),
        ('{"path": "x", "type": "lm", "weight": -1}', r"weight is not a positive number; got -1"),
        ('{"path": "x", "type": "lm", "weight": "2"}', r'weight is not a positive number; got "2"'),
        ('{"path": "x", "type": "lm", "weight": true}', r"weight is not a positive number; got true"),
        ('{"path": "x", "type": "lm", "weight": NaN}', r"weight is not a positive number; got NaN"),
        ('{"path": "x", "type": "lm", "weight": Infinity}', r"weight is not a positive number; got Infinity"),
        ('{"path": "x", "type": "lm", "weight": 1' + "0" * 400 + "}", r"weight is not a positive number; got 1000"),
        ('{"path": "x", "type": "lm", "weight": 1e308}', r"weight is not a positive number; got 1e\+308"),
        ('{"path": "x", "type": "lm", "wieght": 2}', r'unknown key; got "wieght"; expected weight'),
        ('{"path": "x", "type": "lm", "Weight": 2}', r'unknown key; got "Weight"; expected weight'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    uri = manifest(tmp_path, GOOD, "", line)
    with pytest.raises(DataError, match=message) as error:
        read_manifest(uri)
    assert str(error.value).startswith(f"{uri}:3: ")


@pytest.mark.parametrize("type", ["lm", "chat", "Math-2", "x_y"])
def test_a_type_may_have_any_name(tmp_path: Path, type: str) -> None:
    assert read_manifest(manifest(tmp_path, json.dumps({"path": "x", "type": type})))[0].type == type


def test_a_licence_is_kept_and_says_nothing_where_there_is_none(tmp_path: Path) -> None:
    given, silent = read_manifest(manifest(tmp_path, GOOD[:-1] + ', "license": "CC0"}', GOOD))
    assert (given.plain()["license"], silent.plain().get("license", "none")) == ("CC0", "none")
    with pytest.raises(DataError, match="license is not a string"):
        read_manifest(manifest(tmp_path, GOOD[:-1] + ', "license": 3}'))


def test_other_tools_keys_are_left_alone(tmp_path: Path) -> None:
    line = {"path": "x", "type": "lm", "license": "cc0", "name": "wiki", "num_tokens": 7}
    assert read_manifest(manifest(tmp_path, json.dumps(line)))[0].weight == 1.0


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a JSON object"):
        read_manifest(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_manifest_without_entries(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"the manifest has no entry; expected {"):
        read_manifest(manifest(tmp_path, text))


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not found"):
        read_manifest(str(tmp_path / "none.jsonl"))


def test_files_come_sorted(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / "lm" / name).write_text("x")
    entry = read_manifest(manifest(tmp_path, GOOD))[0]
    assert entry_files(entry) == [f"{tmp_path}/lm/a.jsonl", f"{tmp_path}/lm/b.jsonl"]


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    uri = manifest(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"the path matches no file; got .*lm/\*\.jsonl") as error:
        entry_files(read_manifest(uri)[0])
    assert str(error.value).startswith(f"{uri}:1: ")


def test_relative_paths_in_a_bucket(gcs: Bucket) -> None:
    folder = f"{gcs.uri}/data"
    for name in ("lm/b.jsonl", "lm/a.jsonl"):
        storage.write_bytes(f"{folder}/{name}", b'{"text": "x"}\n')
    storage.write_bytes(f"{folder}/manifest.jsonl", GOOD.encode())
    entry = read_manifest(f"{folder}/manifest.jsonl")[0]
    assert entry.path == f"{folder}/lm/*.jsonl"
    assert entry_files(entry) == [f"{folder}/lm/a.jsonl", f"{folder}/lm/b.jsonl"]
