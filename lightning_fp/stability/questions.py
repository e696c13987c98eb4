"""What the watch asks: questions that replays answer, and what these come to.

A question is answered between two optimizer steps, alike on all ranks. Questions are equal if they
ask the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.respond.attribution import Attribution
from lightning_fp.stability.respond.limits import Excess
from lightning_fp.stability.respond.verdict import OneStep

A = TypeVar("A")


@dataclass(frozen=True, kw_only=True)
class Question(Generic[A]):
    """What is asked; its answer is an `A`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question came to."""

    replays: int = 0
    """Training steps that were run for it."""


@dataclass(frozen=True, kw_only=True)
class Failed(Answer):
    """A question could not be answered: something raised."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Surveyed(Answer):
    """What there is to replay."""

    finite: bool = True
    """Whether the weights are, as they stand."""

    low: Mapping[str, str] = field(default_factory=dict[str, str])
    """The layers in low precision, with their formats' names."""

    high: LinearFormat
    """What they can be given instead."""

    whole: bool = False
    """Whether all layers fall back together, with what is between them."""

    compiled: bool = False
    """Whether any of the run is compiled."""

    stored: int = 0
    """Layers whose weights are kept in FP8 alone, so that high precision is not what it was."""

    start: int | None = None
    """Step of the snapshot that a trajectory begins at; None if there is none."""

    losses: tuple[float | None, ...] | None = ()
    """Of the steps since then, as recorded; NaN where one was left out, None where the loss is not
    known yet. None if batches are missing."""

    rates: tuple[float, ...] = ()
    """Learning rates of these steps."""

    skipped: int = 0
    """Of these steps, left out."""

    steps: tuple[int, ...] = ()
    """Their numbers."""

    replayable: bool = True
    """Whether any step can be run again here."""


@dataclass(frozen=True, kw_only=True)
class Survey(Question[Surveyed]):
    """Look at weights, snapshots and recorded batches."""

    at: int
    onset: int
    risen: bool
    most: int
    """Steps that a trajectory may have where nothing has risen."""


@dataclass(frozen=True, kw_only=True)
class StepReplayed(Answer):
    """A batch on the same weights in both precisions; None if it cannot be run."""

    seen: OneStep | None


@dataclass(frozen=True, kw_only=True)
class ReplayStep(Question[StepReplayed]):
    """Run one batch twice in the run's formats and once in high precision."""

    weights: int | None = None
    """Step of the snapshot to do it on; None takes the weights of now."""

    batch: int | None = None
    """The step of the batch; None for the last."""

    ago: int = 0
    """So many batches before the last, where no step is named."""


@dataclass(frozen=True, kw_only=True)
class LossesCompared(Answer):
    """The losses of some batches on the same weights; empty where nothing can be replayed."""

    losses: tuple[float, ...] = ()
    """In the run's formats, mean over ranks."""

    high_losses: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompareLosses(Question[LossesCompared]):
    """Run the last batches forward in the run's formats and in high precision."""

    at: int
    count: int = 1
    batch: int | None = None
    """The step of the one batch to run; None for the last ones."""


@dataclass(frozen=True, kw_only=True)
class CureChecked(LossesCompared):
    """What some layers do in their new formats, all others in high precision."""

    grad_error: float | None = None
    """Of the last batch's gradients; None if it cannot be had."""


@dataclass(frozen=True, kw_only=True)
class CheckCure(Question[CureChecked]):
    """Compare these layers' formats with high precision, on the weights of now."""

    at: int
    layers: tuple[str, ...]
    batch: int | None = None
    """The step of the batch that has shown the fault; None for the last."""


@dataclass(frozen=True, kw_only=True)
class HighReplayed(Answer):
    """A batch in high precision."""

    loss: float | None = None
    """None if it cannot be run."""

    finite: bool = False
    """Whether loss and gradients are."""

    loss_then: float | None = None
    """Its loss when it was trained on."""


@dataclass(frozen=True, kw_only=True)
class ReplayHigh(Question[HighReplayed]):
    """Run a batch in high precision."""

    batch: Literal["first", "last"]
    """Of those recorded."""

    weights: int | None = None


@dataclass(frozen=True, kw_only=True)
class StretchReplayed(Answer):
    """What a stretch of training came to."""

    done: bool
    """Whether it came to its end, or was given up as hopeless."""

    losses: tuple[float, ...] = ()
    """By step, NaN where it was left out."""

    made: int = 0
    """Steps that were not left out."""


@dataclass(frozen=True, kw_only=True)
class ReplayStretch(Question[StretchReplayed]):
    """Train on the recorded batches since a snapshot."""

    start: int
    precision: Literal["high", "own", "placebo"]
    """All layers in high precision; each in the format, and with the scales, of its time; or so
    from weights that are moved a little, which is to show what chaos does."""

    compiled: bool = False
    """Whether compiled code runs as it ran; else all runs eagerly."""

    until: ReplayStretch | None = None
    """A trajectory in high precision: it may end as soon as it is told apart from that."""

    steps: int | None = None
    """How many of the steps; None for all."""


@dataclass(frozen=True, kw_only=True)
class Attributed(Answer):
    """Which layers are to blame; None if the batch cannot tell."""

    found: Attribution | None


@dataclass(frozen=True, kw_only=True)
class Attribute(Question[Attributed]):
    """Find the layers whose formats make the error of some batches' gradients."""

    healthy: float
    weights: int | None = None
    batches: tuple[int, ...] = ()
    """Their steps; the last is looked at besides, unless `alone`."""

    alone: bool = False
    """Whether nothing but these are at fault."""


@dataclass(frozen=True, kw_only=True)
class Probed(Answer):
    """Relative error of a batch's gradients against high precision; None if it cannot be had."""

    error: float | None
    losses: tuple[float, float] | None = None
    """Of the batch, in the run's formats and in high precision."""

    norm: float | None = None
    """Of the gradients in high precision."""

    of_step: bool = False
    """Whether the gradients of the step itself were compared, rather than those of a replay."""


@dataclass(frozen=True, kw_only=True)
class ProbeStep(Question[Probed]):
    """Compare the gradients of one of the last batches with high precision."""

    at: int

    ago: int = 0
    """So many batches before the last."""

    coming: bool = False
    """The coming batch rather, by the gradients of its own step, where these can be compared."""


@dataclass(frozen=True, kw_only=True)
class Climbed(Answer):
    """Where a layer climbed to."""

    before: str
    after: str | None
    """None if there is no rung above."""


@dataclass(frozen=True, kw_only=True)
class Climb(Question[Climbed]):
    """Give a layer the next rung of the ladder; in a dry run only say which."""

    at: int
    layer: str
    reason: str
    excess: Excess | None = None
    """The limit that it is over."""

    proved: bool = True
    """Whether anything has shown that the layer needs it."""


@dataclass(frozen=True, kw_only=True)
class Promoted(Answer):
    """By layer, the format's name before and after."""

    formats: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Promote(Question[Promoted]):
    """Give layers back the formats that an incident has taken from them."""

    at: int
    formats: tuple[tuple[str, str], ...]
    """Layers, and the names of these formats."""

    reason: str
