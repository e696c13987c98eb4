"""What `lightning-fp plan --hardware` predicts for this card, beside what was measured on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from parts.card import Card
from parts.rows import Rows

if TYPE_CHECKING:
    from lightning_fp.kernels.cost import DataSheet

NAMES = {
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "l40s": "L40S",
    "rtx4090": "RTX 4090",
    "a100": "A100",
    "mi300": "MI300",
}
"""A part of the name that the driver gives a card, by that of its data sheet."""


def data_sheet(card: Card) -> DataSheet | None:
    """That of this card, of an H100 in a dry run; None where there is none."""
    from lightning_fp.kernels.cost import DATA_SHEETS

    name = "H100" if card.small else torch.cuda.get_device_name()
    found = (sheet for key, sheet in DATA_SHEETS.items() if NAMES[key] in name)
    return next(found, None)


def of_layer(card: Card, format: str, backend: str, tokens: int, wide: int, out: int) -> float:
    """The gain of one compiled linear layer over bf16; 0 where none is predicted here."""
    from lightning_fp.kernels.cost import predicted_speedup
    from lightning_fp.layers.conversion.casting import casting_of
    from lightning_fp.layers.format import linear_format

    sheet, casting = data_sheet(card), casting_of(linear_format(format), backend)
    if sheet is None or casting is None:
        return 0.0
    return predicted_speedup(sheet, casting, tokens, wide, out)


def of_step(card: Card, model: nn.Module, format: str, backend: str, tokens: torch.Tensor) -> float:
    """The gain of a whole compiled step, with every linear layer in a format; 0 as above."""
    from lightning_fp.layers.conversion.prediction import predict
    from lightning_fp.layers.conversion.work import counting_work
    from lightning_fp.layers.format import linear_format

    sheet = data_sheet(card)
    if sheet is None:
        return 0.0
    with torch.no_grad(), counting_work(model) as work:
        model(tokens)
    formats = dict.fromkeys(work.layers, linear_format(format))
    return predict(model, formats, sheet, work, backend=backend).speedup_end_to_end or 0.0


def add(card: Card, rows: Rows, what: str, predicted: float, measured: float) -> None:
    """One row: the prediction, and by what factor the measurement differs from it."""
    if not predicted:
        return
    sheet = cast("DataSheet", data_sheet(card))
    note = f"by its data sheet ({sheet.name}); ratio: measured over predicted"
    rows.add(
        f"predicted, {what}", predicted, "times BF16's speed", ratio=measured / predicted, note=note
    )
