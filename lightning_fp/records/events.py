"""What happened to a run's precision and why: typed events, one line of JSON each.

The log is only ever appended to, in one write per event, so it can be read while the run goes on
and after it was killed. A run that resumes says so in a line of its own, by which readers leave
out what an abandoned continuation has written.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_fp.records.jsonl import append_line, read_lines

FILE = "events.jsonl"
"""Name of the file inside of a run's directory."""

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

    time: float = field(default_factory=time.time)
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

    verdict: Literal["precision", "not precision", "unclear"]
    tier: Literal["one step", "trajectory"]

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
class Rollback(Event):
    """The run went back to a snapshot."""

    kind: ClassVar[str] = "rollback"

    to_step: int
    """The step of the snapshot."""

    replayed: int
    """Steps since then that were made good by training on the same batches again."""

    def _what(self) -> str:
        lost = self.step - self.to_step - self.replayed
        return f"rollback to step {self.to_step}, {self.replayed} steps replayed, {lost} lost"


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
        return f"gate {self.statistic} of stage {self.stage} {'passes' if self.passed else 'fails'}"


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something to know: what an incident looks like if not precision, a failure in telemetry."""

    kind: ClassVar[str] = "note"


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
        Rollback,
        StateChange,
        FormatChange,
        StageChange,
        GateResult,
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
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no events in {str(run_dir)!r}: run_dir must be a directory that PrecisionFallback or"
            " StagedRollout wrote to (their dirpath, by default the trainer's log directory)"
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


def _listed(layers: Sequence[str]) -> str:
    named = ", ".join(layers[:_MANY])
    return f"{named} and {len(layers) - _MANY} more" if len(layers) > _MANY else named


def _to_json(event: Event) -> dict[str, Any]:
    values = {item.name: getattr(event, item.name) for item in fields(event)}
    numbers = {name: float(value) for name, value in event.numbers.items()}
    return {**values, "kind": event.kind, "numbers": numbers}


def _from_json(values: dict[str, Any]) -> Event:
    kind: str = values.pop("kind")
    values["numbers"] = {name: float(value) for name, value in values["numbers"].items()}
    values["layers"] = tuple(values["layers"])
    if "formats" in values:
        formats = values["formats"]
        values["formats"] = {layer: (before, after) for layer, (before, after) in formats.items()}
    type = KINDS.get(kind)
    needed = fields(type or Event)
    if type is None or any(item.name not in values for item in needed):
        known = {item.name: values[item.name] for item in fields(Event)}
        return OtherEvent(kind=kind, **known)
    return type(**{item.name: values[item.name] for item in needed})  # a later one may have more
