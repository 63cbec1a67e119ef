"""Every format of raw input, found out and stated; what is malformed, and what fits nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard
from tests.support import raw_inputs
from tests.support.raw_inputs import RAW, as_parquet, jsonl, zipped

from liquid_llm import storage
from liquid_llm.data.records import Body
from liquid_llm.errors import DataError
from liquid_llm.preparation import formats
from liquid_llm.preparation.formats import Document, Reading, Reject, documents
from liquid_llm.preparation.layouts import FORMATS


def read(path: Path | str, data: bytes | None = None, kind: str = "lm", **how: str) -> list[object]:
    if data is not None:
        Path(path).write_bytes(data)
    return list(documents(str(path), Reading(kind, **how), lambda _: None))


def texts(found: list[object]) -> list[str]:
    assert not [one for one in found if isinstance(one, Reject)]
    return [one.text for one in found if isinstance(one, Document)]


@pytest.mark.parametrize("name", RAW)
def test_every_format_is_found_out_and_can_be_stated(tmp_path: Path, name: str) -> None:
    raw = RAW[name]
    for stated in ({}, {"format": name}):
        assert texts(read(tmp_path / raw.name, raw.data, raw.type, **stated)) == raw.texts, stated


@pytest.mark.parametrize("name", sorted(RAW.keys() - {"wikitext", "codesearchnet", "fineweb-edu"}))
def test_packing_is_told_by_content_whatever_the_name_says(tmp_path: Path, name: str) -> None:
    raw = RAW[name]
    plain = {"c4": gzip, "dolma": gzip, "humaneval": gzip}.get(name)
    for pack in (gzip.compress, bz2.compress, zstandard.compress, bytes):
        data = pack(plain.decompress(raw.data) if plain else raw.data)
        assert texts(read(tmp_path / raw.name, data, raw.type)) == raw.texts, pack


def test_a_name_without_an_ending_is_no_obstacle_where_the_content_says_enough(tmp_path: Path) -> None:
    for name in ("c4", "fineweb-edu", "gsm8k", "svamp", "asdiv", "codesearchnet"):
        assert texts(read(tmp_path / "download", RAW[name].data, RAW[name].type)) == RAW[name].texts, name


def test_the_same_word_problems_in_other_files(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "1*1=<<1*1=1>>1\n#### 1", "split": "a"}]
    for name, data in {"a.parquet": as_parquet(rows), "a.json": json.dumps(rows).encode()}.items():
        assert texts(read(tmp_path / name, data, "math_tool", format="gsm8k")) == [
            "Question: How many?\nAnswer: 1*1=<<1*1=1>>1\n#### 1"
        ]


def test_a_field_can_be_named(tmp_path: Path) -> None:
    rows = [{"text": "not this", "body": "but this"}]
    for name, data in {
        "a.jsonl": jsonl(rows),
        "a.parquet": as_parquet(rows),
        "a.json": json.dumps(rows).encode(),
    }.items():
        assert texts(read(tmp_path / name, data, field="body")) == ["but this"]


def test_members_of_a_zip_are_chosen_by_a_pattern(tmp_path: Path) -> None:
    members = {f"w/wiki.{part}.tokens": f" \n = {part} = \n \n Words . \n".encode() for part in ("train", "test")}
    assert texts(read(tmp_path / "a.zip", zipped(members), members="*train*")) == [" = train = \n\n Words . \n"]
    assert len(texts(read(tmp_path / "a.zip"))) == 2
    with pytest.raises(DataError, match=r"(?s)a\.zip.*valid.*wiki\.t"):
        read(tmp_path / "a.zip", members="*valid*")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.bin", b"\x00\x01\x02" * 50, "no text"),
        ("a.pdf", b"%PDF-1.4 words", "a beginning like"),
        ("a.jsonl", b"", "nothing in it"),
        ("a.json.gz", gzip.compress(b"", mtime=0), "nothing in it"),
        ("a.xml", b"<html><body>words</body></html>", "a beginning like"),
        ("a.zip", zipped({"a.png": b"x", "model.pkl": b"\x80\x04"}), "without a member to read"),
        ("a.zip", zipped({"in.txt": zipped({"b.txt": b"words"})}), "a zip file inside a zip"),
        ("a.parquet", as_parquet([{"url": "u", "score": 1.0}]), "columns url, score"),
        ("a.jsonl", jsonl([{"url": "u"}] * 1000), "keys url"),
    ],
)
def test_an_input_that_fits_no_format_is_an_error_naming_it(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / name, data)
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("name", "stated"), [("gsm8k", "json"), ("fineweb-edu", "txt"), ("asdiv", "gsm8k")])
def test_an_input_of_another_format_than_stated_is_refused(tmp_path: Path, name: str, stated: str) -> None:
    with pytest.raises(DataError, match=f"stated format {stated}"):
        read(tmp_path / RAW[name].name, RAW[name].data, format=stated)


@pytest.mark.parametrize("name", ["wikitext", "c4", "codesearchnet", "fineweb-edu", "svamp", "asdiv", "humaneval"])
def test_a_truncated_input_is_an_error_naming_it(tmp_path: Path, name: str) -> None:
    raw = RAW[name]
    for share in (0.3, 0.95):
        with pytest.raises(DataError, match="cannot be read to its end") as caught:
            read(tmp_path / raw.name, raw.data[: int(share * len(raw.data))], raw.type, format=name)
        assert str(tmp_path / raw.name) in str(caught.value)


def test_every_stated_format_has_a_sample_here() -> None:
    assert set(FORMATS) - set(RAW) == {"json", "parquet", "wikipedia"}  # tested by a named field above; refused


# ----------------------------------------------------------------------------------------------------------- malformed


def test_malformed_records_are_rejects_with_place_and_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{not json",
        b'["a list"]',
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'\xff\xfe{"text": "bytes"}',
        b'{"text": "code", "type": "code"}',
        b'{"text": "named", "sample_id": ""}',
        b"[" * 100_000,
        b"",
        b'{"text": "last", "type": "article", "sample_id": 7}',
    ]
    found = read(tmp_path / "a.jsonl", b"\n".join(lines))
    rejects = {one.location.rpartition(":")[2]: one.reason for one in found if isinstance(one, Reject)}
    assert set(rejects) == {"2", "3", "4", "5", "6", "7", "8", "9", "10"}
    assert "not JSON" in rejects["2"]
    assert "list" in rejects["3"]
    assert "no string but int" in rejects["5"]
    assert "missing" in rejects["6"]
    assert "its type is code" in rejects["8"]
    good = [one for one in found if isinstance(one, Document)]
    assert [(one.text, one.sample_id) for one in good] == [("good", None), ("last", "7")]
    assert all(len(one.excerpt) <= 200 for one in found if isinstance(one, Reject))


def test_a_text_file_goes_on_after_bytes_that_are_no_text(tmp_path: Path) -> None:
    found = read(tmp_path / "a.txt", b"one\n\xff\xfe\ntwo\n")
    assert [type(one) for one in found] == [Reject, Document]
    assert found[1].text == "one\ntwo"  # type: ignore[attr-defined]


def test_mediawiki_dumps_are_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    dump = b'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><page><title>A</title></page></mediawiki>'
    for data, how in ((dump, {}), (bz2.compress(dump), {"format": "wikipedia"})):
        with pytest.raises(DataError, match=r"a\.xml: MediaWiki dumps .* parquet files of wikimedia/wikipedia"):
            read(tmp_path / "a.xml", data, **how)


@pytest.mark.parametrize("data", [b"[", b"[1", b"[1,", b"[1 2]", b"[1]x", b"[1,]", b'["a', b"[\xff]", b"[" * 100_000])
def test_what_is_no_array_is_damage(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json: the input cannot be read to its end; got not a JSON array"):
        read(tmp_path / "a.json", data)


def test_what_is_read_whole_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_WHOLE_BYTES", 1 << 20)
    for start in (b'[{"text": "', b"<ProblemSet><Problem><Body>"):
        with pytest.raises(DataError, match=r"too large.*Write it as JSON lines"):
            read(tmp_path / "a", gzip.compress(start + b"a" * 2**24), "math_tool")


def test_a_line_without_end_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 16)
    found = read(tmp_path / "a.jsonl", jsonl([{"text": "x" * 2**20}, {"text": "good"}]))
    assert [type(one) for one in found] == [Reject, Document]
    assert "far too long" in found[0].reason  # type: ignore[attr-defined]


def test_a_zip_that_lies_about_its_members_is_refused(tmp_path: Path) -> None:
    good = zipped({"a.jsonl": jsonl([{"text": "words"}])})
    member, directory = good.index(b"PK\x01\x02") + 42, len(good) - 22 + 16  # where their offsets stand
    for position, offset in ((member, 2**32 - 16), (member, 7), (directory, 2 * len(good))):
        lying = good[:position] + offset.to_bytes(4, "little") + good[position + 4 :]
        with pytest.raises(DataError, match=r"a\.zip: the input cannot be read to its end"):
            read(tmp_path / "a.zip", lying)
    nameless = zipped({"": b"x", "a.jsonl": jsonl([{"text": "words"}])})
    assert texts(read(tmp_path / "a.zip", nameless)) == ["words"]


def test_declared_entities_are_refused(tmp_path: Path) -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><ProblemSet><Problem>&b;</Problem>'
    with pytest.raises(DataError, match="entity"):
        read(tmp_path / "a.xml", bomb + b"</ProblemSet>", "math_tool")
    outside = b'<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><ProblemSet><Problem><Body>&x;</Body></Problem>'
    with pytest.raises(DataError, match="entity"):
        read(tmp_path / "a.xml", outside + b"</ProblemSet>", "math_tool")


# ---------------------------------------------------------------------------------------------------------- text, wiki


def test_headings_of_sections_do_not_begin_an_article(tmp_path: Path) -> None:
    assert texts(read(tmp_path / "wiki.valid.tokens", raw_inputs.WIKITEXT.encode())) == RAW["wikitext"].texts


# -------------------------------------------------------------------------------------------------------------- places


class Unseekable(io.BufferedReader):
    def seekable(self) -> bool:
        return False


def test_a_zip_is_refused_where_one_cannot_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(RAW["wikitext"].data)
    monkeypatch.setattr(storage, "open_read", lambda uri: Unseekable(io.FileIO(uri)))
    with pytest.raises(DataError, match="Download it"):
        read(tmp_path / "a.zip")


def test_inputs_come_from_any_place(tmp_path: Path) -> None:
    for name in ("wikitext", "fineweb-edu", "dolma"):
        uri = f"memory://raw{tmp_path}/{RAW[name].name}"
        storage.write_bytes(uri, RAW[name].data)
        assert texts(read(uri, kind=RAW[name].type)) == RAW[name].texts


@pytest.mark.parametrize("name", RAW)
def test_progress_comes_in_steps_and_never_passes_the_end(tmp_path: Path, name: str) -> None:
    raw, told = RAW[name], []
    (tmp_path / raw.name).write_bytes(raw.data)
    list(documents(str(tmp_path / raw.name), Reading(raw.type), told.append))
    assert min(told) >= 0
    assert 0 < sum(told) <= len(raw.data)


def test_conversations_and_prompts_are_kept_as_they_are(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (found,) = read(tmp_path / "a.jsonl", jsonl([{"messages": said, "id": 3}]))
    assert isinstance(found, Document)
    assert found.body == Body("", None, tuple(said))
    (found,) = read(tmp_path / "b.jsonl", jsonl([{"prompt": "q", "completion": " a"}]))
    assert isinstance(found, Document)
    assert found.body == Body(" a", "q")
    (found,) = read(tmp_path / "d.jsonl", jsonl([{"prompt": said[:1], "completion": said[1:]}]))
    assert isinstance(found, Document)
    assert found.body == Body("", None, tuple(said), 1)
    (found,) = read(tmp_path / "c.jsonl", jsonl([{"messages": "none", "id": 3}]))
    assert isinstance(found, Reject)
    assert found.reason == "messages is not a list of messages"


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "asdiv", "humaneval"])
def test_a_problem_is_a_prompt_and_its_solution(tmp_path: Path, name: str) -> None:
    """Cut where the answer begins, and together what they always were."""
    raw = RAW[name]
    found = [one for one in read(tmp_path / raw.name, raw.data, raw.type) if isinstance(one, Document)]
    assert [one.text for one in found] == raw.texts
    for one in found:
        assert one.body.prompt
        assert one.body.prompt.endswith("\nAnswer:" if name != "humaneval" else "\n")
        assert "Answer:" not in one.body.text
        assert one.body.text.strip()
