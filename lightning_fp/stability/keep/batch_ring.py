"""The last steps' micro-batches in host memory: what a trajectory is replayed with.

A trajectory needs every step since its snapshot, so the ring is without gaps or starts behind the
last one. What is kept is what a step was made from: the batch as the loader gave it, the random
state before anything was done to it, learning rates, formats and delayed scales, the loop's
counters. The step follows from these, transfer hooks and augmentation included. Of token batches
that is little: megabytes, where one snapshot takes gigabytes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.layers.histories.delayed_scales import StepScales
from lightning_fp.stability.keep.host_batch import batch_bytes, host_copy, is_plain_batch
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.state_version import check_version

log = logging.getLogger(__name__)

STATE_VERSION = 1

Hyperparameters = list[list[dict[str, Any]]]
"""By optimizer and parameter group, its plain numbers by name: lr, betas, weight_decay, ..."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One batch as it came from the loader, and what stood how at that moment."""

    batch: Any
    """A copy on the CPU."""

    batch_idx: int

    rng: RandomState
    """Before anything was done to the batch."""

    dataloader_idx: int = 0

    position: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The counters of the training loop, as plain numbers."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return batch_bytes(self.batch) + self.rng.nbytes


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """All that an optimizer step was made from, and what came of it."""

    step: int
    """Optimizer steps done before it."""

    micro_batches: list[MicroBatch] = field(default_factory=list[MicroBatch])
    """In order; several with gradient accumulation."""

    begun_with: Hyperparameters = field(default_factory=list[list[dict[str, Any]]])
    """As they were before the first micro-batch, and any hook."""

    hyperparameters: Hyperparameters = field(default_factory=list[list[dict[str, Any]]])
    """As the optimizers stepped with them."""

    formats: Mapping[str, str] = field(default_factory=dict[str, str])
    """By layer, the name of the format it ran in; empty where that is not known."""

    scales: StepScales | None = None
    """What layers under delayed scaling were scaled with."""

    loss: float | None = None
    """Mean over micro-batches; None while it is not known."""

    grad_norm: float | None = None
    """Before clipping; None while it is not known."""

    skipped: bool = False
    """Whether the optimizers did not step."""


