"""What happened, decision by decision, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lightning_fp.counting import counted
from lightning_fp.records import (
    Event,
    FormatChange,
    GateResult,
    Note,
    Replayed,
    StageChange,
    StateChange,
)
from lightning_fp.records.events import Rehearsed
from lightning_fp.report.draw.parts import Table
from lightning_fp.report.draw.sentences import conclusion, evidence, moved, said
from lightning_fp.report.read.format_history import repeats_stage
from lightning_fp.report.read.incidents import Incident, incidents, is_check, part_of_incident

_ROWS = 150
"""Rows of the table at most."""

WORDS = {
    "stage": "rollout",
    "gate": "gate",
    "format": "format",
    "suspect": "alarm",
    "verdict": "incident",
    "demote": "safer format",
    "limit": "safer format",
    "unproven": "safer format",
    "promote": "format back",
    "rollback": "steps undone",
    "skip": "skipped",
    "resumed": "resume",
    "watch_failed": "unprotected",
    "replay": "replay",
}
"""What a decision is called, by the kind of its event."""

_AROUND = {"started": "start", "rehearsal": "trial replay", "note": "note"}
"""What is told beside decisions."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided at a step, with all that belongs to it."""

    step: int

    what: str
    """In a word."""

    why: str

    details: tuple[str, ...] = ()
    """What it rests on: checks, tests, what followed; sentences."""

    @property
    def decides(self) -> bool:
        """Whether it is about precision, and no remark."""
        return self.what in WORDS.values()


def decisions(events: Sequence[Event], low: str = "low precision") -> list[Decision]:
    """What happened, decision by decision.

    A stage that begins has its gates and formats in it, an incident its tests and what followed, a
    layer that moved the check of its cure; steps left out one after the other are one.

    Args:
        events: those of the run, in order.
        low: what the low precision of the run is called.
    """
    by_step = {incident.step: incident for incident in incidents(events)}
    found: list[Decision] = []
    for step, together in groupby(events, key=lambda event: event.step):
        found += _of_one_step(list(together), by_step.get(step), low)
    return list(_skips_joined(found))


def events_table(events: Sequence[Event], low: str = "low precision") -> Table:
    """What happened, in words: a row for each decision, its details in lines beneath.

    Args:
        events: those of the run, in order.
        low: what the low precision of the run is called.
    """
    rows = [[f"{d.step:,}", d.what, "\n".join((d.why, *d.details))] for d in decisions(events, low)]
    more = len(rows) - _ROWS
    if more > 0:
        rows = [*rows[: _ROWS // 2], ["", "", f"... {more} more ..."], *rows[-_ROWS // 2 :]]
    return Table(
        title="Decisions",
        columns=("step", "what", "why"),
        rows=rows,
        numbers=frozenset({0}),
        note="All of it is in events.jsonl, in the run's directory." if rows else "",
        long=True,
    )


def _of_one_step(
    together: Sequence[Event], incident: Incident | None, low: str
) -> Iterator[Decision]:
    """The decisions of one step, in the order in which they were taken."""
    inside = [] if incident is None else list(part_of_incident(together))
    stage = next((event for event in together if isinstance(event, StageChange)), None)
    gates: list[GateResult] = []
    last: Decision | None = None
    for event in together:
        if isinstance(event, StateChange) or (stage is not None and repeats_stage(event)):
            continue
        if any(event is part for part in inside):
            if incident is None:  # told already
                continue
            row = Decision(
                step=event.step,
                what=WORDS["verdict"],
                why=conclusion(incident, low),
                details=tuple(evidence(incident, low)),
            )
            incident = None
        elif isinstance(event, GateResult):
            gates.append(event)
            continue
        elif isinstance(event, Replayed):
            if last is not None and is_check(event):  # of the layers that moved just before
                last = replace(last, details=(*last.details, f"afterwards: {event.reason}"))
            continue
        elif isinstance(event, StageChange):
            row = _stage(
                event,
                [e for e in together if repeats_stage(e)],
                tuple(f"gate {said(gate, low)}" for gate in gates),
            )
        else:
            row = _row(event, said(event, low))
        yield from [] if last is None else [last]
        last = row
    yield from [] if last is None else [last]
    if gates and stage is None:
        worst_first = [said(gate, low) for gate in sorted(gates, key=lambda gate: gate.passed)]
        why, *others = worst_first
        step = gates[0].step
        yield Decision(step=step, what=WORDS["gate"], why=why, details=tuple(others))


def _stage(event: StageChange, writes: Sequence[Event], gates: tuple[str, ...]) -> Decision:
    changes = [moved(write.formats) for write in writes if isinstance(write, FormatChange)]
    why = ": ".join((f"stage {event.stage!r}", *(changes or [event.action] * bool(event.action))))
    why = f"{why}: {event.reason}" if event.reason else why
    return Decision(step=event.step, what=WORDS["stage"], why=why, details=gates)


def _row(event: Event, sentence: str) -> Decision:
    what = WORDS.get(event.kind) or _AROUND.get(event.kind, event.kind)
    details: tuple[str, ...] = ()
    if isinstance(event, Rehearsed):
        details = (*event.differs, *(f"{line}, which is put back" for line in event.put_back))
    elif isinstance(event, Note) and {"attempted", "useful"} <= event.numbers.keys():
        what = "end"
    return Decision(step=event.step, what=what, why=sentence, details=details)


def _skips_joined(found: Sequence[Decision]) -> Iterator[Decision]:
    """Steps left out one after the other are one decision."""
    row: list[Decision] = []
    for decision in [*found, None]:
        follows = row and decision is not None and decision.step <= row[-1].step + 1
        if row and not (follows and decision is not None and decision.what == WORDS["skip"]):
            yield row[0] if len(row) == 1 else _skipped(row)
            row = []
        if decision is not None and decision.what == WORDS["skip"]:
            row.append(decision)
        elif decision is not None:
            yield decision


def _skipped(row: Sequence[Decision]) -> Decision:
    many = f"{counted(len(row), 'step')} were skipped, the last at step {row[-1].step:,}"
    why = row[0].why.replace(": the optimizer step was skipped", "")
    return Decision(step=row[0].step, what=WORDS["skip"], why=f"{many}: {why}")
