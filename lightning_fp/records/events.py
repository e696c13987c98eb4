"""What happened to a run's precision and why: typed events, one line of JSON each.

The log is only ever appended to, in one write per event, so it can be read while the run goes on
and after it was killed. A run that resumes says so in a line of its own, by which readers leave
out what an abandoned continuation has written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.events import (
    Demotion,
    Event,
    FormatChange,
    GateResult,
    LayerClimb,
    Note,
    OtherEvent,
    Promotion,
    Rehearsed,
    Replayed,
    Resumed,
    Rollback,
    SkippedStep,
    StageChange,
    Started,
    StateChange,
    Suspicion,
    UnprovenClimb,
    Verdict,
    WatchFailed,
)
from lightning_fp.records.jsonl import append_line, read_lines, step_of
from lightning_fp.records.newest_run import newest_run

FILE = "events.jsonl"
"""Name of the file inside of a run's directory."""

KINDS: Mapping[str, type[Event]] = {
    event.kind: event
    for event in (
        Started,
        Resumed,
        SkippedStep,
        Suspicion,
        Replayed,
        Verdict,
        Demotion,
        Promotion,
        LayerClimb,
        UnprovenClimb,
        Rollback,
        StateChange,
        FormatChange,
        StageChange,
        GateResult,
        Rehearsed,
        WatchFailed,
        Note,
    )
}
"""Every kind of event, by the name it has in the file."""


class EventWriter:
    """Appends to `<run_dir>/events.jsonl`. One process writes, any number reads.

    Args:
        run_dir: the run's directory; made if it is not there.
        step: the step the run begins or resumes at. Events that an earlier, abandoned continuation
            has written for later steps stay in the file, and readers leave them out.
        position: `position` as it was when the checkpoint was written that the run resumes from.
            With it readers can tell also events at `step` itself apart, and find the right branch
            where several continuations went on from different checkpoints.
    """

    def __init__(self, run_dir: str | Path, *, step: int = 0, position: int | None = None) -> None:
        self.path = Path(run_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.position:
            known = position is not None and position <= self.position  # else another file's
            self.append(
                Resumed(
                    step=step,
                    reason="the run goes on from here, later events so far are void",
                    position=position if known else None,
                )
            )

    @property
    def position(self) -> int:
        """How far the log has come, in bytes; to keep in a checkpoint."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, event: Event) -> None:
        """Write one event; it is with the operating system when this returns.

        Raises:
            OSError: if the disk is full, for example.
        """
        append_line(self.path, _to_json(event))


@checked
def read_events(run_dir: str | Path, *, kinds: Collection[str] | None = None) -> list[Event]:
    """The events of a run, also of one that is still going on or was killed.

    Args:
        run_dir: the directory that the run wrote to.
        kinds: which kinds to return, e.g. ["demote", "promote"]; all by default.

    Returns:
        The events in force, in the order they were written. One of a kind that only a later
        version knows is an `OtherEvent` with that kind.

    Raises:
        FileNotFoundError: if the run has written none.
        ValueError: if there is no such kind.
    """
    if kinds is not None and (wrong := sorted(set(kinds) - KINDS.keys())):
        raise ValueError(f"kinds must be among {sorted(KINDS)}, got {wrong}")
    path = newest_run(run_dir) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no events in {str(run_dir)!r}: run_dir must be a directory that PrecisionFallback or"
            " StagedRollout wrote to (their dirpath, by default the run's directory)"
        )
    events = [event for _, event in _in_force(read_lines(path, _from_json))]
    return [event for event in events if kinds is None or event.kind in kinds]


def _in_force(lines: Sequence[tuple[int, Event]]) -> list[tuple[int, Event]]:
    kept: list[tuple[int, Event]] = []
    for index, (position, event) in enumerate(lines):
        if isinstance(event, Resumed):
            if event.position is None:
                kept = [(at, e) for at, e in kept if e.step <= event.step]
            else:
                before = event.position
                kept = _in_force([(at, e) for at, e in lines[:index] if at < before])
        kept.append((position, event))
    return kept


def _to_json(event: Event) -> dict[str, Any]:
    values = {item.name: getattr(event, item.name) for item in fields(event)}
    numbers = {name: float(value) for name, value in event.numbers.items()}
    return {**values, "kind": event.kind, "numbers": numbers}


def _from_json(values: dict[str, Any]) -> Event:
    kind: str = values.pop("kind")
    values["step"] = step_of(values)
    values["numbers"] = {name: float(value) for name, value in values["numbers"].items()}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "formats" in values:
        formats = values["formats"]
        values["formats"] = {layer: (before, after) for layer, (before, after) in formats.items()}
    type = KINDS.get(kind)
    needed = fields(type or Event)
    if type is None or any(item.name not in values for item in needed):
        known = {item.name: values[item.name] for item in fields(Event)}
        return OtherEvent(kind=kind, **known)
    return type(**{item.name: values[item.name] for item in needed})  # a later one may have more
