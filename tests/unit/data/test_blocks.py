from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.datasets import UNFRAMED, token_dataset

from liquid_llm.data.blocks import Blocks, TokenStream
from liquid_llm.framing import Framing

FRAMINGS = [UNFRAMED, Framing(0, 0), Framing(80_000, 0)]
DOCUMENTS = st.lists(st.lists(st.integers(1, 70_000), min_size=2, max_size=12), min_size=1, max_size=12)


def join(documents: list[list[int]], framing: Framing) -> list[int]:
    """The stream, document by document: where begin and end are one token, the end of one begins the next."""
    begin, end = ([] if one is None else [one] for one in (framing.begin_id, framing.end_id))
    if begin == end:
        return begin + [token for row in documents for token in (*row, *end)] if documents else []
    return [token for row in documents for token in (*begin, *row, *end)]


@pytest.mark.parametrize("framing", FRAMINGS)
@given(DOCUMENTS, st.integers(0, 40), st.integers(0, 60), st.data())
def test_any_stretch_of_the_stream(
    framing: Framing, documents: list[list[int]], start: int, count: int, data: st.DataObject
) -> None:
    dataset = token_dataset(documents, framing=framing)
    kept = data.draw(st.lists(st.integers(0, len(documents) - 1), unique=True).map(sorted))
    for view, rows in ((dataset, documents), (dataset.subset(kept), [documents[number] for number in kept])):
        joined = join(rows, framing)
        stream = TokenStream(view)
        assert len(stream) == len(joined)
        assert stream.read(start, count).tolist() == joined[start : start + count]


@pytest.mark.parametrize("framing", FRAMINGS)
@given(DOCUMENTS, st.integers(0, 40), st.integers(0, 60))
def test_a_begin_token_of_its_own_is_not_learnt(
    framing: Framing, documents: list[list[int]], start: int, count: int
) -> None:
    """Nothing of its document predicts it. One that also ends the document before is learnt, as that end."""
    stream = TokenStream(token_dataset(documents, framing=framing))
    learnt = stream.read_learnt(start, count)
    if framing.begin_id in (None, framing.end_id):
        assert learnt is None
    else:
        assert learnt is not None
        assert learnt.tolist() == [token != framing.begin_id for token in stream.read(start, count).tolist()]


@pytest.mark.parametrize("framing", FRAMINGS)
@given(st.lists(st.tuples(st.lists(st.integers(1, 70_000), min_size=2, max_size=12), st.booleans()), max_size=12))
def test_blocks_are_the_stream_cut_evenly_without_those_of_which_nothing_is_learnt(framing, documents) -> None:
    texts = [text for text, _ in documents]
    learns = [None, *(None if whole else [False] * (len(text) - 1) + [True] for text, whole in documents)]
    dataset = token_dataset([[1, 2], *texts], framing=framing, learnt=learns)
    stream, joined = TokenStream(dataset), join([[1, 2], *texts], framing)
    blocks = Blocks(dataset, 5)
    assert (blocks.tokens, blocks.full, blocks.behind) == (len(joined), len(joined) // 5, len(joined) % 5)
    learnt = stream.read_learnt(0, len(joined))
    starts = [start for start in range(0, len(joined) - 4, 5) if learnt is None or learnt[start + 1 : start + 5].any()]
    spans = [blocks.span(number) for number in range(len(blocks))]
    assert [(span.start, span.count) for span in spans] == [(start, 5) for start in starts]
    assert [span.read().tolist() for span in spans] == [joined[start : start + 5] for start in starts]
