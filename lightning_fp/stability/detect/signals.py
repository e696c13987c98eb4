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

_NO_NORM = -1.0
"""Stands for "no norm": below every norm, so that a maximum over ranks leaves it aside."""


@dataclass(frozen=True, kw_only=True)
class StepSignals:
    """What one optimizer step showed, over all ranks."""

    step: int
    """Optimizer steps before this one."""

    loss: float | None
    """Mean over micro-batches and ranks; None if the step had none."""

    grad_norm: float | None
    """Largest over ranks, before clipping; None if nothing stepped."""

    lr: float | None
    """Of the first parameter group."""

    headroom: float | None
    """Least headroom of any operand under delayed scaling, in bits; None if there is none."""

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
        # Whatever is missing has a value all the same, and one shape: each rank takes part in the
        # collective below, whether its step had a loss or not. A maximum keeps a NaN.
        nothing = torch.full((), torch.nan, device=device)
        norm = torch.stack([n.float().to(device) for n in grad_norms]) if grad_norms else None
        parts = [
            nothing if loss is None else loss.detach().float().to(device),
            torch.full_like(nothing, _NO_NORM) if norm is None else torch.linalg.vector_norm(norm),
            # from here on "none" is minus infinity, which a maximum leaves aside
            torch.full_like(nothing, -torch.inf)
            if headroom is None or headroom.numel() == 0
            else -headroom.amin().to(device),
            torch.zeros_like(nothing)
            if not skipped
            else torch.stack([s.to(device) for s in skipped]).any().float(),
            torch.full_like(nothing, loss is not None),  # a fill: copying from the host waits
            torch.full_like(nothing, failed),
        ]
        values = torch.stack(parts)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            values = _over_ranks(values)
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


def _over_ranks(values: Tensor) -> Tensor:
    """Mean of the losses there are, maximum of all else, in one collective."""
    ranks = dist.get_world_size()
    gathered = [torch.empty_like(values) for _ in range(ranks)]
    dist.all_gather(gathered, values)
    table = torch.stack(gathered)
    has_loss = table[:, 4] > 0
    losses = torch.where(has_loss, table[:, 0], 0.0)
    loss = losses.sum() / has_loss.sum()  # NaN where no rank has one, or one's is NaN
    return torch.stack([loss, *table[:, 1:].amax(dim=0)])


def _read(pending: _Pending) -> StepSignals:
    loss, norm, headroom, skipped, has_loss, failed = pending.values.tolist()
    return StepSignals(
        step=pending.step,
        loss=loss if has_loss else None,
        grad_norm=None if norm == _NO_NORM else norm,
        lr=pending.lr,
        headroom=None if headroom == -math.inf else -headroom,
        skipped=bool(skipped),
        failed=bool(failed),
    )
