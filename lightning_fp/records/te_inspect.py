"""Statistics of Transformer Engine's debug tools (nvdlfw_inspect) as rows of the run's table.

They come one number at a time, under the name "<layer>_<tensor>_<statistic>", the statistic perhaps
with a recipe before it (`LogTensorStats`, `LogFp8TensorStats` of Transformer Engine 2.20).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_fp.format_names import TE_FORMATS
from lightning_fp.records.tables import StatisticsWriter

OPERANDS = {"activation": "input", "weight": "weight", "gradient": "grad_output"}
"""Our name for each tensor that is cast; their statistics of products have no row here."""

RECIPES = {names.inspect: name for name, names in TE_FORMATS.items() if names.inspect}
"""Our name for each recipe that a statistic may be of."""

_WHAT_IF = {
    "fp8-dynamic": "what_if_dynamic_underflow_fraction",
    "fp8-block": "what_if_block_underflow_fraction",
}
"""Where the underflow goes that a recipe would have had in which the layer is not."""

_NAME = re.compile(
    rf"(?P<layer>.+)_(?P<tensor>{'|'.join(OPERANDS)})_(?:(?P<recipe>{'|'.join(RECIPES)})_)?"
    r"(?P<statistic>underflows%|overflows%|scale_inv_min|scale_inv_max|min|max)"
)


class InspectRecords:
    """Takes what nvdlfw_inspect logs into `<run_dir>/statistics/`, as ClampMonitor's rows are.

    >>> records = InspectRecords("run", lambda: {"blocks.0.up": "fp8-delayed"})
    >>> records.log_scalar("blocks.0.up_activation_overflows%", 0.5, iteration=16)
    >>> records.close()

    `lightning-fp stats` and the report read them. A directory has rows of this or of a
    ClampMonitor, not of both. `connect()` after `nvdlfw_inspect.api.initialize(...)`; in a
    distributed run on the first rank alone.

    Args:
        run_dir: the run's directory.
        formats: asked for each layer's format, e.g. `plugin.precision_map.formats`.
        step: the step the run begins or resumes at.
    """

    def __init__(
        self,
        run_dir: str | Path,
        formats: Callable[[], Mapping[str, str]],
        *,
        step: int = 0,
    ) -> None:
        self._writer = StatisticsWriter(Path(run_dir), step=step)
        self._formats = formats
        self._rows: dict[tuple[str, str], dict[str, float]] = {}
        self._iteration: int | None = None

    def connect(self) -> InspectRecords:
        """Hear everything that nvdlfw_inspect logs from here on.

        Raises:
            ImportError: naming the line that installs it.
        """
        if importlib.util.find_spec("nvdlfw_inspect") is None:
            raise ImportError("nvdlfw_inspect is not installed; pip install nvdlfw-inspect")
        logging = importlib.import_module("nvdlfw_inspect.logging")
        logging.MetricLogger.add_logger(self)
        return self

    def log_scalar(self, name: str, value: float, iteration: int, **_: object) -> None:
        """One number, as nvdlfw_inspect tells it.

        Args:
            name: "<layer>_<tensor>_<statistic>"; others than those of casts are left out.
            value: shares in per cent.
            iteration: of `nvdlfw_inspect.api.step`.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            return
        if iteration != self._iteration:
            self.flush()
            self._iteration = iteration
        row = self._rows.setdefault((found["layer"], OPERANDS[found["tensor"]]), {})
        recipe = RECIPES.get(found["recipe"] or "", "")
        row[f"{recipe}/{found['statistic']}"] = float(value)

    def flush(self) -> None:
        """Write the rows of the iteration so far."""
        rows, self._rows = self._rows, {}
        if not rows or self._iteration is None:
            return
        formats = self._formats()
        made = {key: _columns(row, formats.get(key[0], "")) for key, row in rows.items()}
        names = sorted({name for columns in made.values() for name in columns})
        nan = math.nan
        self._writer.append(
            {
                "step": [self._iteration] * len(made),
                "layer": [layer for layer, _ in made],
                "operand": [operand for _, operand in made],
                "format": [formats.get(layer, "") for layer, _ in made],
                "sampled": [True] * len(made),
                "sampled_at": [str(self._iteration)] * len(made),
                "sampled_steps": [1] * len(made),
                **{name: [row.get(name, nan) for row in made.values()] for name in names},
            }
        )

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._writer.flush()


def _columns(row: Mapping[str, float], format: str) -> dict[str, float]:
    """The columns that follow from what was told of one operand in one iteration."""
    base = format.partition("[")[0]

    def told(statistic: str) -> float | None:
        return row.get(f"/{statistic}", row.get(f"{base}/{statistic}"))

    columns: dict[str, float] = {}
    if (percent := told("underflows%")) is not None:
        columns["underflow_fraction"] = percent / 100
    if (percent := told("overflows%")) is not None:
        columns["clamped_fraction"] = percent / 100
    low, high = told("scale_inv_min"), told("scale_inv_max")
    if high:
        columns["scale"] = 1 / high
    if low and high:
        columns["scale_spread_bits"] = math.log2(high / low)
    ends = [abs(end) for end in (told("min"), told("max")) if end is not None]
    if len(ends) == 2:
        columns["amax"] = max(ends)
    for recipe, column in _WHAT_IF.items():
        if recipe != base and (percent := row.get(f"{recipe}/underflows%")) is not None:
            columns[column] = percent / 100
    return columns
