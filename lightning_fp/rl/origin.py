"""Where samples come from: what can set both sides apart besides the numbers they compute in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.rl.log_ratios import check_tokens

Experts = Mapping[str, Tensor]
"""By layer: expert ids [batch, tokens] or [batch, tokens, experts of a token], in any order."""

NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling parameters by the names of vLLM and transformers, at the values that change nothing."""


@checked
@dataclass(frozen=True, kw_only=True)
class SampleOrigin:
    """What is known of a batch of samples; what is None is not asked about.

    Raises:
        ValueError: if something is given for one side that is needed for both, or the sampling
            parameters of a side are no numbers.
    """

    rollout_version: Tensor | int | None = None
    """Version of the weights that sampled, counted in synchronisations or in optimizer steps: one
    for all, [batch], or [batch, tokens]."""

    train_version: int | None = None
    """Version of the weights that training evaluates, counted alike."""

    rollout_experts: Experts | None = None
    """Which experts the engine's routers chose for each token."""

    train_experts: Experts | None = None
    """Which training's chose."""

    rollout_sampling: Mapping[str, float] | None = None
    """The parameters that the engine's log-probabilities have gone through, e.g.
    `{"temperature": 0.7}`; those left out change nothing. Parameters of sampling alone, where the
    engine returns log-probabilities from before them, are not to be named."""

    train_sampling: Mapping[str, float] | None = None
    """The same of training's log-probabilities."""

    rollout_tokens: Tensor | None = None
    """The ids that the engine sampled, [batch, tokens]."""

    train_tokens: Tensor | None = None
    """The ids whose log-probabilities training computes; see `check_tokens`."""

    def __post_init__(self) -> None:
        for one, other in (
            ("rollout_version", "train_version"),
            ("rollout_experts", "train_experts"),
            ("rollout_tokens", "train_tokens"),
        ):
            given = [name for name in (one, other) if getattr(self, name) is not None]
            if len(given) == 1:
                raise ValueError(f"{one} and {other} must be given both or neither, got {given[0]}")
        if self.rollout_experts is not None and self.train_experts is not None:
            alone = self.rollout_experts.keys() ^ self.train_experts.keys()
            if alone:
                raise ValueError(
                    "rollout_experts and train_experts must have the same layers, got"
                    f" {', '.join(sorted(alone))} on one side only"
                )
        for side in ("rollout_sampling", "train_sampling"):
            for name, value in (getattr(self, side) or {}).items():
                if not isinstance(value, (int, float)):
                    raise ValueError(
                        f"{side} must be numbers by name, got {name}={value!r}; leave parameters"
                        " out that change no log-probability"
                    )

    def check(self, mask: Tensor | None) -> None:
        """Refuse tokens that differ, see `check_tokens`."""
        if self.rollout_tokens is not None and self.train_tokens is not None:
            check_tokens(self.rollout_tokens, self.train_tokens, mask)

    def staleness(self, shape: tuple[int, int]) -> Tensor | None:
        """How many versions behind each token's weights were.

        Args:
            shape: batch and tokens.

        Returns:
            [batch, tokens] or broadcastable to it; None if nothing is known.

        Raises:
            ValueError: if versions have another shape.
        """
        if self.rollout_version is None or self.train_version is None:
            return None
        sampled = self.rollout_version
        if not isinstance(sampled, Tensor):
            sampled = torch.tensor(sampled)
        if sampled.dim() == 1 and len(sampled) == shape[0]:
            sampled = sampled.unsqueeze(1)
        if sampled.dim() and tuple(sampled.shape) not in (shape, (shape[0], 1)):
            raise ValueError(
                f"rollout_version must be one number, [batch] or [batch, tokens], {shape}, got"
                f" shape {tuple(sampled.shape)}"
            )
        return self.train_version - sampled

    def rerouted(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Of which tokens the experts differ, by layer.

        Args:
            shape: batch and tokens.

        Returns:
            bool [batch, tokens] each; empty if nothing is known.

        Raises:
            ValueError: if a layer's ids have another shape.
        """
        theirs, ours = self.rollout_experts, self.train_experts
        if theirs is None or ours is None:
            return {}
        differ: dict[str, Tensor] = {}
        for layer, ids in theirs.items():
            others = ours[layer].to(ids.device)
            if tuple(ids.shape[:2]) != shape or ids.shape != others.shape or ids.dim() > 3:
                raise ValueError(
                    f"experts of {layer!r} must be [batch, tokens] or [batch, tokens, experts],"
                    f" {shape} on both sides, got {tuple(ids.shape)} and {tuple(others.shape)}"
                )
            if ids.dim() == 2:
                differ[layer] = ids != others
            else:
                differ[layer] = (ids.sort(dim=2).values != others.sort(dim=2).values).any(dim=2)
        return differ

    @property
    def unequal_sampling(self) -> tuple[str, ...]:
        """The sampling parameters that only one side has, by name."""
        theirs, ours = dict(self.rollout_sampling or {}), dict(self.train_sampling or {})
        names = sorted({*theirs, *ours})
        return tuple(name for name in names if _value(theirs, name) != _value(ours, name))


def _value(given: Mapping[str, float], name: str) -> float | None:
    value = given.get(name, NEUTRAL.get(name))
    # vLLM writes top_k -1, transformers 0, for all
    return 0 if name == "top_k" and value == -1 else value
