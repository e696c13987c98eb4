"""From what `TrainingInferenceMismatch` collects to the values it reports, by verl's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.metrics.log_histogram import quantile
from lightning_fp.metrics.log_ratio import PERPLEXITY_TERMS, SAFETY_BOUND, TERMS, TOKEN_TERMS
from lightning_fp.metrics.moments import covariance, means_of

PER_TOKEN = ("count", "nonfinite", "positive", "extreme", *TOKEN_TERMS)
PER_SEQUENCE = (*PERPLEXITY_TERMS, *TERMS)
LARGEST = ("r", "negative", "probs_diff", "log_ppl_diff", "negative_log_ppl_diff", "sequence")
MOMENTS = ("train", "rollout", "difference", "excess_weight")
"""What each element of the states `token_sums`, `sequence_sums`, `largest` and `moments` is of."""

Means = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Over all updates and ranks; float64 throughout."""

    token: Means
    """Means over tokens, by the names in `PER_TOKEN`; NaN without tokens."""

    sequence: Means
    """Means over sequences, by the names in `PER_SEQUENCE`; NaN without sequences."""

    largest: Means
    """By the names in `LARGEST`; NaN without tokens."""

    moments: Tensor
    """As `moments_of` returns them, of the variables in `MOMENTS`."""

    magnitudes: Tensor
    """int64 counts of |r|, as `histogram` returns them."""

    limit: float
    """Logarithm of the threshold of importance weights."""


def _bounded(of: Collected, name: str) -> Tensor:
    """One of `LARGEST`, as far as importance weights go."""
    return of.largest[name].clamp(-SAFETY_BOUND, SAFETY_BOUND)


def _weight_variance(of: Collected) -> Tensor:
    place = MOMENTS.index("excess_weight")
    return covariance(of.moments)[place, place]


def _effective_sample_size(of: Collected) -> Tensor:
    squared = (1 + means_of(of.moments)[MOMENTS.index("excess_weight")]).square()
    return squared / (squared + _weight_variance(of))


def _deviation_of_difference(of: Collected) -> Tensor:
    """Of the sample, not of the population."""
    place = MOMENTS.index("difference")
    others = (of.moments[0, 0] - 1).clamp(min=0)
    return (of.moments[1:, 1:][place, place] / others).sqrt()


def _correlation(of: Collected) -> Tensor:
    """Pearson's, between the probabilities of both sides."""
    train, rollout = MOMENTS.index("train"), MOMENTS.index("rollout")
    products = of.moments[1:, 1:]
    spread = products[train, train].sqrt() * products[rollout, rollout].sqrt()
    return (products[train, rollout] / spread).clamp(-1, 1)


def _largest_difference(of: Collected) -> Tensor:
    return torch.maximum(of.largest["r"], of.largest["negative"])


def _quantile(of: Collected, share: float) -> Tensor:
    return torch.minimum(quantile(of.magnitudes, share), _largest_difference(of))


VALUES: Mapping[str, Callable[[Collected], Tensor]] = {
    # divergences
    "kl": lambda of: of.token["negative"],
    "k3_kl": lambda of: of.token["k3"],
    "reverse_k3_kl": lambda of: of.token["reverse_k3"],
    "js_divergence": lambda of: of.token["jensen_shannon"],
    "chi2_token": lambda of: of.token["chi2"],
    "chi2_seq": lambda of: of.sequence["chi2"],
    "mult_prob_error": lambda of: of.token["factor"],
    # perplexities
    "training_ppl": lambda of: of.sequence["train_ppl"],
    "training_log_ppl": lambda of: of.sequence["train_log_ppl"],
    "rollout_ppl": lambda of: of.sequence["rollout_ppl"],
    "rollout_log_ppl": lambda of: of.sequence["rollout_log_ppl"],
    "log_ppl_diff": lambda of: of.sequence["log_ppl_diff"],
    "log_ppl_abs_diff": lambda of: of.sequence["log_ppl_abs_diff"],
    "log_ppl_diff_max": lambda of: of.largest["log_ppl_diff"],
    "log_ppl_diff_min": lambda of: -of.largest["negative_log_ppl_diff"],
    "ppl_ratio": lambda of: of.sequence["ppl_ratio"],
    # importance weights of tokens; those of whole sequences begin with `seq_`
    "rollout_is_mean": lambda of: of.token["weight"],
    "rollout_is_std": lambda of: _weight_variance(of).sqrt(),
    "rollout_is_max": lambda of: _bounded(of, "r").exp(),
    "rollout_is_min": lambda of: (-_bounded(of, "negative")).exp(),
    "rollout_is_ratio_fraction_high": lambda of: of.token["high"],
    "rollout_is_ratio_fraction_low": lambda of: of.token["low"],
    "rollout_is_eff_sample_size": _effective_sample_size,
    "rollout_is_abs_deviation": lambda of: of.token["deviation"],
    "tis_weight_max": lambda of: _bounded(of, "r").clamp(max=of.limit).exp(),
    "tis_weight_min": lambda of: (-_bounded(of, "negative")).clamp(max=of.limit).exp(),
    "tis_weight_mean": lambda of: of.token["truncated"],
    "tis_clip_fraction": lambda of: of.token["high"],
    "mis_weight_mean": lambda of: of.token["masked"],
    "mis_mask_fraction": lambda of: of.token["high"],
    "seq_tis_weight_mean": lambda of: of.sequence["truncated"],
    "seq_tis_clip_fraction": lambda of: of.sequence["high"],
    "seq_mis_weight_mean": lambda of: of.sequence["masked"],
    "seq_mis_mask_fraction": lambda of: of.sequence["high"],
    # probabilities
    "rollout_probs_diff_max": lambda of: of.largest["probs_diff"],
    "rollout_probs_diff_mean": lambda of: means_of(of.moments)[MOMENTS.index("difference")],
    "rollout_probs_diff_std": _deviation_of_difference,
    "rollout_actor_probs_pearson_corr": _correlation,
    "extreme_disagreement": lambda of: of.token["extreme"],
    # log-probabilities
    "logprob_abs_diff_mean": lambda of: of.token["abs"],
    "logprob_abs_diff_max": _largest_difference,
    "logprob_abs_diff_p50": lambda of: _quantile(of, 0.5),
    "logprob_abs_diff_p99": lambda of: _quantile(of, 0.99),
    "logprob_abs_diff_p99.9": lambda of: _quantile(of, 0.999),
    "seq_logprob_abs_diff_mean": lambda of: of.sequence["abs"],
    "seq_logprob_abs_diff_max": lambda of: of.largest["sequence"],
}
"""Float64 scalars by name, in the order of the columns of `mismatch.csv`."""

COUNTS = ("tokens", "sequences", "nonfinite")
"""What is reported besides, last."""
