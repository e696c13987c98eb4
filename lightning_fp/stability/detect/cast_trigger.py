"""Steps with unusual casts: the largest value of a layer's input or weight jumps.

Under dynamic scaling one huge value takes the range from all others, and nothing is clamped. A
batch in 20 with such a value costs 12% to 22% of the loss; probes and limits, which look at few
steps, do not meet it. The amax of every step is known, so the step itself is caught, and its batch
can be compared with high precision. A jump convicts nobody: large values are often right.

Jumps are counted in bits, for it is the exponent range of a format that one value takes from all
others. A level that has moved for good is no event any more: the median follows it within half a
window, and until then the waits between reports double.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

OPERANDS: tuple[Literal["input", "weight"], ...] = ("input", "weight")
"""grad_output is left out: of healthy steps 12.6 in 1,000 would be reported."""

FIRST_WAIT = 4
"""Steps that a report is not repeated for; twice as many each time."""

LONGEST_WAIT = 1024

UNUSUAL = 1.0
"""Bits above the median from which on a batch's casts count as unusual: 6 of 1,000 healthy ones."""

ONE_HIGHER = 1.0
"""Bits above the last report at which waiting ends."""


@dataclass(frozen=True, kw_only=True)
class CastJump:
    """The largest value of one operand, far above the usual."""

    layer: int
    """Row of the table of amax."""

    operand: Literal["input", "weight"]

    bits: float
    """Above the median; inf for a value that is not finite."""


@dataclass(frozen=True, kw_only=True)
class CastState:
    """The amax of the last steps, and what was reported. Tensors are never written into."""

    recent: Tensor
    """float32 [steps so far up to the window, layers, 2]: log2 of amax, oldest first; NaN where
    nothing was seen."""

    reported: Tensor
    """float32 [layers, 2]: bits of the last report; 0 without one."""

    quiet_until: Tensor
    """int64 [layers, 2]: the step up to which only a higher jump is reported."""

    waits: Tensor
    """int64 [layers, 2]: steps that the next report is kept quiet for."""

    last: int = -1
    """The last step."""


@dataclass(frozen=True, kw_only=True)
class CastTrigger:
    """What jump of an amax is unusual. Pure: old states stay usable."""

    bits: float = 3.0
    """Above the median of the window. Measured: nothing in 6,000 healthy steps, as with 2; with 1
    about 6 in 1,000 steps."""

    window: int = 32
    """Steps; before so many were seen nothing is reported."""

    def __post_init__(self) -> None:
        if not self.bits > 0:
            raise ValueError(f"bits must be above 0, got {self.bits!r}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 steps, got {self.window!r}")

    def init(self, layers: int) -> CastState:
        """Nothing seen yet."""
        shape = (layers, len(OPERANDS))
        return CastState(
            recent=torch.empty(0, *shape),
            reported=torch.zeros(shape),
            quiet_until=torch.zeros(shape, dtype=torch.int64),
            waits=torch.full(shape, FIRST_WAIT),
        )

    def step(self, state: CastState, step: int, amax: Tensor) -> tuple[CastState, list[CastJump]]:
        """Take in one step.

        Args:
            state: what was seen before.
            step: its number.
            amax: [layers, 2] on the CPU, of input and weight, over all ranks and micro-batches; 0
                or NaN where nothing was seen.

        Returns:
            The new state, and the jumps to look into, largest first.
        """
        level = amax.float().log2()
        # An amax of 0 stands for a layer that was not called. As a level it would pull the median
        # down, and every ordinary step would be a jump.
        level = torch.where(level == -torch.inf, torch.nan, level)
        before = state.recent
        state = replace(state, last=step, recent=torch.cat([before, level[None]])[-self.window :])
        if len(before) < self.window:
            return state, []
        # No level is that far above the median which is not above the lowest: most steps end here.
        lowest = before.nan_to_num(nan=torch.inf).amin(dim=0)
        if not bool((level - lowest > self.bits).any()):
            return state, []
        # Against the steps before, without this one: a jump must not raise its own reference.
        above = level - before.nanmedian(dim=0).values
        new = (step >= state.quiet_until) | (above >= state.reported + ONE_HIGHER)
        jumps = (above > self.bits) & new  # NaN is not
        if not bool(jumps.any()):
            return state, []
        found = [
            CastJump(layer=row, operand=OPERANDS[column], bits=float(above[row, column]))
            for row, column in jumps.nonzero().tolist()
        ]
        after = CastState(
            last=step,
            recent=state.recent,
            reported=torch.where(jumps, above, state.reported),
            quiet_until=torch.where(jumps, step + state.waits, state.quiet_until),
            waits=torch.where(jumps, (2 * state.waits).clamp(max=LONGEST_WAIT), state.waits),
        )
        return after, sorted(found, key=lambda jump: -jump.bits)

    def worst(self, state: CastState, count: int) -> tuple[int, ...]:
        """The steps of the window whose casts were most unusual, worst first; only such as were.

        Args:
            state: what was seen.
            count: how many at most.
        """
        steps = len(state.recent)
        if steps < 2:
            return ()
        above = (state.recent - state.recent.nanmedian(dim=0).values).nan_to_num(nan=0.0)
        bits = above.flatten(1).amax(dim=1).tolist()
        order = sorted(range(steps), key=lambda row: -bits[row])[:count]
        return tuple(state.last - steps + 1 + row for row in order if bits[row] > UNUSUAL)

    def state_dict(self, state: CastState) -> dict[str, Any]:
        """Plain tensors, and a number."""
        return dict(vars(state))

    def load_state_dict(self, saved: Mapping[str, Any]) -> CastState:
        """See `state_dict`."""
        tensors = {n: value.cpu() for n, value in saved.items() if isinstance(value, Tensor)}
        return CastState(last=saved.get("last", -1), **tensors)
