"""Mismatch: what `loop.mismatch` is to the owner of a plain loop."""

from __future__ import annotations

from torch import Tensor

from lightning_fp.loop.parts import Parts


class Mismatch:
    """Brings log-probabilities of sampled tokens to where they are judged.

    Args:
        parts: of the loop.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @property
    def latest(self) -> dict[str, float] | None:
        """The metrics of the last measured step, the same on every rank."""
        return self._parts.mismatch.latest

    def update(
        self, rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor | None = None
    ) -> None:
        """To be called in a step, in `compute_loss` or the block; replays take nothing in.

        Args:
            rollout_logprobs: [batch, tokens], of the sampled tokens, by the engine.
            train_logprobs: [batch, tokens], the same tokens by the policy before the step's
                update; gradients are not followed.
            mask: [batch, tokens], 0 for prompt and padding; None counts all.

        Raises:
            ValueError: in the first measured step for what are no log-probabilities.
        """
        self._parts.update_mismatch(rollout_logprobs, train_logprobs, mask)
