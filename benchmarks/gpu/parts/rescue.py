"""One fault of precision on the card: unprotected, and with the fallback."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

from parts.card import Card
from parts.rows import Rows


def measure(card: Card, rows: Rows) -> None:
    from lightning_fp import PrecisionFallback
    from lightning_fp.demo.faults import CASES
    from lightning_fp.demo.faults.run import STEPS, FaultRun, fault_plugin, fault_run

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    case = CASES["gradient-overflow"]
    cuda = card.device.type == "cuda"
    base = "bf16-mixed" if cuda else "32-true"
    options: dict[str, Any] = {"accelerator": "gpu" if cuda else "cpu"}
    options["steps"] = 4 if card.small else STEPS

    def told(what: str, run: FaultRun) -> float:
        rows.add(what, run.final_loss, "nats", note="mean training loss of the last 30 steps")
        return run.final_loss

    high = told("in high precision", fault_run(None, None, precision=base, **options))
    plugin = fault_plugin(case.scaling, base)
    told("FP8 with the fault, unprotected", fault_run(case.make(), plugin, **options))
    with tempfile.TemporaryDirectory() as there:
        plugin = fault_plugin(case.scaling, base)
        fallback = PrecisionFallback(dirpath=there)
        saved = told(
            "the same with PrecisionFallback",
            fault_run(case.make(), plugin, [fallback], **options),
        )
    safer = {n: f for n, f in plugin.precision_map.formats().items() if f != case.scaling}
    note = f"1 is as good as high precision; formats that were changed: {safer or 'none'}"
    rows.add("its loss to that of high precision", saved / high, ratio=saved / high, note=note)
