"""Importance weights that correct a policy gradient for the engine that sampled.

Samples come from mu, the engine's policy, and the gradient wants them from pi, the trainer's: the
weight pi / mu of each makes up for it, exactly on average and with a variance that a few large
weights decide. Two ways to bound them: large weights are cut down to a cap (truncated importance
sampling), or what is outside of a band counts for nothing (masked importance sampling, IcePop).
Both bring a bias, which `CorrectionReport` tells.

Weights are formed in float64 and rounded once, so that they are within an ulp at any length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_fp.rl.log_ratios import Level, LogRatios, log_ratios


def truncated_importance_weights(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    mask: Tensor | None,
    *,
    cap: float,
    level: Level = "token",
    floor: float = 0.0,
    detach: bool = True,
) -> Tensor:
    """`min(pi_train / mu_rollout, cap)`: every sample counts, none for more than `cap`.

    >>> rollout, train = torch.tensor([[-1.0, -4.0, -9.0]]), torch.tensor([[-1.0, -1.0, -1.0]])
    >>> truncated_importance_weights(rollout, train, torch.tensor([[1, 1, 0]]), cap=2.0)
    tensor([[1., 2., 0.]])

    Args:
        rollout_logprobs: [batch, tokens], any floating-point dtype; of the sampled tokens, by the
            engine that sampled them. A row is one sequence.
        train_logprobs: [batch, tokens], the same tokens by the policy that is trained, before the
            update.
        mask: [batch, tokens], 0 for prompt and padding, which may then hold anything; None counts
            all.
        cap: the largest weight, above 0; with inf weights end at the largest number of their dtype.
        level: what shares a weight, see `Level`.
        floor: the smallest weight inside of the mask; 0 leaves small ones as they are.
        detach: whether weights are constants to the gradient, as importance sampling has it. If
            False, gradients flow through those between floor and cap.

    Returns:
        [batch, tokens], float64 for float64 log-probabilities and float32 else: 0 outside of the
        mask, and for what has no weight, since a log-probability is inf or NaN: that token, at the
        other levels its sequence.

    Raises:
        ValueError: for bounds out of order, shapes that differ, or values that are no
            log-probabilities (seen on the CPU alone, where nothing has to wait for a device).
    """
    floor, cap = _number("floor", floor), _number("cap", cap)
    if not 0 <= floor <= cap or not cap > 0:
        raise ValueError(
            "floor and cap must be 0 <= floor <= cap, cap above 0, got"
            f" floor={floor} and cap={cap}; 2 is usual for cap"
        )
    ratios = log_ratios(rollout_logprobs, train_logprobs, mask, level, detach=detach)
    return _in_mask(_weights(ratios).clamp(floor, cap), ratios)


def masked_importance_weights(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    mask: Tensor | None,
    *,
    low: float | None,
    high: float | None,
    level: Level = "token",
    detach: bool = True,
) -> Tensor:
    """`pi_train / mu_rollout` inside of the band from `low` to `high`, and 0 outside of it.

    Two-sided on tokens it is IcePop's. With one side open it is one-sided.

    >>> rollout, train = torch.tensor([[-1.0, -4.0, -9.0]]), torch.tensor([[-1.0, -1.0, -1.0]])
    >>> masked_importance_weights(rollout, train, None, low=0.5, high=5.0)
    tensor([[1., 0., 0.]])

    Args:
        rollout_logprobs: as `truncated_importance_weights`.
        train_logprobs: as `truncated_importance_weights`.
        mask: as `truncated_importance_weights`.
        low: the smallest weight that counts; 0 or None: this side is open.
        high: the largest weight that counts; inf or None: this side is open, and weights end at the
            largest number of their dtype.
        level: what shares a weight, and is left out as a whole; see `Level`.
        detach: as `truncated_importance_weights`.

    Returns:
        As `truncated_importance_weights`.

    Raises:
        ValueError: as `truncated_importance_weights`.
    """
    low = 0.0 if low is None else _number("low", low)
    high = math.inf if high is None else _number("high", high)
    if not 0 <= low <= high or not high > 0:
        raise ValueError(
            f"low and high must be 0 <= low <= high, high above 0, got low={low} and high={high};"
            " IcePop has 0.5 and 5, None leaves a side open"
        )
    ratios = log_ratios(rollout_logprobs, train_logprobs, mask, level, detach=detach)
    weights = _weights(ratios)
    inside = (weights >= low) & (weights <= high)
    return _in_mask(torch.where(inside, weights, 0.0), ratios)


def _number(name: str, value: object) -> float:
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error


def _weights(ratios: LogRatios) -> Tensor:
    """exp(r), at most the largest number of the dtype of the result."""
    # A little less than the logarithm, since exp rounds; nor does a gradient meet 0 * inf then.
    largest = math.log(torch.finfo(ratios.dtype).max) * (1 - 1e-6)
    return ratios.r.clamp(max=largest).exp()


def _in_mask(weights: Tensor, ratios: LogRatios) -> Tensor:
    return torch.where(ratios.valid, weights, 0.0).to(ratios.dtype)
