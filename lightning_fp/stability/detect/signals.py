"""Signals: a few numbers per step, alike on all ranks, read without waiting for the device.

Alike, because ranks act on them: a rank that alone suspected something would enter a replay's
collectives alone, and wait for ever. Without waiting, because a `.item()` in each step would let
the device run dry between two steps. The price is a step: what is judged is the step before. That
is soon enough, since a step that is not finite is left out by the guard, at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.numerics.combining import wide_dtype
from lightning_fp.rank_group import current_group, ranks


@dataclass(frozen=True, kw_only=True)
class StepSignals:
    """What one optimizer step showed, over all ranks."""

    step: int
    """Optimizer steps before this one."""

    loss: float | None
    """Mean over micro-batches and ranks; None if the step had none."""

    grad_norm: float | None
    """Before clipping, mean over ranks: those that exchange gradients have one. None if nothing
    stepped."""

    lr: float | None
    """Of the first parameter group."""

    headroom: float | None
    """Least headroom of any operand under delayed scaling, in bits, mean over ranks: those that
    share scales have one. None if there is none."""

    skipped: bool
    """Whether the step was left out, on any rank."""

    failed: bool = False
    """Whether who watches has failed, on any rank."""


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float | None
    values: Tensor
    ready: torch.cuda.Event | None


class SignalQueue:
    """Steps' signals on their way from the device to the host.

    On CUDA the copy is asynchronous and read one step late, when it has long arrived; what is on
    the host already is read at once.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    @torch.no_grad()
    def put(
        self,
        step: int,
        *,
        loss: Tensor | None,
        grad_norms: Sequence[Tensor],
        skipped: Sequence[Tensor],
        headroom: Tensor | None,
        lr: float | None,
        device: torch.device,
        failed: bool = False,
    ) -> None:
        """Add a step; one collective if distributed.

        Args:
            step: optimizer steps before this one.
            loss: scalar, this rank's mean over micro-batches.
            grad_norms: scalars, one for each optimizer that stepped.
            skipped: bool scalars, likewise.
            headroom: float32 [layers, operands] in bits.
            lr: of the first parameter group.
            device: where collectives run.
            failed: whether who watches has failed on this rank.
        """
        none = torch.zeros((), dtype=wide_dtype(device), device=device)
        norm = torch.stack([n.float().to(device) for n in grad_norms]) if grad_norms else None
        seen = (
            loss,
            None if norm is None else torch.linalg.vector_norm(norm, dtype=none.dtype),
            None if headroom is None or headroom.numel() == 0 else headroom.amin(),
        )
        left_out = torch.stack([s.to(device) for s in skipped]).any() if skipped else none
        # Whatever is missing is 0 of 0, and all have one shape: each rank takes part in the
        # collective below, whether its step had a loss or not. Sums are wide, so that the mean of
        # equal numbers is that number. Filled and not copied from the host, which would wait.
        there = torch.ones_like(none)
        parts = [
            *(none if each is None else each.detach().to(none) for each in seen),
            *(none if each is None else there for each in seen),
            left_out.to(none),
            there if failed else none,
        ]
        values = torch.stack(parts)
        if ranks() > 1:
            dist.all_reduce(values, group=current_group())
        ready: torch.cuda.Event | None = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            values = host
        self._pending.append(_Pending(step, lr, values, ready))

    def take(self, *, all: bool = False) -> list[StepSignals]:
        """The steps that can be read without waiting, oldest first.

        Args:
            all: whether to wait for the last one too.
        """
        taken: list[StepSignals] = []
        # By count and not by `Event.query`: whether a copy has arrived differs between ranks, and
        # they must read the same steps.
        while self._pending and (all or self._pending[0].ready is None or len(self._pending) > 1):
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            taken.append(_read(pending))
        return taken


def _read(pending: _Pending) -> StepSignals:
    *sums_and_counts, skipped, failed = pending.values.tolist()
    sums, counts = sums_and_counts[:3], sums_and_counts[3:]
    loss, norm, headroom = (s / n if n else None for s, n in zip(sums, counts, strict=True))
    return StepSignals(
        step=pending.step,
        loss=loss,
        grad_norm=norm,
        lr=pending.lr,
        headroom=None if headroom == math.inf else headroom,  # of layers that saw nothing
        skipped=bool(skipped),
        failed=bool(failed),
    )
