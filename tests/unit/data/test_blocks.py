from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.datasets import token_dataset

from liquid_llm.data.blocks import TokenStream

DOCUMENTS = st.lists(st.lists(st.integers(1, 70_000), min_size=2, max_size=12), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(0, 200), st.integers(0, 60), st.data())
def test_any_stretch_of_the_stream(documents: list[list[int]], start: int, count: int, data: st.DataObject) -> None:
    dataset = token_dataset(documents)
    kept = data.draw(st.lists(st.integers(0, len(documents) - 1), unique=True).map(sorted))
    for view, rows in ((dataset, documents), (dataset.subset(kept), [documents[number] for number in kept])):
        joined = [token for row in rows for token in (*row, 0)]
        stream = TokenStream(view, eos_id=0)
        assert len(stream) == len(joined)
        assert stream.read(start, count).tolist() == joined[start : start + count]
