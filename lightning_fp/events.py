"""Plain records of what was decided about a run's precision, and their sentences."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lightning_fp.counting import counted

Tier = Literal["one step", "gap", "trajectory", "control"]
"""What a verdict rests on: a batch, several of them forward, a stretch of training in high
precision, and the same in the run's own formats."""

_MANY = 3
"""Layers that a line on the console names; of more it gives the number."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at a step, with its reason."""

    kind: ClassVar[str] = "event"

    step: int
    """The Trainer's `global_step`, or the loop's own count of optimizer steps."""

    reason: str
    """Why, as a sentence."""

    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """What it was decided by; may be inf or NaN."""

    layers: tuple[str, ...] = ()
    """The layers it is about, worst first."""

    action: str = ""
    """What was done, in a few words."""

    time: float = field(default_factory=time.time, compare=False)
    """Unix time in seconds."""

    def sentence(self) -> str:
        """One line for the console."""
        parts = [f"step {self.step}: {self._what()}", self.reason.rstrip(". \n")]
        line = ": ".join(part for part in parts if part)
        return " ".join((f"{line}; {self.action}" if self.action else line).split())

    def _what(self) -> str:
        return f"{self.kind} {_listed(self.layers)}".rstrip()


@dataclass(frozen=True, kw_only=True)
class OtherEvent(Event):
    """An event of a kind that this version does not know."""

    kind: str = "event"
    """As the version that wrote it calls it."""


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The watch over the run begins: what is armed, and what memory it takes."""

    kind: ClassVar[str] = "started"


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on from a checkpoint of `step`: later events of earlier runs are void."""

    kind: ClassVar[str] = "resumed"

    position: int | None = None
    """`EventWriter.position` when the checkpoint was written: events behind it are void too, and
    those before it that another continuation had made void are in force again. None: not known."""


@dataclass(frozen=True, kw_only=True)
class SkippedStep(Event):
    """An optimizer step was left out."""

    kind: ClassVar[str] = "skip"


@dataclass(frozen=True, kw_only=True)
class Suspicion(Event):
    """A signal has left its range."""

    kind: ClassVar[str] = "suspect"


@dataclass(frozen=True, kw_only=True)
class Replayed(Event):
    """What one replay measured."""

    kind: ClassVar[str] = "replay"

    def _what(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        return f"replay {numbers}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Verdict(Event):
    """What the replays say about precision."""

    kind: ClassVar[str] = "verdict"

    verdict: Literal["precision", "not precision", "unclear", "not reproducible", "compiled code"]
    tier: Tier

    def _what(self) -> str:
        return f"verdict {self.verdict} ({self.tier})"


@dataclass(frozen=True, kw_only=True)
class FormatChange(Event):
    """Layers changed their format, by whomever: a user, a rollout."""

    kind: ClassVar[str] = "format"

    formats: Mapping[str, tuple[str, str]]
    """By layer, the format's name before and after."""

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", tuple(self.formats))

    def _what(self) -> str:
        changes: dict[tuple[str, str], list[str]] = {}
        for layer, (before, after) in self.formats.items():
            changes.setdefault((before, after), []).append(layer)
        listed = [f"{_listed(layers)} {a} -> {b}" for (a, b), layers in changes.items()]
        return f"{self.kind} {', '.join(listed)}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Demotion(FormatChange):
    """Layers convicted of the incident were given a safer format."""

    kind: ClassVar[str] = "demote"


@dataclass(frozen=True, kw_only=True)
class Promotion(FormatChange):
    """Layers got a format back that an incident had taken from them."""

    kind: ClassVar[str] = "promote"


@dataclass(frozen=True, kw_only=True)
class LayerClimb(FormatChange):
    """Layers over a limit of theirs climbed one rung, without an incident."""

    kind: ClassVar[str] = "limit"


@dataclass(frozen=True, kw_only=True)
class UnprovenClimb(FormatChange):
    """Layers climbed one rung on a suspicion, where nothing can be replayed to prove it."""

    kind: ClassVar[str] = "unproven"


@dataclass(frozen=True, kw_only=True)
class Rollback(Event):
    """The run went back to a snapshot."""

    kind: ClassVar[str] = "rollback"

    to_step: int
    """The step of the snapshot."""

    replayed: int
    """Steps since then that were made good by training on the same batches again."""

    def _what(self) -> str:
        lost = self.step - self.to_step - self.replayed
        again = f"{counted(self.replayed, 'step')} trained again"
        return f"rollback to step {self.to_step}, {again}, {lost} lost"


@dataclass(frozen=True, kw_only=True)
class StateChange(Event):
    """The fallback went from one of its states to another."""

    kind: ClassVar[str] = "state"

    before: str
    after: str

    def _what(self) -> str:
        return f"state {self.before} -> {self.after}"


@dataclass(frozen=True, kw_only=True)
class StageChange(Event):
    """A rollout went from one stage to another."""

    kind: ClassVar[str] = "stage"

    stage: str
    previous: str

    def _what(self) -> str:
        return f"stage {self.previous} -> {self.stage}" if self.previous else f"stage {self.stage}"


@dataclass(frozen=True, kw_only=True)
class GateResult(Event):
    """A gate of a rollout says something else than before.

    `numbers` has the "value" it was judged by (NaN: nothing was measured), its bounds "below" and
    "above", and its "window" in steps.
    """

    kind: ClassVar[str] = "gate"

    stage: str
    """The stage whose gate it is."""

    statistic: str
    """What is measured."""

    passed: bool

    def _what(self) -> str:
        return f"gate of stage {self.stage} {'passes' if self.passed else 'fails'}"


@dataclass(frozen=True, kw_only=True)
class Rehearsed(Event):
    """What replays have left behind on this loop, and what the watch confines itself to."""

    kind: ClassVar[str] = "rehearsal"

    outcome: Literal["passed", "one step", "limits only"]

    differs: tuple[str, ...] = ()
    """A sentence for each thing that was not as before, or not the same twice."""

    put_back: tuple[str, ...] = ()
    """A sentence for each hook that writes attributes: a replay runs it, and puts them back."""

    not_looked_at: tuple[str, ...] = ()
    """What a step may change unnoticed: objects that cannot be looked into."""

    def _what(self) -> str:
        return f"rehearsal {self.outcome}"


@dataclass(frozen=True, kw_only=True)
class WatchFailed(Event):
    """The watch itself has raised: from here on the run goes on unprotected."""

    kind: ClassVar[str] = "watch_failed"


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something to know: what an incident looks like if not precision, a failure in telemetry."""

    kind: ClassVar[str] = "note"


def _listed(layers: Sequence[str]) -> str:
    named = ", ".join(layers[:_MANY])
    return f"{named} and {len(layers) - _MANY} more" if len(layers) > _MANY else named
