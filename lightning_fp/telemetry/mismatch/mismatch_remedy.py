"""What brings training and rollout closer together: more mantissa bits in the layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_fp.layers import LinearFormat, PrecisionMap, linear_format
from lightning_fp.layers.table_owner import TableOwner

FP16 = linear_format("fp16")


def raised_formats(owner: TableOwner, to: LinearFormat | None) -> dict[str, LinearFormat]:
    """The next formats on the way to a smaller mismatch.

    From FP8 and the simulated formats to the base's, in all layers. Where none is left, from bf16
    to fp16, whose three more bits of mantissa make the mismatch 8 times smaller (arXiv 2510.26788),
    if it scales its loss: without that small gradients are lost. A layer that somebody has
    taken out of fp16 stays out.

    Args:
        owner: of the table.
        to: the format to raise all layers to; None takes the way above.

    Returns:
        The new format of each layer that gets one, by name; empty if nothing is left to be raised.
    """
    table = owner.precision_map
    layers = table.layers
    if to is not None:
        wanted = {name: to for name, layer in layers.items() if layer.format != to}
    else:
        low = [name for name, layer in layers.items() if not layer.format.is_high_precision]
        wanted = dict.fromkeys(low, owner.base_format)
        if not low and owner.scaler is not None:
            kept = _taken_out_of_fp16(table)
            in_bf16 = [name for name, layer in layers.items() if layer.format.name == "bf16"]
            wanted = {name: FP16 for name in in_bf16 if name not in kept}
    return {
        name: format for name, format in wanted.items() if table.known.can_run(layers[name], format)
    }


def write_formats(
    table: PrecisionMap, formats: Mapping[str, LinearFormat], reason: str
) -> dict[str, tuple[str, str]]:
    """Give layers their new formats from the next step on.

    Returns:
        Each layer's format before and after, by name.
    """
    changes = {name: (table.layers[name].format.name, to.name) for name, to in formats.items()}
    for name, format in formats.items():
        table.set(f"re:{re.escape(name)}", format, reason=reason, author="mismatch")
    return changes


def _taken_out_of_fp16(table: PrecisionMap) -> set[str]:
    last = {change.layer: change for change in table.changes}
    return {name for name, change in last.items() if change.before == "fp16"}
