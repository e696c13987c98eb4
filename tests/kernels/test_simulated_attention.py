"""Attention in simulated formats: torch's own where nothing is lost, rounded operands elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.layers import simulated_attention
from lightning_fp.numerics import float_format, round_to_format
from tests.helper import sqnr_db


def operands(heads: int = 4, keys: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 12, 8, requires_grad=True)
    k, v = (torch.randn(2, heads, keys, 8, requires_grad=True) for _ in range(2))
    return q, k, v


def results(format: str | None, heads: int = 4, **options: Any) -> list[Tensor]:
    q, k, v = operands(heads)
    if format is None:
        output = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        with simulated_attention(format):
            output = F.scaled_dot_product_attention(q, k, v, **options)
    output.square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return [output.detach(), q.grad, k.grad, v.grad]


MASK = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.7
MASK[3] = False  # may look nowhere


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": MASK},
        {"attn_mask": torch.where(MASK | torch.eye(12, dtype=torch.bool), 0.5, -torch.inf)},
        {"heads": 2, "enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "mask", "added", "gqa"],
)
def test_with_all_bits_it_is_torchs(options: dict[str, Any]) -> None:
    expected = results(None, **options)
    for one, other in zip(expected, results("e8m22", **options), strict=True):
        assert sqnr_db(one, other) > 100
    lossy = results("e8m3", **options)
    for one, other in zip(expected, lossy, strict=True):
        assert 10 < sqnr_db(one, other) < 40


def test_each_operand_is_rounded() -> None:
    q, k, v = (each.detach() for each in operands())
    format = float_format("e8m3")
    with simulated_attention("e8m3"):
        output = F.scaled_dot_product_attention(q, k, v)
    q3, k3, v3 = (round_to_format(each, format) for each in (q, k, v))
    weights = (q3 @ k3.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(output, round_to_format(weights, format) @ v3)


def test_autocast_and_high_precision() -> None:
    q, k, v = operands()
    with torch.autocast("cpu", torch.bfloat16), simulated_attention("e8m3"):
        output = F.scaled_dot_product_attention(q, k, v)
    assert (
        output.dtype
        is F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype
    )
    plain = F.scaled_dot_product_attention(q, k, v)
    with simulated_attention("bf16"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)
    with pytest.raises(ValueError, match=r"format must be a simulated one.*got 'fp8-dynamic'"):
        simulated_attention("fp8-dynamic")


def test_dropout_and_chance_follow_the_generator() -> None:
    def once() -> Tensor:
        torch.manual_seed(5)
        return results("e8m2-stochastic", dropout_p=0.5)[1]

    assert torch.equal(once(), once())


def test_around_compiled_code_it_is_the_same() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = operands()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager")
    plain = compiled(q, k, v)
    with simulated_attention("e8m3"):
        expected, found = forward(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(found, expected)
    assert sqnr_db(plain, found) < 40
    (one,) = torch.autograd.grad(expected.sum(), q)
    (other,) = torch.autograd.grad(found.sum(), q)
    torch.testing.assert_close(one, other)
