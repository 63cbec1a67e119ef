"""WikiText is read in one way: as a named dataset and as a raw download of it, a student sees the same tokens."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from tests.support.datasets import UNFRAMED
from tests.support.raw_inputs import WIKITEXT, zipped
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.data.blocks import TokenStream
from liquid_llm.data.hub import load_hub_dataset
from liquid_llm.data.records import read_records
from liquid_llm.data.tokens import build_token_dataset
from liquid_llm.preparation.catalog import Dataset
from liquid_llm.preparation.dataset import input_files, prepare

TOKENIZER = tiny_tokenizer()
LINES = "".join(f" Line {n:04} of an article that goes on . \n" for n in range(2600))  # 101,400 characters
LONG = f" \n = Long article = \n \n{LINES}"


def as_published(raw: str) -> list[str]:
    """The rows of the dataset on the hub: a row for each line with its newline, ``""`` for a blank one."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]


@pytest.mark.parametrize("raw", [WIKITEXT, LONG, WIKITEXT + LONG + WIKITEXT], ids=["short", "long", "both"])
def test_a_named_dataset_and_a_download_give_the_same_token_stream(
    tmp_path: Path, raw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = datasets.Dataset.from_dict({"text": as_published(raw)})
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
    named, _ = load_hub_dataset(
        str(tmp_path / "saved"), None, TOKENIZER, "h", tmp_path / "tokens", framing=UNFRAMED, validation_fraction=0.05
    )

    (tmp_path / "wikitext-2-raw-v1.zip").write_bytes(zipped({"wikitext-2-raw/wiki.train.raw": raw.encode()}))
    pattern, out = str(tmp_path / "*.zip"), str(tmp_path / "out")
    dataset = Dataset("wikitext", "lm", (pattern,), out, "wikitext-", ".jsonl", format="wikitext")
    marker = prepare(dataset, input_files(dataset))
    assert not marker["counts"]["rejected"]
    files = [f"{out}/{shard['name']}" for shard in marker["shards"]]
    prepared = build_token_dataset(files, "lm", TOKENIZER, "h", tmp_path / "tokens", framing=UNFRAMED)

    texts = [record.text for uri in files for record in read_records(uri, "lm")]
    if raw != WIKITEXT + LONG + WIKITEXT:  # the same article twice is kept once in a prepared dataset
        assert "".join(texts) == "".join(row or "\n" for row in as_published(raw)).lstrip("\n")
        streams = [TokenStream(one) for one in (named, prepared)]
        assert streams[0].read(0, 10**6).tolist() == streams[1].read(0, 10**6).tolist()
        assert len(texts) == {WIKITEXT: 2, LONG: 4}[raw]
    else:
        kept = list(dict.fromkeys(TOKENIZER.decode(named.input_ids(n)) for n in range(len(named))))
        assert [TOKENIZER.decode(prepared.input_ids(n)) for n in range(len(prepared))] == kept
