"""What a run can be asked about itself. Without Lightning: usable from any training loop."""

from lightning_fp.stability.parity import LayerParity, Parity, ReplayFailedError, measure_parity
from lightning_fp.stability.random_state import RandomState
from lightning_fp.stability.replay import Comparison, GradientGap, Replay, compare, replay
from lightning_fp.stability.untouched import untouched

__all__ = [
    # replay
    "RandomState",
    "Replay",
    "replay",
    "untouched",
    # comparison
    "Comparison",
    "GradientGap",
    "LayerParity",
    "Parity",
    "ReplayFailedError",
    "compare",
    "measure_parity",
]
