"""Where the fallback writes to the table: demotions, climbs, promotions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_fp.layers import LinearFormat, PrecisionMap, linear_format
from lightning_fp.layers.changes import Change

AUTHOR = "fallback"
"""Of these writes, which have events of their own."""


def write_formats(
    table: PrecisionMap, formats: Mapping[str, LinearFormat], reason: str
) -> list[Change]:
    """Give layers other formats at once, through the table, as anybody.

    Args:
        table: of formats; between two optimizer steps, alike on all ranks.
        formats: by exact layer name.
        reason: a sentence for the log.

    Returns:
        What has changed.
    """
    for name, format in formats.items():
        pattern = f"re:{re.escape(name)}"
        table.set(pattern, linear_format(format), reason=reason, author=AUTHOR)
    return [change for change in table.apply() if change.author == AUTHOR]
