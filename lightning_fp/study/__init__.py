"""Studies: what a run's records, or a few runs side by side, say about a question."""

from lightning_fp.records.loss import Loss, read_loss, write_loss
from lightning_fp.study.clamp_ab import ClampAB, clamp_ab
from lightning_fp.study.clamp_spikes import ClampSpikes, Tie, clamp_spikes
from lightning_fp.study.spikes import Spike, SpikeRule, find_spikes

__all__ = [
    # clamping and loss spikes
    "ClampSpikes",
    "Spike",
    "SpikeRule",
    "Tie",
    "clamp_spikes",
    "find_spikes",
    # the A/B that settles it
    "ClampAB",
    "clamp_ab",
    # the loss of a run
    "Loss",
    "read_loss",
    "write_loss",
]
