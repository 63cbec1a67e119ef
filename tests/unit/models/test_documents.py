"""Documents of a row kept apart: each has the logits, losses and gradients that it has alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.datasets import token_dataset
from tests.support.models import tiny_model

from liquid_llm.data.blocks import Span, TokenStream
from liquid_llm.data.loader import collate, read_blocks
from liquid_llm.errors import ModelError
from liquid_llm.framing import Framing
from liquid_llm.losses.objective import Objective
from liquid_llm.models import heads
from liquid_llm.models.documents import number_documents
from liquid_llm.models.heads import check_documents, hidden_states, output_head
from liquid_llm.models.student import enable_gradient_checkpointing
from liquid_llm.training import Student

SHAPES = ("llama", "gpt2", "lfm2")
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
MODELS = {name: tiny_model(name, **NO_DROPOUT.get(name, {})) for name in SHAPES}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
END = 0


def logits(model, ids, places=None):
    return output_head(model).logits(hidden_states(model, ids, places))


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_logits_of_a_block_are_those_of_each_document_alone(name, rows):
    model, time = MODELS[name], max(map(sum, rows))
    ids = torch.randint(0, 512, (len(rows), time), generator=torch.Generator().manual_seed(time))
    places = torch.zeros_like(ids)
    for row, lengths in zip(places, rows, strict=True):
        row[: sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        found = logits(model, ids, places)
        for number, lengths in enumerate(rows):
            start = 0
            for length in lengths:
                alone = logits(model, ids[number : number + 1, start : start + length])[0]
                torch.testing.assert_close(found[number, start : start + length], alone, **TOLERANCE)
                start += length


def test_places_number_documents():
    places = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert number_documents(places).tolist() == [[0, 0, 0, 1, 2, 2], [0] * 6]


FRAMINGS = {"none": Framing(None, END), "two": Framing(1, END), "one": Framing(END, END)}


@pytest.fixture(params=FRAMINGS)
def stream(request):
    generator = torch.Generator().manual_seed(3)
    lengths = (4, 9, 2, 30, 3, 7, 2, 2, 11, 5)
    texts = [torch.randint(2, 512, (count,), generator=generator).tolist() for count in lengths]
    return TokenStream(token_dataset(texts, framing=FRAMINGS[request.param]))


def documents_of(stream, start, size):
    """The pieces of documents in a block with what stands around them, cut by hand at the end token."""
    pieces: list[list[int]] = [[]]
    for token in stream.read(start, size).tolist():
        pieces[-1].append(token)
        if token == END:  # one that begins as well as ends is asked for by one document and begins the next
            pieces.append([token] if stream._dataset.framing.begin_id == END else [])
    return [piece for piece in pieces if len(piece) > 1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_is_the_sum_over_documents_and_so_is_its_gradient(name, checkpointed, stream):
    spans = [(0, 17), (17, 17), (34, 17)]
    block = read_blocks("lm", [Span(stream, *span) for span in spans], document_mask=True)
    pieces = [piece for span in spans for piece in documents_of(stream, *span)]
    assert block.num_positions == sum(len(piece) - 1 for piece in pieces)
    one, other = (copy.deepcopy(MODELS[name]) for _ in range(2))
    if checkpointed:
        enable_gradient_checkpointing(one.train())
    joined = Student(one, torch.float32)(block, None, Objective())
    alone = Student(other, torch.float32)
    each = [
        alone(collate("lm", [torch.tensor(piece).numpy()]), None, Objective()) for piece in pieces if len(piece) > 1
    ]
    torch.testing.assert_close(joined.loss, sum(single.loss for single in each), **TOLERANCE)
    joined.loss.backward()
    sum(single.loss for single in each).backward()
    for (label, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=label)


def test_without_the_mask_a_block_is_one_sequence(stream):
    block = read_blocks("lm", [Span(stream, 0, 17), Span(stream, 17, 17)])
    assert block.places is None
    assert block.num_positions == 2 * 16 - int((block.input_ids[:, 1:] == 1).sum()), "all but begin tokens"


def test_cut_and_moved_batches_keep_their_places(stream):
    block = read_blocks("lm", [Span(stream, start, 17) for start in (0, 17, 34)], document_mask=True)
    part, held = block.rows(1, 3)
    assert torch.equal(part.places, block.places[1:])
    assert torch.equal(part.targets, block.targets[held])
    assert block.to(torch.device("meta")).places.device.type == "meta"


@pytest.mark.parametrize("name", ["bloom", "mamba", "opt"])
def test_what_mixes_neighbours_is_refused(name):
    with pytest.raises(ModelError, match=r"cannot keep the documents of a block apart.*--document_mask"):
        check_documents(tiny_model(name))


@pytest.mark.parametrize("name", [*SHAPES, "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_is_accepted(name, dtype):
    check_documents(tiny_model(name).to(dtype))


def test_a_convolution_that_is_not_told_is_found_out(monkeypatch):
    monkeypatch.setattr(heads, "extra_arguments", lambda model, places: {})
    with pytest.raises(ModelError, match="depend on its neighbours"):
        check_documents(tiny_model("lfm2"))


def test_a_model_that_was_asked_for_documents_is_as_before_elsewhere():
    model, fresh = tiny_model("lfm2"), tiny_model("lfm2")
    check_documents(model)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(logits(copy.deepcopy(model), ids), logits(fresh, ids))
        assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        places = torch.arange(10).expand(2, 10)
        torch.testing.assert_close(logits(copied, ids, places), logits(fresh, ids), **TOLERANCE)
