from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.datasets import UNFRAMED, token_dataset

from liquid_llm.data.blocks import TokenStream
from liquid_llm.framing import Framing

FRAMINGS = st.sampled_from([UNFRAMED, Framing(0, 0), Framing(80_000, 0)])
DOCUMENTS = st.lists(st.lists(st.integers(1, 70_000), min_size=2, max_size=12), min_size=1, max_size=12)


def join(documents: list[list[int]], framing: Framing) -> list[int]:
    """The stream, document by document: where begin and end are one token, the end of one begins the next."""
    begin, end = ([] if one is None else [one] for one in (framing.begin_id, framing.end_id))
    if begin == end:
        return begin + [token for row in documents for token in (*row, *end)] if documents else []
    return [token for row in documents for token in (*begin, *row, *end)]


@given(DOCUMENTS, FRAMINGS, st.integers(0, 200), st.integers(0, 60), st.data())
def test_any_stretch_of_the_stream(
    documents: list[list[int]], framing: Framing, start: int, count: int, data: st.DataObject
) -> None:
    dataset = token_dataset(documents, framing=framing)
    kept = data.draw(st.lists(st.integers(0, len(documents) - 1), unique=True).map(sorted))
    for view, rows in ((dataset, documents), (dataset.subset(kept), [documents[number] for number in kept])):
        joined = join(rows, framing)
        stream = TokenStream(view)
        assert len(stream) == len(joined)
        assert stream.read(start, count).tolist() == joined[start : start + count]
