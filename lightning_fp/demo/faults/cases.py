"""Faults of which is known what they do to the tiny run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import lightning as L

from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.corruption import BackwardCorruption, ForwardCorruption
from lightning_fp.demo.faults.innocent import DataFault, LearningRateJump, NaNData, ShuffledLabels
from lightning_fp.demo.faults.scaling import ActivationOutliers, GradientBursts, StuckScale


@dataclass(frozen=True, kw_only=True)
class FaultCase:
    """A fault as it is tried on the tiny run."""

    make: Callable[[], L.Callback | DataFault]
    """A fresh one."""

    scaling: str = "fp8-delayed"
    """The format of all layers in which it harms the run."""

    cause: Literal["precision", "other"] = "precision"
    """Whether high precision is spared."""

    pace: Literal["fast", "slow"] = "fast"
    """Slow ones show no spike: the loss drifts away from what it would have been."""

    healed_by: str = ""
    """The gentlest format on the ladder that spares the layers at fault."""

    @property
    def layers(self) -> str:
        """The layers at fault, as a pattern."""
        fault = self.make()
        return fault.layers if isinstance(fault, Fault) else "*"


CASES: dict[str, FaultCase] = {
    "outliers": FaultCase(
        make=lambda: ActivationOutliers("*attention*", bits=24),
        pace="slow",
        healed_by="fp8-dynamic",
    ),
    "outlier-tokens": FaultCase(
        make=lambda: ActivationOutliers("blocks.*", bits=18, share=0.02, every=1),
        healed_by="fp8-rowwise",
    ),
    "gradient-overflow": FaultCase(
        make=lambda: GradientBursts("head", bits=30),
        healed_by="fp8-dynamic",
    ),
    "gradient-bursts": FaultCase(
        make=lambda: GradientBursts("blocks.*", bits=32),
        pace="slow",
        healed_by="fp8-dynamic",
    ),
    "stuck-scale": FaultCase(
        make=lambda: StuckScale("blocks.1.*", bits=8),
        pace="slow",
        healed_by="fp8-dynamic",
    ),
    "forward-noise": FaultCase(
        make=lambda: ForwardCorruption("head", kind="noise", strength=0.5),
        scaling="fp8-dynamic",
        healed_by="high",
    ),
    "forward-drift": FaultCase(
        make=lambda: ForwardCorruption("head", kind="noise", strength=0.2, ramp=100),
        scaling="fp8-dynamic",
        pace="slow",
        healed_by="high",
    ),
    "forward-clamp": FaultCase(
        make=lambda: ForwardCorruption("blocks.1.*", kind="clamp", strength=0.3),
        scaling="fp8-dynamic",
        pace="slow",
        healed_by="high",
    ),
    "backward-clamp": FaultCase(
        make=lambda: BackwardCorruption("head", kind="clamp", strength=0.5),
        scaling="fp8-dynamic",
        healed_by="high",
    ),
    "backward-zero": FaultCase(
        make=lambda: BackwardCorruption("blocks.1.*", kind="zero", strength=2.0),
        scaling="fp8-dynamic",
        pace="slow",
        healed_by="high",
    ),
    "backward-drift": FaultCase(
        make=lambda: BackwardCorruption("blocks.*", kind="clamp", strength=0.05),
        scaling="fp8-dynamic",
        pace="slow",
        healed_by="high",
    ),
    "learning-rate": FaultCase(make=LearningRateJump, cause="other"),
    "learning-rate-burst": FaultCase(make=lambda: LearningRateJump(steps=30), cause="other"),
    "nan-data": FaultCase(make=NaNData, cause="other"),
    "nan-data-burst": FaultCase(make=lambda: NaNData(batches=3), cause="other"),
    "shuffled-labels": FaultCase(make=ShuffledLabels, cause="other"),
    "shuffled-labels-burst": FaultCase(make=lambda: ShuffledLabels(batches=30), cause="other"),
}
"""By name; `tests/test_faults.py` shows what each does."""
