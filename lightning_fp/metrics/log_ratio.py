"""What is averaged of a log-ratio, exact also where it is tiny.

A log-ratio here is r = log pi_train - log mu_rollout of one sampled token, or its sum over a
sequence. Between FP16 engines it is about 1e-4, and then `exp(r) - r - 1` in fp32 is noise: it even
turns negative. All terms are therefore formed in float64, and from `expm1` where 1 is taken off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAFETY_BOUND = 20.0
"""Log-ratios are clamped to plus and minus this before importance weights are formed (verl,
trainer/ppo/rollout_corr_helper.py)."""

Term = Callable[[Tensor, float], Tensor]
"""From log-ratios and the logarithm of the threshold to what is averaged."""

_SMALL = 0.1
"""Below it the series, above it the closed form has more digits; both have 14 there."""

_LAST = 11
"""Of the series' powers: 0.1**9 / (11! / 2) is below the precision of float64."""


def excess_over_linear(x: Tensor) -> Tensor:
    """`exp(x) - 1 - x`, to the last digits of float64 also where x is tiny; float64, any shape.

    `expm1(x) - x` alone is good to 1e-11 at 1e-5, because the leading terms cancel.
    """
    series = torch.ones_like(x)
    for power in range(_LAST, 2, -1):
        series = 1 + x / power * series
    return torch.where(x.abs() < _SMALL, x * x / 2 * series, x.expm1() - x)


def jensen_shannon(r: Tensor) -> Tensor:
    """Estimate from one token: half the k3 of each side against their mean (NeMo-RL).

    log((1 + exp(r)) / 2) is the log-ratio of the mean to the rollout, without overflow.
    """
    to_mean = 0.5 * (-r.abs()).expm1()
    mean_to_rollout = r.clamp(min=0) + to_mean.log1p()
    mean_to_train = (-r).clamp(min=0) + to_mean.log1p()
    return 0.5 * (excess_over_linear(-mean_to_rollout) + excess_over_linear(-mean_to_train))


def _weight(r: Tensor, limit: float) -> Tensor:
    return r.clamp(-SAFETY_BOUND, SAFETY_BOUND).exp()


def _truncated(r: Tensor, limit: float) -> Tensor:
    return r.clamp(-SAFETY_BOUND, limit).exp()


def _masked(r: Tensor, limit: float) -> Tensor:
    return torch.where(r > limit, 0.0, _weight(r, limit))


PERPLEXITY_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "count": lambda train, rollout, difference: torch.ones_like(difference),
    "train_log_ppl": lambda train, rollout, difference: train,
    "rollout_log_ppl": lambda train, rollout, difference: rollout,
    "train_ppl": lambda train, rollout, difference: train.exp(),
    "rollout_ppl": lambda train, rollout, difference: rollout.exp(),
    "log_ppl_diff": lambda train, rollout, difference: difference,
    "log_ppl_abs_diff": lambda train, rollout, difference: difference.abs(),
    "ppl_ratio": lambda train, rollout, difference: difference.exp(),
}
"""Of sequences: from the logarithms of both perplexities, and their difference."""

TERMS: dict[str, Term] = {
    "abs": lambda r, limit: r.abs(),
    "chi2": lambda r, limit: (2 * r.clamp(-SAFETY_BOUND, SAFETY_BOUND)).expm1(),
    "weight": _weight,
    "truncated": _truncated,
    "masked": _masked,
    "high": lambda r, limit: (r > limit).double(),
    "low": lambda r, limit: (r < -limit).double(),
}
"""Of tokens and of sequences."""

TOKEN_TERMS: dict[str, Term] = {
    "negative": lambda r, limit: -r,
    "k3": lambda r, limit: excess_over_linear(r),
    "reverse_k3": lambda r, limit: excess_over_linear(-r),
    "jensen_shannon": lambda r, limit: jensen_shannon(r),
    "factor": lambda r, limit: r.abs().exp(),
    "deviation": lambda r, limit: r.clamp(-SAFETY_BOUND, SAFETY_BOUND).expm1().abs(),
    **TERMS,
}
"""Of tokens."""
