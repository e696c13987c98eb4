"""PrecisionFallback: notices that a run diverges, finds out whether precision did it, saves it.

Others go back and skip data, or turn precision up at every spike; most spikes have other causes.
Here the run itself is asked: the batches that were trained on are run again in high precision, and
only what that takes away is precision's. All of this is done by a `Supervisor`, whatever the
training loop is; this callback brings it to a Trainer's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.compare.loop_position import loop_position, steps_done
from lightning_fp.callbacks.fallback.trainer_loop import TrainerLoop
from lightning_fp.callbacks.run.finite_checkpoints import finite_checkpoints
from lightning_fp.callbacks.run.in_bar import shown_in_bar
from lightning_fp.callbacks.run.run import Run, RunCallback, has_run, run_of
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.incident_events import skipped
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.stability.respond.limits import LayerLimit
from lightning_fp.stability.supervise.options import WatchOptions
from lightning_fp.stability.supervise.step_count import StepCount
from lightning_fp.stability.supervise.supervisor import Supervisor
from lightning_fp.stability.watch_state import VERSION
from lightning_fp.state_version import check_version
from lightning_fp.telemetry.casts.layer_watch import LayerWatch

log = logging.getLogger("lightning_fp.fallback")


FALLBACKS = "fallbacks"
"""Published at every step: how many incidents have ended in a demotion since the one before."""


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
        replay_budget: share of the steps that may be run again for probes and verdicts, besides one
            incident; it is said at the start how many steps that is.
        act_without_proof: whether all layers climb one rung at a suspicion where nothing can be
            replayed, and so nothing proved; else the suspicion is only told.
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

    judges_layers: ClassVar[bool] = True
    publishes: ClassVar[Mapping[str, str]] = {FALLBACKS: ""}

    @checked
    def __init__(
        self,
        detector: DivergenceDetector | None = None,
        *,
        policy: FallbackPolicy | None = None,
        limit: LayerLimit | None = LayerLimit(),  # noqa: B008 - frozen
        every_n_steps: int = 128,
        probe_every_n_steps: int | None = 1024,
        replay_budget: float = 0.05,
        act_without_proof: bool = False,
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
        self._options = WatchOptions(
            detector=DivergenceDetector() if detector is None else detector,
            policy=FallbackPolicy() if policy is None else policy,
            limit=limit,
            every_n_steps=every_n_steps,
            probe_every_n_steps=probe_every_n_steps,
            replay_budget=replay_budget,
            act_without_proof=act_without_proof,
            snapshot_every_n_steps=snapshot_every_n_steps,
            snapshots=snapshots,
            snapshot_bytes=snapshot_bytes,
            ring_bytes=ring_bytes,
            checkpoint_bytes=checkpoint_bytes,
            preflight=preflight,
            rehearse=rehearse,
            dry_run=dry_run,
            seed=seed,
        )
        self.dirpath, self.dry_run = dirpath, dry_run
        self.supervisor: Supervisor | None = None
        """What watches, from the start of a fit on; after it, as it was at its end."""
        self._refuses = refuse_nonfinite_checkpoints
        self._trainer: L.Trainer | None = None
        self._published = 0
        self._loaded: dict[str, Any] = {}
        self._asleep_since: tuple[int, int] | None = None
        self._around = ExitStack()

    @property
    def detector(self) -> DivergenceDetector:
        """What is suspicious in loss and gradient norm."""
        return self._options.detector

    @property
    def steps(self) -> Accounting:
        """What became of the steps so far."""
        return Accounting() if self.supervisor is None else self.supervisor.state.steps

    @property
    def phase(self) -> str:
        """Where the fallback stands: "warmup", "healthy", "suspect", "probation", "permanent"."""
        return "warmup" if self.supervisor is None else self.supervisor.state.fallback.phase

    @override
    def settings(self) -> dict[str, Any]:
        """The options that decide what it does."""
        return {**self._options.settings(), "refuse_nonfinite_checkpoints": self._refuses}

    @override
    def has_to_tell(self, trainer: L.Trainer) -> bool:
        """Over a model in high precision it sleeps: there is nothing to fall back from.

        Unless it has fallen back, as what a checkpoint has kept says.
        """
        watched = self.supervisor is not None or self._loaded
        return bool(watched or self.plugin(trainer).low_layers())

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
        """Begin; where there is nothing to tell, wait for it."""
        plugin = self.plugin(trainer)
        self._trainer, self._asleep_since = trainer, None
        if self._arrived not in plugin.on_input:
            plugin.on_input.append(self._arrived)
        self._around.close()  # of a fit that failed
        if self._refuses and not self.dry_run:
            self._around.enter_context(finite_checkpoints(trainer, self._note))
        if has_run(trainer):
            self._begin_watch(trainer)
        else:
            plugin.start_guarding(skip_nonfinite=not self.dry_run).keeps_record = False
            self._asleep_since = self._happened(plugin)

    @staticmethod
    def _happened(plugin: LayerPrecision) -> tuple[int, int]:
        """What there may be to tell: changes of formats, and steps left out; alike on all ranks."""
        left_out = 0 if plugin.guard is None else plugin.guard.left_out
        return len(plugin.precision_map.changes), left_out

    def _wake(self, trainer: L.Trainer) -> None:
        """Between two steps, if it sleeps: begin as soon as there is something to tell."""
        plugin, since = self.plugin(trainer), self._asleep_since
        if since is None or not plugin.between_steps:
            return
        happened = self._happened(plugin)
        if happened == since and not plugin.precision_map.pending:
            return
        self._asleep_since = None
        Run.wake(trainer)
        self._begin_watch(trainer)
        events, before = run_of(trainer).log(self), trainer.global_step - 1
        if happened[0] > since[0]:
            events.changed(before, plugin.precision_map.changes[since[0] :])
        if happened[1] > since[1]:
            overflowed = {} if plugin.guard is None else plugin.guard.overflowed
            events.write(skipped(before, overflowed.get(before)))

    def _begin_watch(self, trainer: L.Trainer) -> None:
        """State what memory the watch takes, and begin."""
        plugin, run = self.plugin(trainer), run_of(trainer)
        self.supervisor = watching = Supervisor(
            self._options,
            TrainerLoop(trainer, plugin),
            count=StepCount(steps_done(trainer), trainer.global_step),
            log=run.log(self),
            signals=run.signals.reader(),
            looks=self._layer_watch(trainer, plugin),
            before=None if self.supervisor is None else self.supervisor.state,
        )
        if self._loaded:
            watching.load_state_dict(self._loaded)
            self._loaded = {}
        self._published = watching.state.fallback.demotions
        self._around.enter_context(shown_in_bar(trainer, lambda: watching.confined_to))
        watching.start()

    def _note(self, text: str) -> None:
        if self.supervisor is None:
            log.warning("%s", text)
        else:
            self.supervisor.note(text)

    def _layer_watch(self, trainer: L.Trainer, plugin: LayerPrecision) -> LayerWatch | None:
        limit, options = self._options.limit, self._options
        if limit is None:
            return None
        every, table = options.every_n_steps, plugin.precision_map
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        monitor = next((c for c in callbacks if isinstance(c, ClampMonitor)), None)
        return LayerWatch(monitor, table, limit, every_n_steps=every, seed=options.seed)

    # -- steps ----------------------------------------------------------------------------------

    @property
    def _watching(self) -> Supervisor | None:
        """In a fit."""
        return None if self._trainer is None else self.supervisor

    def _arrived(self, batch: Any) -> None:
        """A batch comes from the loader, and nothing of it has been seen yet."""
        trainer = self._trainer
        if trainer is None or not self.takes_part(trainer):
            return
        self._wake(trainer)
        watching = self._watching
        if watching is None or watching.failed_at is not None:
            return
        self._begin(watching, trainer)
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx + 1
        watching.record(batch, batch_idx, loop_position(trainer))

    def _begin(self, watching: Supervisor, trainer: L.Trainer) -> None:
        """Between two steps, if it is there; before a hook has seen the next batch."""
        if watching.open:
            return
        watching.begin(trainer.global_step)
        # At every step, 0 too: a gate without data would hold a rollout.
        demotions = watching.state.fallback.demotions
        new, self._published = demotions - self._published, demotions
        run_of(trainer).board.publish(FALLBACKS, trainer.global_step, float(new))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to look at the layers, if this step is looked at."""
        self._wake(trainer)
        if (watching := self._watching) is not None:
            self._begin(watching, trainer)  # unless the batch came through the plugin
            watching.before_forward()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in what backward recorded."""
        if (watching := self._watching) is not None:
            watching.after_backward()

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
        if (watching := self._watching) is not None:
            record, automatic = run_of(trainer).last, pl_module.automatic_optimization
            known = automatic and record is not None and record.optimizers
            stepped = [record.optimizers[-1].hyperparameters] if record and known else None
            watching.end(trainer.global_step, stepped)

    # -- the end --------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what became of the steps."""
        if (watching := self._watching) is not None:
            watching.finish()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the plugin and the layers as they were."""
        if stage != "fit":
            return
        if self.supervisor is not None:
            self.supervisor.close()
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision):
            plugin.stop_guarding()
            if self._arrived in plugin.on_input:
                plugin.on_input.remove(self._arrived)
        self._around.close()
        self._trainer = self._asleep_since = None

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """States, counters and signals; snapshots and batches too where they are small.

        Nothing while it sleeps over a model in high precision.
        """
        if self._loaded or self.supervisor is None:
            return self._loaded
        return self.supervisor.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """A pickled one watches no run, but has what a checkpoint would have of it."""
        of_a_run = {"supervisor": None, "_trainer": None, "_asleep_since": None}
        return {**vars(self), **of_a_run, "_loaded": self.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the model is set up: it takes effect at the start."""
        check_version(state_dict, VERSION, "the watch's state")  # it is read at the start
        self._loaded = state_dict
