"""The cells of a sweep: a format, a learning rate, a seed, and a value of every further axis."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from lightning_fp.choices import check_at_least
from lightning_fp.format_names import AUTO
from lightning_fp.layers import linear_format

Value: TypeAlias = "int | float | bool | str"
"""Of a further axis."""

_UNSAFE = re.compile(r"[^\w.=+-]")
"""What had better not stand in the name of a directory."""

_TRUTH = {"on": True, "off": False, "true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    format: str
    lr: float
    seed: int
    axes: Mapping[str, Value] = field(default_factory=dict[str, Value])
    """Values of the further axes, by name."""

    @property
    def id(self) -> str:
        """Its name in the table, and of its directory.

        >>> Cell(format="fp8-dynamic", lr=3e-3, seed=1, axes={"clip": 1.0}).id
        'fp8-dynamic-lr0.003-seed1-clip=1.0'
        """
        further = "".join(f"-{name}={shown(value)}" for name, value in self.axes.items())
        plain = f"{self.format}-lr{self.lr!r}-seed{self.seed}{further}"
        safe = _UNSAFE.sub("_", plain)
        if safe == plain:
            return plain
        return f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

    @property
    def setting(self) -> str:
        """The further axes in words; "" without any."""
        return ", ".join(f"{name} {shown(value)}" for name, value in self.axes.items())

    def to_json(self) -> str:
        """As text that `from_json` reads back to an equal one."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """See `to_json`."""
        return cls(**json.loads(text))


def grid(
    formats: Sequence[str],
    lrs: Sequence[float],
    seeds: Sequence[int],
    axes: Mapping[str, Sequence[Value]],
) -> list[Cell]:
    """Every combination, seed by seed, so that a sweep that is cut short has seen all settings.

    Args:
        formats: their names; other spellings of the same one are refused.
        lrs: learning rates.
        seeds: of weights and batches.
        axes: values by the name of the axis.

    Raises:
        ValueError: for an axis without values, a value given twice, or one that cannot be.
    """
    names = [format_name(each) for each in formats]
    for lr in lrs:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"--lr must be finite and above 0, got {lr!r}")
    check_at_least(0, **{"--seeds": min(seeds, default=0)})
    given: dict[str, Sequence[Any]] = {"--formats": names, "--lr": lrs, "--seeds": seeds}
    given |= {f"--axis {name}": values for name, values in axes.items()}
    for name, values in given.items():
        if not values:
            raise ValueError(f"{name} must have at least one value, got none")
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"{name} has {twice[0]!r} twice")
    settings = [dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())]
    return [
        Cell(format=format, lr=float(lr), seed=seed, axes=setting)
        for seed in seeds
        for setting in settings
        for lr in lrs
        for format in names
    ]


def format_name(text: str) -> str:
    """A format's name as records have it, of any that is read.

    Raises:
        ValueError: if there is no such format.
    """
    if text in AUTO:
        return AUTO[-1]
    return linear_format(text).name


def parse_axes(arguments: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """Axes from the command line.

    >>> parse_axes(["batch_size=8,16", "fallback=on,off"])
    {'batch_size': (8, 16), 'fallback': (True, False)}

    Args:
        arguments: each "NAME=VALUE,VALUE".

    Raises:
        ValueError: naming the argument that is none, or a name that is given twice.
    """
    axes: dict[str, tuple[Value, ...]] = {}
    for argument in arguments:
        name, equals, values = argument.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier() and values.strip()):
            raise ValueError(f"--axis must be NAME=VALUE,VALUE, got {argument!r}")
        if name in ("format", "formats", "lr", "seed", "seeds"):
            raise ValueError(f"--axis {name}: formats, rates and seeds have options of their own")
        if name in axes:
            raise ValueError(f"--axis {name} is given twice")
        axes[name] = tuple(_value(text.strip()) for text in values.split(","))
    return axes


def _value(text: str) -> Value:
    if text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def shown(value: Value) -> str:
    """A value as it was written."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
