"""LoopRecords: where a plain loop's run is written down, and who is shown its numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_fp.argument_types import built
from lightning_fp.events import Note
from lightning_fp.layers import Change
from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.rank_group import current_group, is_first, ranks
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.run import write_run
from lightning_fp.records.run_directory import version_of
from lightning_fp.telemetry.loss_files import LossFiles
from lightning_fp.telemetry.run_info import describe_run
from lightning_fp.telemetry.run_telemetry import RunTelemetry
from lightning_fp.telemetry.step_record import OptimizerStep

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Before:
    """Where the run that is resumed wrote, and how far its log had come."""

    directory: str | None = None
    position: int | None = None


class LoopRecords:
    """The records of one run.

    Args:
        precision: the formats and the base.
        dirpath: where to write; None writes nothing. A run that begins where another has left
            records writes to a version below.
        settings: options by class, as plain data.
        interval: length of a log interval in steps.
        device: where collectives run.
    """

    def __init__(
        self,
        precision: LoopPrecision,
        dirpath: str | Path | None,
        settings: Mapping[str, Mapping[str, Any]],
        interval: int,
        device: torch.device,
    ) -> None:
        self.run = RunTelemetry()
        """What is measured."""
        self.log = EventLog(None)
        """What is told."""
        self.directory: Path | None = None
        """Where this process writes; None where it does not."""
        self._precision, self._settings = precision, settings
        self._base = None if dirpath is None else Path(dirpath)
        self._interval, self._device = interval, device
        self._files: LossFiles | None = None
        self._before = _Before()

    def open(self, step: int, model: nn.Module) -> None:
        """Begin to write; on all ranks alike.

        Args:
            step: optimizer steps done.
            model: the model.
        """
        kept = self._before.directory
        found: list[Path | None] = [None]
        if self._base is not None and is_first():
            before = None if kept is None else Path(kept)
            found = [version_of(self._base, before, begins=step == 0, numbered=False)]
        if ranks() > 1:
            group = current_group()
            first = 0 if group is None else dist.get_global_rank(group, 0)
            dist.broadcast_object_list(found, src=first, group=group)
        self.directory = found[0] if is_first() else None
        if self.directory is not None:
            self._write_down(self.directory, step, model)
        self.log = EventLog(
            self.directory,
            show=self.run.show,
            step=step,
            position=self._before.position,
            console=is_first(),
        )
        directories = [] if self.directory is None else [self.directory]
        if self._base is not None:  # on all ranks: the mean of the loss is a collective
            self._files = LossFiles(directories, self._device, interval=self._interval, step=step)
        self._precision.precision_map.subscribe(self._changed, self._note)

    def _write_down(self, directory: Path, step: int, model: nn.Module) -> None:
        try:
            info = describe_run(
                step=step,
                settings=self._settings,
                report=self._precision.report,
                table=self._precision.precision_map,
                model=model,
                device=self._device,
                strategy=type(model).__name__ if ranks() > 1 else "PrecisionLoop",
            )
            write_run(directory, info)
        except Exception:
            log.exception("what this run is cannot be written down; training continues")

    def _changed(self, changes: Sequence[Change]) -> None:
        self.log.changed(self.run.step, changes)

    def _note(self, text: str) -> None:
        self.log.write(Note(step=self.run.step, reason=text))

    def end_step(self, step: int, optimizers: Sequence[OptimizerStep]) -> None:
        """A step is over.

        Args:
            step: optimizer steps done.
            optimizers: what was seen of it.
        """
        table = self._precision.precision_map
        record = self.run.end_step(step, optimizers, table=table, device=self._device)
        if record is not None and self._files is not None:
            self._files.add(record, step)

    def finish(self, step: int) -> None:
        """Write the losses that are left; a collective."""
        files, self._files = self._files, None
        if files is not None:
            files.write(step)

    def state_dict(self) -> dict[str, Any]:
        """Where it writes, and how far the log had come: a resumed run makes void what follows."""
        directory = None if self.directory is None else str(self.directory.absolute())
        return {"directory": directory, "position": self.log.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; before `open`."""
        self._before = built(
            _Before, {"directory": state["directory"], "position": state["position"]}
        )
