"""What `plan --hardware` predicts for the formats of a sweep."""

from __future__ import annotations

from lightning_fp.cli.commands.plan import planned
from lightning_fp.cli.commands.plan_hardware import outlook
from lightning_fp.cli.loading import UserModel
from lightning_fp.kernels.cost import DATA_SHEETS, Hardware
from lightning_fp.layers import linear_format
from lightning_fp.study.sweep.sweep import Sweep

__all__ = ["Hardware", "predicted"]


def predicted(sweep: Sweep, hardware: Hardware) -> dict[str, float | None]:
    """The speed-up of a whole step over bf16 by format; None of one that the card does not run.

    Args:
        sweep: whose model it is about, with the first cell's setting.
        hardware: the card.
    """
    found: dict[str, float | None] = {}
    first = sweep.cells[0]
    for name in dict.fromkeys(cell.format for cell in sweep.cells):
        found[name] = None
        if not linear_format(name).is_fp8:
            continue
        module = sweep.factory.job(first, sweep.steps, sweep.directory).module
        user = UserModel(model=module, example_input=module.example_input_array)
        try:
            report = planned(module, name, card=DATA_SHEETS[hardware])
        except ValueError:  # the card has no such products, or the model no layer for them
            continue
        found[name] = outlook(user, report, hardware).found.speedup_end_to_end
    return found
