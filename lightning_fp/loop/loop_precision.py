"""LoopPrecision: a model's formats and base precision, where no Trainer's plugin owns them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_fp.layers import (
    AutoScaling,
    Change,
    ConversionReport,
    FormatLike,
    Frozen,
    PrecisionMap,
)
from lightning_fp.layers.backends import BackendLike, read_backend
from lightning_fp.layers.conversion.configured_layers import ConfiguredLayers
from lightning_fp.layers.conversion.flops import example_flops
from lightning_fp.layers.format import QuantiseLike
from lightning_fp.layers.rules import layer_rules
from lightning_fp.layers.scaling import (
    RunScaling,
    ScalingLike,
    layers_quantised_like,
    read_scaling,
)
from lightning_fp.layers.switchable import Gathering
from lightning_fp.loop.batches import with_dtype
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.as_trained import as_trained, modes
from lightning_fp.stepping.base_answers import BaseAnswers
from lightning_fp.stepping.base_precision import (
    LOSS_SCALE,
    Base,
    BaseLike,
    base_precision,
    read_base,
)


def configuration(
    scaling: ScalingLike,
    *,
    layers: Mapping[str, FormatLike] | None = None,
    base: Base = "bf16-mixed",
    backend: BackendLike = "auto",
    tokens: float | None = None,
    frozen: Frozen = "kept",
    quantise_like: QuantiseLike | None = None,
) -> tuple[RunScaling, ConfiguredLayers]:
    """What the options ask for, of any model: how layers are scaled, and which get which format.

    Raises:
        ValueError: for an unknown or contradictory option.
    """
    read = read_scaling(scaling).quantised_like(quantise_like)
    known = read_backend(backend)
    read.check_backend(known)
    if tokens is not None and not read.auto:
        raise ValueError(f"tokens must be None unless scaling is 'auto', got {tokens!r}")
    configured = ConfiguredLayers(
        format=read.format,
        rules=layer_rules(layers_quantised_like(layers, quantise_like)),
        backend=known,
        empty=read.format.is_high_precision,
        frozen=frozen,
    )
    fp8 = [f.name for f in (read.format, *(r.format for r in configured.rules)) if f.is_fp8]
    if base == "16-true" and fp8:
        raise ValueError(
            f"base must not be '16-true' with FP8 layers ({', '.join(fp8)}), which cast from"
            " the float32 weights; take '16-mixed'"
        )
    return read, configured


class LoopPrecision(BaseAnswers):
    """The table of formats, the base precision, and the contexts that steps run in.

    Args:
        model: converted in place.
        scaling: see `FP8Precision`; a format of high precision converts for later.
        layers: see `FP8Precision`.
        base: see `FP8Precision`.
        backend: see `FP8Precision`.
        fp8_eval: whether evaluation runs in the layers' formats as well.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        tokens: see `FP8Precision`.
        frozen: see `FP8Precision`.
        quantise_like: see `FP8Precision`.
        example_input: arguments of one forward, to measure each layer's share of the FLOPs.
        attention: see `FP8Precision`.
        all_gather: see `FP8Precision`.

    Raises:
        ValueError: see `FP8Precision`.
    """

    def __init__(
        self,
        model: nn.Module,
        scaling: ScalingLike,
        *,
        layers: Mapping[str, FormatLike] | None = None,
        base: BaseLike = "bf16-mixed",
        backend: BackendLike = "auto",
        fp8_eval: bool = False,
        loss_scaling: LossScaling | None = None,
        tokens: float | None = None,
        frozen: Frozen = "kept",
        quantise_like: QuantiseLike | None = None,
        example_input: Any = None,
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
    ) -> None:
        self.model, self.name = model, read_base(base)
        read, configured = configuration(
            scaling,
            layers=layers,
            base=self.name,
            backend=backend,
            tokens=tokens,
            frozen=frozen,
            quantise_like=quantise_like,
        )
        self.base = base_precision(self.name, loss_scaling)
        self.precision_map = PrecisionMap(
            backend=configured.backend,
            fp8_eval=fp8_eval,
            delayed=read.delayed,
            auto=AutoScaling(tokens=tokens) if read.auto else None,
            attention=attention,
            all_gather=all_gather,
        )
        """The table of formats: read it, write to it."""
        self._scaling = "auto" if read.auto else read.format.name
        self._configured = configured
        device = device_of(model)
        configured.check_device(device.type)
        self.base.place(device.type)
        self.base.check(model)
        self.base.arithmetic.convert_module(model)
        self.report: ConversionReport | None = configured.apply(
            self.precision_map, model, high=self.base.format, on_cuda=device.type == "cuda"
        )
        if example_input is not None and self.report is not None:
            with self.forward():
                self.report = self.report.with_flops(*example_flops(model, example_input))
            self.base.copies.take_back()

    def settings(self) -> dict[str, Any]:
        """The options as plain data, for the records of a run."""
        return {
            "scaling": self._scaling,
            "base": self.name,
            **self._configured.settings(),
            "fp8_eval": self.precision_map.phase.fp8_eval,
            **self.precision_map.settings(),
            **self.base.settings(),
        }

    def connect(self, optimizers: Sequence[Optimizer]) -> None:
        """Hear which optimizers the run has, and refuse those that the base cannot work with."""
        self.base.connect(list(optimizers))

    def boundary(self) -> list[Change]:
        """Between two optimizer steps: what was written to the table takes effect."""
        return self.precision_map.apply()

    # -- contexts -------------------------------------------------------------------------------

    def input(self, batch: Any) -> Any:
        """A batch as the base precision takes it."""
        self.base.follow(self.precision_map)
        dtype = self.base.arithmetic.input_dtype
        return batch if dtype is None else with_dtype(batch, dtype)

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """A forward in the base precision: autocast, or the default dtype, or nothing."""
        self.base.follow(self.precision_map)
        with self.base.arithmetic.forward_context():
            yield

    @contextmanager
    def training_forward(self) -> Generator[None, None, None]:
        """A training forward, in the layers' formats, frozen submodules in eval mode too.

        Its backward comes afterwards and may run forwards again (checkpointing): `backward_done`
        ends it.
        """
        self.precision_map.phase.evaluating = False
        try:
            with self.forward(), self.precision_map.forward_context():
                yield
        except BaseException:
            self.backward_done()
            raise

    def backward_done(self) -> None:
        """After a backward `model.training` decides again, and lent weights are back."""
        self.base.copies.take_back()
        self.precision_map.after_backward()
        self.precision_map.phase.evaluating = None

    @contextmanager
    def evaluation(self) -> Generator[None, None, None]:
        """The model in eval mode and high precision (unless `fp8_eval`), without gradients."""
        with (
            modes(self.model, []),
            torch.no_grad(),
            self._phase(evaluating=True),
            self.forward(),
            self.precision_map.attention_context(),
        ):
            yield

    def as_trained(self) -> AbstractContextManager[None]:
        """Forwards as those of the coming training step, save for dropout; they leave no trace."""
        return as_trained(self.model, self, self.base, self.forward)

    @contextmanager
    def _phase(self, *, evaluating: bool) -> Generator[None, None, None]:
        phase = self.precision_map.phase
        before, phase.evaluating = phase.evaluating, evaluating
        try:
            yield
        finally:
            phase.evaluating = before
            self.base.copies.take_back()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The table, and the loss scale."""
        return {**self.precision_map.state_dict(), **self.base.save({})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; also what a Trainer's plugin has saved."""
        rest = dict(state)
        scale = rest.pop(LOSS_SCALE, None)
        self.precision_map.load_state_dict(rest)
        if scale:
            self.base.load_loss_scale(scale)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: its first Parameter's device; the CPU where it has none, or is on meta."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device
