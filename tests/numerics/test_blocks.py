"""Blocks against loops over blocks, and the E8M0 scale against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.numerics import amax_to_e8m0, block_amax, spread_blocks, times_blocks

BLOCKS = [(1, 4), (4, 1), (4, 4), (1, 3), (2, 5)]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(SHAPES, st.sampled_from(BLOCKS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_block_is_what_a_loop_makes_of_it(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    amax = block_amax(x, block)
    factors = torch.rand(amax.shape)
    spread, product = spread_blocks(factors, block, x.shape), times_blocks(x, factors, block)
    assert product.dtype is torch.float32
    assert spread.shape == product.shape == x.shape
    for i, row in enumerate(range(0, shape[0], block[0])):
        for j, column in enumerate(range(0, shape[1], block[1])):
            where = slice(row, row + block[0]), slice(column, column + block[1])
            assert amax[i, j] == x[where].abs().max()
            assert (spread[where] == factors[i, j]).all()
            assert torch.equal(product[where], x[where].float() * factors[i, j])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_block(value: float) -> None:
    x = torch.ones(5, 7)
    x[4, 6] = value
    amax = block_amax(x, (4, 4))
    assert torch.equal(amax[0], torch.ones(2))
    assert amax[1, 0] == 1
    assert not math.isfinite(amax[1, 1])


@given(st.floats(2.0**-110, 2.0**127, width=32), st.sampled_from([448.0, 57344.0]))
def test_an_mx_scale_is_the_largest_power_of_two_that_clamps_nothing(
    amax: float, limit: float
) -> None:
    scale = amax_to_e8m0(torch.tensor(amax), limit).item()
    assert math.frexp(scale)[0] == 0.5
    # log2 in float32 cannot tell a quotient just above a power of two from that power.
    assert Fraction(scale) * Fraction(amax) <= Fraction(limit) * (1 + Fraction(2, 2**17))
    assert 2 * Fraction(scale) * Fraction(amax) > Fraction(limit) * (1 - Fraction(2, 2**17))


def test_mx_scales_of_the_extremes() -> None:
    amax = torch.tensor([0.0, 1e-38, math.inf, math.nan])
    scale = amax_to_e8m0(amax, 448.0)
    assert scale[:3].tolist() == [1.0, 1.0, 2.0**-127]
    assert scale[3].isnan()
