"""Products with a head in every pair of dtypes, each true to what it was given."""

from __future__ import annotations

import pytest
import torch
from tests.support.products import MixedProducts

from liquid_llm.losses import OutputHead
from liquid_llm.losses import plan as plans
from liquid_llm.losses import products as heads
from liquid_llm.losses.plan import PRODUCTS, bfloat16_tiles
from liquid_llm.losses.products import HeadGradient, HeadProducts
from liquid_llm.runtime import has_amx

DTYPES = (torch.float32, torch.bfloat16)


def random_head(
    dtype: torch.dtype, *, bias: bool = True, scale: float = 1.0, soft_cap: float | None = None
) -> OutputHead:
    random = torch.Generator().manual_seed(0)
    weight, offset = torch.randn(301, 64, generator=random), torch.randn(301, generator=random)
    return OutputHead(weight.to(dtype), offset.to(dtype) if bias else None, scale, soft_cap)


def rounds_operands(product: str) -> bool:
    """Whether operands lose what bfloat16 does not hold."""
    return product == "mixed" or (product == "tiles" and has_amx())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_logits_are_float32_and_no_less_exact(
    product: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 of the same numbers; a float32 head is rounded to bfloat16 for mixed products and by tiles."""
    monkeypatch.setattr(heads, "_CPU_BLOCK_ELEMENTS", 64 * 100)
    head, hidden = random_head(weight_dtype, bias=bias), torch.randn(50, 64).to(hidden_dtype)
    products = HeadProducts(head, hidden_dtype, product)
    with MixedProducts() as mixed:
        logits = products.raw_logits(hidden.to(products.operand_dtype), torch.full((50, 301), torch.nan))
    narrow = product == "mixed" and hidden_dtype == torch.bfloat16
    assert bool(mixed.calls) == narrow
    rounds = narrow or (rounds_operands(product) and hidden_dtype == torch.bfloat16)
    weight = head.weight.bfloat16() if rounds else head.weight
    expected = hidden.double() @ weight.double().t()
    if head.bias is not None:
        expected += head.bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=0.0, atol=1e-4)
    assert (logits.double() - expected).norm() < 1e-6 * expected.norm()  # rounded to bfloat16: 2e-3


@pytest.mark.parametrize("adds_mixed", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_gradients_are_summed_in_float32(
    product: str, weight_dtype: torch.dtype, adds_mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks; with and without a torch that adds a mixed product in place."""
    monkeypatch.setattr(heads, "_ADDS_MIXED", adds_mixed)
    products = HeadProducts(random_head(weight_dtype), torch.bfloat16, product)
    total = HeadGradient(products, with_weight=True, with_bias=True)
    gradients = [torch.randn(20, 301) for _ in range(3)]
    states = [torch.randn(20, 64).bfloat16() for _ in range(3)]
    with MixedProducts():
        for gradient, hidden in zip(gradients, states, strict=True):
            operand = products.operand(gradient)
            total.add(gradient, operand, hidden.to(products.operand_dtype))
            back = products.hidden_gradient(operand)
            dtype = torch.bfloat16 if rounds_operands(product) else torch.float32
            expected = operand.to(dtype).double() @ products.head.weight.to(dtype).double()
            assert back.dtype == torch.float32
            torch.testing.assert_close(back.double(), expected, rtol=1e-5, atol=1e-4)
    weight, bias = total.finish()
    assert weight is not None
    assert bias is not None
    assert (weight.dtype, bias.dtype) == (weight_dtype, weight_dtype)
    rounded = [one.to(dtype) for one in gradients]
    expected = sum(one.double().t() @ hidden.double() for one, hidden in zip(rounded, states, strict=True))
    torch.testing.assert_close(weight.double(), expected.to(weight_dtype).double(), rtol=1e-2, atol=1e-4)
    summed = torch.cat(gradients).double().sum(dim=0)
    torch.testing.assert_close(bias.double(), summed.to(weight_dtype).double(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.25, None), (2.0, 30.0), (1.0, 5.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_finished_logits_are_the_heads_own(bias: bool, scale: float, soft_cap: float | None) -> None:
    head, hidden = random_head(torch.float32, bias=bias, scale=scale, soft_cap=soft_cap), torch.randn(7, 64)
    out = torch.full((7, 301), torch.nan)
    given = HeadProducts(head, torch.float32, "widen").logits(hidden, out)
    assert given.data_ptr() == out.data_ptr()
    torch.testing.assert_close(given, head.logits(hidden))


# ---------------------------------------------------------------------------------------------------------------- tiles


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


def test_the_tile_switch_goes_back_to_what_it_was() -> None:
    assert precision() == "none"
    with bfloat16_tiles():
        assert precision() == "bf16"
    assert precision() == "none"
    with pytest.raises(RuntimeError, match="stop"), bfloat16_tiles():
        raise RuntimeError("stop")
    assert precision() == "none"
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        with bfloat16_tiles():
            assert precision() == "bf16"
        assert precision() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_tiles_change_no_product_of_bfloat16_numbers() -> None:
    """But the order of its sums; without AMX this says that nothing else changes either."""
    left, right = (torch.randn(size, 576).bfloat16().float() for size in (300, 2000))
    plain = left @ right.t()
    with bfloat16_tiles():
        tiles = left @ right.t()
    torch.testing.assert_close(tiles, plain, rtol=1e-5, atol=2e-4)


def test_the_switch_is_on_for_products_of_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = torch.mm

    def mm(*args: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.append(precision())
        return real(*args, **options)

    monkeypatch.setattr(torch, "mm", mm)
    for hidden_dtype, product in ((torch.bfloat16, "tiles"), (torch.float32, "tiles"), (torch.bfloat16, "widen")):
        products = HeadProducts(random_head(torch.float32, bias=False), hidden_dtype, product)
        products.raw_logits(torch.randn(3, 64), torch.empty(3, 301))
    assert seen == ["bf16", "none", "none"]


def test_without_the_switch_tiles_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plans.choose_product("cpu", amx=True) == "tiles"
    monkeypatch.setattr(plans, "_tile_switch", lambda: None)
    assert plans.choose_product("cpu", amx=True) == "widen"
    with bfloat16_tiles():
        assert precision() == "none"
