"""Corrections by name, and what they report of a batch."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from lightning_fp.rl import CORRECTIONS, Correction, correction
from tests.rl.decimals import bounded, exact_weights, raw_weights
from tests.rl.test_importance_weights import batch_of

NAMES = sorted(CORRECTIONS)


def exact_report(
    of: Correction, rollout: torch.Tensor, train: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    with localcontext() as context:
        context.prec = 60
        rows = raw_weights(rollout, train, mask, of.level)
        true = [w for row in rows for w in row if w is not None]
        if of.level != "token":
            true = [next(w for w in row if w is not None) for row in rows if any(row)]
        applied = [bounded(w, of.low, of.high, of.kind == "truncated") for w in true]
        n = len(true)
        mean = sum(applied) / n
        square = sum(w * w for w in applied) / n
        values = {
            "units": Decimal(n),
            "mean_excess": mean - 1,
            "deviation": (sum((w - mean) ** 2 for w in applied) / n).sqrt(),
            "effective_sample_size": mean**2 / square if square else Decimal(0),
            "bias": sum(abs(a - w) for a, w in zip(applied, true, strict=True)) / n,
            "uncorrected": sum(abs(w - 1) for w in true) / n,
            "low_share": Decimal(sum(w < Decimal(of.low) for w in true)) / n,
        }
        if of.high < math.inf:
            values["high_share"] = Decimal(sum(w > Decimal(of.high) for w in true)) / n
        return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [1e-6, 0.01, 1.5])
def test_report_to_twelve_digits(name: str, sigma: float) -> None:
    of, batch = correction(name), batch_of(sigma)
    report = of.report(*batch)
    for field, value in exact_report(of, *batch).items():
        # a mean of differences is as good as the largest of them
        rel = 1e-12 * max(1.0, report.uncorrected.item() / (abs(value) or math.inf))
        assert getattr(report, field).item() == pytest.approx(value, rel=rel, abs=0), field


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_bounds(name: str) -> None:
    of, batch = correction(name), batch_of(0.5)
    truncates = of.kind == "truncated"
    exact = exact_weights(*batch, of.level, low=of.low, high=of.high, truncates=truncates)
    expected = torch.tensor([[float(w or 0) for w in row] for row in exact], dtype=torch.float64)
    torch.testing.assert_close(of.weights(*batch), expected, rtol=1e-12, atol=0)
    assert of.source


def test_float32_knows_the_variance_of_fp16_engines() -> None:
    rollout = -torch.rand(8, 512) - 0.1
    train = rollout + 1e-5 * torch.randn(8, 512)
    report = correction("verl").report(rollout, train)
    r = (train.double() - rollout.double()).flatten()
    assert report.deviation.item() == pytest.approx(r.expm1().std(correction=0).item(), rel=1e-9)
    lost = 1 - report.effective_sample_size.item()
    assert lost == pytest.approx(r.square().mean().item(), rel=1e-3)


def test_bias_is_the_mean_excess_that_is_missing() -> None:
    """Where weights are true ones, of samples from mu, the mass cut off is missing in the mean."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    mu = logits.log_softmax(0)
    pi = (logits + torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    sampled = torch.multinomial(mu.exp(), 400_000, replacement=True, generator=generator)
    batch = mu[sampled].unsqueeze(0), pi[sampled].unsqueeze(0)
    report = correction("verl").report(*batch)
    in_expectation = (mu.exp() * ((pi - mu).exp() - 2).clamp(min=0)).sum()
    assert report.bias.item() == pytest.approx(in_expectation.item(), rel=0.02)
    assert report.mean_excess.item() == pytest.approx(-report.bias.item(), abs=0.01)


def test_advantages() -> None:
    rollout, train = torch.tensor([[-4.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
    lost = math.exp(3) - 2
    for advantages in (torch.tensor([[-3.0, 5.0]]), torch.tensor([[-3.0]])):
        report = correction("verl").report(rollout, train, advantages=advantages)
        assert report.advantage_bias is not None
        assert report.advantage_bias.item() == pytest.approx(3 * lost / 2)
    with pytest.raises(ValueError, match=r"advantages must be \[batch, tokens\] or \[batch, 1\]"):
        correction("verl").report(rollout, train, advantages=torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_edges(name: str) -> None:
    of, x = correction(name), torch.full((2, 3), -1.0)
    empty = of.report(x, x, torch.zeros(2, 3))
    assert empty.units == 0
    assert empty.bias.isnan()
    assert empty.effective_sample_size.isnan()
    same = of.report(x, x)
    assert same.bias == same.uncorrected == same.mean_excess == same.deviation == 0
    assert same.effective_sample_size == 1
    broken = of.report(torch.where(torch.eye(2, 3) > 0, math.nan, x), x)
    assert broken.nonfinite == 2
    assert broken.units == (4 if of.level == "token" else 0)
    far = of.report(torch.full((2, 3), -5000.0), x)
    assert not far.bias.isnan()
    if of.kind == "masked":
        assert far.effective_sample_size == 0
        assert far.high_share == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"correction must be one of .* got 'vrl'; did you mean"):
        correction("vrl")
    with pytest.raises(ValueError, match="low and high must be 0 <= low <= high"):
        Correction(kind="truncated")
    with pytest.raises(ValueError, match="kind must be one of truncated, masked, got 'clipped'"):
        Correction(kind="clipped", high=2.0)  # pyright: ignore[reportArgumentType]
