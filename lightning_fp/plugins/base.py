"""LayerPrecision: a precision plugin that owns the table of formats."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.layers import (
    AutoScaling,
    Backend,
    Change,
    ConversionReport,
    FormatLike,
    Frozen,
    LinearFormat,
    PrecisionMap,
)
from lightning_fp.layers.conversion.configured_layers import ConfiguredLayers
from lightning_fp.layers.conversion.flops import example_flops
from lightning_fp.layers.conversion.report import REPLACED
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.layers.rules import layer_rules
from lightning_fp.layers.switchable import Gathering
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins.elsewhere import Elsewhere
from lightning_fp.plugins.guarded import GuardedPrecision
from lightning_fp.plugins.strategies import refuse_strategy
from lightning_fp.plugins.throughput import FP8_PEAK, PEAK, tell_throughput_monitors
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.state_version import reads
from lightning_fp.stepping.as_trained import as_trained
from lightning_fp.stepping.base_precision import LOSS_SCALE, Base
from lightning_fp.stepping.low_watch import LowWatch

log = logging.getLogger(__name__)

STATE_KEY = "lightning_fp.precision"
"""Where a checkpoint keeps the plugin's state, whatever the plugin's class."""


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
        frozen: what is kept of frozen weights in FP8 layers.
        attention: the simulated format of attention's products; None: as they are.
        all_gather: how FSDP2 gathers weights.

    Raises:
        ValueError: for an unknown option, or a format that the backend cannot run.
    """

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
        frozen: Frozen = "kept",
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
    ) -> None:
        super().__init__(base, loss_scaling=loss_scaling, hold_schedulers=hold_schedulers)
        self.configured = ConfiguredLayers(
            format=format,
            rules=layer_rules(layers),
            backend=backend,
            empty=empty,
            frozen=frozen,
        )
        """Which layers get which format, as it was asked for."""
        self.precision_map = PrecisionMap(
            backend=backend,
            fp8_eval=fp8_eval,
            delayed=delayed,
            auto=auto,
            attention=attention,
            all_gather=all_gather,
        )
        """The table of formats: read it, write to it."""
        self.report: ConversionReport | None = None
        """What the conversion did; None before setup."""
        self.on_input: list[Callable[[Any], object]] = []
        """Told each training batch as it comes from the loader, before it is converted, moved, or
        seen by any hook; not in replays. It belongs to the run: copy it."""
        self._mid_accumulation = False
        self._several: bool | None = None
        self._in_train_step = False
        self._logged = -1
        self._watch = LowWatch(self.precision_map)
        self._looked_at: Module | None = None
        self._told: Module | None = None

    def settings(self) -> dict[str, Any]:
        """The options as plain data, for the records of a run."""
        return {
            "format": self.configured.format.name,
            "base": self.precision,
            **self.configured.settings(),
            "fp8_eval": self.precision_map.phase.fp8_eval,
            **self.precision_map.settings(),
            **self.base.settings(),
        }

    # -- setup ----------------------------------------------------------------------------------

    @override
    def convert_module(self, module: Module) -> Module:
        """Convert the model in place; Lightning calls this again for validate, test, predict."""
        trainer, on_cuda = _trainer_of(module), True
        caller = sys._getframe(1).f_globals.get("__name__")
        if trainer is None and caller == "lightning.fabric.fabric":
            raise ValueError(self._not_in_fabric())
        if trainer is not None:
            device_type = trainer.strategy.root_device.type
            refuse_strategy(trainer.strategy, type(self).__name__)
            self.configured.check_device(device_type)
            self.base.place(device_type)
            on_cuda = device_type == "cuda"
        self.base.check(module)
        self.precision_map.phase.away = None
        module = self.base.arithmetic.convert_module(module)
        if self.precision_map.model is not module:
            high, table = self.base_format, self.precision_map
            self.report = self.configured.apply(table, module, high=high, on_cuda=on_cuda)
        return module

    @override
    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Measure FLOPs where the module has an example input, and say what runs."""
        module = self.precision_map.model
        self.base.connect(optimizers)
        self._share_weight_casts(module)
        example = getattr(module, "example_input_array", None)
        sharded = module is not None and any(isinstance(m, FSDPModule) for m in module.modules())
        if self.report is not None and module is not None:
            if example is not None and not sharded and not self.report.measured:
                with self.forward_context():
                    self.report = self.report.with_flops(*example_flops(module, example))
                self.base.copies.take_back()
            tell_throughput_monitors(_trainer_of(module), self._peak_dtype)
            if optimizers:
                self._meet(_trainer_of(module))
                self._watch.begin()
                self._looked_at = None
                self._say_what_runs(module, self.report)
        return model, optimizers, lr_schedulers

    def _meet(self, trainer: Any) -> None:
        """At the setup of a fit: all ranks hear of each other's layers; a collective.

        A Trainer of one process leaves groups alone that somebody has made for something else.
        """
        if trainer is None or trainer.world_size == 1:
            return
        self.precision_map.meet()
        ranks = self.precision_map.scale_history.ranks
        if ranks.differ and self.guard is not None:
            self.guard.over_ranks = ranks.everywhere_true

    @property
    def _peak_dtype(self) -> torch.dtype:
        """In which dtype the hardware is to show what it can: that of most products."""
        formats = [row.format for row in self.report.converted] if self.report else []
        low = any(self.precision_map.known[name].is_fp8 for name in formats)
        return FP8_PEAK if low else PEAK[self.base_format.name]

    def _say_what_runs(self, module: Module, report: ConversionReport) -> None:
        """Once for each model, however often it is fitted."""
        if self._told is not module:
            self._told = module
            rank_zero_info(report.screen(f"{type(self).__name__} ({self.precision})"))

    @override
    def teardown(self) -> None:
        """Outside of the Trainer `module.training` decides about evaluation again.

        Not in a Trainer of another precision, which hears nothing of ours: see `Elsewhere`.
        """
        for never in (self._watch.end(), self.precision_map.attention_missed):
            if never:
                _say_last(never)
        self.precision_map.phase.away = Elsewhere(self, self.precision_map.model)
        self.precision_map.phase.evaluating = None
        self._mid_accumulation = self._in_train_step = False
        self.base.copies.take_back()

    # -- the base precision ---------------------------------------------------------------------

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """As the base precision: autocast, or the default dtype, or nothing."""
        self.base.follow(self.precision_map)
        return self.base.arithmetic.forward_context()

    @override
    def convert_input(self, data: Any) -> Any:
        """As the base precision; in training those in `on_input` see the data first.

        Raises:
            ValueError: in Fabric, whose plugins are of another kind.
        """
        model = self.precision_map.model
        trainer = _trainer_of(model)
        if model is not None and trainer is None:
            raise ValueError(self._not_in_fabric())
        if trainer is not None and trainer.training and not self.precision_map.frozen:
            self._forget_replaced()
            self.precision_map.before_batch()
            for see in self.on_input:
                see(data)
        self.base.follow(self.precision_map)
        dtype = self.base.arithmetic.input_dtype
        if dtype is None:
            return data
        return apply_to_collection(data, Tensor, _convert_fp_tensor, dst_type=dtype)

    def _not_in_fabric(self) -> str:
        name = self.configured.format.name
        like = "FP16Precision()" if name == "fp16" else f"FP8Precision({name!r})"
        return (
            f"plugins must not have lightning_fp.{type(self).__name__} in Fabric: it is a Trainer's"
            " plugin, and steps of Fabric do not reach it; take"
            f" lightning_fp.fabric.{like}, or lightning_fp.loop.PrecisionLoop(..., fabric=fabric)"
        )

    # -- steps ----------------------------------------------------------------------------------

    @property
    def between_steps(self) -> bool:
        """Whether no micro-batch of the coming optimizer step has run yet."""
        return not (self._mid_accumulation or self._in_train_step)

    def boundary(self) -> list[Change]:
        """Between two optimizer steps: what was written to the table takes effect.

        Each step has one such boundary, before its first forward, and nothing takes effect
        elsewhere. Who acts between two steps and needs what was written in force at once (a
        replay, a measurement, a stage of a rollout) calls this, and so brings it forward.

        Returns:
            The changes, in the order of the model.
        """
        return self.precision_map.apply()

    @override
    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """A training forward runs in the layers' formats, frozen submodules in eval mode too."""
        self._forget_replaced()
        if not self._mid_accumulation:
            self.boundary()
        trainer: Any = getattr(self.precision_map.model, "_trainer", None)
        guard = None if trainer is None or self.precision_map.frozen else self.guard
        if guard is not None and trainer is not None:
            guard.begin(trainer)
        self._watch.step()
        phase = self.precision_map.phase
        phase.evaluating, self._in_train_step = False, True
        try:
            with self.forward_context(), self.precision_map.forward_context():
                yield
        except BaseException:
            self.base.copies.take_back()
            raise
        finally:
            self._in_train_step = False
            if guard is not None and trainer is not None:
                guard.end_training_step(trainer)
            if not self._automatic:
                phase.evaluating = None
                self.base.copies.take_back()
            # In automatic optimization backward follows, and checkpointing runs forward again in
            # it: it must find the same phase and weights. `backward`, `post_backward` end that.

    def _forget_replaced(self) -> None:
        """Once in a fit: its first hooks may have put others in the place of converted layers."""
        if self._looked_at is self.precision_map.model:
            return
        self._looked_at = self.precision_map.model
        if not (gone := self.precision_map.forget_missing()):
            return
        if self.report is not None:
            self.report = self.report.without(gone)
        rank_zero_warn(
            f"{', '.join(fold_names(gone))}: {REPLACED}; what is there now keeps the"
            " precision it has. To have it converted, put it there in __init__, configure_model or"
            " setup"
        )

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
        """Backward of the scaled loss; in automatic optimization it is the end of lent weights."""
        try:
            with self.precision_map.attention_context():
                super().backward(tensor, model, optimizer, *args, **kwargs)
        finally:
            if self._automatic:
                self.base.copies.take_back()

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
        """The optimizer's step; what it asks of the table waits for the next `boundary`."""
        if self.precision_map.scale_history.share_weight_casts:
            closure = self._casting_anew(closure)
        self.base.copies.write_back()  # before the Parameters move away from them
        output = super().optimizer_step(optimizer, model, closure, **kwargs)
        self._mid_accumulation = False
        self._share_weight_casts(model)
        if self._in_train_step:
            self.base.lend_again(model)
        if not self.precision_map.frozen:
            self._log_loss_scale(model.trainer)
        self.precision_map.after_step()
        return output

    def _log_loss_scale(self, trainer: Any) -> None:
        """At every log interval, to all loggers, beside what Lightning logs for the step."""
        step, interval = (
            trainer.fit_loop.epoch_loop._batches_that_stepped,
            trainer.log_every_n_steps,
        )
        due = interval > 0 and (step + 1) % interval == 0  # 0 is how Lightning says "off"
        if due and step != self._logged and (numbers := self.base.numbers()):
            self._logged = step
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step)

    def _casting_anew(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Some optimizers move weights before a closure, and by `.data`, which shows nowhere."""

        def anew() -> Any:
            self.precision_map.scale_history.drop_weight_casts()
            return closure()

        return anew

    def _share_weight_casts(self, module: Module | None) -> None:
        """Micro-batches of one step share the cast of each weight, where there are several.

        Written only when that changes, so that what a user has set in between stays.
        """
        trainer = _trainer_of(module)
        several = trainer is not None and trainer.accumulate_grad_batches > 1
        if several is not self._several:
            self.precision_map.scale_history.share_weight_casts = self._several = several

    @contextmanager
    def _evaluation(self) -> Generator[None, None, None]:
        """Evaluation runs in high precision unless `fp8_eval`."""
        phase = self.precision_map.phase
        before, phase.evaluating = phase.evaluating, True
        try:
            with self.forward_context(), self.precision_map.attention_context():
                yield
        finally:
            phase.evaluating = before
            self.base.copies.take_back()

    val_step_context = test_step_context = predict_step_context = _evaluation

    def as_trained(self) -> AbstractContextManager[None]:
        """Forwards as the coming training step's, save for dropout; between two steps.

        Old log-probabilities of a policy computed here equal those of the training forward bit for
        bit while the weights are the same. In `eval()` they would be of another precision. Nothing
        of it reaches the histories of delayed scaling, or the statistics.

        Raises:
            ValueError: before the model is set up.
        """
        model = self.precision_map.model
        if model is None:
            raise ValueError(
                "as_trained needs a model: call it in a fit, between two steps, as in"
                " on_train_batch_start"
            )
        return as_trained(model, self, self.base, self.forward_context)

    # -- replays --------------------------------------------------------------------------------

    @contextmanager
    def replaying(self) -> Generator[None, None, None]:
        """Steps are run again between two of the run; afterwards a batch begins a step."""
        with self.base.scaler.untouched():
            try:
                yield
            finally:
                self._mid_accumulation = self._in_train_step = False
                self.base.copies.take_back()

    # -- state ----------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save under a key of our own; Lightning's, the class name, would tie the state to it.

        As Lightning's plugins do, nothing where there is nothing to keep.
        """
        of_base = self.base.save(checkpoint)
        if of_base or not self.precision_map.is_plain:
            checkpoint[STATE_KEY] = {**self.precision_map.state_dict(), **of_base}

    @override
    @reads("the precision plugin's state")
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the table and the loss scale, which may be that of Lightning's own plugin."""
        state = dict(checkpoint.get(STATE_KEY) or {})
        scale = state.pop(LOSS_SCALE, None) or checkpoint.get("MixedPrecision")
        if state:
            self.precision_map.load_state_dict(state)
        if scale:
            self.base.load_loss_scale(scale)

    @override
    def __str__(self) -> str:
        # Lightning puts this into the error that a Trainer of the other package raises.
        return (
            f"{type(self).__name__}({self.configured.format.name!r}) for lightning.pytorch.Trainer"
            " (`import lightning as L`; the pytorch_lightning package is a separate copy)"
        )


@rank_zero_only
def _say_last(line: str) -> None:
    """To the console, after everything else that a run says."""
    log.warning("%s", line)


def _trainer_of(module: Module | None) -> Any:
    """The Trainer; None for a module outside of one."""
    return getattr(module, "_trainer", None)
