"""What watching needs of a training loop, besides what replays need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch.optim import Optimizer

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.replay.fingerprint import Fingerprint, Item
from lightning_fp.stability.replay.loop import Loop
from lightning_fp.stability.supervise.run_state import RunState


class SupervisedLoop(Loop, Protocol):
    """A training loop whose run is watched; called alike on all ranks."""

    @property
    def state(self) -> RunState:
        """What of it goes into snapshots."""
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
