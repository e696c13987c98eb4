"""PrecisionLoop: low precision in a training loop of your own, with all that the Trainer has.

The loop keeps what is yours: model, optimizer, scheduler, data. A step of it is forward, backward,
guard, clipping and the optimizer's step, in formats that change between steps and nowhere else.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fp.choices import check_at_least
from lightning_fp.layers import ConversionReport, FormatLike, PrecisionMap
from lightning_fp.layers.backends import BackendLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.loop.loop_mismatch import Mismatch
from lightning_fp.loop.loop_precision import LoopPrecision, device_of
from lightning_fp.loop.loop_records import LoopRecords
from lightning_fp.loop.optimizer_steps import ComputeLoss, OptimizerSteps, check_loss
from lightning_fp.loop.parts import PartOptions, Parts
from lightning_fp.loop.progress_line import ProgressLine
from lightning_fp.loop.watched.plain_loop import PlainLoop
from lightning_fp.recipes import RolloutRecipe, read
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.supervise.options import WatchOptions
from lightning_fp.state_version import check_version
from lightning_fp.stepping.base_precision import BaseLike
from lightning_fp.stepping.gradients import calls_closure_itself
from lightning_fp.telemetry.casts.cast_log import CastOptions
from lightning_fp.telemetry.mismatch.mismatch_log import MismatchOptions
from lightning_fp.telemetry.over_ranks import is_first, ranks
from lightning_fp.telemetry.run_telemetry import Logger

log = logging.getLogger(__name__)

STATE_VERSION = 1


class Fabric(Protocol):
    """What a loop needs of Lightning's Fabric."""

    def backward(self, tensor: Tensor) -> None:
        """Run backward."""
        ...


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
        optimizer: of its Parameters.
        scaling: "dynamic", "delayed", and all else that `FP8Precision` takes; "fp16" with base
            "16-mixed" for FP16, "bf16" for a run to compare with.
        layers: `{pattern: format}`, first match wins, as in `FP8Precision`.
        base: the precision of everything else: "bf16-mixed", "bf16-true", "32-true", "16-mixed",
            "16-true".
        scheduler: steps after each step that was made; it waits where one is left out.
        clip_norm: largest norm of all gradients together; None clips nothing.
        fallback: whether to watch the run, and take low precision back where it does harm, as
            `PrecisionFallback` does; or its options, `{"snapshots": 2}`.
        monitor: whether to measure what formats do to the numbers, as `ClampMonitor` does; or its
            options, `{"every_n_steps": 8}`.
        recipe: takes the run to its formats in stages, as `StagedRollout` does: a `RolloutRecipe`,
            a built-in one's name, the path of a YAML file, or YAML text. Gates read what other
            options measure, and what `log` publishes.
        mismatch: options of `loop.mismatch`, as `MismatchMonitor` takes them.
        fabric: a Lightning Fabric that has set up model and optimizer, in its default precision:
            backward goes through it.
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
        tokens: with "auto", the tokens that the whole training will see.
        example_input: arguments of one forward, to measure each layer's share of the FLOPs.

    Raises:
        ValueError: for an option that cannot be, a rule that matches nothing, or a model without
            anything to convert.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaling: ScalingLike = "dynamic",
        *,
        layers: Mapping[str, FormatLike] | None = None,
        base: BaseLike = "bf16-mixed",
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        fallback: bool | Mapping[str, Any] = True,
        monitor: bool | Mapping[str, Any] = True,
        recipe: RolloutRecipe | str | Path | None = None,
        mismatch: Mapping[str, Any] | None = None,
        fabric: Fabric | None = None,
        dirpath: str | Path | None = None,
        logger: Logger | None = None,
        log_every_n_steps: int = 50,
        max_steps: int | None = None,
        tokens_per_step: int | None = None,
        progress: bool | None = None,
        loss_scaling: LossScaling | None = None,
        backend: BackendLike = "auto",
        fp8_eval: bool = False,
        tokens: float | None = None,
        example_input: Any = None,
    ) -> None:
        check_at_least(1, log_every_n_steps=log_every_n_steps)
        check_at_least(1, max_steps=max_steps, tokens_per_step=tokens_per_step)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of Fabric's wrapper
        _check_steppers(optimizer, scheduler)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.global_step = 0
        """Optimizer steps, those left out among them."""
        self._precision = LoopPrecision(
            model,
            scaling,
            layers=layers,
            base=base,
            backend=backend,
            fp8_eval=fp8_eval,
            loss_scaling=loss_scaling,
            tokens=tokens,
            example_input=example_input,
        )
        self._precision.connect([optimizer])
        self._steps = OptimizerSteps(self._precision, model, optimizer, clip_norm)
        self._device, self._interval = device_of(model), log_every_n_steps
        if fabric is not None:
            _check_fabric(fabric)
            self._steps.backward = fabric.backward
        watch: WatchOptions | None = _options("fallback", fallback, WatchOptions)
        options = PartOptions(
            casts=_options("monitor", monitor, CastOptions),
            watch=watch,
            mismatch=_options("mismatch", mismatch or True, MismatchOptions),
            recipe=None if recipe is None else read(recipe),
            tokens_per_step=tokens_per_step,
            max_steps=max_steps,
            interval=log_every_n_steps,
        )
        settings = {"PrecisionLoop": {**self._precision.settings(), "clip_norm": clip_norm}}
        self._records = LoopRecords(
            self._precision,
            dirpath,
            {**settings, **options.settings()},
            log_every_n_steps,
            self._device,
        )
        others = [] if scheduler is None else [scheduler]
        plain = PlainLoop(self._precision, self._steps, self._device, others)
        self._parts = Parts(options, self._precision, self._records, plain, self._device)
        if watch is not None and watch.dry_run:
            self._steps.guard.skip_nonfinite = self._precision.base.scaler.must_skip
        self.mismatch = Mismatch(self._parts)
        """Takes log-probabilities of sampled tokens: `loop.mismatch.update(...)`."""
        self._logger = logger
        self._progress = ProgressLine(progress if is_first() else False, max_steps)
        self._open = self._closed = False
        self._in_block: list[Tensor] | None = None
        self._steps.after_backward.append(self._parts.after_backward)
        self._steps.named = self._name_overflow
        # At the end of the program too, where nobody has called `close`.
        self._end = weakref.finalize(
            self, _finish_alone, self._parts, self._records, self._progress
        )

    # -- what one reads -------------------------------------------------------------------------

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
        micro_batches: list[Any] = batch if type(batch) is list else [batch]
        if not micro_batches:
            raise ValueError("batch must not be an empty list; a list is one of micro-batches")
        self._begin(compute_loss)
        losses: list[Tensor] = []

        def before(index: int) -> None:
            if not losses:  # in an optimizer's later passes all are known
                self._parts.before_batch(micro_batches[index], index, self.global_step)
                if index == 0:
                    self._precision.boundary()

        def forward_backward() -> Tensor:
            self.precision_map.scale_history.drop_weight_casts()
            made = self._steps.losses(compute_loss, micro_batches, before=before)
            losses.extend(made if not losses else ())
            return torch.stack(made).sum()

        shared = len(micro_batches) > 1
        self.precision_map.scale_history.share_weight_casts = shared
        loss = self._steps.step(forward_backward)
        for each in losses:
            self._records.run.recorder.micro_batch(each, len(micro_batches))
        self._end_step(loss)
        return loss

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
        if calls_closure_itself(self.optimizer):
            raise ValueError(
                f"training_step cannot serve {type(self.optimizer).__name__}, which runs forward"
                " and backward itself; hand them over: loop.step(compute_loss, batch)"
            )
        self._begin(None)
        self._parts.before_batch(batch, 0, self.global_step)
        self._precision.boundary()
        self.optimizer.zero_grad()
        self._in_block = losses = []
        try:
            with self._precision.training_forward():
                yield
        finally:
            self._in_block = None
            self._precision.backward_done()
        if not losses:
            raise ValueError("training_step needs a backward: call loop.backward(loss) within it")
        self._steps.step(lambda: None, inside=False)
        for each in losses:
            self._records.run.recorder.micro_batch(each, 1)
        self._end_step(torch.stack(losses).mean())

    def backward(self, loss: Tensor) -> None:
        """Backward within `training_step`, of the loss in its scale.

        Args:
            loss: scalar.

        Raises:
            ValueError: outside of `training_step`; for a loss that is no scalar with a gradient.
        """
        if self._in_block is None:
            raise ValueError(
                "backward must be called within `with loop.training_step(batch):`;"
                " loop.step(compute_loss, batch) calls it by itself"
            )
        check_loss(loss)
        self._in_block.append(loss.detach())
        with torch.autocast(self._device.type, enabled=False):
            self._steps.run_backward(loss)
        self.precision_map.phase.evaluating = False  # the block goes on

    def _begin(self, compute_loss: ComputeLoss | None) -> None:
        """Between two steps: all that changes formats does so here."""
        if self._closed:
            raise ValueError("this loop is closed; make another PrecisionLoop")
        if not self._open:
            self._start(compute_loss)
        self._parts.begin_step(compute_loss, self.global_step)

    def _start(self, compute_loss: ComputeLoss | None) -> None:
        """Before the first step of this process."""
        self._open = True
        run = self._records.run
        run.loggers = [self._logger] if self._logger is not None and is_first() else []
        run.step = self.global_step
        self._records.open(self.global_step, self.model)
        self._parts.start(compute_loss, self.global_step)

    def _name_overflow(self) -> None:
        self._steps.guard.name_overflow(self.model, self.global_step)

    def _end_step(self, loss: Tensor) -> None:
        guard = self._steps.guard
        self.precision_map.after_step()
        if self.scheduler is not None and not self._steps.left_out:
            self.scheduler.step()
        self.global_step += 1
        steps, guard.steps = guard.steps, []
        self._records.end_step(self.global_step, steps)
        guard.next_batch()
        self._parts.after_step(self.global_step)
        if self.global_step % self._interval == 0 and (scale := self._precision.base.numbers()):
            self._records.run.log_metrics(scale, self.global_step)
        self._progress.show(self.global_step, loss, self._words)

    def _words(self) -> dict[str, str]:
        """For the progress bar; asked only when it is drawn, since reading waits for the device."""
        scale = self.loss_scale
        words = {} if scale is None else {"scale": f"{scale:g}"}
        return {**words, **self._parts.words()}

    # -- beside training ------------------------------------------------------------------------

    def evaluation(self) -> AbstractContextManager[None]:
        """The model in eval mode and high precision (unless `fp8_eval`), without gradients.

        No amax of it reaches the histories of delayed scaling.
        """
        return self._precision.evaluation()

    def as_trained(self) -> AbstractContextManager[None]:
        """Forwards as the coming training step's, save for dropout; no trace in any history.

        Old log-probabilities of a policy computed here equal those of the training forward bit for
        bit while the weights are the same: ratios are exactly 1. In `evaluation` they would be of
        another precision.
        """
        return self._precision.as_trained()

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
        self._closed = True
        if self._end.detach() is not None:
            _finish(self._parts, self._records, self._progress)

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; before the first step of this loop, when the model is loaded.

        Raises:
            ValueError: for a state of another version, or after the first step.
        """
        if self._open:
            raise ValueError(
                "load_state_dict must come before the first step of this loop; make a new"
                " PrecisionLoop"
            )
        check_version(state, STATE_VERSION, "PrecisionLoop state must have version")
        self.global_step = int(state["global_step"])
        self._precision.load_state_dict(state["precision"])
        self._records.load_state_dict(state["records"])
        self._parts.load_state_dict(state)


def _finish(parts: Parts, records: LoopRecords, progress: ProgressLine) -> None:
    progress.close()
    parts.finish()
    records.finish(records.run.step)


def _finish_alone(parts: Parts, records: LoopRecords, progress: ProgressLine) -> None:
    """Other ranks may not come: then what they would have to add is lost."""
    if ranks() == 1:
        _finish(parts, records, progress)
    else:
        progress.close()


def _options(name: str, given: bool | Mapping[str, Any], kind: type[Any]) -> Any:
    """The options of a part; None if there is to be none.

    Raises:
        ValueError: for an option that there is not.
    """
    if not given:
        return None
    try:
        return kind() if given is True else kind(**given)
    except TypeError as error:
        raise ValueError(f"{name} must be a bool or its options, got {given!r}: {error}") from error


def _check_fabric(fabric: Any) -> None:
    plugin: Any = getattr(fabric, "_precision", None)
    if getattr(plugin, "precision", "32-true") != "32-true":
        raise ValueError(
            "fabric must have precision '32-true' beside a PrecisionLoop, which brings its own, got"
            f" {plugin.precision!r}; leave Fabric's precision out, and give base= to the loop"
        )


def _check_steppers(optimizer: Any, scheduler: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be one torch.optim.Optimizer, got {type(optimizer).__name__}; several"
            " optimizers train in a Trainer with manual optimization"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must not be ReduceLROnPlateau, which asks for a metric: leave scheduler out,"
            " and call its step(metric) after your evaluation"
        )