class BatchRing:
    """Records steps and drops the oldest when memory is used up.

    Call `begin`, `add` before each training step, and `end`, for every step: numbers may jump, so
    one that is left out is not noticed. A step that cannot be recorded, since its batches alone are
    larger than the bound, or cannot be copied, is a gap: with it all steps before it are of no use
    any more and are dropped.

    Args:
        max_bytes: bound on host memory, see `nbytes`.
        max_steps: bound on the number of steps; None: only memory counts.
    """

    @checked
    def __init__(self, *, max_bytes: int = 2**30, max_steps: int | None = None) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, got {max_steps}")
        self.max_bytes, self.max_steps = max_bytes, max_steps
        self._waiting: list[Any] = []
        self._warned = False
        self.clear()

    # -- recording ------------------------------------------------------------------------------

    def begin(
        self,
        step: int,
        hyperparameters: Hyperparameters | None = None,
        *,
        formats: Mapping[str, str] | None = None,
        scales: StepScales | None = None,
    ) -> None:
        """A step begins. What was recorded of this and of later steps is dropped.

        Args:
            step: optimizer steps done.
            hyperparameters: see `RecordedStep`.
            formats: see `RecordedStep`; kept as it is.
            scales: see `RecordedStep`.
        """
        if self._open is not None and self._open.step < step:
            self._gap()  # it did not come to its end, and nobody knows what it did
        self.drop_from(step)
        if self._since is None:
            self._since = step
        groups = hyperparameters or []
        self._open = RecordedStep(
            step=step,
            begun_with=groups,
            hyperparameters=groups,
            formats=formats or {},
            scales=scales,
        )

    def add(
        self,
        batch: Any,
        batch_idx: int,
        rng: RandomState,
        *,
        dataloader_idx: int = 0,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy a micro-batch of the step that has begun.

        Args:
            batch: as it comes from the loader; see `host_copy`.
            batch_idx: its index.
            rng: the random state before anything is done to it.
            dataloader_idx: the loader it is from.
            position: where the training loop stands.
        """
        if self._open is None:
            return
        # Counted once and remembered: the copy is not on CUDA, and counted again it would come out
        # without what the allocator of pinned memory rounds up.
        nbytes = batch_bytes(batch) + rng.nbytes
        while self.nbytes + nbytes > self.max_bytes and self._steps:
            self._drop_oldest()
        if self.nbytes + nbytes > self.max_bytes:
            self._gap()
            return
        try:
            copied = host_copy(batch)
        except Exception as error:  # whatever an object may raise that does not want to be copied
            if not self._warned:
                log.warning("batches of this kind cannot be copied and not be replayed: %r", error)
            self._warned = True
            self._gap()
            return
        # `is_initialized`, since asking for a stream would set CUDA up in a run on the CPU.
        if torch.cuda.is_initialized():
            self._waiting.append(torch.cuda.current_stream().record_event())
        micro = MicroBatch(
            batch=copied,
            batch_idx=batch_idx,
            rng=rng,
            dataloader_idx=dataloader_idx,
            position=position or {},
        )
        self._open.micro_batches.append(micro)
        self.nbytes += nbytes
        self._sizes[self._open.step] = self._sizes.get(self._open.step, 0) + nbytes

    def set_formats(self, formats: Mapping[str, str], scales: StepScales | None) -> None:
        """What the step runs in, if that was decided after `begin`."""
        if self._open is not None:
            self._open = replace(self._open, formats=formats, scales=scales)

    def end(
        self,
        hyperparameters: Hyperparameters | None = None,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        skipped: bool = False,
    ) -> None:
        """The step has ended.

        Args:
            hyperparameters: what the optimizers stepped with, where it is not what it was at
                `begin`: a hook may have changed it.
            loss: of the step, where it is known by now; see `set_results`.
            grad_norm: the same.
            skipped: the same.
        """
        if self._open is None:
            return
        groups = self._open.hyperparameters if hyperparameters is None else hyperparameters
        step = replace(
            self._open, hyperparameters=groups, loss=loss, grad_norm=grad_norm, skipped=skipped
        )
        self._steps.append(step)
        self._open = None
        while self.max_steps is not None and len(self._steps) > self.max_steps:
            self._drop_oldest()

    def set_results(
        self,
        step: int,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        skipped: bool = False,
        formats: Mapping[str, str] | None = None,
    ) -> None:
        """What came of a step, where that is known only later; nothing if it is not kept."""
        # Results arrive a step or two late: from the newest back, most steps are never looked at.
        for index in reversed(range(len(self._steps))):
            recorded = self._steps[index]
            if recorded.step == step:
                self._steps[index] = replace(
                    recorded,
                    loss=loss,
                    grad_norm=grad_norm,
                    skipped=skipped,
                    formats=recorded.formats if formats is None else formats,
                )
                return

    # -- reading --------------------------------------------------------------------------------

    def since(self, step: int) -> list[RecordedStep] | None:
        """All steps from `step` on that have ended, without a gap; None if some are not there."""
        if self._since is None or step < self._since:
            return None
        self._synchronize()
        return [recorded for recorded in self._steps if recorded.step >= step]

    def latest(self, count: int) -> list[RecordedStep]:
        """The last steps that have ended, oldest first; fewer if there are not so many."""
        self._synchronize()
        return list(self._steps)[-count:]

    def find(self, step: int) -> RecordedStep | None:
        """One step that has ended; None if it is not kept."""
        self._synchronize()
        return next((recorded for recorded in self._steps if recorded.step == step), None)

    @property
    def first(self) -> RecordedStep | None:
        """The oldest step that is kept."""
        self._synchronize()
        return self._steps[0] if self._steps else None

    @property
    def last(self) -> RecordedStep | None:
        """The last step that has ended."""
        self._synchronize()
        return self._steps[-1] if self._steps else None

    def rates(self) -> list[float]:
        """The learning rate of each step that is kept, of the first group; oldest first."""
        groups = [step.hyperparameters[0][0] for step in self._steps if step.hyperparameters]
        return [float(group["lr"]) for group in groups if "lr" in group]

    # -- dropping -------------------------------------------------------------------------------

    def drop_before(self, step: int) -> None:
        """Forget earlier steps: no snapshot needs them."""
        while self._steps and self._steps[0].step < step:
            self._drop_oldest()

    def drop_from(self, step: int) -> None:
        """Forget this and later steps, as after a rollback to before it."""
        if self._open is not None and self._open.step >= step:
            self._forget(self._open)
            self._open = None
        while self._steps and self._steps[-1].step >= step:
            self._forget(self._steps.pop())
        if self._since is not None and step < self._since:
            self._since = None

    def clear(self) -> None:
        """Forget everything."""
        self._steps: deque[RecordedStep] = deque()
        self._open: RecordedStep | None = None
        self._sizes: dict[int, int] = {}
        self._since: int | None = None
        self.nbytes = 0
        """Bytes of host memory in use: batches, and the random state of each."""

    def _drop_oldest(self) -> None:
        step = self._steps.popleft()
        self._since = step.step + 1
        self._forget(step)

    def _forget(self, step: RecordedStep) -> None:
        self.nbytes -= self._sizes.pop(step.step, 0)

    def _gap(self) -> None:
        """The open step is lost, and so is the use of all before it."""
        assert self._open is not None
        gap = self._open.step
        self.clear()
        self._since = gap + 1  # a trajectory may still begin right after it

    def _synchronize(self) -> None:
        """Wait for the copies from CUDA; a stream works in order, so the last stands for all."""
        for event in self._waiting[-1:]:
            event.synchronize()
        self._waiting.clear()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The steps that have ended, as plain values; their tensors are shared, not copied.

        If batches have anything but tensors, numbers and text in dicts, lists and tuples, none are
        saved, because the checkpoint would not load with `weights_only=True`.
        """
        self._synchronize()
        plain = all(is_plain_batch(m.batch) for step in self._steps for m in step.micro_batches)
        if not plain:
            log.warning(
                "recorded batches are not saved: they have objects that cannot be loaded with"
                " weights_only=True; after a resume the steps before it cannot be replayed"
            )
        return {
            "version": STATE_VERSION,
            "since": self._since if plain else None,
            "steps": [_step_to_state(step) for step in self._steps] if plain else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the steps of a checkpoint; the oldest are dropped if there are too many.

        Raises:
            ValueError: if the state is of a version this package does not know.
        """
        state = check_version(state, STATE_VERSION, "batch ring's state")
        self.clear()
        if any("begun_with" not in step for step in state["steps"]):
            return  # recorded as training steps got them: their way there cannot be replayed
        self._since = state["since"]
        for step in map(_step_from_state, state["steps"]):
            self._steps.append(step)
            self._sizes[step.step] = sum(micro.nbytes for micro in step.micro_batches)
            self.nbytes += self._sizes[step.step]
        bound = len(self._steps) if self.max_steps is None else self.max_steps
        while self._steps and (self.nbytes > self.max_bytes or len(self._steps) > bound):
            self._drop_oldest()


def _step_to_state(step: RecordedStep) -> dict[str, Any]:
    micro_batches = [{**vars(micro), "rng": micro.rng.state_dict()} for micro in step.micro_batches]
    scales = None if step.scales is None else [list(step.scales.layers), step.scales.values]
    formats = dict(step.formats)
    return {**vars(step), "micro_batches": micro_batches, "formats": formats, "scales": scales}


def _step_from_state(state: Mapping[str, Any]) -> RecordedStep:
    micro_batches = [
        MicroBatch(
            batch=_on_cpu(micro["batch"]),
            batch_idx=micro["batch_idx"],
            dataloader_idx=micro["dataloader_idx"],
            rng=RandomState.from_state_dict(micro["rng"]),
            position=micro["position"],
        )
        for micro in state["micro_batches"]
    ]
    values: dict[str, Any] = {**state, "micro_batches": micro_batches}
    if state.get("scales") is not None:
        layers, scales = state["scales"]
        values["scales"] = StepScales(tuple(layers), scales)
    return RecordedStep(**values)


def _on_cpu(batch: Any) -> Any:
    """A checkpoint may have been loaded with `map_location`."""
    if isinstance(batch, Tensor):
        return batch.cpu()
    if isinstance(batch, dict):
        return type(batch)((key, _on_cpu(value)) for key, value in batch.items())
    return type(batch)(map(_on_cpu, batch)) if isinstance(batch, (list, tuple)) else batch
