"""The base precision: in which dtype everything but the linear layers' own formats computes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.choices import unknown
from lightning_fp.layers import LinearFormat, PrecisionMap, linear_format
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.stepping.loss_scaler import NoScaler
from lightning_fp.stepping.working_copies import WorkingCopies

Base = Literal["bf16-mixed", "bf16-true", "32-true", "16-mixed", "16-true"]

BaseLike = Literal[
    "bf16-mixed", "bf16-true", "32-true", "16-mixed", "16-true", "bf16", "16", "32", 16, 32
]
"""What users may write; the short ones as Lightning's `precision` reads them."""

_SHORT: Mapping[str, str] = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true"}

LOSS_SCALE = "loss_scale"
"""Where the precision plugin's state keeps the loss scale."""


def read_base(base: object) -> Base:
    """The base precision that a user's value stands for.

    >>> read_base("bf16"), read_base(16)
    ('bf16-mixed', '16-mixed')

    Raises:
        ValueError: if there is none, naming those there are.
    """
    name: Any = _SHORT.get(str(base), base)
    if name not in get_args(Base):
        raise unknown("base", base, get_args(Base), aliases=tuple(_SHORT))
    return name


class Autocast(Precision):
    """Lightning's mixed precision, of which the dtype can change while the run goes on.

    Args:
        dtype: what autocast computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = "cpu"
        """Set when it is known, see `BasePrecision.place`."""

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast; as Lightning's, without a cache of cast weights."""
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)


class BasePrecision:
    """A base with the range of float32: nothing to scale, to lend, to check or to follow.

    What FP16 asks for in those places is `FP16Base`, so that no caller has to ask which one it is.

    Args:
        plugin: a plugin of Lightning's kind, for what it does around forward.
        format: the name of the format of layers that are left alone.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    falls_back_whole = False
    """Whether all layers fall back at once: FP16's range may be at fault between them too."""

    def __init__(self, plugin: Precision, format: str, *, hold_schedulers: bool = True) -> None:
        self.plugin = plugin
        self.format = linear_format(format)
        """Of layers that are left alone."""
        self.high_precision = self.format
        """The format to fall back to."""
        self.scaler = NoScaler()
        """Scales the loss."""
        self.copies = WorkingCopies()
        """The weights that are lent to the model for a forward and its backward."""
        self.hold_schedulers = hold_schedulers
        self._unused_scale: Any = None

    def settings(self) -> dict[str, Any]:
        """Its options as plain data."""
        return {"hold_schedulers": self.hold_schedulers}

    # -- setup ----------------------------------------------------------------------------------

    def place(self, device_type: str) -> None:
        """Hear on which kind of device the model is: autocast has to know."""
        if isinstance(self.plugin, Autocast):
            self.plugin.device = device_type

    def check(self, module: Module) -> None:
        """Refuse a model that this base cannot train."""

    def check_can_fall_back(self, module: Module) -> None:
        """Refuse a model that cannot leave this base while the run goes on."""

    def connect(self, optimizers: list[Optimizer]) -> None:
        """Hear which optimizers the run has, and refuse those that this base cannot work with."""

    def guard(self) -> StepGuard | None:
        """The guard that this base needs, whether or not anybody else asks for one."""
        return None

    # -- what the table says --------------------------------------------------------------------

    def is_low(self, format: LinearFormat) -> bool:
        """Whether a format is below the high precision to fall back to."""
        return not format.is_high_precision

    def half_dtype(self, table: PrecisionMap) -> torch.dtype | None:
        """What an FP16 base computes in while the table is as it is; None for other bases."""

    def follow(self, table: PrecisionMap) -> None:
        """Before a forward: compute in what the table says."""

    # -- the run --------------------------------------------------------------------------------

    def lend_again(self, module: Module) -> None:
        """After an optimizer's step in the middle of a training step: the weights as they are."""

    def log(self, trainer: Trainer) -> None:
        """After an optimizer's step: tell the loggers how the loss scale is."""

    def save(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Its part of the plugin's state; what Lightning's own plugins read goes elsewhere.

        Args:
            checkpoint: Lightning's, which is written to.
        """
        return {} if self._unused_scale is None else {LOSS_SCALE: self._unused_scale}

    def load_loss_scale(self, state: Mapping[str, Any]) -> None:
        """What `save` has saved, or Lightning's own plugin, of a loss scale.

        A base that has no use for it keeps it for the one that the run may come back to.
        """
        self._unused_scale = state
