from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from liquid_llm import storage
from liquid_llm.data import records as records_module
from liquid_llm.data.records import Body, RecordFile, Shard, read_body, read_records, stable_sample_id
from liquid_llm.data.types import TextRecord
from liquid_llm.errors import DataError, StorageError

ROWS: list[dict[str, Any]] = [
    {"text": "one\ntwo", "sample_id": "a/1", "type": "code"},
    {"text": "Ünïcode\u2028and \x85 line separators", "sample_id": None, "type": None},
    {"text": "one\ntwo", "sample_id": "7", "type": "code"},
]
RECORDS = [
    TextRecord("one\ntwo", "code", "a/1"),
    TextRecord(ROWS[1]["text"], "code", stable_sample_id("code", ROWS[1]["text"])),
    TextRecord("one\ntwo", "code", "7"),
]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


ENCODERS = {
    ".jsonl": jsonl,
    ".json": jsonl,
    ".jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    ".json.gz": lambda rows: gzip.compress(jsonl(rows[:1])) + gzip.compress(jsonl(rows[1:])),  # two members
    ".jsonl.zst": lambda rows: zstandard.compress(jsonl(rows)),
    ".json.zst": lambda rows: zstandard.compress(jsonl(rows[:1])) + zstandard.compress(jsonl(rows[1:])),  # two frames
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("ending", ENCODERS)
def test_every_format_from_every_place(tmp_path: Path, ending: str) -> None:
    for folder in (str(tmp_path), f"file://{tmp_path}", f"memory://records{tmp_path}"):
        uri = f"{folder}/shard{ending}"
        storage.write_bytes(uri, ENCODERS[ending](ROWS))
        assert list(read_records(uri, "code")) == RECORDS, folder


@pytest.mark.parametrize("ending", [".JSONL", ".Parquet"])
def test_endings_in_capitals(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"s{ending}").write_bytes(ENCODERS[ending.lower()](ROWS))
    assert list(read_records(str(tmp_path / f"s{ending}"), "code")) == RECORDS


@pytest.mark.parametrize("ending", ENCODERS)
def test_many_records_and_progress(tmp_path: Path, ending: str) -> None:
    letters = random.Random(0)
    rows = [{"text": "".join(letters.choices("abcdefgh ", k=400))} for _ in range(3000)]
    path = tmp_path / f"s{ending}"
    path.write_bytes(ENCODERS[ending](rows))
    shard = RecordFile(str(path), "lm")
    seen = []
    for number, (place, record) in enumerate(shard):
        assert (place, record.text) == (number + 1, rows[number]["text"])
        seen.append(shard.bytes_read)
    assert seen == sorted(seen)
    assert len(set(seen)) > 1
    assert shard.bytes_read == path.stat().st_size


def test_blank_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(place, record.text) for place, record in RecordFile(str(path), "lm")] == [(1, "a"), (4, "b")]


@given(st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text)), st.data())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject) -> None:
    ending = data.draw(st.sampled_from(sorted(ENCODERS)))
    path = tmp_path_factory.mktemp("any") / f"s{ending}"
    path.write_bytes(ENCODERS[ending]([{"text": text}]))
    assert [record.text for record in read_records(str(path), "lm")] == [text]


