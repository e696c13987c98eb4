"""TableOwner: who has a table of formats, and the precision around it."""

from __future__ import annotations

from typing import Protocol

from lightning_fp.layers.changes import Change
from lightning_fp.layers.conversion.report import ConversionReport
from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.precision_map import PrecisionMap


class TableOwner(Protocol):
    """A precision plugin, or a plain loop: what is done to formats is asked of it."""

    @property
    def precision_map(self) -> PrecisionMap:
        """The table."""
        ...

    @property
    def report(self) -> ConversionReport | None:
        """What the conversion did; None before it."""
        ...

    @property
    def base_format(self) -> LinearFormat:
        """The format of layers that are left alone."""
        ...

    @property
    def high_precision(self) -> LinearFormat:
        """The format to fall back to."""
        ...

    @property
    def falls_back_whole(self) -> bool:
        """Whether all layers fall back at once."""
        ...

    @property
    def scaler(self) -> object | None:
        """What scales the loss, if anything does."""
        ...

    def boundary(self) -> list[Change]:
        """Between two optimizer steps: what was written to the table takes effect."""
        ...
