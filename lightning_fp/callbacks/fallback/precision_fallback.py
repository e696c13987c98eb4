"""PrecisionFallback: notices that a run diverges, finds out whether precision did it, saves it.

Others go back and skip data, or turn precision up at every spike; most spikes have other causes.
Here the run itself is asked: the batches that were trained on are run again in high precision, and
only what that takes away is precision's. What is decided, `stability.watch` decides, without a
Trainer. This callback is its ears and hands: it records batches and states, tells what has happened
once between two steps, and has done what follows (`carry_out`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from typing_extensions import override

from lightning_fp.callbacks.compare.loop_position import loop_position, steps_done
from lightning_fp.callbacks.compare.step_replay import StepReplay, replayable
from lightning_fp.callbacks.fallback.carry_out import CarryOut
from lightning_fp.callbacks.fallback.layer_watch import LayerWatch
from lightning_fp.callbacks.fallback.rehearsal import Rehearsal
from lightning_fp.callbacks.fallback.run_state import ATTRIBUTES, RunState
from lightning_fp.callbacks.run.event_log import EventLog
from lightning_fp.callbacks.run.finite_checkpoints import finite_checkpoints
from lightning_fp.callbacks.run.in_bar import shown_in_bar
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.events import Suspicion, WatchFailed
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability import RandomState
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.actions import (
    AmaxSeen,
    Answered,
    Attempted,
    Boundary,
    Ended,
    FormatsChanged,
    Happening,
    HighPrecisionTried,
    Looked,
    Question,
    Settled,
    StepSeen,
)
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.signals import SignalQueue, StepSignals
from lightning_fp.stability.keep.batch_ring import BatchRing
from lightning_fp.stability.keep.hyperparameters import hyperparameters
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.replay.rehearsal import Outcome
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.stability.respond.limits import LayerLimit
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.supervise.cast_watch import CastWatch
from lightning_fp.stability.supervise.incident_log import IncidentLog
from lightning_fp.stability.supervise.step_count import StepCount
from lightning_fp.stability.watch import Watch
from lightning_fp.state_version import check_version
from lightning_fp.telemetry import SignalReader

log = logging.getLogger(__name__)

STATE_VERSION = 1

FALLBACKS = "fallbacks"
"""Published at every step: how many incidents have ended in a demotion since the one before."""


NO_REPLAY = (
    "nothing can be replayed here: look into it, PrecisionMap.set gives layers a safer format"
)
"""What a suspicion says where the rehearsal has confined the watch to limits."""


class PrecisionFallback(RunCallback):
    """Watches a run, and takes FP8 back where it does harm.

    Steps with inf or NaN gradients are left out. A layer that loses too much in its casts climbs
    one rung of the safety ladder. A suspicion is investigated before the next step: if the same
    batches in high precision show that precision is to blame, the culprits are demoted, and the
    run goes on from where high precision would have brought it. docs/when-a-run-diverges.md
    explains every state and option.

    >>> from lightning_fp import FP8Precision, PrecisionFallback
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision(), callbacks=[PrecisionFallback()]
    ... )

    Args:
        detector: what is suspicious in loss and gradient norm.
        policy: how long to wait, and how often to try.
        limit: how much a layer's casts may lose; None sets no limits.
        every_n_steps: one in so many steps is looked at for the limits, besides those at which
            delayed scaling clamps, and all while a layer is over a limit.
        probe_every_n_steps: now and then one step's gradients are compared with high precision
            without a suspicion, in the long run once in so many steps; None never does.
        snapshot_every_n_steps: steps from one snapshot to the next.
        snapshots: how many to keep, at growing age.
        snapshot_bytes: most host memory for them; None sets no bound.
        ring_bytes: most host memory for recorded batches.
        checkpoint_bytes: snapshots and batches go into checkpoints if they are together no larger.
        dirpath: where `events.jsonl` goes; by default the run's directory.
        preflight: whether to try at the start that a step in high precision fits into memory.
        rehearse: whether to replay in the first steps as in an incident, and to confine the watch
            to what leaves nothing behind on this loop.
        refuse_nonfinite_checkpoints: whether checkpoints are left out whose weights are inf or NaN,
            and those before them kept.
        dry_run: whether only to log what would be done; then nothing is skipped either.
        seed: of the steps that are looked at.

    Raises:
        ValueError: for an option out of range; at setup without a plugin of this package.
    """

    publishes: ClassVar[Mapping[str, str]] = {FALLBACKS: ""}
    machine: ClassVar[type[Watch]] = Watch
    """What decides."""

    def __init__(
        self,
        detector: DivergenceDetector | None = None,
        *,
        policy: FallbackPolicy | None = None,
        limit: LayerLimit | None = LayerLimit(),  # noqa: B008 - frozen
        every_n_steps: int = 128,
        probe_every_n_steps: int | None = 1024,
        snapshot_every_n_steps: int = 16,
        snapshots: int = 3,
        snapshot_bytes: int | None = None,
        ring_bytes: int = 2**30,
        checkpoint_bytes: int = 2**30,
        dirpath: str | Path | None = None,
        preflight: bool = False,
        rehearse: bool = True,
        refuse_nonfinite_checkpoints: bool = True,
        dry_run: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("probe_every_n_steps", 1 if probe_every_n_steps is None else probe_every_n_steps, 1),
            ("ring_bytes", ring_bytes, 1),
            ("checkpoint_bytes", checkpoint_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.dry_run, self.preflight, self.dirpath = dry_run, preflight, dirpath
        self._rehearses, self._refuses = rehearse, refuse_nonfinite_checkpoints and not dry_run
        self._make_watch = partial(
            self.machine,
            detector,
            policy=policy,
            limit=limit,
            probe=None if probe_every_n_steps is None else Probe(every_n_steps=probe_every_n_steps),
            dry_run=dry_run,
        )
        self._watch = self._make_watch()
        self._state = self._watch.init()
        self._layers = None if limit is None else LayerWatch(limit, every_n_steps, seed)
        self._snapshots = Snapshots(
            depth=snapshots, every_n_steps=snapshot_every_n_steps, limit_bytes=snapshot_bytes
        )
        self._ring = BatchRing(max_bytes=ring_bytes)
        self._checkpoint_bytes = checkpoint_bytes
        self._settings: dict[str, Any] = {
            "detector": asdict(self.detector),
            "policy": asdict(self._watch.fallback.policy),
            "limit": None if limit is None else asdict(limit),
            "every_n_steps": every_n_steps,
            "probe_every_n_steps": probe_every_n_steps,
            "snapshot_every_n_steps": snapshot_every_n_steps,
            "snapshots": snapshots,
            "rehearse": rehearse,
            "refuse_nonfinite_checkpoints": refuse_nonfinite_checkpoints,
            "dry_run": dry_run,
            "seed": seed,
        }
        self._queue: SignalQueue | SignalReader = SignalQueue()
        self._waiting: list[StepSignals] = []
        self._hands: CarryOut | None = None
        self._rehearsal: Rehearsal | None = None
        self._rehearsed: dict[str, Any] | None = None
        self._casts: CastWatch | None = None
        self._count = StepCount()
        self._log = IncidentLog(EventLog(None), self._count)
        self._open: int | None = None
        self._opened_at = 0
        self._groups: list[int] = []
        self._formats: tuple[int, dict[str, str]] = -1, {}
        self._published = 0
        self._loaded: dict[str, Any] | None = None
        self._failed_at: int | None = None
        self._around = ExitStack()

    @property
    def detector(self) -> DivergenceDetector:
        """What is suspicious in loss and gradient norm."""
        return self._watch.detector

    @property
    def steps(self) -> Accounting:
        """What became of the steps so far."""
        return self._state.steps

    @property
    def phase(self) -> str:
        """Where the fallback stands: "warmup", "healthy", "suspect", "probation", "permanent"."""
        return self._state.fallback.phase

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return self._settings

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats; stand before the optimizer's step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        plugin = self.plugin(trainer)
        plugin.base.check_can_fall_back(pl_module)
        plugin.start_guarding(skip_nonfinite=not self.dry_run)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """State what memory the watch takes, and begin."""
        plugin = self.plugin(trainer)
        self._count.start(steps_done(trainer), trainer.global_step)
        self._snapshots.clear()
        self._ring.clear()
        self._queue, self._open = run_of(trainer).signals.reader(), None
        self._failed_at = None
        self._groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if self._arrived not in plugin.on_input:
            plugin.on_input.append(self._arrived)
        scaling = None if plugin.scaler is None else plugin.scaler.config
        layers = len(plugin.precision_map.layers)
        self._watch = self._make_watch(layers=layers, loss_scaling=scaling)
        if self._watch.probe is not None:
            self._casts = CastWatch(plugin.precision_map)
        if self._layers is not None:
            self._layers.start(trainer, plugin.precision_map)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._restore(loaded)
        self._published = self._state.fallback.demotions
        self._formats = -1, {}
        self._log = IncidentLog(run_of(trainer).log(self), self._count)
        self._hands = CarryOut(
            trainer,
            plugin,
            self._snapshots,
            self._ring,
            look_again=self._look_again,
            dry_run=self.dry_run,
        )
        self._begin_rehearsal(self._hands, None if loaded is None else loaded.get("rehearsal"))
        self._say_what_it_takes(self._hands.run)
        self._around.close()  # of a fit that failed
        self._around.enter_context(shown_in_bar(trainer, self._word))
        if self._refuses:
            self._around.enter_context(finite_checkpoints(trainer, self._note))
        if not replayable(pl_module):
            text = "training_step takes its batches out of the loader itself: it is watched, and"
            self._log.note(self._count.done, f"{text} nothing can be replayed")

    def _word(self) -> str:
        """For the progress bar: what the watch cannot do."""
        if self._failed_at is not None:
            return f"failed at step {self._count.global_step(self._failed_at)}"
        return "" if self._reach == "passed" else self._reach

    @property
    def _reach(self) -> Outcome:
        """What may be replayed."""
        return "passed" if self._hands is None else self._hands.answers.reach

    def _note(self, text: str) -> None:
        self._log.note(self._count.done, text)

    def _say_what_it_takes(self, run: RunState) -> None:
        memory = {
            "snapshot_bytes": run.stated_bytes(),
            "all_snapshots_bytes": self._snapshots.stated_bytes(run.parts()),
            "ring_bytes_at_most": self._ring.max_bytes,
            "high_precision_bytes_per_token": run.high_precision_bytes_per_token(),
        }
        self._log.started(self._count.done, memory, dry_run=self.dry_run)

    # -- steps ----------------------------------------------------------------------------------

    def _arrived(self, batch: Any) -> None:
        """A batch comes from the loader, and nothing of it has been seen yet: record it."""
        if self._hands is None or self._failed_at is not None:
            return
        trainer = self._hands.trainer
        if self._open is None:
            self._begin(trainer)
            groups = [hyperparameters(optimizer) for optimizer in trainer.optimizers]
            table = self._hands.plugin.precision_map
            if len(table.changes) != self._formats[0]:
                self._formats = len(table.changes), table.formats()
            scales = table.scale_history.in_force()
            formats = self._formats[1]
            self._ring.begin(self._count.done, groups, formats=formats, scales=scales)
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx + 1
        position, rng = loop_position(trainer), RandomState.capture()
        add = partial(self._ring.add, position=position)
        self._safely(add, batch, batch_idx, rng)
        if self.preflight:
            self.preflight = False
            self._safely(self._try_high_precision, trainer, batch, batch_idx)

    def _begin(self, trainer: L.Trainer) -> None:
        """Between two steps: judge, act, take a snapshot; before a hook has seen the next batch."""
        step = self._count.done
        self._safely(self._boundary, step)
        # At every step, 0 too: a gate without data would hold a rollout.
        demotions = self._state.fallback.demotions
        new, self._published = demotions - self._published, demotions
        run_of(trainer).board.publish(FALLBACKS, trainer.global_step, float(new))
        self._open, self._opened_at = step, trainer.global_step
        self._state, _, _ = self._watch.step(self._state, Attempted())

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to look at the layers, if this step is looked at."""
        if self._hands is None:
            return
        if self._open is None:  # batches do not come through the plugin
            self._begin(trainer)
        if self._layers is not None:
            self._safely(self._layers.before_batch, self._open)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in what backward recorded."""
        if self._layers is not None:
            self._safely(self._layers.after_backward)

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At the end of a step: see that the ring has all of it."""
        if self._hands is not None and trainer.global_step != self._opened_at:
            self._count.ended(trainer.global_step)
            self._safely(self._end_step, trainer, pl_module.automatic_optimization)
            self._open = None

    def _end_step(self, trainer: L.Trainer, automatic: bool) -> None:
        record = run_of(trainer).last
        if self._layers is not None:
            self._layers.after_step(self._count.done)
        if record is not None and record.optimizers and automatic:
            self._ring.set_hyperparameters([record.optimizers[-1].hyperparameters])
        if self._casts is not None:
            self._casts.after_step(self._count.done - 1)
        self._ring.end()

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, step: int) -> None:
        """Tell what has arrived, and do what follows, alike on all ranks."""
        hands = self._hands
        if hands is None:
            return
        trainer, plugin = hands.trainer, hands.plugin
        self._see_groups(trainer)
        plugin.boundary()  # what waits for this step takes effect now, a moment earlier
        if new := hands.others_changes():
            self._tell(FormatsChanged(layers=tuple(change.layer for change in new)))
        self._rehearse(hands, step, changed=bool(new))
        seen, self._waiting = [*self._waiting, *self._take()], []
        for signals in seen:
            self._ring.set_results(
                signals.step,
                loss=signals.loss,
                grad_norm=signals.grad_norm,
                skipped=signals.skipped,
            )
            self._tell(self._seen(plugin, signals, step))
        sound = not any(signals.skipped for signals in seen)
        for names, excesses in [] if self._layers is None else self._layers.take():
            look = Looked(at=step, names=tuple(names), excesses=excesses, sound=sound)
            self._tell(look)
        for seen_at, amax in [] if self._casts is None else self._casts.take():
            self._tell(AmaxSeen(at=step, step=seen_at, amax=amax))
        self._tell(Boundary(at=step, sound=sound))
        if self._snapshots.due(step):
            self._tell(Settled(at=step))

    def _tell(self, happening: Happening) -> None:
        """Tell the watch, and do what it asks for."""
        self._state, actions, events = self._watch.step(self._state, happening)
        for event in events:
            alone = isinstance(event, Suspicion) and self._reach == "limits only"
            self._log.write(replace(event, action=NO_REPLAY) if alone else event)
        for action in actions:
            if self._hands is None:
                return
            if isinstance(action, Question):
                answer = self._hands.answer(action)
                self._tell(Answered(question=action, answer=answer))
            else:
                self._hands.do(action)

    def _seen(self, plugin: LayerPrecision, signals: StepSignals, at: int) -> StepSeen:
        guard, scaler = plugin.guard, plugin.scaler
        named = None if guard is None or not signals.skipped else guard.overflowed
        half = plugin.half_dtype is torch.float16
        stuck = half and scaler is not None and signals.skipped and bool(scaler.state.stuck)
        return StepSeen(
            at=at,
            signals=signals,
            overflowed=None if named is None else self._overflowed(named, signals.step),
            half=half,
            stuck=stuck,  # waits for the device, but not often
        )

    def _overflowed(self, named: Mapping[int, str], step: int) -> str | None:
        """The layer that overflowed first in a step, at the first of its optimizers that did."""
        at = self._count.global_step
        layers = (named.get(each) for each in range(at(step), max(at(step + 1), 1)))
        return next((layer for layer in layers if layer is not None), None)

    def _look_again(self) -> None:
        if self._layers is not None:
            self._layers.look_again()

    def _begin_rehearsal(self, hands: CarryOut, shown: dict[str, Any] | None) -> None:
        self._rehearsal, self._rehearsed = None, shown
        if self._rehearses:
            self._rehearsal = Rehearsal(
                hands.trainer, hands.plugin, hands.run, self._ring, self._snapshots
            )
            if shown is not None:  # by the run that goes on
                self._rehearsal.load_state_dict(shown, self._count.done)
                hands.answers.reach = shown["reach"]

    def _rehearse(self, hands: CarryOut, step: int, *, changed: bool) -> None:
        """In the first steps, and a little of it whenever the run changes."""
        rehearsal = self._rehearsal
        if rehearsal is None:
            return
        if changed:
            rehearsal.changed(step)
        if rehearsal.due(step) and (event := rehearsal(step)) is not None:
            hands.answers.reach, self._rehearsed = event.outcome, rehearsal.state_dict()
            self._log.write(event)

    def _take(self, *, all: bool = False) -> list[StepSignals]:
        """Signals that have arrived, with steps as they are counted here."""
        seen = self._queue.take(all=all)
        return [replace(signals, step=self._count.step(signals.step)) for signals in seen]

    def _see_groups(self, trainer: L.Trainer) -> None:
        """Steps made before parameters were unfrozen cannot be replayed with them."""
        groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if groups != self._groups:
            self._groups = groups
            self._ring.clear()
            self._snapshots.clear()
            if self._rehearsal is not None:
                self._rehearsal.changed(self._count.done)

    def _try_high_precision(self, trainer: L.Trainer, batch: Any, batch_idx: int) -> None:
        """One step in high precision, to see that memory suffices for it."""
        plugin = self.plugin(trainer)
        table = plugin.precision_map
        run = StepReplay(trainer, table, batch, batch_idx)
        replay = run(dict.fromkeys(table.layers, plugin.high_precision))
        self._tell(HighPrecisionTried(at=self._count.done, outcome=replay.outcome))

    def _safely(self, function: Callable[..., object], *args: Any) -> None:
        """What fails in here is logged, and the training goes on without the watch."""
        if self._failed_at is not None:
            return
        try:
            function(*args)
        except Exception as error:
            self._failed_at = at = self._count.done
            log.exception("PrecisionFallback failed; the training goes on, unwatched from here")
            reason = f"the watch has failed, the run goes on unprotected: {error}"
            self._log.write(WatchFailed(step=at, reason=reason))

    # -- the end --------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what became of the steps."""
        if self._hands is None:
            return
        waiting = [*self._waiting, *self._take(all=True)]
        at = self._count.done
        unseen = tuple(StepSeen(at=at, signals=signals) for signals in waiting)
        self._tell(Ended(at=at, unseen=unseen))
        if self._failed_at is not None:
            since = self._count.global_step(self._failed_at)
            self._note(f"the watch had failed: the run was unprotected from step {since}")

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the plugin and the layers as they were."""
        if stage != "fit":
            return
        if self._layers is not None:
            self._layers.close()
        if self._casts is not None:
            self._casts.close()
            self._casts = None
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision):
            plugin.stop_guarding()
            if self._arrived in plugin.on_input:
                plugin.on_input.remove(self._arrived)
        self._around.close()
        self._hands = self._rehearsal = None
        self._snapshots.clear()
        self._ring.clear()

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """States, counters and signals; snapshots and batches too where they are small."""
        self._waiting += self._take(all=True)
        watch = self._watch.state_dict(self._state)
        limits, layers = watch.pop("limits"), self._layers
        state: dict[str, Any] = {
            **watch,
            "layers": None if layers is None else {"limits": limits, **layers.state_dict()},
            "count": self._count.state_dict(),
            "waiting": [asdict(signals) for signals in self._waiting],
            "rehearsal": self._rehearsed,
        }
        small = self._snapshots.nbytes + self._ring.nbytes <= self._checkpoint_bytes
        if self._hands is not None and self._hands.run.single and small:
            # Attributes of a run that has ended may be options of its callbacks.
            state["snapshots"] = self._snapshots.state_dict(without=(ATTRIBUTES,))
            state["ring"] = self._ring.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the model is set up: it takes effect at the start."""
        check_version(state_dict, STATE_VERSION, "PrecisionFallback state must have version")
        self._loaded = state_dict

    def _restore(self, state: Mapping[str, Any]) -> None:
        layers = state["layers"] or {}
        self._state = self._watch.load_state_dict({**state, "limits": layers.get("limits")})
        if self._layers is not None and layers:
            self._layers.load_state_dict(layers)
        if "count" in state:
            self._count.load_state_dict(state["count"])
        self._waiting = [StepSignals(**signals) for signals in state["waiting"]]
        if "snapshots" in state:
            self._snapshots.load_state_dict(state["snapshots"])
            self._ring.load_state_dict(state["ring"])
