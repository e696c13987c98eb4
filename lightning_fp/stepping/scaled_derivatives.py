"""Second derivatives under a loss scale: they grow by it, and no step tells that they overflow.

The guard before an optimizer step sees the gradients alone. They may be finite where their
derivatives are not, and a scale of 2**16 would stay where it is.
"""

from __future__ import annotations

from lightning_fp.numerics import FORMATS
from lightning_fp.stepping.loss_scaler import NoScaler

LARGEST_SCALE = 128.0
"""Leaves derivatives of scaled gradients a factor of 512 below the largest FP16 number."""


def hold_scale(scaler: NoScaler) -> str:
    """Before a backward with `create_graph=True`: hold the scale, if it is one that moves.

    Returns:
        What to warn of, the first time; else "".
    """
    told = ""
    scale = 0.0 if scaler.held else scaler.scale()
    if scale > LARGEST_SCALE:
        lost = FORMATS["fp16"].smallest_subnormal / LARGEST_SCALE
        what = (
            f"it is held at {LARGEST_SCALE:g}, where gradients below {lost:.0e} vanish"
            if scaler.moves
            else f"take FP16Precision(loss_scaling=LossScaling.static({LARGEST_SCALE:g}))"
        )
        told = (
            f"backward(create_graph=True) under a loss scale of {scale:g}: derivatives of these"
            f" gradients grow by the scale, and soon pass what FP16 holds; {what}"
        )
    scaler.hold(LARGEST_SCALE)
    return told
