"""The one table of formats: what is known of each by its name.

Kernels, layers, the safety ladder, options, help texts and reports look up here what they need of
a format, and no two places can disagree. What has no row is simulated, as every e{X}m{Y} is
("e8m3", "e8m3-truncate", "e4m5-scaled-stochastic"), or a format of the table with changes, which
shares its row: "fp8-dynamic[grad_output=e4m3]".

Neither torch nor anything else is imported here, so that a command's help costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scaling = Literal["none", "dynamic", "delayed"]
Granularity = Literal["tensor", "row", "block", "mx", "nv"]
GradWeight = Literal["fp8", "high"]
Rounding = Literal["nearest", "truncate", "stochastic"]
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


_SIMULATED = re.compile(
    r"(?P<number>e\d+m\d+[a-z]*)(?P<scaled>-scaled)?(-(?P<rounding>truncate|stochastic))?"
)


@dataclass(frozen=True, slots=True)
class SimulatedName:
    """What the name of a simulated format says: "e4m5-scaled-truncate".

    >>> SimulatedName.read("e8m3-truncate")
    SimulatedName(number='e8m3', scaled=False, rounding='truncate')
    >>> str(SimulatedName("e4m5", scaled=True))
    'e4m5-scaled'
    """

    number: str
    """The number format of all operands."""

    scaled: bool = False
    """Whether each operand has a scale, from its own amax."""

    rounding: Rounding = "nearest"
    """How values between two representable ones are rounded."""

    @classmethod
    def read(cls, name: str) -> SimulatedName | None:
        """What a name says; None if it is not of this kind."""
        found = _SIMULATED.fullmatch(name)
        if found is None:
            return None
        rounding: Any = found["rounding"] or "nearest"
        return cls(found["number"], found["scaled"] is not None, rounding)

    def __str__(self) -> str:
        ending = "" if self.rounding == "nearest" else f"-{self.rounding}"
        return f"{self.number}{'-scaled' if self.scaled else ''}{ending}"
