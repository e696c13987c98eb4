"""The formats that are compared, and a model converted to one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from parts.card import Card

if TYPE_CHECKING:
    from lightning_fp import PrecisionMap

BF16 = "bf16"
OURS = ("fp8-dynamic", "fp8-delayed", "fp8-rowwise", "fp8-rowwise-gw-hp", "mxfp8", "fp8-block")
TRANSFORMER_ENGINE = ("fp8-dynamic", "fp8-delayed", "fp8-block", "mxfp8", "nvfp4")


def alternatives(card: Card) -> dict[str, tuple[str, str]]:
    """(format, backend) by the name they have in the rows."""
    from lightning_fp.kernels.transformer_engine import availability

    found = {name: (name, "auto") for name in (("fp8-delayed",) if card.small else OURS)}
    there = availability()
    for name in TRANSFORMER_ENGINE:
        if there.get(name) is None:
            found[f"{name}, Transformer Engine"] = name, "transformer-engine"
    return found


def converted(model: nn.Module, format: str, backend: str = "auto") -> PrecisionMap:
    """Convert every linear layer of a model in place.

    Returns:
        The table, whose `forward_context` goes around each forward, and whose `step` ends a step.

    Raises:
        ValueError: if the format cannot run here, with the reason.
    """
    from lightning_fp import convert

    return convert(model, format, layers={"*": format}, backend=backend).precision_map


def first_line(error: Exception) -> str:
    """An error in a row's note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
