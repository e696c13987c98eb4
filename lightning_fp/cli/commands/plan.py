"""Show what conversion would do to a model, layer by layer, without training it."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from torch import nn

from lightning_fp.cli.commands.plan_hardware import outlook
from lightning_fp.cli.loading import load_model
from lightning_fp.cli.output import console
from lightning_fp.kernels.cost.data_sheets import DATA_SHEETS, DataSheet, Hardware
from lightning_fp.kernels.hardware import cuda_has_fp8
from lightning_fp.kernels.padding import WORTH_SAYING
from lightning_fp.layers import (
    Conversion,
    ConversionReport,
    LayerReport,
    PrecisionMap,
    convert_into,
    linear_format,
)
from lightning_fp.layers.conversion.decide import decide
from lightning_fp.layers.conversion.flops import example_flops
from lightning_fp.layers.conversion.report import padding_of
from lightning_fp.layers.rules import layer_rules
from lightning_fp.layers.scaling import read_scaling
from lightning_fp.records.jsonl import json_text
from lightning_fp.terminal import FittedTable

_RULE = re.compile(r"(?P<pattern>.+)=(?P<format>[\w-]+(\[[^\]]*\])?)")


def run(
    factory: str,
    scaling: str,
    layers: Sequence[str],
    backend: Any,
    *,
    cuda_fp8: bool,
    hardware: Hardware | None = None,
    tokens: int | None = None,
    devices: int = 1,
    fp8_all_gather: bool = False,
    all: bool,
    json: bool,
) -> int:
    """Print the conversion report of a user's model; see `commands.plan`.

    Raises:
        ValueError: if the model cannot be built or the conversion is refused.
    """
    user = load_model(factory)
    card = None if hardware is None else DATA_SHEETS[hardware]
    if card is not None:
        cuda_fp8 = card.fp8 is not None
    report = planned(user.model, scaling, layers, backend, cuda_fp8=cuda_fp8, card=card)
    note = "FLOPs: of the linear layers, for lack of an example input"
    if user.example_input is not None:
        try:
            report = report.with_flops(*example_flops(user.model, user.example_input))
            note = "FLOPs: of the whole model, counted in one forward of the example input"
        except Exception as error:  # whatever a user's forward raises; shapes are known anyway
            note = f"FLOPs: of the linear layers; the forward failed: {_first_line(error)}"
    found = None
    if hardware is not None:
        found = outlook(
            user,
            report,
            hardware,
            backend=backend,
            tokens=tokens,
            devices=devices,
            fp8_all_gather=fp8_all_gather,
        )
    if json:
        print(report.to_json() if found is None else json_text(found.to_dict(report)))
    else:
        rows = [Row(**vars(layer)) for layer in report.layers]
        screen = console()
        screen.print(_as_table(rows if all else fold(rows)))
        screen.print(report.summary(), markup=False, soft_wrap=True)
        screen.print(note, markup=False, soft_wrap=True, style="dim")
        if found is not None:
            found.show(screen)
        if not cuda_fp8 and card is None:
            elsewhere = on_hardware(user.model, scaling, layers, backend)
            if elsewhere:
                screen.print(elsewhere, markup=False, soft_wrap=True, style="dim")
    return 0


def planned(
    model: nn.Module,
    scaling: str,
    layers: Sequence[str] = (),
    backend: Any = "auto",
    *,
    cuda_fp8: bool = False,
    card: DataSheet | None = None,
) -> ConversionReport:
    """Convert a model as FP8Precision over BF16 would; see `commands.plan`."""
    cuda_fp8 = cuda_fp8 or (card is None and cuda_has_fp8())
    conversion = _conversion(scaling, layers, backend, cuda_fp8=cuda_fp8)
    conversion = dataclasses.replace(conversion, card=card)
    return convert_into(PrecisionMap(backend=backend, cuda_fp8=cuda_fp8), model, conversion)


def on_hardware(
    model: nn.Module, scaling: str, layers: Sequence[str] = (), backend: Any = "auto"
) -> str:
    """What FP8 hardware would make of a model otherwise than what is here; "" if nothing.

    Only there a GEMM wants whole blocks, and has no product of certain formats.
    """
    if cuda_has_fp8():
        return ""
    here, there = (_conversion(scaling, layers, backend, cuda_fp8=on) for on in (False, True))
    try:
        found = decide(model, there)
    except ValueError as error:
        return f"On FP8 hardware it is refused: {error}"
    emulated = decide(model, here)
    other = [name for name, each in found.items() if each.format != emulated[name].format]
    if not other:
        return ""
    first = found[other[0]]
    return (
        f"On FP8 hardware (--cuda-fp8) {len(other)} of {len(found)} layers are otherwise, e.g."
        f" {other[0]}: {first.format.name}, {first.reason}"
    )


def _conversion(scaling: str, layers: Sequence[str], backend: Any, *, cuda_fp8: bool) -> Conversion:
    return Conversion(
        format=read_scaling(scaling).format,
        rules=layer_rules(parse_rules(layers)),
        backend=backend,
        high_precision=linear_format("bf16"),
        cuda_fp8=cuda_fp8,
    )


def parse_rules(arguments: Sequence[str]) -> dict[str, str]:
    """Layer rules from the command line, in order.

    >>> parse_rules(["*head=bf16", '{"*.mlp.*": "fp8-rowwise"}'])
    {'*head': 'bf16', '*.mlp.*': 'fp8-rowwise'}

    Args:
        arguments: each "PATTERN=FORMAT" or a JSON object.

    Raises:
        ValueError: naming the argument that is neither, or a pattern that is given twice.
    """
    rules: list[tuple[str, str]] = []
    for argument in arguments:
        if found := _RULE.fullmatch(argument.strip()):
            rules.append((found["pattern"], found["format"]))
            continue
        try:
            parsed = json_module.loads(argument)
        except json_module.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError(
                f"--layers must be PATTERN=FORMAT or a JSON object, got {argument!r}; e.g."
                " --layers '*head=bf16'"
            )
        rules.extend(parsed.items())
    patterns = [pattern for pattern, _ in rules]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(f"--layers: pattern {pattern!r} is given twice")
    return dict(rules)


@dataclass(frozen=True, kw_only=True)
class Row(LayerReport):
    """One row of the table: a layer, or layers that differ in the numbers of their blocks only.

    The name of several layers is a pattern that matches them, and can serve in a rule.
    """

    layers: int = 1
    """How many."""


def fold(rows: Sequence[Row]) -> list[Row]:
    """Add up the rows of layers that are alike, as in the blocks of a transformer.

    Args:
        rows: one for every layer.

    Returns:
        One row for all layers of equal size, format and reason whose names differ in numbers
        only; "blocks.*.mlp.up" for "blocks.0.mlp.up", "blocks.1.mlp.up", ...
    """
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdecimal() else part for part in row.name.split("."))
        key = (pattern, row.format, row.kernel, row.parameters, row.reason)
        alike.setdefault(key, []).append(row)
    return [
        dataclasses.replace(
            group[0],
            name=group[0].name if len(group) == 1 else str(pattern),
            layers=len(group),
            parameters=sum(row.parameters for row in group),
            flops_share=sum(row.flops_share for row in group),
            padding=padding_of(group),
        )
        for (pattern, *_), group in alike.items()
    ]


def _as_table(rows: Sequence[Row]) -> FittedTable:
    numbers = ("layers", "parameters", "FLOPs")
    grid = FittedTable("", "layer", "format, kernel", *numbers, right=numbers)
    for row in rows:
        grid.add_row(
            Text(row.title + (f"\n  {note}" if (note := _note(row)) else "")),
            Text(f"{row.format}\n  {row.kernel}"),
            str(row.layers),
            f"{row.parameters:,}",
            f"{row.flops_share:.1%}",
            style="" if row.reason is None else "dim",
        )
    return grid


def _note(row: Row) -> str:
    if row.reason is None and row.padding > WORTH_SAYING:
        return f"zeros that fill up blocks: {row.padding:.1%} of its FLOPs"
    return row.reason or ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
