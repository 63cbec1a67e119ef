"""Every optimizer: which parameters it updates and how, what it keeps of them, that it goes on from that to the bit."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from accelerate import init_empty_weights
from tests.support.models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from liquid_llm.errors import CheckpointError
from liquid_llm.models.positions import fit_positions, plan_stretch
from liquid_llm.models.student import PRESETS
from liquid_llm.optimizers import AdamW8Bit, MuonAndAdamW, build_optimizer, load_optimizer, moment_bytes
from liquid_llm.options import ADAMW, ADAMW8BIT, MUON, OPTIMIZERS

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="comes with the extra torchao")
EACH = pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=needs_torchao if one == ADAMW8BIT else ()) for one in OPTIMIZERS]
)


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def take(model, optimizer, steps):
    for step in steps:
        gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def preset_model(name):
    preset = PRESETS[name]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(preset.model_type, **preset.settings))
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", list(PRESETS))
def test_norms_biases_and_vectors_of_every_preset_are_not_decayed(name):
    model = preset_model(name)
    optimizer = build_optimizer(model, **OPTIONS)
    assert type(optimizer) is torch.optim.AdamW
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    named = dict(model.named_parameters())
    assert {id(p) for p in named.values()} == set(decay)
    for key, parameter in named.items():
        vector = parameter.dim() < 2
        assert vector or not key.endswith("bias"), key
        assert vector or "norm" not in key.lower(), key
        assert decay[id(parameter)] == (0.0 if vector else 0.1), key
    assert {0.0, 0.1} == set(decay.values())


# loading


def stepped(model, **changes):
    """An optimizer of ``model`` after a step with gradients that differ from row to row."""
    optimizer = build_optimizer(model, **{**OPTIONS, **changes})
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return optimizer


def test_moments_are_loaded_and_settings_stay():
    model = tiny_model("gpt2")
    saved = stepped(model).state_dict()
    other = build_optimizer(model, lr=1.0, weight_decay=0.3, betas=(0.5, 0.6))
    load_optimizer(other, saved, where="x")
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], parameter.grad * (1 - 0.9))
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in other.param_groups} == {(0.5, 0.6)}
    assert {group["lr"] for group in other.param_groups} == {OPTIONS["lr"]}, "the rate of a step is no setting"
    assert all(group["fused"] for group in other.param_groups)


@pytest.mark.parametrize(("block_size", "trained"), [(100, None), (40, 16), (128, 16)])
def test_moments_of_learned_positions_go_where_their_rows_go(block_size, trained):
    model = tiny_model("gpt2")
    table = model.transformer.wpe.weight
    optimizer = stepped(model)
    saved = optimizer.state_dict()
    averages = {name: optimizer.state[table][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    stretch = plan_stretch(model, block_size, trained)
    fit_positions(model, block_size, trained_positions=trained)
    new = model.get_parameter(stretch.parameter)
    other = build_optimizer(model, **OPTIONS)
    load_optimizer(other, saved, where="x", resize={new: stretch})
    for name, before in averages.items():
        assert torch.equal(other.state[new][name], stretch(before))
        assert other.state[new][name].shape == new.shape
    assert (other.state[new]["exp_avg_sq"] >= 0).all()
    assert float(other.state[new]["step"]) == 1.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    other.step()


def test_moments_of_other_shapes_are_refused_instead_of_read_past_their_end():
    model = tiny_model("gpt2")
    saved = stepped(model).state_dict()
    fit_positions(model, 100)
    with pytest.raises(
        CheckpointError, match=r"last\.pt: the optimizer's state.*\(64, 32\) for a parameter \(100, 32\)"
    ):
        load_optimizer(build_optimizer(model, **OPTIONS), saved, where="last.pt")
    with pytest.raises(CheckpointError, match="groups of"):
        load_optimizer(build_optimizer(tiny_model("llama"), **OPTIONS), saved, where="last.pt")


@EACH
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loaded_optimizer_goes_on_as_one_that_was_never_saved(kind, family, tmp_path):
    """At every step, through a file that holds plain tensors and values."""
    model = tiny_model(family, 512)
    optimizer = build_optimizer(model, **OPTIONS, kind=kind)
    for step in range(4):
        other = copy.deepcopy(model)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        loaded = build_optimizer(other, **OPTIONS, kind=kind)
        load_optimizer(loaded, saved, where="x")
        take(model, optimizer, [step])
        take(other, loaded, [step])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)), step
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert optimizer.state[mine].keys() == loaded.state[theirs].keys()
            for name, value in optimizer.state[mine].items():
                assert torch.equal(value, loaded.state[theirs][name]), (step, name)


@EACH
def test_the_bytes_of_moments_are_those_that_are_said(kind):
    model = tiny_model("llama", 512)
    optimizer = build_optimizer(model, **OPTIONS, kind=kind)
    expected = moment_bytes(optimizer)
    take(model, optimizer, [0])
    held = [one for state in optimizer.state.values() for one in state.values() if one.dim()]
    assert sum(one.nbytes for one in held) == expected
    whole = 8 * sum(one.numel() for one in model.parameters())
    assert (expected == whole) == (kind == ADAMW)


@EACH
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matrices_alone_shrink_where_no_gradient_pulls(kind, family):
    model = tiny_model(family, 512)
    optimizer = build_optimizer(model, **OPTIONS, kind=kind)
    if kind == ADAMW:
        assert all(group["fused"] for group in optimizer.param_groups)  # the CPU has one
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.dim() < 2 else 1 - 1e-2 * 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


@EACH
def test_what_is_frozen_is_held_by_none(kind):
    model = tiny_model("gpt2", 512)
    frozen = [model.transformer.wte.weight, model.transformer.h[0].mlp.c_fc.weight]
    for one in frozen:
        one.requires_grad_(False)
    optimizer = build_optimizer(model, **OPTIONS, kind=kind)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


# Muon


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2", "phi"])  # whose head is no embedding
def test_muon_has_the_hidden_matrices_and_nothing_that_belongs_to_tokens_or_positions(family):
    model = tiny_model(family, 512)
    optimizer = build_optimizer(model, **OPTIONS, kind=MUON)
    assert isinstance(optimizer, MuonAndAdamW)
    by_muon = {id(p) for p in optimizer.param_groups[-1]["params"]}
    assert by_muon
    apart = ("embed", "wte", "wpe", "lm_head")
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() == 2 and not any(one in name for one in apart)
        assert (id(parameter) in by_muon) == hidden, name


def test_muon_is_torchs_own_and_the_rest_is_adamws():
    model = tiny_model("llama", 512)
    alone = copy.deepcopy(model)
    optimizer = build_optimizer(model, **OPTIONS, kind=MUON)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [names[id(p)] for p in optimizer.param_groups[-1]["params"]]
    theirs = dict(alone.named_parameters())
    muon = torch.optim.Muon([theirs[one] for one in hidden], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(alone, **OPTIONS)
    take(model, optimizer, range(3))
    reference = {name: p.detach().clone() for name, p in alone.named_parameters()}
    for kind, names_of_kind in ((muon, set(hidden)), (adamw, theirs.keys() - set(hidden))):
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(reference[name])
        take(alone, kind, range(3))
        for name in names_of_kind:
            assert torch.equal(theirs[name], model.get_parameter(name)), name


def test_an_update_of_muon_is_about_as_large_as_one_of_adamw():
    """So that a learning rate found for AdamW can be kept."""
    sizes = {}
    for kind in (ADAMW, MUON):
        model = tiny_model("llama", 512)
        optimizer = build_optimizer(model, **{**OPTIONS, "weight_decay": 0.0}, kind=kind)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        take(model, optimizer, [0])
        moved = [
            (p.detach() - before[name]).square().mean().sqrt() for name, p in model.named_parameters() if p.dim() == 2
        ]
        sizes[kind] = float(torch.stack(moved).mean())
    assert 0.1 < sizes[MUON] / sizes[ADAMW] < 1.0


# 8 bits


@needs_torchao
def test_moments_in_8_bits_are_torchaos_to_the_bit(monkeypatch):
    """Also where a parameter is updated in pieces."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr("liquid_llm.optimizers._PIECE", 1024)
    model = tiny_model("llama", 512)
    other = copy.deepcopy(model)
    optimizer = build_optimizer(model, **OPTIONS, kind=ADAMW8BIT)
    groups = [{"params": [p for p in other.parameters() if p.dim() >= 2]}]
    groups.append({"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.0})
    theirs = AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    with torch.compiler.set_stance("force_eager"):
        for step in range(4):
            for one, each in ((model, optimizer), (other, theirs)):
                gradients(one, step)
                each.step()
    quantised = 0
    for mine, reference in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, reference)
        for name in ("exp_avg", "exp_avg_sq"):
            kept, moment = optimizer.state[mine][name], theirs.state[reference][name]
            if kept.dtype == torch.uint8:
                quantised += 1
                assert torch.equal(kept, moment.codes)
                assert torch.equal(optimizer.state[mine][name + "_scale"], moment.scale)
            else:
                assert torch.equal(kept, moment)
    assert quantised


@needs_torchao
def test_moments_in_8_bits_move_weights_as_whole_ones_do():
    moved = {}
    for kind in (ADAMW, ADAMW8BIT):
        model = tiny_model("llama", 512)
        before = torch.cat([p.detach().clone().view(-1) for p in model.parameters()])
        take(model, build_optimizer(model, **OPTIONS, kind=kind), range(5))
        moved[kind] = torch.cat([p.detach().view(-1) for p in model.parameters()]) - before
    assert float(torch.nn.functional.cosine_similarity(*moved.values(), dim=0)) > 0.98


@needs_torchao
def test_moments_in_8_bits_of_other_positions_are_refused():
    model = tiny_model("gpt2", 512)
    fit_positions(model, 128)  # rows of 32 values, 4,096 in all: kept in 8 bits
    optimizer = build_optimizer(model, **OPTIONS, kind=ADAMW8BIT)
    assert isinstance(optimizer, AdamW8Bit)
    take(model, optimizer, [0])
    saved = optimizer.state_dict()
    stretch = plan_stretch(model, 256, 128)
    fit_positions(model, 256, trained_positions=128)
    new = model.get_parameter(stretch.parameter)
    other = build_optimizer(model, **OPTIONS, kind=ADAMW8BIT)
    with pytest.raises(CheckpointError, match="cannot be resized") as refused:
        load_optimizer(other, saved, where="x", resize={new: stretch})
    assert "--reset_optim" in str(refused.value)


# another optimizer's moments


@pytest.mark.parametrize("kind", [MUON, pytest.param(ADAMW8BIT, marks=needs_torchao)])
def test_the_moments_of_another_optimizer_are_refused(kind):
    model = tiny_model("llama", 512)
    saved = {}
    for one in (ADAMW, kind):
        optimizer = build_optimizer(copy.deepcopy(model), **OPTIONS, kind=one)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        saved[one] = optimizer.state_dict()
    for one, other in ((ADAMW, kind), (kind, ADAMW)):
        with pytest.raises(CheckpointError, match="of other parameters"):
            load_optimizer(build_optimizer(model, **OPTIONS, kind=one), saved[other], where="x")
