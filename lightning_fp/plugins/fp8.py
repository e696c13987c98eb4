"""FP8Precision: linear layers in FP8."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.layers import AutoScaling, FormatLike, Frozen, LinearFormat
from lightning_fp.layers.backends import BackendLike, read_backend
from lightning_fp.layers.format import QuantiseLike
from lightning_fp.layers.scaling import ScalingLike, layers_quantised_like, read_scaling
from lightning_fp.layers.switchable import Gathering
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.base_precision import BaseLike, read_base

FP8_NUMBERS = ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz")


class FP8Precision(LayerPrecision):
    """Trains linear layers in FP8, everything else in the base precision.

    >>> from lightning_fp import FP8Precision
    >>> plugin = FP8Precision("rowwise", layers={"*.blocks.0.*": "bf16"})
    >>> plugin.precision_map.formats()  # filled when the Trainer sets up the model
    {}

    Args:
        scaling: "dynamic", "delayed", "auto", "rowwise", "rowwise-gw-hp", "block", "mx" (or "fp8-"
            before it), any format name, a `LinearFormat`, a `DynamicScaling`, a `DelayedScaling`,
            or a torchao `Float8LinearConfig`.
        backend: "auto" takes our kernel for per-tensor scales and torchao's for rows; "native",
            "torchao" or "transformer-engine" insist.
        base: the precision of everything else, as Lightning's own plugins define it.
        layers: `{pattern: format}`, first match wins. A pattern is a glob over the whole layer
            name as in `named_modules()`, or a regular expression after "re:".
        fp8_eval: whether validation, test and prediction run in FP8 as well.
        loss_scaling: how the loss is scaled where the base is "16-mixed", FP16; None takes the
            defaults.
        tokens: with "auto", the tokens that the whole training will see: layers move to delayed
            scaling only below the budget at which it is known to fail late (about 200B).
        frozen: "stored" keeps of frozen weights in FP8 layers only their cast, a byte per element,
            as beside LoRA; "kept" keeps them whole.
        quantise_like: "bf16-export" casts FP8 weights from the values that their bf16 export has,
            as an inference engine does after a weight sync; None: as the formats say.
        attention: a simulated format, such as "e8m3", for the products of the model's
            `F.scaled_dot_product_attention` in training; None: as they are.
        all_gather: how FSDP2 gathers weights: "auto" in FP8 where nothing but their cast is used;
            "high" always as they are.

    Raises:
        ValueError: for an unknown or contradictory option; at setup for a rule that matches
            nothing, an unsupported strategy, or a model without anything to convert.
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
        frozen: Frozen = "kept",
        quantise_like: QuantiseLike | None = None,
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
    ) -> None:
        base, backend = read_base(base), read_backend(backend)
        if base == "16-true":
            raise ValueError(
                "base must not be '16-true' with FP8 layers, which cast from the float32 weights;"
                " take '16-mixed'"
            )
        self._scaling = read_scaling(scaling).quantised_like(quantise_like)
        self._tokens = tokens
        if tokens is not None and not self._scaling.auto:
            raise ValueError(f"tokens must be None unless scaling is 'auto', got {tokens!r}")
        self._scaling.check_backend(backend)
        _warn_of_bare_numbers(self._scaling.format)
        super().__init__(
            self._scaling.format,
            base=base,
            backend=backend,
            layers=layers_quantised_like(layers, quantise_like),
            fp8_eval=fp8_eval,
            delayed=self._scaling.delayed,
            auto=AutoScaling(tokens=tokens) if self._scaling.auto else None,
            loss_scaling=loss_scaling,
            empty=self._scaling.format.is_high_precision and not layers,
            frozen=frozen,
            attention=attention,
            all_gather=all_gather,
        )

    @override
    def __repr__(self) -> str:
        shown = [repr("auto" if self._scaling.auto else self.configured.format.name)]
        if self.precision != "bf16-mixed":
            shown.append(f"base={self.precision!r}")
        if self.configured.rules:
            rules = {rule.pattern: rule.format.name for rule in self.configured.rules}
            shown.append(f"layers={rules}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @override
    def settings(self) -> dict[str, Any]:
        """See `LayerPrecision.settings`."""
        shared = super().settings()
        scaling: dict[str, Any] = {
            "scaling": "auto" if self._scaling.auto else shared["format"],
        }
        if self._scaling.delayed is not None:
            scaling["delayed"] = dataclasses.asdict(self._scaling.delayed)
        if self._tokens is not None:
            scaling["tokens"] = self._tokens
        del shared["format"]
        return {**scaling, **shared}


def _warn_of_bare_numbers(format: LinearFormat) -> None:
    """The number formats of FP8 without scales are simulated, and hardly what was meant."""
    if format.name in FP8_NUMBERS:
        warnings.warn(
            f"scaling {format.name!r} is a simulated number format without scales; FP8 training is"
            " 'fp8-dynamic', or another with its scales, as 'fp8-delayed'",
            stacklevel=3,
        )
