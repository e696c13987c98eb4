"""What watching needs of a training loop, besides what replays need; and what loops share of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.loss_scaling import LossScaling, LossScalingState
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item
from lightning_fp.stability.replay.loop import Loop, MadeStep, Train
from lightning_fp.stability.replay.recompute import Recomputation
from lightning_fp.stability.replay.untouched import Stance, untouched
from lightning_fp.stability.supervise.run_state import RunState


class SupervisedLoop(Loop, Protocol):
    """A training loop whose run is watched; called alike on all ranks."""

    @property
    def state(self) -> RunState:
        """What of it goes into snapshots."""
        ...

    @property
    def recomputation(self) -> Recomputation:
        """Whether blocks compute their activations again, in replays and in the run."""
        ...

    @property
    def base(self) -> LinearFormat:
        """The format of layers that are left alone."""
        ...

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """All there are."""
        ...

    @property
    def loss_scaling(self) -> LossScaling | None:
        """How the loss is scaled, if it is."""
        ...

    @property
    def half(self) -> bool:
        """Whether the base computes in float16 at present."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether the loss scale cannot fall any further; waits for the device."""
        ...

    @property
    def own_gradients(self) -> bool:
        """Whether a step's backward leaves what a replay of its first micro-batch would.

        So it is on one rank, without accumulation, a scaled loss or compiled modules.
        """
        ...

    @property
    def overflowed(self) -> Mapping[int, str]:
        """By the steps of all optimizers before those left out last: the layer at fault."""
        ...

    def unreplayable(self) -> str:
        """Why no step of it can be made again; "" where that can be tried."""
        ...

    def fingerprint(self, wanted: Callable[[Item], bool] = lambda _: True) -> Fingerprint:
        """All that a step can change, as it is now.

        Args:
            wanted: which items to look at.
        """
        ...

    def hooks(
        self, wanted: Callable[[Item], bool]
    ) -> AbstractContextManager[dict[Item, tuple[str, str]]]:
        """See which of the user's hooks changes what.

        Args:
            wanted: whether to watch an item.

        Returns:
            Gives, by item, the first hook that changed it, and its object's class.
        """
        ...


class LossScale(Protocol):
    """What scales the loss of a run."""

    @property
    def config(self) -> LossScaling:
        """How the scale moves."""
        ...

    @property
    def state(self) -> LossScalingState:
        """Where it stands."""
        ...


class WatchedOwner(TableOwner, Protocol):
    """The owner of a table, as the watch asks it."""

    @property
    def scaler(self) -> LossScale | None:
        """What scales the loss, if anything does."""
        ...

    @property
    def half_dtype(self) -> torch.dtype | None:
        """What an FP16 base computes in at present; None for other bases."""
        ...

    def low_layers(self) -> list[str]:
        """The layers in a format below the high precision to fall back to."""
        ...


class TableLoop(ABC):
    """What every `SupervisedLoop` does alike: answers of its table's owner, frames of replays.

    Args:
        owner: of the table of its formats.
    """

    state: RunState

    def __init__(self, owner: WatchedOwner) -> None:
        self._owner = owner
        layers = owner.precision_map.layers.values()
        self.recomputation = Recomputation(lambda: self.model, layers)

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """See `Loop.model`."""

    # -- what the owner of the table says -------------------------------------------------------

    @property
    def table(self) -> PrecisionMap:
        """See `Loop.table`."""
        return self._owner.precision_map

    @property
    def high(self) -> LinearFormat:
        """See `Loop.high`."""
        return self._owner.high_precision

    @property
    def base(self) -> LinearFormat:
        """See `SupervisedLoop.base`."""
        return self._owner.base_format

    @property
    def whole(self) -> bool:
        """See `Loop.whole`."""
        return self._owner.falls_back_whole

    @property
    def loss_scaling(self) -> LossScaling | None:
        """See `SupervisedLoop.loss_scaling`."""
        scaler = self._owner.scaler
        return None if scaler is None else scaler.config

    @property
    def half(self) -> bool:
        """See `SupervisedLoop.half`."""
        return self._owner.half_dtype is torch.float16

    @property
    def stuck(self) -> bool:
        """See `SupervisedLoop.stuck`."""
        scaler = self._owner.scaler
        return scaler is not None and bool(scaler.state.stuck)

    def low(self) -> Sequence[str]:
        """See `Loop.low`."""
        return self._owner.low_layers()

    # -- replays --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _written(self) -> Sequence[object]:
        """What a step may write attributes of, besides the model; see `untouched`."""

    @abstractmethod
    def _making(self) -> AbstractContextManager[Train]:
        """Steps are made in the block, and nobody hears of them."""

    @contextmanager
    def training(
        self, formats: Mapping[str, LinearFormat] | None, *, compiled: bool = False
    ) -> Generator[Train, None, None]:
        """See `Loop.training`; the guard keeps no record."""
        # In the run's own formats no new graph is compiled; in others one is, in an incident.
        stance: Stance = "force_eager"
        if compiled:
            stance = "eager_on_recompile" if formats is None else "default"
        with (
            untouched(self.model, self._written, stance=stance),
            self.recomputation.during(),
            self.table.overridden(formats or {}, recording=compiled and formats is None),
            self._making() as make,
        ):
            if formats is not None:
                yield make
            else:
                yield lambda step: self._as_then(make, step, recording=compiled)

    def _as_then(self, make: Train, step: RecordedStep, *, recording: bool) -> MadeStep:
        """A step in the formats, and with the delayed scales, of its time."""
        table = self.table
        now = table.formats()
        then = {
            name: table.known[format]
            for name, format in step.formats.items()
            if now.get(name, format) != format
        }
        with table.overridden(then, step.scales, recording=recording):
            return make(step)

    def recompute(self) -> bool:
        """See `Loop.recompute`."""
        return self.recomputation.begin()

    # -- state ----------------------------------------------------------------------------------

    def take(self) -> Snapshot:
        """See `Loop.take`."""
        return self.state.take()

    def restore(self, snapshot: Snapshot) -> None:
        """See `Loop.restore`."""
        self.state.restore_weights(snapshot)
