"""What the precision map speaks to: a layer that can change its format and stay itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from lightning_fp.kernels import Kernel, KernelMemory
from lightning_fp.layers.format import LinearFormat

Gathering: TypeAlias = Literal["auto", "high"]
"""How FSDP2 gathers weights: in FP8 where nothing but their cast is used, or as they are."""


@dataclass
class Phase:
    """Whether the model is being evaluated; one object shared by all layers of a table.

    A layer belongs to the table whose phase it has.
    """

    evaluating: bool | None = None
    """What the precision plugin's step contexts say; None leaves it to `module.training`."""

    fp8_eval: bool = False
    """Whether evaluation runs in the layer's format instead of in high precision."""

    left: bool = False
    """Whether layers have left the table, to another one or by `revert`, which it has not seen."""

    all_gather: Gathering = "auto"
    steps: int = 0
    """Of the optimizer so far, where somebody tells the table of them."""

    replaying: bool = False
    """Whether a step is run again, in formats of its own."""

    away: Callable[[], bool] | None = None
    """Asked by training forwards where nobody says the phase: whether somebody trains the model who
    knows of no formats, as a Trainer of another precision. He finds nn.Linear's products."""

    @property
    def gathers_high(self) -> bool:
        """Whether FSDP2 gathers all weights as they are."""
        return self.replaying or self.all_gather == "high"

    def evaluates(self, training: bool) -> bool:
        """Whether a forward now belongs to an evaluation.

        Args:
            training: the layer's `training`, which says where nobody else does.
        """
        return not training if self.evaluating is None else self.evaluating

    def stays_high(self, training: bool) -> bool:
        """Whether a forward now is in high precision, whatever the layer's format."""
        if self.evaluates(training):
            return not self.fp8_eval
        return self.evaluating is None and self.away is not None and self.away()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, made in the middle of a step, is in none."""
        return Phase, (None, self.fp8_eval, False, self.all_gather)


class SwitchableLayer(Protocol):
    """A linear layer whose format can change while it keeps its Parameters and its identity.

    Whether a module is one tells `is_switchable`: from Python 3.12 on `isinstance` does not see
    Parameters.
    """

    fqn: str

    collect: bool
    """Whether this step gathers the full statistics of the operands."""

    record: bool
    """Whether every training step records the operands' amax in `memory`."""

    memory: KernelMemory | None
    """What its kernel keeps of it between calls, delayed scales among it; the kernel makes it."""

    @property
    def in_features(self) -> int:
        """Of the input."""
        ...

    @property
    def out_features(self) -> int:
        """Of the output; of experts those inside."""
        ...

    @property
    def weight(self) -> Tensor:
        """What is multiplied with; of experts one of several."""
        ...

    @property
    def keeps_history(self) -> bool:
        """Whether scales may come from what it saw in earlier steps."""
        ...

    @property
    def format(self) -> LinearFormat:
        """The format the layer multiplies in now."""
        ...

    @property
    def kernel(self) -> Kernel:
        """What multiplies it."""
        ...

    def switch(self, format: LinearFormat, kernel: Kernel) -> None:
        """Multiply in `format` from the next forward on."""
        ...