def test_a_derived_id_depends_on_type_and_text_alone() -> None:
    assert stable_sample_id("lm", "abc") == "1faf9cbe2bb66a84ca8cd82fbe99e489"  # stores of signal depend on it
    names = {stable_sample_id(*pair) for pair in (("lm", "abc"), ("code", "abc"), ("lm", "abd"), ("l", "mabc"))}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not a JSON object \("),
        ('"text"', r"not a JSON object; got text"),
        ("[]", r"not a JSON object; got \[\]"),
        ("null", r"not a JSON object"),
        ("{}", r"text is not a non-empty string; got none"),
        ('{"text": null}', r"text is not a non-empty string; got none"),
        ('{"text": ""}', r"text is not a non-empty string; got an empty string"),
        ('{"text": 5}', r"text is not a non-empty string; got 5"),
        ('{"text": ["a"]}', r"text is not a non-empty string; got \['a'\]"),
        ('{"text": "x", "type": "lm"}', r"type contradicts the manifest; got 'lm'; expected 'code'"),
        ('{"text": "x", "type": 3}', r"type contradicts the manifest; got 3"),
        ('{"text": "x", "sample_id": ""}', r"sample_id is not a non-empty string; got ''"),
        ('{"text": "x", "sample_id": 1.5}', r"sample_id is not a non-empty string; got 1\.5"),
        ('{"text": "x", "sample_id": true}', r"sample_id is not a non-empty string; got True"),
        ('{"text": "x\\ud800"}', r"half of a surrogate pair, which is not text; got '\\ud800'"),
        ('{"text": "x", "sample_id": "\\udfff"}', r"half of a surrogate pair"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    plain = jsonl(ROWS[:2]) + b"\n" + line.encode() + b"\n"
    for ending, compress in {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.items():
        uri = str(tmp_path / f"s{ending}")
        Path(uri).write_bytes(compress(plain))
        with pytest.raises(DataError, match=message) as error:
            list(read_records(uri, "code"))
        assert str(error.value).startswith(f"{uri}:4: ")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_without_end_is_refused_before_it_fills_memory(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 2**20)
    plain = jsonl(ROWS[:1]) + b'{"text": "' + bytes(2**25)
    compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[ending]
    (tmp_path / f"s{ending}").write_bytes(compress(plain))
    del plain
    with pytest.raises(DataError, match=r"s\.jsonl.*:2: the line is far too long"):
        list(read_records(str(tmp_path / f"s{ending}"), "code"))


def test_nesting_without_end_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(DataError, match=r"s\.jsonl:1: not a JSON object"):
        list(read_records(str(tmp_path / "s.jsonl"), "lm"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"s\.jsonl:2: not a JSON object"):
        list(read_records(str(tmp_path / "s.jsonl"), "lm"))


@pytest.mark.parametrize("row", [{"text": None}, {"text": ""}, {"text": "x", "type": "lm"}])
def test_a_bad_parquet_row_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "s.parquet"
    path.write_bytes(as_parquet([*ROWS, {"text": "x", "sample_id": "y", "type": None, **row}]))
    with pytest.raises(DataError, match=r"s\.parquet:4: "):
        list(read_records(str(path), "code"))


@pytest.mark.parametrize("ending", ENCODERS)
def test_an_empty_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"s{ending}"
    path.write_bytes(parquet_without_rows() if ending == ".parquet" else ENCODERS[ending]([]))
    with pytest.raises(DataError, match=rf"s{ending}: the file has no record"):
        list(read_records(str(path), "lm"))


def parquet_without_rows() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    return file.getvalue()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.98])
def test_a_truncated_file_is_not_taken_for_a_short_one(tmp_path: Path, ending: str, cut: float) -> None:
    letters = random.Random(0)
    data = ENCODERS[ending]([{"text": "".join(letters.choices("abcdefgh ", k=300))} for _ in range(50)])
    path = tmp_path / f"s{ending}"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(DataError, match=rf"s{ending}: the file is (truncated or damaged|not a readable parquet file)"):
        list(read_records(str(path), "lm"))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_something_else(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"s{ending}"
    path.write_bytes(jsonl(ROWS) * 50)
    with pytest.raises(DataError, match=rf"s{ending}: .* Write or copy it again"):
        list(read_records(str(path), "lm"))


def test_damage_inside_a_gzip_file(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(jsonl(ROWS * 100)))
    data[-5] ^= 0xFF
    (tmp_path / "s.json.gz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="truncated or damaged"):
        list(read_records(str(tmp_path / "s.json.gz"), "code"))


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    (tmp_path / "s.parquet").write_bytes(as_parquet([{"content": "x", "id": 1}]))
    with pytest.raises(DataError, match=r"no column named text; got columns content, id"):
        list(read_records(str(tmp_path / "s.parquet"), "lm"))


@pytest.mark.parametrize("name", ["s.txt", "s.csv", "s.gz", "jsonl", "s.jsonl.bz2"])
def test_an_unknown_kind_of_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown kind of file; expected a name ending in \.jsonl, "):
        list(read_records(str(tmp_path / name), "lm"))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_missing_file(tmp_path: Path, ending: str) -> None:
    with pytest.raises(StorageError, match="not found"):
        list(read_records(str(tmp_path / f"none{ending}"), "lm"))


def test_records_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(jsonl(ROWS[:1]) + b"broken")
    records = read_records(str(tmp_path / "s.jsonl"), "code")
    assert next(records) == RECORDS[0]
    with pytest.raises(DataError):
        next(records)


FORMS: list[dict[str, Any]] = [
    {"text": "plain"},
    {"prompt": "p", "completion": " c", "sample_id": "1"},
    {"messages": [{"role": "user", "content": "u", "name": "ann"}, {"role": "assistant", "content": "a"}]},
    {"text": "first", "messages": [{"role": "user", "content": "ignored"}]},
    {"prompt": "", "completion": "alone"},
]
MESSAGES = ({"role": "user", "content": "u", "name": "ann"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize("ending", ENCODERS)
def test_prompts_and_conversations_beside_texts(tmp_path: Path, ending: str) -> None:
    columns = dict.fromkeys(name for row in FORMS for name in row)  # a parquet file has them in all rows
    (tmp_path / f"s{ending}").write_bytes(ENCODERS[ending]([{**columns, **row} for row in FORMS]))
    found = list(read_records(str(tmp_path / f"s{ending}"), "code"))
    assert found == [
        TextRecord("plain", "code", stable_sample_id("code", "plain")),
        TextRecord(" c", "code", "1", "p"),
        TextRecord("", "code", found[2].sample_id, None, MESSAGES),
        TextRecord("first", "code", stable_sample_id("code", "first")),
        TextRecord("alone", "code", stable_sample_id("code", "alone"), ""),
    ]
    assert found[1].whole == "p c"


@pytest.mark.parametrize("ending", ENCODERS)
def test_a_conversation_cut_in_prompt_and_completion_is_that_conversation(tmp_path: Path, ending: str) -> None:
    """It keeps the name, so its stored signal and its side of the split; what it is written as can be read again."""
    said = ({"role": "system", "content": "s"}, *MESSAGES)
    rows: list[dict[str, Any]] = [
        {"prompt": list(said[:2]), "completion": list(said[2:])},
        {"prompt": [*said, said[1]], "completion": [said[2]], "sample_id": "own"},
    ]
    (tmp_path / f"s{ending}").write_bytes(ENCODERS[ending]([{"sample_id": None, **row} for row in rows]))
    first, second = read_records(str(tmp_path / f"s{ending}"), "code")
    whole = Body("", None, said)
    assert first == TextRecord("", "code", stable_sample_id("code", whole.whole), None, said, 2)
    assert second == TextRecord("", "code", "own", None, (*said, said[1], said[2]), 4)
    written = read_body(rows[0]).as_record("code", "1")
    assert written == {**rows[0], "type": "code", "sample_id": "1"}
    assert read_body(written) == Body("", None, said, 2)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p"}, "completion is not a non-empty string; got none"),
        ({"prompt": "p", "completion": ""}, "completion is not a non-empty string; got an empty string"),
        ({"completion": "c"}, "prompt is not a string; got none"),
        ({"prompt": 7, "completion": "c"}, "prompt is not a string; got 7"),
        (
            {"prompt": ["p"], "completion": "c"},
            r"prompt and completion are neither two strings nor two lists of messages; got prompt \['p'\], comp",
        ),
        ({"prompt": "p", "completion": [MESSAGES[1]]}, "prompt and completion are neither two strings nor two lists"),
        ({"prompt": [MESSAGES[0]]}, "prompt and completion are neither .* completion none"),
        ({"prompt": [], "completion": [MESSAGES[1]]}, r"prompt is not a list of messages; got \[\]"),
        ({"prompt": [MESSAGES[0]], "completion": ["x"]}, "message 1 of the completion is not an object with"),
        ({"messages": []}, r"messages is not a list of messages; got \[\]"),
        ({"messages": "hello"}, "messages is not a list of messages; got 'hello'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "message 2 is not an object with"),
        ({"messages": [{"content": "x"}]}, "message 1 is not an object with the strings role and content"),
        ({"messages": ["x"]}, "message 1 is not an object"),
        ({}, "text is not a non-empty string; got none"),
    ],
)
def test_bodies_that_are_none_are_refused_with_their_place(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (tmp_path / "s.jsonl").write_bytes(jsonl([{"text": "good"}, row]))
    with pytest.raises(DataError, match=rf"s\.jsonl:2: {problem}"):
        list(read_records(str(tmp_path / "s.jsonl"), "code"))


def test_files_are_read_by_their_earlier_name_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [record.text for _, record in Shard(str(path), "lm")] == ["one", "two"]
