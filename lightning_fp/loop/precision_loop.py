"""PrecisionLoop: low precision in a training loop of your own, with all that the Trainer has.

The loop keeps what is yours: model, optimizer, scheduler, data. A step of it is forward, backward,
guard, clipping and the optimizer's step, in formats that change between steps and nowhere else.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.layers import ConversionReport, FormatLike, Frozen, PrecisionMap
from lightning_fp.layers.backends import BackendLike
from lightning_fp.layers.format import QuantiseLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.layers.switchable import Gathering
from lightning_fp.loop.loop_mismatch import Mismatch
from lightning_fp.loop.loop_precision import LoopPrecision, device_of
from lightning_fp.loop.loop_records import LoopRecords
from lightning_fp.loop.meeting import meet
from lightning_fp.loop.options import (
    Fabric,
    Optimizers,
    Schedulers,
    check_fabric,
    check_frozen,
    check_groups,
    part_options,
    read_optimizers,
    read_schedulers,
)
from lightning_fp.loop.parts import PartOptions, Parts
from lightning_fp.loop.progress_line import ProgressLine
from lightning_fp.loop.steps.optimizer_steps import ComputeLoss, OptimizerSteps
from lightning_fp.loop.steps.training_steps import TrainingSteps, finish, finish_alone
from lightning_fp.loop.watched.plain_loop import PlainLoop
from lightning_fp.rank_group import among, is_first, ranks
from lightning_fp.recipes import RolloutRecipe, read
from lightning_fp.stability import Parity
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.supervise.options import WatchOptions
from lightning_fp.state_version import check_version, reads
from lightning_fp.stepping.base_precision import BaseLike
from lightning_fp.telemetry.casts.cast_log import CastOptions
from lightning_fp.telemetry.mismatch.mismatch_log import MismatchOptions
from lightning_fp.telemetry.parity_log import ParityOptions
from lightning_fp.telemetry.run_telemetry import Logger
from lightning_fp.telemetry.stability.stability_log import StabilityOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # `check_groups` checks it

STATE_VERSION = 1


class PrecisionLoop:
    """Trains a model in low precision, in your own loop; Lightning need not be installed.

    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    >>> loop = PrecisionLoop(model, torch.optim.AdamW(model.parameters()), "delayed")
    >>> for _ in range(3):
    ...     loss = loop.step(lambda x: model(x).square().mean(), torch.randn(8, 32))
    >>> loop.global_step, loop.precision_map.formats()
    (3, {'0': 'fp8-delayed', '2': 'fp8-delayed'})

    Args:
        model: what is trained, with its wrappers, on its device; converted in place.
        optimizer: of its Parameters; or several of different ones, which step together.
        scaling: "dynamic", "delayed", and all else that `FP8Precision` takes; "fp16" with base
            "16-mixed" for FP16, "bf16" for a run to compare with.
        layers: `{pattern: format}`, first match wins, as in `FP8Precision`.
        base: the precision of everything else: "bf16-mixed", "bf16-true", "32-true", "16-mixed",
            "16-true".
        scheduler: steps after each step that was made; it waits where one is left out. Or several.
        clip_norm: largest norm of all gradients together; None clips nothing.
        fallback: whether to watch the run, and take low precision back where it does harm, as
            `PrecisionFallback` does; or its options, `{"snapshots": 2}`.
        monitor: whether to measure what formats do to the numbers, as `ClampMonitor` does; or its
            options, `{"every_n_steps": 8}`.
        recipe: takes the run to its formats in stages, as `StagedRollout` does: a `RolloutRecipe`,
            a built-in one's name, the path of a YAML file, or YAML text. Gates read what other
            options measure, and what `log` publishes.
        parity: whether to compare a step with high precision now and then, as `ParityProbe` does;
            or its options, `{"every_n_steps": 500}`.
        stability: whether to measure at every step what moves before a loss does, as
            `StabilityMonitor` does; or its options, `{"head": "lm_head"}`.
        mismatch: whether `loop.mismatch` measures, or its options, as `MismatchMonitor` takes them;
            None: where one process trains. Several meet for it in every measured step.
        fabric: a Lightning Fabric that has set up model and optimizer, in its default precision:
            backward goes through it.
        group: the ranks that train this model together, where others do something else; None: all.
        scale_group: those of them that share scales of layers of one name; None: all. Ranks may
            have layers of their own, as stages of a pipeline have, if nothing is on that watches
            all layers together.
        dirpath: where records go, for `lightning-fp report`; None writes nothing.
        logger: called with numbers by name and the step, for W&B, TensorBoard, a file; not on other
            ranks.
        log_every_n_steps: length of a log interval.
        max_steps: of the whole run, where anything asks for its length.
        tokens_per_step: of one step over all ranks, where stages end by tokens; by default those of
            a batch are the elements of its first tensor of integers.
        progress: whether to draw a bar; None: on a terminal.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        backend: which kernels to use, as in `FP8Precision`.
        fp8_eval: whether `evaluation` runs in the layers' formats as well.
        frozen: "stored" keeps of frozen weights in FP8 layers only their cast, as in
            `FP8Precision`.
        quantise_like: "bf16-export" casts FP8 weights from the values that their bf16 export has,
            as in `FP8Precision`.
        attention: a simulated format for attention's products, as in `FP8Precision`.
        all_gather: "high" has FSDP2 gather all weights as they are, as in `FP8Precision`.
        tokens: with "auto", the tokens that the whole training will see.
        example_input: arguments of one forward, to measure each layer's share of the FLOPs.

    Raises:
        ValueError: for an option that cannot be, a rule that matches nothing, or a model without
            anything to convert.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        scaling: ScalingLike = "dynamic",
        *,
        layers: Mapping[str, FormatLike] | None = None,
        base: BaseLike = "bf16-mixed",
        scheduler: Schedulers | None = None,
        clip_norm: float | None = None,
        fallback: bool | Mapping[str, Any] = True,
        monitor: bool | Mapping[str, Any] = True,
        recipe: RolloutRecipe | str | Path | None = None,
        parity: bool | Mapping[str, Any] = False,
        stability: bool | Mapping[str, Any] = False,
        mismatch: bool | Mapping[str, Any] | None = None,
        fabric: Fabric | None = None,
        group: ProcessGroup | None = None,
        scale_group: ProcessGroup | None = None,
        dirpath: str | Path | None = None,
        logger: Logger | None = None,
        log_every_n_steps: int = 50,
        max_steps: int | None = None,
        tokens_per_step: int | None = None,
        progress: bool | None = None,
        loss_scaling: LossScaling | None = None,
        backend: BackendLike = "auto",
        fp8_eval: bool = False,
        frozen: Frozen = "kept",
        quantise_like: QuantiseLike | None = None,
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
        tokens: float | None = None,
        example_input: Any = None,
    ) -> None:
        # All that can be refused is, before the model is touched.
        check_at_least(1, log_every_n_steps=log_every_n_steps)
        check_at_least(1, max_steps=max_steps, tokens_per_step=tokens_per_step)
        optimizers, schedulers = read_optimizers(optimizer), read_schedulers(scheduler)
        check_frozen(frozen, model, optimizers)
        if fabric is not None:
            check_fabric(fabric)
        check_groups(group=group, scale_group=scale_group)
        self._group = group
        with among(group):
            measures = ranks() == 1 if mismatch is None else mismatch
            watch: WatchOptions | None = part_options("fallback", fallback, WatchOptions)
            options = PartOptions(
                casts=part_options("monitor", monitor, CastOptions),
                watch=watch,
                mismatch=part_options("mismatch", measures, MismatchOptions),
                parity=part_options("parity", parity, ParityOptions),
                stability=part_options("stability", stability, StabilityOptions),
                recipe=None if recipe is None else read(recipe),
                tokens_per_step=tokens_per_step,
                max_steps=max_steps,
                interval=log_every_n_steps,
            )
            self.model, self.optimizers, self.schedulers = model, optimizers, schedulers
            self._precision = LoopPrecision(
                model,
                scaling,
                layers=layers,
                base=base,
                backend=backend,
                fp8_eval=fp8_eval,
                loss_scaling=loss_scaling,
                tokens=tokens,
                frozen=frozen,
                quantise_like=quantise_like,
                attention=attention,
                all_gather=all_gather,
                example_input=example_input,
            )
            device = device_of(model)
            everyone = meet(self._precision.precision_map, scale_group, options, device)
            steps = OptimizerSteps(self._precision, model, optimizers, clip_norm)
            if everyone.differ:
                steps.guard.over_ranks = everyone.everywhere_true
            if fabric is not None:
                steps.backward = fabric.backward
            if watch is not None and watch.dry_run:
                steps.guard.skip_nonfinite = self._precision.base.scaler.must_skip
            settings = {"PrecisionLoop": {**self._precision.settings(), "clip_norm": clip_norm}}
            self._records = LoopRecords(
                self._precision,
                dirpath,
                {**settings, **options.settings()},
                log_every_n_steps,
                device,
            )
            plain = PlainLoop(self._precision, steps, device, schedulers)
            self._parts = Parts(options, self._precision, self._records, plain, device)
            progress_line = ProgressLine(progress if is_first() else False, max_steps)
            self._steps = TrainingSteps(
                self._precision,
                steps,
                self._parts,
                self._records,
                schedulers=schedulers,
                logger=logger,
                progress=progress_line,
                interval=log_every_n_steps,
                device=device,
            )
            self.mismatch = Mismatch(self._parts)
            """Takes log-probabilities of sampled tokens: `loop.mismatch.update(...)`."""
            self._finished = self._parts, self._records, progress_line, group
            # At the end of the program too, where nobody has called `close`.
            self._end = weakref.finalize(self, finish_alone, *self._finished)

    # -- what one reads -------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The first optimizer; `optimizers` has all."""
        return self.optimizers[0]

    @property
    def scheduler(self) -> LRScheduler | None:
        """The first scheduler, if there is one; `schedulers` has all."""
        return self.schedulers[0] if self.schedulers else None

    @property
    def global_step(self) -> int:
        """Optimizer steps, those left out among them; several that step together count as one."""
        return self._steps.done

    @property
    def precision_map(self) -> PrecisionMap:
        """The table of formats: read it, write to it; writes are in force from the next step on."""
        return self._precision.precision_map

    @property
    def conversion(self) -> ConversionReport | None:
        """Every layer's format, kernel and share; None if the model has no layer to convert."""
        return self._precision.report

    @property
    def directory(self) -> Path | None:
        """Where records go, from the first step on; None where this process writes nothing."""
        return self._records.directory

    @property
    def steps(self) -> Accounting:
        """What became of the steps so far: made, left out, rolled back, replayed."""
        watching = self._parts.watching
        return Accounting() if watching is None else watching.state.steps

    @property
    def phase(self) -> str:
        """Where the fallback stands: "warmup", "healthy", "suspect", "probation", "permanent"."""
        watching = self._parts.watching
        return "warmup" if watching is None else watching.state.fallback.phase

    @property
    def parity(self) -> Mapping[int, Parity]:
        """The last 100 comparisons with high precision by `global_step`; empty without `parity`."""
        return {} if self._parts.parity is None else self._parts.parity.results

    @property
    def stage(self) -> str | None:
        """The recipe's stage that the run is in; None before the first, and without a recipe."""
        return None if self._parts.staging is None else self._parts.staging.stage

    @property
    def loss_scale(self) -> float | None:
        """The scale of the loss, read from the device; None where the base is not FP16."""
        scaler = self._precision.scaler
        return None if scaler is None else float(scaler.state.scale)

    # -- steps ----------------------------------------------------------------------------------

    def step(self, compute_loss: ComputeLoss, batch: Any) -> Tensor:
        """One optimizer step.

        Args:
            compute_loss: from a batch to its loss, a scalar: the mean over the batch. It may be
                called again on the same batch, so all that it depends on comes through the batch,
                the model and the random state.
            batch: whatever `compute_loss` takes; a list is a list of micro-batches, whose gradients
                are averaged. Where a loader gives `[x, y]`, hand over `tuple(batch)`.

        Returns:
            The loss: scalar, detached, on its device, the mean over micro-batches of this rank.

        Raises:
            ValueError: for an empty list, or a loss that is no scalar with a gradient.
        """
        with among(self._group):
            return self._steps.step(compute_loss, batch)

    @contextmanager
    def training_step(self, batch: Any = None) -> Generator[None, None, None]:
        """One optimizer step of a loop that cannot hand over a function.

        Within the block run forward, and `loop.backward(loss)` once for each micro-batch; gradients
        add up. The step is made where the block ends. A step made so cannot be made again.

        Args:
            batch: for those who count its tokens.

        Raises:
            ValueError: for an optimizer that calls its closure itself; if nothing ran backward.
        """
        with among(self._group), self._steps.block(batch):
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward within `training_step`, of the loss in its scale.

        Args:
            loss: scalar.

        Raises:
            ValueError: outside of `training_step`; for a loss that is no scalar with a gradient.
        """
        self._steps.backward(loss)

    # -- beside training ------------------------------------------------------------------------

    def evaluation(self) -> AbstractContextManager[None]:
        """The model in eval mode and high precision (unless `fp8_eval`), without gradients.

        No amax of it reaches the histories of delayed scaling.
        """
        return self._precision.evaluation()

    @contextmanager
    def as_trained(self) -> Generator[None, None, None]:
        """Forwards as the coming training step's, save for dropout; no trace in any history.

        Old log-probabilities of a policy computed here equal those of the training forward bit for
        bit while the weights are the same: ratios are exactly 1. In `evaluation` they would be of
        another precision. What the watch and the recipe do between two steps they do here, so call
        it alike on all ranks.
        """
        with among(self._group):
            self._steps.settle()
        with self._precision.as_trained():
            yield

    def log(self, name: str, value: float) -> None:
        """Publish a measurement of yours, alike on all ranks: to loggers, and gates of a recipe.

        Args:
            name: as a gate has it.
            value: over all ranks.
        """
        self._records.run.show({name: float(value)}, self.global_step)

    # -- the end and state ----------------------------------------------------------------------

    def close(self) -> None:
        """Write what there is, and leave the layers as they are; on all ranks alike."""
        self._steps.closed = True
        if self._end.detach() is not None:
            finish(*self._finished)

    def __enter__(self) -> PrecisionLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """All that this package adds: the table, scales, counts; plain tensors, numbers, strings.

        Model, optimizer and scheduler are yours to save, beside it.
        """
        return {
            "version": STATE_VERSION,
            "global_step": self.global_step,
            "precision": self._precision.state_dict(),
            "records": self._records.state_dict(),
            **self._parts.state_dict(),
        }

    @reads("PrecisionLoop state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; before the first step of this loop, when the model is loaded.

        Raises:
            ValueError: for a state of another version, or after the first step.
        """
        if self._steps.begun:
            raise ValueError(
                "load_state_dict must come before the first step of this loop; make a new"
                " PrecisionLoop"
            )
        state = check_version(state, STATE_VERSION, "PrecisionLoop state")
        self._steps.done = int(state["global_step"])
        self._precision.load_state_dict(state["precision"])
        self._records.load_state_dict(state["records"])
        self._parts.load_state_dict(state)
