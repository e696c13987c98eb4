"""Number formats, casts and scales: pure functions over tensors, no modules, no state."""

from lightning_fp.numerics.casting import (
    Rounding,
    round_to_format,
    saturating_cast,
    scaled_cast,
)
from lightning_fp.numerics.delayed import DelayedScaling, advance_history, history_scale
from lightning_fp.numerics.formats import FORMATS, FloatFormat, float_format, format_of_dtype
from lightning_fp.numerics.scaling import (
    AMAX_LOWER_BOUND,
    amax_to_scale,
    nonfinite_count,
    row_amax,
    tensor_amax,
)

__all__ = [
    # formats
    "FORMATS",
    "FloatFormat",
    "float_format",
    "format_of_dtype",
    # casting
    "Rounding",
    "round_to_format",
    "saturating_cast",
    "scaled_cast",
    # scaling
    "AMAX_LOWER_BOUND",
    "amax_to_scale",
    "nonfinite_count",
    "row_amax",
    "tensor_amax",
    # delayed scaling
    "DelayedScaling",
    "advance_history",
    "history_scale",
]
