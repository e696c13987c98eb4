"""LayerPrecision: a precision plugin that owns the table of formats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
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
    convert_into,
    kernel_for,
    linear_format,
)
from lightning_fp.layers.flops import example_flops
from lightning_fp.layers.rules import layer_rules
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins.guard import StepGuard, gradient_norm
from lightning_fp.plugins.strategies import refuse_strategy

Base = Literal["bf16-mixed", "bf16-true", "32-true"]

STATE_KEY = "lightning_fp.precision"
"""Where a checkpoint keeps the plugin's state, whatever the plugin's class."""


class LayerPrecision(Precision):
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
    ) -> None:
        if base not in get_args(Base):
            raise ValueError(f"base must be one of {', '.join(get_args(Base))}, got {base!r}")
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
        self.guard: StepGuard | None = None
        """Looks at the gradients before each optimizer step; PrecisionFallback sets it."""
        self._base = _base_plugin(base)
        self._mid_accumulation = False
        self._in_train_step = False

    def settings(self) -> dict[str, Any]:
        """The options as plain data, for the records of a run."""
        return {
            "format": self._format.name,
            "base": self.precision,
            "backend": self._backend,
            "layers": {rule.pattern: rule.format.name for rule in self._rules},
            "fp8_eval": self.precision_map.phase.fp8_eval,
        }

    @property
    def high_precision(self) -> LinearFormat:
        """The format of layers left in high precision: the base's."""
        return linear_format("fp32" if self.precision == "32-true" else "bf16")

    # -- setup ----------------------------------------------------------------------------------

    @override
    def convert_module(self, module: Module) -> Module:
        """Convert the model in place; Lightning calls this again for validate, test, predict."""
        strategy = _strategy_of(module)
        if strategy is not None:
            refuse_strategy(strategy, type(self).__name__)
            if isinstance(self._base, MixedPrecision):
                self._base.device = strategy.root_device.type
        module = self._base.convert_module(module)
        if self.precision_map.model is not module:
            cuda_fp8 = cuda_has_fp8() and (strategy is None or strategy.root_device.type == "cuda")
            self.precision_map.cuda_fp8 = cuda_fp8
            conversion = Conversion(
                format=self._format,
                rules=self._rules,
                backend=self._backend,
                high_precision=self.high_precision,
                cuda_fp8=cuda_fp8,
            )
            self.report = convert_into(self.precision_map, module, conversion)
        return module

    @override
    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Measure FLOPs where the module has an example input, and say what runs."""
        module = self.precision_map.model
        self._share_weight_casts(module)
        example = getattr(module, "example_input_array", None)
        sharded = module is not None and any(isinstance(m, FSDPModule) for m in module.modules())
        if self.report is not None and module is not None:
            if example is not None and not sharded and not self.report.measured:
                with self.forward_context():
                    self.report = self.report.with_flops(example_flops(module, example))
            if optimizers:
                rank_zero_info(f"{type(self).__name__} ({self.precision}): {self.report.summary()}")
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        """Outside of the Trainer `module.training` decides about evaluation again."""
        self.precision_map.phase.evaluating = None
        self._mid_accumulation = self._in_train_step = False

    # -- the base precision ---------------------------------------------------------------------

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self._base.tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self._base.module_init_context()

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """As the base precision: autocast, or the default dtype, or nothing."""
        return self._base.forward_context()

    @override
    def convert_input(self, data: Any) -> Any:
        """As the base precision."""
        return self._base.convert_input(data)

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
        finally:
            self._in_train_step = False
            if guard is not None and trainer is not None:
                guard.end_training_step(trainer)
            if not getattr(self.precision_map.model, "automatic_optimization", True):
                phase.evaluating = None
            # In automatic optimization backward follows, and checkpointing runs forward again in
            # it: it must find the same phase. `post_backward` ends it.

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
        self.precision_map.step()
        return output

    def _step_context(self) -> AbstractContextManager[object]:
        """What else stands around the forward of a training step, in replays too."""
        return nullcontext()

    def _share_weight_casts(self, module: Module | None) -> None:
        """Micro-batches of one step share the cast of each weight, where there are several."""
        trainer = getattr(module, "_trainer", None)
        several = trainer is not None and trainer.accumulate_grad_batches > 1
        self.precision_map.share_weight_casts = several

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's; the guard hears of the norm, so that it is computed once."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.main_params(optimizer)), clip_val)
        if self.guard is not None:
            self.guard.clipped(norm)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's; the guard looks before, since inf is not to be seen afterwards."""
        if self.guard is not None:
            self.guard.clipped(gradient_norm(optimizer))
        super().clip_grad_by_value(optimizer, clip_val)

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

    def after_replay(self) -> None:
        """Steps were replayed between two of the run: the next batch begins a step."""
        self._mid_accumulation = self._in_train_step = False

    # -- state ----------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save under a key of our own; Lightning's, the class name, would tie the state to it."""
        checkpoint[STATE_KEY] = self.precision_map.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the table; a checkpoint of another precision plugin has none to restore."""
        state = checkpoint.get(STATE_KEY)
        if state is not None:
            self.precision_map.load_state_dict(state)

    @override
    def __str__(self) -> str:
        # Lightning puts this into the error that a Trainer of the other package raises.
        return (
            f"{type(self).__name__}({self._format.name!r}) for lightning.pytorch.Trainer"
            " (`import lightning as L`; the pytorch_lightning package is a separate copy)"
        )


def _base_plugin(base: Base) -> Precision:
    if base == "bf16-mixed":
        return MixedPrecision("bf16-mixed", "cpu")  # the device is set when it is known
    if base == "bf16-true":
        return HalfPrecision("bf16-true")
    return Precision()


def _strategy_of(module: Module) -> Any:
    """The Trainer's strategy; None for a module outside of a Trainer."""
    trainer = getattr(module, "_trainer", None)
    return None if trainer is None else trainer.strategy
