"""Text in blocks that end with their data file: which blocks there are, in which order, and what is left behind."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support.datasets import UNFRAMED
from tests.support.texts import paragraph
from tests.support.tokenizers import CountingTokenizer

from liquid_llm.data.blocks import Blocks
from liquid_llm.data.learning import CHATML, Learning
from liquid_llm.data.loader import BlockOrder, TrainingStream, WeightedDataset, read_blocks, validation_batches
from liquid_llm.data.many_files import Cut, FileCaches, ManyFiles, read_survey
from liquid_llm.data.tokens import TokenDataset, build_token_dataset, split
from liquid_llm.data.types import MicroBatch
from liquid_llm.errors import DataError
from liquid_llm.framing import Framing

FILES, ROWS, BLOCK = 24, 6, 32
SHORT, EMPTY = 5, 9  # files without a full block
CUT = Cut(BLOCK, 0.2, None, 300, 5, BLOCK)
FRAMINGS = {"end": UNFRAMED, "one": Framing(0, 0), "two": Framing(1, 0)}
WINDOW = {"lm": 1500}  # tokens: a few files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Texts, and long prompts so that nothing is learnt in some blocks; one file is short and one has no sample."""
    rng, folder = random.Random(3), tmp_path_factory.mktemp("blocks")
    for number in range(FILES):
        rows: list[dict[str, Any]] = []
        for row in range(ROWS):
            text = paragraph(rng)[: rng.randrange(8, 400)]
            rows.append({"sample_id": f"s{number}-{row}", "text": text})
            if row == 2:
                rows[-1] = {"sample_id": f"s{number}-{row}", "prompt": text * 4, "completion": "4"}
        if number in (SHORT, EMPTY):
            rows = [{"sample_id": "short", "text": "a few words" if number == SHORT else "a"}]
        (folder / f"part-{number:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def names_of(files: list[str]) -> list[str]:
    return [Path(file).name for file in files]


def how(framing: str) -> dict[str, Any]:
    return {"framing": FRAMINGS[framing], "layout": "blocks", "learning": Learning(chat_template=CHATML)}


def read(files: list[str], cache: Path, cut: Cut = CUT, framing: str = "end", tokenizer: Any = None) -> ManyFiles:
    caches = FileCaches("lm", CountingTokenizer() if tokenizer is None else tokenizer, "h", cache, **how(framing))
    return ManyFiles.read(caches, cut, files, names_of(files))


def of_one(file: str, cache: Path, framing: str) -> tuple[TokenDataset, TokenDataset]:
    """What is trained on, and what is held out, of one file read by itself."""
    return split(build_token_dataset([file], "lm", CountingTokenizer(), "h", cache, **how(framing)), CUT.val_fraction)


def stream(dataset: ManyFiles, rank: int = 0, ranks: int = 1, mask: bool = False) -> TrainingStream:
    sizes = {"block_size": BLOCK, "batch_size": 2, "seed": 5, "window_tokens": WINDOW, "document_mask": mask}
    return TrainingStream([WeightedDataset(dataset, 1.0)], rank=rank, world_size=ranks, **sizes)  # type: ignore[arg-type]


def rows_of(batch: MicroBatch) -> list[tuple[Any, ...]]:
    places = batch.input_ids if batch.places is None else batch.places
    return [tuple(map(tuple, row)) for row in zip(*(x.tolist() for x in (batch.input_ids, batch.labels, places)))]  # noqa: B905


def blocks_of(order: BlockOrder, epoch: int) -> list[tuple[Any, ...]]:
    first, last = epoch * order.num_blocks, (epoch + 1) * order.num_blocks
    batches = [rows_of(order.micro_batch(index)) for index in range(first // 2, -(-last // 2))]
    return [row for batch in batches for row in batch][first % 2 :][: order.num_blocks]


@pytest.mark.parametrize(("framing", "mask"), [("end", True), ("one", False), ("two", True)])
def test_an_epoch_has_each_block_of_each_file_once_and_few_files_are_open(files, cache, framing, mask) -> None:
    many = read(files, cache, framing=framing)
    expected: Counter[Any] = Counter()
    full = behind = samples = tokens = 0
    for number, file in enumerate(files):
        if number == EMPTY:
            continue
        train, _ = of_one(file, cache, framing)
        blocks = Blocks(train, BLOCK)
        full, behind = full + blocks.full, behind + blocks.behind
        samples, tokens = samples + len(train), tokens + train.num_tokens
        if len(blocks):
            expected.update(rows_of(read_blocks("lm", list(map(blocks.span, range(len(blocks)))), mask)))
    assert (many.full_blocks, many.behind, len(many), many.num_tokens) == (full, behind, samples, tokens)
    assert many.num_blocks == expected.total() < full, "in some nothing is learnt"
    ordered = stream(many, mask=mask)
    (order,) = ordered.orders
    assert isinstance(order, BlockOrder)
    assert order.num_blocks == many.num_blocks
    assert many.num_open == 0, "nothing is opened before it is asked for"
    epochs = [blocks_of(order, epoch) for epoch in range(3)]
    assert all(Counter(one) == expected for one in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert many.num_open < FILES / 2
    assert not {names_of(files)[SHORT], names_of(files)[EMPTY]} & set(many.shards)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_those_that_come_in_later_take_the_same_blocks(files, cache, ranks: int) -> None:
    alone = stream(read(files, cache))
    size = alone.orders[0].num_micro_batches
    for rank in range(ranks):
        own = stream(read(files, cache), rank, ranks)
        for position in (size, 2, size // 2, 0):
            number = position * ranks + rank
            assert rows_of(own.micro_batch(position)) == rows_of(alone.at(number))
            assert own.names(number) == alone.names(number)


def test_what_comes_one_after_the_other_is_of_a_few_files(files, cache) -> None:
    many = read(files, cache)
    ordered = stream(many)
    found = [
        {name.split("-")[0] for name in ordered.names(number)} for number in range(ordered.orders[0].num_micro_batches)
    ]
    tenth = len(found) // 10
    near = [len(set().union(*found[start : start + tenth])) for start in range(0, len(found), tenth)]
    assert max(near) < FILES / 2
    assert max(map(len, found)) > 1, "the blocks of several files are shuffled together"


def test_evaluation_takes_the_text_that_it_takes_of_one_cache(files, cache) -> None:
    whole = build_token_dataset(files, "lm", CountingTokenizer(), "h", cache, shards=names_of(files), **how("two"))
    for fraction, tokens in ((0.2, 1), (0.2, 500), (0.2, 10**6), (1, 40), (1, 150), (1, 300), (1, 10**6)):
        held = whole if fraction == 1 else split(whole, fraction)[1]
        many = read(files, cache, Cut(BLOCK, fraction, None, tokens, 0, BLOCK), "two")
        assert many.held == (len(held), held.num_tokens)
        assert many.held_out is not None
        for size in (16, BLOCK):
            sizes: dict[str, Any] = {"block_size": size, "batch_size": 2, "max_tokens": tokens}
            ours, theirs = validation_batches(many.held_out, **sizes), validation_batches(held, **sizes)
            assert list(map(rows_of, ours)) == list(map(rows_of, theirs))
            assert [one.documents.names for one in ours] == [one.documents.names for one in theirs]  # type: ignore[union-attr]
    assert len(many) == len(many.held_out) == len(whole), "all is held out, and all could be trained on"


def test_a_survey_is_enough_to_begin_and_another_block_size_tokenises_nothing(files, cache, monkeypatch) -> None:
    first, tokenizer = read(files, cache), CountingTokenizer()
    monkeypatch.setattr("liquid_llm.data.many_files.open_cache", lambda *_, **__: pytest.fail("a cache was opened"))
    again = read(files, cache, tokenizer=tokenizer)
    stream(again)
    assert (again.fingerprint, again.num_blocks, again.behind) == (first.fingerprint, first.num_blocks, first.behind)
    monkeypatch.undo()
    larger = read(files, cache, Cut(2 * BLOCK, 0.2, None, 300, 5, 2 * BLOCK), tokenizer=tokenizer)
    assert (larger.fingerprint, tokenizer.texts) == (first.fingerprint, 0)
    assert larger.full_blocks < first.full_blocks / 2 + FILES
    known = read_survey(first._cache_dir / first._folders[0], CUT)
    assert known is not None
    assert known.blocks is not None
    lower = {**known.plain(), "blocks": [int(known.lengths[1].sum()) - 1, 0]}
    with pytest.raises(ValueError, match="more blocks"):
        type(known).of_plain(lower)


def test_files_that_fill_no_block_are_refused_with_what_joins_them(files, cache) -> None:
    many = read([files[SHORT], files[EMPTY]], cache, Cut(BLOCK, 0.0, None, 300, 5, BLOCK))
    assert (len(many), many.num_blocks) == (1, 0)
    with pytest.raises(DataError, match=r"no lm data file fills a block.*--order=whole"):
        stream(many)
    with pytest.raises(ValueError, match="blocks of 32 tokens"):
        BlockOrder(read(files, cache), BLOCK, 2, (1, 0))
    prompts = read(files, cache, Cut(4, 0.2, None, 300, 5, 4))
    assert prompts.num_blocks < prompts.full_blocks
