"""Carries out what the watch asks of a run, between two steps and alike on all ranks.

This is the one place where the watch's decisions touch a run: replays are run, the table is written
to, states are put back. Nothing is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.changes import Change
from lightning_fp.stability.actions import (
    DropRecords,
    GoBack,
    LookAgain,
    Order,
    TakeSnapshot,
    Write,
)
from lightning_fp.stability.answers import Answers
from lightning_fp.stability.keep.batch_ring import BatchRing, RecordedStep
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.questions import (
    Answer,
    Climb,
    Climbed,
    Failed,
    Promote,
    Promoted,
    Question,
)
from lightning_fp.stability.replay.trajectory import Trajectory
from lightning_fp.stability.respond.ladder import rungs_above
from lightning_fp.stability.supervise.demotion import write_formats
from lightning_fp.stability.supervise.fitting import fitting, keep_again
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop
from lightning_fp.stability.supervise.trial import can_run


class CarryOut:
    """Questions are answered, orders done.

    Args:
        loop: what trains.
        snapshots: those of the run.
        ring: the recorded steps.
        look_again: has the layers looked at in the next step.
        note: takes what else is to be told.
        dry_run: whether the table is only read.
    """

    def __init__(
        self,
        loop: SupervisedLoop,
        snapshots: Snapshots,
        ring: BatchRing,
        *,
        look_again: Callable[[], object],
        note: Callable[[str], object],
        dry_run: bool,
    ) -> None:
        self.loop = loop
        self.answers = Answers(loop, ring, snapshots)
        self._snapshots, self._ring = snapshots, ring
        self._look_again, self._note, self._dry_run = look_again, note, dry_run

    # -- questions ------------------------------------------------------------------------------

    def answer(self, question: Question[Any]) -> Answer:
        """What a question comes to."""
        match question:
            case Climb():
                return self._climb(question)
            case Promote(formats=formats, reason=reason):
                known = self.loop.table.known
                changes = self._write({name: known[format] for name, format in formats}, reason)
                keep_again(self.loop, self._last(), self._note)
                return Promoted(formats={c.layer: (c.before, c.after) for c in changes})
            case _:
                return self._agreed(self.answers(question))

    def _agreed(self, answer: Answer) -> Answer:
        """Failed on one rank is failed on all: what is asked next, all ranks ask together."""
        failed = isinstance(answer, Failed)
        if self.loop.all(not failed) or failed:
            return answer
        return Failed(error="it failed on another rank", replays=answer.replays)

    def _climb(self, question: Climb) -> Climbed:
        table = self.loop.table
        layer = table.layers[question.layer]
        before = layer.format.name
        rungs = rungs_above(layer.format, self.loop.base, table, layer)
        last = self._last()
        for replays, rung in enumerate(rungs, start=0 if last is None else 1):
            if can_run(self.loop, last, formats := {question.layer: rung}):
                self._write(formats, question.reason)
                return Climbed(before=before, after=rung.name, replays=replays)
        return Climbed(before=before, after=None, replays=len(rungs))

    # -- orders ---------------------------------------------------------------------------------

    def do(self, order: Order) -> None:
        """Carry out an order."""
        match order:
            case Write(formats=formats, reason=reason):
                if not self._dry_run:
                    formats = fitting(self.loop, self._last(), formats, self._note)
                self._write(formats, reason)
            case GoBack(start=start, instead=instead):
                made = None if instead is None else self.answers.trajectories[instead]
                self._go_back(start, made)
            case TakeSnapshot(at=at, keep_from=keep_from):
                self._snapshots.take(at, self.loop.state.parts(), keep_from=keep_from)
                self._ring.drop_before(self._snapshots.oldest_step or 0)
            case LookAgain():
                self._look_again()
            case DropRecords():
                self._snapshots.clear()
                self._ring.clear()

    def _go_back(self, step: int, made: Trajectory | None) -> None:
        """To a snapshot, or to where a trajectory from it ended."""
        start = next(snapshot for snapshot in self._snapshots.kept if snapshot.step == step)
        since = self._ring.since(step)
        end = None if made is None else made.end
        # A trajectory's end has no scales (`RunState.take`), and those of now have seen the fault:
        # so they are taken from before it.
        self.loop.state.go_back(start if end is None else end)
        self.loop.state.restore_scales(start)
        self._snapshots.drop_after(step)
        # The batches since then are not part of the run any more, and without them older snapshots
        # lead to a state that is none of it.
        if made is None or since is None:
            self._ring.clear()
            self._snapshots.clear()
            return
        for recorded, loss in zip(since, made.losses, strict=False):
            left_out = not math.isfinite(loss)
            self._ring.set_results(
                recorded.step,
                loss=loss,
                skipped=left_out,
                formats={**recorded.formats, **made.formats},
            )

    def _last(self) -> RecordedStep | None:
        """A step to try formats on, if steps may be made again."""
        return None if self.answers.reach == "limits only" else self._ring.last

    def _write(self, formats: Mapping[str, LinearFormat], reason: str) -> list[Change]:
        return [] if self._dry_run else write_formats(self.loop.table, formats, reason)
