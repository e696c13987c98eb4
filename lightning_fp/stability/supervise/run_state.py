"""The state of a run that a rollback takes back: weights, optimizers, averages, scales.

What counts the run's progress stays: its steps, schedulers, the loaders' position, the random
state. The run goes on with the batches that come next, and so with the learning rates of now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

from lightning_fp.stability.keep.attributes import Attributes
from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stability.keep.snapshot import Part, Snapshot, restore, stated_bytes, take

ATTRIBUTES = "attributes"
SCALES = "scales"
LOSS_SCALE = "loss scale"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What of a run goes into snapshots, and how it comes back; learning rates stay those of now.

    What there is may change in a run, as averages begin: so it is asked for each time.
    """

    weights: Callable[[], Mapping[str, Part]]
    """What an optimizer step and the hooks around it change: the model, averages of it."""

    optimizers: Callable[[], Sequence[Optimizer]]

    owners: Callable[[], Mapping[str, object]]
    """Whose plain attributes a step may change, see `Attributes`."""

    scales: Mapping[str, Part] = field(default_factory=dict[str, Part])
    """Scales of layers and of the loss."""

    single: bool = True
    """Whether this process has all of the state."""

    def _weights(self, attributes: Attributes | None = None) -> dict[str, Part]:
        optimizers = {f"optimizer {index}": each for index, each in enumerate(self.optimizers())}
        plain = Attributes(self.owners()) if attributes is None else attributes
        return {**self.weights(), **optimizers, ATTRIBUTES: plain}

    def parts(self) -> dict[str, Part]:
        """What a snapshot is of."""
        return {**self._weights(), **self.scales}

    def stated_bytes(self) -> int:
        """What one snapshot takes once the optimizers have stepped."""
        return stated_bytes(self.parts(), stepped=True)

    def take(self) -> Snapshot:
        """A snapshot of the state now, less the scales."""
        return take(self._weights())

    def restore_weights(self, snapshot: Snapshot) -> None:
        """Weights, optimizers, averages and plain attributes, with the learning rates of now."""
        self._restore(snapshot, self._weights())

    def go_back(self, snapshot: Snapshot) -> None:
        """The run goes on from a snapshot: what counts steps stays as it is."""
        attributes = Attributes(self.owners())
        attributes.numbers = False
        self._restore(snapshot, self._weights(attributes))

    def _restore(self, snapshot: Snapshot, parts: Mapping[str, Part]) -> None:
        optimizers = self.optimizers()
        now = [hyperparameters(optimizer) for optimizer in optimizers]
        there = [name for name in parts if name in snapshot.trees]  # averages may have come later
        restore(snapshot, parts, only=there)
        for optimizer, groups in zip(optimizers, now, strict=True):
            set_hyperparameters(optimizer, groups)

    def restore_scales(self, snapshot: Snapshot) -> None:
        """The loss scale of a snapshot, and amax histories for the layers that have one now."""
        restore(snapshot, self.scales)
