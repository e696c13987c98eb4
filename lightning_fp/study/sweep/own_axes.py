"""The axes that the sweep itself knows, and which values they can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightning_fp.choices import check_choice
from lightning_fp.plugins.names import precision_plugin
from lightning_fp.recipes.builtin import read
from lightning_fp.study.sweep.grid import Cell, Value

OWN_AXES: Mapping[str, str] = MappingProxyType(
    {
        "clip": "largest norm of the gradients; 0 clips nothing",
        "fallback": "on or off: PrecisionFallback",
        "recipe": "a rollout recipe: a name or a YAML file; off without",
        "signals": "on or off: StabilityMonitor, for `study predictors`",
        "base": "precision of everything else, e.g. 32-true; bf16-mixed by default",
        "attention": "a simulated format for attention's products, e.g. e8m3; off without",
        "layers": "default, or all: a format is in all linear layers, the head too",
    }
)
"""All others are parameters of the factory."""


def check_own_axes(cells: Sequence[Cell]) -> None:
    """Refuse values that no run could make sense of, before there are any runs.

    Args:
        cells: of the sweep.

    Raises:
        ValueError: naming the axis.
    """
    formats = sorted({cell.format for cell in cells})
    seen = {(name, value) for cell in cells for name, value in cell.axes.items()}
    for name, value in sorted(seen, key=str):
        _check(name, value, formats)


def _check(name: str, value: Value, formats: Sequence[str]) -> None:
    field = f"--axis {name}"
    if name in ("fallback", "signals") and value not in (True, False):
        raise ValueError(f"{field} must be on or off, got {value!r}")
    if name == "clip":
        number = isinstance(value, int | float)  # off is 0
        if not (number and math.isfinite(value) and value >= 0):
            raise ValueError(f"{field} must be a finite number of at least 0, got {value!r}")
    if name == "attention" and value is True:
        raise ValueError(f"{field} must be a simulated format, such as e8m3, or off, got 'on'")
    if name == "attention" and value and "fp16" in formats:
        raise ValueError(f"{field} must be off with fp16 among the formats, got {value!r}")
    if name == "layers":
        check_choice(field, value, ("default", "all"))
    try:
        if name == "recipe" and value:
            read(str(value))
        plugins = name == "base" or (name == "attention" and value is not False)
        for format in formats if plugins else ():
            precision_plugin(format, **{name: value})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{field}: {' '.join(str(error).split())}") from error
