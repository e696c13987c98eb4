"""What the watch is told: plain records of what happens in a run; nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.stability.questions import Answer, Question
from lightning_fp.stability.respond.limits import Excess


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """A step begins."""


@dataclass(frozen=True, kw_only=True)
class StepSeen:
    """The signals of a step have arrived."""

    at: int
    """Steps done by now."""

    signals: StepSignals
    overflowed: str | None = None
    """Of a step that was left out, the layer whose gradient overflowed first."""

    half: bool = False
    """Whether the base computes in float16."""

    stuck: bool = False
    """Whether its loss scale cannot fall any further."""


@dataclass(frozen=True, kw_only=True)
class FormatsChanged:
    """Others have written to the table."""

    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What the casts of a sampled step lost."""

    at: int
    names: tuple[str, ...]
    """The layers that were looked at."""

    excesses: Mapping[str, Excess] = field(default_factory=dict[str, Excess])
    """Those over a limit."""

    sound: bool = True
    """See `Boundary`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AmaxSeen:
    """The largest values that were cast in a step."""

    at: int
    step: int
    """Steps before that one."""

    amax: Tensor
    """float32 [layers, 2] on the CPU: of input and weight; NaN where nothing was seen."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """All that has arrived was told; the next step is about to begin."""

    at: int
    sound: bool = True
    """Whether all steps since the last boundary were made: where one was left out inf and NaN are
    everywhere, and say nothing about the layer they are seen in."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """All that a boundary called for is done, and it is time for a snapshot."""

    at: int
    only: bool = False
    """Whether it takes the place of the only one there is."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Somebody wants a verdict now, whatever the signals say."""

    at: int
    onset: int
    risen: bool = True


@dataclass(frozen=True, kw_only=True)
class HighPrecisionTried:
    """A first step in high precision was tried, to see that memory suffices."""

    at: int
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The run is over."""

    at: int
    unseen: tuple[StepSeen, ...] = ()
    """Steps whose signals have arrived since the last boundary."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question was asked, and this is what it came to."""

    question: Question[Any]
    answer: Answer


Happening: TypeAlias = (
    Attempted
    | StepSeen
    | FormatsChanged
    | Looked
    | AmaxSeen
    | Boundary
    | Settled
    | Asked
    | HighPrecisionTried
    | Ended
    | Answered
)
"""What the watch is told."""
