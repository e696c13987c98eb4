"""The rehearsal on the user's own loop: steps are replayed, and all must be as before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import cycle, islice
from time import perf_counter
from typing import Any

from lightning_fp.events import Rehearsed
from lightning_fp.layers import LinearFormat
from lightning_fp.stability.keep.batch_ring import BatchRing, RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.replay.fingerprint import (
    Fingerprint,
    Item,
    changed,
    is_global,
    only_grown,
)
from lightning_fp.stability.replay.one_step import Replay, compare
from lightning_fp.stability.replay.parity import Run
from lightning_fp.stability.replay.rehearsal import (
    CONSEQUENCES,
    NOTHING_ELSE,
    OUTCOMES,
    Outcome,
    changes,
    noise_of,
    not_as_recorded,
    not_twice,
    outcome_of,
)
from lightning_fp.stability.replay.trajectory import Trajectory, replay_trajectory
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop

log = logging.getLogger("lightning_fp.fallback")

EFFECTIVE = 2
"""Steps with a learning rate above 0 that must have been made: optimizers have state then."""

LATEST = 16
"""Steps after which a rehearsal says that no step could be recorded."""

CONTROLS = 3
"""Replays in the run's formats; they give the noise."""

ELSEWHERE = "on another rank more is not as before"

INCIDENT = 64
"""Steps of the incident whose time is told."""

_MANY = 3
"""Lines of what is put back that a sentence has; the event has all."""

LONG = 8
"""Steps of the longer trajectory."""


