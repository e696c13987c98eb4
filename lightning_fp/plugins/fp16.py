"""FP16Precision: training in FP16, with a scaled loss and float32 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.layers import FormatLike, linear_format
from lightning_fp.layers.backends import BackendLike, read_backend
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.base_precision import read_base

HalfBase = Literal["16-mixed", "16-true", "16", 16]


class FP16Precision(LayerPrecision):
    """Trains in FP16: eight times as precise as BF16, with a range that a loss scale looks after.

    Weights are float32 in either base, and so is what optimizers and DDP see. "16-mixed" is
    autocast: matrix products in FP16, norms, softmax and losses in float32. "16-true" computes
    everything with FP16 copies of the weights, made for each step.

    >>> from lightning_fp import FP16Precision, LossScaling
    >>> FP16Precision(loss_scaling=LossScaling.rl()).precision
    '16-mixed'

    Args:
        base: "16-mixed" or "16-true".
        loss_scaling: how the loss scale moves; `LossScaling()`, `LossScaling.static(1024)` or
            `LossScaling.rl()`. None takes the first.
        layers: `{pattern: format}`, first match wins: linear layers in another format than FP16,
            such as "bf16", "fp32" or with "16-mixed" one in FP8.
        backend: which kernels layers in FP8 use.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.

    Raises:
        ValueError: for an unknown option; at setup for weights of 16 bits, an optimizer such as
            LBFGS, or an FSDP2 policy that reduces gradients in FP16.
    """

    @checked
    def __init__(
        self,
        base: HalfBase = "16-mixed",
        *,
        loss_scaling: LossScaling | None = None,
        layers: Mapping[str, FormatLike] | None = None,
        backend: BackendLike = "auto",
        hold_schedulers: bool = True,
    ) -> None:
        known = read_base(base)
        if known not in ("16-mixed", "16-true"):
            raise ValueError(f"base must be '16-mixed' or '16-true', got {base!r}")
        super().__init__(
            linear_format("fp16"),
            base=known,
            backend=read_backend(backend),
            layers=layers,
            loss_scaling=loss_scaling,
            hold_schedulers=hold_schedulers,
            empty=True,
        )
        fp8 = [rule.pattern for rule in self.configured.rules if rule.format.is_fp8]
        if known == "16-true" and fp8:
            raise ValueError(
                f"layers must not be in FP8 with base '16-true', got {', '.join(fp8)}: they cast"
                " from the float32 weights; take '16-mixed'"
            )

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.precision!r})"
