"""Many files, each tokenised apart: the order and the held-out samples are those of one cache of all of them."""

from __future__ import annotations

import json
import logging
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.datasets import UNFRAMED
from tests.support.texts import paragraph
from tests.support.tokenizers import CountingTokenizer

from liquid_llm.data.learning import CHATML, Learning
from liquid_llm.data.loader import TrainingStream, WeightedDataset, validation_batches
from liquid_llm.data.many_files import Cut, FileCaches, ManyFiles
from liquid_llm.data.tokens import TokenDataset, build_token_dataset, gather, split
from liquid_llm.errors import DataError

FILES, ROWS = 40, 6
SIZES = {"block_size": 64, "batch_size": 2, "seed": 5, "sample_tokens": 48, "group_size": 1}
WHOLE, CUT = Cut(48, 0.2, None, 300, 5), Cut(48, 0.2, 48, 300, 5)
HOW: dict[str, Any] = {"framing": UNFRAMED, "layout": "samples", "learning": Learning(chat_template=CHATML)}
ORDER = {"code": 900}  # tokens: a few files


def write_files(folder: Path) -> list[str]:
    """Files of texts, prompts and records of which nothing is learnt; two of them have nothing else."""
    rng = random.Random(3)
    folder.mkdir()
    for number in range(FILES):
        rows: list[dict[str, Any]] = []
        for row in range(ROWS):
            name, text = f"s{number}-{row}", paragraph(rng)[: rng.randrange(8, 400)]
            prompt = text * (1 + 9 * (row == 2))  # nothing is learnt in the window of every third
            rows.append({"sample_id": name, **({"text": text} if row % 2 else {"prompt": prompt, "completion": "4"})})
        if number == 7:  # nothing is learnt in a window
            rows = [{"prompt": "x " * 200, "completion": "4"}]
        if number == 8:  # nothing is learnt
            rows = [{"messages": [{"role": "user", "content": "4"}]}]
        (folder / f"part-{number:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("many") / "data")


@pytest.fixture(scope="module")
def cache(files: list[str]) -> Path:
    return Path(files[0]).parents[1] / "cache"


def names_of(files: list[str]) -> list[str]:
    return [Path(file).name for file in files]


def read(files: list[str], cache: Path, cut: Cut = WHOLE, tokenizer: Any = None) -> ManyFiles:
    made = CountingTokenizer() if tokenizer is None else tokenizer
    caches = FileCaches("code", made, "h", cache, **HOW)
    return ManyFiles.read(caches, cut, files, names_of(files))


def as_one(files: list[str], cache: Path, cut: Cut) -> tuple[TokenDataset, TokenDataset]:
    """What is trained on, and what is held out, of one cache of all files."""
    whole = build_token_dataset(files, "code", CountingTokenizer(), "h", cache, shards=names_of(files), **HOW)
    train, held = split(cut.learnable(whole), cut.val_fraction)
    return train if cut.windows_of is None else train.windows(cut.windows_of), held


def stream(dataset: TokenDataset | ManyFiles, rank: int = 0, ranks: int = 1) -> TrainingStream:
    return TrainingStream([WeightedDataset(dataset, 1.0)], rank=rank, world_size=ranks, window_tokens=ORDER, **SIZES)


def same(one: Any, other: Any) -> bool:
    return (
        one.input_ids.equal(other.input_ids)
        and one.labels.equal(other.labels)
        and [(a.sample_id, a.shard) for a in one.samples] == [(b.sample_id, b.shard) for b in other.samples]
    )


@pytest.mark.parametrize("cut", [WHOLE, CUT, Cut(48, 0.0, None, 0, 0)], ids=["samples", "windows", "none held out"])
def test_the_order_is_that_of_one_cache_and_few_files_are_open(files, cache, cut) -> None:
    many, (train, held) = read(files, cache, cut), as_one(files, cache, cut)
    assert (len(many), many.num_tokens) == (len(train.learnable(48)), train.learnable(48).num_tokens)
    assert many.held == (len(held), held.num_tokens)
    whole, apart = stream(train), stream(many)
    size = whole.orders[0].num_micro_batches
    assert apart.orders[0].num_micro_batches == size > 30
    assert apart.orders[0].shapes() == whole.orders[0].shapes()
    assert many.num_open == 0, "nothing is opened before it is asked for"
    most = 0
    for number in range(2 * size + 3):
        assert same(apart.at(number), whole.at(number))
        most = max(most, many.num_open)
    assert most < FILES / 2
    again = stream(read(files, cache, cut), 1, 3)  # another process that comes in later
    for position in (size, 2, size // 2):
        assert same(again.micro_batch(position), whole.at(3 * position + 1))
        assert again.names(position) == whole.names(position)


def test_what_evaluation_takes_is_what_it_takes_of_one_cache(files, cache) -> None:
    for tokens in (1, 200, 10**6):
        many, (_, held) = read(files, cache, Cut(48, 0.2, None, tokens, 0)), as_one(files, cache, WHOLE)
        sizes = {"block_size": 64, "batch_size": 2, "max_tokens": tokens, "sample_tokens": 48}
        assert many.held_out is not None
        ours, theirs = validation_batches(many.held_out, **sizes), validation_batches(held, **sizes)
        assert len(ours) == len(theirs)
        assert all(same(one, other) for one, other in zip(ours, theirs, strict=True))
        assert [one.documents.names for one in ours] == [one.documents.names for one in theirs]
    assert len(read(files, cache, Cut(48, 0.2, None, 1, 9)).held_out) == 9, "so many samples at least"
    assert read(files, cache, Cut(48, 0.0, None, 99, 9)).held_out is None


def test_nothing_is_tokenised_or_read_again(files, cache, monkeypatch) -> None:
    first = read(files, cache)
    tokenizer = CountingTokenizer()
    opened: list[Path] = []
    monkeypatch.setattr("liquid_llm.data.many_files.open_cache", lambda folder, *_, **__: opened.append(folder))
    again = read(files, cache, tokenizer=tokenizer)
    stream(again)
    assert (tokenizer.texts, opened) == (0, []), "its order is known of surveys alone"
    assert (again.fingerprint, len(again), again.meta) == (first.fingerprint, len(first), first.meta)
    assert set(again.meta.forms) == {"text", "prompt", "messages"}
    assert not {names_of(files)[7], names_of(files)[8]} & set(again.shards)
    assert (again.unseen > 1, again.meta.num_unlearnt) == (True, 1)


def test_a_cache_that_is_lost_or_damaged_is_made_again_and_changed_data_is_refused(files, tmp_path, caplog) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(Path(files[0]).parent, folder)
    own = [str(path) for path in sorted(folder.iterdir())]
    tokenizer = CountingTokenizer()
    many = read(own, cache, tokenizer=tokenizer)
    expected = [many.sample(index).input_ids.tolist() for index in range(10)]
    count, many = tokenizer.texts, read(own, cache, tokenizer=tokenizer)
    for path in cache.iterdir():
        if path.is_dir() and path != many._cache_dir / many._folders[1]:
            shutil.rmtree(path)
    damaged = many._cache_dir / many._folders[1] / "tokens"
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
    with caplog.at_level(logging.WARNING):
        assert [many.sample(index).input_ids.tolist() for index in range(10)] == expected
    assert "is damaged (tokens) and is made again" in caplog.text
    assert count < tokenizer.texts < count * 1.2, "of the others nothing is made"
    Path(own[20]).write_text(json.dumps({"text": "another text"}) + "\n")
    with pytest.raises(DataError, match="changed since this run looked at it"):
        many.part(many.shards.index(names_of(own)[20]))
    Path(own[21]).unlink()
    with pytest.raises(DataError, match="no such file"):
        many.part(many.shards.index(names_of(own)[21]))
    assert len(many.part(30)) > 0, "the others are read as before"


def test_a_damaged_survey_is_made_again(files, cache) -> None:
    first = read(files, cache)
    surveys = sorted(cache.glob(f".*.{WHOLE.name}.json"))
    assert len(surveys) == FILES
    kept = surveys[0].read_bytes()
    longer = kept.replace(b'"tokens": ', b'"tokens": 1')  # as good as any other, were there no hash
    for damage in (b"", b"{}", b"no json", kept[:-9], kept.replace(b'"samples": ', b'"samples": 1'), longer):
        surveys[0].write_bytes(damage)
        again = read(files, cache)
        assert (again.fingerprint, again.num_tokens) == (first.fingerprint, first.num_tokens)
        assert surveys[0].read_bytes() == kept


def test_threads_that_want_a_file_open_it_once(files, cache, monkeypatch) -> None:
    many = read(files, cache)
    opened: list[str] = []
    real = many._caches.open
    monkeypatch.setattr(many._caches, "open", lambda uri, *rest: opened.append(uri) or real(uri, *rest))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(many.sample_id, [0] * 40))
    assert (len(set(found)), len(opened)) == (1, 1)


def test_gathered_samples_are_what_they_were(files, cache) -> None:
    many = read(files, cache)
    parts = [many.part(0), many.part(2).subset(np.array([1, 0]))]
    one = gather(parts)
    expected = [part.sample(index) for part in parts for index in range(len(part))]
    for index, sample in enumerate(expected):
        found = one.sample(index)
        assert (found.sample_id, found.shard, found.input_ids.tolist()) == (
            sample.sample_id,
            sample.shard,
            sample.input_ids.tolist(),
        )
        assert found.learnt_positions(48).tolist() == sample.learnt_positions(48).tolist()
    assert one.counts is not None
    assert one.counts.tolist() == [len(parts[0]), 2]
    assert one.windows(20).num_tokens > one.num_tokens
