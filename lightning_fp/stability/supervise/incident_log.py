"""Writes down what the watch decides: to `events.jsonl`, to the loggers, a line to the console."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from lightning_fp.counting import counted
from lightning_fp.events import (
    Demotion,
    Event,
    Note,
    Promotion,
    Rollback,
    SkippedStep,
    Started,
    Suspicion,
)
from lightning_fp.stability.supervise.demotion import AUTHOR
from lightning_fp.stability.supervise.step_count import StepCount

_COUNTED: Mapping[type[Event], str] = {
    SkippedStep: "skipped_steps",
    Suspicion: "suspicions",
    Demotion: "demotions",
    Promotion: "promotions",
}
"""What the loggers count."""


class Log(Protocol):
    """The log of a run: a file, a console, loggers."""

    own: set[str]
    """Authors whose writes to the table have events of their own."""

    def write(self, event: Event, *, quiet: bool = False) -> None:
        """One event; not on the console if `quiet`."""
        ...

    def count(self, name: str, step: int) -> None:
        """One more of something, for the loggers."""
        ...


class IncidentLog:
    """Puts events into the run's log, with its `global_step`.

    Args:
        run: the log of the run.
        count: of the steps that events are told with.
    """

    def __init__(self, run: Log, count: StepCount) -> None:
        run.own.add(AUTHOR)
        self._run, self._count = run, count
        self._skipped: tuple[int, int] = (0, -1)
        """Steps left out in a row, and the last of them."""

    def write(self, event: Event) -> None:
        """One event, everywhere; of many steps left out in a row the console names a few."""
        at = self._count.global_step
        quiet = isinstance(event, SkippedStep) and self._is_one_of_many(event)
        name = _COUNTED.get(type(event))
        step = at(event.step)
        if isinstance(event, Rollback):
            event = replace(event, to_step=at(event.to_step))
        self._run.write(replace(event, step=step), quiet=quiet)
        if name is not None:
            self._run.count(name, step)

    def _is_one_of_many(self, event: SkippedStep) -> bool:
        """The first and every 100th are said."""
        count, last = self._skipped
        count = count + 1 if event.step == last + 1 else 1
        self._skipped = count, event.step
        return count > 4 and count % 100 != 0

    def started(self, step: int, memory: Mapping[str, float], *, dry_run: bool) -> None:
        """The watch begins."""
        snapshots = memory["all_snapshots_bytes"] / 2**20
        more = memory["high_precision_bytes_per_token"] / 2**10
        reason = (
            f"snapshots take {snapshots:.1f} MiB of host memory, recorded batches at most"
            f" {memory['ring_bytes_at_most'] / 2**20:.0f} MiB; with all layers in high precision"
            f" activations take {more:.1f} KiB more per token; replays may take"
            f" {counted(round(memory['replay_incident']), 'step')}, and"
            f" {memory['replay_share']:.0%} of the run's steps besides"
        )
        action = "dry run: only logging, nothing is changed" if dry_run else ""
        self.write(Started(step=step, reason=reason, numbers=dict(memory), action=action))

    def note(self, step: int, text: str) -> None:
        """Something to know."""
        self.write(Note(step=step, reason=text))
