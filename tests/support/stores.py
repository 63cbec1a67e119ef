"""Small stores of layout ``shards``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.teachers import IDENTITY, make_samples, random_logits

from liquid_llm.data.types import Sample
from liquid_llm.signal_store.codecs.topk import TopKCodec
from liquid_llm.signal_store.shards.folder import ShardsLayout
from liquid_llm.signal_store.store import StoreReader, StoreWriter, open_store

VOCAB = 300
CODEC = TopKCodec(4)
SAMPLES = make_samples(12, low=20, high=90)


def writer(folder: Path | str, **changes: Any) -> StoreWriter:
    options: dict[str, Any] = {"vocab_size": VOCAB, "layout": "shards", **changes}
    return StoreWriter(str(folder), options.pop("teacher", IDENTITY), options.pop("codec", CODEC), **options)


def put(store: StoreWriter, samples: Sequence[Sample], seed: int = 0) -> None:
    for number, sample in enumerate(samples):
        rows = store.codec.encode(random_logits(len(sample.input_ids) - 1, VOCAB, seed=seed + number), 1, 0)
        store.write(sample, len(sample.input_ids), store.codec.pack(rows))


def write(folder: Path | str, samples: Sequence[Sample], seed: int = 0, **changes: Any) -> None:
    store = writer(folder, **changes)
    put(store, samples, seed)
    store.finish()


def statuses(store: StoreReader, samples: Sequence[Sample] = SAMPLES) -> list[str]:
    return [lookup.status for lookup in store.get_many(samples, [1024] * len(samples), 2.0)]


def assert_usable(folder: Path | str, samples: Sequence[Sample] = SAMPLES) -> None:
    store = open_store(str(folder))
    assert len(store) == len(samples)
    assert set(statuses(store, samples)) == {"usable"}
    store.close()


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def condition(store: StoreReader) -> Any:
    assert isinstance(store.layout, ShardsLayout)
    return store.layout.listing
