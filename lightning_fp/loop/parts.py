"""Parts: who measures and who acts in a plain loop, at each moment of a step.

Between two steps the watch decides, then what the steps before have shown is here, then stages may
change formats; nothing that changes weights or formats comes later than that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.loop.batches import device_of_batch
from lightning_fp.loop.gates import FALLBACKS, check_measurable, measurements
from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.loop_records import LoopRecords
from lightning_fp.loop.steps.optimizer_steps import ComputeLoss
from lightning_fp.loop.watched.plain_loop import PlainLoop
from lightning_fp.rank_group import is_first
from lightning_fp.recipes import RolloutRecipe, check_evidence, remarks_on, used_formats
from lightning_fp.recipes.text import as_plain
from lightning_fp.rl.origin import SampleOrigin
from lightning_fp.stability.keep.batch_ring import MicroBatch, RecordedStep
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.supervise.options import WatchOptions
from lightning_fp.stability.supervise.step_count import StepCount
from lightning_fp.stability.supervise.supervisor import Supervisor
from lightning_fp.telemetry import LOSS
from lightning_fp.telemetry.casts.cast_log import CastLog, CastOptions
from lightning_fp.telemetry.casts.layer_watch import LayerWatch
from lightning_fp.telemetry.mismatch.mismatch_log import MismatchLog, MismatchOptions
from lightning_fp.telemetry.parity_log import ParityLog, ParityOptions
from lightning_fp.telemetry.rollout.gate_evidence import GateEvidence
from lightning_fp.telemetry.rollout.staging import Staging, held_by_fallback
from lightning_fp.telemetry.rollout.token_counter import TokenCounter
from lightning_fp.telemetry.stability.stability_log import StabilityLog, StabilityOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Which parts there are; None: not that one."""

    casts: CastOptions | None
    watch: WatchOptions | None
    mismatch: MismatchOptions | None
    parity: ParityOptions | None
    stability: StabilityOptions | None
    recipe: RolloutRecipe | None
    tokens_per_step: int | None
    max_steps: int | None
    interval: int
    """Length of a log interval in steps."""

    def periods(self) -> dict[str, int]:
        """By each option that measures, the steps from one measurement to the next."""
        found: dict[str, int] = {}
        if self.mismatch is not None:
            found["mismatch"] = self.mismatch.every_n_steps
        if self.watch is not None:
            found["fallback"] = 1
        if self.casts is not None:
            found["monitor"] = self.casts.log_every_n_steps or self.interval
        if self.parity is not None:
            found["parity"] = self.parity.every_n_steps
        if self.stability is not None:
            found["stability"] = self.stability.log_every_n_steps or self.interval
        return found

    def settings(self) -> dict[str, dict[str, Any]]:
        """As plain data, under the names of the Trainer's callbacks."""
        found: dict[str, dict[str, Any]] = {}
        if self.casts is not None:
            found["ClampMonitor"] = self.casts.settings()
        if self.watch is not None:
            found["PrecisionFallback"] = self.watch.settings()
        if self.parity is not None:
            found["ParityProbe"] = self.parity.settings()
        if self.stability is not None:
            found["StabilityMonitor"] = self.stability.settings()
        if self.recipe is not None:
            found["StagedRollout"] = {"recipe": as_plain(self.recipe)}
        return found


