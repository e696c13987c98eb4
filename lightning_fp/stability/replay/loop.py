"""What a replay needs of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

from torch import nn

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.replay.parity import Run


class MadeStep(NamedTuple):
    """An optimizer step that was made again."""

    loss: float
    """On this rank; NaN if it was left out or has none."""

    made: bool
    """Whether it was not left out."""


Train: TypeAlias = Callable[[RecordedStep], MadeStep]
"""Trains on the batches of a recorded step."""


class Loop(Protocol):
    """A training loop between two optimizer steps; called alike on all ranks."""

    @property
    def model(self) -> nn.Module:
        """What is trained, with its wrappers."""
        ...

    @property
    def table(self) -> PrecisionMap:
        """The formats of its layers."""
        ...

    @property
    def high(self) -> LinearFormat:
        """The high precision of this run."""
        ...

    @property
    def whole(self) -> bool:
        """Whether layers can only fall back all together."""
        ...

    @property
    def compiled(self) -> bool:
        """Whether any of it runs compiled."""
        ...

    def low(self) -> Sequence[str]:
        """The layers in low precision."""
        ...

    def replay(
        self, step: RecordedStep, *, backward: bool = True, recompute: bool = True
    ) -> Run | None:
        """Runs a step's first micro-batch; None where that is impossible.

        Args:
            step: on the weights of now.
            backward: whether gradients are wanted besides the loss.
            recompute: whether activations may be computed again where memory does not suffice.
        """
        ...

    def training(
        self, formats: Mapping[str, LinearFormat] | None, *, compiled: bool = False
    ) -> AbstractContextManager[Train]:
        """Optimizer steps are made again, with nothing told or logged.

        Afterwards all but the state that `restore` puts back is as it was.

        Args:
            formats: by layer, the others keep theirs; None: each step in those of its time, with
                the scales of its time.
            compiled: whether compiled code runs as in the run; else everything runs eagerly.
        """
        ...

    def recompute(self) -> bool:
        """From here on replays keep of each block its inputs alone, as memory does not suffice.

        Returns:
            Whether that makes a difference; alike on all ranks.
        """
        ...

    def take(self) -> Snapshot:
        """A snapshot of all that a training step may change."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Put such a state back."""
        ...

    def mean(self, value: float) -> float:
        """Over ranks."""
        ...

    def all(self, true: bool) -> bool:
        """Whether it is so on all ranks."""
        ...
