"""How far the policy that is trained is from the engine that sampled, as a torchmetric."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.choices import did_you_mean
from lightning_fp.metrics.base import Float64Metric
from lightning_fp.metrics.log_histogram import BINS, histogram
from lightning_fp.metrics.log_probabilities import ROUNDING, check_sides, not_logprobs
from lightning_fp.metrics.log_ratio import PERPLEXITY_TERMS, SAFETY_BOUND, TERMS, TOKEN_TERMS, Term
from lightning_fp.metrics.mismatch_names import ALIASES, Aliases
from lightning_fp.metrics.mismatch_values import (
    COUNTS,
    LARGEST,
    MOMENTS,
    PER_SEQUENCE,
    PER_TOKEN,
    VALUES,
    Collected,
)
from lightning_fp.metrics.moments import merge_moments, moments_of, no_moments

EXTREME = 0.9
"""Difference of probabilities that counts as extreme disagreement: one side is all but sure of a
token that the other all but excludes."""


class TrainingInferenceMismatch(Float64Metric):
    """Log-probabilities of sampled tokens: as the rollout engine gave them, and as training does.

    With the same weights both should be equal; they differ by what precision and kernels do, and a
    growing difference comes before a collapse ("Defeating the Training-Inference Mismatch via
    FP16", arXiv 2510.26788). States are float64 and stay so; updates and ranks add up to what one
    pass over everything gives. `docs/training-inference-mismatch.md` defines every name.

    Args:
        aliases: whose names `compute` uses besides its own, which are verl's: "verl", "trl",
            "nemo-rl" or "slime".
        threshold: importance weights above it are truncated or masked; above 1. 2 is the default
            of verl and slime.
        validate_args: refuse log-probabilities above 0. On the CPU `update` does so at once; on
            other devices `compute` does, so that `update` never waits for the device.
        kwargs: torchmetrics' own options, e.g. `sync_on_compute`.

    Raises:
        ValueError: if an option is not one of the above.

    >>> metric = TrainingInferenceMismatch()
    >>> rollout = torch.tensor([[0.5, 0.25], [0.1, 1.0]]).log()
    >>> train = torch.tensor([[0.5, 0.20], [0.1, 1.0]]).log()
    >>> metric.update(rollout, train, mask=torch.tensor([[1, 1], [1, 0]]))
    >>> round(metric.compute()["rollout_probs_diff_max"].item(), 6)
    0.05
    """

    token_sums: Tensor
    sequence_sums: Tensor
    largest: Tensor
    moments: Tensor
    magnitudes: Tensor

    @checked
    def __init__(
        self,
        aliases: Aliases = "verl",
        *,
        threshold: float = 2.0,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if aliases not in ALIASES:
            names, hint = ", ".join(map(repr, ALIASES)), did_you_mean(aliases, ALIASES)
            raise ValueError(f"aliases must be one of {names}, got {aliases!r}{hint}")
        if not 1 < threshold <= math.exp(SAFETY_BOUND):
            raise ValueError(
                f"threshold must be above 1, got {threshold}; 2 truncates tokens that training"
                " finds more than twice as likely as the rollout did"
            )
        self.aliases: Aliases = aliases
        self.threshold = float(threshold)
        self.validate_args = validate_args
        float64 = torch.float64
        self.add_state("token_sums", torch.zeros(len(PER_TOKEN), dtype=float64), "sum")
        self.add_state("sequence_sums", torch.zeros(len(PER_SEQUENCE), dtype=float64), "sum")
        self.add_state("largest", torch.full((len(LARGEST),), -torch.inf, dtype=float64), "max")
        self.add_state("moments", no_moments(len(MOMENTS)), merge_moments)
        self.add_state("magnitudes", torch.zeros(BINS, dtype=torch.long), "sum")

    def update(
        self, rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor | None = None
    ) -> None:
        """Take in one batch of sequences.

        A token whose log-ratio is not finite (NaN or -inf on either side, or on both) is counted
        in `nonfinite` and left out of everything else. Sequences without tokens do not count.

        Args:
            rollout_logprobs: [batch, tokens], any floating-point dtype; of the sampled tokens, by
                the engine that sampled them.
            train_logprobs: [batch, tokens], the same tokens by the policy that is trained.
            mask: [batch, tokens], 0 for prompt and padding, which may then hold anything; None
                counts all.

        Raises:
            ValueError: if shapes differ, or if values are above 0 and thus no log-probabilities.
        """
        check_sides(rollout_logprobs, train_logprobs, mask)
        if rollout_logprobs.numel() == 0:
            return
        rollout, train = rollout_logprobs.detach().double(), train_logprobs.detach().double()
        counted = torch.ones_like(train, dtype=torch.bool) if mask is None else mask != 0
        positive = (torch.maximum(rollout, train) > ROUNDING) & counted
        if self.validate_args and positive.device.type == "cpu" and bool(positive.any()):
            raise not_logprobs(f"{torch.maximum(rollout, train)[positive][0].item():.4g}")

        valid = counted & (train - rollout).isfinite()
        rollout, train = torch.where(valid, rollout, 0.0), torch.where(valid, train, 0.0)
        r = train - rollout
        # p - q without the rounding of p and q
        difference = torch.maximum(train, rollout).exp() * -(-r.abs()).expm1()
        self._add_tokens(r, difference, valid, counted, positive)
        self._add_sequences(rollout, train, r, valid)
        limit = math.log(self.threshold)
        values = [train.exp(), rollout.exp(), difference, r.clamp(-limit, limit).expm1()]
        moments = moments_of(torch.stack([value.flatten() for value in values]), valid.flatten())
        self.moments = merge_moments(torch.stack([self.moments, moments]))
        self.magnitudes = self.magnitudes + histogram(r.abs().flatten(), valid.flatten())

    def _add_tokens(
        self, r: Tensor, difference: Tensor, valid: Tensor, counted: Tensor, positive: Tensor
    ) -> None:
        counts = (valid, counted & ~valid, positive, difference > EXTREME)
        sums = [count.sum().double() for count in counts]
        sums += _sums(TOKEN_TERMS, r, valid, self.threshold)
        self.token_sums = self.token_sums + torch.stack(sums)
        self._raise_to([r, -r, difference], valid, LARGEST.index("r"))

    def _add_sequences(self, rollout: Tensor, train: Tensor, r: Tensor, valid: Tensor) -> None:
        length = valid.sum(dim=1)
        exists, length = length > 0, length.clamp(min=1)
        total = r.sum(dim=1)
        log_ppl_diff = -total / length
        log_ppl = -train.sum(dim=1) / length, -rollout.sum(dim=1) / length, log_ppl_diff
        terms = [term(*log_ppl) for term in PERPLEXITY_TERMS.values()]
        sums = [torch.where(exists, term, 0.0).sum() for term in terms]
        sums += _sums(TERMS, total, exists, self.threshold)
        self.sequence_sums = self.sequence_sums + torch.stack(sums)
        extremes = [log_ppl_diff, -log_ppl_diff, total.abs()]
        self._raise_to(extremes, exists, LARGEST.index("log_ppl_diff"))

    def _raise_to(self, values: list[Tensor], valid: Tensor, first: int) -> None:
        largest = [torch.where(valid, value, -torch.inf).amax() for value in values]
        places = slice(first, first + len(values))
        raised = self.largest.clone()
        raised[places] = torch.maximum(raised[places], torch.stack(largest))
        self.largest = raised

    def compute(self) -> dict[str, Tensor]:
        """All quantities over all updates and ranks.

        Returns:
            float64 scalars by name. Without any token all are NaN but the counts `tokens`,
            `sequences` and `nonfinite`.

        Raises:
            ValueError: if values above 0 came in on a device other than the CPU.
        """
        token = dict(zip(PER_TOKEN, self.token_sums, strict=True))
        sequence = dict(zip(PER_SEQUENCE, self.sequence_sums, strict=True))
        if self.validate_args and token["positive"] > 0:
            raise not_logprobs(f"{int(token['positive'])} values above it")
        tokens, sequences = token["count"], sequence["count"]
        largest = torch.where(tokens > 0, self.largest, torch.nan)
        collected = Collected(
            # 0 / 0 is NaN: without tokens there is no mean
            token={name: total / tokens for name, total in token.items()},
            sequence={name: total / sequences for name, total in sequence.items()},
            largest=dict(zip(LARGEST, largest, strict=True)),
            moments=self.moments,
            magnitudes=self.magnitudes,
            limit=math.log(self.threshold),
        )
        values = {name: value(collected) for name, value in VALUES.items()}
        values |= zip(COUNTS, (tokens, sequences, token["nonfinite"]), strict=True)
        return values | {alias: values[name] for alias, name in ALIASES[self.aliases].items()}


def _sums(terms: dict[str, Term], ratios: Tensor, valid: Tensor, threshold: float) -> list[Tensor]:
    limit = math.log(threshold)
    # One after the other: each is as large as the batch.
    return [torch.where(valid, term(ratios, limit), 0.0).sum() for term in terms.values()]
