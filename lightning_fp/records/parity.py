"""What ParityProbe left behind, as one table."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa

log = logging.getLogger(__name__)

FILE = "parity.jsonl"
"""Name of the file inside of a run's directory: one line per probe."""

SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "layer": pa.string(),
        "format": pa.string(),
        "cosine": pa.float64(),
        "norm_ratio": pa.float64(),
        "cast_error": pa.float64(),
        "removed_error": pa.float64(),
        "removed_loss_gap": pa.float64(),
        "loss": pa.float64(),
        "loss_gap": pa.float64(),
        "grad_cosine": pa.float64(),
        "grad_norm_ratio": pa.float64(),
        "grad_error": pa.float64(),
        "noise": pa.float64(),
        "seconds": pa.float64(),
    }
)
"""One row per probe and layer. From "loss" on the columns are those of the whole probe, the same in
each of its rows. docs/parity-probe.md says what they mean; null stands for what was not tried or
is not finite."""

_OF_LAYER = SCHEMA.names[SCHEMA.names.index("layer") : SCHEMA.names.index("loss")]


def read_parity(run_dir: str | Path) -> pa.Table:
    """The probes of a run, also of one that still runs or was killed.

    Args:
        run_dir: the run's directory, with its `parity.jsonl`.

    Returns:
        A table with the columns of `SCHEMA`, by step; empty if there was no probe. Where a resumed
        run has repeated a step, the later probe counts.
    """
    path = Path(run_dir) / FILE
    probes: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            probe: dict[str, Any] = json.loads(line)
            step = int(probe["step"])
            layers = list(probe["layers"])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("line %d of %s cannot be read and is left out: %s", number, path, error)
            continue
        # A run that went back has a past of its own from there on.
        probes = {at: other for at, other in probes.items() if at < step}
        probes[step] = {**probe, "layers": layers}
    rows = [
        {name: (layer if name in _OF_LAYER else probe).get(name) for name in SCHEMA.names}
        for probe in probes.values()
        for layer in probe["layers"]
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _lines(path: Path) -> list[str]:
    """All whole lines; a crash can have torn the last one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
