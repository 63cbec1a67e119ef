"""What is put around token ids: once, whatever stood there, and nothing around an empty text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from liquid_llm.framing import Framing, Framings

# Few ids, so that texts often begin or end with the framing's own tokens.
IDS = st.lists(st.integers(0, 4), max_size=6)
FRAMINGS = st.builds(Framing, st.integers(0, 2), st.integers(0, 2))


@given(IDS, FRAMINGS)
def test_a_text_has_its_framing_once(ids: list[int], framing: Framing) -> None:
    wrapped, inner = framing.wrap(ids), framing.unwrap(ids)
    assert wrapped == ([framing.begin_id, *inner, framing.end_id] if inner else [])
    assert framing.wrap(wrapped) == wrapped
    assert framing.unwrap(wrapped) == inner
    assert inner in (ids, ids[1:], ids[:-1], ids[1:-1])
    assert inner == ids or framing.begin_id == ids[0] or framing.end_id == ids[-1]


@given(IDS, FRAMINGS)
def test_a_prompt_is_opened_as_the_text_that_it_begins(ids: list[int], framing: Framing) -> None:
    opened = framing.open(ids)
    assert framing.open(opened) == opened
    for behind in (3, 4):  # never a framing's own, so that the text does not end in one
        if framing.unwrap([*ids, behind]):
            assert framing.wrap([*ids, behind])[: len(opened)] == opened
    assert Framing(None, framing.end_id).open(ids) == ids


@given(IDS, st.integers(0, 4))
def test_the_first_framing_only_ends_a_text(ids: list[int], end_id: int) -> None:
    framing = Framing(None, end_id)
    assert framing.unwrap(ids) == ids
    assert framing.wrap(ids) == (ids if ids[-1:] == [end_id] else [*ids, end_id])


def test_a_student_expects_a_begin_token_where_one_of_its_own_types_has_one() -> None:
    usual, bare = Framing(1, 0), Framing(None, 0)
    framings = Framings(usual, {"code": bare})
    assert framings.of(["code"]).student == bare, "the usual one is of no type that there is"
    assert framings.of(["code", "lm"]).student == usual
    assert Framings.from_plain(framings.of(["code", "lm"]).plain()) == framings.of(["code", "lm"])
    assert Framings(usual).student == usual
