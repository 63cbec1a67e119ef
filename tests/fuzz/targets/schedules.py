"""Schedules, and the other small languages that options are written in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.fuzz.bytes_to_choices import mutate_bytes as mutate
from tests.fuzz.driver import attempt

from liquid_llm.models.student import parse_student
from liquid_llm.schedules import Piecewise, level_from, parse_piecewise
from liquid_llm.sources import read_by_type, read_spec

__all__ = ["check", "mutate", "seeds"]


def seeds() -> Iterator[bytes]:
    yield b"0:0.7,400:0.5,1000:1e-3"
    yield b"code=store:gs://b/c"
    yield b"teacher:layers=1-3,5"


def check(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for maximum in (1.0, None):
        entries = attempt(partial(parse_piecewise, text, option="--alpha_schedule", maximum=maximum))
        if entries is None:
            continue
        schedule = Piecewise(0.1, entries)
        for step, value in entries:
            assert schedule.value(step) == value
        assert parse_piecewise(level_from(text, entries[0][0], entries[0][1]), option="", maximum=maximum)
    for read in (read_spec, lambda one: read_by_type("teacher", [one]), lambda one: read_by_type("alpha", [one])):
        with suppress(ValueError):  # what the parser of options makes a message of
            read(text)
    parse_student(text)
