"""What each codec of an earlier release stored says today what it said then: a constant of the format is not moved.

Whole commands over the same stores are in ``tests/integration/test_upgrades.py``; here a mistake is found in a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.sources import REPOSITORY
from torch import Tensor

from liquid_llm.signal_store.codecs import get_codec
from liquid_llm.signal_store.pt import from_bytes

STORES = REPOSITORY / "tests" / "fixtures" / "release-0.1.0" / "stores"
ROWS = slice(3, 19)


def said(store: Path, temperature: float) -> dict[str, float]:
    """Each tensor of the signal of a few rows as one number, in which the place of each value counts."""
    about = json.loads((store / "store.json").read_text())
    codec = get_codec(about["codec"], about["codec_version"], about["codec_options"])
    record = from_bytes(next(iter(sorted(store.glob("math_tool-0-*.pt")))).read_bytes())
    signal = codec.decode(record.payload, ROWS.start, ROWS.stop, temperature, about["vocab_size"])
    found = {}
    for name, value in vars(signal).items():
        if isinstance(value, Tensor):
            flat = value.double().flatten().nan_to_num(neginf=-100.0)
            found[name] = float(flat @ torch.arange(len(flat), dtype=torch.float64).cos())
    return found


# Worked out by release 0.1.0 itself.
SAID = {
    ("full", 2.0): {"rows": 75.84071},
    ("topk", 1.0): {"ids": 150.9738, "weights": -0.2096819, "log_probs": -1.074538, "tail_mass": 0.4839588},
    ("topk", 3.0): {"ids": 150.9738, "weights": -0.01927322, "log_probs": 0.7789138, "tail_mass": 0.6088914},
    ("sampled", 1.0): {"ids": 2232.983, "weights": 0.5894444, "log_probs": -19.83875, "tail_mass": 0.0},
    ("tail", 1.0): {"ids": 1968.959, "weights": 0.4046549, "log_probs": -12.81766, "tail_mass": 0.0},
    ("tail", 1.5): {"ids": 1968.959, "weights": 0.07753118, "log_probs": -9.368812, "tail_mass": 0.0},
    ("tail", 2.0): {"ids": 1968.959, "weights": 0.0354827, "log_probs": -7.941542, "tail_mass": 0.0},
    ("tail", 4.0): {"ids": 1968.959, "weights": 0.1977067, "log_probs": -6.248358, "tail_mass": 0.0},
}


def test_old_payloads_say_what_they_said() -> None:
    for (codec, temperature), numbers in SAID.items():
        found = said(STORES / f"{codec}-pt", temperature)
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-6), codec
