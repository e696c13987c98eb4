"""PlainLoop: a plain training loop whose steps can be made again, for the watch."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_fp.layers import FPLinear, LinearFormat, PrecisionMap
from lightning_fp.layers.regions import compiled_regions
from lightning_fp.loop.batches import copied_to
from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.optimizer_steps import ComputeLoss, OptimizerSteps, ddp_of
from lightning_fp.stability import Snapshot, replay_step, untouched
from lightning_fp.stability.keep.batch_ring import MicroBatch, RecordedStep
from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stability.keep.snapshot import Part
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item, changed
from lightning_fp.stability.replay.loop import MadeStep, Train
from lightning_fp.stability.replay.one_step import Replay, on_all_ranks
from lightning_fp.stability.replay.parity import Run
from lightning_fp.stability.replay.recompute import Recomputation
from lightning_fp.stability.replay.untouched import Stance
from lightning_fp.stability.supervise.run_state import LOSS_SCALE, SCALES, RunState
from lightning_fp.stepping.loss_scaler import LossScalePart
from lightning_fp.stepping.run_fingerprint import look_at_run
from lightning_fp.telemetry.over_ranks import any_rank, mean, ranks

IN_BLOCKS = "steps are made in blocks (`loop.training_step`), which cannot be run again"
"""Why nothing can be replayed then."""


class PlainLoop:
    """The `SupervisedLoop` of a `PrecisionLoop`.

    What is run again is `compute_loss`, on a copy of the batch, from the random state of its time.
    The scheduler does not step, formats cannot change in between.

    Args:
        precision: the formats and the base.
        steps: makes optimizer steps.
        device: where collectives run.
        others: what else a step may write attributes of.
    """

    def __init__(
        self,
        precision: LoopPrecision,
        steps: OptimizerSteps,
        device: torch.device,
        others: Sequence[object] = (),
    ) -> None:
        self.compute_loss: ComputeLoss | None = None
        """Of the step that is about to be made; None where steps are made in blocks."""
        self._precision, self._steps, self._device = precision, steps, device
        self._others = tuple(others)
        layers = precision.precision_map.layers.values()
        self._recomputation = Recomputation(lambda: self.model, layers)
        self.state = self._state()
        """See `SupervisedLoop.state`."""

    def _state(self) -> RunState:
        precision, optimizer, model = self._precision, self._steps.optimizer, self.model
        scales: dict[str, Part] = {SCALES: precision.precision_map.scale_history}
        if precision.scaler is not None:
            scales[LOSS_SCALE] = LossScalePart(precision.scaler)

        def owners() -> dict[str, object]:
            found: dict[str, object] = {
                f"module {name}": each
                for name, each in model.named_modules()
                if not isinstance(each, FPLinear)
            }
            return {**found, "optimizer 0": optimizer}

        sharded = any(isinstance(each, FSDPModule) for each in model.modules())
        return RunState(
            weights=lambda: {"model": model},
            optimizers=lambda: self.optimizers,
            owners=owners,
            scales=scales,
            single=ranks() == 1 and not sharded,
        )

    # -- what it is -----------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """What is trained, with its wrappers."""
        return self._steps.model

    @property
    def table(self) -> PrecisionMap:
        """The loop's."""
        return self._precision.precision_map

    @property
    def high(self) -> LinearFormat:
        """See `Loop.high`."""
        return self._precision.high_precision

    @property
    def base(self) -> LinearFormat:
        """See `SupervisedLoop.base`."""
        return self._precision.base_format

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The one there is."""
        return [self._steps.optimizer]

    @property
    def loss_scaling(self) -> LossScaling | None:
        """See `SupervisedLoop.loss_scaling`."""
        scaler = self._precision.scaler
        return None if scaler is None else scaler.config

    @property
    def half(self) -> bool:
        """See `SupervisedLoop.half`."""
        return self._precision.half_dtype is torch.float16

    @property
    def stuck(self) -> bool:
        """See `SupervisedLoop.stuck`."""
        scaler = self._precision.scaler
        return scaler is not None and bool(scaler.state.stuck)

    @property
    def overflowed(self) -> Mapping[int, str]:
        """See `SupervisedLoop.overflowed`."""
        return self._steps.guard.overflowed

    @property
    def whole(self) -> bool:
        """See `Loop.whole`."""
        return self._precision.falls_back_whole

    @property
    def compiled(self) -> bool:
        """See `Loop.compiled`."""
        function = hasattr(self.compute_loss, "_torchdynamo_orig_callable")
        return function or bool(compiled_regions(self.model, self.table.layers))

    def low(self) -> Sequence[str]:
        """See `Loop.low`."""
        return self._precision.low_layers()

    def unreplayable(self) -> str:
        """See `SupervisedLoop.unreplayable`."""
        return IN_BLOCKS if self.compute_loss is None else ""

    # -- replays --------------------------------------------------------------------------------

    def replay(
        self, step: RecordedStep, *, backward: bool = True, recompute: bool = True
    ) -> Run | None:
        """See `Loop.replay`."""
        if self.compute_loss is None or not step.micro_batches:
            return None
        micro = step.micro_batches[0]

        def run(formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
            def replay() -> Replay:
                return replay_step(
                    lambda: self._forward_backward(micro, backward=backward),
                    self.model,
                    self.table,
                    formats=formats,
                    rng=micro.rng,
                    observe=observe,
                    others=self._written,
                )

            return on_all_ranks(replay, self._device)

        return self._recomputation.run(run) if recompute else run

    def recompute(self) -> bool:
        """See `Loop.recompute`."""
        return self._recomputation.begin()

    def _forward_backward(self, micro: MicroBatch, *, backward: bool) -> Tensor | None:
        """One micro-batch; DDP exchanges nothing, and gradients have no loss scale."""
        scaler, precision = self._precision.base.scaler, self._precision
        with self._quiet(), self._without_sync():
            with precision.training_forward():
                loss = self._compute(precision.input(self._placed(micro)))
            try:
                if backward:
                    self._steps.backward(scaler.scaled(loss))
            finally:
                precision.backward_done()
            if backward and precision.scaler is not None:
                precision.scaler.unscale_all(self.model.parameters())
        return loss.detach()

    @contextmanager
    def training(
        self, formats: Mapping[str, LinearFormat] | None, *, compiled: bool = False
    ) -> Generator[Train, None, None]:
        """See `Loop.training`; the guard keeps no record."""
        # In the run's own formats no new graph is compiled; in others one is, in an incident.
        stance: Stance = "force_eager"
        if compiled:
            stance = "eager_on_recompile" if formats is None else "default"
        groups = [hyperparameters(each) for each in self.optimizers]
        try:
            with (
                untouched(self.model, self._written, stance=stance),
                self._recomputation.during(),
                self.table.overridden(formats or {}),
                self._quiet(),
            ):
                yield self._make_as_then if formats is None else self._make
        finally:
            for optimizer, before in zip(self.optimizers, groups, strict=True):
                set_hyperparameters(optimizer, before)

    def _make_as_then(self, step: RecordedStep) -> MadeStep:
        """A step in the formats, and with the delayed scales, of its time."""
        table = self.table
        now = table.formats()
        then = {
            name: table.known[format]
            for name, format in step.formats.items()
            if now.get(name, format) != format
        }
        with table.overridden(then, step.scales):
            return self._make(step)

    def _make(self, step: RecordedStep) -> MadeStep:
        """All micro-batches of a step, and the optimizer's; its loss as `StepRecord` has it."""
        guard, (optimizer,) = self._steps.guard, self.optimizers
        set_hyperparameters(optimizer, step.begun_with[0])
        guard.replay_skipped, guard.replay_hyperparameters = False, step.hyperparameters[0]
        micro_batches, losses = step.micro_batches, list[Tensor]()
        placed = [self._placed(micro) for micro in micro_batches]

        def forward_backward() -> Tensor:
            first = not losses

            def before(index: int) -> None:
                if first:
                    micro_batches[index].rng.restore()

            made = self._steps.losses(self._compute, placed, before=before)
            losses.extend(made if first else ())
            return torch.stack(made).sum()

        self._steps.step(forward_backward)
        if guard.replay_skipped:
            return MadeStep(math.nan, False)
        each = torch.stack([loss.float() * len(micro_batches) for loss in losses])
        return MadeStep(float(each.mean()), True)

    def _compute(self, batch: Any) -> Tensor:
        if self.compute_loss is None:
            raise RuntimeError(IN_BLOCKS)
        return self.compute_loss(batch)

    @staticmethod
    def _placed(micro: MicroBatch) -> Any:
        """A copy, where the batch was."""
        return copied_to(micro.batch, micro.position.get("device"))

    @contextmanager
    def _quiet(self) -> Generator[None, None, None]:
        """Nothing is kept of the steps: not by the guard, the scaler, or who hears backward."""
        steps, guard = self._steps, self._steps.guard
        before = steps.after_backward, steps.left_out
        kept = guard.replaying, guard.replay_skipped, guard.replay_hyperparameters
        guard.replaying, guard.replay_hyperparameters, steps.after_backward = True, None, []
        try:
            with self._precision.base.scaler.untouched():
                yield
        finally:
            steps.after_backward, steps.left_out = before
            guard.replaying, guard.replay_skipped, guard.replay_hyperparameters = kept

    @contextmanager
    def _without_sync(self) -> Generator[None, None, None]:
        """DDP exchanges nothing. FSDP has to: its gradients arrive reduced, in shards."""
        model = ddp_of(self.model)
        if model is None:
            yield
            return
        before, model.require_forward_param_sync = model.require_forward_param_sync, False
        try:
            with model.no_sync():
                yield
        finally:
            model.require_forward_param_sync = before

    # -- state ----------------------------------------------------------------------------------

    def take(self) -> Snapshot:
        """See `Loop.take`."""
        return self.state.take()

    def restore(self, snapshot: Snapshot) -> None:
        """See `Loop.restore`."""
        self.state.restore_weights(snapshot)

    def mean(self, value: float) -> float:
        """See `Loop.mean`."""
        return float(mean(torch.tensor(value, device=self._device))) if ranks() > 1 else value

    def all(self, true: bool) -> bool:
        """See `Loop.all`."""
        return not any_rank(not true, self._device)

    # -- the rehearsal --------------------------------------------------------------------------

    @property
    def _written(self) -> list[object]:
        """What a step may write into besides the model: whose method `compute_loss` is."""
        owner = getattr(self.compute_loss, "__self__", None)
        of_user = [] if owner is None or isinstance(owner, nn.Module) else [owner]
        return [*self.optimizers, *self._others, *of_user]

    def fingerprint(self, wanted: Callable[[Item], bool] = lambda _: True) -> Fingerprint:
        """See `SupervisedLoop.fingerprint`."""
        taken = Fingerprint(wanted)
        look_at_run(taken, self.model, self.optimizers, self.table, self._precision.scaler)
        written = self._written
        for owner in (self.model, *written):
            taken.attributes(owner, list_unseen=owner not in self.optimizers)
        taken.code_of([*self.model.modules(), *written])
        return taken

    def hooks(
        self, wanted: Callable[[Item], bool]
    ) -> AbstractContextManager[dict[Item, tuple[str, str]]]:
        """See `SupervisedLoop.hooks`: the one place of the user's is `compute_loss`."""
        return self._watched(wanted)

    @contextmanager
    def _watched(
        self, wanted: Callable[[Item], bool]
    ) -> Generator[dict[Item, tuple[str, str]], None, None]:
        compute, found = self.compute_loss, dict[Item, tuple[str, str]]()
        if compute is None:
            yield found
            return

        def look() -> Mapping[Item, Any]:
            return self.fingerprint(lambda item: item not in found and wanted(item)).hashes()

        @wraps(compute)
        def watching(batch: Any) -> Tensor:
            before = look()
            try:
                return compute(batch)
            finally:
                for item in changed(before, look()):
                    found.setdefault(item, ("compute_loss", "this loop"))

        with ExitStack() as undo:
            undo.callback(setattr, self, "compute_loss", compute)
            self.compute_loss = watching
            yield found
