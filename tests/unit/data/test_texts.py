from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.data.texts import (
    text_documents,
    wikitext_articles,
)


@given(
    st.lists(
        st.sampled_from(["", " = A = \n", " = = B = = \n", " some words \n", "x" * 20_000 + "\n", None]), max_size=60
    )
)
def test_no_line_of_wikitext_is_lost_or_moved(lines: list[str | None]) -> None:
    made = list(wikitext_articles(lines))
    kept = [line for _, text in made if text is not None for line in text.split("\n") if line]
    assert kept == [line.rstrip("\n") for line in lines if line]
    assert [number for number, text in made if text is None] == [n for n, line in enumerate(lines) if line is None]
    for start, text in made:
        if text is not None:
            assert text.startswith(lines[start] or "")
            assert " = A = \n" not in text[1:]
            assert len(text) < 32_768 + 20_002


@pytest.mark.parametrize("wikitext", [True, False])
def test_numbers_of_documents_ascend(wikitext: bool) -> None:
    lines = [f" = Title {n} = \n" if n % 9 == 0 else "words " * 400 + "\n" if n % 4 else "" for n in range(400)]
    starts = [start for start, _ in (wikitext_articles if wikitext else text_documents)(lines)]
    assert starts == sorted(set(starts))
    assert len(starts) > 20


@given(st.lists(st.sampled_from(["", "  \n", "a word\n", " b \n", "y" * 5000 + "\n"]), max_size=40))
def test_no_word_of_plain_text_is_lost_and_cuts_are_at_empty_lines(lines: list[str]) -> None:
    made = [text or "" for _, text in text_documents(lines)]
    whole = [line.rstrip() for line in lines]
    assert [line for text in made for line in text.split("\n") if line] == [line for line in whole if line]
    assert all(len(text) >= 8_191 for text in made[:-1])
    for (start, _), (following, _) in zip(
        list(text_documents(lines))[:-1], list(text_documents(lines))[1:], strict=True
    ):
        assert "" in whole[start:following]


def test_a_text_without_any_empty_line_is_still_cut() -> None:
    made = [text or "" for _, text in text_documents(["a line of words\n"] * 200_000)]
    assert len(made) == 4
    assert all(len(text) <= 2**20 + 16 for text in made)
    assert "\n".join(made) + "\n" == "a line of words\n" * 200_000
