"""From the log-probabilities of both sides to one log-ratio per token, or per sequence.

r = log pi_train - log mu_rollout of a sampled token. What shares a weight has one log-ratio: a
token its own; a sequence the sum of its tokens' (the ratio of both probabilities of the sequence)
or their mean, whose exponential is the geometric mean of the tokens' ratios and does not grow with
the length (GSPO, arXiv 2507.18071).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fp.choices import check_choice
from lightning_fp.metrics.log_probabilities import (
    ROUNDING,
    check_same_shape,
    check_sides,
    not_logprobs,
)

Level = Literal["token", "sequence", "geometric"]
"""What shares a weight: each token has its own; the tokens of a sequence share the product of their
ratios ("sequence") or its geometric mean."""


@dataclass(frozen=True, kw_only=True)
class LogRatios:
    """Of one batch, at one level."""

    r: Tensor
    """Of each token's weight: float64 (float32 on MPS), finite, 0 where `valid` is not; [batch,
    tokens]. Tokens of a sequence share theirs at the levels of sequences."""

    valid: Tensor
    """bool [batch, tokens]: inside of the mask, and with a log-ratio that is a number. At the
    levels of sequences one token without takes the whole sequence's away."""

    nonfinite: Tensor
    """int64 scalar: tokens inside of the mask whose own log-ratio is inf or NaN."""

    level: Level
    """What shares a weight."""

    dtype: torch.dtype
    """Of the weights to be made: that of the log-probabilities, float32 at least."""

    def units(self) -> tuple[Tensor, Tensor]:
        """The log-ratios of what has a weight of its own.

        Returns:
            `r` and `valid` of tokens, [batch, tokens], or of sequences, [batch, 1].
        """
        if self.level == "token" or not self.r.shape[1]:
            return self.r, self.valid
        # All valid tokens of a row have the same.
        valid = self.valid.any(dim=1, keepdim=True)
        first = self.valid.long().argmax(dim=1, keepdim=True)
        return self.r.gather(1, first), valid


def log_ratios(
    rollout_logprobs: Tensor,
    train_logprobs: Tensor,
    mask: Tensor | None,
    level: Level,
    *,
    detach: bool = True,
) -> LogRatios:
    """The log-ratios that weights are made of.

    Args:
        rollout_logprobs: [batch, tokens], any floating-point dtype; of the sampled tokens, by the
            engine that sampled them.
        train_logprobs: [batch, tokens], the same tokens by the policy that is trained.
        mask: [batch, tokens], 0 for prompt and padding, which may then hold anything; None counts
            all.
        level: what shares a weight.
        detach: whether gradients stop here.

    Raises:
        ValueError: for shapes that differ, an unknown level, or values that are no
            log-probabilities; these are looked for on the CPU alone, so that nothing waits for a
            device.
    """
    check_choice("level", level, get_args(Level))
    check_sides(rollout_logprobs, train_logprobs, mask)
    if detach:
        rollout_logprobs, train_logprobs = rollout_logprobs.detach(), train_logprobs.detach()
    wide = torch.float32 if train_logprobs.device.type == "mps" else torch.float64
    rollout, train = rollout_logprobs.to(wide), train_logprobs.to(wide)
    counted = torch.ones_like(train, dtype=torch.bool) if mask is None else mask != 0
    _check_logprobs(rollout, train, counted)

    known = counted & rollout.detach().isfinite() & train.detach().isfinite()
    # Both sides are made finite before the difference: a gradient must not meet inf - inf.
    r = torch.where(known, train, 0.0) - torch.where(known, rollout, 0.0)
    valid = known
    if level != "token":
        whole = (known == counted).all(dim=1, keepdim=True)
        total = r.sum(dim=1, keepdim=True)
        if level == "geometric":
            total = total / counted.sum(dim=1, keepdim=True).clamp(min=1)
        valid = counted & whole
        r = torch.where(valid, total, 0.0)
    dtype = torch.promote_types(rollout_logprobs.dtype, train_logprobs.dtype)
    return LogRatios(
        r=r,
        valid=valid,
        nonfinite=(counted & ~known).sum(),
        level=level,
        dtype=torch.promote_types(dtype, torch.float32),
    )


def check_tokens(rollout_tokens: Tensor, train_tokens: Tensor, mask: Tensor | None = None) -> None:
    """Refuse log-probabilities of other tokens than those that were sampled.

    An engine's text that is tokenised again may give other ids, and log-probabilities of other
    tokens look like a mismatch. Waits for the device.

    Args:
        rollout_tokens: integers [batch, tokens], as the engine sampled them.
        train_tokens: integers [batch, tokens], whose log-probabilities training computes.
        mask: [batch, tokens], 0 where they may differ; None: nowhere.

    Raises:
        ValueError: if shapes differ, or ids inside of the mask; the message has the first place.
    """
    for name, tokens in {"rollout_tokens": rollout_tokens, "train_tokens": train_tokens}.items():
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"{name} must be token ids, integers, got {tokens.dtype}")
    others = {"train_tokens": train_tokens, "mask": mask}
    check_same_shape("rollout_tokens", rollout_tokens, others)
    differ = rollout_tokens != train_tokens.to(rollout_tokens.device)
    if mask is not None:
        differ = differ & (mask != 0).to(differ.device)
    if not bool(differ.any()):
        return
    row, place = differ.nonzero()[0].tolist()
    raise ValueError(
        "train_tokens must be the tokens that were sampled, got"
        f" {train_tokens[row, place].item()} at [{row}, {place}] where the rollout has"
        f" {rollout_tokens[row, place].item()}, and {int(differ.sum())} tokens in all that differ;"
        " hand the engine's ids over instead of its text"
    )


def _check_logprobs(rollout: Tensor, train: Tensor, counted: Tensor) -> None:
    if rollout.device.type != "cpu" or torch.compiler.is_compiling():
        return
    largest = torch.maximum(rollout.detach(), train.detach())
    positive = counted & (largest > ROUNDING)
    if bool(positive.any()):
        raise not_logprobs(f"{largest[positive][0].item():.4g}")
