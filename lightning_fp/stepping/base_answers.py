"""BaseAnswers: what the owner of a table says of its base precision."""

from __future__ import annotations

import torch

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.stepping.base_precision import BasePrecision
from lightning_fp.stepping.loss_scaler import LossScaler


class BaseAnswers:
    """For classes that have a base precision and a table, see `TableOwner`."""

    base: BasePrecision
    """What everything but the layers computes in."""

    precision_map: PrecisionMap
    """The table of formats: read it, write to it."""

    @property
    def scaler(self) -> LossScaler | None:
        """Scales the loss, if the base is FP16."""
        scaler = self.base.scaler
        return scaler if isinstance(scaler, LossScaler) else None

    @property
    def base_format(self) -> LinearFormat:
        """The format of layers that are left alone: the base's."""
        return self.base.format

    @property
    def high_precision(self) -> LinearFormat:
        """The format to fall back to: the base's, or bf16 where the base is FP16."""
        return self.base.high_precision

    @property
    def falls_back_whole(self) -> bool:
        """Whether all layers fall back at once: FP16's range may be at fault between them too."""
        return self.base.falls_back_whole

    @property
    def half_dtype(self) -> torch.dtype | None:
        """What the base computes in at present: float16, or bfloat16 while all layers are there.

        None where the base is not FP16.
        """
        return self.base.half_dtype(self.precision_map)

    def low_layers(self) -> list[str]:
        """The layers in a format below the high precision to fall back to."""
        layers = self.precision_map.layers.items()
        return [name for name, layer in layers if self.base.is_low(layer.format)]
