"""The largest value of every layer's input and weight at every step, without waiting for it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_fp.layers import PrecisionMap

_OPERANDS = 2
"""Input and weight; see `lightning_fp.stability.detect.cast_trigger`."""


class CastWatch:
    """Copies what the amax histories have seen to the host; on CUDA it is read a step late.

    Args:
        table: whose layers tell their amax from here on, under dynamic scaling too.
    """

    def __init__(self, table: PrecisionMap) -> None:
        table.watch_casts(True)
        self._table = table
        self._rows = {name: row for row, name in enumerate(table.layers)}
        self._told: tuple[list[str], Tensor] = [], torch.empty(0, dtype=torch.int64)
        """The layers whose amax is known, and their rows."""
        self._pending: deque[tuple[int, Tensor, Tensor, torch.cuda.Event | None]] = deque()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """A step has been made.

        Args:
            step: optimizer steps before it.
        """
        history = self._table.scale_history
        names, amax = history.names, history.amax
        if not names or len(amax) != len(names):
            return
        if names != self._told[0]:
            self._told = list(names), torch.tensor([self._rows[name] for name in names])
        rows = self._told[1]
        seen, ready = amax[:, :_OPERANDS], None
        if seen.is_cuda:
            host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
            host.copy_(seen, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            seen = host
        self._pending.append((step, rows, seen, ready))

    def take(self) -> list[tuple[int, Tensor]]:
        """Steps that have arrived, with float32 [layers of the table, 2]; NaN: not seen."""
        taken: list[tuple[int, Tensor]] = []
        while self._pending and (self._pending[0][3] is None or len(self._pending) > 1):
            step, rows, seen, ready = self._pending.popleft()
            if ready is not None:
                ready.synchronize()
            amax = torch.full((len(self._rows), _OPERANDS), torch.nan)
            amax[rows] = seen
            taken.append((step, amax))
        return taken

    def close(self) -> None:
        """Layers tell no more than their formats need."""
        self._table.watch_casts(False)
