"""What a layer remembers of its operands between forward and the end of the step."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
"""Order of the operands in every tensor that has one entry per operand."""

AMAX, NONFINITE = range(2)
"""What is recorded of an operand at every step."""

SLOTS = 16
POWER = 24
"""Gradients of one leaf add up over calls, but amax must combine by max. So each call of a layer
returns its amax in a slot of its own; and since slots can be shared (the same compiled graph run
twice, or more than 16 calls), what is returned is amax**24 in float64. The root of a single one
is exact after rounding to float32, that of a sum is the maximum within 3% for two calls, on the
safe side."""


class OperandMemory:
    """Recorded amax and non-finite counts of one layer, and the scales it casts with.

    Safe under torch.compile, inside activation checkpointing too: forward writes one tensor in
    place, and grad_output's record arrives as the gradient of `grad_leaf`, so that backward
    writes nothing.
    """

    def __init__(self, scales: Tensor) -> None:
        self.scales = scales
        """float32 [3]; read-only during a step, 0 for "no scale yet"."""
        device = scales.device
        self.recorded = torch.zeros(2, 2, device=device)
        """float32 [input or weight, amax or non-finite count] since the last step."""
        self.grad_leaf = torch.zeros(
            SLOTS, 2, dtype=torch.float64, device=device, requires_grad=True
        )
        """float64 [slot, amax**POWER or non-finite count]: the shape of what backward returns."""
        self.calls = 0
        """Eager forwards since the last fold."""

    def next_slot(self) -> int:
        """The slot in which this call returns its record."""
        if torch.compiler.is_compiling():
            return _slot_of_call_site()
        self.calls += 1
        return (self.calls - 1) % SLOTS

    @torch.no_grad()
    def record(self, row_input: Tensor, row_weight: Tensor) -> None:
        """Add one forward's records: amax combines by max, counts by sum.

        Args:
            row_input: float32 [amax, non-finite count] of the input.
            row_weight: the same of the weight.
        """
        rows = torch.stack([row_input, row_weight])
        amax = torch.maximum(self.recorded[:, AMAX], rows[:, AMAX])
        count = self.recorded[:, NONFINITE] + rows[:, NONFINITE]
        self.recorded.copy_(torch.stack([amax, count], dim=1))


_call_sites = itertools.count()


@torch.compiler.assume_constant_result
def _slot_of_call_site() -> int:
    """A slot for each place in a compiled graph: dynamo calls this once, when it traces."""
    return next(_call_sites) % SLOTS


def in_slot(row: Tensor, slot: int) -> Tensor:
    """A gradient for `grad_leaf`: a float32 record in its slot, zeros elsewhere."""
    wide = row.double()
    returned = torch.stack([wide[AMAX] ** POWER, wide[NONFINITE]])
    return F.pad(returned.unsqueeze(0), (0, 0, slot, SLOTS - slot - 1))


def from_slots(gradient: Tensor) -> Tensor:
    """The record that the gradients of a leaf add up to.

    Args:
        gradient: float64 [..., SLOTS, 2].

    Returns:
        float32 [..., 2]: amax and non-finite count.
    """
    amax = gradient[..., AMAX].amax(dim=-1) ** (1 / POWER)
    return torch.stack([amax, gradient[..., NONFINITE].sum(dim=-1)], dim=-1).float()
