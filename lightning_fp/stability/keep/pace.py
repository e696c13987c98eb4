"""How often the state is copied: what copies take from the device stays a small share of the time.

A snapshot of a large model is some gigabytes for each rank, and takes a good part of a second on
its way to the host. Every 16 steps that would be much of a short step's time. So copies are
measured against steps, and the interval is lengthened where they come to more. On the CPU nothing
is measured: there a run must not depend on a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lightning_fp.stability.keep.snapshots import Snapshots

SHARE = 0.01
"""Of the time, for copies to the host. They go beside forward and backward, and take bandwidth."""


def snapshot_interval(
    every_n_steps: int, *, copy_seconds: float, step_seconds: float, share: float = SHARE
) -> int:
    """Steps from one snapshot to the next that keep copies within their share.

    Args:
        every_n_steps: never fewer.
        copy_seconds: what one copy takes.
        step_seconds: what one step takes.
        share: of the time.

    >>> bytes_per_rank = 8.03e9 * 12 / 8  # Llama-8B on eight GPUs: float32 weights, two moments
    >>> snapshot_interval(16, copy_seconds=bytes_per_rank / 25e9, step_seconds=2.0)
    25
    """
    if not (step_seconds > 0 and math.isfinite(copy_seconds)):
        return every_n_steps
    return max(every_n_steps, math.ceil(copy_seconds / (share * step_seconds)))


class SnapshotPace:
    """Measures copies and steps, and keeps the interval of snapshots within the budget.

    Ranks agree, by a mean after the second snapshot, the third, the fifth, and so on with doubled
    distance: each time the host waits for the device.

    Args:
        snapshots: whose interval it is; what it is now is the shortest.
        mean: over ranks, alike on all of them.
        clock: seconds.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        mean: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._snapshots, self._mean, self._clock = snapshots, mean, clock
        self._least = snapshots.every_n_steps
        self._measured, self._before = 0, (0, 0.0)

    def taken(self, step: int, copy_seconds: float | None) -> bool:
        """A snapshot has been taken.

        Args:
            step: optimizer steps done.
            copy_seconds: what the copy before took; None where that was none from a device.

        Returns:
            Whether the interval has changed.
        """
        (then, began), self._before = self._before, (step, self._clock())
        if copy_seconds is None or step <= then:
            return False
        self._measured += 1
        if self._measured & (self._measured - 1):  # no power of two
            return False
        seconds = (self._before[1] - began) / (step - then)
        every = snapshot_interval(
            self._least, copy_seconds=self._mean(copy_seconds), step_seconds=self._mean(seconds)
        )
        changed = every != self._snapshots.every_n_steps
        self._snapshots.every_n_steps = every
        return changed
