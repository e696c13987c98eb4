"""How a format casts, in the words of the cost model."""

from __future__ import annotations

from lightning_fp.kernels.cost.passes import Casting
from lightning_fp.layers.format import LinearFormat


def casting_of(format: LinearFormat, backend: str = "auto") -> Casting | None:
    """How a format casts, for its cost; None where nothing is cast to FP8."""
    if format.scaling == "delayed" and backend == "transformer-engine":
        return "tensor-fused"
    if not format.is_fp8 or format.granularity == "nv":
        return None
    if format.granularity == "row":
        return "row-gw-hp" if format.grad_weight == "high" else "row"
    return format.granularity
