"""LowWatch: notices a fit that was to be in low precision and never was."""

from __future__ import annotations

from lightning_fp.layers import LinearFormat, PrecisionMap


class LowWatch:
    """Looks at the table once per training forward, until the first one in low precision.

    Args:
        table: the table of formats.
    """

    def __init__(self, table: PrecisionMap) -> None:
        self._table = table
        self._steps = 0
        self._looking = False

    def begin(self) -> None:
        """A fit begins."""
        self._steps, self._looking = 0, bool(self._asked())

    def step(self) -> None:
        """A training forward begins; not counted where it is one of a replay."""
        if not self._looking or self._table.frozen:
            return
        self._steps += 1
        layers = self._table.layers.values()
        self._looking = all(layer.format.is_high_precision for layer in layers)

    def end(self) -> str:
        """The fit is over: what is to be said of it, in a line; "" if all is well."""
        never, self._looking = self._looking and self._steps > 0, False
        if not never:
            return ""
        asked = self._asked()
        what = "FP8" if any(format.is_fp8 for format in asked) else "Low precision"
        layers = "its only layer" if len(asked) == 1 else f"all {len(asked)} layers"
        last = next(reversed(self._table.changes), None)
        why, do = "", "give these layers their formats earlier, or train longer"
        if last is not None:
            why = f" ({last.reason})" if last.reason else f" (set by {last.author})"
            if last.author == "rollout":
                do = (
                    "the run ended before its recipe got there: train longer, or shorten the recipe"
                )
        return (
            f"{what} was asked for but never on: {layers} stayed in high precision in every step"
            f"{why}; {do}"
        )

    def _asked(self) -> list[LinearFormat]:
        """The formats of the layers that the configuration gives one in low precision."""
        formats = [self._table.known[name] for name in self._table.configured().values()]
        return [format for format in formats if not format.is_high_precision]
