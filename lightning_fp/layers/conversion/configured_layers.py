"""ConfiguredLayers: the formats a user asks for, before there is a model to give them to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch.nn import Module

from lightning_fp.choices import check_choice
from lightning_fp.kernels.hardware import cuda_has_fp8
from lightning_fp.layers import (
    Backend,
    Conversion,
    ConversionReport,
    Frozen,
    LinearFormat,
    PrecisionMap,
    convert_into,
    kernel_for,
)
from lightning_fp.layers.experts.kinds import kind_of
from lightning_fp.layers.linear import has_formats
from lightning_fp.layers.rules import Rule
from lightning_fp.layers.transformer_engine.setup import check_device


@dataclass(frozen=True, kw_only=True)
class ConfiguredLayers:
    """What a user asks for, before there is a model.

    Raises:
        ValueError: for a format that the backend cannot run.
    """

    format: LinearFormat
    """Of the layers that no rule names."""

    rules: tuple[Rule, ...]
    """In order; the first match wins."""

    backend: Backend

    empty: bool
    """Whether a model without a linear layer will do."""

    frozen: Frozen = "kept"
    """What is kept of frozen weights in FP8 layers."""

    def __post_init__(self) -> None:
        check_choice("frozen", self.frozen, get_args(Frozen))
        for each in (self.format, *(rule.format for rule in self.rules)):
            kernel_for(each, self.backend, cuda_fp8=False)  # refuses what it cannot run

    def settings(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "backend": self.backend,
            "layers": {rule.pattern: rule.format.name for rule in self.rules},
            **({} if self.frozen == "kept" else {"frozen": self.frozen}),
        }

    def check_device(self, device_type: str) -> None:
        """Refuse a kind of device that the backend has nothing for."""
        if self.backend == "transformer-engine":
            check_device(device_type)

    def apply(
        self, table: PrecisionMap, module: Module, *, high: LinearFormat, on_cuda: bool
    ) -> ConversionReport | None:
        """Convert a model in place, and fill its table.

        Args:
            table: is filled.
            module: the model.
            high: the format of layers that are left alone.
            on_cuda: whether the model will run on CUDA, if that is known.

        Returns:
            What was done; None if there was nothing to do.

        Raises:
            ValueError: for rules that do not fit the model, or if it has nothing to convert.
        """
        table.known.cuda_fp8 = cuda_has_fp8() and on_cuda
        every = module.modules()
        if self.empty and not any(has_formats(m) or kind_of(m) is not None for m in every):
            table.fill(module, {}, {})
            return None
        conversion = Conversion(
            format=self.format,
            rules=self.rules,
            backend=self.backend,
            high_precision=high,
            cuda_fp8=table.known.cuda_fp8,
            frozen=self.frozen,
        )
        return convert_into(table, module, conversion)
