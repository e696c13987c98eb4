"""PlainLoop: a plain training loop whose steps can be made again, for the watch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.layers import LinearFormat, is_switchable
from lightning_fp.layers.regions import compiled_regions
from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.steps.optimizer_steps import ComputeLoss, OptimizerSteps, ddp_of
from lightning_fp.loop.watched.steps_again import IN_BLOCKS, StepsAgain
from lightning_fp.rank_group import ranks
from lightning_fp.stability import replay_step
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Part
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item, changed
from lightning_fp.stability.replay.loop import Train
from lightning_fp.stability.replay.one_step import Replay, exchanges_in_any_case, on_all_ranks
from lightning_fp.stability.replay.parity import Run
from lightning_fp.stability.supervise.run_state import LOSS_SCALE, SCALES, RunState
from lightning_fp.stability.supervise.supervised_loop import TableLoop
from lightning_fp.stepping.loss_scaler import LossScalePart
from lightning_fp.stepping.run_fingerprint import look_at_run
from lightning_fp.telemetry.over_ranks import any_rank, mean


class PlainLoop(TableLoop):
    """The `SupervisedLoop` of a `PrecisionLoop`; what is run again is `compute_loss`.

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
        super().__init__(precision)
        self._precision, self._steps, self._device = precision, steps, device
        self._others = tuple(others)
        self._again = StepsAgain(precision, steps)
        self._in_blocks = False  # nothing is known of the first step before it is made
        self.state = _state_of(precision, steps)
        """See `SupervisedLoop.state`."""

    @property
    def compute_loss(self) -> ComputeLoss | None:
        """Of the step that is about to be made; None where steps are made in blocks."""
        return self._again.compute_loss

    @compute_loss.setter
    def compute_loss(self, compute_loss: ComputeLoss | None) -> None:
        self._again.compute_loss = compute_loss
        self._in_blocks = compute_loss is None

    # -- what it is -----------------------------------------------------------------------------

    @property
    @override
    def model(self) -> nn.Module:
        """What is trained, with its wrappers."""
        return self._steps.model

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """See `SupervisedLoop.optimizers`."""
        return self._steps.optimizers

    @property
    def overflowed(self) -> Mapping[int, str]:
        """See `SupervisedLoop.overflowed`."""
        return self._steps.guard.overflowed

    @property
    def own_gradients(self) -> bool:
        """See `SupervisedLoop.own_gradients`; in blocks nothing is known of a step before it."""
        alone = ranks() == 1 and self._steps.micro_batches == 1 and not self._in_blocks
        return alone and self._precision.scaler is None and not self.compiled

    @property
    def compiled(self) -> bool:
        """See `Loop.compiled`."""
        function = hasattr(self.compute_loss, "_torchdynamo_orig_callable")
        return function or bool(compiled_regions(self.model, self.table.layers))

    def mean(self, value: float) -> float:
        """See `Loop.mean`."""
        return float(mean(torch.tensor(value, device=self._device))) if ranks() > 1 else value

    def all(self, true: bool) -> bool:
        """See `Loop.all`."""
        return not any_rank(not true, self._device)

    # -- replays --------------------------------------------------------------------------------

    def unreplayable(self) -> str:
        """See `SupervisedLoop.unreplayable`."""
        return IN_BLOCKS if self._in_blocks else ""

    def replay(
        self, step: RecordedStep, *, backward: bool = True, recompute: bool = True
    ) -> Run | None:
        """See `Loop.replay`."""
        model = ddp_of(self.model)
        if self.compute_loss is None or not step.micro_batches:
            return None
        if model is not None and exchanges_in_any_case(model):
            return None
        micro = step.micro_batches[0]

        def run(formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
            def replay() -> Replay:
                return replay_step(
                    lambda: self._again.forward_backward(micro, backward=backward),
                    self.model,
                    self.table,
                    formats=formats,
                    rng=micro.rng,
                    observe=observe,
                    others=self._written,
                )

            return on_all_ranks(replay, self._device)

        return self.recomputation.run(run) if recompute else run

    @override
    def _making(self) -> AbstractContextManager[Train]:
        return self._again.making()

    @property
    @override
    def _written(self) -> list[object]:
        """What a step may write into besides the model: whose method `compute_loss` is."""
        owner = getattr(self.compute_loss, "__self__", None)
        of_user = [] if owner is None or isinstance(owner, nn.Module) else [owner]
        return [*self.optimizers, *self._others, *of_user]

    # -- the rehearsal --------------------------------------------------------------------------

    def fingerprint(self, wanted: Callable[[Item], bool] = lambda _: True) -> Fingerprint:
        """See `SupervisedLoop.fingerprint`."""
        taken = Fingerprint(wanted)
        look_at_run(taken, self.model, self.optimizers, self.table, self._precision.scaler)
        written, ddp = self._written, ddp_of(self.model)
        for owner in (self.model if ddp is None else ddp.module, *written):
            taken.attributes(owner, list_unseen=owner not in self.optimizers)
        taken.code_of([*self.model.modules(), *written])
        return taken

    @contextmanager
    def hooks(
        self, wanted: Callable[[Item], bool]
    ) -> Generator[dict[Item, tuple[str, str]], None, None]:
        """See `SupervisedLoop.hooks`: the one place of the user's is `compute_loss`."""
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


def _state_of(precision: LoopPrecision, steps: OptimizerSteps) -> RunState:
    """The model, its attributes and those of optimizers; the scales."""
    model = steps.model

    def owners() -> dict[str, object]:
        modules: dict[str, object] = {
            f"module {name}": each
            for name, each in model.named_modules()
            # Half of what DDP knows of its steps is in C++, where nobody puts it back.
            if not (is_switchable(each) or isinstance(each, DistributedDataParallel))
        }
        steppers = {f"optimizer {index}": each for index, each in enumerate(steps.optimizers)}
        return {**modules, **steppers}

    scales: dict[str, Part] = {SCALES: precision.precision_map.scale_history}
    if precision.scaler is not None:
        scales[LOSS_SCALE] = LossScalePart(precision.scaler)
    sharded = any(isinstance(each, FSDPModule) for each in model.modules())
    return RunState(
        weights=lambda: {"model": model},
        optimizers=lambda: steps.optimizers,
        owners=owners,
        scales=scales,
        single=ranks() == 1 and not sharded,
    )
