"""What ranks check of a model that is dealt out among them, each for itself; ``main`` is started on two of them."""

from __future__ import annotations

import copy

import torch
from tests.support.models import tiny_model

from liquid_llm.distributed import join_engine
from liquid_llm.models.heads import blocks_of, body_of, hidden_states, output_head
from liquid_llm.optimizers import build_optimizer
from liquid_llm.sharding import (
    deal_out_frozen,
    deal_out_trained,
    gather_whole,
    give_moments,
    make_whole,
    outline,
    take_moments,
)
from liquid_llm.training import Student

CPU = torch.device("cpu")
VOCAB = 63  # an odd number of rows
KINDS = ("llama", "gpt2", "lfm2")


def main(kinds: list[str]) -> int:
    with join_engine(CPU) as engine:
        for kind in kinds:
            check_trained(kind, engine.rank)
            check_frozen(kind)
        engine.wait_for_all()
    return 0


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return build_optimizer(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))


def check_trained(kind: str, rank: int) -> None:
    """A rank has half of each weight and of its moments; gathered, all is what it was, tied weights too."""
    model = tiny_model(kind, VOCAB)
    whole, optimizer = copy.deepcopy(model), _optimizer(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    whole.load_state_dict(model.state_dict())
    expected = {"student": whole.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    student = Student(model, torch.float32)
    moments = take_moments(optimizer)
    deal_out_trained(student, blocks_of(model), CPU, ("states", "loss"))
    optimizer = _optimizer(model)
    give_moments(optimizer, moments)
    for parameter in model.parameters():
        held = parameter.to_local()
        assert held.shape[0] in (parameter.shape[0] // 2, -(-parameter.shape[0] // 2)), "half of the rows"
        assert held.untyped_storage().nbytes() <= held.numel() * 4 + 4 * parameter.shape[1:].numel(), "and no more"
        assert optimizer.state[parameter]["exp_avg"].to_local().shape == held.shape
    held = {"student": model.state_dict(keep_vars=True), "optimizer": optimizer.state_dict()}
    found = gather_whole(held, keep=rank == 0)
    outlined = outline(held)
    if model.config.tie_word_embeddings:
        assert held["student"]["lm_head.weight"] is model.get_input_embeddings().weight
    for name, tensor in expected["student"].items():
        assert outlined["student"][name].shape == tensor.shape
        assert found["student"][name] is None if rank else torch.equal(found["student"][name], tensor), name
    for index, own in expected["optimizer"]["state"].items():
        for name, tensor in own.items():
            got = found["optimizer"]["state"][index][name]
            assert got is None if rank else torch.equal(got, tensor), (index, name)


def check_frozen(kind: str) -> None:
    """Each rank has the whole of what is in no block, and half of the blocks; hidden states are those of the whole."""
    model = tiny_model(kind, VOCAB).requires_grad_(False).eval()
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = hidden_states(model, ids)
    deal_out_frozen(model, body_of(model), blocks_of(model), CPU)
    assert all(hasattr(one, "to_local") for block in blocks_of(model) for one in block.parameters())
    assert not hasattr(output_head(model).weight, "to_local")
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(hidden_states(model, ids), expected)
    assert torch.equal(make_whole(expected), expected)
