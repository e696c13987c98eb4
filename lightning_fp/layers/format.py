"""The formats users type: "bf16", "fp8-dynamic", "fp8-rowwise", "e8m3", ...

A name stands for a `LinearFormat`; the record is accepted wherever a name is.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning_fp.kernels.transformer_engine.recipe import (
    FORMAT_OF_KIND,
    GivenRecipe,
    is_recipe,
    read_recipe,
)
from lightning_fp.numerics import Rounding, float_format

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

Scaling = Literal["none", "dynamic", "delayed"]
Granularity = Literal["tensor", "row", "block", "mx", "nv"]
GradWeight = Literal["fp8", "high"]

HIGH_PRECISION = ("high", "fp32", "bf16", "fp16")
"""Formats that run nn.Linear; "high" is whatever nn.Linear computes in where it stands."""


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
    """How simulated formats round."""

    torchao: Float8LinearConfig | None = None
    """The torchao config this format was read from, if it was."""

    recipe: GivenRecipe | None = None
    """The Transformer Engine recipe this format was read from, if it was."""

    def __post_init__(self) -> None:
        _check_choice("scaling", self.scaling, ("none", "dynamic", "delayed"))
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("grad_weight", self.grad_weight, ("fp8", "high"))
        _check_choice("rounding", self.rounding, ("nearest", "truncate"))
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
            format = float_format(getattr(self, operand))
            if self.granularity == "nv":
                if format.name != "e2m1":
                    raise ValueError(
                        f"{operand} must be 'e2m1' with granularity 'nv', got {format.name!r}"
                    )
                continue
            if self.scaling != "none" and format.bits != 8:
                raise ValueError(
                    f"{operand} must be an 8-bit format (e4m3, e5m2, e4m3fnuz, e5m2fnuz) where"
                    f" scaling is {self.scaling!r}, got {format.name!r}; scaling='none' simulates"
                    " other formats"
                )

    @property
    def is_high_precision(self) -> bool:
        """Whether the layer runs nn.Linear: no scaling, 16 or 32 bits, and one format for all."""
        operands = {self.input, self.weight, self.grad_output}
        return self.scaling == "none" and len(operands) == 1 and self.input in HIGH_PRECISION

    @property
    def is_fp8(self) -> bool:
        """Whether operands are cast to a real, scaled format of 8 bits, or of 4."""
        return self.scaling != "none"

    @property
    def name(self) -> str:
        """The shortest text that `linear_format` reads back to this format.

        A format read from a torchao config is named after what it does; only a map that was given
        the config reads its name back.
        """
        return _name_of(self)

    def __repr__(self) -> str:
        return f"LinearFormat({self.name!r})"


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")


def _simulated(operand: str) -> LinearFormat:
    return LinearFormat("none", "tensor", operand, operand, operand)


_ROWWISE = LinearFormat("dynamic", "row", grad_output="e4m3", power_of_two=True)
NAMED_FORMATS: dict[str, LinearFormat] = {
    **{name: _simulated(name) for name in HIGH_PRECISION},
    "fp8-dynamic": LinearFormat("dynamic", "tensor"),
    "fp8-delayed": LinearFormat("delayed", "tensor"),
    "fp8-rowwise": _ROWWISE,
    "fp8-rowwise-gw-hp": dataclasses.replace(_ROWWISE, grad_weight="high"),
    "fp8-block": LinearFormat("dynamic", "block", grad_output="e4m3"),
    "mxfp8": LinearFormat("dynamic", "mx", grad_output="e4m3", power_of_two=True),
    "nvfp4": LinearFormat("dynamic", "nv", "e2m1", "e2m1", "e2m1"),
}
"""What each name stands for; every e{X}m{Y} is a name too."""

_BASES = {
    ("dynamic", "tensor"): "fp8-dynamic",
    ("delayed", "tensor"): "fp8-delayed",
    ("dynamic", "row"): "fp8-rowwise",
    ("dynamic", "block"): "fp8-block",
    ("dynamic", "mx"): "mxfp8",
    ("dynamic", "nv"): "nvfp4",
}

_NOT_HERE = {
    "fp8-auto": "a choice for a whole run, not a format; write FP8Precision('auto', tokens=...)",
}

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
    if format.scaling == "none":
        base, prefix = _simulated(format.input), format.input
    else:
        prefix = _BASES[format.scaling, format.granularity]
        base = NAMED_FORMATS[prefix]
    changes = [
        f"{field.name}={_text(getattr(format, field.name))}"
        for field in dataclasses.fields(format)
        if getattr(format, field.name) != getattr(base, field.name)
    ]
    return f"{prefix}[{','.join(changes)}]" if changes else prefix


FormatLike: TypeAlias = "str | LinearFormat | Float8LinearConfig"


def linear_format(value: FormatLike) -> LinearFormat:
    """The format that a user's value stands for.

    Args:
        value: a name, a `LinearFormat`, a `torchao.float8.Float8LinearConfig`, or a recipe of
            `transformer_engine.common.recipe`.

    Returns:
        The format.

    Raises:
        ValueError: if there is no such format, or not in this version; it lists the names.
    """
    if isinstance(value, LinearFormat):
        return value
    if not isinstance(value, str):
        return _from_recipe(value) if is_recipe(value) else _from_torchao(value)
    if value in NAMED_FORMATS:
        return NAMED_FORMATS[value]
    if value in _NOT_HERE:
        raise ValueError(f"format {value!r} cannot be used: {_NOT_HERE[value]}")
    if found := _WITH_CHANGES.fullmatch(value):
        return _changed(linear_format(found["base"]), found["changes"], value)
    if re.fullmatch(r"e\d+m\d+\w*", value):
        return _simulated(float_format(value).name)
    raise ValueError(
        f"format must be one of {', '.join(NAMED_FORMATS)} or a simulated e{{X}}m{{Y}} such as"
        f" 'e8m3', got {value!r}"
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(base: LinearFormat, changes: str, text: str) -> LinearFormat:
    """`base` with "field=value,field=value" applied."""
    known = {field.name for field in dataclasses.fields(base)} - {"torchao", "recipe"}
    values: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        field, _, value = change.partition("=")
        if field not in known:
            raise ValueError(
                f"format {text!r}: field must be one of {', '.join(sorted(known))}, got {field!r}"
            )
        if field == "power_of_two":
            _check_choice(field, value, ("true", "false"))
        values[field] = value == "true" if field == "power_of_two" else value
    return dataclasses.replace(base, **values)  # pyright: ignore[reportArgumentType]


def _from_recipe(recipe: Any) -> LinearFormat:
    """Read a recipe of Transformer Engine; the object itself is kept and used as it is."""
    settings = read_recipe(recipe)
    base = NAMED_FORMATS.get(FORMAT_OF_KIND[settings.kind])
    if base is None:
        raise ValueError(f"recipe {type(recipe).__name__} cannot be used: it is no 8-bit format")
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
