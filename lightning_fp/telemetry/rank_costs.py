"""What low precision adds on many ranks: collectives, bytes, host memory and time.

Everything here is a count, of one rank. Tests hold it against what torch's fake process group of
1,024 ranks is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fp.layers.statistics_table import OPERANDS
from lightning_fp.numerics import STATISTICS
from lightning_fp.stability.replay.budget import INCIDENT

CAST = 3
"""Operands of a layer that are cast: input, weight, gradient of the output."""

SIGNALS = 8
"""Numbers of a step's signals: loss, gradient norm, headroom, who has each, and two flags."""

AGREED = 3
"""Numbers of a weight that is gathered in FP8: amax, whether written to, whether others read it."""

FLOAT, WIDE = 4, 8
"""Bytes of a number in amaxes and losses, and in signals and statistics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Of one rank; numbers of several steps are means."""

    collectives: float = 0
    sent: float = 0
    """Bytes that it hands to collectives."""

    received: float = 0
    """Bytes that it gets back."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            collectives=self.collectives + other.collectives,
            sent=self.sent + other.sent,
            received=self.received + other.received,
        )

    def every(self, steps: int) -> Traffic:
        """The mean of one step, where this is once in so many."""
        return Traffic(
            collectives=self.collectives / steps,
            sent=self.sent / steps,
            received=self.received / steps,
        )


def _all_reduced(size: float, collectives: float = 1) -> Traffic:
    return Traffic(collectives=collectives, sent=size, received=size)


def scales(layers: int) -> Traffic:
    """Each step: the largest values of all layers' operands.

    Args:
        layers: under delayed scaling, or whose casts the fallback watches.
    """
    return _all_reduced(CAST * FLOAT * layers) if layers else Traffic()


def signals() -> Traffic:
    """Each step: loss, norm and flags, where a fallback or a loop reads them."""
    return _all_reduced(SIGNALS * WIDE)


def look(layers: int) -> Traffic:
    """Each sampled step: the statistics that the fallback holds against its limits.

    Args:
        layers: in low precision.
    """
    return _all_reduced(len(OPERANDS) * len(STATISTICS) * WIDE * layers, 2)


def log_interval(layers: int, *, delayed: int, steps: int, patterns: int = 1) -> Traffic:
    """At the end of each log interval: the monitor's statistics, and the losses.

    Args:
        layers: all that have a format.
        delayed: of these under delayed scaling.
        steps: of the interval.
        patterns: sets of formats that it saw sampled.
    """
    statistics = _all_reduced(
        len(OPERANDS) * len(STATISTICS) * WIDE * layers * patterns, 2 * patterns
    )
    failed, nonfinite = _all_reduced(FLOAT), _all_reduced(CAST * WIDE * delayed)
    return statistics + failed + (nonfinite if delayed else Traffic()) + _all_reduced(FLOAT * steps)


def agreement(layers: int) -> Traffic:
    """Each training forward under FSDP2: what ranks agree on of weights that they gather in FP8.

    Args:
        layers: whose weights these are.
    """
    return _all_reduced(AGREED * FLOAT * layers) if layers else Traffic()


def weight_gathers(
    fp8: float, others: float, *, shards: int, modules: int, gathers: int = 2, itemsize: int = 2
) -> Traffic:
    """Each micro-batch under FSDP2: the gathers of the weights themselves, of modules alike.

    Args:
        fp8: elements of these modules that are gathered in FP8, of the whole model.
        others: elements of theirs that are gathered as they are, likewise.
        shards: ranks that share them; each dimension that is shared is a multiple of it.
        modules: how many are gathered, each by itself.
        gathers: of each; 2 where it is sharded between forward and backward.
        itemsize: bytes of an element that is gathered as it is.
    """
    sent = gathers * (fp8 + itemsize * others) / shards
    return Traffic(collectives=gathers * modules, sent=sent, received=sent * shards)


def per_step(layers: int, *, delayed: int, sample_every: int = 16, log_every: int = 50) -> Traffic:
    """All of it in a healthy run, on average.

    Args:
        layers: in low precision.
        delayed: of the layers under delayed scaling.
        sample_every: steps of a window, in which one is sampled.
        log_every: steps of a log interval.
    """
    interval = log_interval(layers, delayed=delayed, steps=log_every)
    # The fallback watches what the others cast as well, so all of them have rows.
    every_step = scales(layers) + signals()
    return every_step + look(layers).every(sample_every) + interval.every(log_every)


def snapshot_bytes(parameters: float, *, shards: int = 1, bytes_each: float = 12) -> float:
    """Host memory of one snapshot on one rank.

    Args:
        parameters: of the model.
        shards: in which weights and optimizer state are split: ranks of the shard and tensor
            dimensions, not of copies.
        bytes_each: of a parameter with its optimizer state; AdamW in float32 has 12.
    """
    return parameters * bytes_each / shards


def incident_seconds(
    step_seconds: float,
    *,
    replayed: int = INCIDENT,
    copied_bytes: float = 0,
    bytes_per_second: float = 20e9,
) -> float:
    """At most, from the suspicion to the next step: replays, and states put back.

    All ranks replay their own batches at the same time, so it does not grow with their number.

    Args:
        step_seconds: of a step of the run, in the precision of the replays.
        replayed: steps; the budget of one incident by default, most take far fewer.
        copied_bytes: of one snapshot on one rank.
        bytes_per_second: between host and device; 20e9 is a PCIe 4.0 x16 link in practice.
    """
    return replayed * step_seconds + 3 * copied_bytes / bytes_per_second
