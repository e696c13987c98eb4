"""The signals by name: what each is, and how micro-batches and ranks combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "stability/"
"""Of their names on the board and in loggers."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One number per step."""

    name: str
    """Its column; on the board with the prefix."""

    combine: Literal["max", "mean"]
    """Over micro-batches, and over ranks."""

    about: str
    """What it is, in a few words."""


SIGNALS: tuple[Signal, ...] = (
    Signal("logit_sharpness", "mean", "how far the loss can be raised by small changes of logits"),
    Signal("output_logit_max", "max", "largest magnitude of an output logit"),
    Signal("attention_logit_max", "max", "largest q k / sqrt(d) that attention saw"),
    Signal("activation_kurtosis", "max", "of the worst layer's input: outliers"),
    Signal("update_rms", "mean", "root mean square of the weights' change, over the learning rate"),
    Signal("gradient_noise", "mean", "how much the gradient turns from step to step, from 0 to 1"),
)
"""In the order of the table's columns."""

NAMES = tuple(signal.name for signal in SIGNALS)

PUBLISHED = tuple(PREFIX + name for name in NAMES)
"""The names on the board, at every step; NaN where the run has nothing to measure."""
