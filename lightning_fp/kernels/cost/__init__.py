"""What a linear layer costs on a card, predicted: a roofline over counted passes."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.kernels.cost.data_sheets import DATA_SHEETS, DataSheet, Hardware
    from lightning_fp.kernels.cost.grouped import grouped_cost, predicted_grouped_speedup
    from lightning_fp.kernels.cost.linear import (
        LinearCost,
        gains,
        linear_cost,
        predicted_speedup,
        smallest_that_gains,
    )
    from lightning_fp.kernels.cost.passes import PASSES, Casting, Passes
    from lightning_fp.kernels.cost.products import product_seconds
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # the card
    "DATA_SHEETS",
    "DataSheet",
    "Hardware",
    # what is counted
    "PASSES",
    "Casting",
    "Passes",
    # what follows from it
    "LinearCost",
    "gains",
    "grouped_cost",
    "linear_cost",
    "predicted_grouped_speedup",
    "predicted_speedup",
    "product_seconds",
    "smallest_that_gains",
]
