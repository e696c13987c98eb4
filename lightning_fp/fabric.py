"""Precision plugins for Lightning Fabric: `Fabric(plugins=FP8Precision("delayed"))`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.types import Optimizable
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.layers import ConversionReport, FormatLike, PrecisionMap
from lightning_fp.layers.backends import BackendLike
from lightning_fp.layers.format import QuantiseLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.layers.switchable import Gathering
from lightning_fp.loop.loop_precision import LoopPrecision, configuration, device_of
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.as_trained import as_trained
from lightning_fp.stepping.base_precision import BaseLike, read_base
from lightning_fp.stepping.gradients import gradient_norm
from lightning_fp.stepping.guard import Guard
from lightning_fp.stepping.scaled_derivatives import hold_scale

__all__ = ["FP8Precision", "FP16Precision"]


class FP8Precision(Precision):
    """Linear layers in FP8, everything else in the base precision, under Fabric.

    `fabric.setup(model)` converts it; `optimizer.step()` leaves out a step whose gradients are inf
    or NaN, and is the boundary at which formats change. `model.eval()` is evaluation, in high
    precision. Use `fabric.backward`, and `fabric.clip_gradients` before the step.

    >>> import lightning as L
    >>> fabric = L.Fabric(accelerator="cpu", devices=1, plugins=FP8Precision("delayed"))
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32))
    >>> model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    >>> fabric.backward(model(torch.randn(16, 32)).square().mean())
    >>> _ = optimizer.step()

    Args:
        scaling: see `lightning_fp.FP8Precision`.
        backend: see there.
        base: see there.
        layers: see there.
        fp8_eval: whether evaluation runs in the layers' formats as well.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        tokens: see `lightning_fp.FP8Precision`.
        quantise_like: see there.
        attention: see there.
        all_gather: see there.
    """

    @checked
    def __init__(
        self,
        scaling: ScalingLike = "dynamic",
        *,
        backend: BackendLike = "auto",
        base: BaseLike = "bf16-mixed",
        layers: Mapping[str, FormatLike] | None = None,
        fp8_eval: bool = False,
        loss_scaling: LossScaling | None = None,
        tokens: float | None = None,
        quantise_like: QuantiseLike | None = None,
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
    ) -> None:
        self.precision: Any = read_base(base)
        self._scaling = scaling
        # What can be refused is refused here, and not only when the model comes.
        configuration(
            scaling,
            layers=layers,
            base=self.precision,
            backend=backend,
            tokens=tokens,
            quantise_like=quantise_like,
        )
        PrecisionMap(attention=attention, all_gather=all_gather)
        self._options: dict[str, Any] = {
            "backend": backend,
            "base": base,
            "layers": layers,
            "fp8_eval": fp8_eval,
            "loss_scaling": loss_scaling,
            "tokens": tokens,
            "quantise_like": quantise_like,
            "attention": attention,
            "all_gather": all_gather,
        }
        self._ours: LoopPrecision | None = None
        self._guard: Guard | None = None

    # -- what one reads -------------------------------------------------------------------------

    @property
    def precision_map(self) -> PrecisionMap:
        """The table of formats; writes are in force after the next optimizer step.

        Raises:
            ValueError: before `fabric.setup`.
        """
        return self._set_up().precision_map

    @property
    def conversion(self) -> ConversionReport | None:
        """What the conversion did; None where the model has no layer to convert."""
        return self._set_up().report

    @property
    def skipped(self) -> int:
        """Optimizer steps that were left out; reading it waits for the device."""
        return 0 if self._guard is None else sum(bool(s.skipped) for s in self._guard.steps)

    def as_trained(self) -> AbstractContextManager[None]:
        """Forwards as the coming training step's, save for dropout; no trace in any history."""
        ours = self._set_up()
        return as_trained(ours.model, ours, ours.base, ours.forward)

    def state_dict(self) -> dict[str, Any]:
        """The table, scales and the loss scale: `fabric.save(path, {"precision": plugin, ...})`."""
        return self._set_up().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`; after `fabric.setup`."""
        self._set_up().load_state_dict(state_dict)

    def _set_up(self) -> LoopPrecision:
        if self._ours is None:
            raise ValueError(f"{type(self).__name__} has no model yet; call fabric.setup(model)")
        return self._ours

    # -- what Fabric calls ----------------------------------------------------------------------

    @override
    def convert_module(self, module: Module) -> Module:
        """Convert the model in place.

        Raises:
            ValueError: for a second model: one plugin has one table.
        """
        if self._ours is not None and self._ours.model is not module:
            raise ValueError(
                f"{type(self).__name__} has a model already, and one table of formats for it; set"
                " several models up as one nn.ModuleDict"
            )
        if self._ours is None:
            self._ours = LoopPrecision(module, self._scaling, **self._options)
            self._guard = Guard(scaler=self._ours.base.scaler)
        return module

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Around the making of tensors: the base's dtype, once there is a model."""
        return super().tensor_init_context()

    @override
    @contextmanager
    def forward_context(self) -> Any:
        """As the base precision; `model.training` says whether layers are in their formats."""
        ours = self._set_up()
        ours.base.place(device_of(ours.model).type)
        trains = ours.model.training and torch.is_grad_enabled()
        if trains:
            ours.precision_map.before_batch()
        with ours.forward(), ours.precision_map.forward_context():
            yield
        if not trains:
            ours.base.copies.take_back()

    @override
    def convert_input(self, data: Any) -> Any:
        """Floating-point inputs as the base takes them."""
        return self._set_up().input(data)

    @override
    def backward(self, tensor: Tensor, model: Module | None, *args: Any, **kwargs: Any) -> None:
        """Backward of the scaled loss."""
        ours = self._set_up()
        if kwargs.get("create_graph") and (told := hold_scale(ours.base.scaler)):
            rank_zero_warn(told)
        with ours.precision_map.attention_context():
            super().backward(ours.base.scaler.scaled(tensor), model, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: Module | None) -> Any:
        """Take in what backward recorded."""
        self._set_up().backward_done()
        return super().post_backward(tensor, module)

    @override
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Before clipping: gradients without the loss scale."""
        self._set_up().base.scaler.unscale(_inner(optimizer))

    @override
    def optimizer_step(self, optimizer: Optimizable, **kwargs: Any) -> Any:
        """The step, or none where gradients are inf or NaN; then formats may change."""
        ours, guard, inner = self._set_up(), self._guard, _inner(optimizer)
        assert guard is not None
        if ours.scaler is not None and inner not in ours.scaler.optimizers:
            ours.connect([*ours.scaler.optimizers, inner])
        closure = kwargs.pop("closure", None) or (lambda: None)
        if guard.passes(inner):
            step: Any = inner.step
            output = step(closure=closure, **kwargs)
        else:
            norm = lambda: gradient_norm(inner)  # noqa: E731
            output = guard.guarded(inner, closure, norm, inside=False, **kwargs)
        guard.next_batch()
        ours.precision_map.step()
        return output


class FP16Precision(FP8Precision):
    """Training in FP16 with a scaled loss and float32 weights, under Fabric.

    Args:
        base: "16-mixed" or "16-true".
        loss_scaling: see `lightning_fp.FP16Precision`.
        layers: see there.
        backend: see there.

    Raises:
        ValueError: for another base.
    """

    @checked
    def __init__(
        self,
        base: BaseLike = "16-mixed",
        *,
        loss_scaling: LossScaling | None = None,
        layers: Mapping[str, FormatLike] | None = None,
        backend: BackendLike = "auto",
    ) -> None:
        if read_base(base) not in ("16-mixed", "16-true"):
            raise ValueError(f"base must be '16-mixed' or '16-true', got {base!r}")
        super().__init__(
            "fp16", base=base, loss_scaling=loss_scaling, layers=layers, backend=backend
        )


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer inside of Fabric's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
