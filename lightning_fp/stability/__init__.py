"""What a run can be asked about itself. Without Lightning: usable from any training loop."""

from lightning_fp.stability.batch_ring import BatchRing, MicroBatch, RecordedStep
from lightning_fp.stability.decision import Cause, Decision
from lightning_fp.stability.detector import DivergenceDetector
from lightning_fp.stability.detector_state import DetectorState
from lightning_fp.stability.mismatch import MismatchDecision, MismatchDetector, MismatchState
from lightning_fp.stability.parity import LayerParity, Parity, ReplayFailedError, measure_parity
from lightning_fp.stability.random_state import RandomState
from lightning_fp.stability.replay import Comparison, GradientGap, Replay, compare, replay
from lightning_fp.stability.snapshot import Snapshot, restore, stated_bytes, take
from lightning_fp.stability.snapshots import Snapshots
from lightning_fp.stability.untouched import untouched

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
    "replay",
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