class Parts:
    """What goes on around the steps.

    Args:
        options: which parts there are.
        precision: the formats and the base.
        records: where is written, and who is shown.
        loop: makes steps again.
        device: where collectives run.

    Raises:
        ValueError: for a recipe that cannot be here, or a base that cannot fall back.
    """

    def __init__(
        self,
        options: PartOptions,
        precision: LoopPrecision,
        records: LoopRecords,
        loop: PlainLoop,
        device: torch.device,
    ) -> None:
        self._options, self._precision, self._records = options, precision, records
        self._loop, self._device = loop, device
        self.casts = None if options.casts is None else CastLog(options.casts, "the monitor")
        measured = MismatchOptions() if options.mismatch is None else options.mismatch
        self.mismatch = MismatchLog(measured, "loop.mismatch.update", "the mismatch")
        self.parity = None if options.parity is None else ParityLog(options.parity)
        self.stability: StabilityLog | None = None
        if options.stability is not None:
            self.stability = StabilityLog(options.stability, "the log of stability")
            self.stability.check(loop.model)
        self.watching: Supervisor | None = None
        """The watch, from the first step on."""
        if options.casts is not None:
            options.casts.named(precision)
        if options.parity is not None:
            options.parity.named(precision)
            _check_parity(precision)
        if options.watch is not None:
            precision.base.check_can_fall_back(loop.model)
        self.staging = None if options.recipe is None else self._staging(options.recipe)
        self._loaded: Mapping[str, Any] = {}
        self._published, self._settled, self._said = 0, -1, False

    def _staging(self, recipe: RolloutRecipe) -> Staging:
        options = self._options
        until = {key for stage in recipe.stages for key in stage.until}
        if "share" in until and options.max_steps is None:
            raise ValueError(
                f"recipe {recipe.name!r} has stages that end by a share of the run; give"
                " PrecisionLoop(max_steps=...), or take until.steps"
            )
        names = measurements(recipe, options.periods())
        if LOSS in until:
            names[LOSS] = LOSS
        tokens = TokenCounter(options.tokens_per_step, options.interval)
        staging = Staging(
            recipe, GateEvidence(names, None, None), tokens if "tokens" in until else None
        )
        stages = staging.follow(self._precision).stages
        check_evidence(recipe.name, recipe.evidence, used_formats(stages))
        check_measurable(stages, self._precision.precision_map)
        report = self._precision.report
        for remark in remarks_on(
            recipe, stages, order_known=report is not None and bool(report.order)
        ):
            log.info("%s", remark)
        return staging

    # -- a run ----------------------------------------------------------------------------------

    def start(self, step: int) -> None:
        """Before the first step of this process.

        Args:
            step: optimizer steps done.
        """
        precision, records, options = self._precision, self._records, self._options
        run, directory, device = records.run, records.directory, self._device
        if self.casts is not None:
            self.casts.open(
                precision, run, directory, step=step, interval=options.interval, device=device
            )
        if self.stability is not None:
            self.stability.open(
                self._loop.model,
                self._loop.optimizers,
                run,
                directory,
                replays=lambda: precision.precision_map.frozen,
                compiled=lambda: self._loop.compiled,
                step=step,
                interval=options.interval,
                device=device,
            )
        if options.mismatch is not None:
            self.mismatch.begin(precision, run, records.log, directory, device)
        if self.staging is not None:
            self.staging.begin(run, records.log, options.max_steps or math.inf)
        if options.watch is not None:
            self.watching = self._supervisor(options.watch, step)
        if is_first() and precision.report is not None:
            log.info("%s", precision.report.screen(f"PrecisionLoop ({precision.name})"))

    def _supervisor(self, options: WatchOptions, step: int) -> Supervisor:
        looks, limit = None, options.limit
        if limit is not None:
            every, table = options.every_n_steps, self._precision.precision_map
            looks = LayerWatch(self.casts, table, limit, every_n_steps=every, seed=options.seed)
        watching = Supervisor(
            options,
            self._loop,
            count=StepCount(step, step),
            log=self._records.log,
            signals=self._records.run.signals.reader(),
            looks=looks,
        )
        if self._loaded:
            watching.load_state_dict(self._loaded)
        self._published = watching.state.fallback.demotions
        return watching

    # -- a step ---------------------------------------------------------------------------------

    def settle(self, step: int) -> None:
        """Between two steps: all that changes weights or formats before the next does so, once.

        The order is that of the Trainer's callbacks.

        Args:
            step: optimizer steps done.
        """
        if step == self._settled:
            return
        self._settled, watching, run = step, self.watching, self._records.run
        phase = ""
        if watching is not None:
            watching.settle()
            phase = watching.state.fallback.phase
            # At every step, 0 too: a gate without data would hold a rollout.
            demotions = watching.state.fallback.demotions
            new, self._published = demotions - self._published, demotions
            run.board.publish(FALLBACKS, step, float(new))
        run.signals.arrive()
        if self.staging is not None:
            held, over = held_by_fallback(phase)
            self.staging.settle(step, held=held, over=over)
        self._precision.boundary()

    def begin_step(self, compute_loss: ComputeLoss | None, batch: Any, step: int) -> None:
        """A step begins, before anybody has seen its batch.

        Args:
            compute_loss: of it; None where it is made in a block.
            batch: its first micro-batch.
            step: optimizer steps done.

        Raises:
            ValueError: where a step in a block is to be compared with high precision.
        """
        self._loop.compute_loss = compute_loss
        if self.watching is not None and not self._said:
            self._said = True
            self.watching.start()
        self.settle(step)
        if self.watching is not None:
            self.watching.begin(step)
        if self.parity is not None:
            self._compare(self.parity, batch, step)

    def _compare(self, parity: ParityLog, batch: Any, step: int) -> None:
        if self._loop.compute_loss is None:
            raise ValueError(
                "parity must be False where steps are made in blocks, which cannot be run again;"
                " hand the function over: loop.step(compute_loss, batch)"
            )
        if not parity.due(step):
            return
        micro = MicroBatch(batch=batch, batch_idx=0, rng=RandomState.capture())
        run = self._loop.replay(RecordedStep(step=step, micro_batches=[micro]))
        if run is not None:
            records = self._records
            parity.probe(
                self._precision,
                run,
                self._loop.model,
                telemetry=records.run,
                directory=records.directory,
                step=step,
            )

    def before_batch(self, batch: Any, index: int, step: int) -> None:
        """A micro-batch's forward comes next.

        Args:
            batch: the micro-batch.
            index: within the step.
            step: optimizer steps done.
        """
        watching, run = self.watching, self._records.run
        self._precision.precision_map.before_batch()
        if watching is not None and watching.failed_at is None:
            if self._loop.compute_loss is not None:
                device = device_of_batch(batch)
                watching.record(batch, index, {} if device is None else {"device": device})
            watching.before_forward()
        run.recorder.begin(step)
        if self.casts is not None:
            self.casts.before_batch(step)
        if self.stability is not None:
            self.stability.before_batch(step)
        self.mismatch.before_batch(step)
        if self.staging is not None:
            self.staging.count(batch)

    def after_backward(self) -> None:
        """A micro-batch's backward is done."""
        if self.stability is not None:
            self.stability.leave()
        if self.casts is not None:
            self.casts.after_backward()
        if self.watching is not None:
            self.watching.after_backward()

    def after_step(self, step: int) -> None:
        """The optimizer has stepped, or left the step out; its record is made.

        Args:
            step: optimizer steps done.
        """
        if self.casts is not None and self.casts.after_batch(step):
            self.casts.tell(step)
        if self.stability is not None and self.stability.after_batch(step):
            self.stability.tell(step)
        self.mismatch.after_batch(step)
        if self.staging is not None:
            self.staging.after_batch(step, self._options.interval, self._device)
        if self.watching is not None:
            last = self._records.run.last
            known = last.optimizers[-1].hyperparameters if last and last.optimizers else None
            self.watching.end(step, None if known is None else [known])

    def update_mismatch(
        self,
        rollout: Tensor,
        train: Tensor,
        mask: Tensor | None,
        origin: SampleOrigin | None = None,
    ) -> None:
        """Take in log-probabilities; not in a replay, whose tokens would count twice.

        Raises:
            ValueError: if the mismatch is not measured in this loop.
        """
        if self._options.mismatch is None:
            raise ValueError(
                "mismatch must be True, or its options, for loop.mismatch.update; got none: where"
                " several ranks train they would meet for it in every step. Give"
                " PrecisionLoop(mismatch=True)"
            )
        if not self._precision.precision_map.frozen:
            self.mismatch.add((rollout, train, mask, origin))

    def words(self) -> dict[str, str]:
        """For a progress bar."""
        stage = None if self.staging is None else self.staging.stage
        watch = "" if self.watching is None else self.watching.confined_to
        return {"stage": stage or "", "watch": watch}

    def finish(self) -> None:
        """The run is over; a collective."""
        if self.watching is not None:
            self.watching.finish()
            self.watching.close()
        if self.casts is not None:
            self.casts.finish(self._records.run.step)
            self.casts.let_go()
        if self.stability is not None:
            self.stability.finish(self._records.run.step)
        self.mismatch.end()
        if missed := self._precision.precision_map.attention_missed:
            log.warning("%s", missed)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Of all parts."""
        watching = self.watching
        return {
            "monitor": None if self.casts is None else self.casts.state_dict(),
            "mismatch": self.mismatch.state_dict(),
            "parity": None if self.parity is None else self.parity.state_dict(),
            "rollout": None if self.staging is None else self.staging.state_dict(),
            "fallback": dict(self._loaded) if watching is None else watching.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; before `start`."""
        if self.casts is not None and state["monitor"] is not None:
            self.casts.load_state_dict(state["monitor"])
        self.mismatch.load_state_dict(state["mismatch"])
        if self.parity is not None and state.get("parity") is not None:
            self.parity.load_state_dict(state["parity"])
        if self.staging is not None and state["rollout"] is not None:
            self.staging.load_state_dict(state["rollout"])
        self._loaded = state["fallback"]


def _check_parity(precision: LoopPrecision) -> None:
    table = precision.precision_map
    fp8 = any(table.known[name].is_fp8 for name in table.configured().values())
    if precision.scaler is not None and not fp8:
        raise ValueError(
            "parity must be False for FP16: it compares with what the run falls back to, which is"
            " bf16, the coarser of the two"
        )
