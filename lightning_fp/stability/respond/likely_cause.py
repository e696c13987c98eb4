"""What an incident looks like if precision is not to blame.

An acquittal alone helps nobody whose run diverges. The replays have shown more on the way: whether
a batch gives the same twice, whether an older one is still learned, what the learning rate did. A
sentence is made of that to begin the search with. It is no verdict, and nothing is done about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LR_JUMP = 1.5
"""A learning rate that grows by this factor within the replayed steps is not a smooth schedule,
unless it is being warmed up."""


@dataclass(frozen=True, kw_only=True)
class CauseEvidence:
    """What was found besides the verdict."""

    floor: float | None = None
    """Relative difference of the gradients of one batch run twice alike; 0 on sound hardware with
    deterministic kernels."""

    high_finite: bool = True
    """Whether the suspicious batch is finite in high precision."""

    older_finite: bool = True
    """Whether an older batch is finite on the same weights."""

    older_loss: float | None = None
    """Loss of an older batch on the weights of now, in high precision."""

    older_loss_then: float | None = None
    """Its loss when it was trained on."""

    noise: float | None = None
    """Standard deviation of a healthy step's loss."""

    rates: Sequence[float] = ()
    """Learning rates of the replayed steps."""


def likely_cause(evidence: CauseEvidence) -> str:
    """A sentence to start looking from; it proves nothing.

    >>> likely_cause(CauseEvidence(rates=[1e-3, 1e-3, 3e-2]))
    'it looks like the learning rate: it grew from 0.001 to 0.03 within the steps looked at'

    Args:
        evidence: what was found.
    """
    if evidence.floor is not None and evidence.floor > 1e-3:
        return (
            "it looks like faulty hardware or a faulty kernel: the same batch run twice gives"
            f" gradients that differ by {evidence.floor:.1%}"
        )
    low, top = _rise([rate for rate in evidence.rates if rate > 0])
    if top > LR_JUMP * low:
        return (
            f"it looks like the learning rate: it grew from {low:.3g} to {top:.3g}"
            " within the steps looked at"
        )
    if not evidence.older_finite:
        return "it looks like the weights themselves: an older batch gives inf or NaN as well"
    if not evidence.high_finite:
        return "it looks like the data: this batch gives inf or NaN and an older one does not"
    if evidence.older_loss is not None and evidence.older_loss_then is not None:
        if evidence.older_loss <= evidence.older_loss_then + 3 * (evidence.noise or 0.0):
            return (
                "it looks like the data: an older batch has the same small loss as before"
                f" ({evidence.older_loss:.4g}), and the new ones do not"
            )
        return (
            "it looks like the optimization itself, such as a learning rate that is too high: the"
            f" loss of an older batch has risen from {evidence.older_loss_then:.4g} to"
            f" {evidence.older_loss:.4g}"
        )
    return "look at the data and the learning rate"


def _rise(rates: Sequence[float]) -> tuple[float, float]:
    """The largest growth from one rate to a later one; (1, 1) if there are none."""
    low, most = float("inf"), (1.0, 1.0)
    for rate in rates:
        low = min(low, rate)
        most = max(most, (low, rate), key=lambda pair: pair[1] / pair[0])
    return most
