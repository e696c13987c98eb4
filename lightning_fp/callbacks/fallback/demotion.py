"""Where the fallback writes to the table: demotions, climbs, promotions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.precision_map import Change
from lightning_fp.plugins import LayerPrecision

AUTHOR = "fallback"
"""Of these writes, which have events of their own."""


def write_formats(
    plugin: LayerPrecision, formats: Mapping[str, LinearFormat], reason: str
) -> list[Change]:
    """Give layers other formats at once, through the table, as anybody.

    Args:
        plugin: whose table it is; between two optimizer steps, alike on all ranks.
        formats: by exact layer name.
        reason: a sentence for the log.

    Returns:
        What has changed.
    """
    for name, format in formats.items():
        pattern = f"re:{re.escape(name)}"
        plugin.precision_map.set(pattern, linear_format(format), reason=reason, author=AUTHOR)
    return [change for change in plugin.boundary() if change.author == AUTHOR]
