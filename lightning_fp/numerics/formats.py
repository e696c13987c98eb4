"""What a number format can hold, and where clamping and underflow begin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_fp.choices import did_you_mean

Specials = Literal["ieee", "nan", "nan_at_negative_zero", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatFormat:
    """A binary floating-point format: one sign bit, `exponent_bits`, `mantissa_bits`.

    All limits are exact Python floats, in units of the format itself (after scaling).
    """

    name: str
    """Canonical name, e.g. "e4m3", "bf16"."""

    exponent_bits: int
    """Width of the exponent field."""

    mantissa_bits: int
    """Width of the stored mantissa, without the implicit leading one."""

    bias: int
    """The exponent field of 1.0."""

    specials: Specials = "ieee"
    """What is kept for non-numbers: "ieee" gives up the top exponent for inf and NaN, "nan" only
    the all-ones code (OCP e4m3fn), "nan_at_negative_zero" only the code of -0 (fnuz), "none"
    nothing (the 4- and 6-bit OCP MX element formats)."""

    dtype: torch.dtype | None = None
    """The torch dtype that stores it, if there is one."""

    @property
    def text(self) -> str:
        """The name that says its widths: "e8m7" of bf16, and "e4m3fnuz"."""
        widths = f"e{self.exponent_bits}m{self.mantissa_bits}"
        return self.name if self.name.startswith(widths) else widths

    @property
    def bits(self) -> int:
        """Storage width, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_inf(self) -> bool:
        """Whether the format has a code for infinity."""
        return self.specials == "ieee"

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value."""
        top = 2**self.exponent_bits - 1 - self.bias
        return top - 1 if self.specials == "ieee" else top

    @property
    def _max_mantissa(self) -> int:
        """Mantissa field of the largest finite value: its last bit decides how a tie rounds."""
        full = 2**self.mantissa_bits - 1
        return full - 1 if self.specials == "nan" else full

    @property
    def max(self) -> float:
        """Largest finite value."""
        return (1 + self._max_mantissa / 2**self.mantissa_bits) * 2.0**self.max_exponent

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Distance from 1.0 to the next larger value."""
        return 2.0**-self.mantissa_bits

    @property
    def clamp_point(self) -> float:
        """Magnitude from which on clamping loses more than rounding would have.

        Halfway between the largest value and the one that would follow it: below, rounding to
        nearest gives `max` by itself. 464 for e4m3, 61440 for e5m2.
        """
        return self.max + 2.0 ** (self.max_exponent - self.mantissa_bits - 1)

    @property
    def clamp_point_clamps(self) -> bool:
        """Whether a value exactly at `clamp_point` is clamped (ties go to the even mantissa).

        Without mantissa bits neither neighbour is even, and IEEE 754 takes the larger one.
        """
        return self._max_mantissa % 2 == 1 or self.mantissa_bits == 0

    @property
    def underflow_point(self) -> float:
        """Largest magnitude that rounds to zero: half the smallest subnormal (ties to even)."""
        return self.smallest_subnormal / 2


_NAMED = (
    FloatFormat(name="fp32", exponent_bits=8, mantissa_bits=23, bias=127, dtype=torch.float32),
    FloatFormat(name="bf16", exponent_bits=8, mantissa_bits=7, bias=127, dtype=torch.bfloat16),
    FloatFormat(name="fp16", exponent_bits=5, mantissa_bits=10, bias=15, dtype=torch.float16),
    FloatFormat(
        name="e4m3",
        exponent_bits=4,
        mantissa_bits=3,
        bias=7,
        specials="nan",
        dtype=torch.float8_e4m3fn,
    ),
    FloatFormat(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, dtype=torch.float8_e5m2),
    FloatFormat(
        name="e4m3fnuz",
        exponent_bits=4,
        mantissa_bits=3,
        bias=8,
        specials="nan_at_negative_zero",
        dtype=torch.float8_e4m3fnuz,
    ),
    FloatFormat(
        name="e5m2fnuz",
        exponent_bits=5,
        mantissa_bits=2,
        bias=16,
        specials="nan_at_negative_zero",
        dtype=torch.float8_e5m2fnuz,
    ),
    # Element types of the OCP Microscaling specification v1.0: no inf, no NaN.
    FloatFormat(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, specials="none"),
    FloatFormat(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, specials="none"),
    FloatFormat(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, specials="none"),
)
FORMATS: dict[str, FloatFormat] = {format.name: format for format in _NAMED}
"""The formats with a name of their own. Every other e{X}m{Y} follows IEEE 754's pattern."""

_BY_DTYPE = {format.dtype: format for format in _NAMED if format.dtype is not None}
_ALIASES = {"e4m3fn": "e4m3", "e8m7": "bf16", "e5m10": "fp16", "e8m23": "fp32"}
_GENERAL = re.compile(r"e([2-8])m([0-9]|1[0-9]|2[0-3])")


def float_format(name: str) -> FloatFormat:
    """The format called `name`.

    Args:
        name: "fp32", "bf16", "fp16", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3",
            "e2m1", or any "e{X}m{Y}" with 2 to 8 exponent and 0 to 23 mantissa bits.

    Returns:
        The format; an e{X}m{Y} without a name of its own keeps the top exponent for inf and NaN
        as IEEE 754 does.

    Raises:
        ValueError: if there is no such format.
    """
    if not isinstance(name, str):
        raise ValueError(f"name must be that of a number format, such as 'e4m3', got {name!r}")
    name = _ALIASES.get(name, name)
    if name in FORMATS:
        return FORMATS[name]
    if found := _GENERAL.fullmatch(name):
        exponent_bits, mantissa_bits = int(found[1]), int(found[2])
        return FloatFormat(
            name=name,
            exponent_bits=exponent_bits,
            mantissa_bits=mantissa_bits,
            bias=2 ** (exponent_bits - 1) - 1,
        )
    raise ValueError(
        f"number format must be one of {', '.join(FORMATS)} or e{{X}}m{{Y}} with 2 to 8 exponent "
        f"and 0 to 23 mantissa bits, got {name!r}; e.g. 'e4m3' or 'e8m3'"
        f"{did_you_mean(name, FORMATS)}"
    )


def format_of_dtype(dtype: torch.dtype) -> FloatFormat:
    """The format that a torch dtype stores.

    Raises:
        ValueError: if the dtype is not one of the floating-point formats known here.
    """
    if dtype not in _BY_DTYPE:
        known = ", ".join(str(dtype) for dtype in _BY_DTYPE)
        raise ValueError(f"dtype must be one of {known}, got {dtype}; convert the tensor first")
    return _BY_DTYPE[dtype]
