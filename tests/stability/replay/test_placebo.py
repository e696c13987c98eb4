"""A placebo moves weights a little, the same everywhere, and nothing else."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.stability.replay.placebo import SIZE, perturb_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_each_weight_moves_by_a_small_share(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    moved = weight.clone()
    perturb_([moved], seed=0)
    share = (moved - weight).abs().double() / weight.abs().double()
    assert 0.4 * SIZE < float(share.mean()) < 1.4 * SIZE
    assert moved.dtype == dtype


def test_the_same_seed_moves_alike_and_draws_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    one, other = torch.ones(8, 8), torch.ones(8, 8)
    perturb_([one], seed=3)
    perturb_([other], seed=3)
    assert torch.equal(one, other)
    perturb_([other], seed=4)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_counters_and_zeros_stay() -> None:
    counter, zeros = torch.arange(5), torch.zeros(5)
    perturb_([counter, zeros], seed=0)
    assert torch.equal(counter, torch.arange(5))
    assert not zeros.any()
