"""From what `TrainingInferenceMismatch` collects to the values it reports, by verl's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.metrics.log_histogram import quantile
from lightning_fp.metrics.log_ratio import SAFETY_BOUND, TERMS, TOKEN_TERMS
from lightning_fp.metrics.moments import covariance, means_of

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

PER_TOKEN = ("count", "nonfinite", "positive", "extreme", *TOKEN_TERMS)
PER_SEQUENCE = (
    "count",
    "train_log_ppl",
    "rollout_log_ppl",
    "train_ppl",
    "rollout_ppl",
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "ppl_ratio",
    *TERMS,
)
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


def values_of(collected: Collected) -> dict[str, Tensor]:
    """Everything but the counts; float64 scalars by name."""
    groups = (_divergences, _perplexities, _weights, _probabilities, _differences)
    return {name: value for group in groups for name, value in group(collected).items()}


def _divergences(of: Collected) -> dict[str, Tensor]:
    return {
        "kl": of.token["negative"],
        "k3_kl": of.token["k3"],
        "reverse_k3_kl": of.token["reverse_k3"],
        "js_divergence": of.token["jensen_shannon"],
        "chi2_token": of.token["chi2"],
        "chi2_seq": of.sequence["chi2"],
        "mult_prob_error": of.token["factor"],
    }


def _perplexities(of: Collected) -> dict[str, Tensor]:
    return {
        "training_ppl": of.sequence["train_ppl"],
        "training_log_ppl": of.sequence["train_log_ppl"],
        "rollout_ppl": of.sequence["rollout_ppl"],
        "rollout_log_ppl": of.sequence["rollout_log_ppl"],
        "log_ppl_diff": of.sequence["log_ppl_diff"],
        "log_ppl_abs_diff": of.sequence["log_ppl_abs_diff"],
        "log_ppl_diff_max": of.largest["log_ppl_diff"],
        "log_ppl_diff_min": -of.largest["negative_log_ppl_diff"],
        "ppl_ratio": of.sequence["ppl_ratio"],
    }


def _weights(of: Collected) -> dict[str, Tensor]:
    """Of tokens; those of whole sequences begin with `seq_`."""
    largest = of.largest["r"].clamp(-SAFETY_BOUND, SAFETY_BOUND)
    smallest = -of.largest["negative"].clamp(-SAFETY_BOUND, SAFETY_BOUND)
    place = MOMENTS.index("excess_weight")
    mean = 1 + means_of(of.moments)[place]
    variance = covariance(of.moments)[place, place]
    weights = {
        "rollout_is_mean": of.token["weight"],
        "rollout_is_std": variance.sqrt(),
        "rollout_is_max": largest.exp(),
        "rollout_is_min": smallest.exp(),
        "rollout_is_ratio_fraction_high": of.token["high"],
        "rollout_is_ratio_fraction_low": of.token["low"],
        "rollout_is_eff_sample_size": mean.square() / (mean.square() + variance),
        "rollout_is_abs_deviation": of.token["deviation"],
        "tis_weight_max": largest.clamp(max=of.limit).exp(),
        "tis_weight_min": smallest.clamp(max=of.limit).exp(),
    }
    for prefix, means in (("", of.token), ("seq_", of.sequence)):
        weights |= {
            f"{prefix}tis_weight_mean": means["truncated"],
            f"{prefix}tis_clip_fraction": means["high"],
            f"{prefix}mis_weight_mean": means["masked"],
            f"{prefix}mis_mask_fraction": means["high"],
        }
    return weights


def _probabilities(of: Collected) -> dict[str, Tensor]:
    train, rollout, difference = (MOMENTS.index(name) for name in MOMENTS[:3])
    products = of.moments[1:, 1:]
    others = (of.moments[0, 0] - 1).clamp(min=0)
    spread = products[train, train].sqrt() * products[rollout, rollout].sqrt()
    correlation = products[train, rollout] / spread
    return {
        "rollout_probs_diff_max": of.largest["probs_diff"],
        "rollout_probs_diff_mean": means_of(of.moments)[difference],
        "rollout_probs_diff_std": (products[difference, difference] / others).sqrt(),
        "rollout_actor_probs_pearson_corr": correlation.clamp(-1, 1),
        "extreme_disagreement": of.token["extreme"],
    }


def _differences(of: Collected) -> dict[str, Tensor]:
    largest = torch.maximum(of.largest["r"], of.largest["negative"])
    quantiles = {
        f"logprob_abs_diff_{name}": torch.minimum(quantile(of.magnitudes, share), largest)
        for name, share in QUANTILES.items()
    }
    return {
        "logprob_abs_diff_mean": of.token["abs"],
        "logprob_abs_diff_max": largest,
        **quantiles,
        "seq_logprob_abs_diff_mean": of.sequence["abs"],
        "seq_logprob_abs_diff_max": of.largest["sequence"],
    }
