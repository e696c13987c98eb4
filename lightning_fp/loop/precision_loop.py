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
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fp.choices import check_at_least
from lightning_fp.layers import ConversionReport, FormatLike, PrecisionMap
from lightning_fp.layers.backends import BackendLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.loop.loop_precision import LoopPrecision, device_of
from lightning_fp.loop.loop_records import LoopRecords
from lightning_fp.loop.optimizer_steps import ComputeLoss, OptimizerSteps, check_loss
from lightning_fp.loop.progress_line import ProgressLine
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.state_version import check_version
from lightning_fp.stepping.base_precision import BaseLike
from lightning_fp.stepping.gradients import calls_closure_itself
from lightning_fp.telemetry.casts.cast_log import CastLog, CastOptions
from lightning_fp.telemetry.over_ranks import is_first, ranks
from lightning_fp.telemetry.run_telemetry import Logger

log = logging.getLogger(__name__)

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
        optimizer: of its Parameters.
        scaling: "dynamic", "delayed", and all else that `FP8Precision` takes; "fp16" with base
            "16-mixed" for FP16, "bf16" for a run to compare with.
        layers: `{pattern: format}`, first match wins, as in `FP8Precision`.
        base: the precision of everything else: "bf16-mixed", "bf16-true", "32-true", "16-mixed",
            "16-true".
        scheduler: steps after each step that was made; it waits where one is left out.
        clip_norm: largest norm of all gradients together; None clips nothing.
        monitor: whether to measure what formats do to the numbers, as `ClampMonitor` does; or its
            options, `{"every_n_steps": 8}`.
        dirpath: where records go, for `lightning-fp report`; None writes nothing.
        logger: called with numbers by name and the step, for W&B, TensorBoard, a file; not on other
            ranks.
        log_every_n_steps: length of a log interval.
        max_steps: of the whole run, where anything asks for its length.
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
        monitor: bool | Mapping[str, Any] = True,
        dirpath: str | Path | None = None,
        logger: Logger | None = None,
        log_every_n_steps: int = 50,
        max_steps: int | None = None,
        progress: bool | None = None,
        loss_scaling: LossScaling | None = None,
        backend: BackendLike = "auto",
        fp8_eval: bool = False,
        tokens: float | None = None,
        example_input: Any = None,
    ) -> None:
        check_at_least(1, log_every_n_steps=log_every_n_steps, max_steps=max_steps)
        _check_scheduler(scheduler)
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
        options = _options("monitor", monitor, CastOptions)
        self._casts = None if options is None else CastLog(options, "the monitor")
        self._records = LoopRecords(
            self._precision, dirpath, self._settings(), log_every_n_steps, self._device
        )
        self._logger = logger
        self._progress = ProgressLine(progress if is_first() else False, max_steps)
        self._open = self._closed = False
        self._in_block: list[Tensor] | None = None
        self._steps.after_backward.append(self._after_backward)
        self._steps.named = self._name_overflow
        parts = self._casts, self._records, self._progress
        # At the end of the program too, where nobody has called `close`.
        self._end = weakref.finalize(self, _finish_alone, *parts)

    def _settings(self) -> dict[str, dict[str, Any]]:
        found = {
            "PrecisionLoop": {**self._precision.settings(), "clip_norm": self._steps.clip_norm}
        }
        if self._casts is not None:
            found["ClampMonitor"] = self._casts.options.settings()
        return found

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
        self._begin(micro_batches)
        losses: list[Tensor] = []

        def forward_backward() -> Tensor:
            self.precision_map.scale_history.drop_weight_casts()
            made = self._steps.losses(compute_loss, micro_batches)
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
        self._begin([batch])
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

    def _begin(self, micro_batches: list[Any]) -> None:
        """Between two steps: all that changes formats does so here."""
        if self._closed:
            raise ValueError("this loop is closed; make another PrecisionLoop")
        if not self._open:
            self._start()
        self._records.run.recorder.begin(self.global_step)
        self._records.run.signals.arrive()
        if self._casts is not None:
            self._casts.before_batch(self.global_step)
        self._precision.boundary()

    def _start(self) -> None:
        """Before the first step of this process."""
        self._open = True
        run = self._records.run
        run.loggers = [self._logger] if self._logger is not None and is_first() else []
        run.step = self.global_step
        self._records.open(self.global_step, self.model)
        if is_first() and self.conversion is not None:
            log.info("%s", self.conversion.screen(f"PrecisionLoop ({self._precision.name})"))
        if self._casts is not None:
            self._casts.open(
                self._precision,
                run,
                self._records.directory,
                step=self.global_step,
                interval=self._interval,
                device=self._device,
            )

    def _after_backward(self) -> None:
        if self._casts is not None:
            self._casts.after_backward()

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
        if self._casts is not None and self._casts.after_batch(self.global_step):
            self._casts.tell(self.global_step)
        if self.global_step % self._interval == 0 and (scale := self._precision.base.numbers()):
            self._records.run.log_metrics(scale, self.global_step)
        self._progress.show(self.global_step, loss, self._words)

    def _words(self) -> dict[str, str]:
        """For the progress bar; asked only when it is drawn, since reading waits for the device."""
        scale = self.loss_scale
        return {} if scale is None else {"scale": f"{scale:g}"}

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
            _finish(self._casts, self._records, self._progress)

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
            "monitor": None if self._casts is None else self._casts.state_dict(),
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
        if self._casts is not None and state["monitor"] is not None:
            self._casts.load_state_dict(state["monitor"])


def _finish(casts: CastLog | None, records: LoopRecords, progress: ProgressLine) -> None:
    progress.close()
    step = records.run.step
    if casts is not None:
        casts.finish(step)
        casts.let_go()
    records.finish(step)


def _finish_alone(casts: CastLog | None, records: LoopRecords, progress: ProgressLine) -> None:
    """Other ranks may not come: then what they would have to add is lost."""
    if ranks() == 1:
        _finish(casts, records, progress)
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


def _check_scheduler(scheduler: Any) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must not be ReduceLROnPlateau, which asks for a metric: leave scheduler out,"
            " and call its step(metric) after your evaluation"
        )
