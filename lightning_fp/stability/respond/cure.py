"""A cure is verified before it counts: the batches that showed the fault, in the new formats.

The next rung need not cure: rows do not help against a hot column, dynamic scaling not against one
huge value. Both measures are needed. A layer passed by its gap alone with gradients that were 72%
wrong, and the run ended 2% higher.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fp.stability.replay.gap import HARMLESS, Gap
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR, STILL


@dataclass(frozen=True, kw_only=True)
class Cure:
    """Whether new formats have cured a run, on the weights that it goes on from."""

    verified: bool
    reason: str
    numbers: dict[str, float]


def verify_cure(gap: Gap, grad_error: float | None, usual: float = HEALTHY_ERROR) -> Cure:
    """Judge the new formats.

    Args:
        gap: of the batches that showed the fault, in the new formats.
        grad_error: relative error of their gradients against high precision, the worst layer's;
            None if it could not be had.
        usual: what that error was while the run was healthy.

    Returns:
        Verified only if both are as in a healthy run. What is not known verifies nothing.
    """
    numbers = gap.numbers | ({} if grad_error is None else {"grad_error": grad_error})
    most = STILL * max(usual, HEALTHY_ERROR)
    if not gap.mean <= HARMLESS:
        reason = f"the fault is still there: {gap.sentence}"
    elif grad_error is None:
        reason = "the gradients could not be compared in the new formats"
    elif not grad_error <= most:
        reason = (
            f"the fault is still there: the gradients' error is {grad_error:.0%} (usually at most"
            f" {most:.0%})"
        )
    else:
        reason = f"cured: the gradients' error is back to {grad_error:.0%}, and {gap.sentence}"
        return Cure(verified=True, reason=reason, numbers=numbers)
    return Cure(verified=False, reason=reason, numbers=numbers)
