"""StabilityLog: signals of every step, on the board, for the loggers and in a table.

They stay on the device until the log interval ends; then one copy brings all steps to the host.
What is measured changes nothing in the run: no number, no format, no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.rank_group import current_group, ranks
from lightning_fp.records.stability import StabilityWriter
from lightning_fp.telemetry.failsafe import Failsafe
from lightning_fp.telemetry.over_ranks import any_rank
from lightning_fp.telemetry.run_telemetry import RunTelemetry
from lightning_fp.telemetry.stability.attention_logits import AttentionLogits
from lightning_fp.telemetry.stability.forward_signals import ForwardSignals, head_of
from lightning_fp.telemetry.stability.signals import NAMES, PREFIX, SIGNALS
from lightning_fp.telemetry.stability.step_values import StepValues
from lightning_fp.telemetry.stability.update_signals import UpdateSignals
from lightning_fp.telemetry.step_record import StepRecord

_RECORD = ("loss", "grad_norm")


@checked
@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """What is measured.

    Raises:
        ValueError: for an option out of range.
    """

    head: str | None = None
    """Name of the layer whose output is the logits; None: the last linear layer."""

    attention: bool = True
    """Whether to look at the logits of `F.scaled_dot_product_attention`."""

    log_every_n_steps: int | None = None
    """Length of a log interval; None takes the loop's."""

    def __post_init__(self) -> None:
        check_at_least(1, log_every_n_steps=self.log_every_n_steps)

    def settings(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One step, its numbers on the device."""

    step: int
    lr: float | None
    values: Tensor
    """float32 [loss, grad_norm, signals]."""


class StabilityLog(Failsafe):
    """Measures, publishes and writes down; a failure in here harms no run.

    Args:
        options: what is measured.
        name: who it is, for the message of a failure.
    """

    def __init__(self, options: StabilityOptions, name: str) -> None:
        super().__init__(name, "signals")
        self.options = options
        self._values = StepValues()
        self._rows: list[_Row] = []
        self._forward: ForwardSignals | None = None
        self._updates: UpdateSignals | None = None
        self._attention: AttentionLogits | None = None
        self._entered = False
        self._writer: StabilityWriter | None = None
        self._run: RunTelemetry | None = None
        self._replays: Callable[[], bool] = bool
        self._compiled: Callable[[], bool] = bool
        self._device = torch.device("cpu")
        self._logged_at, self._interval, self._kept = 0, 1, 0

    def check(self, model: nn.Module) -> None:
        """Refuse a head that the model has not.

        Raises:
            ValueError: naming it.
        """
        head_of(model, self.options.head)

    def open(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        run: RunTelemetry,
        directory: Path | None,
        *,
        replays: Callable[[], bool],
        compiled: Callable[[], bool],
        step: int,
        interval: int,
        device: torch.device,
    ) -> None:
        """Watch model and optimizers from here on.

        Args:
            model: the model.
            optimizers: all of them.
            run: where measurements are published and shown.
            directory: where rows go; None where this rank writes nothing.
            replays: whether what runs at this moment is a replay.
            compiled: whether the coming forward is compiled code, which hides its attention.
            step: optimizer steps done.
            interval: the loop's log interval in steps; 0 where it has none.
            device: where collectives run.
        """
        self._interval = self.options.log_every_n_steps or interval or 50
        self._run, self._device = run, device
        self._replays, self._compiled = replays, compiled
        self._logged_at, self._kept, self.failed = step, step, False
        self._safely(self._open, model, optimizers, directory, step)

    def _open(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        directory: Path | None,
        step: int,
    ) -> None:
        self._forward = ForwardSignals(model, self.options.head, self._values, self._active)
        self._updates = UpdateSignals(optimizers, self._values, self._active)
        if self.options.attention:
            self._attention = AttentionLogits(self._saw_attention)
        if directory is not None:
            self._writer = StabilityWriter(directory, step=step)

    def _active(self) -> bool:
        return not (self.failed or self._replays())

    def _saw_attention(self, largest: Tensor) -> None:
        if self._active():
            self._values.add("attention_logit_max", largest)

    # -- steps ----------------------------------------------------------------------------------

    def before_batch(self, step: int) -> None:
        """A micro-batch's forward comes next.

        Args:
            step: optimizer steps done.
        """
        if step < self._kept:
            self._safely(self._rewind_to, step)
        self.leave()
        attention = self._attention
        if attention is None or self._entered or self.failed or self._compiled():
            return
        attention.__enter__()
        self._entered = True

    def leave(self) -> None:
        """The forward is over, well or not."""
        # Where somebody has entered a mode of his own since, it is to be left first.
        attention = self._attention
        if self._entered and attention is not None and _get_current_function_mode() is attention:
            self._entered = False
            attention.__exit__(None, None, None)

    def _rewind_to(self, step: int) -> None:
        """Where the run was rolled back, so are its records."""
        self._rows = [row for row in self._rows if row.step <= step]
        self._logged_at, self._kept = min(self._logged_at, step), step
        if self._updates is not None:
            self._updates.forget()
        if self._writer is not None:
            self._writer.rewind(step)

    def after_batch(self, step: int) -> bool:
        """A micro-batch is over.

        Args:
            step: optimizer steps done.

        Returns:
            Whether the log interval is over, and `tell` is due.
        """
        self.leave()
        run = self._run
        record = None if run is None else run.last
        if record is not None and record.step >= self._kept:  # else one that is kept already
            self._kept = record.step + 1
            self._safely(self._keep, record)
        return step // self._interval > self._logged_at // self._interval

    def _keep(self, record: StepRecord) -> None:
        own = [record.loss, record.grad_norm]
        nothing = torch.full((), torch.nan, device=self._device)
        seen = [nothing if each is None else each.detach().float() for each in own]
        values = torch.cat(
            [torch.stack([each.to(self._device) for each in seen]), self._values.take(self._device)]
        )
        self._rows.append(_Row(step=record.step + 1, lr=record.lr, values=values))

    # -- log intervals --------------------------------------------------------------------------

    def tell(self, step: int) -> None:
        """Publish and write the steps of the interval; on all ranks, or none.

        Args:
            step: optimizer steps done.
        """
        if self._run is None:
            return
        self._logged_at = step
        if any_rank(self.failed, self._device):
            self.close()
        else:
            self._safely(self._tell, self._run)

    def _tell(self, run: RunTelemetry) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        table = over_ranks(torch.stack([row.values for row in rows]))
        numbers = table.tolist()  # the one copy of the interval
        for row, (_, _, *signals) in zip(rows, numbers, strict=True):
            shown = {PREFIX + name: value for name, value in zip(NAMES, signals, strict=True)}
            run.show(shown, row.step)
        if self._writer is not None:
            columns = dict(zip((*_RECORD, *NAMES), zip(*numbers, strict=True), strict=True))
            lr = [math.nan if row.lr is None else row.lr for row in rows]
            self._writer.append({"step": [row.step for row in rows], "lr": lr, **columns})

    # -- the end --------------------------------------------------------------------------------

    def finish(self, step: int, *, alone: bool = True) -> None:
        """Tell what is left, and let go.

        Args:
            step: optimizer steps done.
            alone: whether all ranks come here; what others have is lost where they do not.
        """
        if alone and self._rows:
            self.tell(step)
        self.close()

    def close(self) -> None:
        """Measure no more, and write out what was measured."""
        self.leave()
        self._run, self._attention = None, None
        for watching in (self._forward, self._updates):
            if watching is not None:
                watching.close()
        self._forward = self._updates = None
        writer, self._writer = self._writer, None
        if writer is not None:
            self._even_so(writer.flush)


def over_ranks(table: Tensor) -> Tensor:
    """Each number over all ranks that have it; two collectives.

    Args:
        table: float32 [steps, loss and gradient norm and signals]; NaN where there is none.
    """
    if ranks() == 1:
        return table
    there = ~table.isnan()
    filled = torch.where(there, table, 0.0)
    sums = torch.stack([filled, there.float()])
    dist.all_reduce(sums, group=current_group())
    largest = torch.where(there, table, -torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=current_group())
    takes_max = torch.tensor(
        [False, False, *(signal.combine == "max" for signal in SIGNALS)], device=table.device
    )
    found = torch.where(takes_max, largest, sums[0] / sums[1])
    return torch.where(sums[1] > 0, found, torch.nan)
