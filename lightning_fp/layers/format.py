"""The formats users type: "bf16", "fp8-dynamic", "rowwise", "e8m3", ...

A name stands for a `LinearFormat`; the record is accepted wherever a name is. Which names there are
says `lightning_fp.format_names`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_choice, unknown
from lightning_fp.format_names import (
    AUTO,
    CANONICAL,
    TABLE,
    FormatRow,
    GradWeight,
    Granularity,
    Rounding,
    Scaling,
    SimulatedName,
    base_row,
)
from lightning_fp.kernels.transformer_engine.recipe import GivenRecipe, is_recipe, read_recipe
from lightning_fp.numerics import DelayedScaling, float_format

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

QuantiseLike = Literal["master", "bf16-export"]
"""Which values of a weight an FP8 cast begins with."""

HIGH_PRECISION = tuple(row.name for row in TABLE if row.scaling == "none")
"""Formats that run nn.Linear; "high" is whatever nn.Linear computes in where it stands."""


@checked
@dataclass(frozen=True)
class LinearFormat:
    """In which numbers a linear layer multiplies.

    >>> linear_format("fp8-dynamic")
    LinearFormat('fp8-dynamic')
    >>> LinearFormat("dynamic", "tensor", grad_output="e4m3").name
    'fp8-dynamic[grad_output=e4m3]'
    """

    scaling: Scaling = "dynamic"
    """Where scales come from: the tensor itself ("dynamic"), earlier steps ("delayed"), nowhere."""

    granularity: Granularity = "tensor"
    """What shares one scale: the tensor; a row; a block of 128 values, of the weight 128x128; 32
    values, as in the MX formats; or 16, of the weight 16x16, as in NVFP4 ("nv")."""

    input: str = "e4m3"
    """Number format of the input, see `lightning_fp.numerics.float_format`."""

    weight: str = "e4m3"
    """Number format of the weight."""

    grad_output: str = "e5m2"
    """Number format of the gradient of the output."""

    grad_weight: GradWeight = "fp8"
    """Whether the weight's gradient is multiplied in FP8 or in high precision."""

    power_of_two: bool = False
    """Whether scales are powers of two, so that scaling itself rounds nothing."""

    rounding: Rounding = "nearest"
    """How values between two representable ones are rounded. Hardware knows "nearest"; the others
    are simulated."""

    quantise_like: QuantiseLike = "master"
    """Which values of a weight are cast: its own ("master"), or those of its bf16 export, which is
    what an inference engine receives and quantises ("bf16-export")."""

    torchao: Float8LinearConfig | None = None
    """The torchao config this format was read from, if it was."""

    recipe: GivenRecipe | None = None
    """The Transformer Engine recipe this format was read from, if it was."""

    def __post_init__(self) -> None:
        check_choice("scaling", self.scaling, get_args(Scaling))
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("grad_weight", self.grad_weight, get_args(GradWeight))
        check_choice("rounding", self.rounding, get_args(Rounding))
        if self.torchao is not None and not hasattr(self.torchao, "cast_config_input"):
            raise ValueError(f"torchao must be a Float8LinearConfig or None, got {self.torchao!r}")
        check_choice("quantise_like", self.quantise_like, get_args(QuantiseLike))
        if self.quantise_like != "master" and self.scaling == "none":
            raise ValueError(
                f"quantise_like must be 'master' where nothing is scaled, got"
                f" {self.quantise_like!r}; it is for FP8 formats, whose weights are cast"
            )
        if self.rounding != "nearest" and (self.scaling, self.granularity) not in _ROUNDED_AS_ASKED:
            raise ValueError(
                f"rounding must be 'nearest' with scaling {self.scaling!r} and granularity"
                f" {self.granularity!r}, got {self.rounding!r}; simulated formats are scaled per"
                " tensor, from the tensor itself, or not at all"
            )
        if self.scaling == "delayed" and self.granularity != "tensor":
            raise ValueError(
                f"granularity must be 'tensor' with delayed scaling, got {self.granularity!r};"
                " a history is kept per tensor"
            )
        if self.granularity == "mx" and not self.power_of_two:
            raise ValueError(
                "power_of_two must be True with granularity 'mx', got False; MX scales are powers"
                " of two (E8M0), granularity 'block' has others"
            )
        if self.input == "high":
            return
        for operand in ("input", "weight", "grad_output"):
            try:
                format = float_format(getattr(self, operand))
            except ValueError as error:
                raise ValueError(f"{operand}: {error}") from error
            if self.granularity == "nv":
                if format.name != "e2m1":
                    raise ValueError(
                        f"{operand} must be 'e2m1' with granularity 'nv', got {format.name!r}"
                    )
                continue
            if self.scaling == "none" or format.bits == 8:
                continue
            if (self.scaling, self.granularity) in _ROUNDED_AS_ASKED and format.exponent_bits < 8:
                continue
            raise ValueError(
                f"{operand} must be an 8-bit format (e4m3, e5m2, e4m3fnuz, e5m2fnuz) where"
                f" scaling is {self.scaling!r}, got {format.name!r}; scaling='none' simulates"
                " other formats, and 'dynamic' per tensor those of 2 to 7 exponent bits"
            )

    @property
    def is_high_precision(self) -> bool:
        """Whether the layer runs nn.Linear: no scaling, 16 or 32 bits, and one format for all."""
        operands = {self.input, self.weight, self.grad_output}
        plain = self.scaling == "none" and self.rounding == "nearest"
        return plain and len(operands) == 1 and self.input in HIGH_PRECISION

    @property
    def is_simulated(self) -> bool:
        """Whether no hardware has it: operands are rounded, and multiplied in high precision."""
        if self.scaling == "none":
            return not self.is_high_precision
        operands = (float_format(name) for name in (self.input, self.weight, self.grad_output))
        eight_bits = self.granularity == "nv" or all(each.bits == 8 for each in operands)
        return self.rounding != "nearest" or not eight_bits

    @property
    def is_fp8(self) -> bool:
        """Whether operands are cast to a real, scaled format of 8 bits, or of 4."""
        return self.scaling != "none" and not self.is_simulated

    @property
    def row(self) -> FormatRow:
        """The row of the table that it is, or changes something of."""
        return base_row(self.scaling, self.granularity)

    @property
    def name(self) -> str:
        """The shortest text that `linear_format` reads back to this format.

        A format read from a torchao config is named after what it does; only a map that was given
        the config reads its name back.
        """
        return _name_of(self)

    def __repr__(self) -> str:
        return f"LinearFormat({self.name!r})"


