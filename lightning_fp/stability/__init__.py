"""What a run can be asked about itself. Without Lightning: usable from any training loop."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.stability.detect.decision import Cause, Decision
    from lightning_fp.stability.detect.detector import DivergenceDetector
    from lightning_fp.stability.detect.detector_state import DetectorState
    from lightning_fp.stability.detect.mismatch_detector import (
        MismatchDecision,
        MismatchDetector,
        MismatchState,
    )
    from lightning_fp.stability.keep.batch_ring import BatchRing, MicroBatch, RecordedStep
    from lightning_fp.stability.keep.random_state import RandomState
    from lightning_fp.stability.keep.snapshot import Snapshot, restore, stated_bytes, take
    from lightning_fp.stability.keep.snapshots import Snapshots
    from lightning_fp.stability.replay.one_step import (
        Comparison,
        GradientGap,
        Replay,
        compare,
        replay_step,
    )
    from lightning_fp.stability.replay.parity import (
        LayerParity,
        Parity,
        ReplayFailedError,
        measure_parity,
    )
    from lightning_fp.stability.replay.untouched import untouched
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # divergence
    "Cause",
    "Decision",
    "DetectorState",
    "DivergenceDetector",
    "MismatchDecision",
    "MismatchDetector",
    "MismatchState",
    # replay
    "RandomState",
    "Replay",
    "replay_step",
    "untouched",
    # snapshots and recorded steps
    "BatchRing",
    "MicroBatch",
    "RecordedStep",
    "Snapshot",
    "Snapshots",
    "restore",
    "stated_bytes",
    "take",
    # comparison
    "Comparison",
    "GradientGap",
    "LayerParity",
    "Parity",
    "ReplayFailedError",
    "compare",
    "measure_parity",
]
