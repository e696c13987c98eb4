"""TrainingSteps: the steps of a plain loop, with all that goes on around each of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LRScheduler

from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.loop_records import LoopRecords
from lightning_fp.loop.parts import Parts
from lightning_fp.loop.progress_line import ProgressLine
from lightning_fp.loop.steps.optimizer_steps import ComputeLoss, OptimizerSteps, check_loss
from lightning_fp.rank_group import among, is_first, ranks
from lightning_fp.stepping.gradients import calls_closure_itself
from lightning_fp.telemetry.run_telemetry import Logger


class TrainingSteps:
    """Makes one step after the other, from the first on, until it is finished.

    Args:
        precision: the formats and the base.
        steps: forward, backward and the optimizer's step.
        parts: who measures and acts around them.
        records: where is written, and who is shown.
        schedulers: step after each step that was made.
        logger: takes numbers, on the first rank.
        progress: draws.
        interval: length of a log interval in steps.
        device: of the model.
    """

    def __init__(
        self,
        precision: LoopPrecision,
        steps: OptimizerSteps,
        parts: Parts,
        records: LoopRecords,
        *,
        schedulers: Sequence[LRScheduler],
        logger: Logger | None,
        progress: ProgressLine,
        interval: int,
        device: torch.device,
    ) -> None:
        self.done = 0
        """Optimizer steps, those left out among them."""
        self.begun = False
        """Whether there has been a step in this process."""
        self.closed = False
        """Whether there are to be no more."""
        self._precision, self._steps, self._parts, self._records = precision, steps, parts, records
        self._schedulers, self._logger, self._progress = schedulers, logger, progress
        self._interval, self._device = interval, device
        self._in_block: list[Tensor] | None = None
        steps.after_backward.append(parts.after_backward)
        steps.named = self._name_overflow

    # -- a step from a function -----------------------------------------------------------------

    def step(self, compute_loss: ComputeLoss, batch: Any) -> Tensor:
        """See `PrecisionLoop.step`."""
        micro_batches: list[Any] = batch if type(batch) is list else [batch]
        if not micro_batches:
            raise ValueError("batch must not be an empty list; a list is one of micro-batches")
        self._begin(compute_loss, micro_batches[0])
        history = self._precision.precision_map.scale_history
        losses: list[Tensor] = []

        def before(index: int) -> None:
            if not losses:  # in an optimizer's later passes all are known
                self._parts.before_batch(micro_batches[index], index, self.done)

        def forward_backward() -> Tensor:
            history.drop_weight_casts()
            made = self._steps.losses(compute_loss, micro_batches, before=before)
            losses.extend(made if not losses else ())
            return torch.stack(made).sum()

        history.share_weight_casts = len(micro_batches) > 1
        loss = self._steps.step(forward_backward)
        for each in losses:
            self._records.run.recorder.micro_batch(each, len(micro_batches))
        self._end(loss)
        return loss

    # -- a step in a block ----------------------------------------------------------------------

    @contextmanager
    def block(self, batch: Any) -> Generator[None, None, None]:
        """See `PrecisionLoop.training_step`."""
        optimizer = self._steps.optimizer
        if calls_closure_itself(optimizer):
            raise ValueError(
                f"training_step cannot serve {type(optimizer).__name__}, which runs forward"
                " and backward itself; hand them over: loop.step(compute_loss, batch)"
            )
        self._begin(None, batch)
        self._parts.before_batch(batch, 0, self.done)
        optimizer.zero_grad()
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
        self._end(torch.stack(losses).mean())

    def backward(self, loss: Tensor) -> None:
        """See `PrecisionLoop.backward`."""
        if self._in_block is None:
            raise ValueError(
                "backward must be called within `with loop.training_step(batch):`;"
                " loop.step(compute_loss, batch) calls it by itself"
            )
        check_loss(loss)
        self._in_block.append(loss.detach())
        with torch.autocast(self._device.type, enabled=False):
            self._steps.run_backward(loss)
        self._precision.precision_map.phase.evaluating = False  # the block goes on

    # -- around each ----------------------------------------------------------------------------

    def _begin(self, compute_loss: ComputeLoss | None, batch: Any) -> None:
        """Between two steps: all that changes formats does so here."""
        if self.closed:
            raise ValueError("this loop is closed; make another PrecisionLoop")
        if not self.begun:
            self._start()
        self._parts.begin_step(compute_loss, batch, self.done)

    def settle(self) -> None:
        """All that changes weights or formats before the coming step does so now."""
        within_step = self._precision.precision_map.phase.evaluating is False
        if self.closed or within_step:
            return
        if not self.begun:
            self._start()
        self._parts.settle(self.done)

    def _start(self) -> None:
        """Before the first step of this process."""
        self.begun = True
        run = self._records.run
        run.loggers = [self._logger] if self._logger is not None and is_first() else []
        run.step = self.done
        self._records.open(self.done, self._steps.model)
        self._parts.start(self.done)

    def _name_overflow(self) -> None:
        self._steps.guard.name_overflow(self._steps.model, self.done)

    def _end(self, loss: Tensor) -> None:
        guard = self._steps.guard
        self._precision.precision_map.after_step()
        if not self._steps.left_out:
            for scheduler in self._schedulers:
                scheduler.step()
        self.done += 1
        steps, guard.steps = guard.steps, []
        self._records.end_step(self.done, steps)
        guard.next_batch()
        self._parts.after_step(self.done)
        if self.done % self._interval == 0 and (scale := self._precision.base.numbers()):
            self._records.run.log_metrics(scale, self.done)
        self._progress.show(self.done, loss, self._words)

    def _words(self) -> dict[str, str]:
        """For the progress bar; asked only when it is drawn, since reading waits for the device."""
        scaler = self._precision.scaler
        words = {} if scaler is None else {"scale": f"{float(scaler.state.scale):g}"}
        return {**words, **self._parts.words()}


def finish(
    parts: Parts, records: LoopRecords, progress: ProgressLine, group: ProcessGroup | None
) -> None:
    """The run is over; on all ranks alike. It may come when the steps themselves are gone."""
    progress.close()
    with among(group):
        parts.finish()
        records.finish(records.run.step)


def finish_alone(
    parts: Parts, records: LoopRecords, progress: ProgressLine, group: ProcessGroup | None
) -> None:
    """Other ranks may not come: then what they would have to add is lost."""
    with among(group):
        alone = ranks() == 1
    if alone:
        finish(parts, records, progress, group)
    else:
        progress.close()
