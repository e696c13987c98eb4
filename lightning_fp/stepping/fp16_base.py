"""FP16 as a base precision, and bf16 in its place: of which kind can change in mid-run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.nn.modules.rnn import RNNBase
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.layers import LinearFormat, PrecisionMap, linear_format
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.base_precision import (
    LOSS_SCALE,
    Arithmetic,
    Autocast,
    BasePrecision,
    default_dtype,
)
from lightning_fp.stepping.half_checks import (
    check_optimizers,
    check_sharding,
    check_switchable,
    check_weights,
)
from lightning_fp.stepping.loss_scaler import LossScaler
from lightning_fp.stepping.working_copies import WorkingCopies


class LentCopies(Arithmetic):
    """Everything computes in 16 bits, with copies of float32 weights.

    Args:
        dtype: of the copies and of what is computed.
        copies: lends them.
    """

    def __init__(self, dtype: torch.dtype, copies: WorkingCopies) -> None:
        self.dtype = dtype
        self.copies = copies
        self.module: Module | None = None

    @override
    def convert_module(self, module: Module) -> Module:
        """The module stays in float32.

        Raises:
            ValueError: for recurrent layers, which hold on to their weights.
        """
        recurrent = [name for name, child in module.named_modules() if isinstance(child, RNNBase)]
        if recurrent:
            raise ValueError(
                "base must not be '16-true' for a model with recurrent layers, which keep their"
                f" weights in places of their own (got {', '.join(recurrent[:3])}); take"
                " '16-mixed'"
            )
        self.module = module
        return module

    @property
    @override
    def input_dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.dtype

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """New tensors are in 16 bits, and so are the weights until `copies.take_back`."""
        if self.module is not None:
            self.copies.lend(self.module, self.dtype)
        with default_dtype(self.dtype):
            yield


class FP16Base(BasePrecision):
    """FP16 with a scaled loss over float32 weights; bf16 while all layers have fallen there.

    The dtype follows the table, so a write to the table, a replay in other formats and a
    checkpoint all bring the base along.

    Args:
        name: "16-mixed", autocast, or "16-true", copies of the weights.
        loss_scaling: how the loss scale moves.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    arithmetic: Autocast | LentCopies
    falls_back_whole = True
    needs_guard = True

    def __init__(
        self,
        name: Literal["16-mixed", "16-true"],
        loss_scaling: LossScaling,
        *,
        hold_schedulers: bool,
    ) -> None:
        super().__init__(Autocast(torch.float16), "fp16", hold_schedulers=hold_schedulers)
        if name == "16-true":
            self.arithmetic = LentCopies(torch.float16, self.copies)
        self.high_precision = linear_format("bf16")
        self.scaler = LossScaler(loss_scaling)
        self._name = name

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "loss_scaling": asdict(self.scaler.config)}

    # -- setup ----------------------------------------------------------------------------------

    @override
    def check(self, module: Module) -> None:
        check_weights(module)
        check_sharding(module, self._name)

    @override
    def check_can_fall_back(self, module: Module) -> None:
        check_switchable(module)

    @override
    def connect(self, optimizers: list[Optimizer]) -> None:
        check_optimizers(optimizers)
        self.scaler.optimizers = optimizers

    # -- what the table says --------------------------------------------------------------------

    @override
    def is_low(self, format: LinearFormat) -> bool:
        return format.input == "fp16" or not format.is_high_precision

    @override
    def half_dtype(self, table: PrecisionMap) -> torch.dtype:
        formats = [layer.format for layer in table.layers.values()]
        fallen = any(format.input == "bf16" for format in formats)
        low = any(map(self.is_low, formats))
        return torch.bfloat16 if fallen and not low else torch.float16

    @override
    def follow(self, table: PrecisionMap) -> None:
        self.arithmetic.dtype = self.half_dtype(table)
        active = self.arithmetic.dtype is torch.float16
        if active and not self.scaler.active and not table.frozen:
            self.scaler.restart()  # back in FP16 the loss scale begins anew
        self.scaler.active = active

    # -- the run --------------------------------------------------------------------------------

    @override
    def lend_again(self, module: Module) -> None:
        if self.copies.lent:
            self.copies.lend(module, self.arithmetic.dtype)

    @override
    def numbers(self) -> dict[str, float]:
        now = self.scaler.state.numbers()
        return {
            "fp16/loss_scale": now["scale"] if self.scaler.active else 1.0,
            "fp16/skipped_steps": float(now["skipped"]),
            "fp16/effective_steps": float(now["made"]),
        }

    @override
    def save(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        checkpoint["MixedPrecision"] = self.scaler.grad_scaler_state()  # for Lightning's own
        return {LOSS_SCALE: self.scaler.state_dict()}

    @override
    def load_loss_scale(self, state: Mapping[str, Any]) -> None:
        self.scaler.load_state_dict(state)
