"""Number formats, casts and scales: pure functions over tensors, no modules, no state."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.numerics.blocks import (
        Block,
        amax_to_e8m0,
        block_amax,
        spread_blocks,
        times_blocks,
    )
    from lightning_fp.numerics.casting import (
        saturating_cast,
        scaled_cast,
    )
    from lightning_fp.numerics.combining import (
        COLUMN,
        MAXIMA,
        STATISTICS,
        WHAT_IF,
        Statistic,
        combine,
    )
    from lightning_fp.numerics.delayed import DelayedScaling, advance_history, history_scale
    from lightning_fp.numerics.formats import FORMATS, FloatFormat, float_format, format_of_dtype
    from lightning_fp.numerics.rounding import as_float16, round_in_range, through_bf16
    from lightning_fp.numerics.scaling import (
        AMAX_LOWER_BOUND,
        amax_to_scale,
        nonfinite_count,
        row_amax,
        tensor_amax,
    )
    from lightning_fp.numerics.simulated import new_seed, random_bits, round_to_format
    from lightning_fp.numerics.statistics import (
        Casts,
        casts_of,
        operand_statistics,
        output_statistics,
        sampled_rows,
        shares,
    )
    from lightning_fp.numerics.what_if import what_if_shares, what_if_statistics
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # formats
    "FORMATS",
    "FloatFormat",
    "float_format",
    "format_of_dtype",
    # casting
    "as_float16",
    "round_in_range",
    "saturating_cast",
    "scaled_cast",
    "through_bf16",
    # rounding to any format
    "new_seed",
    "random_bits",
    "round_to_format",
    # scaling
    "AMAX_LOWER_BOUND",
    "amax_to_scale",
    "nonfinite_count",
    "row_amax",
    "tensor_amax",
    # block scaling
    "Block",
    "amax_to_e8m0",
    "block_amax",
    "spread_blocks",
    "times_blocks",
    # delayed scaling
    "DelayedScaling",
    "advance_history",
    "history_scale",
    # statistics
    "COLUMN",
    "MAXIMA",
    "STATISTICS",
    "WHAT_IF",
    "Casts",
    "Statistic",
    "casts_of",
    "combine",
    "operand_statistics",
    "output_statistics",
    "sampled_rows",
    "shares",
    "what_if_shares",
    "what_if_statistics",
]
