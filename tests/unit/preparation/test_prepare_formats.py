"""Every format of raw input, found out and stated; what is malformed, and what fits nothing."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.support import raw_inputs
from tests.support.raw_inputs import RAW, as_parquet, jsonl, wikipedia, zipped

from liquid_llm import storage
from liquid_llm.errors import DataError
from liquid_llm.preparation import streams
from liquid_llm.preparation.formats import Document, Reading, Reject, documents
from liquid_llm.preparation.layouts import FORMATS
from liquid_llm.preparation.mediawiki import plain_text
from liquid_llm.preparation.texts import DOCUMENT_CHARACTERS
from liquid_llm.storage.streams import DamageError


def read(path: Path | str, data: bytes | None = None, kind: str = "lm", **how: str) -> list[object]:
    if data is not None:
        Path(path).write_bytes(data)
    return list(documents(str(path), Reading(kind, **how), lambda _: None))


def texts(found: list[object]) -> list[str]:
    assert not [one for one in found if isinstance(one, Reject)]
    return [one.text for one in found if isinstance(one, Document)]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("stated", [False, True])
def test_every_format_is_found_out_and_can_be_stated(tmp_path: Path, name: str, stated: bool) -> None:
    raw = RAW[name]
    found = read(tmp_path / raw.name, raw.data, raw.type, **({"format": name} if stated else {}))
    assert texts(found) == raw.texts


@pytest.mark.parametrize("name", sorted(RAW.keys() - {"wikitext", "codesearchnet", "fineweb-edu"}))
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zstandard.compress, lambda data: data])
def test_packing_is_told_by_content_whatever_the_name_says(tmp_path: Path, name: str, pack: object) -> None:
    raw = RAW[name]
    plain = {"c4": gzip, "dolma": gzip, "humaneval": gzip, "wikipedia": bz2}.get(name)
    data = pack(plain.decompress(raw.data) if plain else raw.data)  # type: ignore[operator]
    assert texts(read(tmp_path / raw.name, data, raw.type)) == raw.texts


def test_a_name_without_an_ending_is_no_obstacle_where_the_content_says_enough(tmp_path: Path) -> None:
    for name in ("wikipedia", "c4", "fineweb-edu", "gsm8k", "svamp", "asdiv", "codesearchnet"):
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
    assert texts(read(tmp_path / "a.zip", zipped(members), members="*train*")) == ["= train =\nWords ."]
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


@pytest.mark.parametrize(("name", "stated"), [("gsm8k", "wikipedia"), ("fineweb-edu", "txt"), ("wikipedia", "gsm8k")])
def test_an_input_of_another_format_than_stated_is_refused(tmp_path: Path, name: str, stated: str) -> None:
    with pytest.raises(DataError, match=f"stated format {stated}"):
        read(tmp_path / RAW[name].name, RAW[name].data, format=stated)


@pytest.mark.parametrize("name", ["wikipedia", "c4", "codesearchnet", "fineweb-edu", "svamp", "asdiv", "humaneval"])
def test_a_truncated_input_is_an_error_naming_it(tmp_path: Path, name: str) -> None:
    raw = RAW[name]
    for share in (0.3, 0.95):
        with pytest.raises(DataError, match="cannot be read to its end") as caught:
            read(tmp_path / raw.name, raw.data[: int(share * len(raw.data))], raw.type, format=name)
        assert str(tmp_path / raw.name) in str(caught.value)


def test_every_stated_format_has_a_sample_here() -> None:
    assert set(FORMATS) - set(RAW) == {"json", "parquet"}  # tested by a named field above


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
    rejects = {one.place.rpartition(":")[2]: one.reason for one in found if isinstance(one, Reject)}
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


def test_declared_entities_are_refused(tmp_path: Path) -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><ProblemSet><Problem>&b;</Problem>'
    with pytest.raises(DataError, match="entity"):
        read(tmp_path / "a.xml", bomb + b"</ProblemSet>", "math_tool")
    outside = b'<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><ProblemSet><Problem><Body>&x;</Body></Problem>'
    with pytest.raises(DataError, match="entity"):
        read(tmp_path / "a.xml", outside + b"</ProblemSet>", "math_tool")


# ---------------------------------------------------------------------------------------------------------- text, wiki


def test_a_long_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    rng = random.Random(0)
    paragraphs = [" ".join(rng.choices(["lamp", "rope", "jar"], k=rng.randrange(1, 300))) for _ in range(200)]
    found = texts(read(tmp_path / "a.txt", "\n\n".join(paragraphs).encode()))
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert len(found) > 5
    assert all(len(text) >= DOCUMENT_CHARACTERS - 1 for text in found[:-1])


def test_a_text_without_any_empty_line_is_still_cut(tmp_path: Path) -> None:
    found = texts(read(tmp_path / "a.txt", b"a line of words\n" * 200_000))
    assert len(found) == 4
    assert "\n".join(found) + "\n" == "a line of words\n" * 200_000


def test_headings_of_sections_do_not_begin_an_article(tmp_path: Path) -> None:
    assert texts(read(tmp_path / "wiki.valid.tokens", raw_inputs.WIKITEXT.encode())) == RAW["wikitext"].texts


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a {{b|{{c|{{{d}}}}}|}} e", "a e"),
        ("[[A]], [[B|b]], [[:Category:C]] and [[D#e|f]]s", "A, b, Category:C and fs"),
        ("[[File:x.jpg|thumb|[[a]] and {{b}}]]after", "after"),
        ("{| a\n|-\n| {{b}} || [[c]]\n{| nested\n|}\n|}\nafter", "after"),
        ("never {{closed and [[open|x]]", "never {{closed and x"),
        ("a }} b ]] c", "a }} b ]] c"),
        ("'''''both''' here''", "both here"),
        ("=== Deep ===\ntext", "Deep\n\ntext"),
        ("a<ref>x</ref>b<ref name=y/>c<ref name=z>{{q}}</ref>d", "abcd"),
        ("a<math>x^2</math>b <b>c</b><br/>d", "ab c\nd"),
        ("* one\n** two\n: three", "one\ntwo\nthree"),
        ("__NOTOC__ [http://x.y label] [http://x.y] 5 &lt; 6", "label 5 < 6"),
        ("<!-- a -->b<!-- never closed", "b"),
    ],
)
def test_wiki_source_becomes_plain_words(source: str, words: str) -> None:
    assert plain_text(source) == words


@given(st.text(alphabet="[]{}|='<>/ref!-\n:abF", max_size=60))
def test_no_wiki_source_breaks_the_clean_up(source: str) -> None:
    cleaned = plain_text(source)
    assert cleaned == cleaned.strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["{{", "[[", "<ref>", "<!--", "== ", "''", "[http:", "{|\n", "[[File:a|", "}}", "<b"])
def test_the_clean_up_of_hostile_sources_takes_linear_time(piece: str) -> None:
    assert isinstance(plain_text(piece * 100_000), str)


def test_pages_without_words_are_left_out_and_pages_without_text_are_rejects(tmp_path: Path) -> None:
    pages = [("Empty", "0", "", "{{only|a template}}"), ("Good", "0", "", "Words.")]
    dump = wikipedia(pages).replace(b"</mediawiki>", b"<page><title>No text</title><ns>0</ns></page></mediawiki>")
    found = read(tmp_path / "w.xml", dump)
    assert [type(one).__name__ for one in found] == ["NoneType", "Document", "Reject"]


# ------------------------------------------------------------------------------------------------------------- streams


def in_chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


cut_points = st.lists(st.integers(0, 10**6), max_size=30)


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(plain_json, max_size=8), cut_points, st.sampled_from([None, 2]), st.booleans())
def test_array_items_do_not_depend_on_how_the_bytes_come(
    items: list[object], cuts: list[int], indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode("utf-8", errors="surrogatepass")
    assert list(streams.array_items(in_chunks(data, cuts))) == items


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_number_may_be_cut_anywhere(cut: int) -> None:
    items = [0.5, 12, -1e300, 1e-07, 0, -3]
    data = json.dumps(items).encode()
    assert list(streams.array_items([data[:cut], data[cut:]])) == items


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[1", b"[1,", b"[1 2]", b"[1]x", b"{}", b"[1,]", b'["a', b"[\xff]", b"[,1]"]
)
def test_what_is_no_array_is_damage(data: bytes) -> None:
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        with pytest.raises(DamageError):
            list(streams.array_items(chunks))


@given(cut_points)
def test_elements_do_not_depend_on_how_the_bytes_come(cuts: list[int]) -> None:
    data = raw_inputs.wikipedia([("Ä & b", "0", "", "é < ü"), ("C", "1", "Ä", "x")])
    pages = list(streams.elements(in_chunks(data, cuts), ["page"]))
    assert [(page["title"], page["revision/text"], page.get("redirect@title")) for page in pages] == [
        ("Ä & b", "é < ü", None),
        ("C", "x", "Ä"),
    ]


def test_pieces_that_are_far_too_long_are_not_kept_in_memory() -> None:
    endless = (b"x" * 1000 for _ in range(10**9))
    with pytest.raises(DamageError, match="longer"):
        next(streams.array_items((b'["', *[b"x" * 1000] * 100), limit=10_000))
    with pytest.raises(DamageError, match="longer"):
        list(streams.elements((b"<page>", *(next(endless) for _ in range(100))), ["page"], limit=10_000))


def test_a_zip_is_refused_where_one_cannot_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(RAW["wikitext"].data)
    monkeypatch.setattr(streams.CountedStream, "seekable", lambda _: False)
    with pytest.raises(DataError, match="Download it"):
        read(tmp_path / "a.zip")


def test_inputs_come_from_any_place(tmp_path: Path) -> None:
    for name in ("wikitext", "fineweb-edu", "wikipedia"):
        uri = f"memory://raw{tmp_path}/{RAW[name].name}"
        storage.write_bytes(uri, RAW[name].data)
        assert texts(read(uri, kind=RAW[name].type)) == RAW[name].texts
