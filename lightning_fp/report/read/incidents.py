"""Incidents: what was looked into between two steps, with the one conclusion that it came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias, TypeVar

from lightning_fp.records import Demotion, Event, Note, Replayed, Rollback, StateChange, Verdict
from lightning_fp.records.events import Suspicion
from lightning_fp.stability.judge.conviction import DOES_NO_HARM

Finding: TypeAlias = Literal[
    "precision", "not precision", "unclear", "not reproducible", "compiled code"
]

E = TypeVar("E", bound=Event)

_PARTS = (Suspicion, Verdict, StateChange, Demotion, Rollback)


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One question to replays, and all that followed from the answers."""

    step: int

    finding: Finding
    """Of all tests together; those of a single one may be otherwise."""

    events: tuple[Event, ...]

    @property
    def why(self) -> str:
        """What the test has shown that decided."""
        verdicts = _of(self.events, Verdict)
        agreeing = [verdict for verdict in verdicts if verdict.verdict == self.finding]
        return (agreeing or verdicts)[-1].reason

    @property
    def suspicion(self) -> Suspicion | None:
        """What raised it."""
        return next(iter(_of(self.events, Suspicion)), None)

    @property
    def demotion(self) -> Demotion | None:
        """Who got a safer format."""
        return next(iter(_of(self.events, Demotion)), None)

    @property
    def rollback(self) -> Rollback | None:
        """How far the run went back."""
        return next(iter(_of(self.events, Rollback)), None)

    @property
    def provisional(self) -> bool:
        """Whether an error was seen that does not harm the loss yet: it is asked about again."""
        return self.finding == "not precision" and self.likeness == DOES_NO_HARM

    @property
    def likeness(self) -> str:
        """What it looks like, if precision is not to blame; or ""."""
        notes = _of(self.events, Note)
        return notes[0].reason.removeprefix("formats stay as they are; ") if notes else ""


def incidents(events: Sequence[Event]) -> list[Incident]:
    """All of a run.

    Args:
        events: those of the run, in order.
    """
    found: list[Incident] = []
    for step, together in groupby(events, key=lambda event: event.step):
        part = tuple(part_of_incident(list(together)))
        if any(isinstance(event, Verdict) for event in part):
            found.append(Incident(step=step, finding=_finding(part), events=part))
    return found


def part_of_incident(together: Sequence[Event]) -> Iterator[Event]:
    """Of the events of one step those that belong to an incident; none if it has no verdict.

    Args:
        together: the step's events, in order.
    """
    verdicts = [i for i, event in enumerate(together) if isinstance(event, Verdict)]
    if not verdicts:
        return
    behind = (event for event in together[verdicts[-1] + 1 :] if not isinstance(event, StateChange))
    follows = next(behind, None)
    for event in together:
        replayed = isinstance(event, Replayed) and not is_check(event)
        # An acquittal follows at once; other notes are about other things.
        if replayed or isinstance(event, _PARTS) or (isinstance(event, Note) and event is follows):
            yield event


def is_check(replay: Replayed) -> bool:
    """Whether a replay asked if a new format has cured its layers."""
    return bool(replay.layers) and not any(name.startswith("alone/") for name in replay.numbers)


def _finding(events: Sequence[Event]) -> Finding:
    """What came of it: which test decides depends on the case, what was done about it does not."""
    if _of(events, Demotion) or any(e.after == "attribute" for e in _of(events, StateChange)):
        return "precision"
    found: list[Finding] = [verdict.verdict for verdict in _of(events, Verdict)]
    acquitted = bool(_of(events, Note)) or "precision" not in found
    if found[-1] == "not precision" and not acquitted:  # one test says so, another the contrary
        return "unclear"
    return found[-1]


def _of(events: Sequence[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]
