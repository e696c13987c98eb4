"""LayerPrecision: a precision plugin that owns the table of formats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, cast, get_args

import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.kernels.hardware import cuda_has_fp8
from lightning_fp.layers import (
    AutoScaling,
    Backend,
    Conversion,
    ConversionReport,
    FormatLike,
    LinearFormat,
    PrecisionMap,
    SwitchableLayer,
    convert_into,
    kernel_for,
    linear_format,
)
from lightning_fp.layers.conversion.flops import example_flops
from lightning_fp.layers.linear import is_plain_linear, is_switchable_linear
from lightning_fp.layers.rules import layer_rules
from lightning_fp.layers.transformer_engine.setup import check_device
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins.base_precision import Base, base_plugin
from lightning_fp.plugins.fp16_base import HalfMixed, HalfTrue
from lightning_fp.plugins.guarded import GuardedPrecision
from lightning_fp.plugins.half_checks import check_optimizers, check_sharding, check_weights
from lightning_fp.plugins.loss_scaler import LossScaler
from lightning_fp.plugins.strategies import refuse_strategy
from lightning_fp.stability.loss_scaling import LossScaling

STATE_KEY = "lightning_fp.precision"
"""Where a checkpoint keeps the plugin's state, whatever the plugin's class."""

LOSS_SCALE = "loss_scale"
"""Where the plugin's state keeps the loss scale."""


