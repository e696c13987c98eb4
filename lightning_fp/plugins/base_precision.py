"""The base precision: in which dtype everything but the linear layers' own formats computes."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision

from lightning_fp.plugins.fp16_base import HalfMixed, HalfTrue

Base = Literal["bf16-mixed", "bf16-true", "32-true", "16-mixed", "16-true"]


def base_plugin(base: Base) -> Precision:
    """Lightning's own plugin for a base precision, or ours where FP16 is concerned.

    Args:
        base: its name.
    """
    if base == "bf16-mixed":
        return MixedPrecision("bf16-mixed", "cpu")  # the device is set when it is known
    if base == "bf16-true":
        return HalfPrecision("bf16-true")
    if base == "16-mixed":
        return HalfMixed()
    if base == "16-true":
        return HalfTrue()
    return Precision()
