"""Training tokens so far, for stages that end by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fp.rank_group import ranks
from lightning_fp.telemetry.over_ranks import total


class TokenCounter:
    """Training tokens over all ranks.

    Without a number given, those of a micro-batch are the elements of the first tensor of integers
    in it. Several ranks add up what they have counted once per `interval`, one is exact at once.

    Args:
        per_step: tokens of one optimizer step over all ranks, if they are always as many.
        interval: steps from one sum over ranks to the next.
    """

    def __init__(self, per_step: int | None, interval: int) -> None:
        self._per_step, self._interval = per_step, interval
        self._here = 0
        self.total = 0
        """Tokens so far."""

    def add(self, batch: Any) -> None:
        """Take in a micro-batch.

        Raises:
            ValueError: if it has no tensor of integers.
        """
        if self._per_step is not None:
            return
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and _is_integer(leaf.dtype):
                self._here += leaf.numel()
                return
        raise ValueError(
            "until.tokens cannot be counted: a batch has no tensor of integers; give"
            " StagedRollout(..., tokens_per_step=...) or another until"
        )

    def end_step(self, step: int, device: torch.device) -> None:
        """A step is over; now and then a collective.

        Args:
            step: optimizer steps done.
            device: where collectives run.
        """
        if self._per_step is not None:
            self.total += self._per_step
        elif ranks() == 1:
            self.total += self._here
            self._here = 0
        # Reading a sum waits for the device, so not at every step.
        elif step % self._interval == 0:
            self.total += int(total(torch.tensor(self._here, device=device)))
            self._here = 0

    def state_dict(self) -> dict[str, int]:
        """Plain numbers; what is not summed over ranks yet is the saving rank's."""
        return {"total": self.total, "here": self._here}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `state_dict`."""
        self.total, self._here = state["total"], state["here"]


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
