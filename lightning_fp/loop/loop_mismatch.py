"""Mismatch: what `loop.mismatch` is to the owner of a plain loop."""

from __future__ import annotations

from torch import Tensor

from lightning_fp.loop.parts import Parts
from lightning_fp.rl.causes import Causes
from lightning_fp.rl.corrections import Correction
from lightning_fp.rl.origin import SampleOrigin


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

    @property
    def causes(self) -> Causes | None:
        """What its mismatch came from; None where no origin was given."""
        return self._parts.mismatch.causes

    @property
    def correction(self) -> Correction | None:
        """The bounds on importance weights in force: `loop.mismatch.correction.weights(...)`."""
        return self._parts.mismatch.warning.correction

    def update(
        self,
        rollout_logprobs: Tensor,
        train_logprobs: Tensor,
        mask: Tensor | None = None,
        *,
        origin: SampleOrigin | None = None,
    ) -> None:
        """To be called in a step, in `compute_loss` or the block; replays take nothing in.

        Args:
            rollout_logprobs: [batch, tokens], of the sampled tokens, by the engine.
            train_logprobs: [batch, tokens], the same tokens by the policy before the step's
                update; gradients are not followed.
            mask: [batch, tokens], 0 for prompt and padding; None counts all.
            origin: what is known of the samples, by which causes are told apart.

        Raises:
            ValueError: in the first measured step for what are no log-probabilities.
        """
        self._parts.update_mismatch(rollout_logprobs, train_logprobs, mask, origin)
