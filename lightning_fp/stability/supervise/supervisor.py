"""The watch at work on a training loop: told what happens, and what it asks for is done.

What is decided, `stability.watch` decides. The supervisor is its ears and hands, for any loop: it
records batches and states, tells what has happened once between two steps, and has done what
follows (`carry_out`). Who owns the loop calls `begin`, `record`, `end` at each step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_fp.events import Event, FormatChange, Note, Suspicion, WatchFailed
from lightning_fp.layers import Change
from lightning_fp.layers.stored import is_stored
from lightning_fp.stability.actions import Action, TakeSnapshot
from lightning_fp.stability.happenings import (
    Answered,
    Attempted,
    Ended,
    FormatsChanged,
    Happening,
    HighPrecisionTried,
    Settled,
)
from lightning_fp.stability.incident_events import not_healed
from lightning_fp.stability.keep.batch_ring import Hyperparameters, MicroBatch, RecordedStep
from lightning_fp.stability.keep.hyperparameters import hyperparameters
from lightning_fp.stability.keep.pace import SHARE, SnapshotPace
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.questions import ProbeStep, Question
from lightning_fp.stability.supervise.arrivals import (
    Arrivals,
    Looks,
    Signals,
    WatchFailedError,
)
from lightning_fp.stability.supervise.carry_out import CarryOut
from lightning_fp.stability.supervise.cast_watch import CastWatch
from lightning_fp.stability.supervise.coming_probe import ComingProbe
from lightning_fp.stability.supervise.compile_clock import CompileClock
from lightning_fp.stability.supervise.demotion import AUTHOR
from lightning_fp.stability.supervise.incident_log import IncidentLog, Log
from lightning_fp.stability.supervise.options import WatchOptions
from lightning_fp.stability.supervise.rehearsal import Rehearsal
from lightning_fp.stability.supervise.run_state import ATTRIBUTES
from lightning_fp.stability.supervise.step_count import StepCount
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop
from lightning_fp.stability.watch_state import WatchState
from lightning_fp.state_version import reads

log = logging.getLogger("lightning_fp.fallback")

UNPROVEN = "nothing can be replayed here: each layer moves to the next safer format, without proof"
"""What a suspicion says there with `act_without_proof`."""

NO_REPLAY = (
    "nothing can be replayed here: look into it; PrecisionMap.set gives layers a safer format"
)
"""What a suspicion says where the rehearsal has confined the watch to limits."""


class Supervisor:
    """Watches one run.

    Args:
        options: of the watch.
        loop: what trains, between two optimizer steps.
        count: its steps so far.
        log: of the run.
        signals: of its steps.
        looks: at the layers; None without limits.
        before: where the watch stood at the end of an earlier run of the same model.
    """

    def __init__(
        self,
        options: WatchOptions,
        loop: SupervisedLoop,
        *,
        count: StepCount,
        log: Log,
        signals: Signals,
        looks: Looks | None,
        before: WatchState | None = None,
    ) -> None:
        self.loop, self.count = loop, count
        self.watch = options.watch(loop)
        self.state = self.watch.init() if before is None else before
        """Where the watch stands."""
        self.snapshots, self.ring = options.make_snapshots(), options.make_ring()
        self.failed_at: int | None = None
        """The step at which the watch itself has failed; nobody watches since, on any rank."""
        self._broken: Exception | None = None
        """What has failed on this rank alone, until all ranks know."""
        self.open = False
        """Whether a step has begun, and not ended."""
        self.log = IncidentLog(log, count)
        casts = None if self.watch.probe is None else CastWatch(loop.table)
        self._arrivals = Arrivals(loop, count, self.ring, signals=signals, looks=looks, casts=casts)
        self.hands = CarryOut(
            loop,
            self.snapshots,
            self.ring,
            look_again=(lambda: None) if looks is None else looks.look_again,
            note=self.note,
            dry_run=options.dry_run,
        )
        self._coming = ComingProbe(loop, self.hands.answers, self.ring)
        self._rehearsal = None
        if options.rehearse:
            self._rehearsal = Rehearsal(loop, self.ring, self.snapshots)
        self._rehearsed: dict[str, Any] | None = None
        self._options, self._preflight = options, options.preflight
        self._pace, self._said_interval = SnapshotPace(self.snapshots, loop.mean), False
        self._began_at, self._recording, self._settled = 0, False, -1
        self._groups = self._group_counts()
        self._formats: tuple[int, dict[str, str]] = -1, {}
        self._changes_seen = len(loop.table.changes)  # what was before this run
        self._clock, self._compiled_for = CompileClock(), -1
        self._waited = 0.0
        """Seconds for which a step of this run has last waited for the compiler."""

    @property
    def confined_to(self) -> str:
        """For a progress bar: what the watch can still do; "" where that is all."""
        if self.failed_at is not None:
            return f"failed at step {self.count.global_step(self.failed_at)}"
        reach = self.hands.answers.reach
        return "" if reach == "passed" else reach

    def start(self) -> None:
        """State what memory the watch takes, and what it cannot do."""
        state = self.loop.state
        memory = {
            "snapshot_bytes": state.stated_bytes(),
            "all_snapshots_bytes": self.snapshots.stated_bytes(state.parts()),
            "ring_bytes_at_most": self.ring.max_bytes,
            "high_precision_bytes_per_token": self._high_precision_bytes_per_token(),
            "replay_share": self.watch.budget.share,
            "replay_incident": self.watch.budget.incident,
        }
        self.log.started(self.count.done, memory, dry_run=self._options.dry_run)
        if why := self.loop.unreplayable():
            self.note(f"{why}: the run is watched, but nothing can be replayed")
        if stored := sum(map(is_stored, self.loop.table.layers.values())):
            self.note(not_healed(stored))

    def _high_precision_bytes_per_token(self) -> int:
        """What backward keeps more of each token with all layers in high precision."""
        layers = self.loop.table.layers.values()
        width = 4 if self.loop.base.name == "fp32" else 2
        # Of its input a layer in FP8 keeps one byte per element.
        return sum(x.in_features for x in layers if not x.format.is_high_precision) * (width - 1)

    def note(self, text: str) -> None:
        """Something to know."""
        self.log.note(self.count.done, text)

    # -- steps ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Between two steps: judge, act, take a snapshot; once, however often it is called."""
        if self._settled != self.count.done:
            self._settled = self.count.done
            self.safely(self._boundary, self.count.done)

    def begin(self, global_step: int) -> None:
        """A step begins, before anybody has seen its batch; `settle` comes before.

        Args:
            global_step: steps of all optimizers.
        """
        self.settle()
        self.open, self._began_at, self._recording = True, global_step, False
        self._alone(self._watch_compiler)
        self.state, _, _ = self.watch.step(self.state, Attempted())

    def record(self, batch: Any, batch_idx: int, position: Mapping[str, Any]) -> None:
        """A micro-batch of the step comes from the loader, and nothing of it has been seen yet.

        Args:
            batch: it is copied.
            batch_idx: its index in the epoch.
            position: where the loop stands, as plain numbers.
        """
        if not self._recording:
            self._recording = True
            self._alone(self._begin_record)
        rng = RandomState.capture()
        self._alone(lambda: self.ring.add(batch, batch_idx, rng, position=position))
        micro = MicroBatch(batch=batch, batch_idx=batch_idx, rng=rng, position=position)
        if self._preflight:
            self._preflight = False
            self.safely(self._try_high_precision, micro)
        self.safely(self._coming.before_forward, micro)

    def before_forward(self) -> None:
        """Begin to look at the layers, if this step is looked at."""
        if (looks := self._arrivals.looks) is not None:
            self.safely(looks.before_batch, self.count.done)

    def after_backward(self) -> None:
        """Take in what backward recorded."""
        self._alone(self._see_formats)
        self.safely(self._coming.after_backward)
        if (looks := self._arrivals.looks) is not None:
            self.safely(looks.after_backward)

    def end(self, global_step: int, stepped_with: Hyperparameters | None = None) -> None:
        """A micro-batch has ended, and with it perhaps a step.

        Args:
            global_step: steps of all optimizers.
            stepped_with: what the optimizers stepped with, where that is known.
        """
        if global_step == self._began_at:
            return
        self.count.ended(global_step)
        self._alone(self.ring.end, stepped_with)
        self._alone(self._say_compiled)
        self.safely(self._arrivals.after_step)
        self.open = False

    def _watch_compiler(self) -> None:
        """What is compiled before a step is not of its formats; replays compile nothing."""
        if self._compiled_for < 0 and not self._clock.runs and self.loop.compiled:
            self._clock.start()
        self._clock.take()

    def _say_compiled(self) -> None:
        """After the first step of this process, and after each with other formats."""
        changes, seconds = len(self.loop.table.changes), self._clock.take()
        before, self._compiled_for = self._compiled_for, changes
        if before == changes or seconds == 0:
            return
        self._waited = seconds
        first = "the first step" if before < 0 else "the first step in the new formats"
        step = self.count.done - 1
        self.log.write(
            Note(
                step=step,
                reason=f"{first} waited {seconds:.1f} s for the compiler",
                numbers={"compile_seconds": seconds},
            )
        )

    def _begin_record(self) -> None:
        table = self.loop.table
        groups = [hyperparameters(optimizer) for optimizer in self.loop.optimizers]
        if len(table.changes) != self._formats[0]:
            self._formats = len(table.changes), table.formats()
        scales, formats = table.scale_history.in_force(), self._formats[1]
        self.ring.begin(self.count.done, groups, formats=formats, scales=scales)

    def _see_formats(self) -> None:
        """Others may have written to the table after the record began, and before the forward."""
        table = self.loop.table
        if len(table.changes) != self._formats[0]:
            self._formats = len(table.changes), table.formats()
            self.ring.set_formats(self._formats[1], table.scale_history.in_force())

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, step: int) -> None:
        """Tell what has arrived, and do what follows, alike on all ranks."""
        self._see_groups()
        self.loop.table.apply()  # what waits for this step takes effect now, a moment earlier
        if new := self._others_changes():
            self.tell(FormatsChanged(layers=tuple(change.layer for change in new)))
        self._rehearse(step, changed=bool(new))
        for happening in self._arrivals.take(step):
            self.tell(happening)
        if (answered := self._coming.take(step)) is not None:
            self.tell(answered)
        # What a probe is going to show may need the snapshot that a new one would push out.
        if self.snapshots.due(step) and not self._coming.waits:
            only = self.snapshots.depth == 1 and bool(self.snapshots.kept)
            self.tell(Settled(at=step, only=only))

    def tell(self, happening: Happening) -> None:
        """Tell the watch, between two steps, and do what it asks for."""
        actions = self._heard(happening)
        while actions:
            action = actions.pop(0)
            if isinstance(action, ProbeStep) and self._coming.takes(action):
                continue  # it answers after the coming step
            if isinstance(action, Question):
                self._agree()
                answer = self.hands.answer(action)
                actions = [*self._heard(Answered(question=action, answer=answer)), *actions]
            elif isinstance(action, TakeSnapshot):
                self._take(action)
            else:
                self.hands.do(action)

    def _take(self, order: TakeSnapshot) -> None:
        """Memory may be short on one rank alone; what copies cost decides on the next ones."""
        before = self.snapshots.kept[:1]
        seconds = before[0].copy_seconds if before else None
        self._alone(self.hands.do, order)
        if not self._pace.taken(order.at, seconds):
            return
        every = self.snapshots.every_n_steps
        self._options = replace(self._options, snapshot_every_n_steps=every)
        self.watch = self._options.watch(self.loop)  # longer trajectories may be replayed
        if not self._said_interval:
            self._said_interval = True
            self.note(
                f"a snapshot is taken every {every} steps, so that copying takes at most"
                f" {SHARE:.0%} of the time"
            )

    def _heard(self, happening: Happening) -> list[Action]:
        self.state, actions, events = self.watch.step(self.state, happening)
        for event in events:
            self.log.write(replace(event, action=self._what_follows(event)))
        return actions

    def _what_follows(self, event: Event) -> str:
        """What a decision leads to: on this loop, else as the watch says."""
        if isinstance(event, Suspicion) and self.hands.answers.reach == "limits only":
            return UNPROVEN if self._options.act_without_proof else NO_REPLAY
        if isinstance(event, FormatChange) and self._waited and not event.action:
            return f"the next step waits for the compiler, which last took {self._waited:.1f} s"
        return event.action

    def _others_changes(self) -> list[Change]:
        """What others have written to the table since the last time."""
        changes = self.loop.table.changes
        new, self._changes_seen = changes[self._changes_seen :], len(changes)
        return [change for change in new if change.author != AUTHOR]

    def _rehearse(self, step: int, *, changed: bool) -> None:
        """In the first steps, and a little of it whenever the run changes."""
        rehearsal = self._rehearsal
        if rehearsal is None:
            return
        if changed:
            rehearsal.changed(step)
        if not rehearsal.due(step):
            return
        self._agree()
        if (event := rehearsal(step)) is not None:
            self.hands.answers.reach = event.outcome
            self._rehearsed = rehearsal.state_dict()
            self.log.write(event)

    def _group_counts(self) -> list[int]:
        return [len(optimizer.param_groups) for optimizer in self.loop.optimizers]

    def _see_groups(self) -> None:
        """Steps made before parameters were unfrozen cannot be replayed with them."""
        groups = self._group_counts()
        if groups != self._groups:
            self._groups = groups
            self.ring.clear()
            self.snapshots.clear()
            if self._rehearsal is not None:
                self._rehearsal.changed(self.count.done)

    def _try_high_precision(self, batch: MicroBatch) -> None:
        """One step in high precision, to see that memory suffices for it."""
        loop, done = self.loop, self.count.done
        run = loop.replay(RecordedStep(step=done, micro_batches=[batch]))
        if run is not None:
            outcome = run(dict.fromkeys(loop.table.layers, loop.high)).outcome
            self.tell(HighPrecisionTried(at=done, outcome=outcome))

    def safely(self, function: Callable[..., object], *args: Any) -> None:
        """What fails in here is logged, and training continues without the watch."""
        if self.failed_at is not None:
            return
        try:
            function(*args)
        except Exception as error:
            self._fail(error)

    def _alone(self, function: Callable[..., object], *args: Any) -> None:
        """What may fail on one rank alone: it follows the others until all of them know."""
        if self.failed_at is not None or self._broken is not None:
            return
        try:
            function(*args)
        except Exception as error:
            if self.loop.state.single:
                self._fail(error)
                return
            self._broken = error
            log.exception("the watch has failed on this rank")
            self._arrivals.fail()

    def _agree(self) -> None:
        """Before a replay: where the watch has failed on one rank, no other may wait for it.

        Raises:
            WatchFailedError: if it has, on all ranks.
        """
        if not self.loop.all(self._broken is None):
            raise WatchFailedError("it has failed on another rank")

    def _fail(self, error: Exception) -> None:
        self.failed_at = at = self.count.done
        why = error if self._broken is None else self._broken
        log.error("the watch has failed; training continues unwatched", exc_info=error)
        reason = f"the watch has failed; the run continues unprotected: {why}"
        self.log.write(WatchFailed(step=at, reason=reason))

    # -- the end --------------------------------------------------------------------------------

    def finish(self) -> None:
        """The run is over: say what became of the steps."""
        at = self.count.done
        self.tell(Ended(at=at, unseen=self._arrivals.rest(at)))
        if self.failed_at is not None:
            since = self.count.global_step(self.failed_at)
            self.note(f"the watch had failed: the run was unprotected from step {since}")

    def close(self) -> None:
        """Leave the layers as they were; records are let go."""
        self._arrivals.close()
        self._clock.close()
        self.loop.recomputation.close()
        self.snapshots.clear()
        self.ring.clear()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """States, counters and signals; snapshots and batches too where they are small."""
        watch, arrivals = self.watch.state_dict(self.state), self._arrivals.state_dict()
        limits, layers = watch.pop("limits"), arrivals.pop("layers")
        state: dict[str, Any] = {
            **watch,
            **arrivals,
            "layers": None if layers is None else {"limits": limits, **layers},
            "count": self.count.state_dict(),
            "rehearsal": self._rehearsed,
            "coming_probe": self._coming.state_dict(),
            "recomputing": self.loop.recomputation.in_the_run,
        }
        small = self.snapshots.nbytes + self.ring.nbytes <= self._options.checkpoint_bytes
        if self.loop.state.single and small:
            # Attributes of a run that has ended may be options of its callbacks.
            state["snapshots"] = self.snapshots.state_dict(without=(ATTRIBUTES,))
            state["ring"] = self.ring.state_dict()
        return state

    @reads("the watch's state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an interrupted run, before its next step."""
        layers = state["layers"] or {}
        self.state = self.watch.load_state_dict({**state, "limits": layers.get("limits")})
        self._arrivals.load_state_dict(state)
        if "count" in state:
            self.count.load_state_dict(state["count"])
        if "snapshots" in state:
            self.snapshots.load_state_dict(state["snapshots"])
            self.ring.load_state_dict(state["ring"])
        self._coming.load_state_dict(state.get("coming_probe"))
        if state.get("recomputing"):
            self.loop.recomputation.begin_in_the_run()
        self._rehearsed = state.get("rehearsal")
        if self._rehearsal is not None and self._rehearsed is not None:
            self._rehearsal.load_state_dict(self._rehearsed, self.count.done)
            self.hands.answers.reach = self._rehearsed["reach"]