class Rehearsal:
    """Replays as an incident would, and sees what is left behind.

    A control, a replay in high precision, trajectories of one step and of eight, and back: 13
    steps. It ends with the first that leaves something behind, and puts back what snapshots hold.

    Args:
        loop: the user's own.
        ring: the recorded steps.
        snapshots: those there are.
    """

    def __init__(self, loop: SupervisedLoop, ring: BatchRing, snapshots: Snapshots) -> None:
        self._loop, self._ring, self._snapshots = loop, ring, snapshots
        self.reach: Outcome | None = None
        """What may be replayed; None before the rehearsal."""
        self.eager_comparable = True
        """Whether eager replays of a compiled run have its losses."""
        self._began: int | None = None
        self._again_from: int | None = None
        self._active: list[bool] | None = None
        self._replayed = 0
        self._put_back: dict[Item, tuple[str, str]] = {}
        """What hooks have written, and was as before afterwards."""
        self._grown: dict[Item, tuple[str, str]] = {}
        """Lists among globals that replays append to as well, and by which hook."""

    # -- when -----------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether it is time, between two steps; alike on all ranks.

        Args:
            step: steps done.
        """
        if self.reach is None and not self._loop.low():
            return False  # nothing would ever be replayed
        self._began = step if self._began is None else self._began
        if self.reach is None:
            late = step >= self._began + LATEST
            return bool(self._loop.unreplayable()) or self._effective() or late
        active = self._optimizers_with_state()
        if active != self._active and self._active is not None:
            self.changed(step)
        self._active = active
        last = self._ring.last
        return self._again_from is not None and last is not None and last.step >= self._again_from

    def changed(self, step: int) -> None:
        """A stage, an unfreezing, another optimizer: one control is repeated after the next step.

        Args:
            step: steps done.
        """
        if self.reach not in (None, "limits only"):
            self._again_from = step

    def _effective(self) -> bool:
        """Whether there are steps that have changed the weights; of the last it is not known."""
        return sum(_steps(step) for step in self._stretch()[1][:-1]) >= EFFECTIVE

    def _optimizers_with_state(self) -> list[bool]:
        return [bool(optimizer.state) for optimizer in self._loop.optimizers]

    def _stretch(self) -> tuple[Snapshot | None, Sequence[RecordedStep]]:
        """The oldest snapshot from which all steps are recorded."""
        for snapshot in self._snapshots.kept[::-1]:
            steps = [s for s in self._ring.since(snapshot.step) or () if s.micro_batches]
            if steps and steps[0].step == snapshot.step:
                return snapshot, steps
        return None, []

    def state_dict(self) -> dict[str, Any]:
        """What has been shown: plain values."""
        return {"reach": self.reach, "eager_comparable": self.eager_comparable}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """See `state_dict`; the first step of a resumed run is followed by a control.

        Args:
            state: of the run before.
            step: steps done.
        """
        self.reach, self.eager_comparable = state["reach"], state["eager_comparable"]
        self.changed(step)

    # -- what -----------------------------------------------------------------------------------

    def __call__(self, step: int) -> Rehearsed | None:
        """Rehearse, or repeat the control; call it when `due`, alike on all ranks.

        Args:
            step: steps done.

        Returns:
            What to tell; None for a control that has changed nothing. `reach` has what follows.
        """
        if self.reach is not None:
            self._again_from = None
            return self._again(step)
        start, steps = self._stretch()
        if why := self._loop.unreplayable():
            return self._nothing(step, why)
        if start is None or not self._effective():
            return self._nothing(step, "no steps are recorded: batches cannot be copied or kept")
        try:
            return self._rehearse(step, start, steps)
        except Exception as error:
            log.warning("the rehearsal failed: %s", error, exc_info=error)
            return self._nothing(step, f"the rehearsal failed: {type(error).__name__}: {error}")

    def _nothing(self, step: int, why: str) -> Rehearsed:
        self.reach = "limits only"
        return self._event(step, [why], None, {})

    def _rehearse(self, step: int, start: Snapshot, steps: Sequence[RecordedStep]) -> Rehearsed:
        began = perf_counter()
        numbers: dict[str, float] = {"incident_bytes": float(self._loop.state.stated_bytes())}
        # Hashes see far more than a snapshot holds, and cost no memory. What a snapshot does hold
        # can be put back.
        before, kept = self._look(), self._loop.take()
        one_step = self._one_step(before, steps[-1], numbers)
        trajectory: list[str] = []
        if not self._any(one_step):
            trajectory = self._trajectories(before, start, steps, numbers)
        if self._any([*one_step, *trajectory]):
            self._loop.restore(kept)
        outcome = outcome_of(one_step, trajectory)
        self.reach = self._least(outcome)
        lines = [*one_step, *trajectory]
        if self.reach != outcome:
            lines.append(ELSEWHERE)
        seconds = perf_counter() - began
        numbers |= {
            "replayed": float(self._replayed),
            "seconds": seconds,
            "incident_seconds": INCIDENT * seconds / max(self._replayed, 1),
        }
        return self._event(step, lines, before, numbers)

    def _again(self, step: int) -> Rehearsed | None:
        """One control; it may only take away from what is replayed."""
        last = self._ring.last
        if last is None or not last.micro_batches:
            return None
        before, kept, numbers = self._look(), self._loop.take(), dict[str, float]()
        run = self._loop.replay(last)
        lines = self._tried(before, lambda: self._controls(run, 1, [], numbers))
        if not self._any(lines):
            return None
        self._loop.restore(kept)
        self.reach = "limits only"
        return self._event(step, lines or [ELSEWHERE], before, numbers)

    # -- one step -------------------------------------------------------------------------------

    def _one_step(
        self, before: Fingerprint, step: RecordedStep, numbers: dict[str, float]
    ) -> list[str]:
        """A control; if that is harmless the others, and high precision."""
        run, losses = self._loop.replay(step), list[float]()

        def rest() -> list[str]:
            lines = self._controls(run, CONTROLS - 1, losses, numbers)
            high = self._replay(run, self._all_high())
            if high.outcome != "done":
                lines.append(f"a step in high precision cannot be run: {high.outcome}")
            return lines

        lines = self._tried(before, lambda: self._controls(run, 1, losses, numbers), watch=True)
        return lines if self._any(lines) else self._tried(before, rest)

    def _controls(
        self, run: Run | None, count: int, losses: list[float], numbers: dict[str, float]
    ) -> list[str]:
        """The run's formats, so many times; adds their losses."""
        first: Replay | None = None
        for _ in range(count):
            replay = self._replay(run, {})
            if replay.outcome != "done":
                return [f"a step cannot be run again: {replay.outcome}"]
            first = replay if first is None else first
            gap = compare(replay, first, self._loop.model, self._loop.table)
            losses.append(gap.losses[0])
            if gap.all.error > numbers.setdefault("gradient_noise", 0.0):
                numbers["gradient_noise"] = gap.all.error
        numbers["noise"] = noise_of(losses)
        line = not_twice(losses)
        return [line] if line else []

    def _replay(self, run: Run | None, formats: Mapping[str, LinearFormat]) -> Replay:
        self._replayed += 1
        return Replay(outcome="no loss") if run is None else run(formats)

    def _all_high(self) -> dict[str, LinearFormat]:
        return dict.fromkeys(self._loop.low(), self._loop.high)

    # -- trajectories ---------------------------------------------------------------------------

    def _trajectories(
        self,
        before: Fingerprint,
        start: Snapshot,
        steps: Sequence[RecordedStep],
        numbers: dict[str, float],
    ) -> list[str]:
        """One step as it ran, in the formats and scales of its time; eight in high precision."""

        def short() -> list[str]:
            compiled = self._loop.compiled
            done = self._train_on(start, steps[:1], None, compiled=compiled)
            if done.outcome != "done":
                return [f"a trajectory cannot be run: {done.outcome}"]
            loss, recorded = done.losses[0], steps[0].loss
            if recorded is not None:
                numbers.update(recorded_loss=recorded, replayed_loss=loss)
            if compiled:  # eager code may draw other random numbers
                eager = self._train_on(start, steps[:1], None).losses
                self.eager_comparable = not not_twice([loss, *eager])
            line = not_as_recorded(recorded, loss)
            return [line] if line else []

        def long() -> list[str]:
            many = list(islice(cycle(steps), LONG))
            done = self._train_on(start, many, self._all_high())
            return [] if done.outcome == "done" else [f"a trajectory cannot be run: {done.outcome}"]

        lines = self._tried(before, short, watch=True)
        return lines if self._any(lines) else self._tried(before, long)

    def _train_on(
        self,
        start: Snapshot,
        steps: Sequence[RecordedStep],
        formats: Mapping[str, LinearFormat] | None,
        *,
        compiled: bool = False,
    ) -> Trajectory:
        self._replayed += len(steps)
        return replay_trajectory(self._loop, start, steps, formats, compiled=compiled)

    # -- comparing ------------------------------------------------------------------------------

    def _look(self) -> Fingerprint:
        taken = self._loop.fingerprint()
        taken.hashes()
        return taken

    def _tried(
        self, before: Fingerprint, act: Callable[[], list[str]], *, watch: bool = False
    ) -> list[str]:
        """What was wrong, and what is not as before.

        Args:
            before: the state that must be there again.
            act: replays, and says what is wrong; done once more where something has changed, to see
                during which hook that happens.
            watch: whether to see which attributes hooks write the first time already.
        """
        items: list[Item] = []
        no_hooks = nullcontext(dict[Item, tuple[str, str]]())
        seen = self._loop.hooks(_is_told) if watch else no_hooks
        try:
            with seen as written:
                lines = act()
            after = self._look()
            items = changed(before.hashes(), after.hashes())
            self._put_back |= {i: by for i, by in written.items() if i not in items}
            # A loss that depended on such a list would not be the same twice.
            grown = [item for item in items if _has_only_grown(item, before, after)]
            self._grown = {i: written.get(i, ("", "")) for i in grown} | self._grown
            items = [item for item in items if item not in grown]
        except Exception as error:  # whatever a user's step may raise that is run again
            lines = [f"a step cannot be run again: {type(error).__name__}: {error}"]
        if not self._any(items):
            return lines
        wanted = set(items)
        # what was changed may make it fail
        with self._loop.hooks(wanted.__contains__) as found, suppress(Exception):
            act()
        return [*_by_hook({item: found.get(item, ("", "")) for item in items}), *lines]

    def _any(self, lines: Sequence[object]) -> bool:
        """Whether anything is wrong on any rank."""
        return not self._loop.all(not lines)

    def _least(self, outcome: Outcome) -> Outcome:
        """What may be replayed on all ranks."""
        for each in OUTCOMES[::-1]:
            if not self._loop.all(outcome != each):
                return each
        return outcome

    # -- what is told ---------------------------------------------------------------------------

    def _event(
        self, step: int, lines: Sequence[str], seen: Fingerprint | None, numbers: dict[str, float]
    ) -> Rehearsed:
        reach: Outcome = self.reach or "limits only"
        put_back = _by_hook(self._put_back)
        grown = [f"{line}: replays append to it too" for line in _by_hook(self._grown)]
        follows = NOTHING_ELSE if grown and reach == "passed" else CONSEQUENCES[reach]
        notes = [f"{line}, which is put back" for line in put_back[:_MANY]]
        if not self.eager_comparable:
            notes.append("eager code cannot be compared with compiled code here")
        return Rehearsed(
            step=step,
            reason="; ".join([*lines, *grown, follows, *notes]),
            outcome=reach,
            differs=(*lines, *grown),
            put_back=tuple(put_back),
            not_looked_at=() if seen is None else tuple(seen.not_looked_at),
            numbers=numbers,
        )


def _is_told(item: Item) -> bool:
    """Whether it is told which hook writes it, even where that does no harm."""
    return item.what.startswith("self.") or is_global(item)


def _has_only_grown(item: Item, before: Fingerprint, after: Fingerprint) -> bool:
    both = item in before.globals and item in after.globals
    return both and only_grown(before.globals[item], after.globals[item])


def _by_hook(items: Mapping[Item, tuple[str, str]]) -> list[str]:
    """A line for each hook."""
    by: dict[tuple[str, str], list[Item]] = {}
    for item, hook in items.items():
        by.setdefault(hook, []).append(item)
    return [changes(hook, owner, them) for (hook, owner), them in by.items()]


def _steps(step: RecordedStep) -> bool:
    """Whether a step has changed weights, as far as that is known."""
    rates = [float(group.get("lr", 1.0)) for groups in step.hyperparameters for group in groups]
    return not step.skipped and any(rates)
