"""What fuzzing found stays mended: every target, its seeds and its corpus, without atheris."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tests.fuzz.driver import CORPUS, NAMES, Finding, check, inputs_of, load


@pytest.fixture(autouse=True)
def saying_nothing() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_is_not_found_again(name: str) -> None:
    target = load(name)
    found = {}
    for one, data in inputs_of(name, target).items():
        try:
            check(target, data)
        except Finding as finding:
            found[one] = str(finding)
    assert not found


def test_every_corpus_has_its_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(NAMES)
