"""The pretend accelerator pretends well: it refuses, counts, fills up and is lost as CUDA would, and counts right."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import threading

import pytest
import torch
from tests.support.models import tiny_model
from torch import nn

from liquid_llm import runtime
from liquid_llm.errors import UsageError
from liquid_llm.models.student import enable_gradient_checkpointing

NAMES = ("gpt2", "llama", "lfm2")


def here(offset: int = 0) -> str:
    """File and line of the caller, as the accelerator names them."""
    frame = inspect.currentframe().f_back
    return f"tests/unit/test_accelerator.py:{frame.f_lineno + offset}"


@pytest.fixture
def device(accelerator):
    return accelerator.device


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "mix",
    [
        lambda mine, host: mine + host,
        lambda mine, host: host * mine,
        lambda mine, host: torch.mm(mine, host),
        lambda mine, host: torch.cat([host, mine]),
        lambda mine, host: torch.where(mine > 0, mine, host),
        lambda mine, host: mine.add_(host),
        lambda mine, host: mine.index_select(0, host[0].long()),
        lambda mine, host: mine.gather(0, host.long()),
        lambda mine, host: mine.masked_fill(host > 0, 0.0),
        lambda mine, host: nn.functional.embedding(host.long(), mine),
        lambda mine, host: nn.functional.linear(mine, host),
        lambda mine, host: nn.functional.cross_entropy(mine, host[0].long()),
        lambda mine, host: nn.functional.layer_norm(mine, (2,), host[0]),
        lambda mine, host: nn.functional.conv1d(mine[None], host[None]),
    ],
)
def test_tensors_of_the_cpu_and_of_the_device_are_not_mixed(device, mix):
    mine, host = torch.ones(2, 2, device=device), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        mix(mine, host)


def test_numbers_may_be_mixed_and_a_mask_or_indices_of_the_cpu_may_select(device):
    mine = torch.arange(4.0, device=device)
    assert (mine + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert (2 * mine).tolist() == [0, 2, 4, 6]
    assert mine[torch.tensor([1, 3])].tolist() == [1, 3]
    assert mine[torch.tensor([True, False, False, True])].tolist() == [0, 3]


def test_numpy_generators_and_unknown_devices_are_refused(device):
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        torch.ones(2, device=device).numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(2, device=device, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="comes out as torch"):
        torch.mm(*(torch.ones(2, 2, dtype=torch.bfloat16, device=device),) * 2, out_dtype=torch.float64)


def test_it_is_chosen_by_name_and_only_the_one_that_there_is(device):
    for name in ("pretend", "pretend:0"):
        assert torch.ones(1, device=runtime.choose_device(name).value).device == device
    with pytest.raises(UsageError, match="has 1 pretend device;") as caught:
        runtime.choose_device("pretend:1")
    assert "pretend" in str(caught.value.expected)
    assert runtime.choose_device().value != "pretend", "never taken unasked"
    assert runtime.choose_dtype("auto", device).value == "bfloat16"


# ------------------------------------------------------------------------------------------------------------- counting


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 1),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "non_blocking copy into pageable memory": lambda x: torch.empty(4).copy_(x, non_blocking=True),
    "blocking copy to the device": lambda x: torch.ones(4).to(x.device),
    "tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "list of indices": lambda x: x[[0, 1]],
    "indices of the CPU": lambda x: x[torch.tensor([0, 1])],
    "assignment by a mask": lambda x: x.__setitem__(x > 1, x[:2]),
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "synchronize": lambda x: torch.get_device_module(x.device).synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_kind_of_wait_is_counted_once_where_it_is(accelerator, device, name):
    x = torch.arange(4.0, device=device)
    act = WAITS[name]
    with accelerator.record() as log:
        act(x)
    assert log.count("wait") == 1, log.sites("wait")
    (event,) = (event for event in log if event.kind == "wait")
    assert event.site == f"tests/unit/test_accelerator.py:{act.__code__.co_firstlineno}"
    assert event.thread == threading.main_thread().name


FREE = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0).sum(),
    "product": lambda x: x.view(2, 2) @ x.view(2, 2).t(),
    "index_select": lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64, device=x.device)),
    "indices of the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "one value by a mask": lambda x: x.__setitem__(x > 1, 0.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "scatter_add": lambda x: x.scatter_add(0, x.long(), x),
    "pinned copy": lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True),
    "pageable copy that is not waited for": lambda x: torch.ones(4).to(x.device, non_blocking=True),
    "copy to the host that is not waited for": lambda x: x.to("cpu", non_blocking=True),
    "random numbers": lambda x: torch.rand(3, device=x.device),
    "views": lambda x: x.view(2, 2).t().unsqueeze(0).expand(3, 2, 2)[:, 1],
}


@pytest.mark.parametrize("name", FREE)
def test_what_the_host_does_not_wait_for_is_no_wait(accelerator, device, name):
    x = torch.arange(4.0, device=device)
    with accelerator.record() as log:
        FREE[name](x)
    assert log.count("wait") == 0, log.sites("wait")


def test_launches_and_bytes_are_counted_and_views_are_free(accelerator, device):
    x = torch.arange(6.0, device=device)
    with accelerator.record() as log:
        x.view(2, 3).t().select(0, 1)
        assert not log
        x.add_(1)
        line = here(-1)
        torch.empty(5, device=device)
        y = torch.ones(7, dtype=torch.bfloat16).to(device, non_blocking=True)
        y.cpu()
    assert [(event.kind, event.operation, event.nbytes) for event in log if event.site == line] == [
        ("launch", "add", 0)
    ]
    assert log.count("launch") == 1
    assert (log.nbytes("to_device"), log.nbytes("to_host")) == (14, 14)
    assert log.sites("to_host") == {f"{here(-6)} copy_": 1}
    x.add_(1)
    assert log.count("launch") == 1, "nothing is counted afterwards"


def test_waits_of_libraries_and_of_the_backward_pass_are_named(accelerator, device):
    model = tiny_model("llama", 64).to(device)
    ids = torch.arange(8, device=device).reshape(1, 8)
    with accelerator.record() as log:
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
        loss.backward()
    launches = {site.rpartition(":")[0] for site in log.sites("launch")}
    assert any(site.startswith("transformers/models/llama/") for site in launches)
    assert "autograd" in " ".join(log.sites("launch"))


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_models_loss_gradients_and_updates_equal_the_cpus(device, name, grad_checkpoint):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for place in ("cpu", device):
        model = tiny_model(name, 64, seed=3).to(place).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if grad_checkpoint:
            enable_gradient_checkpointing(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            loss = model(input_ids=ids.to(place), labels=ids.to(place), use_cache=False).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item(), norm.item()]
        found.append((losses, {key: value.cpu() for key, value in model.state_dict().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("shared_by", [1, 2])
def test_attention_is_one_launch_and_its_bits_are_the_cpus(accelerator, device, shared_by):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 8, generator=random) for heads in (4, 4 // shared_by))
    found = []
    for place in ("cpu", device):
        q, k = (tensor.clone().to(place).requires_grad_() for tensor in (query, key))
        with accelerator.record() as log:
            out = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=shared_by > 1)
        out.square().sum().backward()
        found.append([tensor.detach().cpu() for tensor in (out, q.grad, k.grad)])
    assert log.count("launch") == 1
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_arithmetic_with_numbers_gives_the_values_and_the_dtype_of_the_cpu(device, dtype):
    x = torch.arange(1, 7).to(dtype)
    acts = [lambda x: x * 0.1, lambda x: x % 4, lambda x: x // 2, lambda x: 7 - x, lambda x: x**2, lambda x: x > 2]
    acts += [lambda x: torch.where(x > 2, x, 0.5), lambda x: x.clamp(2, 5), lambda x: torch.fmod(x, 4)]
    if not dtype.is_floating_point:
        acts += [lambda x: x & 3, lambda x: x << 1, lambda x: x.bitwise_or(8)]
    for act in acts:
        got, expected = act(x.to(device)).cpu(), act(x)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_tied_weights_stay_tied_and_a_copy_is_one_of_its_own(device):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("plain", torch.ones(3))
    model.to(device)
    twin = copy.deepcopy(model)
    assert model[1].weight is model[0].weight
    assert twin[1].weight is twin[0].weight
    twin[0].weight.data.zero_(), twin.plain.zero_()
    assert model[0].weight.abs().sum().item() > 0
    assert model.plain.tolist() == [1, 1, 1]


def test_a_state_dict_is_saved_from_the_device_and_loaded_anywhere(device):
    model = nn.Linear(3, 2).to(device)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for place in ("cpu", device):
        file.seek(0)
        state = torch.load(file, weights_only=True, map_location=place)
        assert state["weight"].device == torch.device(place)
        assert torch.equal(state["weight"].cpu(), model.weight.cpu())


def test_a_product_may_hand_out_its_sums_in_float32(device):
    a, b = (torch.randn(4, 64).bfloat16() for _ in range(2))
    got = torch.mm(a.to(device), b.to(device).t(), out_dtype=torch.float32).cpu()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(got.bfloat16().float(), got)


def test_autocast_lowers_products_keeps_sums_wide_and_gives_float32_gradients(device):
    a = torch.randn(3, 3, device=device, requires_grad=True)
    layer = nn.Linear(3, 3).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert {(a @ a).dtype, layer(a).dtype, torch.mm(a, a).dtype} == {torch.bfloat16}
        attended = nn.functional.scaled_dot_product_attention(a[None], a[None], a[None])
        assert attended.dtype == torch.bfloat16
        assert {(a @ a).softmax(0).dtype, (a @ a).sum().dtype, torch.log(a @ a).dtype} == {torch.float32}
        assert torch.cat([a, a @ a]).dtype == torch.float32
        assert (a @ a + 1).dtype == torch.bfloat16
        layer(a).float().sum().backward()
    assert a.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_answers_the_same_without_gradients(device, mode):
    ids = torch.arange(10).reshape(2, 5)
    model = tiny_model("llama", 64)
    with mode():
        expected = model(input_ids=ids).logits
        got = model.to(device)(input_ids=ids.to(device)).logits
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_what_is_alive_and_its_peak_what_was(accelerator, device):
    module = torch.get_device_module(device)
    gc.collect()
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    x = torch.zeros(1000, device=device)
    view = x[:10]
    y = x * 2
    assert module.memory_allocated() - before == 8000
    del x, y
    assert module.memory_allocated() - before == 4000, "a view keeps its storage"
    del view
    assert module.memory_allocated() == before
    assert module.max_memory_allocated() - before == 8000
    assert module.memory_reserved() - before >= 8000
    module.empty_cache()
    assert module.memory_reserved() == before
    module.reset_peak_memory_stats()
    assert module.max_memory_allocated() == before
    free, total = module.mem_get_info()
    assert total - free == before


def test_gradients_and_what_the_backward_pass_needs_are_freed(accelerator, device):
    gc.collect()
    before = accelerator.memory.allocated
    weight = torch.ones(100, 100, device=device, requires_grad=True)
    loss = (weight @ weight).relu().sum()
    loss.backward()
    assert accelerator.memory.allocated - before > 80_000
    del loss
    assert accelerator.memory.allocated - before == 80_000
    del weight
    assert accelerator.memory.allocated == before


def test_above_the_limit_there_is_no_memory_and_below_it_there_is_again(accelerator, device):
    gc.collect()
    with accelerator.memory_limit(accelerator.memory.allocated + 10_000):
        kept = torch.zeros(1500, device=device)
        for too_large in (
            lambda: torch.zeros(2000, device=device),
            lambda: torch.arange(2000, device=device),
            lambda: torch.ones(2000).to(device),
        ):
            with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\. Tried to allocate"):
                too_large()
        for grow in (torch.exp, lambda x: x * 2, lambda x: x.index_select(0, x.long()), lambda x: x.repeat(2)):
            with pytest.raises(torch.OutOfMemoryError):
                grow(kept)
        del kept
        torch.zeros(2000, device=device)
    torch.zeros(4000, device=device)


def test_memory_runs_out_in_the_backward_pass_too(accelerator, device):
    gc.collect()
    weight = torch.ones(100, 100, device=device, requires_grad=True)
    loss = (weight * 2).sum()
    with accelerator.memory_limit(accelerator.memory.allocated + 10_000), pytest.raises(torch.OutOfMemoryError):
        loss.backward()


# ----------------------------------------------------------------------------------------------------------------- loss


def test_a_lost_device_fails_at_that_launch_and_ever_after(accelerator, device):
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    x = torch.ones(3, device=device)
    with accelerator.lost_after(2):
        x.add_(1), x.add_(1)
        for act in (lambda: x.add_(1), lambda: x.mul_(2), x.cpu, lambda: x.sum().item()):
            with pytest.raises(kind, match="CUDA error"):
                act()
    assert x.tolist() == [3, 3, 3]


# ------------------------------------------------------------------------------------------------------ and the CPU too


def test_the_cpu_goes_on_as_before(accelerator):
    with accelerator.record() as log:
        x = torch.ones(3, 3, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad.numpy().sum() == 54
        assert not x.is_pinned()
        assert x.detach().pin_memory().is_pinned()
        draws = [torch.rand(2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        assert torch.equal(*draws)
        assert torch.UntypedStorage(8).device.type == "cpu"
    assert not log
