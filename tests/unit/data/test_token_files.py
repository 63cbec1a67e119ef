"""Which data file a sample is of: known through every view, and asked for only where it is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.datasets import UNFRAMED
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.records import stable_sample_id
from liquid_llm.data.tokens import TokenDataset, build_token_dataset, split

FILE_NAMES = ["first", "second", "third", "fourth"]


def write_files(folder: Path, rows: list[list[str]]) -> list[str]:
    paths = []
    for number, texts in enumerate(rows):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    return paths


def builder(files: list[str], folder: Path) -> Callable[..., TokenDataset]:
    def build(**options: Any) -> TokenDataset:
        cache = folder / "cache"
        return build_token_dataset(files, "code", tiny_tokenizer(), "hash", cache, framing=UNFRAMED, **options)

    return build


def test_samples_know_their_file_through_every_view(tmp_path: Path) -> None:
    rows = [["a b c", "same text"], ["x"], ["same text", "d e f g h", "i j k"], ["l m n o p q"]]
    files = write_files(tmp_path, rows)
    texts: dict[str, str] = {}
    build = builder(files, tmp_path)
    plain = build()
    assert plain.shard(0) is None
    assert plain.sample(0).shard is None
    dataset = build(shards=FILE_NAMES)
    for name, lines in zip(FILE_NAMES, rows, strict=True):
        for text in lines:
            texts.setdefault(stable_sample_id("code", text), name)  # a text that comes twice is of its first file
    for view in (dataset, dataset.subset(np.array([3, 0, 2])), dataset.windows(3), *split(dataset, 0.5)):
        for index in range(len(view)):
            assert view.shard(index) == view.sample(index).shard == texts[view.document_id(index)]


def test_a_cache_that_does_not_say_files_is_made_again_where_they_are_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_files(tmp_path, [["a b c"], ["d e f"]])
    build = builder(files, tmp_path)
    build()
    (folder,) = (tmp_path / "cache").glob("code-*")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["file_samples"]
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    (tmp_path / "cache" / f".{folder.name}.sha256").unlink()  # as an earlier release left it
    before = (folder / "meta.json").read_text()
    build()
    assert (folder / "meta.json").read_text() == before, "whoever does not ask uses it"
    with caplog.at_level("INFO"):
        dataset = build(shards=["one", "two"])
    assert "does not say which file" in caplog.text
    assert sorted(filter(None, map(dataset.shard, range(2)))) == ["one", "two"]
