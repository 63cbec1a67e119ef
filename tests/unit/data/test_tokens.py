from __future__ import annotations

import json
import random
import resource
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.datasets import UNFRAMED, token_dataset
from tests.support.texts import paragraph
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.learning import CHATML, USUAL, Learning
from liquid_llm.data.records import RecordFiles, stable_sample_id
from liquid_llm.data.tokens import TokenDataset, build_token_dataset, is_held_out, split, tokenize
from liquid_llm.data.types import TextRecord
from liquid_llm.errors import DataError, StorageError
from liquid_llm.framing import Framing

TOKENIZER = tiny_tokenizer()
EOS = 0


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    records = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def build(
    *files: str, cache: Path, type: str = "lm", tokenizer: Any = TOKENIZER, hash: str = "h", **options: Any
) -> TokenDataset:
    return build_token_dataset(files, type, tokenizer, hash, cache, framing=UNFRAMED, **options)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Counting:
    """The tokenizer, with the texts it was given."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, text: list[str], **options: Any) -> Any:
        with self.lock:
            self.texts += text
        return TOKENIZER(text, **options)

    def get_vocab(self) -> dict[str, int]:
        return TOKENIZER.get_vocab()


def test_samples_are_whole_and_in_order(tmp_path: Path) -> None:
    long = "eins zwei " * 4000
    first = write(tmp_path / "a.jsonl", {"text": "héllo wörld", "sample_id": "ü/1"}, long)
    second = write(tmp_path / "b.jsonl", "third")
    dataset = build(first, second, cache=tmp_path / "cache")
    assert [dataset.sample(n).sample_id for n in range(3)] == [
        "ü/1",
        stable_sample_id("lm", long),
        stable_sample_id("lm", "third"),
    ]
    assert [dataset.sample(n).input_ids.tolist() for n in range(3)] == [ids("héllo wörld"), ids(long), ids("third")]
    assert dataset.sample(0).input_ids.dtype == np.int32
    assert dataset.lengths.tolist() == [len(ids(text)) for text in ("héllo wörld", long, "third")]
    assert dataset.num_tokens == sum(dataset.lengths)
    assert dataset.input_ids(1, 5).tolist() == ids(long)[:5]
    assert dataset.input_ids(0, 10**6).tolist() == ids("héllo wörld")


@pytest.mark.parametrize("type", ["lm", "code", "chat-2"])
@pytest.mark.parametrize("layout", [None, "blocks", "samples"])
def test_whole_samples_end_with_end_of_text_and_parts_of_blocks_do_not(
    tmp_path: Path, type: str, layout: str | None
) -> None:
    shard = write(tmp_path / "a.jsonl", "2+2=4", "2+2=5<|endoftext|>")
    dataset = build(shard, cache=tmp_path, type=type, layout=layout)
    assert dataset.layout == (layout or ("blocks" if type == "lm" else "samples"))
    end = [EOS] if dataset.layout == "samples" else []
    assert dataset.input_ids(0).tolist() == ids("2+2=4") + end
    assert dataset.input_ids(1).tolist() == ids("2+2=5<|endoftext|>")  # not twice
    assert dataset.sample(0).type == dataset.type == type


@pytest.mark.parametrize(("top", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_two_bytes_a_token_where_they_suffice(tmp_path: Path, top: int, dtype: type) -> None:
    class Wide(Counting):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "wide": top}

        def __call__(self, text: list[str], **options: Any) -> Any:
            return {"input_ids": [[top, 1, top - 1] for _ in text]}

    dataset = build(write(tmp_path / "a.jsonl", "x"), cache=tmp_path, tokenizer=Wide())
    assert dataset.tokens.dtype == dtype
    assert dataset.input_ids(0).tolist() == [top, 1, top - 1]


def test_records_too_short_to_learn_from_are_counted(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", "a", "the river", "b")
    dataset = build(shard, cache=tmp_path)
    assert (len(dataset), dataset.meta.num_short) == (1, 2)
    assert build(shard, cache=tmp_path, type="code").lengths.tolist() == [2, len(ids("the river")) + 1, 2]


def test_nothing_long_enough(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no record has two tokens or more"):
        build(write(tmp_path / "a.jsonl", "a", "b"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("lm-*"))


def test_a_repeated_text_is_kept_once_and_counted(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "the cook", "the river", "the cook")
    second = write(
        tmp_path / "b.jsonl", {"text": "named", "sample_id": "n"}, "the cook", {"text": "the river", "sample_id": "r"}
    )
    third = write(tmp_path / "c.jsonl", {"text": "named", "sample_id": "n"})
    dataset = build(first, second, third, cache=tmp_path / "cache")
    texts = [TOKENIZER.decode(dataset.input_ids(n)) for n in range(len(dataset))]
    assert texts == ["the cook", "the river", "named", "the river"]  # another id is another sample
    assert dataset.meta.num_repeated == 3
    assert [dataset.sample_id(n) for n in (2, 3)] == ["n", "r"]


def test_two_texts_under_one_id_name_both_locations(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "before", {"text": "one text", "sample_id": "x"})
    second = write(tmp_path / "b.jsonl", {"text": "other text", "sample_id": "x"})
    with pytest.raises(DataError) as error:
        build(first, second, cache=tmp_path / "cache")
    assert str(error.value) == (
        f"{second}:1: sample_id 'x' names two different texts; got another text at {first}:2. "
        "Give each record its own sample_id, or none."
    )
    assert not list((tmp_path / "cache").glob("lm-*"))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=40))
def test_repeats_are_found_wherever_they_are(rows: list[tuple[int, bool]]) -> None:
    kept = list(dict.fromkeys(number for number, _ in rows))
    dataset = token_dataset([[number, 1, number] for number, _ in rows], sample_ids=[f"id{n}" for n, _ in rows])
    assert [dataset.sample_id(n) for n in range(len(dataset))] == [f"id{n}" for n in kept]
    assert [dataset.input_ids(n).tolist() for n in range(len(dataset))] == [[n, 1, n] for n in kept]
    clash = [[number, 1, number if same else 99] for number, same in rows]
    if any(len({tuple(tokens) for tokens in clash if tokens[0] == number}) > 1 for number in kept):
        with pytest.raises(DataError, match="names two different texts"):
            token_dataset(clash, sample_ids=[f"id{n}" for n, _ in rows])


# ---------------------------------------------------------------------------------------------------------------- cache


def test_the_second_time_nothing_is_tokenised(tmp_path: Path) -> None:
    shard, tokenizer = write(tmp_path / "a.jsonl", "one", "two"), Counting()
    first = build(shard, cache=tmp_path / "cache", tokenizer=tokenizer)
    second = build(shard, cache=tmp_path / "cache", tokenizer=tokenizer)
    assert tokenizer.texts == ["one", "two"]
    assert [second.sample(n).sample_id for n in range(2)] == [first.sample(n).sample_id for n in range(2)]
    assert second.tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize("change", ["file", "tokenizer", "type", "eos", "layout", "more files"])
def test_what_changes_the_samples_changes_the_cache(tmp_path: Path, change: str) -> None:
    shard, tokenizer = write(tmp_path / "a.jsonl", "one"), Counting()
    build(shard, cache=tmp_path / "cache", tokenizer=tokenizer)
    options: dict[str, Any] = {"type": "lm", "hash": "h", "eos": EOS, "files": [shard]}
    if change == "file":
        write(tmp_path / "a.jsonl", "two")  # of the same size
    options.update({"tokenizer": {"hash": "g"}, "type": {"type": "code"}, "eos": {"eos": 1}}.get(change, {}))
    if change == "more files":
        options["files"] = [shard, write(tmp_path / "b.jsonl", "three")]
    cache, how = tmp_path / "cache", {"layout": "samples"} if change == "layout" else {}
    build_token_dataset(
        options["files"],
        options["type"],
        tokenizer,
        options["hash"],
        cache,
        framing=Framing(None, options["eos"]),
        **how,
    )
    assert len(tokenizer.texts) > 1


@pytest.mark.parametrize("damage", ["cut", "gone", "no meta", "half meta", "other format"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    shard = write(tmp_path / "a.jsonl", "one", "two")
    before = build(shard, cache=tmp_path / "cache").tokens.tolist()
    (folder,) = (tmp_path / "cache").glob("lm-*")
    if damage == "cut":
        (folder / "tokens").write_bytes((folder / "tokens").read_bytes()[:-1])
    elif damage == "gone":
        (folder / "lengths").unlink()
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "half meta":
        (folder / "meta.json").write_text((folder / "meta.json").read_text()[:40])
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 0}))
    tokenizer = Counting()
    assert build(shard, cache=tmp_path / "cache", tokenizer=tokenizer).tokens.tolist() == before
    assert tokenizer.texts == ["one", "two"]


@pytest.mark.parametrize("name", ["tokens", "starts", "lengths", "ids", "id_starts", "fates", "meta.json", "hashes"])
def test_a_flipped_bit_in_a_cache_is_said_and_made_again(tmp_path: Path, name: str, caplog: Any) -> None:
    shard = write(tmp_path / "a.jsonl", "one two", "three four")
    before = build(shard, cache=tmp_path / "cache")
    tokens, fingerprint = before.tokens.tolist(), before.fingerprint
    (folder,) = (tmp_path / "cache").glob("lm-*")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = folder / name if name != "hashes" else folder.with_name(f".{folder.name}.sha256")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    tokenizer = Counting()
    again = build(shard, cache=tmp_path / "cache", tokenizer=tokenizer)
    assert tokenizer.texts == ["one two", "three four"]
    assert again.tokens.tolist() == tokens
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert caplog.text.count("this cache of tokens is damaged") == 1
    assert build(shard, cache=tmp_path / "cache", tokenizer=tokenizer).fingerprint == fingerprint
    assert len(tokenizer.texts) == 2


def test_a_cache_without_hashes_is_used_and_known_by_the_same_fingerprint(tmp_path: Path) -> None:
    """As releases before this one left theirs."""
    shard = write(tmp_path / "a.jsonl", "one two", "three four")
    before = build(shard, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("lm-*")
    folder.with_name(f".{folder.name}.sha256").unlink()
    tokenizer = Counting()
    again = build(shard, cache=tmp_path / "cache", tokenizer=tokenizer)
    assert tokenizer.texts == []
    assert again.fingerprint == before.fingerprint == again.windows(3).fingerprint
    other = build(write(tmp_path / "b.jsonl", "one two", "three five"), cache=tmp_path / "cache")
    assert other.fingerprint != before.fingerprint


def test_another_framing_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """The first is neither in the name nor in the description: caches from before there were versions are used."""
    source = RecordFiles([write(tmp_path / "a.jsonl", "one", "two")], "lm")
    cache = tmp_path / "cache"
    for begin_id, texts in ((None, 2), (0, 2), (5, 2), (None, 0), (0, 0), (5, 0)):
        tokenizer = Counting()
        dataset = tokenize(source, tokenizer, "hash", cache, framing=Framing(begin_id, 0))
        assert dataset.meta.framing == (1 if begin_id is None else 2)
        assert len(tokenizer.texts) == texts
    metas = [json.loads(path.read_text()) for path in cache.glob("lm-*/meta.json")]
    assert {meta.get("framing", "not said") for meta in metas} == {"not said", 2}


def test_the_layout_a_type_has_by_itself_is_not_said(tmp_path: Path) -> None:
    """Caches from before there was a choice keep their name and description, byte for byte."""
    file = write(tmp_path / "a.jsonl", "one", "two")
    for type, layout in (("lm", "blocks"), ("lm", "samples"), ("code", "samples"), ("code", "blocks")):
        usual = build(file, cache=tmp_path / "cache", type=type)
        same = build(file, cache=tmp_path / "cache", type=type, layout=layout)
        assert (same.meta == usual.meta) == (layout == usual.layout)
        metas = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob(f"{type}-*/meta.json")]
        assert [meta.get("layout") for meta in metas].count(None) == 1
        assert {meta.get("layout") for meta in metas} <= {None, "samples" if type == "lm" else "blocks"}


class Fixed:
    """Two records that are known by plain values alone."""

    type: str = "lm"
    identity: object = ["file", 3]
    fraction_read = 1.0
    num_files = 1

    def __iter__(self) -> Iterator[tuple[int, TextRecord]]:
        return enumerate(TextRecord(text, "lm", text) for text in ("one two", "three four"))

    def location(self, number: int) -> str:
        return str(number)


def test_the_names_of_caches_are_pinned(tmp_path: Path) -> None:
    # caches of earlier releases are found by them
    for begin_id, layout in ((None, None), (None, "blocks"), (0, None), (None, "samples")):
        tokenize(Fixed(), TOKENIZER, "hash", tmp_path, framing=Framing(begin_id, 0), layout=layout)
    names = sorted(path.name for path in tmp_path.glob("lm-*"))
    first, second, samples = "de4c04dff003484d38b8c014", "3993741ed487360a03d6dcfc", "9967f4069e8d449e7aef8581"
    assert names == sorted(f"lm-{digest}" for digest in (first, second, samples))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", *(f"row {n}" for n in range(3000)))
    with Path(shard).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3001: not a JSON object"):
        build(shard, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", "one", "two")
    build(shard, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("lm-*")
    half = folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (half / "meta.json").unlink()
    assert len(build(shard, cache=tmp_path / "cache")) == 2
    assert not half.exists()


def test_of_several_that_want_it_one_does_the_work(tmp_path: Path) -> None:
    shard, tokenizer = write(tmp_path / "a.jsonl", *(f"row {n}" for n in range(2000))), Counting()
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(build, shard, cache=tmp_path / "cache", tokenizer=tokenizer) for _ in range(4)]
        assert [len(job.result()) for job in jobs] == [2000] * 4
    assert len(tokenizer.texts) == 2000


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError):
        build(write(tmp_path / "a.jsonl", "one"), cache=tmp_path / "cache")


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """A limit of this process that fails like a disk that fills up while a file is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", *(f"row number {n}" for n in range(4000)))
    with files_no_larger_than(20_000), pytest.raises(StorageError):
        build(shard, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        build(str(tmp_path / "none.jsonl"), cache=tmp_path / "cache")


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{n}.jsonl", *(f"row {n} {m}" for m in range(2500))) for n in range(2)]
    told: list[tuple[float, int]] = []
    dataset = build(
        *shards, cache=tmp_path / "cache", progress=lambda fraction, tokens: told.append((fraction, tokens))
    )
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert len(told) > 3
    assert told[-1][0] == 1.0
    assert sum(tokens for _, tokens in told) == dataset.num_tokens  # what came since it was told last
    assert told[0][0] == pytest.approx(0.5, abs=0.01)  # small shards are read at one go


def test_only_a_bounded_stretch_of_text_is_held(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [paragraph(rng, rng.choice((1, 5, 300))) for _ in range(300)] + [f"short {n}" for n in range(3000)]
    shard, seen = write(tmp_path / "a.jsonl", *texts), []

    class Watching(Counting):
        def __call__(self, text: list[str], **options: Any) -> Any:
            seen.append((len(text), sum(map(len, text[:-1]))))
            return {"input_ids": [[1, 2, 3]] * len(text)}

    assert len(build(shard, cache=tmp_path / "cache", tokenizer=Watching())) == len(set(texts))
    assert max(count for count, _ in seen) == 1024
    assert max(characters for _, characters in seen) < 2**20


# --------------------------------------------------------------------------------------------------------------- splits


def test_who_is_held_out_is_pinned() -> None:
    # runs under way, and stores captured before, rely on who is held out
    assert [n for n in range(40) if is_held_out(f"sample-{n}", 0.1)] == [0, 9]


@given(st.sets(st.text(max_size=8), min_size=1, max_size=30).map(sorted), st.floats(0, 0.99))
def test_split_asks_held_out_for_every_sample(names: list[str], fraction: float) -> None:
    names = [name for name in names if name.isprintable() and name] or ["x"]
    dataset = token_dataset([[n, n] for n in range(len(names))], "code", names)
    train, validation = split(dataset, fraction)
    assert [train.sample_id(n) for n in range(len(train))] == [
        name for name in names if not is_held_out(name, fraction)
    ]
    assert [validation.sample_id(n) for n in range(len(validation))] == [n for n in names if is_held_out(n, fraction)]
    for view in (train, validation):
        for n in range(len(view)):
            assert view.input_ids(n).tolist() == [names.index(view.sample_id(n))] * 2
    assert len(train.split_hashes) == len(train.lengths) == len(train)


@given(st.text(min_size=1, max_size=8).filter(str.isprintable), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_larger_share_keeps_what_was_held_out(name: str, one: float, other: float) -> None:
    if is_held_out(name, min(one, other)):
        assert is_held_out(name, max(one, other))


def test_the_share_held_out() -> None:
    count = sum(is_held_out(f"id-{n}", 0.05) for n in range(20_000))
    assert 900 < count < 1100


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_that_is_none(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        is_held_out("x", fraction)


def test_views_of_views() -> None:
    dataset = token_dataset([[n, n] for n in range(10)])
    view = dataset.subset(np.array([7, 3, 5])).subset(np.array([2, 0]))
    assert [view.sample(n).sample_id for n in range(2)] == ["s5", "s7"]
    assert [view.input_ids(n).tolist() for n in range(2)] == [[5, 5], [7, 7]]
    assert view.num_tokens == 4


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(2, 17), st.sampled_from([None, 9999]))
def test_windows_predict_every_token_but_the_first_of_a_document_once(lengths, size, begin_id):
    rows = [list(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
    whole = token_dataset(rows, type="code", framing=Framing(begin_id, 0))
    windows = whole.windows(size)
    found: dict[str, list[list[int]]] = {}
    for index in range(len(windows)):
        sample = windows.sample(index)
        assert len(sample.input_ids) == windows.lengths[index] <= size
        document, _, place = sample.sample_id.partition("#")
        assert bool(place) == bool(found.get(document))
        assert int(place or 0) == sum(len(one) - 1 for one in found.get(document, []))
        assert windows.split_hashes[index] == whole.split_hashes[int(document.removeprefix("s"))]
        pieces = found.setdefault(document, [])
        if pieces:
            assert sample.input_ids[0] == (pieces[-1][-1] if begin_id is None else begin_id)
        pieces.append(sample.input_ids.tolist())
    predicted = [[token for one in pieces for token in one[1:]] for pieces in found.values()]
    assert [pieces[0][:1] + rest for pieces, rest in zip(found.values(), predicted, strict=True)] == rows
    assert all(len(piece) > 1 for pieces in found.values() for piece in pieces[1:])
    some = windows.subset(np.array([len(windows) - 1]))
    assert some.sample_id(0) == windows.sample_id(len(windows) - 1)


# ------------------------------------------------------------------------------------------------------ what is learnt

PROMPT = {"prompt": "Question: two and two?\nAnswer:", "completion": " four"}
CHAT = {"messages": [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]}


def parts(dataset: TokenDataset, index: int) -> tuple[str, str]:
    """The text of a sample, and that of its learnt tokens."""
    sample = dataset.sample(index)
    learnt = sample.input_ids if sample.learnt is None else sample.input_ids[sample.learnt]
    return TOKENIZER.decode(sample.input_ids), TOKENIZER.decode(learnt)


@pytest.mark.parametrize("framing", [UNFRAMED, Framing(0, 0), Framing(7, 0)])
@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_what_is_learnt_goes_with_the_tokens(tmp_path: Path, layout: str, framing: Framing) -> None:
    """In mixed files; the end behind a completion is learnt, a conversation is framed by its template alone."""
    file = write(tmp_path / "a.jsonl", "a text", PROMPT, CHAT)
    learning = Learning(chat_template=CHATML)
    options = {"layout": layout, "learning": learning, "framing": framing}
    dataset = build_token_dataset([file], "lm", TOKENIZER, "h", tmp_path / "cache", **options)
    begin = "" if framing.begin_id is None or layout == "blocks" else TOKENIZER.decode([framing.begin_id])
    end = "<|endoftext|>" if layout == "samples" else ""
    assert parts(dataset, 0) == (f"{begin}a text{end}", f"{begin}a text{end}")
    assert parts(dataset, 1) == (f"{begin}Question: two and two?\nAnswer: four{end}", f" four{end}")
    assert parts(dataset, 2) == (
        "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n",
        "four<|im_end|>",
    )
    assert dataset.meta.forms == ("messages", "prompt", "text")
    again = build_token_dataset([file], "lm", Counting(), "h", tmp_path / "cache", **options)
    assert [parts(again, n) for n in range(3)] == [parts(dataset, n) for n in range(3)], "from the cache"
    held = dataset.subset(np.array([2, 0]))
    assert [parts(held, n) for n in range(2)] == [parts(dataset, 2), parts(dataset, 0)]


def test_a_cache_of_texts_alone_serves_whatever_is_learnt_and_others_do_not(tmp_path: Path) -> None:
    texts, mixed = write(tmp_path / "a.jsonl", "a text"), write(tmp_path / "b.jsonl", "a text", PROMPT)
    tokenizer = Counting()
    for learning in (USUAL, Learning("all"), Learning("completion", CHATML)):
        build(texts, cache=tmp_path / "cache", tokenizer=tokenizer, learning=learning)
    assert tokenizer.texts == ["a text"]
    assert len(list((tmp_path / "cache").glob("lm-*"))) == 1
    whole = [
        build(mixed, cache=tmp_path / "cache", learning=learning, type="code").sample(1).learnt
        for learning in (USUAL, Learning("all"), USUAL)
    ]
    assert [one is None for one in whole] == [False, True, False]
    assert len(list((tmp_path / "cache").glob("code-*"))) == 2


def test_all_of_a_prompt_and_completion_is_the_text_that_they_make(tmp_path: Path) -> None:
    """Tokens, name and side of the split: with ``--learn=all`` a data set that was cut in two trains as it did."""
    cut, text = dict(PROMPT), {"text": PROMPT["prompt"] + PROMPT["completion"]}
    one, other = (
        build(write(tmp_path / f"{n}.jsonl", row), cache=tmp_path / "cache", learning=Learning("all"), type="code")
        for n, row in enumerate((cut, text))
    )
    assert one.sample(0).input_ids.tolist() == other.sample(0).input_ids.tolist()
    assert one.sample_id(0) == other.sample_id(0)
    assert one.split_hashes.tolist() == other.split_hashes.tolist()
    assert one.learnt is None


def test_records_of_which_nothing_is_learnt_are_left_out_and_counted(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "anyone?"}]}
    learning = Learning(chat_template=CHATML)
    dataset = build(write(tmp_path / "a.jsonl", silent, PROMPT, silent), cache=tmp_path / "c", learning=learning)
    assert (len(dataset), dataset.meta.num_unlearnt) == (1, 2)
    assert dataset.learnable(1000) is dataset
    assert len(dataset.learnable(len(ids(PROMPT["prompt"])) + 1)) == 1, "the first token of the completion is predicted"
    assert len(dataset.learnable(len(ids(PROMPT["prompt"])))) == 0
    with pytest.raises(DataError, match="nothing is learnt from any record"):
        build(write(tmp_path / "b.jsonl", silent), cache=tmp_path / "c", learning=learning)


def test_one_name_for_two_texts_that_are_learnt_differently_is_refused(tmp_path: Path) -> None:
    other = {"prompt": "Question: two", "completion": " and two?\nAnswer: four"}
    with pytest.raises(DataError, match="names two different texts; got another text, of which something else is lea"):
        build(write(tmp_path / "a.jsonl", PROMPT, other), cache=tmp_path / "cache")
    twice = build(write(tmp_path / "b.jsonl", PROMPT, "a text", PROMPT), cache=tmp_path / "cache")
    assert (len(twice), twice.meta.num_repeated) == (2, 1)
    assert parts(twice, 0)[1] == " four"
    assert twice.first_learnt is not None
    assert len(twice.first_learnt) == 2


def test_a_conversation_that_cannot_be_written_out_says_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: there is no chat template.*--chat_template"):
        build(write(tmp_path / "a.jsonl", PROMPT, CHAT), cache=tmp_path / "cache")


@pytest.mark.parametrize("begin_id", [None, 10**6])
def test_windows_of_long_documents_learn_each_learnt_token_once(begin_id: int | None) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 40).tolist()
    ends = np.cumsum(lengths).tolist()
    samples = [list(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True)]
    learnt = [[*np.repeat(rng.random(length) < 0.3, 7)[: length - 1].tolist(), True] for length in lengths]
    whole = token_dataset(samples, "code", learnt=learnt, framing=Framing(begin_id, 0))
    cut = whole.subset(np.arange(0, 40, 2)).windows(10)
    seen: list[int] = []
    for index in range(len(cut)):
        sample = cut.sample(index)
        positions = sample.learnt_positions(10)
        assert positions.any(), "a window of which nothing is learnt is left out"
        assert cut.first_learnt is not None
        assert int(cut.first_learnt[index]) == 1 + int(positions.argmax())
        seen += sample.input_ids[1:][positions].tolist()
    wanted = [
        token
        for ids, mask in list(zip(samples, learnt, strict=True))[::2]
        for token, flag in list(zip(ids, mask, strict=True))[1:]
        if flag
    ]
    assert sorted(seen) == wanted


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=30), min_size=1, max_size=6), st.integers(2, 35), st.data()
)
def test_learnt_positions_of_a_window_are_counted_as_samples_have_them(learnt, window, data):
    rows = [list(range(len(one))) for one in learnt]
    kept = [[*one[:-1], True] for one in learnt]
    some = data.draw(st.permutations(range(len(rows))).map(lambda order: order[: len(order) // 2 + 1]))
    for masks in (kept, None):
        dataset = token_dataset(rows, "code", learnt=masks).subset(np.array(some))
        wanted = [int(dataset.sample(index).learnt_positions(window).sum()) for index in range(len(dataset))]
        assert dataset.count_learnt(window).tolist() == wanted


def test_windows_find_what_is_learnt_without_a_number_for_each_token() -> None:
    length, count = 50_000, 8
    dataset = token_dataset([[7] * length] * count, "code", learnt=[[False, *[True] * (length - 1)]] * count)
    tracemalloc.start()
    windows = dataset.windows(1000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert windows.first_learnt is not None
    assert set(windows.first_learnt.tolist()) == {1}
    assert most < length * count, "less than a byte a token"
