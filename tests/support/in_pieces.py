"""``liquid anneal`` for students of which a few hundred kilobytes are too large for one checkpoint file."""

from __future__ import annotations

from liquid_llm.wiring import recorder
from trainer.entrypoint import main as anneal


def main(words: list[str]) -> int:
    recorder.LARGEST_FILE = 1000
    return anneal(words)
