"""The log of events that the callbacks of a run share in one directory.

One log, so that its lines are in the order in which things happened, whoever tells them. A write to
the table is told by the table's own subscription (`Run`), hence also one that the user makes. Only
what is told better by its author, a demotion with its verdict for instance, is not told twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_fp.layers import Change
from lightning_fp.records.events import (
    Event,
    EventWriter,
    FormatChange,
    GateResult,
    Rehearsed,
    Replayed,
    SkippedStep,
    Started,
    StateChange,
)

log = logging.getLogger("lightning_fp.fallback")

_QUIET = (StateChange, SkippedStep, Replayed, Started)
"""Events that are no warning; nor is a gate that passes."""


class EventLog:
    """Writes events; a failure to do so is said once and does no harm.

    Args:
        directory: where `events.jsonl` goes; None on other ranks, and where nothing is written.
        show: takes numbers by name and their step, for the loggers.
        step: the step the run begins or resumes at.
        position: where the log stood when the checkpoint was written that the run resumes from.
        console: whether to write lines.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        show: Callable[[dict[str, float], int], object] = lambda *_: None,
        step: int = 0,
        position: int | None = None,
        console: bool = False,
    ) -> None:
        self.own: set[str] = set()
        """Authors whose writes to the table have events of their own here."""
        self._writer: EventWriter | None = None
        self._show, self._console = show, console
        self._counts: dict[str, int] = {}
        self._failed = False
        if directory is not None:
            with self._safely():  # a fallback that wakes opens it in mid-run
                self._writer = EventWriter(directory, step=step, position=position)

    @property
    def position(self) -> int | None:
        """How far the file has come; what a checkpoint keeps of it."""
        return None if self._writer is None else self._writer.position

    def write(self, event: Event, *, quiet: bool = False) -> None:
        """One event, everywhere; not on the console if `quiet`."""
        if self._console and not quiet:
            passes = isinstance(event, GateResult) and event.passed
            passes |= isinstance(event, Rehearsed) and event.outcome == "passed"
            usual = passes or isinstance(event, _QUIET)
            log.log(logging.INFO if usual else logging.WARNING, "%s", event.sentence())
        if self._writer is not None and not self._failed:
            with self._safely():
                self._writer.append(event)

    @contextmanager
    def _safely(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError:
            self._failed = True
            log.exception("events cannot be written; training continues without them")

    def changed(self, step: int, changes: Sequence[Change], *, quiet: bool = False) -> None:
        """What was written to the table, one event for each reason."""
        by_reason: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
        for change in changes:
            if change.author not in self.own:
                formats = by_reason.setdefault((change.reason, change.author), {})
                formats[change.layer] = (change.before, change.after)
        for (reason, author), formats in by_reason.items():
            said = author == "rollout"  # the console has its stages
            event = FormatChange(step=step, reason=reason, formats=formats)
            self.write(event, quiet=quiet or said)

    def count(self, name: str, step: int) -> None:
        """One more of something, which the loggers show as `precision/<name>`."""
        self._counts[name] = self._counts.get(name, 0) + 1
        self._show({f"precision/{name}": float(self._counts[name])}, step)