@checked
@dataclass(frozen=True)
class DynamicScaling:
    """Scales taken from the tensor that is cast."""

    granularity: Literal["tensor", "row", "block"] = "tensor"
    """What shares one scale."""

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "row", "block"):
            raise ValueError(
                f"granularity must be 'tensor', 'row' or 'block', got {self.granularity!r}"
            )


_ROUNDED_AS_ASKED = (("none", "tensor"), ("dynamic", "tensor"))
"""Scaling and granularity of what is simulated, in any number format and with any rounding."""


def _simulated(name: SimulatedName) -> LinearFormat:
    number = float_format(name.number).name
    scaling = "dynamic" if name.scaled else "none"
    return LinearFormat(scaling, "tensor", number, number, number, rounding=name.rounding)


NAMED_FORMATS: dict[str, LinearFormat] = {
    row.name: LinearFormat(
        row.scaling,
        row.granularity,
        *row.operands,
        grad_weight=row.grad_weight,
        power_of_two=row.power_of_two,
    )
    for row in TABLE
}
"""What each name stands for; every e{X}m{Y} is a name too."""

_WITH_CHANGES = re.compile(r"(?P<base>[\w-]+)\[(?P<changes>[^\]]*)\]")


@cache
def _name_of(format: LinearFormat) -> str:
    if format.torchao is not None:
        return _name_of(dataclasses.replace(format, torchao=None)).replace("fp8-", "torchao-", 1)
    if format.recipe is not None:
        return f"te-{_name_of(dataclasses.replace(format, recipe=None)).removeprefix('fp8-')}"
    for name, named in NAMED_FORMATS.items():
        if named == format:
            return name
    if format.is_simulated:
        number = float_format(format.input)
        said = SimulatedName(number.name, format.scaling == "dynamic", format.rounding)
        if str(said) in HIGH_PRECISION:  # "bf16[input=e8m3]"
            base, prefix = NAMED_FORMATS[number.name], number.name
        else:
            said = dataclasses.replace(said, number=number.text)
            base, prefix = _simulated(said), str(said)
    else:
        prefix = format.row.name
        base = NAMED_FORMATS[prefix]
    changes = [
        f"{field.name}={_text(getattr(format, field.name))}"
        for field in dataclasses.fields(format)
        if getattr(format, field.name) != getattr(base, field.name)
    ]
    return f"{prefix}[{','.join(changes)}]" if changes else prefix


