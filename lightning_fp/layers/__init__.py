"""Linear layers whose format can change, and the table that changes it."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.layers.attention import simulated_attention
    from lightning_fp.layers.backends import Backend, kernel_for
    from lightning_fp.layers.changes import Change
    from lightning_fp.layers.conversion.advice import ScalingAdvice, recommend_scaling
    from lightning_fp.layers.conversion.convert import convert, convert_into, revert
    from lightning_fp.layers.conversion.decide import Conversion
    from lightning_fp.layers.conversion.report import ConversionReport, LayerReport
    from lightning_fp.layers.experts.experts import FPExperts, is_switchable
    from lightning_fp.layers.format import FormatLike, LinearFormat, linear_format
    from lightning_fp.layers.histories.auto_scaling import AutoScaling
    from lightning_fp.layers.linear import FPLinear
    from lightning_fp.layers.precision_map import PrecisionMap
    from lightning_fp.layers.stored import Frozen, unstore
    from lightning_fp.layers.switchable import Phase, SwitchableLayer
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # formats
    "FormatLike",
    "LinearFormat",
    "linear_format",
    "simulated_attention",
    # layers
    "FPExperts",
    "FPLinear",
    "Phase",
    "SwitchableLayer",
    "is_switchable",
    # conversion
    "Backend",
    "Conversion",
    "ConversionReport",
    "Frozen",
    "LayerReport",
    "convert",
    "convert_into",
    "kernel_for",
    "revert",
    "unstore",
    # the choice of scaling
    "AutoScaling",
    "ScalingAdvice",
    "recommend_scaling",
    # the table
    "Change",
    "PrecisionMap",
]
