"""The cells of the matrix of strategies: strategy, format, compiled, checkpointed, watched by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

FORMATS: tuple[tuple[str, str], ...] = (
    ("fp32", "32-true"),
    ("bf16", "bf16-mixed"),
    ("bf16", "bf16-true"),
    ("fp16", "16-mixed"),
    ("fp16", "16-true"),
    ("fp8-dynamic", "bf16-mixed"),
    ("fp8-dynamic", "bf16-true"),
    ("fp8-delayed", "bf16-mixed"),
    ("fp8-delayed", "bf16-true"),
    ("fp8-auto", "bf16-mixed"),
    ("fp8-rowwise", "bf16-mixed"),
    ("fp8-rowwise-gw-hp", "bf16-mixed"),
    ("fp8-block", "bf16-mixed"),
    ("mxfp8", "bf16-mixed"),
    ("e8m3", "bf16-mixed"),
    ("e4m3-scaled", "bf16-mixed"),
)
"""Formats of the layers, and what everything else computes in."""

WORLDS = {"DDP": 2, "FSDP2": 2, "HSDP": 4, "tensor parallel": 2, "FSDP2 x tensor parallel": 4}
"""Strategies, and over how many ranks each runs eager: 2 x 2 where its mesh has two dimensions.
Compiled ones run over two, which is 1 x 2."""

IN_PARTS = ("tensor parallel", "FSDP2 x tensor parallel")
"""Whose layers are sharded: sums are made in parts, and a shard has a scale of its own."""

COMPILED = {"": "eager", "blocks": "blocks compiled", "model": "model compiled"}
WATCHED_BY = ("", "ClampMonitor", "PrecisionFallback")
WAYS: tuple[tuple[str, bool, str], ...] = (
    *product(("",), (False, True), WATCHED_BY),
    ("blocks", False, ""),
    ("blocks", True, ""),
    ("blocks", True, "ClampMonitor"),  # whose statistics take the compiler longest
    ("blocks", False, "PrecisionFallback"),
    ("blocks", True, "PrecisionFallback"),
    ("model", False, ""),
)
"""Compiled, checkpointed, watched by: what each format is trained in."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train."""

    strategy: str
    """A key of `WORLDS`; "" for one process."""

    format: str
    base: str
    compiled: str = ""
    """Each block by itself, the whole model, or nothing."""

    checkpointing: bool = False
    """Whether backward computes the activations of each block again."""

    watched_by: str = ""
    """A callback of this package."""

    def __str__(self) -> str:
        how = [COMPILED[self.compiled]]
        how += ["checkpointed"] if self.checkpointing else []
        how += [self.watched_by] if self.watched_by else []
        return f"{self.strategy}, {self.format} in {self.base}, {', '.join(how)}"


def cell_of(strategy: str, format: tuple[str, str], way: tuple[str, bool, str]) -> Cell:
    """One of `WORLDS`, one of `FORMATS` and one of `WAYS`."""
    (name, base), (compiled, checkpointing, watched_by) = format, way
    return Cell(
        strategy=strategy,
        format=name,
        base=base,
        compiled=compiled,
        checkpointing=checkpointing,
        watched_by=watched_by,
    )


def of(strategy: str) -> list[Cell]:
    """All cells of a strategy."""
    return [cell_of(strategy, format, way) for format, way in product(FORMATS, WAYS)]
