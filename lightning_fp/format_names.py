"""The one table of formats: what is known of each by its name.

Kernels, layers, the safety ladder, options, help texts and reports look up here what they need of
a format, and no two places can disagree. What has no row is simulated, as every e{X}m{Y} is, or a
format of the table with changes, which shares its row: "fp8-dynamic[grad_output=e4m3]".

Neither torch nor anything else is imported here, so that a command's help costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Scaling = Literal["none", "dynamic", "delayed"]
Granularity = Literal["tensor", "row", "block", "mx", "nv"]
GradWeight = Literal["fp8", "high"]
Kind = Literal["delayed", "current", "block", "mxfp8", "nvfp4"]

ALIGNMENT = 16
"""`torch._scaled_mm` wants every dimension of an FP8 product to be a multiple of 16."""

AUTO = ("auto", "fp8-auto")
"""Not a format but a choice for a whole run: dynamic until delayed scaling would not clamp."""


@dataclass(frozen=True, slots=True)
class TransformerEngineNames:
    """What a format is called in and around Transformer Engine."""

    kind: Kind
    """Its kind of recipe."""

    recipe: str
    """The class in `transformer_engine.common.recipe`."""

    support: str
    """Its function that knows whether this machine runs it."""

    megatron: str
    """Megatron's `fp8_recipe`."""

    inspect: str = ""
    """What stands before the statistics of nvdlfw_inspect, if that has them."""

    tokens: int = 8
    """What the product of an input's leading dimensions must be a multiple of
    (`assert_dim_for_fp8_exec` in Transformer Engine 2.20)."""


@dataclass(frozen=True, slots=True)
class FormatRow:
    """What is known of one format."""

    name: str
    """As it stands in records and reports."""

    aliases: tuple[str, ...]
    """Other names that are read."""

    help: str
    """A few words for who has to choose."""

    operands: tuple[str, str, str]
    """Number formats of input, weight and grad_output."""

    scaling: Scaling = "none"
    granularity: Granularity = "tensor"
    grad_weight: GradWeight = "fp8"
    power_of_two: bool = False
    """See `lightning_fp.LinearFormat`, as of these four."""

    alignment: int = ALIGNMENT
    """What FP8 hardware wants in_features and out_features to be multiples of: where blocks share
    a scale, its casts take whole blocks only."""

    rung: int | None = None
    """Place on the safety ladder, 0 for the most daring; None stands beside it."""

    torchao: str = ""
    """The name of torchao's recipe, if it has one."""

    te: TransformerEngineNames | None = None
    """Its names in Transformer Engine, if that has it."""


_HIGH = ("high", "high", "high")
_FP32 = ("fp32", "fp32", "fp32")
_BF16 = ("bf16", "bf16", "bf16")
_FP16 = ("fp16", "fp16", "fp16")
_HYBRID = ("e4m3", "e4m3", "e5m2")
_E4M3 = ("e4m3", "e4m3", "e4m3")
_E2M1 = ("e2m1", "e2m1", "e2m1")
_TE = TransformerEngineNames

# fmt: off
TABLE: tuple[FormatRow, ...] = (
    FormatRow("high", (), "nn.Linear, in whatever it computes in where it stands", _HIGH),
    FormatRow("fp32", (), "float32", _FP32),
    FormatRow("bf16", (), "bfloat16", _BF16),
    FormatRow("fp16", (), "float16, whose range wants a loss scale", _FP16),
    FormatRow(
        "fp8-dynamic", ("dynamic",), "one scale per tensor, from the tensor itself",
        _HYBRID, "dynamic", "tensor", rung=1, torchao="tensorwise",
        te=_TE("current", "Float8CurrentScaling", "is_fp8_available", "tensorwise",
               "fp8_current_scaling"),
    ),
    FormatRow(
        "fp8-delayed", ("delayed",), "one scale per tensor, from the steps before",
        _HYBRID, "delayed", "tensor", rung=0,
        te=_TE("delayed", "DelayedScaling", "is_fp8_available", "delayed", "fp8_delayed_scaling"),
    ),
    FormatRow(
        "fp8-rowwise", ("rowwise",), "one scale per row, a power of two",
        _E4M3, "dynamic", "row", power_of_two=True, rung=2, torchao="rowwise",
    ),
    FormatRow(
        "fp8-rowwise-gw-hp", ("rowwise-gw-hp",), "the same, grad_weight in high precision",
        _E4M3, "dynamic", "row", "high", power_of_two=True, rung=3, torchao="rowwise_with_gw_hp",
    ),
    FormatRow(
        "fp8-block", ("block",), "one scale per 128 values, of the weight 128x128",
        _E4M3, "dynamic", "block", alignment=128,
        te=_TE("block", "Float8BlockScaling", "is_fp8_block_scaling_available", "blockwise",
               "fp8_block_scaling"),
    ),
    FormatRow(
        "mxfp8", ("mx", "fp8-mx"), "one scale per 32 values, a power of two",
        _E4M3, "dynamic", "mx", power_of_two=True, alignment=32,
        te=_TE("mxfp8", "MXFP8BlockScaling", "is_mxfp8_available", "mxfp8", "mxfp8", tokens=32),
    ),
    FormatRow(
        "nvfp4", (), "4 bits, one scale per 16 values; Transformer Engine on sm100",
        _E2M1, "dynamic", "nv", alignment=32,
        te=_TE("nvfp4", "NVFP4BlockScaling", "is_nvfp4_available", "nvfp4", tokens=16),
    ),
)
# fmt: on
"""Every format with a name of its own, high precision first."""

CANONICAL: dict[str, str] = {name: row.name for row in TABLE for name in (row.name, *row.aliases)}
"""The name in the table, by every name that is read."""

TE_FORMATS: dict[str, TransformerEngineNames] = {
    row.name: row.te
    for kind in get_args(Kind)
    for row in TABLE
    if row.te is not None and row.te.kind == kind
}
"""The formats that Transformer Engine has, with its names."""

LADDER: tuple[str, ...] = tuple(
    name for _, name in sorted((row.rung, row.name) for row in TABLE if row.rung is not None)
)
"""The rungs of the safety ladder below high precision, the most daring first."""


def base_row(scaling: Scaling, granularity: Granularity) -> FormatRow:
    """The row of formats that scale alike, whatever they change in it.

    Args:
        scaling: where scales come from.
        granularity: what shares one.
    """
    alike = (row for row in TABLE if (row.scaling, row.granularity) == (scaling, granularity))
    return next(alike, TABLE[0])