class LayerPrecision(GuardedPrecision):
    """Linear layers in formats of their own, everything else in the base precision.

    What the plugins of this package share; a user takes one of them.

    Args:
        format: of the layers that no rule names.
        base: the precision of everything else, as Lightning's own plugins define it.
        backend: which kernels to use.
        layers: `{pattern: format}`, first match wins.
        fp8_eval: whether validation, test and prediction run in the layers' formats as well.
        delayed: how delayed scales follow from their history.
        auto: when layers move between dynamic and delayed scaling by themselves; None: never.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
        empty: whether a model without a linear layer will do.

    Raises:
        ValueError: for an unknown option, or a format that the backend cannot run.
    """

    precision: Base  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        format: LinearFormat,
        *,
        base: Base,
        backend: Backend = "auto",
        layers: Mapping[str, FormatLike] | None = None,
        fp8_eval: bool = False,
        delayed: DelayedScaling | None = None,
        auto: AutoScaling | None = None,
        loss_scaling: LossScaling | None = None,
        hold_schedulers: bool = True,
        empty: bool = False,
    ) -> None:
        if base not in get_args(Base):
            raise ValueError(f"base must be one of {', '.join(get_args(Base))}, got {base!r}")
        half = base in ("16-mixed", "16-true")
        if loss_scaling is not None and not half:
            raise ValueError(
                f"loss_scaling must be None unless the base is '16-mixed' or '16-true', got base"
                f" {base!r}: only FP16 needs it"
            )
        self.precision = base
        self._format = format
        self._rules = layer_rules(layers)
        self._backend: Backend = backend
        for each in (self._format, *(rule.format for rule in self._rules)):
            kernel_for(each, backend, cuda_fp8=False)  # refuses what the backend cannot run
        self.precision_map = PrecisionMap(
            backend=backend, fp8_eval=fp8_eval, delayed=delayed, auto=auto
        )
        """The table of formats: read it, write to it."""
        self.report: ConversionReport | None = None
        """What the conversion did; None before setup."""
        scaler = LossScaler(loss_scaling or LossScaling()) if half else None
        super().__init__(base_plugin(base), scaler, hold_schedulers=hold_schedulers)
        self._empty = empty
        self._carried: dict[str, Any] = {}
        self._mid_accumulation = False
        self._in_train_step = False
        self._logged = -1

    def settings(self) -> dict[str, Any]:
        """The options as plain data, for the records of a run."""
        return {
            "format": self._format.name,
            "base": self.precision,
            "backend": self._backend,
            "layers": {rule.pattern: rule.format.name for rule in self._rules},
            "fp8_eval": self.precision_map.phase.fp8_eval,
            "hold_schedulers": self._hold_schedulers,
            **({} if self.scaler is None else {"loss_scaling": asdict(self.scaler.config)}),
        }

    # -- what the table says --------------------------------------------------------------------

    @property
    def base_format(self) -> LinearFormat:
        """The format of layers that are left alone: the base's."""
        if self.scaler is not None:
            return linear_format("fp16")
        return linear_format("fp32" if self.precision == "32-true" else "bf16")

    @property
    def high_precision(self) -> LinearFormat:
        """The format to fall back to: the base's, or bf16 where the base is FP16."""
        return linear_format("bf16") if self.scaler is not None else self.base_format

    @property
    def falls_back_whole(self) -> bool:
        """Whether all layers fall back at once: FP16's range may be at fault between them too."""
        return self.scaler is not None

    def low_layers(self) -> list[str]:
        """The layers in a format below the high precision to fall back to."""
        return [name for name, layer in self.precision_map.layers.items() if self._low(layer)]

    def _low(self, layer: SwitchableLayer) -> bool:
        format = layer.format
        half = self.scaler is not None and format.input == "fp16"
        return half or not format.is_high_precision

    @property
    def half_dtype(self) -> torch.dtype | None:
        """What the base computes in at present: float16, or bfloat16 while all layers are there.

        None where the base is not FP16. It follows the table, so a write to the table, a replay
        in other formats and a checkpoint all bring the base along.
        """
        if self.scaler is None:
            return None
        layers = self.precision_map.layers.values()
        fallen = any(layer.format.input == "bf16" for layer in layers)
        low = any(map(self._low, layers))
        return torch.bfloat16 if fallen and not low else torch.float16

    # -- setup ----------------------------------------------------------------------------------

    @override
    def convert_module(self, module: Module) -> Module:
        """Convert the model in place; Lightning calls this again for validate, test, predict."""
        strategy = _strategy_of(module)
        if strategy is not None:
            refuse_strategy(strategy, type(self).__name__)
            if self._backend == "transformer-engine":
                check_device(strategy.root_device.type)
            if isinstance(self._base, (MixedPrecision, HalfMixed)):
                self._base.device = strategy.root_device.type
        if self.scaler is not None:
            check_weights(module)
            check_sharding(module, self.precision)
        module = self._base.convert_module(module)
        if self.precision_map.model is not module:
            cuda_fp8 = cuda_has_fp8() and (strategy is None or strategy.root_device.type == "cuda")
            self.precision_map.cuda_fp8 = cuda_fp8
            conversion = Conversion(
                format=self._format,
                rules=self._rules,
                backend=self._backend,
                high_precision=self.base_format,
                cuda_fp8=cuda_fp8,
            )
            if self._empty and not any(map(_is_linear, module.modules())):
                self.precision_map.fill(module, {}, {})
            else:
                self.report = convert_into(self.precision_map, module, conversion)
        return module

    @override
    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Measure FLOPs where the module has an example input, and say what runs."""
        module = self.precision_map.model
        if self.scaler is not None:
            check_optimizers(optimizers)
            self.scaler.optimizers = optimizers
        self._share_weight_casts(module)
        example = getattr(module, "example_input_array", None)
        sharded = module is not None and any(isinstance(m, FSDPModule) for m in module.modules())
        if self.report is not None and module is not None:
            if example is not None and not sharded and not self.report.measured:
                with self.forward_context():
                    self.report = self.report.with_flops(example_flops(module, example))
                self._take_back()
            if optimizers:
                rank_zero_info(f"{type(self).__name__} ({self.precision}): {self.report.summary()}")
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        """Outside of the Trainer `module.training` decides about evaluation again."""
        self.precision_map.phase.evaluating = None
        self._mid_accumulation = self._in_train_step = False
        self._take_back()

    # -- the base precision ---------------------------------------------------------------------

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """As the base precision: autocast, or the default dtype, or nothing."""
        self._follow_table()
        return self._base.forward_context()

    @override
    def convert_input(self, data: Any) -> Any:
        """As the base precision."""
        self._follow_table()
        return self._base.convert_input(data)

    def _follow_table(self) -> None:
        """An FP16 base computes in what the table says; back in FP16 the loss scale begins anew."""
        dtype = self.half_dtype
        if self.scaler is None or dtype is None:
            return
        active = dtype is torch.float16
        if active and not self.scaler.active and not self.precision_map.frozen:
            self.scaler.restart()
        self.scaler.active = active
        if isinstance(self._base, (HalfMixed, HalfTrue)):
            self._base.dtype = dtype

    def _take_back(self) -> None:
        """The weights are float32 again where they were lent in 16 bits."""
        if isinstance(self._base, HalfTrue):
            self._base.copies.take_back()

    # -- steps ----------------------------------------------------------------------------------

    @override
    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """A training forward runs in the layers' formats, frozen submodules in eval mode too."""
        if not self._mid_accumulation:
            self.precision_map.apply()
        trainer: Any = getattr(self.precision_map.model, "_trainer", None)
        guard = None if trainer is None or self.precision_map.frozen else self.guard
        if guard is not None and trainer is not None:
            guard.begin(trainer)
        phase = self.precision_map.phase
        phase.evaluating, self._in_train_step = False, True
        try:
            with self.forward_context(), self._step_context():
                yield
        except BaseException:
            self._take_back()
            raise
        finally:
            self._in_train_step = False
            if guard is not None and trainer is not None:
                guard.end_training_step(trainer)
            if not self._automatic:
                phase.evaluating = None
                self._take_back()
            # In automatic optimization backward follows, and checkpointing runs forward again in
            # it: it must find the same phase and weights. `backward`, `post_backward` end that.

    @property
    def _automatic(self) -> bool:
        return getattr(self.precision_map.model, "automatic_optimization", True)

    @override
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tensor: Tensor,
        model: LightningModule,
        optimizer: Steppable | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Backward of the scaled loss; hooks have seen the loss itself."""
        if self.scaler is not None and self.scaler.active:
            self.scaler.before_backward()
            tensor = self.scaler.scale(tensor)
        try:
            super().backward(tensor, model, optimizer, *args, **kwargs)
        finally:
            if self._automatic:
                self._take_back()

    @override
    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # pyright: ignore
        """After backward `module.training` decides again, e.g. for sampling in a callback."""
        self._mid_accumulation = True
        self.precision_map.after_backward()
        if not self._in_train_step:
            self.precision_map.phase.evaluating = None
        return super().post_backward(tensor, module)

    @override
    def optimizer_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        optimizer: Steppable,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """The optimizer's step, and after it the boundary at which formats may change."""
        if self.guard is None:
            output = super().optimizer_step(optimizer, model, closure, **kwargs)
        else:
            output = self.guard.step(self, cast(Optimizer, optimizer), model, closure, **kwargs)
        self._mid_accumulation = False
        self._share_weight_casts(model)
        if isinstance(self._base, HalfTrue) and self._base.copies.lent and self._in_train_step:
            self._base.copies.lend(model, self._base.dtype)  # of the weights as they are now
        self._log_loss_scale(model.trainer)
        self.precision_map.step()
        return output

    def _log_loss_scale(self, trainer: Trainer) -> None:
        """At every log interval, to all loggers, beside what Lightning logs for the step."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        due = (step + 1) % trainer.log_every_n_steps == 0  # pyright: ignore
        if self.scaler is None or not due or step == self._logged:
            return
        self._logged = step
        now = self.scaler.state.numbers()
        values = {
            "fp16/loss_scale": now["scale"] if self.scaler.active else 1.0,
            "fp16/skipped_steps": float(now["skipped"]),
            "fp16/effective_steps": float(now["made"]),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _step_context(self) -> AbstractContextManager[object]:
        """What else stands around the forward of a training step, in replays too."""
        return self.precision_map.forward_context()

    def _share_weight_casts(self, module: Module | None) -> None:
        """Micro-batches of one step share the cast of each weight, where there are several."""
        trainer = getattr(module, "_trainer", None)
        several = trainer is not None and trainer.accumulate_grad_batches > 1
        self.precision_map.share_weight_casts = several

    @override
    def val_step_context(self) -> AbstractContextManager[None]:
        """Validation runs in high precision unless `fp8_eval`."""
        return self._evaluation()

    @override
    def test_step_context(self) -> AbstractContextManager[None]:
        """Test runs in high precision unless `fp8_eval`."""
        return self._evaluation()

    @override
    def predict_step_context(self) -> AbstractContextManager[None]:
        """Prediction runs in high precision unless `fp8_eval`."""
        return self._evaluation()

    @contextmanager
    def _evaluation(self) -> Generator[None, None, None]:
        phase = self.precision_map.phase
        before, phase.evaluating = phase.evaluating, True
        try:
            with self.forward_context():
                yield
        finally:
            phase.evaluating = before
            self._take_back()

    # -- replays --------------------------------------------------------------------------------

    @contextmanager
    def replaying(self) -> Generator[None, None, None]:
        """Steps are run again between two of the run; afterwards a batch begins a step."""
        with ExitStack() as stack:
            if self.scaler is not None:
                stack.enter_context(self.scaler.untouched())
            try:
                yield
            finally:
                self._mid_accumulation = self._in_train_step = False
                self._take_back()

    # -- state ----------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save under a key of our own; Lightning's, the class name, would tie the state to it."""
        state = {**self._carried, **self.precision_map.state_dict()}
        if self.scaler is not None:
            state[LOSS_SCALE] = self.scaler.state_dict()
            checkpoint["MixedPrecision"] = self.scaler.grad_scaler_state()  # for Lightning's own
        checkpoint[STATE_KEY] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the table and the loss scale, which may be that of Lightning's own plugin.

        A loss scale that this plugin has no use for is kept for the one that the run may come back
        to.
        """
        state = dict(checkpoint.get(STATE_KEY) or {})
        scale = state.pop(LOSS_SCALE, None) or checkpoint.get("MixedPrecision")
        if state:
            self.precision_map.load_state_dict(state)
        if scale and self.scaler is not None:
            self.scaler.load_state_dict(scale)
        elif scale:
            self._carried = {LOSS_SCALE: scale}

    @override
    def __str__(self) -> str:
        # Lightning puts this into the error that a Trainer of the other package raises.
        return (
            f"{type(self).__name__}({self._format.name!r}) for lightning.pytorch.Trainer"
            " (`import lightning as L`; the pytorch_lightning package is a separate copy)"
        )


def _is_linear(module: Module) -> bool:
    return is_plain_linear(module) or is_switchable_linear(module)


def _strategy_of(module: Module) -> Any:
    """The Trainer's strategy; None for a module outside of a Trainer."""
    trainer = getattr(module, "_trainer", None)
    return None if trainer is None else trainer.strategy
