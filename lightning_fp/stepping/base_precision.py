"""The base precision: in which dtype everything but the linear layers' own formats computes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.choices import unknown
from lightning_fp.layers import LinearFormat, PrecisionMap, linear_format
from lightning_fp.stability.loss_scaling import LossScaling
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


class Arithmetic:
    """What stands around a forward: nothing, in float32."""

    input_dtype: torch.dtype | None = None
    """What floating-point inputs are converted to."""

    def convert_module(self, module: Module) -> Module:
        """The model in the dtype that it is trained in; in place."""
        return module

    def init_context(self) -> AbstractContextManager[object]:
        """Around the making of tensors and modules that belong to the model."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[object]:
        """Around a forward and its backward."""
        return nullcontext()


class Autocast(Arithmetic):
    """Mixed precision, of which the dtype can change while the run goes on.

    Args:
        dtype: what autocast computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = "cpu"
        """Set when it is known, see `BasePrecision.place`."""

    @override
    def forward_context(self) -> AbstractContextManager[object]:
        # as Lightning's, without a cache of cast weights
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)


class InBF16(Arithmetic):
    """Weights, inputs and all that is computed in bf16."""

    input_dtype = torch.bfloat16

    @override
    def convert_module(self, module: Module) -> Module:
        return module.to(dtype=torch.bfloat16)

    @override
    def init_context(self) -> AbstractContextManager[object]:
        return default_dtype(torch.bfloat16)

    @override
    def forward_context(self) -> AbstractContextManager[object]:
        return default_dtype(torch.bfloat16)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None, None, None]:
    """New tensors are in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class BasePrecision:
    """A base with the range of float32: nothing to scale, to lend, to check or to follow.

    What FP16 asks for in those places is `FP16Base`, so that no caller has to ask which one it is.

    Args:
        arithmetic: what stands around a forward.
        format: the name of the format of layers that are left alone.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    falls_back_whole = False
    """Whether all layers fall back at once: FP16's range may be at fault between them too."""

    needs_guard = False
    """Whether gradients are looked at before each step, whether or not anybody else asks."""

    def __init__(
        self, arithmetic: Arithmetic, format: str, *, hold_schedulers: bool = True
    ) -> None:
        self.arithmetic = arithmetic
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
        if isinstance(self.arithmetic, Autocast):
            self.arithmetic.device = device_type

    def check(self, module: Module) -> None:
        """Refuse a model that this base cannot train."""

    def check_can_fall_back(self, module: Module) -> None:
        """Refuse a model that cannot leave this base while the run goes on."""

    def connect(self, optimizers: list[Optimizer]) -> None:
        """Hear which optimizers the run has, and refuse those that this base cannot work with."""

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

    def numbers(self) -> dict[str, float]:
        """For the loggers: how the loss scale is."""
        return {}

    def save(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Its part of the plugin's state; what Lightning's own plugins read goes elsewhere.

        Args:
            checkpoint: the Trainer's, which is written to.
        """
        return {} if self._unused_scale is None else {LOSS_SCALE: self._unused_scale}

    def load_loss_scale(self, state: Mapping[str, Any]) -> None:
        """What `save` has saved, or Lightning's own plugin, of a loss scale.

        A base that has no use for it keeps it for the one that the run may come back to.
        """
        self._unused_scale = state


def base_precision(
    name: Base, loss_scaling: LossScaling | None = None, *, hold_schedulers: bool = True
) -> BasePrecision:
    """The base of a name.

    Args:
        name: see `Base`.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.

    Raises:
        ValueError: for a base that needs no loss scale and was given one.
    """
    if name in ("16-mixed", "16-true"):
        from lightning_fp.stepping.fp16_base import FP16Base

        return FP16Base(name, loss_scaling or LossScaling(), hold_schedulers=hold_schedulers)
    if loss_scaling is not None:
        raise ValueError(
            f"loss_scaling must be None unless the base is '16-mixed' or '16-true', got base"
            f" {name!r}: only FP16 needs it"
        )
    if name == "32-true":
        return BasePrecision(Arithmetic(), "fp32", hold_schedulers=hold_schedulers)
    arithmetic = Autocast(torch.bfloat16) if name == "bf16-mixed" else InBF16()
    return BasePrecision(arithmetic, "bf16", hold_schedulers=hold_schedulers)
