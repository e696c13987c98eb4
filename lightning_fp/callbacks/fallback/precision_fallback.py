"""PrecisionFallback: notices that a run diverges, finds out whether precision did it, saves it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from typing_extensions import override

from lightning_fp.callbacks.compare.loop_position import loop_position
from lightning_fp.callbacks.compare.step_replay import StepReplay, replayable
from lightning_fp.callbacks.fallback.accounting import Accounting
from lightning_fp.callbacks.fallback.incident_log import IncidentLog
from lightning_fp.callbacks.fallback.investigation import Case
from lightning_fp.callbacks.fallback.layer_watch import LayerWatch
from lightning_fp.callbacks.fallback.rescue import Rescue
from lightning_fp.callbacks.fallback.run_state import ATTRIBUTES, RunState
from lightning_fp.callbacks.fallback.step_count import StepCount
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import StepGuard, hyperparameters
from lightning_fp.stability import RandomState
from lightning_fp.stability.detect.decision import Cause
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.overflow_watch import OverflowState, OverflowWatch
from lightning_fp.stability.detect.signals import SignalQueue, StepSignals
from lightning_fp.stability.keep.batch_ring import BatchRing
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.respond.fallback_policy import Fallback, FallbackPolicy, Signals
from lightning_fp.stability.respond.limits import LayerLimit
from lightning_fp.stability.respond.probe import Probe, ProbeState
from lightning_fp.stability.respond.verdict import Anomaly
from lightning_fp.state_version import check_version
from lightning_fp.telemetry import SignalReader

log = logging.getLogger(__name__)

STATE_VERSION = 1

FALLBACKS = "fallbacks"
"""Published at every step: how many incidents have ended in a demotion since the one before."""

CLAMPING_BITS = -1.0
"""Headroom below which a step under delayed scaling asks for statistics of the next: its largest
value was twice what the scale holds."""


class PrecisionFallback(RunCallback):
    """Watches a run, and takes FP8 back where it does harm.

    Steps with inf or NaN gradients are left out. A layer that loses too much in its casts climbs
    one rung of the safety ladder. A suspicion is investigated before the next step: if the same
    batches in high precision show that precision is to blame, the culprits are demoted, and the
    run goes on from where high precision would have brought it. docs/when-a-run-diverges.md
    explains every state and option.

    >>> from lightning_fp import FP8Precision, PrecisionFallback
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision("delayed"), callbacks=[PrecisionFallback()]
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
        dirpath: where `events.jsonl` goes; by default the trainer's log directory.
        preflight: whether to try at the start that a step in high precision fits into memory.
        dry_run: whether only to log what would be done; then nothing is skipped either.
        seed: of the steps that are looked at.

    Raises:
        ValueError: for an option out of range; at setup without a plugin of this package.
    """

    publishes: ClassVar[Mapping[str, str]] = {FALLBACKS: ""}

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
        self.detector = DivergenceDetector() if detector is None else detector
        self.dry_run, self.preflight, self.dirpath = dry_run, preflight, dirpath
        self.steps = Accounting()
        """What became of the steps so far."""
        self._fallback = Fallback(policy)
        self._state = self._fallback.init()
        self._detected = self.detector.init()
        self._probe = Probe(every_n_steps=probe_every_n_steps or 1)
        self._probes = probe_every_n_steps is not None
        self._probed = ProbeState()
        self._layers = None if limit is None else LayerWatch(limit, every_n_steps, seed)
        self._snapshots = Snapshots(
            depth=snapshots, every_n_steps=snapshot_every_n_steps, limit_bytes=snapshot_bytes
        )
        self._ring = BatchRing(max_bytes=ring_bytes)
        self._checkpoint_bytes = checkpoint_bytes
        self._settings: dict[str, Any] = {
            "detector": asdict(self.detector),
            "policy": asdict(self._fallback.policy),
            "limit": None if limit is None else asdict(limit),
            "every_n_steps": every_n_steps,
            "probe_every_n_steps": probe_every_n_steps,
            "snapshot_every_n_steps": snapshot_every_n_steps,
            "snapshots": snapshots,
            "dry_run": dry_run,
            "seed": seed,
        }
        self._queue: SignalQueue | SignalReader = SignalQueue()
        self._waiting: list[StepSignals] = []
        self._skips = 0
        self._overflows = OverflowState()
        self._calm = True
        self._anomaly = Anomaly()
        self._log = IncidentLog(None)
        self._rescue: Rescue | None = None
        self._count = StepCount()
        self._open: int | None = None
        self._opened_at = 0
        self._groups: list[int] = []
        self._published = 0
        self._loaded: dict[str, Any] | None = None
        self._failed = False

    @property
    def phase(self) -> str:
        """Where the fallback stands: "warmup", "healthy", "suspect", "probation", "permanent"."""
        return self._state.phase

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
        self._count.start(trainer)
        run = RunState(trainer)
        snapshots_bytes = self._snapshots.stated_bytes(run.parts())  # refuses too small a bound
        self._snapshots.clear()
        self._ring.clear()
        self._queue, self._open, self._failed = run_of(trainer).signals.reader(), None, False
        self._groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if self._arrived not in plugin.on_input:
            plugin.on_input.append(self._arrived)
        if self._layers is not None:
            self._layers.start(trainer, plugin.precision_map)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._restore(loaded)
        self._published = self._state.demotions
        self._log = IncidentLog(run_of(trainer).log(self), self._count)
        self._rescue = Rescue(
            trainer=trainer,
            plugin=plugin,
            fallback=self._fallback,
            run=run,
            snapshots=self._snapshots,
            ring=self._ring,
            log=self._log,
            steps=self.steps,
            dry_run=self.dry_run,
        )
        self._rescue.others_changes()  # what was before this fit
        memory = {
            "snapshot_bytes": run.stated_bytes(),
            "all_snapshots_bytes": snapshots_bytes,
            "ring_bytes_at_most": self._ring.max_bytes,
            "high_precision_bytes_per_token": run.high_precision_bytes_per_token(),
        }
        self._log.started(self._count.done, memory, dry_run=self.dry_run)
        if not replayable(pl_module):
            text = "training_step takes its batches out of the loader itself: it is watched, and"
            self._log.note(self._count.done, f"{text} nothing can be replayed")

    # -- steps ----------------------------------------------------------------------------------

    def _arrived(self, batch: Any) -> None:
        """A batch comes from the loader, and nothing of it has been seen yet: record it."""
        if self._rescue is None or self._failed:
            return
        trainer = self._rescue.trainer
        if self._open is None:
            self._begin(trainer)
            groups = [hyperparameters(optimizer) for optimizer in trainer.optimizers]
            self._ring.begin(self._count.done, groups)
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
        new, self._published = self._state.demotions - self._published, self._state.demotions
        run_of(trainer).board.publish(FALLBACKS, trainer.global_step, float(new))
        self._open, self._opened_at = step, trainer.global_step
        self.steps.attempted += 1

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to look at the layers, if this step is looked at."""
        if self._rescue is None:
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
        if self._rescue is not None and trainer.global_step != self._opened_at:
            self._count.ended(trainer.global_step)
            self._safely(self._end_step, trainer, pl_module.automatic_optimization)
            self._open = None

    def _end_step(self, trainer: L.Trainer, automatic: bool) -> None:
        record = run_of(trainer).last
        if self._layers is not None:
            self._layers.after_step(self._count.done)
        if record is not None and record.optimizers and automatic:
            self._ring.set_hyperparameters([record.optimizers[-1].hyperparameters])
        self._ring.end()

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, step: int) -> None:
        """Judge the steps whose signals have arrived, and do what follows, alike on all ranks."""
        rescue = self._rescue
        if rescue is None:
            return
        self._see_groups(rescue.trainer)
        rescue.plugin.boundary()  # what waits for this step takes effect now, a moment earlier
        if new := rescue.others_changes():
            self._forget([change.layer for change in new])
            self._detected = self.detector.precision_changed(self._detected)
        seen, self._waiting = [*self._waiting, *self._take()], []
        for signals in seen:
            self._judge(rescue, signals, step)
        if self._layers is not None:
            sound = not any(signals.skipped for signals in seen)
            armed = self._state.phase not in ("warmup", "permanent")
            if rescue.climb(step, self._layers.judge(sound=sound, armed=armed)):
                self._detected = self.detector.precision_changed(self._detected)
        self._probe_if_due(rescue, step)
        if self._calm and self._state.phase != "suspect" and self._snapshots.due(step):
            self._snapshots.take(step, rescue.run.parts())
            self._ring.drop_before(self._snapshots.oldest_step or 0)

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

    def _judge(self, rescue: Rescue, seen: StepSignals, step: int) -> None:
        """One step's signals, and the investigation that they may call for."""
        self._ring.set_results(
            seen.step, loss=seen.loss, grad_norm=seen.grad_norm, skipped=seen.skipped
        )
        self._skips = self._skips + 1 if seen.skipped else 0
        overflow = self._see_overflow(rescue, seen)
        if seen.skipped:
            self.steps.skipped += 1
            guard = rescue.plugin.guard
            layer = None if guard is None else self._overflowed(guard, seen.step)
            self._log.skipped(seen, self._skips, layer)
        self._detected, decision = self.detector.step(
            self._detected,
            loss=seen.loss,
            grad_norm=seen.grad_norm,
            lr=seen.lr,
            skipped=seen.skipped,
        )
        self._calm = decision.kind == "ok"
        self._anomaly = Anomaly(baseline=decision.baseline, noise=decision.noise)
        clamping = seen.headroom is not None and seen.headroom < CLAMPING_BITS
        if clamping and self._layers is not None:
            self._layers.look_again()
        suspicious = decision.kind in ("suspect", "diverged")
        onset = None if decision.onset is None else seen.step - decision.onset
        armed = decision.baseline is not None and decision.cause is not Cause.LEARNING
        skips = self._skips
        if rescue.plugin.half_dtype is torch.float16:  # a scale that falls skips steps
            skips = max(skips, self._fallback.policy.max_skips + 1) if overflow else 0
        signals = Signals(step=step, armed=armed, suspicious=suspicious, onset=onset, skips=skips)
        before = self._state
        self._state, action = self._fallback.step(before, signals)
        self._log.state(step, before.phase, self._state.phase, decision.reason)
        if action == "promote":
            self._state = rescue.promote(self._state, step)
            self._detected = self.detector.precision_changed(self._detected)
        elif action == "investigate":
            self._log.suspicion(step, decision, skips=self._skips, overflow=overflow)
            self._investigate(rescue, step, probed=False, overflow=overflow)
        elif before.phase == "permanent" and suspicious:
            self._log.still_misbehaves(step, decision)

    def _overflowed(self, guard: StepGuard, step: int) -> str | None:
        """The layer that overflowed first in a step, at the first of its optimizers that did."""
        at = self._count.global_step
        named = (guard.overflowed.get(each) for each in range(at(step), max(at(step + 1), 1)))
        return next((layer for layer in named if layer is not None), None)

    def _see_overflow(self, rescue: Rescue, seen: StepSignals) -> str | None:
        """Under FP16: why overflows are more than a matter of the loss scale, if they are."""
        scaler = rescue.plugin.scaler
        if scaler is None or rescue.plugin.half_dtype is not torch.float16:
            self._overflows = OverflowState()
            return None
        watch = OverflowWatch(scaler.config, self._fallback.policy.max_skips)
        self._overflows, reason = watch.step(
            self._overflows,
            skipped=seen.skipped,
            loss_finite=seen.loss is None or math.isfinite(seen.loss),
            stuck=seen.skipped and bool(scaler.state.stuck),  # waits, but not often
        )
        return reason

    def _investigate(
        self, rescue: Rescue, step: int, *, probed: bool, overflow: str | None = None
    ) -> None:
        case = Case(
            step=step,
            onset=step if self._state.onset is None else self._state.onset,
            anomaly=self._anomaly,
            healthy_error=self._probe.usual(self._probed),
            risen=not probed,
            overflow=overflow,
        )
        self._state, finding, went_back = rescue.investigate(self._state, case)
        if finding == "not precision":
            self._detected = self.detector.cleared(self._detected)
            if probed:  # an error that does no harm is what is usual from here on
                self._probed = self._probe.accept(self._probed)
        if finding == "precision" and not self.dry_run:
            self._forget(self._state.demoted)
            self._detected = self.detector.precision_changed(self._detected)
            self._skips = 0
        if went_back:
            self._detected = self.detector.rolled_back(self._detected)
            self._calm = True

    def _forget(self, layers: Collection[str]) -> None:
        """What was seen of layers whose formats were changed is void."""
        if self._layers is not None:
            self._layers.forget(layers)

    def _probe_if_due(self, rescue: Rescue, step: int) -> None:
        """Compare one step's gradients with high precision, if it is time."""
        state, probe = self._state, self._probe
        ready = state.phase in ("healthy", "probation") and step >= state.quiet_until
        if not (self._probes and ready and self._calm and probe.due(self._probed, step)):
            return
        error = rescue.probe(step)
        before, self._probed = self._probed, probe.seen(self._probed, step, error)
        if error is None or not probe.suspicious(before, error):
            return
        self._log.probe_suspicion(step, error, probe.usual(before))
        onset = step if before.healthy is None else before.healthy
        signals = Signals(step=step, armed=True, suspicious=True, onset=onset)
        self._state, _ = self._fallback.step(state, signals)
        self._log.state(step, state.phase, self._state.phase, "a probe is out of the usual")
        self._investigate(rescue, step, probed=True)

    def _try_high_precision(self, trainer: L.Trainer, batch: Any, batch_idx: int) -> None:
        """One step in high precision, to see that memory suffices for it."""
        plugin = self.plugin(trainer)
        table = plugin.precision_map
        run = StepReplay(trainer, table, batch, batch_idx)
        replay = run(dict.fromkeys(table.layers, plugin.high_precision))
        self.steps.replayed += 1
        self._log.preflight(self._count.done, replay.outcome)

    def _safely(self, function: Callable[..., object], *args: Any) -> None:
        """What fails in here is logged, and the training goes on without the watch."""
        if self._failed:
            return
        try:
            function(*args)
        except Exception as error:
            self._failed = True
            log.exception("PrecisionFallback failed; the training goes on, unwatched from here")
            self._log.note(self._open or 0, f"the watch has failed, the run goes on: {error}")

    # -- the end --------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what became of the steps."""
        if self._rescue is None:
            return
        for seen in [*self._waiting, *self._take(all=True)]:
            if seen.skipped:
                self._skips += 1
                self.steps.skipped += 1
                self._log.skipped(seen, self._skips)
        self._log.finished(self._count.done, self.steps)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the plugin and the layers as they were."""
        if stage != "fit":
            return
        if self._layers is not None:
            self._layers.close()
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision):
            plugin.stop_guarding()
            if self._arrived in plugin.on_input:
                plugin.on_input.remove(self._arrived)
        self._rescue = None
        self._snapshots.clear()
        self._ring.clear()

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """States, counters and signals; snapshots and batches too where they are small."""
        self._waiting += self._take(all=True)
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "fallback": self._fallback.state_dict(self._state),
            "detector": self.detector.state_dict(self._detected),
            "probe": self._probe.state_dict(self._probed),
            "layers": None if self._layers is None else self._layers.state_dict(),
            "steps": asdict(self.steps),
            "count": self._count.state_dict(),
            "waiting": [asdict(signals) for signals in self._waiting],
            "skips": self._skips,
            "overflows": asdict(self._overflows),
            "calm": self._calm,
            "anomaly": asdict(self._anomaly),
        }
        small = self._snapshots.nbytes + self._ring.nbytes <= self._checkpoint_bytes
        if self._rescue is not None and self._rescue.run.single and small:
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
        self._state = self._fallback.load_state_dict(state["fallback"])
        self._detected = self.detector.load_state_dict(state["detector"])
        self._probed = self._probe.load_state_dict(state["probe"])
        if self._layers is not None and state["layers"] is not None:
            self._layers.load_state_dict(state["layers"])
        self.steps = Accounting(**state["steps"])
        if "count" in state:
            self._count.load_state_dict(state["count"])
        self._waiting = [StepSignals(**signals) for signals in state["waiting"]]
        self._skips, self._calm = state["skips"], state["calm"]
        self._anomaly = Anomaly(**state["anomaly"])
        if "overflows" in state:
            saved = state["overflows"]
            recent = tuple(saved["recent"])
            self._overflows = replace(OverflowState(**saved), recent=recent)
        if "snapshots" in state:
            self._snapshots.load_state_dict(state["snapshots"])
            self._ring.load_state_dict(state["ring"])
