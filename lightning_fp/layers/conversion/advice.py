"""Which scaling to begin with, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_fp.argument_types import checked
from lightning_fp.layers.histories.auto_scaling import DELAYED_TOKEN_LIMIT

CONTINUED_TOKEN_LIMIT = 1e12
"""Training tokens from which on practice uses dynamic scaling throughout."""


@dataclass(frozen=True, kw_only=True)
class ScalingAdvice:
    """A choice between dynamic and delayed scaling, with its reasons."""

    scaling: Literal["dynamic", "delayed"]
    """What to pass as `FP8Precision(scaling=...)`."""

    reasons: tuple[str, ...]
    """Sentences, the weightiest first, with their sources."""

    def __str__(self) -> str:
        return "\n".join((f"scaling: {self.scaling}", *(f"- {reason}" for reason in self.reasons)))


@checked
def recommend_scaling(*, tokens: float | None = None, continued: bool = False) -> ScalingAdvice:
    """Choose between dynamic and delayed scaling.

    >>> recommend_scaling(tokens=20e9).scaling
    'delayed'
    >>> recommend_scaling(tokens=2e12).scaling
    'dynamic'

    Args:
        tokens: tokens the whole training will see; None if unknown.
        continued: whether the training continues from a trained model.

    Returns:
        The choice and its reasons.

    Raises:
        ValueError: if `tokens` is not positive.
    """
    if tokens is not None and tokens <= 0:
        raise ValueError(f"tokens must be positive, got {tokens!r}")
    if continued:
        return ScalingAdvice(
            scaling="dynamic",
            reasons=(
                "a trained model has outliers already, and a history of amax lags behind them"
                " (arXiv 2409.12517): the one large activation that matters would be clamped",
                "dynamic scaling cannot clamp, at the price of one more pass over each operand",
            ),
        )
    if tokens is None:
        return ScalingAdvice(
            scaling="dynamic",
            reasons=(
                "the token budget is unknown, and delayed scaling fails late, at about"
                f" {DELAYED_TOKEN_LIMIT / 1e9:.0f}B tokens (arXiv 2409.12517)",
                "scaling='auto' with tokens=... moves layers to delayed scaling by evidence",
            ),
        )
    if tokens < DELAYED_TOKEN_LIMIT:
        return ScalingAdvice(
            scaling="delayed",
            reasons=(
                f"{tokens / 1e9:.3g}B tokens are below the {DELAYED_TOKEN_LIMIT / 1e9:.0f}B at"
                " which delayed scaling is known to diverge (arXiv 2409.12517)",
                "it casts without a pass for the amax in front; watch clamped mass with"
                " ClampMonitor, and let PrecisionMap.set move a layer that clamps to 'fp8-dynamic'",
            ),
        )
    late = tokens >= CONTINUED_TOKEN_LIMIT
    return ScalingAdvice(
        scaling="dynamic",
        reasons=(
            f"{tokens / 1e9:.0f}B tokens are beyond the {DELAYED_TOKEN_LIMIT / 1e9:.0f}B at which"
            " delayed scaling was seen to diverge; SwiGLU makes rare outliers late in training"
            " (arXiv 2409.12517), and no short trial shows them",
            "runs of a trillion tokens and more use current scaling throughout"
            if late
            else "dynamic scaling cannot clamp, at the price of one more pass over each operand",
        ),
    )