FormatLike: TypeAlias = "str | LinearFormat | DynamicScaling | Float8LinearConfig"


def linear_format(value: FormatLike) -> LinearFormat:
    """The format that a user's value stands for.

    Args:
        value: a name or an alias, a `LinearFormat`, a `DynamicScaling`, a
            `torchao.float8.Float8LinearConfig`, or a recipe of `transformer_engine.common.recipe`.

    Returns:
        The format.

    Raises:
        ValueError: if there is no such format, or it is a choice for a whole run; it lists the
            names.
    """
    if isinstance(value, LinearFormat):
        return value
    if isinstance(value, DynamicScaling):
        return NAMED_FORMATS[base_row("dynamic", value.granularity).name]
    if isinstance(value, DelayedScaling) or value in AUTO:
        raise ValueError(
            f"format {value!r} cannot be used: a choice for a whole run, not a format; it is given"
            " as scaling, e.g. FP8Precision('auto', tokens=...); take 'fp8-delayed' or"
            " 'fp8-dynamic' here"
        )
    if not isinstance(value, str):
        return _from_recipe(value) if is_recipe(value) else _from_torchao(value)
    if value in CANONICAL:
        return NAMED_FORMATS[CANONICAL[value]]
    if found := _WITH_CHANGES.fullmatch(value):
        return _changed(linear_format(found["base"]), found["changes"], value)
    if simulated := SimulatedName.read(value):
        return _simulated(simulated)
    short = [name for row in TABLE for name in row.aliases[:1]]
    other = " or a simulated e{X}m{Y} such as 'e8m3' or 'e8m3-truncate'"
    raise unknown("format", value, tuple(NAMED_FORMATS), other=other, aliases=short)


def quantised_like(format: LinearFormat, like: QuantiseLike) -> LinearFormat:
    """The same format, its weights cast from other values; formats that cast none stay.

    Args:
        format: any.
        like: which values.
    """
    return dataclasses.replace(format, quantise_like=like) if format.is_fp8 else format


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(base: LinearFormat, changes: str, text: str) -> LinearFormat:
    """`base` with "field=value,field=value" applied."""
    known = {field.name for field in dataclasses.fields(base)} - {"torchao", "recipe"}
    values: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        field, _, value = change.partition("=")
        check_choice(f"format {text!r}: field", field, sorted(known))
        if field == "power_of_two":
            check_choice(field, value, ("true", "false"))
        values[field] = value == "true" if field == "power_of_two" else value
    return dataclasses.replace(base, **values)  # pyright: ignore[reportArgumentType]


def _from_recipe(recipe: Any) -> LinearFormat:
    """Read a recipe of Transformer Engine; the object itself is kept and used as it is."""
    settings = read_recipe(recipe)
    base = NAMED_FORMATS[settings.format]
    return dataclasses.replace(
        base,
        grad_output=settings.grad_output,
        power_of_two=settings.power_of_two or base.power_of_two,
        recipe=settings.given,
    )


def _from_torchao(config: Any) -> LinearFormat:
    """Read a `Float8LinearConfig`; the config itself is kept and used as it is."""
    from lightning_fp.kernels.torchao import import_float8
    from lightning_fp.numerics import format_of_dtype

    float8 = import_float8()
    if not isinstance(config, float8.Float8LinearConfig):
        raise ValueError(
            "format must be a name, a LinearFormat, a torchao Float8LinearConfig or a Transformer"
            " Engine recipe, got"
            f" {config!r} of type {type(config).__name__}"
        )
    if config.cast_config_input.scaling_type is float8.ScalingType.DISABLED:
        raise ValueError(
            "cast_config_input must scale the input, got DISABLED; use the format 'bf16' instead"
        )
    by_row = config.cast_config_input.scaling_granularity is float8.ScalingGranularity.AXISWISE
    high = config.cast_config_input_for_grad_weight.scaling_type is float8.ScalingType.DISABLED
    return LinearFormat(
        "dynamic",
        "row" if by_row else "tensor",
        input=format_of_dtype(config.cast_config_input.target_dtype).name,
        weight=format_of_dtype(config.cast_config_weight.target_dtype).name,
        grad_output=format_of_dtype(config.cast_config_grad_output.target_dtype).name,
        grad_weight="high" if high else "fp8",
        power_of_two=config.round_scales_to_power_of_2,
        torchao=config,
    )
