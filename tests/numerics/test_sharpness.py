"""Logit sharpness against a numerical optimiser, and kurtosis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.numerics.sharpness import kurtosis, logit_sharpness


def by_search(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """The same by projected gradient ascent in float64, which knows nothing of corners."""
    logits = logits.double()
    reach = epsilon * (logits.abs() + 1)
    loss = F.cross_entropy(logits, targets, reduction="none")
    best = loss.clone()
    for begin in range(4):
        start = torch.rand(logits.shape, generator=torch.Generator().manual_seed(begin))
        change = ((2 * start.double() - 1) * reach).requires_grad_()
        for _ in range(300):
            risen = F.cross_entropy(logits + change, targets, reduction="none")
            (slope,) = torch.autograd.grad(risen.sum(), change)
            with torch.no_grad():
                change += 0.02 * reach * slope.sign()
                change.clamp_(-reach, reach)
        best = torch.maximum(best, F.cross_entropy(logits + change, targets, reduction="none"))
    return (100 * (best - loss) / (1 + loss)).detach()


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_closed_form_is_what_a_search_finds(size: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = size * torch.randn(16, 8, generator=generator)
    targets = torch.randint(8, (16,), generator=generator)
    closed = logit_sharpness(logits, targets, epsilon).double()
    found = by_search(logits, targets, epsilon)
    torch.testing.assert_close(closed, found, rtol=2e-3, atol=1e-4)
    assert (found <= closed * (1 + 1e-4) + 1e-4).all()


def test_no_corner_is_worse() -> None:
    logits, targets = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    reach = 0.3 * (logits.double().abs() + 1)
    loss = F.cross_entropy(logits.double(), targets, reduction="none")
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 5)
    corners = torch.stack(
        [
            F.cross_entropy(logits.double() + sign * reach, targets, reduction="none")
            for sign in signs
        ]
    ).amax(0)
    expected = (100 * (corners - loss) / (1 + loss)).float()
    torch.testing.assert_close(logit_sharpness(logits, targets, 0.3), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sure_model_is_no_zero_lost_in_rounding(dtype: torch.dtype) -> None:
    """Where the target's logit is far above the others the rise is tiny, and still there."""
    logits = torch.zeros(1, 1000, dtype=dtype)
    logits[0, 3] = 20
    target = torch.tensor([3])
    exact = logits.double()
    reach = 1e-3 * (exact.abs() + 1)
    worst = exact + reach
    worst[0, 3] = exact[0, 3] - reach[0, 3]
    loss, high = (F.cross_entropy(z, target) for z in (exact, worst))
    expected = (100 * (high - loss) / (1 + loss)).item()
    assert logit_sharpness(logits, target).item() == pytest.approx(expected, rel=1e-3)


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2**18, generator=generator)
    assert kurtosis(normal).item() == pytest.approx(3, rel=0.02)
    assert kurtosis(2 * torch.rand(2**18, generator=generator) - 1).item() == pytest.approx(
        9 / 5, rel=0.02
    )
    assert kurtosis(1e25 * torch.eye(64)[0]).item() == pytest.approx(64)
    assert kurtosis(1e-25 * normal).item() == pytest.approx(3, rel=0.02)
    assert kurtosis(torch.zeros(4)).isnan()
    assert not kurtosis(torch.tensor([1.0, torch.inf])).isfinite()
